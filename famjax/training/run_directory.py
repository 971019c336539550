"""A run's directory: what it belongs to, and what is written into it.

    config.json      model, data, optimizer and training options, for the comparison on resuming
    config.gin       the same as a gin file, where the run was started with gin
    parameters.txt   table of parameters
    log.txt          the lines that the run has printed, also without a terminal
    metrics.jsonl    metrics, and TensorBoard event files beside it
    checkpoints/     see checkpoint.py
"""

from collections.abc import Iterator
import contextlib
import dataclasses
import json
import os
from typing import Any

from etils import epath

from famjax import locks
from famjax.errors import UserError
from famjax.model.config import HOW_IT_RUNS
from famjax.parallel import processes
from famjax.training.config import MAY_CHANGE
from famjax.training.metrics import write_text
from famjax.training.optimizer import DECAYING

# Settings by the name that they have in gin that change no step of training.
_FREE = {"train.run_dir", "train.eval_reader", "model_of.checkpoint"}
_FREE |= {f"ModelConfig.{name}" for name in HOW_IT_RUNS}
_FREE_OF_MODEL = {f"model.{name}" for name in HOW_IT_RUNS}
_FREE |= {f"TrainConfig.{name}" for name in MAY_CHANGE}


def place(path: str | os.PathLike[str]) -> epath.Path:
  """A directory of this machine, absolute, or of a bucket, gs://bucket/run."""
  path = epath.Path(path)
  return path if "://" in os.fspath(path) else path.absolute()


def describe(
    model: Any, optimizer: Any, config: Any, reader: Any, vocabulary: str, settings: dict[str, str]
) -> dict[str, Any]:
  """What a run is, as JSON.

  Args:
    model: `ModelConfig`.
    optimizer: `OptimizerConfig`.
    config: `TrainConfig`.
    reader: of the training data; its class, shape and seed are taken, and what files it reads.
    vocabulary: its name.
    settings: everything that was configured by gin, by name, as text; may be empty.
  """
  schedule = dataclasses.asdict(optimizer)
  if optimizer.schedule in DECAYING and optimizer.decay_steps is None:
    schedule["decay_steps"] = config.train_steps  # more steps would then be other steps
  return {
      "model": dataclasses.asdict(model),
      "optimizer": schedule,
      "train": dataclasses.asdict(config),
      "data": {
          "vocabulary": vocabulary,
          "reader": type(reader).__name__,
          "batch_size": reader.batch_size,
          "length": reader.length,
          "seed": getattr(reader, "seed", 0),
          "corpus": getattr(getattr(reader, "source", None), "fingerprint", None),
      },
      "gin": settings,
  }


def check(directory: epath.Path, description: dict[str, Any]) -> None:
  """Raises UserError if a directory belongs to a run of another configuration.

  Options that change no step (`config.MAY_CHANGE`, evaluation, remat, the mesh) may differ. A
  name that only one of the two knows is passed over, so that a new option does not orphan old runs.
  """
  path = directory / "config.json"
  if directory.exists() and not directory.is_dir():
    raise UserError(f"run directory {directory} is a file: name a directory")
  if not path.exists():
    if (directory / "checkpoints").exists():
      raise UserError(
          f"run directory {directory} has checkpoints and no config.json, so nobody knows what they"
          " are of: name another directory"
      )
    return
  try:
    saved = _flatten(json.loads(path.read_text(encoding="utf-8")))
  except (ValueError, OSError) as e:
    raise UserError(f"{path} cannot be read ({e}): name another run directory") from e
  wanted = _flatten(json.loads(json.dumps(description)))
  for name, value in wanted.items():
    if name in saved and saved[name] != value and not _is_free(name):
      raise UserError(
          f"run directory {directory} belongs to another configuration: {name} is {saved[name]}"
          f" there and {value} here; name another run directory, or delete this one"
      )


@contextlib.contextmanager
def locked(directory: epath.Path) -> Iterator[locks.Lock | None]:
  """Holds the lock of a run's directory, in the first of several processes.

  Yields:
    The lock; None in the other processes.

  Raises:
    UserError: Another run has it. All processes raise.
  """
  lock, refused = None, None
  if processes.is_first():
    lock = locks.Lock(directory, "run directory")
    try:
      lock.acquire()
    except Exception as error:  # whatever it is, the other processes must not wait
      lock, refused = None, error
  try:
    if processes.any_of_us(refused is not None):
      raise refused or UserError(f"run directory {directory} is in use; the first process says by whom")
    yield lock
  finally:
    if lock is not None:
      lock.release()


def write(directory: epath.Path, description: dict[str, Any], parameter_table: str) -> None:
  """Makes the directory and writes what the run is."""
  directory.mkdir(parents=True, exist_ok=True)
  write_text(directory / "parameters.txt", parameter_table + "\n")
  if description["gin"]:
    write_text(directory / "config.gin", gin_text(description["gin"]) + "\n")
  write_text(directory / "config.json", json.dumps(description, indent=2) + "\n")


def gin_text(settings: dict[str, str]) -> str:
  """Settings as a gin file, with a blank line between the things that are set."""
  lines, before = [], None
  for name, value in settings.items():
    thing = name.rpartition(".")[0]
    if before not in (None, thing):
      lines.append("")
    lines.append(f"{name} = {value}")
    before = thing
  return "\n".join(lines)


def _is_free(name: str) -> bool:
  kind, _, field = name.partition(".")
  if kind == "gin":
    return field in _FREE or field.startswith(("eval/", "MeshConfig.", "AxisRules."))
  return (kind == "train" and field in MAY_CHANGE) or name in _FREE_OF_MODEL


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
  flat = {}
  for key, value in tree.items():
    if isinstance(value, dict):
      flat |= _flatten(value, f"{prefix}{key}.")
    else:
      flat[prefix + key] = value
  return flat
