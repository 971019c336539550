"""Several processes that run one program, each with devices of its own: what they must agree on."""

import copy
import os
import threading

import jax
from jax.experimental import multihost_utils
import numpy as np

from famjax.errors import UserError


def connect() -> None:
  """Finds the other processes, before anything touches a device.

  On TPU machines, Slurm and Kubernetes JAX knows who they are; elsewhere the variables
  JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID say it.
  """
  number = lambda name: int(os.environ[name]) if name in os.environ else None
  try:
    jax.distributed.initialize(
        num_processes=number("JAX_NUM_PROCESSES"), process_id=number("JAX_PROCESS_ID")
    )
  except ValueError as e:
    raise UserError(
        f"--distributed: {str(e).splitlines()[0]} Where JAX does not know who the others are, set"
        " JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID"
    ) from e


def is_first() -> bool:
  """This process writes files and lines; the others are silent."""
  return jax.process_index() == 0


def of_first(numbers: list[int]) -> list[int]:
  """What the first process has, in all of them: they may look at a directory at different times."""
  if jax.process_count() == 1:
    return numbers
  count = int(multihost_utils.broadcast_one_to_all(np.int32(len(numbers))))
  numbers = np.resize(np.array(numbers or [0], np.int32), count)
  return [int(n) for n in multihost_utils.broadcast_one_to_all(numbers)]


def any_of_us(said: bool) -> bool:
  """Whether it is true in one of the processes at least. None goes on before all have answered."""
  if jax.process_count() == 1:
    return said
  return bool(multihost_utils.process_allgather(np.array(said)).any())


def own_rows(reader, rows: tuple[int, ...]):
  """The reader, giving these rows of the batch alone."""
  if tuple(reader.rows) == tuple(rows):
    return reader
  reader = copy.copy(reader)
  reader.rows = rows
  return reader


def whole_position(reader, position: np.ndarray) -> np.ndarray:
  """The position of the reader of all rows, from those that processes have of theirs."""
  if jax.process_count() == 1 or not getattr(reader, "position_by_row", False):
    return position
  parts = multihost_utils.process_allgather({"rows": np.array(reader.rows), "position": position})
  whole = np.zeros((reader.batch_size, *position.shape[1:]), position.dtype)
  for rows, part in zip(parts["rows"], parts["position"]):
    whole[rows] = part
  return whole


def own_position(reader, position: np.ndarray) -> np.ndarray:
  """The part of a whole position that a reader of some rows goes on from."""
  by_row = getattr(reader, "position_by_row", False)
  return position[list(reader.rows)] if by_row else position


def asked_to_stop(event: threading.Event, step: int) -> bool:
  """A notice of preemption has come, to any process: all get the same answer at the same step.

  Args:
    event: SIGTERM has come to this process; where there are several, JAX has an ear of its own.
    step: steps done; asked about once each.
  """
  if jax.process_count() == 1:
    return event.is_set()
  return multihost_utils.reached_preemption_sync_point(step)
