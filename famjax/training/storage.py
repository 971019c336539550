"""Steps on a disk, as Orbax writes and reads them: which there are, which one is whole.

`checkpoint.py` says what is in them.
"""

from collections.abc import Callable
import contextlib
import itertools
import logging
import pathlib
from typing import Any
import warnings

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp

from famjax.errors import UserError
from famjax.parallel import processes


def list_steps(directory: pathlib.Path) -> list[int]:
  """Steps that have a checkpoint, whole or not, in rising order."""
  if not directory.is_dir():
    return []
  return sorted(int(p.name) for p in directory.iterdir() if p.is_dir() and p.name.isdigit())


def newest_whole(
    steps: list[int], look: Callable[[int], Any], read: Callable[[int, Any], Any]
) -> tuple[int | None, Any, list[tuple[int, str]]]:
  """The newest step that every process can read, what it read, and why newer ones cannot be.

  Args:
    steps: in rising order; where there are several processes, those that the first one sees.
    look: of a step, at what it says about itself. A UserError is raised, in all processes; anything
      else that it raises means that the step is not whole.
    read: of a step, and what `look` gave; likewise. All processes read, or none: arrays are read
      together.
  """
  broken = []
  for step in processes.of_first(steps[::-1]):
    found, why = _agreed(step, lambda: look(step))  # pylint: disable=cell-var-from-loop
    if why is None:
      seen = found
      found, why = _agreed(step, lambda: read(step, seen))  # pylint: disable=cell-var-from-loop
    if why is None:
      return step, found, broken
    broken.append((step, why))
  return None, None, broken


def _agreed(step: int, act: Callable[[], Any]) -> tuple[Any, str | None]:
  """What a function gives, and why it gives nothing in one of the processes at least."""
  found = why = wrong = None
  try:
    found = act()
  except UserError as error:
    wrong = error
  except Exception as error:  # pylint: disable=broad-exception-caught
    why = reason(error)  # a cut file raises anything
  if processes.any_of_us(wrong is not None):  # all of them end, and none waits for another
    raise wrong or UserError(f"step {step}: another process cannot use it, and says why")
  if processes.any_of_us(why is not None):
    return None, why or "another process cannot read it"
  return found, None


def set_aside(broken: pathlib.Path) -> None:
  """Renames a step that is not whole."""
  names = itertools.chain([".unreadable"], (f".unreadable-{n}" for n in itertools.count(2)))
  paths = (broken.with_name(broken.name + name) for name in names)
  broken.rename(next(path for path in paths if not path.exists()))


def load_items(path: pathlib.Path, items: dict[str, Any]) -> dict[str, Any]:
  """Reads checkpointables of one step, shaped and placed like `items`."""

  def shape_of(x):
    if isinstance(x, np.ndarray):
      return x
    sharding = getattr(x, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

  with quiet(), ocp.training.Checkpointer(path.parent) as checkpointer:
    return checkpointer.load_checkpointables(int(path.name), jax.tree.map(shape_of, items))


def without_empty(tree):
  """Orbax takes no array of size 0, which a FAM of length 0 is: None in its place."""
  return jax.tree.map(lambda x: x if x.size else None, tree)


def with_empty(template, tree):
  """The inverse of `without_empty`, by a template."""
  return jax.tree.map(lambda t, x: x if t.size else jnp.zeros(t.shape, t.dtype), template, tree)


def reason(error: BaseException) -> str:
  """The first line of what began a chain of exceptions."""
  while error.__cause__ or error.__context__:
    error = error.__cause__ or error.__context__
  lines = str(error).strip().splitlines() or [""]
  return f"{type(error).__name__}: {lines[0][:120]}"


@contextlib.contextmanager
def quiet():
  """Keeps Orbax from logging what is raised, and turned into one line, anyway."""
  # A load that fails leaves the rest of its reads unstarted, and Python says so at some later time.
  warnings.filterwarnings("ignore", "coroutine 'PyTreeHandler", RuntimeWarning)
  logger = logging.getLogger("absl")
  level = logger.level
  logger.setLevel(logging.CRITICAL)
  try:
    yield
  finally:
    logger.setLevel(level)
