"""Reads and writes a memory: `famjax.json` and `famjax.safetensors` beside files of others."""

import dataclasses
import json
import pathlib

from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from famjax.convert import schemas, tensors
from famjax.convert.shapes import all_leaves, of_memory
from famjax.errors import UserError
from famjax.formats import inside, read_json, shown
from famjax.model import strategy
from famjax.model.config import MemoryConfig, ModelConfig

CONFIG, WEIGHTS = "famjax.json", "famjax.safetensors"


def write_memory(path: pathlib.Path, params: dict, config: ModelConfig) -> None:
  """Writes the memory of a model and the memory's weights."""
  (path / CONFIG).write_text(json.dumps(dataclasses.asdict(config.memory), indent=2) + "\n")
  leaves = traverse_util.flatten_dict(params, sep="/")
  weights = {name: np.asarray(leaf) for name, leaf in leaves.items() if of_memory(name)}
  if weights:
    save_file(weights, path / WEIGHTS)


def read_memory(path: pathlib.Path) -> MemoryConfig | None:
  """Returns the memory that `write_memory` left in a directory; None: there is none.

  Raises:
    UserError: A key is unknown, or a value is not allowed.
  """
  file = inside(path, CONFIG)
  if not file.is_file():
    if inside(path, WEIGHTS).is_file():
      raise UserError(
          f"{path} holds {WEIGHTS} of a memory without {CONFIG}: put that back, or move the weights"
      )
    return None
  found = read_json(file)
  unknown = set(found) - {field.name for field in dataclasses.fields(MemoryConfig)}
  if unknown:
    raise UserError(f"{file} is no memory that famjax knows: it has {shown(sorted(unknown)[0])}")
  try:
    memory = MemoryConfig(**schemas.checked(found, schemas.Memory, str(file)))
    strategy.check_saved(memory, str(file))  # before anything imports what it names
    memory.validate()
  except UserError as error:
    raise UserError(str(error) if str(file) in str(error) else f"{file}: {error}") from None
  return memory


def read_memory_weights(
    path: pathlib.Path, config: ModelConfig, allow_nonfinite: bool = False
) -> dict[str, jax.Array]:
  """Returns the weights that `write_memory` left in a directory, as a nested dict.

  Args:
    path: the directory.
    config: of the model, with the memory of the directory.
    allow_nonfinite: NaN and infinite values are taken.

  Raises:
    UserError: The file cannot be read, or holds weights of another memory, or it is not there and
      the memory has weights.
  """
  directory, path = path, inside(path, WEIGHTS)
  leaves = {name: leaf for name, leaf in all_leaves(config).items() if of_memory(name)}
  if not path.is_file():
    if leaves:
      raise UserError(f"{directory} has a memory without its {WEIGHTS}: put that back")
    return {}
  found = tensors.load(path)
  held = {name: list(leaf.shape) for name, leaf in found.items()}
  wanted = {name: list(leaf.shape) for name, leaf in leaves.items()}
  if held != wanted:
    raise UserError(f"{path} holds {shown(held)}, and the memory in {CONFIG} takes {shown(wanted)}")
  if not allow_nonfinite:
    for name, leaf in found.items():
      tensors.check_finite(leaf, name, path)
  weights = {name: jnp.asarray(leaf, leaves[name].dtype) for name, leaf in found.items()}
  return traverse_util.unflatten_dict(weights, sep="/")
