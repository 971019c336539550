"""What a person waits for: the import, the help, the first step, the input, a checkpoint.

    python benchmarks/waits.py

`import famjax` beside `import jax, flax`, each in a fresh process; `famjax --help`; the run of the
quickstart (gin/runs/quickstart.gin) until its first step is done, and its share of compilation. Then
steps of that run: with one and the same batch, with the run's own input, and with a checkpoint every
`--every` steps as well; in turn, there and back, each from its first log to its last, before the last
checkpoint; and what a batch takes to be made. Writes `report.json` and `table.md` to runs/waits.
"""

import argparse
import itertools
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import common

from famjax.evaluation import report

RUN = "gin/runs/quickstart.gin"


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--out", type=pathlib.Path, default="runs/waits")
  parser.add_argument("--rounds", type=int, default=5)
  parser.add_argument("--steps", type=int, default=420, help="of each run")
  parser.add_argument("--every", type=int, default=100, help="steps between two checkpoints")
  parser.add_argument("--run", help=argparse.SUPPRESS)  # see `step_seconds`
  arguments = parser.parse_args()
  if arguments.run:
    print(json.dumps(run(arguments.run, arguments.steps, arguments.every)))
    return
  python = [sys.executable, "-c"]
  starts = {
      "import jax, flax": [*python, "import jax, flax"],
      "import famjax": [*python, "import famjax"],
      "famjax --help": [sys.executable, "-m", "famjax.cli", "--help"],
  }
  laps = {name: [] for name in starts}
  for _ in range(arguments.rounds):
    for name, command in starts.items():
      began = time.perf_counter()
      subprocess.run(command, check=True, capture_output=True)
      laps[name].append(time.perf_counter() - began)
  found = {name: statistics.median(seconds) for name, seconds in laps.items()}
  found["import famjax / import jax, flax"] = found["import famjax"] / found["import jax, flax"]
  found |= first_step(arguments)
  steps = {"fixed batch": [], "own input": [], "and checkpoints": []}
  for i in range(arguments.rounds):
    for name, seconds in list(steps.items())[:: (-1) ** i]:  # there and back
      seconds.append(step_seconds(name, arguments))
      print(f"{name}: {1e3 * seconds[-1]:.2f} ms a step", flush=True)
  medians = {name: statistics.median(seconds) for name, seconds in steps.items()}
  found |= {f"step, {name}": seconds for name, seconds in medians.items()}
  found["a batch is made in"] = batch_seconds()
  found["a batch / a step"] = found["a batch is made in"] / medians["fixed batch"]
  found["own input / fixed batch"] = medians["own input"] / medians["fixed batch"]
  found["with checkpoints / without"] = medians["and checkpoints"] / medians["own input"]
  report.write_json(
      arguments.out / "report.json",
      {"machine": report.machine(), "found": found, "laps": laps | steps},
  )
  shown = lambda name, x: f"{x:.4f}" + ("" if " / " in name else " s")
  text = report.markdown([["what", "median"], *([k, shown(k, v)] for k, v in found.items())])
  (arguments.out / "table.md").write_text(text + "\n")
  print(text)


def first_step(arguments) -> dict[str, float]:
  """Seconds from the command to the end of the first step, and of its compilation."""
  with tempfile.TemporaryDirectory() as folder:
    command = [
        sys.executable, "-m", "famjax.cli", "train", f"--gin_file={RUN}", f"--gin.RUN_DIR={folder}/run",
        "--gin.TRAIN_STEPS=60",
    ]  # fmt: skip
    began = time.perf_counter()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, bufsize=1
    )
    lines, reached = [], None
    for line in process.stdout:
      lines.append(line)
      if reached is None and "first step, with compilation:" in line:
        reached = time.perf_counter() - began
        compilation = float(line.split("compilation:")[1].split()[0])
    if process.wait() or reached is None:
      sys.exit("".join(lines))
  return {"quickstart, to the end of the first step": reached, "of it compilation": compilation}


def batch_seconds() -> float:
  """Median of what the run's reader needs for a batch."""
  from famjax import configuration  # pylint: disable=import-outside-toplevel

  configuration.configure([RUN], ["RUN_DIR=unused"])
  reader = configuration.train_arguments()["train_reader"]
  steps = itertools.count()
  return common.median(lambda: reader.read(reader.start(), next(steps)), 21)


def step_seconds(kind: str, arguments) -> float:
  """A step's seconds in a run of its own."""
  settings = f"--steps={arguments.steps}", f"--every={arguments.every}"
  return common.printed_by(__file__, *settings, f"--run={kind}")


def run(kind: str, steps: int, every: int) -> float:
  """Trains in this process, and times it."""
  from famjax import configuration  # pylint: disable=import-outside-toplevel
  from famjax.training import loop  # pylint: disable=import-outside-toplevel

  with tempfile.TemporaryDirectory() as folder:
    checkpoints = every if kind == "and checkpoints" else 0
    bindings = [
        f"RUN_DIR={folder}/run", f"TRAIN_STEPS={steps}", f"TrainConfig.checkpoint_every={checkpoints}",
        "TrainConfig.eval_every=0", f"TrainConfig.log_every={every}",
    ]  # fmt: skip
    configuration.configure([RUN], bindings)
    arguments = configuration.train_arguments()
    if kind == "fixed batch":
      arguments["train_reader"] = Fixed(arguments["train_reader"])
    loop.train(**arguments)
    lines = pathlib.Path(folder, "run", "metrics.jsonl").read_text(encoding="utf-8").splitlines()
  logs = [log for log in map(json.loads, lines) if log["split"] == "train"]
  return (logs[-1]["time"] - logs[0]["time"]) / (logs[-1]["step"] - logs[0]["step"])


class Fixed:
  """A reader that gives its first batch again and again."""

  def __init__(self, reader):
    self._reader, self._first = reader, None

  def __getattr__(self, name):
    return getattr(self._reader, name)

  def read(self, position, step):
    if self._first is None:
      self._first = self._reader.read(position, step)
    return self._first


if __name__ == "__main__":
  main()
