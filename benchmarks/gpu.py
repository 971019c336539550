"""What a GPU makes of famjax: the attention kernel, and the steps of a model of the paper's 1B.

    python benchmarks/gpu.py                      # all of it: some ten minutes, a card of 80 GB
    python benchmarks/gpu.py kernel               # attention alone: plain JAX, kernel, cuDNN
    python benchmarks/gpu.py train_8k --profile   # and where the time of that step goes

A training step is that of `famjax bench`, with weights in float32 and products in bfloat16,
Adafactor, a vocabulary of 256k, M 3, F 64 and blocks of 1,024. `train_8k` has one row of 8k tokens, `train_2x8k` two,
`train_64k` one of 64k and `train_8x8k` eight of 8k, both with layers made again in the backward pass;
`decode` writes a block after 8k tokens. Every line is printed as soon as it is there, and all of them stand in
runs/gpu/report.json. Where no layer is made again, layers stand one after another in the program
(`--layers_unroll`). `--fast` is a few tokens of a small model, on any machine.
"""

import argparse
from collections.abc import Callable
import dataclasses
import functools
import pathlib
import re
import statistics
import tempfile
import time

import jax
import jax.numpy as jnp

from famjax.bench import cases
from famjax.evaluation import report
from famjax.kernels import block_attention_gpu
from famjax.model import blocks
from famjax.model.attention import KeySet
from famjax.model.config import FEEDBACK_ORDERS, MemoryConfig, ModelConfig
from famjax.model.state import empty_state
from famjax.training.flops import PEAK_FLOPS, products
from famjax.training.optimizer import OptimizerConfig

MODEL = ModelConfig(
    vocab_size=256000, num_layers=18, model_dim=1536, num_heads=12, ff_dim=12288,
    compute_dtype="bfloat16", feedback_unroll=8,
    memory=MemoryConfig(block_size=1024, memory_segments=3, fam_length=64),
)  # fmt: skip
LOSS_CHUNK = 4096
FAST = dataclasses.replace(
    MODEL, feedback_unroll=1, vocab_size=64, num_layers=1, model_dim=32, num_heads=2, ff_dim=32,
    memory=MemoryConfig(block_size=16, memory_segments=1, fam_length=4),
)  # fmt: skip
# Steps: what, length, rows, memories, how layers are kept.
STEPS = {
    "train_8k": ("train", 8192, 1, ("fam", "bswa"), "none"),
    "train_2x8k": ("train", 8192, 2, ("fam", "bswa"), "none"),
    "decode": ("decode", 8192, 1, ("fam", "bswa"), "none"),
    "train_64k": ("train", 65536, 1, ("fam", "full"), "full"),
    "train_8x8k": ("train", 8192, 8, ("fam",), "full"),
}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("what", nargs="*", help=f"of kernel, {', '.join(STEPS)}; default: all")
  parser.add_argument("--out", type=pathlib.Path, default="runs/gpu")
  parser.add_argument("--repeats", type=int, default=5)
  parser.add_argument("--profile", action="store_true", help="kernels of the first step")
  parser.add_argument("--layers_unroll", type=int, default=MODEL.num_layers)
  parser.add_argument("--loss_chunk", type=int, default=LOSS_CHUNK)
  parser.add_argument("--feedback_order", choices=FEEDBACK_ORDERS, default="auto")
  parser.add_argument("--fast", action="store_true")
  arguments = parser.parse_args()
  unknown = set(arguments.what) - {"kernel", *STEPS}
  if unknown:
    parser.error(f"{', '.join(sorted(unknown))}: choose of kernel, {', '.join(STEPS)}")
  found = {"machine": report.machine(), "device": jax.devices()[0].device_kind, "lines": []}
  began = time.perf_counter()

  def say(line: dict) -> None:
    found["lines"].append(line)
    shown = ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in line.items())
    print(f"[{time.perf_counter() - began:4.0f} s] {shown}", flush=True)
    report.write_json(arguments.out / "report.json", found)

  for what in arguments.what or ("kernel", *STEPS):
    if what == "kernel":
      measure_kernel(FAST if arguments.fast else MODEL, arguments, say)
    else:
      measure_step(what, FAST if arguments.fast else MODEL, arguments, say)


def measure_kernel(config: ModelConfig, arguments, say: Callable[[dict], None]) -> None:
  """One layer's attention over a row of 8 blocks: forward, and with all gradients."""
  N, F, d = config.memory.block_size, config.memory.length, config.head_width
  B, T, H = 1, 8, config.num_heads
  keys = iter(jax.random.split(jax.random.key(0), 6))
  draw = lambda *shape: jax.random.normal(next(keys), shape, jnp.bfloat16)
  queries, own = draw(B, T, H, N, d) * d**-0.5, blocks.Past(draw(B, T, H, N, d), draw(B, T, H, N, d))
  fam = KeySet(draw(B, T, H, F, d), draw(B, T, H, F, d))
  past = blocks.no_past(B, config)

  def attend(kernel, queries, own, fam):
    here = dataclasses.replace(config, attention_kernel=kernel)
    layout = blocks.make_layout(
        empty_state(here, B, past=False), T * N, None, aligned=True, within=False, N=N
    )
    return blocks.attend(queries, past, own, fam, layout, here)

  def library(queries, own, fam):
    """The same tokens by cuDNN, a call for each distance, their results not yet merged."""
    del fam
    last = lambda x: jnp.moveaxis(x[0], 1, 2)  # [T, N, H, d]
    q, k, v = last(queries), last(own.keys), last(own.values)
    dpa = functools.partial(jax.nn.dot_product_attention, implementation="cudnn", scale=1.0)
    earlier = range(1, config.memory.memory_segments + 1)
    return [dpa(q, k, v, is_causal=True)] + [dpa(q[x:], k[:-x], v[:-x]) for x in earlier]

  on_gpu = jax.default_backend() == "gpu"
  kernel = functools.partial(attend, "pallas" if on_gpu else "interpret_gpu")
  ways = {"plain": functools.partial(attend, "none"), "kernel": kernel}
  if on_gpu:
    ways["cuDNN, unmerged"] = library
  traced = jax.jit(ways["kernel"]).trace(queries, own, fam)
  flops = products(traced.jaxpr.jaxpr)  # forward; backward 2.5 times as many
  total = lambda function, *a: sum(x.astype(jnp.float32).sum() for x in jax.tree.leaves(function(*a)))
  for name, function in ways.items():
    gradient = jax.grad(functools.partial(total, function), (0, 1, 2))
    for passes, program, times in (("forward", function, 1), ("and back", gradient, 3.5)):
      seconds = lap(jax.jit(program), (queries, own, fam), arguments.repeats)
      say({
          "attention": name, "pass": passes, "ms": 1e3 * seconds,
          "TFLOP/s": times * flops / seconds / 1e12,
      })  # fmt: skip


def lap(function, given, repeats: int) -> float:
  """Seconds of a call, of so many tens that follow one another without a wait."""
  jax.block_until_ready(function(*given))
  began = time.perf_counter()
  for _ in range(10 * repeats):
    out = function(*given)
  jax.block_until_ready(out)
  return (time.perf_counter() - began) / (10 * repeats)


def measure_step(what: str, config: ModelConfig, arguments, say: Callable[[dict], None]) -> None:
  """The step of a name, with each of its memories."""
  step, length, rows, memories, remat = STEPS[what]
  if arguments.fast:
    length = length // 1024 * config.memory.block_size
  optimizer = OptimizerConfig(name="adafactor")
  unroll = min(arguments.layers_unroll, config.num_layers) if remat == "none" else 1
  order = arguments.feedback_order
  config = dataclasses.replace(config, remat=remat, layers_unroll=unroll, feedback_order=order)
  for memory in memories:
    case = cases.Case(step, memory, length, rows)
    cost = cases.cost_of(config, optimizer, case)
    ready = cases.make(config, optimizer, case, arguments.loss_chunk)
    laps = []
    for i in range(arguments.repeats + 1):
      prepared = ready.prepare()
      began = time.perf_counter()
      ready.call(prepared)
      laps.append(time.perf_counter() - began)
      if not i:
        laps.clear()  # warm-up
    seconds = statistics.median(laps)
    peak = PEAK_FLOPS.get(jax.devices()[0].device_kind, float("nan"))
    say({
        "step": what, "memory": memory, "order": order, "layers_unroll": unroll,
        "ms": 1e3 * seconds, "slowest ms": 1e3 * max(laps),
        "tokens/s": cost.tokens / seconds, "MFU": cost.flops / seconds / peak,
        "GB/s that it must move": cost.bytes / seconds / 1e9,
        "GiB": ready.memory_bytes / 2**30, "compile s": ready.compile_seconds,
    })  # fmt: skip
    if arguments.profile and memory == memories[0]:
      show_profile(ready)
      arguments.profile = False


def show_profile(ready: cases.Ready, most: int = 45) -> None:
  """Prints the device's time by kernel, and by kernels of a kind."""
  with tempfile.TemporaryDirectory() as folder:
    prepared = ready.prepare()
    with jax.profiler.trace(folder):
      ready.call(prepared)
    (file,) = pathlib.Path(folder).rglob("*.xplane.pb")
    planes = jax.profiler.ProfileData.from_file(str(file)).planes
    events = [
        event
        for plane in planes if "GPU" in plane.name
        for line in plane.lines if "Stream" in line.name
        for event in line.events
    ]  # fmt: skip
    if not events:
      print("  no device in this profile", flush=True)
      return
    spent = {}
    for event in events:
      for name in (event.name[:80], "all " + re.sub(r"[_.\d]+$", "", event.name)[:40]):
        time_of, count = spent.get(name, (0.0, 0))
        spent[name] = time_of + event.duration_ns / 1e6, count + 1
  busy = sum(event.duration_ns for event in events) / 1e6
  span = max(e.start_ns + e.duration_ns for e in events) - min(e.start_ns for e in events)
  print(f"  busy {busy:.1f} of {span / 1e6:.1f} ms, {len(events)} kernels", flush=True)
  for kinds in (True, False):
    chosen = [(name, *at) for name, at in spent.items() if name.startswith("all ") == kinds]
    for name, ms, count in sorted(chosen, key=lambda x: -x[1])[:most]:
      print(f"  {ms:9.2f} ms {count:6d}  {name}", flush=True)


if __name__ == "__main__":
  main()
