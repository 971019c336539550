"""Sessions: what a model remembers, put aside in a directory and taken up again.

A directory holds the newest save alone, written by Orbax beside its final place and moved there
whole, so that a process that is killed while it saves leaves the save before it.
"""

import dataclasses
import pathlib

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

import famjax
from famjax.errors import UserError
from famjax.inference.engine import Reading
from famjax.inference.model import Model
from famjax.training.checkpoint import list_steps, quiet, reason

FORMAT = 1  # raised when a State changes its meaning


def save(directory: str | pathlib.Path, reading: Reading, model: Model) -> None:
  """Saves where rows stand, in place of what the directory held.

  Args:
    directory: is made if it is missing.
    reading: of any number of rows.
    model: whose reading it is.

  Raises:
    UserError: it cannot be written; what was saved before is still there.
  """
  directory = pathlib.Path(directory).absolute()
  try:
    newest = max(list_steps(directory), default=0)
    policy = ocp.training.preservation_policies.LatestN(1)
    with quiet(), ocp.training.Checkpointer(directory, preservation_policy=policy) as saver:
      saver.save_checkpointables(
          newest + 1, {"reading": _arrays(reading)}, custom_metadata=_describe(reading, model)
      )
  except Exception as error:  # a full disk, a place where nothing can be written
    raise UserError(
        f"session {directory} cannot be saved ({reason(error)}); what it held before is still"
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
  steps = list_steps(directory)
  if not steps:
    if directory.is_dir() and any(directory.iterdir()):
      raise UserError(f"session {directory} is a directory of something else: name another one")
    if directory.exists() and not directory.is_dir():
      raise UserError(f"session {directory} is a file: name a directory")
    return None
  try:
    with quiet(), ocp.training.Checkpointer(directory) as loader:
      saved = loader.checkpointables_metadata(steps[-1]).custom_metadata
      _check(directory, saved, model)
      template = jax.eval_shape(lambda: model.start(saved["rows"]))
      sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
      wanted = jax.tree.map(
          lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), _arrays(template)
      )
      arrays = loader.load_checkpointables(steps[-1], {"reading": wanted})["reading"]
  except UserError:
    raise
  except Exception as error:  # a cut file raises anything
    raise UserError(
        f"session {directory} cannot be read ({reason(error)}): delete it to begin anew"
    ) from error
  filled = lambda x, name: jax.numpy.zeros(x.shape, x.dtype) if not x.size else arrays[name]
  fields = [f.name for f in dataclasses.fields(template.state)]
  state = template.state.replace(**{n: filled(getattr(template.state, n), n) for n in fields})
  return Reading(arrays["logits"], state)


def _arrays(reading: Reading) -> dict[str, jax.Array]:
  """A reading's arrays by name; Orbax takes none of size 0, which a FAM of length 0 is."""
  named = {f.name: getattr(reading.state, f.name) for f in dataclasses.fields(reading.state)}
  return {"logits": reading.logits, **{name: x for name, x in named.items() if x.size}}


def _describe(reading: Reading, model: Model) -> dict[str, object]:
  return {
      "format": FORMAT,
      "famjax": famjax.__version__,
      "model": dataclasses.asdict(model.config),
      "weights": model.fingerprint,
      "rows": int(reading.state.position.shape[0]),
      "tokens": np.asarray(reading.state.position).tolist(),
  }


def _check(directory: pathlib.Path, saved, model: Model) -> None:
  """Raises UserError naming the first thing in which a session's model is another one."""
  if not saved or "format" not in saved:
    raise UserError(f"{directory} is no session: name another directory")
  if saved["format"] != FORMAT:
    raise UserError(
        f"session {directory} was made by famjax {saved['famjax']} in format {saved['format']}, and"
        f" this is format {FORMAT}: use that version, or begin another session"
    )
  ours = _flat(dataclasses.asdict(model.config)) | {"weights": model.fingerprint}
  theirs = _flat(saved["model"]) | {"weights": saved["weights"]}
  for name in (n for n in ours if n != "remat"):
    if theirs.get(name) != ours[name]:
      raise UserError(
          f"session {directory} was made by another model: {name} is {theirs.get(name)} there and"
          f" {ours[name]} here; use that model, or another session"
      )


def _flat(config: dict[str, object]) -> dict[str, object]:
  memory = {f"memory.{name}": value for name, value in config["memory"].items()}
  return {name: value for name, value in config.items() if name != "memory"} | memory

