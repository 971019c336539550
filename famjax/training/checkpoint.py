"""Checkpoints through Orbax: all that the next step depends on, written in the background.

A run keeps its checkpoints in `<RUN_DIR>/checkpoints/<steps done>/`:

    params      the parameters that are trained
    training    the rest of the `TrainState`: optimizer, step, RNG, carried state, kept FAM
    reader      the position of the data reader
    metadata    JSON: the model's configuration, the vocabulary's name, which parameters are trained

The other parameters, if not all are trained, stand once in `<RUN_DIR>/base/`, and the metadata say
which they are: all that inference reads is `params` and these.

Orbax writes a step beside its final place, moves it there, and puts a marker in it. A step without
the marker, or one that cannot be read back, is not whole: it is passed over, and the newest whole
step is taken instead.
"""

import contextlib
import dataclasses
import pathlib
from typing import Any, NamedTuple

import jax
import msgspec
import numpy as np
from orbax.checkpoint import v1 as ocp

from famjax import formats
from famjax.convert import directories, hf
from famjax.data import tokenizers
from famjax.data.vocabularies import same_vocabulary
from famjax.errors import UserError
from famjax.model import strategy
from famjax.model.config import HOW_IT_RUNS, MemoryConfig, ModelConfig
from famjax.parallel import processes
from famjax.parallel.placement import Placement
from famjax.training import parameters, run_directory
from famjax.training.storage import list_steps, load_items, newest_whole, quiet, reason
from famjax.training.storage import set_aside, with_empty, without_empty
from famjax.training.train_state import Params, TrainState, abstract, param_axes
from famjax.training.trainable import join, part

_MARKER = "commit_success.txt"
_VERSION = 4  # of what `training` and `base` hold
OWN_TOKENIZER = "tokenizer"  # a vocabulary's name: that directory beside the checkpoints


class About(NamedTuple):
  """What a checkpoint says about itself.

  Attributes:
    model: configuration of the model.
    vocabulary: name of the vocabulary, as `famjax.data.load_vocabulary` takes it.
    trainable: which parameters are in the checkpoint itself, see `trainable`.
    base: fingerprint of the other ones, which `save_base` gives; None: there are none.
    version: of what else a run needs to go on.
  """

  model: ModelConfig
  vocabulary: str
  trainable: str = "full"
  base: str | None = None
  version: int = _VERSION


class _Metadata(msgspec.Struct):
  """Holds what `_metadata` writes: the fields of `About`, as JSON. Old checkpoints lack some."""

  model: ModelConfig
  vocabulary: str
  trainable: str = "full"
  base: str | None = None
  version: int = 1


class Restored(NamedTuple):
  """A run's newest whole checkpoint.

  Attributes:
    state: as it was saved.
    position: of the reader, after the last step's batch.
    skipped: one line for each newer step that is not whole.
  """

  state: TrainState
  position: np.ndarray
  skipped: list[str]


class Checkpoints:
  """The checkpoints of one run. Close it, or use it in a `with` block: saving goes on meanwhile."""

  def __init__(self, directory: pathlib.Path, keep: int):
    """Looks at a directory, which is made when it is first needed.

    Args:
      directory: absolute or relative; `<RUN_DIR>/checkpoints`.
      keep: newest steps that stay.
    """
    self.directory = run_directory.place(directory)
    self._keep = keep
    self._checkpointer = None
    self._newest = None  # step of the last save

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self.close()

  def save(self, state: TrainState, position: np.ndarray, about: About, step: int) -> None:
    """Copies what is to be saved, and writes it in the background.

    Args:
      state: its arrays may be given away (donated) as soon as this returns.
      position: of the reader, after the last step's batch.
      about: goes into the metadata.
      step: steps done, `state.step`. A step that was just saved is not saved again.
    """
    if step == self._newest:
      return
    if self._checkpointer is None:
      newest = ocp.training.preservation_policies.LatestN(self._keep)
      self._checkpointer = ocp.training.Checkpointer(self.directory, preservation_policy=newest)
    self._checkpointer.save_checkpointables_async(
        step,
        {
            "params": state.params,
            "training": _rest(state),
            "reader": {"position": np.asarray(position)},
        },
        force=True,
        custom_metadata=_metadata(about),
    )
    self._newest = step

  def close(self) -> None:
    """Waits until everything is written."""
    if self._checkpointer is not None:
      self._checkpointer.close()
      self._checkpointer = None

  def restore_newest(
      self, template: TrainState, position: np.ndarray, about: About
  ) -> Restored | None:
    """Reads the newest step that is whole.

    Newer steps, which are not whole, are set aside as `<step>.unreadable`, `<step>.unreadable-2`.

    Args:
      template: a state of the structure, shapes and dtypes that are expected.
      position: the same for the reader's position.
      about: what the run is; the checkpoint has to be of the same model and vocabulary.

    Returns:
      None if there is no checkpoint.

    Raises:
      UserError: there are checkpoints, but none is whole; or one is of another model.
    """

    def look(step):
      saved = read_about(self.directory / str(step))
      _check_run(self.directory / str(step), saved, about)
      return saved

    def read(step, saved):
      path = self.directory / str(step)
      loaded = load_items(path, {
          "params": template.params,
          "training": _rest(template),
          "reader": {"position": np.asarray(position)},
      })  # fmt: skip
      return loaded, _load_base(self.directory.parent, template.frozen, saved.base)

    step, found, broken = newest_whole(list_steps(self.directory), look, read)
    said = [f"checkpoint {self.directory / str(step)} is not whole ({why})" for step, why in broken]
    if found is None and broken:
      raise UserError(
          f"{said[0]} and no older one is either: delete {self.directory} to start anew"
      )
    for other, _ in broken if processes.is_first() else ():
      set_aside(self.directory / str(other))
    processes.any_of_us(False)  # nobody writes such a step anew before it is out of the way
    if found is None:
      return None
    self._newest = step
    loaded, frozen = found
    state = TrainState(params=loaded["params"], frozen=frozen, **loaded["training"])
    return Restored(with_empty(template, state), loaded["reader"]["position"], said)


def save_params(directory: pathlib.Path, params: Params, about: About) -> None:
  """Leaves parameters alone as step 0 of a new run directory, for inference or to start from."""
  # As much as one array is copied at a time: the model itself may fill most of the memory.
  largest = max(x.nbytes for x in jax.tree.leaves(params))
  memory = ocp.options.MemoryOptions(write_concurrent_bytes=largest + largest // 16 + 1)
  with quiet(), ocp.Context(memory_options=memory):
    with ocp.training.Checkpointer(run_directory.place(directory) / "checkpoints") as checkpointer:
      checkpointer.save_checkpointables(0, {"params": params}, custom_metadata=_metadata(about))


def _rest(state: TrainState) -> dict[str, Any]:
  """What `training` holds: a state without parameters."""
  fields = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
  return without_empty({n: v for n, v in fields.items() if n not in ("params", "frozen")})


def _metadata(about: About) -> dict[str, Any]:
  return about._asdict() | {"model": dataclasses.asdict(about.model)}


def save_base(run_dir: pathlib.Path, frozen: Params) -> str | None:
  """Leaves the parameters that a run does not train in its directory, once; returns what they are.

  Others, of a run that was stopped before its first checkpoint, are replaced.
  """
  if not frozen:
    return None
  directory = run_directory.place(run_dir) / "base"
  fingerprint = parameters.fingerprint(frozen)
  if _base_in(directory / "0") != fingerprint:
    if processes.is_first() and directory.exists():
      directory.rmtree()
    with quiet(), ocp.training.Checkpointer(directory) as checkpointer:
      checkpointer.save_checkpointables(
          0, {"params": frozen}, custom_metadata={"fingerprint": fingerprint}
      )
  return fingerprint


def _base_in(path: pathlib.Path) -> str | None:
  """The fingerprint that `save_base` has written; None: nothing is there, or not whole."""
  if not (path / _MARKER).is_file():
    return None
  with quiet(), ocp.training.Checkpointer(path.parent) as checkpointer:
    about = checkpointer.checkpointables_metadata(0).custom_metadata or {}
  return about.get("fingerprint")


def _load_base(run_dir: pathlib.Path, template: Params, fingerprint: str | None) -> Params:
  """Reads them, shaped and placed like `template`."""
  if not template:
    return {}
  base = run_dir / "base" / "0"
  try:
    found = _base_in(base)
    loaded = load_items(base, {"params": template})["params"]
  except Exception as error:
    raise UserError(
        f"{base} cannot be read ({reason(error)}), and it holds the parameters that the run does not"
        " train: put it back"
    ) from error
  if found != fingerprint:
    raise UserError(
        f"{base} holds other parameters ({found}) than those that the run was trained beside"
        f" ({fingerprint}): put the right ones back"
    )
  return loaded


def _check_run(path: pathlib.Path, saved: About, wanted: About) -> None:
  """Raises UserError if a run cannot go on from a checkpoint."""
  if saved.version != wanted.version:
    raise UserError(
        f"checkpoint {path} was written by another version of famjax (its version is {saved.version},"
        f" this one's {wanted.version}): go on with that version, or start another run with"
        " TrainConfig.init_checkpoint"
    )
  if saved.trainable != wanted.trainable:
    raise UserError(
        f"checkpoint {path} is of a run that trains {saved.trainable!r}, not {wanted.trainable!r}:"
        " start another run with TrainConfig.init_checkpoint"
    )
  check_model(path, saved.model, wanted.model, ignore=HOW_IT_RUNS)
  check_vocabulary(path, saved.vocabulary, wanted.vocabulary)


def read_about(path: pathlib.Path) -> About:
  """Reads what one step's directory says about itself; raises if it is not a whole checkpoint."""
  if not (path / _MARKER).is_file():
    raise FileNotFoundError(f"{_MARKER} is missing")
  with quiet(), ocp.training.Checkpointer(path.parent) as checkpointer:
    data = checkpointer.checkpointables_metadata(int(path.name)).custom_metadata
  if not data:
    raise ValueError("its metadata cannot be read")
  return about_of(data, path)


def about_of(data: formats.Json, path: pathlib.Path) -> About:
  """Returns what a step's metadata says about it.

  Args:
    data: as `_metadata` has written it.
    path: directory of the step.

  Raises:
    UserError: a value is missing or makes no sense, or another version of famjax wrote it.
  """
  where = f"checkpoint {path}"
  saved = formats.check(data, _Metadata, where)
  if "memory" not in data["model"]:
    raise UserError(f"{where} does not say which memory its model has: fetch it again")
  for given, kind in ((data["model"], ModelConfig), (data["model"]["memory"], MemoryConfig)):
    unknown = set(given) - {field.name for field in dataclasses.fields(kind)}
    if unknown:
      raise UserError(
          f"{where} was written by another version of famjax: it has the option"
          f" {sorted(unknown)[0]}, which this one does not know; use that version"
      )
  strategy.check_saved(saved.model.memory, where)
  try:
    saved.model.validate()
  except UserError as error:
    raise UserError(f"{where}: {error}") from None
  vocabulary = saved.vocabulary
  if vocabulary == OWN_TOKENIZER:
    vocabulary = str(run_directory.place(path).parent.parent / OWN_TOKENIZER)
  return About(saved.model, vocabulary, saved.trainable, saved.base, saved.version)


def read_model(path: str | pathlib.Path) -> ModelConfig:
  """Reads the configuration of a checkpoint's model, of any path that `load_params` takes.

  Raises:
    UserError: as `load_params`.
  """
  directories.refuse_address(path)
  path = run_directory.place(path)
  if hf.is_hf(path):
    return hf.read_config(path)
  directory, steps = _steps_at(path)
  for step in reversed(steps):
    with contextlib.suppress(OSError, ValueError, KeyError):  # not whole
      return read_about(directory / str(step)).model
  raise UserError(f"no famjax checkpoint can be read at {path}: name a run's directory")


def _steps_at(path: pathlib.Path) -> tuple[pathlib.Path, list[int]]:
  """The directory of the checkpoints that a path means, and which there are, in rising order."""
  directories.refuse(path)
  directory = path / "checkpoints" if (path / "checkpoints").is_dir() else path
  steps = list_steps(directory)
  return (path.parent, [int(path.name)]) if not steps and path.name.isdigit() else (directory, steps)


class Loaded(NamedTuple):
  """What `load_params` read.

  Attributes:
    params: a nested dict for `nnx.merge`.
    model: the configuration of their model.
    vocabulary: its name.
    step: of the checkpoint.
  """

  params: Params
  model: ModelConfig
  vocabulary: str
  step: int


def load_params(
    path: str | pathlib.Path, placement: Placement | None = None, allow_nonfinite: bool = False
) -> Loaded:
  """Reads the parameters of a checkpoint, for inference or for another run to start from.

  Args:
    path: a run's directory, its `checkpoints` directory (the newest whole step is taken), one step's
      directory, or a Hugging Face directory (`convert.hf`).
    placement: where the parameters come to lie. Of ours every process reads the parts that its
      devices have; a Hugging Face directory all of them read, tensor by tensor. None: on one device.
    allow_nonfinite: Whether weights may be NaN or infinite.

  Raises:
    UserError: there is no whole checkpoint, another version of famjax wrote it, or a weight is NaN
      or infinite.
  """
  directories.refuse_address(path)
  path = run_directory.place(path)
  where = None
  if placement is not None:
    where = lambda model: placement.shardings(abstract(model)[1], param_axes(model))
  if hf.is_hf(path):
    params, model = hf.read(path, where=where, allow_nonfinite=allow_nonfinite)
    return Loaded(params, model, str(path) if tokenizers.is_in(path) else "bytes", 0)
  directory, steps = _steps_at(path)

  look = lambda step: read_about(directory / str(step))

  def read(step, about):
    template = abstract(about.model)[1]
    if where is not None:
      template = placement.shapes(template, param_axes(about.model))
    trained, frozen = part(template, about.trainable)
    params = load_items(directory / str(step), {"params": trained})["params"]
    params = join(params, _load_base(directory.parent, frozen, about.base))
    return Loaded(params, about.model, about.vocabulary, step)

  _, loaded, broken = newest_whole(steps, look, read)
  if loaded is not None:
    if not allow_nonfinite:
      parameters.check_finite(loaded.params, f"checkpoint {path}, step {loaded.step}")
    return loaded
  reasons = "; ".join(f"step {step} is not whole ({why})" for step, why in broken)
  why = reasons or "no such directory, or no checkpoint in it"
  raise UserError(f"no famjax checkpoint can be read at {path}: {why}; name a run's directory")


def check_model(path, saved: ModelConfig, wanted: ModelConfig, ignore: tuple[str, ...]) -> None:
  """Raises UserError naming the first field in which two configurations differ."""
  saved, wanted = saved.normalised(), wanted.normalised()
  for field in dataclasses.fields(ModelConfig):
    theirs, ours = getattr(saved, field.name), getattr(wanted, field.name)
    if field.name not in ignore and theirs != ours:
      raise UserError(
          f"checkpoint {path} is of another model: {field.name} is {theirs} there and {ours} here;"
          " use its configuration or another checkpoint"
      )


def check_vocabulary(path, saved: str, wanted: str) -> None:
  """Raises UserError if a checkpoint was trained with another vocabulary."""
  if not same_vocabulary(saved, wanted):
    raise UserError(
        f"checkpoint {path} was trained with the vocabulary {saved!r}, not {wanted!r}: its tokens"
        f" mean other text; use {saved!r} or another checkpoint"
    )
