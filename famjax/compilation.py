"""`famjax compile`: what a step needs on a TPU slice, said by its compiler before one is paid for.

The real step is compiled for the real chips, which need not be here. What comes of it is evidence
of memory and of what chips send one another; no time is measured, and none is claimed.
"""

import argparse
import dataclasses
import pathlib
import re
import tempfile
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from famjax.errors import UserError
from famjax.evaluation import report
from famjax.inference import engine, sampling
from famjax.model import axes
from famjax.model.config import ModelConfig
from famjax.model.state import axes_of as state_axes
from famjax.model.state import empty_state
from famjax.parallel import hlo, topology
from famjax.parallel.mesh import MeshConfig, make_mesh
from famjax.parallel.placement import AxisRules, Placement
from famjax.training import distillation, trainable
from famjax.training.config import TrainConfig
from famjax.training.flops import flops_per_token, products, reading_flops_per_token
from famjax.training.checks import check_step
from famjax.training.optimizer import OptimizerConfig, make_optimizer, make_schedule
from famjax.training.step import make_train_step
from famjax.training.train_state import abstract, axes_of, init_train_state, param_axes

STEPS = ("train", "prefill", "decode")


class Run(NamedTuple):
  """What is compiled: a training run without its data.

  Attributes:
    model: configuration.
    optimizer: likewise.
    config: of training.
    mesh: sizes.
    rules: of names.
    batch_size: B.
    length: S.
  """

  model: ModelConfig
  optimizer: OptimizerConfig
  config: TrainConfig
  mesh: MeshConfig
  rules: AxisRules
  batch_size: int
  length: int


def compile_command(arguments: argparse.Namespace) -> int:
  """Compiles a step for a slice, prints a table and leaves `report.json`; 1 if it does not fit."""
  from famjax import configuration  # pylint: disable=import-outside-toplevel

  if not jax.config.jax_platforms:
    jax.config.update("jax_platforms", "cpu")  # the chips that are meant are elsewhere
  if arguments.slices < 1:
    raise UserError(f"--slices={arguments.slices}: use at least 1")
  devices = topology.devices_of(arguments.topology, arguments.slices)
  run = Run(**configuration.run_from_gin(arguments.gin_file, arguments.gin))
  if None in (run.model, run.batch_size, run.length):
    raise UserError("the gin files describe no run with a reader: begin with one of gin/runs/")
  found = {"topology": arguments.topology, "slices": arguments.slices, "step": arguments.step}
  found |= compiled(run, arguments.step, devices)
  if arguments.out:
    report.write_json(pathlib.Path(arguments.out) / "report.json", found)
  print(table(found))
  return 0 if found["fits"] else 1


def compiled(run: Run, step: str, devices) -> dict[str, Any]:
  """Compiles a step, and says what the compiler says, as JSON.

  Args:
    run: what is compiled.
    step: one of STEPS.
    devices: of the slice.

  Raises:
    UserError: something does not come out on the mesh.
  """
  if step == "train":
    check_step(*run)
  else:
    for part in (run.model, run.mesh, run.rules):
      part.validate()
  placement = Placement(make_mesh(run.mesh, devices), run.rules)
  config = run.config if step == "train" else TrainConfig(train_steps=1)  # no microbatches
  config.check_batch_size(run.batch_size, placement.row_parts)
  begun = time.perf_counter()
  make = {"train": _train, "prefill": _prefill, "decode": _decode}[step]
  with axes.placed_by(placement):
    trace, length, formula = make(run, placement)
    lowered = trace.lower()
  traced = time.perf_counter()
  found = {
      "device": devices[0].device_kind,
      "devices": len(devices),
      "mesh": dict(placement.mesh.shape),
      "model": dataclasses.asdict(run.model),
      "batch_size": run.batch_size,
      "length": length,
      "accumulate": config.accumulate,
      "memory_bytes": topology.hbm_bytes(devices[0]),
  }
  program, why, largest = _compile(lowered)
  found |= {"fits": program is not None, "why": why, "largest_buffers": largest}
  if program is None:
    return found
  cost, needed = program.cost_analysis() or {}, hlo.memory_of(program)
  used = needed["used"]
  memory = found["memory_bytes"]
  if memory and used > memory:  # the compiler has packed it in, and calls it more than there is
    why = f"{_size(used)} in all are more than the chip's {_size(memory)}"
    found |= {"fits": False, "why": why}
  text = program.as_text()
  cycles = hlo.estimated_cycles(text)
  return found | {
      "bytes_per_chip": needed,
      "flops_per_chip": {
          "formula": formula * run.batch_size * length / len(devices),
          "products of the program": products(trace.jaxpr.jaxpr) / len(devices),
          "compiler, loops once": cost.get("flops"),
      },
      "bytes_moved_per_chip, loops once": cost.get("bytes accessed"),
      "estimated_cycles_per_chip": sum(cycles.values()) or None,
      "estimated_cycles_in_loops": [{"loops": loops, "cycles": n} for loops, n in cycles.items()],
      "collectives": [
          c._asdict() | {"times": c.times, "total_bytes": c.total_bytes}
          for c in hlo.collectives(text)
      ],
      "seconds_to_trace": round(traced - begun, 1),
      "seconds_to_compile": round(time.perf_counter() - traced, 1),
  }


def _train(run: Run, placement: Placement):
  """The traced training step, tokens of a row, and FLOPs of a token by formula."""
  transformation = make_optimizer(run.optimizer, run.config.train_steps)
  schedule = make_schedule(run.optimizer, run.config.train_steps)
  graphdef, params = abstract(run.model)
  chosen = trainable.choose(run.config.trainable, run.model)
  teacher = distillation.teacher_config(run.config, run.model, chosen, run.length)

  def begin(params):
    trained, frozen = trainable.part(params, chosen)
    return init_train_state(
        trained, transformation, run.model, run.config, run.batch_size, frozen
    )

  state = jax.eval_shape(begin, params)
  state = placement.shapes(state, axes_of(state, run.model))
  shardings = jax.tree.map(lambda x: x.sharding, state)
  step = make_train_step(
      graphdef, run.model, run.config, transformation, schedule, teacher, placement, shardings
  )
  B, S = run.batch_size, run.length
  row = lambda dtype, *shape: _shape(placement, ("batch",), dtype, B, *shape)
  batch = {
      "tokens": row(jnp.int32, S), "targets": row(jnp.int32, S), "weights": row(jnp.float32, S),
      "start_of_sequence": row(bool), "lengths": row(jnp.int32),
  }  # fmt: skip
  flops = flops_per_token(
      run.model, S, run.config.follow_rows, frozen=chosen != "full", teacher=teacher
  )
  return step.trace(state, batch), S, flops.total


def _prefill(run: Run, placement: Placement):
  """As `_train`, the reading of one chunk of blocks after what the rows remember."""
  graphdef, params, reading = _inference(run, placement)
  S = engine.CHUNK_BLOCKS * run.model.memory.block_size
  tokens = _shape(placement, ("batch",), jnp.int32, run.batch_size, S)
  counts = _shape(placement, ("batch",), jnp.int32, run.batch_size)
  trace = engine._read.trace(  # pylint: disable=protected-access
      graphdef, params, tokens, counts, reading, within=False
  )
  return trace, S, _forward(run.model, S)


def _decode(run: Run, placement: Placement):
  """As `_train`, the writing of `engine.STEPS` tokens."""
  graphdef, params, reading = _inference(run, placement)
  B, V = run.batch_size, run.model.vocab_size
  row = lambda dtype, *shape: _shape(placement, ("batch",), dtype, B, *shape)
  samplers = jax.tree.map(lambda x: row(x.dtype), sampling.stack([sampling.Sampling()]))
  trace = engine._write.trace(  # pylint: disable=protected-access
      graphdef, params, reading, row(bool, V), samplers, row(jnp.int32), row(bool, V)
  )
  return trace, engine.STEPS, _forward(run.model, run.model.memory.block_size)


def _forward(model: ModelConfig, length: int) -> float:
  """FLOPs of a token by formula, forward alone, in rows that have been read for long."""
  return reading_flops_per_token(model, length, followed=True)


def _inference(run: Run, placement: Placement):
  """Graph, parameters and state of the model, LoRA merged, in the dtype of products."""
  model = dataclasses.replace(run.model, lora_rank=0, param_dtype=run.model.compute_dtype)
  graphdef, params = abstract(model)
  params = placement.shapes(params, param_axes(model))
  state = jax.eval_shape(lambda: empty_state(model, run.batch_size))
  state = placement.shapes(state, state_axes(state))
  row = lambda dtype, *shape: _shape(placement, ("batch",), dtype, run.batch_size, *shape)
  reading = engine.Reading(row(jnp.float32, model.vocab_size), state, row(jnp.int32, engine.TAIL))
  return graphdef, params, reading


def _shape(placement, names, dtype, *shape):
  names = (*names, *(None,) * (len(shape) - len(names)))
  return jax.ShapeDtypeStruct(shape, dtype, sharding=placement.sharding(names, shape))


def _compile(lowered) -> tuple[Any, str | None, list[dict[str, str]]]:
  """The program, or None and why it does not fit; and its largest buffers."""
  program = why = None
  with tempfile.TemporaryDirectory() as dump:
    try:
      program = lowered.compile(compiler_options={"xla_dump_to": dump})
    except jax.errors.JaxRuntimeError as error:
      lines = [line for line in str(error).splitlines() if "RESOURCE_EXHAUSTED: " in line]
      if not lines:
        raise
      why = lines[0].partition("RESOURCE_EXHAUSTED: ")[2]
    reports = sorted(pathlib.Path(dump).glob("*memory-usage-report.txt"))
    text = reports[-1].read_text() if reports else ""
  rows = _BUFFER.findall(text.partition("\n\n")[0])  # of the chip's main memory; the largest first
  return program, why, [{"size": size, "shapes": shapes} for size, shapes in rows[:5]]


_BUFFER = re.compile(r"^ +[\d.]+\w+\( *\d+%\); +([\d.]+\w+); +\d+; +\d+; (.*)$", re.M)


def table(found: dict[str, Any]) -> str:
  """`compiled`'s findings for people."""
  model = found["model"]
  mesh = " x ".join(f"{name} {size}" for name, size in found["mesh"].items())
  memory, slices = found["memory_bytes"], found["slices"]
  where = f"{slices} slices of {found['topology']}" if slices > 1 else found["topology"]
  rows = [
      ("step", f"{found['step']}, {found['batch_size']} rows of {found['length']:,} tokens,"
       f" {found['accumulate']} microbatches"),
      ("model", f"{model['num_layers']} layers, width {model['model_dim']},"
       f" {model['memory']['kind']}"),
      ("chips", f"{found['devices']} x {found['device']} ({where}), mesh {mesh}"),
      ("memory of a chip", _size(memory)),
  ]  # fmt: skip
  largest = [
      ("its largest buffers" if i == 0 else "", f"{buffer['size']}, in turn {buffer['shapes']}")
      for i, buffer in enumerate(found["largest_buffers"])
  ]
  if not found["fits"]:
    rows += [("DOES NOT FIT", found["why"]), *largest]
  if "bytes_per_chip" not in found:
    return _lines(rows)
  parts = found["bytes_per_chip"]
  rows += [
      ("  arguments", _size(parts["argument"])),
      ("  temporaries", _size(parts["temp"])),
      ("  output", f"{_size(parts['output'])}; {_size(parts['alias'])} of it in arguments' place"),
      ("  in all", _size(parts["used"])),
  ]
  flops = found["flops_per_chip"]
  rows += [
      ("FLOPs of a chip, by formula", f"{flops['formula']:.3g}"),
      ("  products of the program", f"{flops['products of the program']:.3g}"),
  ]
  once, cycles = ", the body of a loop counted once", ", collectives and kernels left out"
  for name, value, how in (
      ("  compiler", flops["compiler, loops once"], once),
      ("bytes moved, compiler", found["bytes_moved_per_chip, loops once"], once),
      ("cycles, compiler's estimate", found["estimated_cycles_per_chip"], cycles),
  ):
    rows.append((name, "it says none" if value is None else f"{value:.3g}{how}"))
  for one in found["collectives"]:
    loops = " x ".join(map(str, one["loops"]))
    where = f"in loops of {loops}" if loops else "in no loop"
    size = _size(one["total_bytes"])
    rows.append((one["kind"], f"{one['times']} times ({one['count']} {where}), {size} of results"))
  seconds = found["seconds_to_trace"], found["seconds_to_compile"]
  rows.append(("traced and compiled in", "{} s and {} s".format(*seconds)))
  return _lines(rows)


def _size(number: int | None) -> str:
  return "not known" if number is None else f"{number / 2**30:.2f} GiB"


def _lines(rows: list[tuple[str, str]]) -> str:
  wide = max(len(name) for name, _ in rows)
  return "\n".join(f"{name:<{wide}}  {value}" for name, value in rows)
