"""What `famjax eval --checkpoint` shares, whatever it measures: a record that it goes on from.

An evaluation is a dataclass as `Evaluation` has it; a gin file binds it to `Measurement.evaluation`.
It leaves

    of.json        whose model was measured
    record.jsonl   a line for each thing that was measured, which is not measured again
    report.json    the results, what was asked, and the machine
    report.md      the table
    report.png     and a picture
"""

from collections.abc import Callable
import dataclasses
import json
import os
import pathlib
import time
from typing import NamedTuple, Protocol

from flax import nnx
import jax

from famjax.data.readers import Reader
from famjax import locks
from famjax.errors import UserError
from famjax.evaluation import report
from famjax.inference.model import assemble, Model
from famjax.training.checkpoint import load_params


class Record:
  """Lines of results in a directory.

  Attributes:
    directory: of the record.
    about: whose results they are.
    lines: those that are there, oldest first.
  """

  def __init__(self, directory: pathlib.Path, about: dict[str, object]):
    """Reads what is there.

    Args:
      directory: is made if need be.
      about: a directory holds the results of one model.

    Raises:
      UserError: it holds the results of another.
    """
    self.directory, self.about = directory, json.loads(json.dumps(about))
    directory.mkdir(parents=True, exist_ok=True)
    of, self._file, self.lines = directory / "of.json", directory / "record.jsonl", []
    if of.exists() and json.loads(of.read_text(encoding="utf-8")) != self.about:
      theirs = of.read_text(encoding="utf-8").strip()
      raise UserError(f"{directory} holds the results of {theirs}: name another --out")
    of.write_text(json.dumps(about) + "\n", encoding="utf-8")
    if self._file.exists():
      whole = self._file.read_text(encoding="utf-8")
      whole = whole[: whole.rfind("\n") + 1]  # the last line may have been cut
      self._file.write_text(whole, encoding="utf-8")
      self.lines = [json.loads(line) for line in whole.splitlines()]

  def add(self, line: dict[str, object]) -> None:
    """Keeps a result."""
    with open(self._file, "a", encoding="utf-8") as file:
      file.write(json.dumps(line) + "\n")
    self.lines.append(line)


class Measured(NamedTuple):
  """What an evaluation has found.

  Attributes:
    results: for `report.json`.
    table: rows of cells, the first is the head.
    curve: share of right answers by length or place in tokens: a line of a study's plot.
  """

  results: dict[str, object]
  table: list[list[str]]
  curve: dict[int, float]


class Evaluation(Protocol):
  """What can be measured of any model."""

  seed: int

  def validate(self) -> None:
    """Raises UserError for a value that makes no sense."""

  def run(self, model: Model, record: Record) -> Measured:
    """Measures what is not in the record, and returns the whole; draws `report.png`."""


@dataclasses.dataclass(frozen=True)
class Measurement:
  """What `famjax eval --checkpoint` does.

  Attributes:
    evaluation: what is measured.
  """

  evaluation: Evaluation

  def of(self, checkpoint: str, out: str | None, name: str) -> str:
    """Measures the model of a checkpoint, and leaves the report.

    Args:
      checkpoint: as `famjax.load` takes it.
      out: directory of the report; None: `eval/NAME` in the run's.
      name: of what is measured.

    Returns:
      The table, in Markdown.

    Raises:
      UserError: there is no place for a report, or it is another model's.
    """
    self.evaluation.validate()
    if out is None and "://" in checkpoint:
      raise UserError(f"{checkpoint} is not on this machine: add --out=DIR for the report")
    loaded = load_params(checkpoint)
    home = checkpoint if "://" in checkpoint else _home(checkpoint)
    about = {"checkpoint": str(home), "step": loaded.step, "seed": self.evaluation.seed}
    directory = pathlib.Path(out) if out else home / "eval" / name
    with locks.held(directory, "report directory"):
      measured = self.evaluation.run(assemble(loaded), Record(directory, about))
      asked = dataclasses.asdict(self.evaluation)
      what = {"asked": asked, "of": about, "machine": report.machine()}
      report.write_json(directory / "report.json", measured.results | what)
      table = report.markdown(measured.table)
      (directory / "report.md").write_text(table + "\n", encoding="utf-8")
    return table


def measure_run(
    run_dir: str | os.PathLike[str], evaluation: Evaluation, reader: Reader
) -> report.Result:
  """Measures a run's newest checkpoint and leaves `measured.json` in its directory.

  Args:
    run_dir: of the run.
    evaluation: what is measured.
    reader: of the run's training data, for the lengths that the model has seen.

  Returns:
    What is in the file: see `evaluate_run`; "accuracy" is by length or place in tokens.
  """
  evaluation.validate()

  def evaluate(model: Model, step: int) -> report.Result:
    started = time.time()
    about = {"step": step, "asked": dataclasses.asdict(evaluation)}
    measured = evaluation.run(model, Record(pathlib.Path(run_dir, "eval", f"study-{step}"), about))
    return {
        "accuracy": {str(n): share for n, share in measured.curve.items()},
        "asked": about["asked"],
        "unit": "tokens",
        "eval_seconds": round(time.time() - started, 2),
    }

  return evaluate_run(run_dir, reader, report.MEASURED, evaluate)


def evaluate_run(
    run_dir: str | os.PathLike[str],
    reader: Reader,
    file: str,
    evaluate: Callable[[Model, int], report.Result],
) -> report.Result:
  """Evaluates a run's newest checkpoint and leaves a file in its directory.

  Args:
    run_dir: of the run.
    reader: of the run's training data, for the lengths that the model has seen.
    file: name of the file.
    evaluate: of the model and its steps of training.

  Returns:
    What is in the file: that of `evaluate`, `parameters`, `steps` of training, `block_size`, and in
    blocks the longest document trained on and what back-propagation went through.
  """
  loaded = load_params(run_dir)
  model = assemble(loaded)
  N = model.config.memory.block_size
  by_step = getattr(reader.source, "longest_by", lambda step: reader.length)
  longest = by_step(loaded.step - 1)
  result = {
      "parameters": sum(x.size for x in jax.tree.leaves(nnx.state(model.decoder))),
      "steps": loaded.step,
      "block_size": N,
      "longest_trained_blocks": -(-longest // N),
      "backpropagated_blocks": reader.length // N,
      **evaluate(model, loaded.step),
  }
  report.write_json(pathlib.Path(run_dir) / file, result)
  return result


def _home(checkpoint: str) -> pathlib.Path:
  """The run's directory, also of one step's: what lies inside that is Orbax's."""
  path = pathlib.Path(checkpoint).absolute()
  return next((p.parent for p in (path, path.parent) if p.name == "checkpoints"), path)
