"""One training step and one evaluation step, as pure functions of state and batch."""

from collections.abc import Callable
import math

from flax import nnx
import jax
import jax.numpy as jnp
import optax

from famjax.model import axes, diagnostics
from famjax.model.config import ModelConfig
from famjax.model.rope import wavelength
from famjax.model.state import State, axes_of, empty_state, restart
from famjax.parallel.placement import Placement
from famjax.training.config import TrainConfig
from famjax.training.loss import LossSums, distillation_loss, next_token_loss
from famjax.training.train_state import Params, TrainState, abstract
from famjax.training.trainable import join

LOOK_BLOCKS = 4

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


def make_train_step(
    graphdef: nnx.GraphDef,
    model_config: ModelConfig,
    config: TrainConfig,
    optimizer: optax.GradientTransformation,
    schedule: Callable[[jax.Array], jax.Array],
    teacher: ModelConfig | None = None,
    placement: Placement | None = None,
    shardings: TrainState | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
  """Makes the training step.

  Args:
    graphdef: of the `Decoder`, see `train_state.split`.
    model_config: of the model.
    config: `accumulate`, `follow_rows`, `rsp_probability`, `random_offset`, `offset_cap`,
      `loss_chunk`.
    optimizer: optax transformation.
    schedule: step to learning rate, for the metrics.
    teacher: configuration of the decoder to learn from, whose parameters are the frozen ones
      (`distillation`); None: from the next tokens.
    placement: of arrays on a mesh of devices; None: everything is on one.
    shardings: of the state there.

  Returns:
    A jitted function of a state, whose memory it takes over, and a batch: `tokens`, `targets`
    int32 `[B, S]`, `weights` float32 `[B, S]`, `start_of_sequence` bool `[B]`, `lengths` int32
    `[B]`; S is a multiple of the block size and B of `accumulate`. It returns the next state and
    float32 scalars: `loss` (nats per unit of weight), `accuracy`, `weight`, `tokens`,
    `grad_norm` (before clipping), `learning_rate`.
  """
  teacher_graph = None if teacher is None else abstract(teacher)[0]
  loss_chunk = config.loss_chunk * _row_parts(placement)

  def loss_of_rows(
      params: Params, frozen: Params, rows: tuple[State, jax.Array, Batch, jax.Array | None]
  ):
    memory, start, batch, noise = rows
    model = nnx.merge(graphdef, join(params, frozen)).gathered()
    hidden, after = model.hidden(
        batch["tokens"], memory, start_of_sequence=start, lengths=batch["lengths"],
        aligned=True, detached=True, noise=noise,
    )  # fmt: skip
    wanted = batch["targets"], batch["weights"], loss_chunk
    if teacher_graph is None:
      sums = next_token_loss(model.logits, hidden, *wanted)
    else:
      original = nnx.merge(teacher_graph, frozen).gathered()
      taught, _ = original.hidden(batch["tokens"], lengths=batch["lengths"], detached=True)
      sums = distillation_loss(model.logits, hidden, original.logits, taught, *wanted)
    kept = (after.fam[:, 0], after.fam_updates[0])  # row 0's
    loss = sums.loss
    if after.penalty is not None:
      loss += after.penalty.mean() * sums.weight  # what is divided by the weight in the end
    return loss, (sums, kept, after if config.follow_rows else None)

  gradient = jax.grad(loss_of_rows, has_aux=True)

  def whole_batch(params, frozen, rows):
    """Sums of gradients and losses over the batch, row 0's FAM, and where the rows stopped."""
    if config.accumulate == 1:
      grads, (sums, kept, after) = gradient(params, frozen, rows)
      return grads, sums, kept, after

    def add(total, rows):
      grads, (sums, kept, after) = gradient(params, frozen, rows)
      return jax.tree.map(jnp.add, total, (grads, sums)), (kept, after)

    zeros = lambda x: jnp.zeros(x.shape, jnp.float32)
    zero = jax.tree.map(zeros, params), LossSums(*(jnp.zeros((), jnp.float32),) * 3)
    (grads, sums), (kept, after) = jax.lax.scan(add, zero, split_rows(rows, config.accumulate))
    return grads, sums, jax.tree.map(lambda x: x[0], kept), join_rows(after)

  def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
    memory, start = starting_memory(state, batch["start_of_sequence"], model_config, config)
    rows = (memory, start, batch, block_noise(state, batch["tokens"].shape, model_config, config))
    grads, sums, (fam, updates), after = whole_batch(state.params, state.frozen, rows)
    weight = jnp.where(sums.weight > 0, sums.weight, 1)  # a batch of padding has no gradient
    grads = jax.tree.map(lambda g, p: (g / weight).astype(p.dtype), grads, state.params)
    steps, opt_state = optimizer.update(grads, state.opt_state, state.params)
    kept_fam, kept_updates = state.kept_fam, state.kept_updates
    if kept_fam is not None:
      kept_fam = jnp.where(updates > 0, fam, kept_fam)  # row 0 may have been too short for a block
      kept_updates = jnp.where(updates > 0, updates, kept_updates)
    metrics = {
        "loss": sums.loss / weight,
        "accuracy": sums.correct / weight,
        "weight": sums.weight,
        "tokens": batch["lengths"].sum().astype(jnp.float32),
        "grad_norm": optax.tree.norm(grads),
        "learning_rate": schedule(state.step),
    }
    next_state = state.replace(
        step=state.step + 1,
        params=optax.apply_updates(state.params, steps),
        opt_state=opt_state,
        carry=after,
        kept_fam=kept_fam,
        kept_updates=kept_updates,
    )
    return next_state, metrics

  def placed_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
    with axes.placed_by(placement):
      return train_step(state, batch)

  out = None if placement is None else (shardings, placement.whole)
  return jax.jit(placed_step, donate_argnums=0, out_shardings=out)


def _row_parts(placement: Placement | None) -> int:
  """Devices that work on rows of their own: a chunk of tokens is meant for each of them."""
  return 1 if placement is None else placement.row_parts


def starting_memory(
    state: TrainState, start: jax.Array, model_config: ModelConfig, config: TrainConfig
) -> tuple[State, jax.Array]:
  """What each row remembers when a step begins, with everything that is drawn at random.

  Random position offset (B.2.2): a starting row's offset is uniform in `[0, min(2 pi theta, cap))`
  times a fair coin; it stays with the row while it is followed. Random state passing (B.2.3): with
  `rsp_probability` a starting row starts from the kept FAM, once there is one, from step `rsp_from`.

  Args:
    state: of the run.
    start: bool `[B]`, the batch's `start_of_sequence`.
    model_config: of the model.
    config: see `make_train_step`.

  Returns:
    The memory of the rows, and bool `[B]`, the rows that start from the initial FAM.
  """
  B = start.shape[0]
  key = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
  offset_key, coin_key, passing_key = jax.random.split(key, 3)
  memory = state.carry
  if memory is None:
    memory, start = empty_state(model_config, B, past=False), jnp.ones(B, bool)
  offset = jnp.zeros(B, jnp.int32)
  if config.random_offset:
    limit = min(math.ceil(wavelength(model_config.rope_theta)), config.offset_cap)
    coin = jax.random.bernoulli(coin_key, 0.5, (B,))
    offset = jax.random.randint(offset_key, (B,), 0, limit) * coin
  memory = memory.replace(offset=jnp.where(start, offset, memory.offset))
  if state.kept_fam is not None:
    passed = start & jax.random.bernoulli(passing_key, config.rsp_probability, (B,))
    passed &= (state.kept_updates > 0) & (state.step >= config.rsp_from)
    memory = restart(memory, passed, fam=state.kept_fam, fam_updates=state.kept_updates)
    start = start & ~passed
  return memory, start


def block_noise(
    state: TrainState, shape: tuple[int, int], model_config: ModelConfig, config: TrainConfig
) -> jax.Array | None:
  """Returns the noise of a step on the FAM, `[B, T, F, D]`, the same one in all layers.

  It is normal, `fam_block_noise` at the state's step times a factor in `[0, 1)` that each row draws.

  Args:
    state: of the run; its step and random key decide what is drawn.
    shape: B rows of S tokens.
    model_config: of the model.
    config: `fam_block_noise`.
  """
  memory = model_config.memory
  stages = config.block_noise_stages()
  if not memory.length or not any(share for _, share in stages):
    return None
  B, T = shape[0], shape[1] // memory.block_size
  key = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
  factor_key, normal_key = jax.random.split(jax.random.fold_in(key, 1))
  constants = [optax.constant_schedule(share) for _, share in stages]
  share = optax.join_schedules(constants, [step for step, _ in stages[1:]])(state.step)
  factor = share * jax.random.uniform(factor_key, (B, 1, 1, 1))
  return factor * jax.random.normal(normal_key, (B, T, memory.length, model_config.model_dim))


def make_eval_step(
    graphdef: nnx.GraphDef,
    model_config: ModelConfig,
    config: TrainConfig,
    placement: Placement | None = None,
) -> Callable[[Params, State | None, Batch], tuple[LossSums, State | None]]:
  """Makes the evaluation step: no random offset, no passed state, rows followed as in training.

  Returns:
    A jitted function of parameters, where the rows stopped (None if rows are not followed) and a
    batch, to the batch's sums and where the rows stop now.
  """

  loss_chunk = config.loss_chunk * _row_parts(placement)

  def eval_step(params: Params, carry: State | None, batch: Batch):
    model = nnx.merge(graphdef, params).gathered()
    start = batch["start_of_sequence"]
    if carry is None:
      carry, start = empty_state(model_config, start.shape[0], past=False), jnp.ones_like(start)
    hidden, after = model.hidden(
        batch["tokens"], carry, start_of_sequence=start, lengths=batch["lengths"],
        aligned=True, detached=True,
    )  # fmt: skip
    sums = next_token_loss(
        model.logits, hidden, batch["targets"], batch["weights"], loss_chunk
    )
    return sums, after if config.follow_rows else None

  def placed_step(params: Params, carry: State | None, batch: Batch):
    with axes.placed_by(placement):
      return eval_step(params, carry, batch)

  out = None if placement is None else (placement.whole, None)
  return jax.jit(placed_step, out_shardings=out)


def make_look_step(
    graphdef: nnx.GraphDef, placement: Placement | None = None
) -> Callable[[Params, Batch], dict[str, jax.Array]]:
  """Makes what measures the FAM in a batch: see `famjax.model.diagnostics`.

  Returns:
    A jitted function of parameters and a batch, to each measure's float32 `[L]`: of the first
    `LOOK_BLOCKS` blocks of the batch's longest row, as if a text began with them.
  """

  def look_step(params: Params, batch: Batch) -> dict[str, jax.Array]:
    model = nnx.merge(graphdef, params)
    most = LOOK_BLOCKS * model.config.memory.block_size
    row = batch["tokens"][jnp.argmax(batch["lengths"])]
    return diagnostics.measures(diagnostics.look(model, row[:most]))

  return jax.jit(look_step, out_shardings=None if placement is None else placement.whole)


def split_rows(tree, parts: int):
  """Deals the rows of every leaf out to `parts`, on a new leading axis.

  Part `i` has the rows `i`, `i + parts`, ...: each has as many of the rows of every device.
  """

  def cut(x, axis):
    shape = (*x.shape[:axis], x.shape[axis] // parts, parts, *x.shape[axis + 1 :])
    return jnp.moveaxis(x.reshape(shape), axis + 1, 0)

  return jax.tree.map(cut, tree, _row_axes(tree))


def join_rows(tree):
  """The inverse of `split_rows`."""

  def join(x, axis):
    x = jnp.moveaxis(x, 0, axis + 1)
    return x.reshape(*x.shape[:axis], x.shape[axis] * x.shape[axis + 1], *x.shape[axis + 2 :])

  return jax.tree.map(join, tree, _row_axes(tree))


def _row_axes(tree):
  """For every leaf the axis that its rows lie on: a `State`'s names say it; elsewhere the first."""

  def of(part):
    if isinstance(part, State):
      return jax.tree.map(lambda _, names: names.index("batch"), part, axes_of(part))
    return jax.tree.map(lambda _: 0, part)

  return jax.tree.map(of, tree, is_leaf=lambda part: isinstance(part, State))
