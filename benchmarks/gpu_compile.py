"""What a GPU's compiler makes of a token and of a training step, said without a GPU.

    pip install --no-deps jax-cuda12-plugin==VERSION jax-cuda12-pjrt==VERSION    # of jax itself
    python benchmarks/gpu_compile.py                 # or decode, or train, alone: 1 and 6 minutes

Counted are kernels and the bytes that they write. Of benchmarks/gpu.py's 1B, for an H100, with a FAM
and without: the decoding loop, its layers stacked and apart, and the training step on a row of 8k
tokens by what `TRAIN` says. A kernel costs the time to start it, and what it writes is read again by
the next; the weights are read once whatever the program is like. The compiler tries nothing out here,
as it does where a card is, so that its choice of tiles may differ. Writes STEP.json and STEP.md to
runs/gpu_compile. `--fast` is a small model. Nothing is run: this is evidence, and no speed.
"""

import argparse
import dataclasses
import functools
import math
import os
import pathlib
import sys

os.environ["JAX_PLATFORMS"] = "cpu"  # what is here runs nothing
os.environ["XLA_FLAGS"] = "--xla_gpu_autotune_level=0"  # it would need a card

# pylint: disable=wrong-import-position
from flax import nnx
import gpu
import jax
from jax.experimental import topologies
import jax.numpy as jnp

from famjax import compilation
from famjax.bench import cases
from famjax.evaluation import report
from famjax.inference import engine, sampling
from famjax.model import axes
from famjax.model.decoder import Decoder
from famjax.model.state import empty_state, num_bytes, unstack
from famjax.parallel import hlo
from famjax.parallel.mesh import MeshConfig, make_mesh
from famjax.parallel.placement import AxisRules, Placement
from famjax.training.config import TrainConfig
from famjax.training.optimizer import OptimizerConfig

TARGET = """
gpu_device_info {
  cuda_compute_capability { major: 9 }
  core_count: 132  fpus_per_core: 128  clock_rate_ghz: 1.98  threads_per_warp: 32
  threads_per_block_limit: 1024  threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
  shared_memory_per_block: 49152  shared_memory_per_core: 233472  shared_memory_per_block_optin: 232448
  memory_bandwidth: 3352320000000  device_memory_size: 84942979072  l2_cache_size: 52428800
}
platform_name: "CUDA"
runtime_version { major: 12 minor: 8 }
dnn_version_info { major: 9 minor: 7 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""  # what XLA wants to know of a card

# Training steps: their memories, and settings of the model and of training.
TRAIN = {
    "a loop over layers, 1,024 tokens of logits": (("fam", "bswa"), dict(layers_unroll=1, loss_chunk=1024)),
    "layers one after another": (("fam", "bswa"), dict(loss_chunk=1024)),
    "and 4,096 tokens of logits": (("fam", "bswa"), {}),
    "and FAM with its tokens": (("fam",), dict(feedback_order="with_tokens")),
}  # fmt: skip


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("step", nargs="*", help="of decode, train; default: both")
  parser.add_argument("--out", type=pathlib.Path, default="runs/gpu_compile")
  parser.add_argument("--fast", action="store_true", help="a small model")
  arguments = parser.parse_args()
  if unknown := set(arguments.step) - set(STEPS):
    parser.error(f"{', '.join(sorted(unknown))}: choose of {', '.join(STEPS)}")
  arguments.out.mkdir(parents=True, exist_ok=True)
  try:
    (device,) = topologies.get_topology_desc(
        "h100", "cuda", target_config=TARGET, topology="1x1x1"
    ).devices
  except (RuntimeError, ValueError, NotImplementedError) as e:
    sys.exit(
        f"gpu_compile.py: error: no compiler for GPUs ({str(e).splitlines()[0]}): pip install --no-deps"
        f" jax-cuda12-plugin=={jax.__version__} jax-cuda12-pjrt=={jax.__version__}"
    )
  model = gpu.FAST if arguments.fast else gpu.MODEL
  for step in arguments.step or STEPS:
    found = []
    for one in STEPS[step](model, device):
      print(f"{step}: {one}", flush=True)
      found.append(one)
    report.write_json(arguments.out / f"{step}.json", {"found": found, "jax": jax.__version__})
    shown = lambda x: f"{x:,}" if isinstance(x, int) else x
    text = report.markdown([list(found[0]), *([shown(x) for x in one.values()] for one in found)])
    (arguments.out / f"{step}.md").write_text(text + "\n")
    print(text)


def decoding(model, device):
  """Rows of the table of a token."""
  for layers in ("stacked", "apart"):
    for memory in ("fam", "bswa"):
      yield {"layers": layers, "memory": memory, **decode_cost(model, memory, layers == "apart", device)}


def training(model, device):
  """Rows of the table of a training step."""
  for name, (memories, settings) in TRAIN.items():
    for memory in memories:
      yield {"step": name, "memory": memory, **train_cost(model, memory, settings, device)}


def decode_cost(model, memory: str, apart: bool, device) -> dict[str, int]:
  """Of a token of one row that has read 8k, and of the loop around it, which turns every 16 tokens."""
  config = cases.model_of(model, cases.Case("decode", memory, 8 * model.memory.block_size, 1))
  config = dataclasses.replace(config, param_dtype=config.compute_dtype)

  def given():
    decoder = Decoder(config, rngs=nnx.Rngs(0))
    graphdef, weights = nnx.split(decoder.layers)
    if apart:
      one = lambda l: nnx.merge(graphdef, jax.tree.map(lambda x: x[l], weights))
      decoder.layers = nnx.List(map(one, range(config.num_layers)))
    logits, tail = jnp.zeros((1, V)), jnp.zeros((1, engine.TAIL), jnp.int32)
    state = empty_state(config, 1)
    return decoder, engine.Reading(logits, unstack(state) if apart else state, tail)

  V = config.vocab_size
  decoder, reading = nnx.eval_shape(given)
  graphdef, params = nnx.split(decoder)
  rows = jax.ShapeDtypeStruct((1, V), bool), jax.ShapeDtypeStruct((1,), jnp.int32)
  samplers = jax.eval_shape(lambda: sampling.stack([sampling.Sampling()]))
  placement = Placement(make_mesh(MeshConfig(data=1), [device]), AxisRules())
  there = functools.partial(jax.ShapeDtypeStruct, sharding=placement.whole)
  params, reading, seen, samplers, limit, stop = jax.tree.map(
      lambda x: there(x.shape, x.dtype), (params, reading, rows[0], samplers, rows[1], rows[0])
  )
  with axes.placed_by(placement):
    lowered = engine._write.lower(  # pylint: disable=protected-access
        graphdef, params, reading, seen, samplers, limit, stop
    )
  found = {"kernels": 0, "written": 0, "around": 0}
  for one in hlo.kernels(lowered.compile().as_text()):  # in loops over: pieces, tokens, layers
    times = math.prod(one.loops[2:])
    if len(one.loops) > 1 and one.loops[1] != config.num_layers:
      found["kernels"] += times * one.count
      found["written"] += times * one.bytes
    elif one.loops:
      found["around"] += math.prod(one.loops[1:]) * one.count
  weights = num_bytes(nnx.state(decoder, nnx.Param))
  return {
      "kernels a token": found["kernels"], "MB written a token": found["written"] // 10**6,
      "MB of weights": weights // 10**6, "kernels around, for 16 tokens": found["around"],
  }  # fmt: skip


def train_cost(model, memory: str, settings: dict, device) -> dict[str, int | str]:
  """Of a step on a row of 8 blocks."""
  S = 8 * model.memory.block_size
  kernel = "pallas" if model.memory.block_size > 64 else "none"  # "auto" asks a card
  ours = dict(layers_unroll=model.num_layers, attention_kernel=kernel, loss_chunk=gpu.LOSS_CHUNK)
  settings = ours | settings
  loss_chunk = settings.pop("loss_chunk")
  config = cases.model_of(dataclasses.replace(model, **settings), cases.Case("train", memory, S, 1))
  run = compilation.Run(
      config, OptimizerConfig("adafactor"), TrainConfig(train_steps=1, loss_chunk=loss_chunk),
      MeshConfig(data=1), AxisRules(), 1, S,
  )  # fmt: skip
  placement = Placement(make_mesh(run.mesh, [device]), run.rules)
  with axes.placed_by(placement):
    trace, _, _ = compilation._train(run, placement)  # pylint: disable=protected-access
    program = trace.lower().compile()
  found = hlo.kernels(program.as_text())
  total = lambda name: sum(getattr(one, name) * math.prod(one.loops) for one in found)
  return {
      "kernels": total("count"), "GB written": f"{total('bytes') / 1e9:.1f}",
      "GiB of temporaries": f"{hlo.memory_of(program)['temp'] / 2**30:.1f}",
  }  # fmt: skip


STEPS = {"decode": decoding, "train": training}


if __name__ == "__main__":
  main()
