"""What the attention kernel needs of a TPU beside plain JAX, said by the TPU compiler.

    python benchmarks/kernels.py
    python benchmarks/kernels.py --chip=v5e:2x2

A layer's attention over one row of 8 blocks of 1,024, M 3, F 64, with the heads of the paper's three
sizes, bfloat16: forward, forward after a past, as in reading on, and with gradients; and that of a
decoding step of 16 rows, which plain JAX makes. It needs the extra `tpu` (WORKSPACE.md, "Setting
up"), and no TPU. Nothing is measured. Writes `report.json` and `table.md` to runs/kernels.
"""

import argparse
import dataclasses
import pathlib
import time

import jax
import jax.numpy as jnp

from famjax.evaluation import report
from famjax.model import attention, axes, blocks
from famjax.model.attention import KeySet
from famjax.model.config import MemoryConfig, ModelConfig
from famjax.model.state import empty_state
from famjax.parallel import hlo, topology
from famjax.parallel.mesh import MeshConfig, make_mesh
from famjax.parallel.placement import AxisRules, Placement

CHIPS = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2")
HEADS = {"1B": (12, 12), "8B": (32, 32), "24B": (32, 1)}  # of queries, of keys; of width 128
BLOCKS = 8
# Blocks that were read before, and whether there are gradients.
PASSES = {"forward": (0, False), "after a past": (4, False), "and back": (0, True)}
DECODE_ROWS = 16
RECENT = 16  # tokens of a decoding loop that are not in the ring
MEMORY = MemoryConfig(block_size=1024, memory_segments=3, fam_length=64)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--out", type=pathlib.Path, default="runs/kernels")
  parser.add_argument("--chip", choices=CHIPS, action="append", help="one of these alone; repeats")
  arguments = parser.parse_args()
  jax.config.update("jax_platforms", "cpu")  # the chips that are meant are elsewhere
  found, decoding = [], []
  for chip in arguments.chip or CHIPS:
    for size, (heads, kv_heads) in HEADS.items():
      config = ModelConfig(
          num_heads=heads, num_kv_heads=kv_heads, head_dim=128, compute_dtype="bfloat16",
          memory=MEMORY,
      )  # fmt: skip
      for name, (P, gradients) in PASSES.items():
        case = {"chip": chip, "size": size, "pass": name}
        for kernel in ("none", "pallas"):
          here = dataclasses.replace(config, attention_kernel=kernel)
          case[kernel] = compiled(here, chip, P, gradients)
          print(case | {"kernel": kernel}, flush=True)
        found.append(case)
      decoding.append({"chip": chip, "size": size} | decoded(config, chip))
      print(decoding[-1], flush=True)
  about = {"machine": report.machine(), "cases": found, "decoding": decoding}
  report.write_json(arguments.out / "report.json", about)
  text = "\n\n".join(map(report.markdown, (table(found), decoding_table(decoding)))) + "\n"
  (arguments.out / "table.md").write_text(text)
  print(text)


def compiled(config: ModelConfig, chip: str, P: int, gradients: bool) -> dict[str, float]:
  """What the compiler says of one layer's attention."""
  N, F, d = config.memory.block_size, config.memory.length, config.head_width
  H, K, T = config.num_heads, config.kv_heads, BLOCKS
  placement, shape = _on(chip)
  past, own = (blocks.Past(shape(1, t, K, N, d), shape(1, t, K, N, d)) for t in (P, T))
  fam = KeySet(shape(1, T, K, F, d), shape(1, T, K, F, d))

  def attend(queries, past, own, fam):
    state = empty_state(config, 1, past=False).replace(position=jnp.full(1, P * N))
    layout = blocks.make_layout(state, T * N, None, aligned=True, within=False, N=N)
    return blocks.attend(queries, past, own, fam, layout, config)

  function = attend
  if gradients:
    # The gradient of what comes out is an argument: it stands in memory, as a layer's would.
    function = lambda given, *arrays: jax.vjp(attend, *arrays)[1](given)
  arrays = (shape(1, T, H, N, d), past, own, fam)
  began = time.perf_counter()
  with axes.placed_by(placement):
    lowered = jax.jit(function).lower(*([arrays[0]] if gradients else []), *arrays)
  program = lowered.compile()
  cost = program.cost_analysis()
  plain = config.attention_kernel == "none"
  return {
      "temp_bytes": hlo.memory_of(program)["temp"],
      "bytes_accessed": hlo.moved_bytes(program.as_text()) if plain else cost["bytes accessed"],
      "flops": cost["flops"],
      "seconds_to_compile": round(time.perf_counter() - began, 1),
  }


def decoded(config: ModelConfig, chip: str) -> dict[str, float]:
  """The same of one token's attention: what moves beside the keys and values that it sees."""
  H, K, d, B = config.num_heads, config.kv_heads, config.head_width, DECODE_ROWS
  placement, shape = _on(chip)
  seen = (MEMORY.memory_segments + 1) * MEMORY.block_size, MEMORY.length + RECENT
  sets = [(shape(B, 1, K, m, d), shape(B, 1, K, m, d)) for m in seen]

  def attend(queries, sets, stored, written):
    at = lambda count, m: (jnp.arange(m) < count[:, None])[:, None, None, None, None]
    masks = at(stored, seen[0]), at(MEMORY.length + written, seen[1])
    key_sets = [KeySet(*one, mask) for one, mask in zip(sets, masks)]
    return attention.attend(queries, key_sets)

  count = shape(B, dtype=jnp.int32)
  with axes.placed_by(placement):
    lowered = jax.jit(attend).lower(shape(B, 1, H, 1, d), sets, count, count)
  program = lowered.compile()
  return {
      "state_bytes": sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(sets)),
      "bytes_accessed": hlo.moved_bytes(program.as_text()),
      "temp_bytes": hlo.memory_of(program)["temp"],
      "estimated_cycles": sum(hlo.estimated_cycles(program.as_text()).values()),
  }


def _on(chip: str):
  """One chip's placement, and what makes shapes of arrays on it."""
  mesh = make_mesh(MeshConfig(data=1), topology.devices_of(chip)[:1])
  placement = Placement(mesh, AxisRules())

  def shape(*sizes, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(sizes, dtype, sharding=placement.whole)

  return placement, shape


def table(found) -> list[list[str]]:
  """A row for each case."""
  rows = [[
      "attention", "chip", "pass", "temporaries, MiB", "kernel's", "bytes, GiB", "kernel's",
      "GFLOPs", "kernel's", "compiled in, s", "kernel's",
  ]]  # fmt: skip
  scales = {"temp_bytes": 2**20, "bytes_accessed": 2**30, "flops": 1e9, "seconds_to_compile": 1}
  for case in found:
    cells = [
        f"{case[kernel][key] / scale:,.{1 if scale == 1 else 2 if scale == 2**30 else 0}f}"
        for key, scale in scales.items()
        for kernel in ("none", "pallas")
    ]
    rows.append([case["size"], case["chip"], case["pass"], *cells])
  return rows


def decoding_table(found) -> list[list[str]]:
  """Likewise for decoding."""
  rows = [[
      "decoding", "chip", "keys and values, MiB", "bytes, MiB", "ratio", "temporaries, MiB", "cycles"
  ]]  # fmt: skip
  mib = lambda number: f"{number / 2**20:,.0f}"
  for one in found:
    state, moved = one["state_bytes"], one["bytes_accessed"]
    rows.append([
        one["size"], one["chip"], mib(state), mib(moved), f"{moved / state:.2f}",
        mib(one["temp_bytes"]), f"{one['estimated_cycles']:.3g}",
    ])  # fmt: skip
  return rows


if __name__ == "__main__":
  main()
