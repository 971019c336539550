"""`famjax bench`: cases timed in turn, beside the floor that this very machine sets.

The rates of the floor are measured in the same run. Of one step and length all memories are
compiled first; then each is called once to warm up, and then one after the other, round after
round, so that a machine that gets slower does so for all of them. Ratios are the result; absolute
times are notes.
"""

import argparse
from collections.abc import Sequence
import dataclasses
import json
import os
import pathlib
import re
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from famjax import locks
from famjax.bench import cases
from famjax.bench.cases import Case
from famjax.errors import UserError
from famjax.evaluation import report
from famjax.model.config import ModelConfig
from famjax.training.metrics import write_text
from famjax.training.optimizer import OptimizerConfig
from famjax.training.parameters import count
from famjax.training.train_state import abstract

_PAGES = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")


@dataclasses.dataclass(frozen=True)
class Bench:
  """What is measured.

  Attributes:
    model: whose memory is "fam".
    optimizer: of training.
    steps: of `cases.STEPS`.
    memories: of `cases.MEMORIES`.
    lengths: S, tokens of a row.
    batch_size: B, rows.
    repeats: timed calls of each case, after one that is not timed.
    limit_seconds: a call that must take longer, by its floor or by what a shorter one took, is left
      out; and of calls so slow that `repeats` of them take longer there are fewer.
    limit_bytes: a program that needs more memory is left out; None: as much as the machine has.
  """

  model: ModelConfig
  optimizer: OptimizerConfig = OptimizerConfig()
  steps: tuple[str, ...] = cases.STEPS
  memories: tuple[str, ...] = cases.MEMORIES
  lengths: tuple[int, ...] = (1024, 4096, 16384, 65536, 262144)
  batch_size: int = 1
  repeats: int = 5
  limit_seconds: float = 60.0
  limit_bytes: int | None = None

  def validate(self) -> None:
    """Raises UserError for a value that makes no sense."""
    for name, given, known in (
        ("steps", self.steps, cases.STEPS), ("memories", self.memories, cases.MEMORIES)
    ):  # fmt: skip
      if not given or not set(given) <= set(known):
        raise UserError(f"Bench.{name} is {given!r}: choose of {', '.join(known)}")
    if not self.lengths or min(*self.lengths, self.batch_size, self.repeats) < 1:
      raise UserError("Bench.lengths, batch_size and repeats must be at least 1")
    if not self.model.memory.length:
      raise UserError(f"the model's memory is {self.model.memory.kind!r}: give it a FAM")
    for case in self.cases():
      cases.model_of(self.model, case).validate()

  def cases(self) -> list[Case]:
    """All of them; those that differ in their memory alone stand together."""
    return [
        Case(step, memory, length, self.batch_size)
        for step in self.steps
        for length in sorted(self.lengths)
        for memory in self.memories
    ]


def rates(dtype: str, size: int) -> dict[str, float]:
  """What this machine can do: "flops" of matrix products and "bytes" of copying, a second each.

  Args:
    dtype: of the products' factors.
    size: bytes of what is copied; what fits into a cache is copied faster, as weights are read.
  """
  n = 2048 if jax.default_backend() == "cpu" else 8192
  size = min(max(size, 2**20), 2**29)
  a, x = jnp.ones((n, n), dtype), jnp.ones(size // 4, jnp.float32)
  multiply = jax.jit(lambda a: a @ a)
  # Into memory that is there already: what the system has to find anew is slower by far on a CPU.
  copy = jax.jit(lambda x, out: x + 1, donate_argnums=1, keep_unused=True)
  held = [jnp.zeros_like(x)]

  def copied():
    held[0] = copy(x, held[0])
    return held[0]

  return {
      "flops": 2 * n**3 / min(_laps(lambda: multiply(a), 6)),
      "bytes": 2 * size / min(_laps(copied, 12)),  # it reads and writes
  }


def _laps(function, repeats: int) -> list[float]:
  """Seconds of calls, the first left out."""
  jax.block_until_ready(function())
  found = []
  for _ in range(repeats):
    began = time.perf_counter()
    jax.block_until_ready(function())
    found.append(time.perf_counter() - began)
  return found


def measure(bench: Bench, out: pathlib.Path) -> dict:
  """Measures every case and leaves `report.json`, `table.md` and `bench.png`.

  A run that was stopped goes on: what stands in the report of the same bench is not measured again.

  Raises:
    UserError: a value makes no sense, or the report there is of another bench or machine.
  """
  bench.validate()
  file = out / "report.json"
  machine = report.machine()
  if jax.default_backend() == "cpu":
    machine["small_pages"] = small_pages()
  asked = json.loads(json.dumps({"bench": dataclasses.asdict(bench), "machine": machine}))
  found = json.loads(file.read_text()) if file.exists() else asked | {"cases": []}
  keys = [(name, key) for name in asked for key in {**asked[name], **found.get(name, {})}]
  if other := [key for name, key in keys if found.get(name, {}).get(key) != asked[name].get(key)]:
    raise UserError(f"{file} is of another bench or machine ({', '.join(other)}): name another --out")
  if "rates" not in found:
    found["parameters"] = count(abstract(bench.model)[1])
    size = found["parameters"] * np.dtype(bench.model.compute_dtype).itemsize
    found["rates"] = rates(bench.model.compute_dtype, size)
  found["command"] = ["famjax", *sys.argv[1:]]
  groups: dict[tuple[str, int], list[Case]] = {}
  for case in bench.cases():
    groups.setdefault((case.step, case.length), []).append(case)
  there = {(one["step"], one["length"]) for one in found["cases"]}
  for (step, length), group in groups.items():
    if (step, length) in there:
      continue
    results = _measure(bench, group, found)
    found["cases"] += results
    report.write_json(file, found)
    shown = ", ".join(f"{one['memory']} {_shown(one)}" for one in results)
    print(f"{step}, {length:,} tokens: {shown}", file=sys.stderr, flush=True)
  rows = report.markdown(table(found))
  write_text(out / "table.md", rows + "\n")
  plot(found, out / "bench.png")
  return found


def _shown(one: dict) -> str:
  return one.get("left_out") or f"{one['seconds']:.3g} s"


def _measure(bench: Bench, group: Sequence[Case], found: dict) -> list[dict]:
  """One step and length with all memories."""
  results, ready = [], {}
  for case in group:
    cost = cases.cost_of(bench.model, bench.optimizer, case)
    rate = found["rates"]
    floor = max(cost.flops / rate["flops"], cost.bytes / rate["bytes"])
    one = case._asdict() | cost._asdict() | {"floor_seconds": floor}
    results.append(one)
    if why := _too_slow(bench, one, found["cases"]):
      one["left_out"] = why
      continue
    made = cases.make(bench.model, bench.optimizer, case)
    one |= {"memory_bytes": made.memory_bytes, "compile_seconds": made.compile_seconds}
    if made.memory_bytes > (limit := bench.limit_bytes or _memory()):
      one["left_out"] = f"needs {made.memory_bytes / 2**30:.1f} of {limit / 2**30:.1f} GiB"
      continue
    ready[case] = made, one, []
  for made, one, _ in ready.values():
    one["first_seconds"] = _timed(made)
  for i in range(bench.repeats):
    for made, one, laps in ready.values():
      if i == 0 or one["first_seconds"] * i < bench.limit_seconds:
        laps.append(_timed(made))
  for _, one, laps in ready.values():
    one |= {"seconds": statistics.median(laps), "laps": laps}
    one["of_floor"] = one["floor_seconds"] / one["seconds"]
  return results


def _timed(made: cases.Ready) -> float:
  prepared = made.prepare()
  began = time.perf_counter()
  made.call(prepared)
  return time.perf_counter() - began


def _too_slow(bench: Bench, one: dict, before: Sequence[dict]) -> str | None:
  """Why a case is left out, if it must take too long."""
  least = one["floor_seconds"]
  for shorter in before:
    if (shorter["step"], shorter["memory"]) == (one["step"], one["memory"]):
      if "seconds" not in shorter:
        return shorter["left_out"]
      least = max(least, shorter["seconds"] * one["flops"] / shorter["flops"])
  return f"at least {least:,.0f} s" if least > bench.limit_seconds else None


def _memory() -> int:
  """Bytes that a program may have here."""
  stats = jax.local_devices()[0].memory_stats() or {}
  if "bytes_limit" in stats:
    return stats["bytes_limit"]
  lines = pathlib.Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
  free = next(line for line in lines if line.startswith("MemAvailable"))
  return int(free.split()[1]) * 1024 * 3 // 4  # malloc may keep what programs before had


def small_pages() -> bool:
  """Whether a step's memory comes in small pages, where malloc need only ask for huge ones."""
  asked = re.search(r"\bglibc\.malloc\.hugetlb=[12]", os.environ.get("GLIBC_TUNABLES", ""))
  return not asked and _PAGES.is_file() and "[madvise]" in _PAGES.read_text(encoding="ascii")


def table(found: dict) -> list[list[str]]:
  """Rows of cells, the first is the head: a row for each step and length."""
  memories = list(dict.fromkeys(one["memory"] for one in found["cases"]))
  head = ["step, tokens", *(f"{name}, tokens/s" for name in memories)]
  pairs = [("fam", other) for other in memories if other != "fam" and "fam" in memories]
  head += [f"time, {a} / {b}" for a, b in pairs] + [f"{name}, of the floor" for name in memories]
  head += [f"{name}, MiB" for name in memories]
  rows = [head]
  for step, length in dict.fromkeys((one["step"], one["length"]) for one in found["cases"]):
    of = {
        one["memory"]: one for one in found["cases"] if (one["step"], one["length"]) == (step, length)
    }
    speed = lambda one: (
        one.get("left_out") or f"{one['tokens'] / one['seconds']:,.0f} ± {_spread(one):.0%}"
    )
    timed = lambda *names: all("seconds" in of[name] for name in names)
    rows.append([
        f"{step}, {length:,}", *(speed(of[name]) for name in memories),
        *(f"{of[a]['seconds'] / of[b]['seconds']:.3f}" if timed(a, b) else "" for a, b in pairs),
        *(f"{of[name]['of_floor']:.0%}" if timed(name) else "" for name in memories),
        *(f"{of[name].get('memory_bytes', 0) / 2**20:,.0f}" if timed(name) else "" for name in memories),
    ])  # fmt: skip
  return rows


def _spread(one: dict) -> float:
  """Half of the range of the calls, over their median."""
  return (max(one["laps"]) - min(one["laps"])) / 2 / one["seconds"]


def plot(found: dict, path: pathlib.Path) -> None:
  """A panel for each step: time of a token by length, with the floors dotted."""
  import matplotlib  # pylint: disable=import-outside-toplevel

  matplotlib.use("Agg")
  from matplotlib import ticker  # pylint: disable=import-outside-toplevel
  import matplotlib.pyplot as plt  # pylint: disable=import-outside-toplevel

  steps = list(dict.fromkeys(one["step"] for one in found["cases"]))
  size = dict(figsize=(4.4 * len(steps), 3.8), dpi=150, layout="constrained", squeeze=False)
  figure, panels = plt.subplots(1, len(steps), **size)
  for axes, step in zip(panels[0], steps):
    for i, memory in enumerate(dict.fromkeys(one["memory"] for one in found["cases"])):
      mine = [one for one in found["cases"] if (one["step"], one["memory"]) == (step, memory)]
      for name, style in (("seconds", "-"), ("floor_seconds", ":")):
        points = [(one["length"], 1e3 * one[name] / one["tokens"]) for one in mine if "seconds" in one]
        label = memory if name == "seconds" else None
        axes.plot(*np.reshape(points, (-1, 2)).T, style, marker="o", ms=3, color=f"C{i}", label=label)
    axes.set(xscale="log", yscale="log", title=step, xlabel="tokens", ylabel="ms a token")
    lengths = sorted({one["length"] for one in found["cases"]})
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes.xaxis.minorticks_off()
    axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 3, 5, 7)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(ticker.NullFormatter())
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
  figure.suptitle("dotted: the floor by formula and this machine's rates", fontsize="small")
  figure.savefig(path)
  plt.close(figure)


def command(bench: Bench, arguments: argparse.Namespace) -> int:
  """`famjax bench`: prints the table."""
  out = pathlib.Path(arguments.out)
  if jax.default_backend() == "cpu" and small_pages():
    print("memory comes in small pages, which costs up to a third of a step's time here; without:"
          ' export GLIBC_TUNABLES="$GLIBC_TUNABLES:glibc.malloc.hugetlb=1"', file=sys.stderr)  # fmt: skip
  with locks.held(out, "report directory"):
    found = measure(bench, out)
  rate = found["rates"]
  print(f"{found['parameters']:,} parameters; {rate['flops'] / 1e9:,.1f} GFLOP/s of products and"
        f" {rate['bytes'] / 1e9:,.1f} GB/s of copying")  # fmt: skip
  print(report.markdown(table(found)))
  print(f"report: {out / 'report.json'}   plot: {out / 'bench.png'}")
  return 0
