"""Sessions: what a model remembers, put aside in a directory and taken up again.

A directory holds the newest save alone, written by Orbax beside its final place and moved there
whole, so that a process that is killed while it saves leaves the save before it.
"""

import contextlib
import dataclasses
import json
import pathlib
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
from orbax.checkpoint import v1 as ocp

from famjax import formats, locks
from famjax.errors import UserError
from famjax.inference.engine import Reading
from famjax.inference.model import Model
from famjax.model.config import HOW_IT_RUNS, ModelConfig
from famjax.training.storage import list_steps, load_items, quiet, reason
from famjax.training.storage import with_empty, without_empty

FORMAT = 3  # raised when a State changes its meaning
_MOST_ROWS = 65_536


class _Metadata(msgspec.Struct):
  """Holds what `_describe` writes."""

  format: int
  model: dict[str, Any]
  weights: str
  rows: Annotated[int, msgspec.Meta(ge=1, le=_MOST_ROWS)]
  tokens: list[formats.TokenId]


def held(directory: str | pathlib.Path) -> contextlib.AbstractContextManager[locks.Lock]:
  """Returns a context that keeps other processes from using a session.

  Raises:
    UserError: Another process uses it, or the directory holds something else.
  """
  directory = pathlib.Path(directory).absolute()
  _newest(directory)  # refuses a directory of other files before a lock is written into it
  return locks.held(directory, "session")


def save(
    directory: str | pathlib.Path, reading: Reading, model: Model, *, locked: bool = False
) -> None:
  """Saves where rows stand, in place of what the directory held.

  Args:
    directory: is made if it is missing.
    reading: of any number of rows.
    model: whose reading it is.
    locked: Whether the caller is in `held(directory)`. Otherwise the session is locked meanwhile.

  Raises:
    UserError: the directory holds something else, another process uses it, or it cannot be written;
      what was saved before is still there.
  """
  directory = pathlib.Path(directory).absolute()
  if not locked:
    with held(directory):
      return save(directory, reading, model, locked=True)
  newest, _ = _newest(directory)
  try:
    policy = ocp.training.preservation_policies.LatestN(1)
    with quiet(), ocp.training.Checkpointer(directory, preservation_policy=policy) as saver:
      saver.save_checkpointables(
          newest + 1, {"reading": without_empty(reading)}, custom_metadata=_describe(reading, model)
      )
  except Exception as error:  # a full disk, a place where nothing can be written
    raise UserError(
        f"session {directory} cannot be saved ({reason(error)}); whatever it held before is still"
        " there: make room, or name another directory"
    ) from error


def load(directory: str | pathlib.Path, model: Model) -> Reading | None:
  """Takes up where rows stood.

  Args:
    directory: of a session.
    model: the one that made it.

  Returns:
    None if there is no session.

  Raises:
    UserError: another model, configuration or version made it, or it cannot be read.
  """
  directory = pathlib.Path(directory).absolute()
  newest, saved = _newest(directory)
  if not saved:
    return None
  rows = _check(directory, saved, model)
  template = jax.eval_shape(lambda: model.start(rows))
  try:
    items = load_items(directory / str(newest), {"reading": without_empty(template)})
  except Exception as error:  # a cut file raises anything
    raise _unreadable(directory, error) from error
  # By way of the host: an array that Orbax has placed compiles everything that takes it once more.
  host = jax.tree.map(np.asarray, with_empty(template, items["reading"]))
  return jax.tree.map(jnp.asarray, host)


def _newest(directory: pathlib.Path) -> tuple[int, dict]:
  """Number and metadata of a session's newest save; 0 and {} if there is none, nor another thing."""
  if directory.exists() and not directory.is_dir():
    raise UserError(f"session {directory} is a file: name a directory")
  steps = list_steps(directory)
  known = {str(step) for step in steps}
  # A save that was killed leaves a directory beside its final place.
  names = [p.name for p in directory.iterdir()] if directory.is_dir() else []
  ours = lambda name: name in known or ".orbax-checkpoint-tmp" in name or locks.is_lock(name)
  other = [name for name in names if not ours(name)]
  saved = _metadata(directory, steps[-1]) if steps and not other else {}
  if other or (steps and "format" not in saved):
    raise UserError(
        f"session {directory} is a directory of something else ({(other or names)[0]}): name another"
        " one"
    )
  return (steps[-1], saved) if steps else (0, {})


def _metadata(directory: pathlib.Path, step: int) -> dict:
  try:
    with quiet(), ocp.training.Checkpointer(directory) as loader:
      found = loader.checkpointables_metadata(step).custom_metadata
      return found if isinstance(found, dict) else {}
  except Exception as error:
    raise _unreadable(directory, error) from error


def _unreadable(directory: pathlib.Path, error: Exception) -> UserError:
  return UserError(f"session {directory} cannot be read ({reason(error)}): delete it to begin anew")


def _describe(reading: Reading, model: Model) -> dict[str, object]:
  return {
      "format": FORMAT,
      "model": dataclasses.asdict(model.config),
      "weights": model.fingerprint,
      "rows": int(reading.state.position.shape[0]),
      "tokens": np.asarray(reading.state.position).tolist(),
  }


def _check(directory: pathlib.Path, saved: formats.Json, model: Model) -> int:
  """Returns the rows of a session. Raises UserError naming the first thing that is not the model's."""
  where = f"session {directory}"
  if saved["format"] != FORMAT:
    raise UserError(
        f"{where} was made by another version of famjax: its format is"
        f" {formats.shown(saved['format'])} and this version's {FORMAT}; use that version, or another"
        " session"
    )
  metadata = formats.check(saved, _Metadata, where)
  ours = _options(model.config) | {"weights": model.fingerprint}
  # Options that came later have their defaults in sessions of before.
  theirs = _options(ModelConfig()) | _flat(metadata.model) | {"weights": metadata.weights}
  for name in dict.fromkeys([*ours, *theirs]):
    if name not in HOW_IT_RUNS and theirs.get(name) != ours.get(name):
      raise UserError(
          f"{where} was made by another model: {name} is {formats.plain(theirs.get(name))} there and"
          f" {formats.plain(ours.get(name))} here; use that model, or another session"
      )
  return metadata.rows


def _options(config: ModelConfig) -> formats.Json:
  """Returns a configuration as the metadata hold it: tuples are lists."""
  return _flat(json.loads(json.dumps(dataclasses.asdict(config))))


def _flat(config: formats.Json) -> formats.Json:
  """Returns a model's configuration with its memory's options beside the others."""
  memory = config.get("memory")
  inner = {f"memory.{n}": v for n, v in memory.items()} if isinstance(memory, dict) else {}
  return {name: value for name, value in config.items() if name != "memory"} | inner
