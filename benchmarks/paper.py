"""The paper's claims in small: every row trained, measured, and put beside the paper's numbers.

    python benchmarks/paper.py
    python benchmarks/paper.py --train=books/train --valid=books/valid
    python benchmarks/paper.py --row=fig7 --row=table5
    python benchmarks/paper.py --fast

A row is a study, gin/paper/ROW.gin: several models on three seeds, which `famjax study` alone runs
as well. Rows share models, and what is there already is not made again. Without --train and --valid
the texts are the Python library's own sources. --fast: a few steps of one layer on one seed; it
shows that all of it runs, and nothing else.

A claim says that one model is better than another, or no better. It is held against the difference
of the two, paired by seed, which counts where it is beyond twice its standard error and of one sign
on all seeds. Writes `report.json`, `tables.md` and `paper.png` to runs/paper.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time
from typing import NamedTuple

import common

SHAPE = dict(layers=4, width=256, ff=704, vocab=256, block=256, segments=3, fam=16)  # of the cost
LENGTHS = (25_600, 64_000, 129_024, 258_048)  # tokens; the paper's 26k to 258k
REPEATS = 3


class Claim(NamedTuple):
  """What the paper says: `one` is better than `other`, or no better, beyond a length."""

  one: str
  other: str
  paper: str
  better: bool = True
  past: int | None = None  # None: PAST


class Row(NamedTuple):
  """A figure or table of the paper; its study includes gin/paper/BASE.gin."""

  name: str
  base: str
  claims: tuple[Claim, ...]


PAST = {"keys": 6, "texts": 256}  # blocks, bytes: models are compared beyond
ROWS = {
    "fig3a": Row("Fig. 3a", "keys", (
        Claim("FAM", "BSWA M3", "FAM perfect to 260k tokens; BSWA far below its theoretical field"),
        Claim("BSWA M2", "BSWA M1", "BSWA improves up to M2", past=0),
        Claim("BSWA M3", "BSWA M2", "and then no more", better=False, past=0),
        Claim("BSWA M1", "BSWA M1 SG", "with stopped gradients M1 sees one window", past=0),
    )),
    "fig5": Row("Fig. 5", "texts", (
        Claim("FAM", "without RPO", "PG-19 falls without RPO"),
        Claim("FAM", "without RSP", "PG-19 falls without RSP"),
        Claim("FAM", "prefix", "PG-19 falls with a prefix"),
    )),
    "fig6": Row("Fig. 6", "texts", (
        Claim("FAM", "without RSP", "RSP is best at 0.8"),
        Claim("FAM", "RSP 0.4", "RSP is best at 0.8"),
        Claim("FAM", "RSP 1.0", "RSP is best at 0.8"),
    )),
    "fig7": Row("Fig. 7", "keys", (
        Claim("FAM", "AutoCompressors", "AutoCompressors drop after the 18k seen in training"),
        Claim("FAM", "RMT", "RMT is worse than FAM"),
        Claim("BSWA M1", "RMT", "RMT is worse than BSWA M1"),
    )),
    "fig9": Row("Fig. 9", "keys", (
        Claim("FM1", "BSWA M1", "feedback memory segments beat BSWA"),
        Claim("FAM", "FM4", "but fall short of FAM"),
        Claim("FAM", "SUM FAM", "static summary queries fail"),
    )),
    "table5": Row("Table 5", "keys", (
        Claim("FAM", "F 2", "F 4/16/64/256/1024: Qasper 5.0/6.0/7.2/5.1/5.3, best in the middle"),
        Claim("FAM", "F 16", "best in the middle"),
    )),
    "table6": Row("Table 6", "keys", (
        Claim("2 FAMs", "FAM", "1/2/3/4/6 FAMs: XLSum 15.9/15.8/15.7/15.1/16.2", better=False),
        Claim("4 FAMs", "FAM", "no gain", better=False),
    )),
    "table7": Row("Table 7", "texts", (
        Claim("FAM", "float", "last/float/zero: PG-19 47.7/47.6/47.3, last is best"),
        Claim("FAM", "zero", "last is best"),
    )),
    "table8": Row("Table 8", "texts", (
        Claim("Transformer-XL", "BSWA M1", "the two are about equal", better=False),
    )),
    "table11": Row("Table 11", "texts", (
        Claim("BSWA M1", "BSWA M0", "PG-19: M0 43.0, M1 46.4"),
        Claim("BSWA M3", "BSWA M1", "PG-19: M1 46.4, M3 46.3", better=False),
        Claim("BSWA M8", "BSWA M1", "PG-19: M1 46.4, M8 45.7", better=False),
        Claim("FAM M3", "BSWA M3", "PG-19: BSWA M3 46.3, FAM M3 47.0"),
        Claim("FAM M3", "BSWA M8", "PG-19: BSWA M8 45.7, FAM M3 47.0"),
    )),
}  # fmt: skip
COST = "tables13_14"


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--out", type=pathlib.Path, default="runs/paper")
  parser.add_argument("--row", action="append", choices=[*ROWS, COST], help="several; all if none")
  parser.add_argument("--train", help="directory of texts to train on")
  parser.add_argument("--valid", help="directory of texts to ask about")
  parser.add_argument("--fast", action="store_true", help="a few steps: whether all of it runs")
  parser.add_argument("--parallel", type=int, default=len(os.sched_getaffinity(0)))
  parser.add_argument("--cost", type=json.loads, help=argparse.SUPPRESS)  # see `_cost`
  arguments = parser.parse_args()
  if arguments.cost:
    print(json.dumps(read(*arguments.cost)))
    return
  if bool(arguments.train) != bool(arguments.valid):
    parser.error("give both --train and --valid, or neither")
  out = arguments.out.absolute()
  common.keep_arguments(out, arguments, free=("out", "row", "parallel", "cost"))
  for name in arguments.row or [*ROWS, COST]:
    file = out / name / "report.json"
    if name == COST:
      if not file.exists():
        _cost(file, arguments.fast)
    else:
      _study(out, name, arguments)
  _write(out)


def _study(out: pathlib.Path, name: str, arguments) -> None:
  """Runs what is missing of a row's study; keeps its time, over all of its sittings."""
  base = ROWS[name].base
  bindings = [
      f"STUDY_DIR={out / base}", f"Study.report_dir={out / name}",
      f"PARALLEL={arguments.parallel}",
  ]  # fmt: skip
  if arguments.train and base == "texts":
    bindings += [f"CORPUS={arguments.train}", f"ASKED={arguments.valid}"]
    bindings += ["SPLIT=all", "ASKED_SPLIT=all"]
  if arguments.fast:
    bindings += ["TRAIN_STEPS=2", "SEEDS=(0,)", "BATCH_SIZE=2"]
    bindings += ["ModelConfig.num_layers=1", "ModelConfig.model_dim=16", "ModelConfig.ff_dim=16"]
    bindings += {
        "keys": ["EVAL_BLOCKS=(5, 8)", "PassKeyEval.examples=2"],
        "texts": ["EDGES=(0, 256, 512)", "DocumentEval.documents=1"],
    }[base]
  command = [sys.executable, "-m", "famjax.cli", "study", f"--gin_file=gin/paper/{name}.gin"]
  began = time.time()
  status = subprocess.run([*command, *(f"--gin.{b}" for b in bindings)], check=False).returncode
  spent = out / name / "seconds"
  before = float(spent.read_text()) if spent.exists() else 0.0
  spent.parent.mkdir(parents=True, exist_ok=True)
  spent.write_text(f"{before + time.time() - began:.0f}\n")
  if status:
    sys.exit(status)


def read(fam: int, length: int, layers: int) -> dict[str, float]:
  """Seconds and peak memory of a random model that reads so many tokens, compiled before."""
  common.use_cores(1)
  import jax  # pylint: disable=import-outside-toplevel

  from famjax.inference.engine import CHUNK_BLOCKS  # pylint: disable=import-outside-toplevel

  shape = SHAPE | dict(fam=fam, layers=layers)
  model = common.make_model(shape)
  tokens = common.draw(shape["vocab"], length)
  chunk = CHUNK_BLOCKS * shape["block"]
  jax.block_until_ready(model.read(tokens[: chunk + length % chunk]))  # compiles every shape
  began = time.perf_counter()
  jax.block_until_ready(model.read(tokens))
  return {"seconds": time.perf_counter() - began, "peak_mb": common.peak_memory_mb()}


def _cost(file: pathlib.Path, fast: bool) -> None:
  """Tables 13 and 14: reading, by BSWA and by FAM in turn, each time in a process of its own."""
  from famjax.evaluation import report  # pylint: disable=import-outside-toplevel

  lengths, repeats, layers = ((LENGTHS[0] // 10,), 1, 1) if fast else (LENGTHS, REPEATS, SHAPE["layers"])
  found = {}
  for length in lengths:
    for _ in range(repeats):
      for name, fam in (("BSWA", 0), ("FAM", SHAPE["fam"])):
        one = common.printed_by(__file__, f"--cost={json.dumps([fam, length, layers])}")
        found.setdefault(name, {}).setdefault(str(length), []).append(one)
    print(f"{COST}: {length:,} tokens read", flush=True)
  about = {"shape": SHAPE | {"layers": layers}, "machine": report.machine()}
  report.write_json(file, about | {"read": found})


def _write(out: pathlib.Path) -> None:
  """Tables, picture and report of every row that is there."""
  from famjax.evaluation import report  # pylint: disable=import-outside-toplevel

  files = {name: out / name / "report.json" for name in [*ROWS, COST]}
  there = {name: json.loads(file.read_text()) for name, file in files.items() if file.exists()}
  cost = there.pop(COST, None)
  parts, verdicts = [], {}
  for name, found in there.items():
    row, results = ROWS[name], found["results"]
    past = lambda claim, base=row.base: PAST[base] if claim.past is None else claim.past
    verdicts[name] = [_judge(claim, results, past(claim)) for claim in row.claims]
    minutes = float((out / name / "seconds").read_text()) / 60
    parts += [f"## {row.name}", f"    famjax study --gin_file=gin/paper/{name}.gin"]
    parts += [report.markdown(_means(results)), report.markdown(_judged(row, verdicts[name]))]
    parts.append(f"{minutes:.1f} minutes, what other rows had trained not counted.")
  if cost:
    parts += ["## Tables 13 and 14", f"    python benchmarks/paper.py --row={COST}"]
    parts.append(report.markdown(_costs(cost["read"])))
  (out / "tables.md").write_text("\n\n".join(parts) + "\n")
  about = {"command": ["python", *sys.argv], "machine": report.machine(), "claims": verdicts}
  report.write_json(out / "report.json", about)
  if there:
    _plot({ROWS[name].name: found["results"] for name, found in there.items()}, out / "paper.png")
  print("\n\n".join(parts))


def _scores(results, name: str, past: int) -> dict[int, float]:
  """Of each seed the mean accuracy beyond a length."""
  return {
      r["seed"]: statistics.mean(a for n, a in r["accuracy"].items() if int(n) > past)
      for r in results
      if r["name"] == name
  }


def _judge(claim: Claim, results, past: int) -> dict[str, object]:
  """What a claim is held against: the difference, its standard error, and what follows."""
  one, other = (_scores(results, name, past) for name in (claim.one, claim.other))
  differences = [one[seed] - other[seed] for seed in sorted(one.keys() & other.keys())]
  mean = statistics.mean(differences) if differences else float("nan")
  error = statistics.stdev(differences) / len(differences) ** 0.5 if len(differences) > 1 else None
  told = error is not None and abs(mean) > 2 * error and all(d * mean > 0 for d in differences)
  gain = told and mean > 0
  if not claim.better:
    verdict = "disagrees" if gain else "agrees" if error is not None else "cannot be told"
  else:
    verdict = "agrees" if gain else "disagrees" if told else "cannot be told"
  return claim._asdict() | {"difference": mean, "error": error, "verdict": verdict}


def _means(results) -> list[list[str]]:
  """A row of each model: its accuracy by length, mean and standard deviation over seeds."""
  from famjax.evaluation import report  # pylint: disable=import-outside-toplevel

  lengths, digits = report.lengths_of(results), report.digits(results[0])
  head = {"blocks": "blocks", "tokens": "accuracy up to tokens"}[report.unit(results[0])]
  rows = [[head, *(f"{n:,}" for n in lengths)]]
  for name, mine in report.by_model(results).items():
    cells = []
    for n in lengths:
      values = [r["accuracy"][str(n)] for r in mine if str(n) in r["accuracy"]]
      spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
      cells.append(f"{statistics.mean(values):.{digits}f}{spread}" if values else "")
    rows.append([f"{name}, {len(mine)} seeds", *cells])
  return rows


def _judged(row: Row, verdicts) -> list[list[str]]:
  rows = [["the paper", "here", "difference", "verdict"]]
  for v in verdicts:
    error = "" if v["error"] is None else f" ± {v['error']:.4f}"
    rows.append([
        v["paper"], f"{v['one']} over {v['other']}", f"{v['difference']:+.4f}{error}", v["verdict"]
    ])  # fmt: skip
  return rows


def _costs(found) -> list[list[str]]:
  paper = "paper, TPU v4: 16.2 to 154.1 s, 4.4 to 16.0 GB; 16.5 to 154.9 s, 4.5 to 16.1 GB with FAM"
  rows = [[paper, "BSWA, s", "FAM, s", "FAM / BSWA", "BSWA, MB", "FAM, MB"]]
  median = lambda name, n, what: statistics.median(one[what] for one in found[name][n])
  for n in found["FAM"]:
    a, b = median("BSWA", n, "seconds"), median("FAM", n, "seconds")
    peaks = [f"{median(name, n, 'peak_mb'):.0f}" for name in ("BSWA", "FAM")]
    rows.append([f"{int(n):,} tokens", f"{a:.1f}", f"{b:.1f}", f"{b / a:.3f}", *peaks])
  return rows


def _plot(rows, path: pathlib.Path) -> None:
  """A panel of each row, as its own study draws it."""
  import matplotlib  # pylint: disable=import-outside-toplevel

  matplotlib.use("Agg")
  import matplotlib.pyplot as plt  # pylint: disable=import-outside-toplevel

  from famjax.evaluation import report  # pylint: disable=import-outside-toplevel

  columns = min(3, len(rows))
  lines = -(-len(rows) // columns)
  size = dict(figsize=(4.6 * columns, 3.4 * lines), dpi=130, layout="constrained", squeeze=False)
  figure, panels = plt.subplots(lines, columns, **size)
  for axes, (title, results) in zip(panels.flat, rows.items()):
    report.draw(axes, results)
    axes.set_title(title)
    axes.legend(frameon=False, fontsize="x-small")
  for axes in list(panels.flat)[len(rows) :]:
    axes.set_visible(False)
  figure.savefig(path)
  plt.close(figure)


if __name__ == "__main__":
  main()
