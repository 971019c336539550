"""The training loop, from top to bottom: check, build, initialise, write, train, end."""

from collections.abc import Callable
import contextlib
import itertools
import math
import operator
import os
import signal
import threading
from typing import Any, NamedTuple

from etils import epath
from flax import nnx
import jax
import numpy as np

from famjax import console, locks
from famjax.data import Reader, prefetch
from famjax.data.vocabularies import absolute
from famjax.errors import DivergedError, UserError
from famjax.model.config import ModelConfig
from famjax.model.decoder import Decoder
from famjax.model.state import axes_of as state_axes
from famjax.model.state import empty_state
from famjax.parallel import processes
from famjax.parallel.mesh import MeshConfig, make_mesh
from famjax.parallel.placement import AxisRules, Placement, put
from famjax.training import distillation, parameters, run_directory, trainable
from famjax.training.adoption import from_checkpoint
from famjax.training.checkpoint import About, Checkpoints, save_base
from famjax.training.checks import check
from famjax.training.config import TrainConfig
from famjax.training.flops import flops_per_token
from famjax.training.metrics import Clock, MetricsWriter, Progress, number, speed
from famjax.training.optimizer import OptimizerConfig, make_optimizer, make_schedule
from famjax.training.step import make_eval_step, make_look_step, make_train_step
from famjax.training.train_state import TrainState, abstract, axes_of, init_train_state
from famjax.training.train_state import param_axes, split


class TrainResult(NamedTuple):
  """What a run ends with.

  Attributes:
    state: after the last step.
    metrics: the last training and evaluation metrics, by split and name.
    terminated: SIGTERM ended the run before its last step.
  """

  state: TrainState
  metrics: dict[str, dict[str, float]]
  terminated: bool


def train(
    run_dir: str | os.PathLike[str],
    model: ModelConfig,
    train_reader: Reader,
    optimizer: OptimizerConfig = OptimizerConfig(),
    config: TrainConfig = TrainConfig(),
    eval_reader: Reader | None = None,
    vocabulary: str = "bytes",
    mesh: MeshConfig = MeshConfig(),
    rules: AxisRules = AxisRules(),
    *,
    settings: Callable[[], dict[str, str]] = dict,
) -> TrainResult:
  """Trains a model, or goes on with a run that was stopped.

  A run that was stopped after k steps and started again ends with the same bits as one that was
  not stopped, on the same hardware with the same number of devices.

  Args:
    run_dir: the run's directory; see run_directory.py for what is in it.
    model: of the model.
    train_reader: gives a batch per step; its length is a multiple of the block size.
    optimizer: how parameters move.
    config: everything else.
    eval_reader: gives the batches of an evaluation; None: there is none.
    vocabulary: the name under which a checkpoint records the readers' vocabulary.
    mesh: what the devices are used for.
    rules: what the axes of arrays are split over.
    settings: gives every setting by name, to be saved with the run; the command line's is gin's.

  Returns:
    The last state and metrics.

  Raises:
    UserError: something does not fit together; nothing has been written then.
    DivergedError: a loss or gradient is not finite. The newest checkpoint is from before it.
  """
  description = check(
      run_dir, model, train_reader, optimizer, config, eval_reader, vocabulary, mesh, rules,
      settings=settings,
  )  # fmt: skip
  run_dir = run_directory.place(run_dir)
  with run_directory.locked(run_dir) as lock:
    run_directory.check(run_dir, description)  # another run may have begun here since
    return _train(
        run_dir, lock, description, model, train_reader, optimizer, config, eval_reader, vocabulary,
        mesh, rules,
    )  # fmt: skip


def _train(
    run_dir: epath.Path,
    lock: locks.Lock | None,
    description: dict[str, Any],
    model: ModelConfig,
    train_reader: Reader,
    optimizer: OptimizerConfig,
    config: TrainConfig,
    eval_reader: Reader | None,
    vocabulary: str,
    mesh: MeshConfig,
    rules: AxisRules,
) -> TrainResult:
  """Trains in a directory that no other process uses. See `train`."""
  # ----------------------------------------------------------------------------------- devices
  placement = Placement(make_mesh(mesh), rules)
  B = train_reader.batch_size
  config.check_batch_size(B, placement.row_parts)
  train_reader = processes.own_rows(train_reader, placement.rows(B))
  if eval_reader is not None:
    eval_reader = processes.own_rows(eval_reader, placement.rows(eval_reader.batch_size))

  # ------------------------------------------------------------------------- model and optimizer
  graphdef, _ = abstract(model)
  transformation = make_optimizer(optimizer, config.train_steps)
  schedule = make_schedule(optimizer, config.train_steps)
  chosen, length = trainable.choose(config.trainable, model), train_reader.length
  teacher = distillation.teacher_config(config, model, chosen, length)
  flops = flops_per_token(
      model, length, config.follow_rows, frozen=chosen != "full", teacher=teacher
  )
  about = About(model, absolute(vocabulary), chosen)

  def begin(params):
    trained, frozen = trainable.part(params, chosen)
    return init_train_state(trained, transformation, model, config, B, frozen)

  fresh_params = lambda: split(Decoder(model, rngs=nnx.Rngs(config.seed)))[1]
  template = jax.eval_shape(lambda: begin(fresh_params()))
  template = placement.shapes(template, axes_of(template, model))
  shardings = jax.tree.map(lambda x: x.sharding, template)
  fresh = jax.jit(lambda: begin(fresh_params()), out_shardings=shardings)
  train_step = make_train_step(
      graphdef, model, config, transformation, schedule, teacher, placement, shardings
  )
  eval_step = make_eval_step(graphdef, model, config, placement)
  look_step = make_look_step(graphdef, placement)

  # --------------------------------------------------------------------------------- initialise
  # In this order: this run's own newest whole checkpoint; another checkpoint's parameters; chance.
  checkpoints = Checkpoints(run_dir / "checkpoints", config.keep_checkpoints)
  start = processes.whole_position(train_reader, train_reader.start())
  restored = checkpoints.restore_newest(template, start, about)
  if restored is not None:
    state = put(restored.state, shardings)
    position = processes.own_position(train_reader, restored.position)
    notes = [*restored.skipped, f"resuming {run_dir} after step {int(state.step)}"]
  elif config.init_checkpoint:
    params, original, notes = from_checkpoint(
        config, model, vocabulary, fresh_params, placement
    )
    if teacher is not None:
      notes += distillation.notes(config.init_checkpoint, original, length)
    params = put(params, placement.shardings(params, param_axes(model)))
    none = {"params": {}, "frozen": {}}
    state = jax.jit(
        lambda params: begin(params).replace(**none), out_shardings=shardings.replace(**none)
    )(params)  # all but the parameters, which are there
    trained, frozen = trainable.part(params, chosen)
    state, position = state.replace(params=trained, frozen=frozen), train_reader.start()
    del params, trained, frozen  # the step takes over the state's memory
  else:
    state, position = fresh(), train_reader.start()
    notes = [f"starting from random parameters, seed {config.seed}"]
  first_step = int(state.step)
  table = parameters.table(trainable.join(state.params, state.frozen))
  if state.frozen:
    counts = [f"{parameters.count(tree):,}" for tree in (state.params, state.frozen)]
    notes.append(f"trained: {counts[0]} parameters ({chosen}); {counts[1]} stay as they are")

  # --------------------------------------------------------------------------- write what it is
  about = about._replace(base=save_base(run_dir, state.frozen))
  writer, log = None, console.Log(None)
  if processes.is_first():
    run_directory.write(run_dir, description, table)
    log = console.Log(run_dir / "log.txt")
    writer = MetricsWriter(run_dir, tensorboard=config.tensorboard, step=first_step)
    if description["gin"]:
      log.print(run_directory.gin_text(description["gin"]), "")
    log.print(table, *notes, *filter(None, [writer.note]))

  # -------------------------------------------------------------------------------------- train
  device = jax.devices()[0].device_kind, jax.device_count()
  progress = Progress(config.train_steps, first_step, log=log, shown=processes.is_first())
  last = {}

  def report(split_name: str, step: int, values: dict[str, float]) -> None:
    last[split_name] = values
    if writer is not None:
      writer.write(step, split_name, values)

  def evaluate(step: int) -> None:
    params = trainable.join(state.params, state.frozen)
    values = run_evaluation(eval_step, params, eval_reader, model, config, placement)
    if step > first_step:
      report("eval", step, values)
    last["eval"] = values
    shown = (f"{name} {number(values[name])}" for name in ("loss", "accuracy"))
    progress.say(f"step {step}  eval {'  '.join(shown)}")

  def save(step: int) -> None:
    if processes.any_of_us(lock is not None and lock.lost):
      if lock is not None:
        lock.check()
      raise UserError(f"run directory {run_dir}: another process took over; nothing more is saved")
    whole = processes.whole_position(train_reader, position)
    checkpoints.save(state, whole, about, step)

  with contextlib.ExitStack() as stack:
    stack.push(lambda kind, error, _: kind and log.keep(f"famjax: {kind.__name__}: {error}"))
    stack.callback(progress.close)
    if writer is not None:
      stack.callback(writer.close)
    stack.enter_context(checkpoints)
    sigterm = stack.enter_context(_on_sigterm())
    batches = prefetch(train_reader, position, first_step, vocab_size=model.vocab_size)
    stack.callback(batches.close)
    clock, waiting = Clock(), []  # metrics of steps that the host has not looked at yet
    step = first_step
    while step < config.train_steps and not processes.asked_to_stop(sigterm, step):
      _, batch, position = next(batches)
      batch = placement.batch(batch, train_reader.rows, B)
      state, metrics = train_step(state, batch)
      waiting.append(metrics)
      step += 1
      if step == first_step + 1:
        jax.block_until_ready(metrics)
        progress.say(f"first step, with compilation: {clock.lap():.1f} s")
        tokens_timed = -float(metrics["tokens"])  # its time is not counted, nor are its tokens
      is_last = step == config.train_steps
      log_now = step % config.log_every == 0 or is_last
      save_now = is_last or (config.checkpoint_every and step % config.checkpoint_every == 0)
      eval_now = is_last or (config.eval_every and step % config.eval_every == 0)
      if log_now or save_now or eval_now:
        waiting = _look_at(waiting, step, run_dir)
      if log_now:
        values = _average(waiting)
        tokens = tokens_timed + sum(float(m["tokens"]) for m in waiting)
        if tokens > 0:
          values |= speed(flops, tokens, clock.lap(), *device)
        report("train", step, values)
        progress.advance(step, values)
        waiting, tokens_timed = [], 0.0
      with clock.paused():
        if save_now:
          save(step)
        if eval_now and eval_reader is not None:
          evaluate(step)
        if config.look_every and step % config.look_every == 0:
          seen = jax.device_get(look_step(trainable.join(state.params, state.frozen), batch))
          report("fam", step, _by_layer(seen))

    # ------------------------------------------------------------------------------------- end
    terminated = step < config.train_steps
    if terminated:
      _look_at(waiting, step, run_dir)
      save(step)
    elif step == first_step:  # there was nothing left to do
      progress.say(f"{run_dir} has all of its {config.train_steps} steps")
      if eval_reader is not None:
        evaluate(step)
  if terminated and processes.is_first():  # everything is on the disk by now
    log.print(
        f"famjax: SIGTERM: saved {run_dir} after step {step} of {config.train_steps}; the same"
        " command goes on from there"
    )
  log.close()
  return TrainResult(state, last, terminated)


def run_evaluation(
    eval_step,
    params,
    reader: Reader,
    model: ModelConfig,
    config: TrainConfig,
    placement: Placement,
) -> dict[str, float]:
  """Loss, accuracy and perplexity over the first `eval_batches` batches of a reader.

  Without a token that has a loss weight they are None.
  """
  B, carry, total = reader.batch_size, None, None
  if config.follow_rows:
    empty = lambda: empty_state(model, B)
    shapes = jax.eval_shape(empty)
    where = placement.shardings(shapes, state_axes(shapes))
    carry = jax.jit(empty, out_shardings=where)()  # no device holds more of it than its part
  ahead = prefetch(reader, reader.start(), 0, vocab_size=model.vocab_size)
  with contextlib.closing(ahead) as batches:
    for _, batch, _ in itertools.islice(batches, config.eval_batches):
      sums, carry = eval_step(params, carry, placement.batch(batch, reader.rows, B))
      total = sums if total is None else jax.tree.map(operator.add, total, sums)
  loss, weight, correct = map(float, jax.device_get(total))
  mean = loss / weight if weight else None
  return {
      "loss": mean,
      "accuracy": correct / weight if weight else None,
      "perplexity": math.exp(min(mean, 700.0)) if weight else None,
      "weight": weight,
  }


def _look_at(waiting: list, last_step: int, run_dir: os.PathLike[str]) -> list:
  """Brings metrics to the host, and raises DivergedError for the first that is not finite."""
  waiting = jax.device_get(waiting)
  for step, metrics in enumerate(waiting, last_step - len(waiting) + 1):
    for name in ("loss", "grad_norm"):
      if not np.isfinite(metrics[name]):
        raise DivergedError(
            f"{name} is {metrics[name]} at step {step}: the run has stopped; whatever is in"
            f" {run_dir / 'checkpoints'} is from before it. Lower the learning rate, or clip"
        )
  return waiting


def _by_layer(seen: dict[str, np.ndarray]) -> dict[str, float]:
  """Measures `[L]` under the names of their layers, and under their own the means of all layers."""
  values = {name: float(column.mean()) for name, column in seen.items()}
  for name, column in seen.items():
    values |= {f"{name}/{layer}": float(value) for layer, value in enumerate(column)}
  return values


def _average(metrics: list[dict[str, np.ndarray]]) -> dict[str, float | None]:
  """Means over steps; losses and accuracies by weight. `learning_rate` is the last one.

  Steps whose tokens have no loss weight at all have no loss: None.
  """
  weights = np.array([m["weight"] for m in metrics], np.float64)

  def by_weight(name):
    total = weights.sum()
    return float(sum(m[name] * w for m, w in zip(metrics, weights)) / total) if total else None

  return {
      "loss": by_weight("loss"),
      "accuracy": by_weight("accuracy"),
      "grad_norm": float(np.mean([m["grad_norm"] for m in metrics])),
      "learning_rate": float(metrics[-1]["learning_rate"]),
  }


@contextlib.contextmanager
def _on_sigterm():
  """An event that SIGTERM sets. A second SIGTERM ends the process as it always does."""
  event = threading.Event()

  def note(signum, frame):
    del signum, frame
    event.set()
    signal.signal(signal.SIGTERM, before)

  # Of several processes, JAX itself hears the signal that one of them gets (`processes`).
  if threading.current_thread() is not threading.main_thread() or jax.process_count() > 1:
    yield event
    return
  before = signal.signal(signal.SIGTERM, note)
  try:
    yield event
  finally:
    signal.signal(signal.SIGTERM, before)
