"""Reading ahead on a thread, so that a step never waits for its batch."""

import queue
import threading
from typing import Iterator

import numpy as np

from famjax.data.readers import Batch
from famjax.data.readers import Reader
from famjax.errors import UserError


def prefetch(
    reader: Reader, position: np.ndarray, step: int, buffer: int = 2
) -> Iterator[tuple[int, Batch, np.ndarray]]:
  """Yields (step, batch, position after the batch), from `step` onwards, without end.

  A thread stays up to `buffer` batches ahead. It starts with the first batch that is asked for, and
  ends when the iterator is closed or dropped. What the reader raises is raised here, after the
  batches before it.

  Args:
    reader: used by the thread alone until the iterator is closed.
    position: of the reader, where to start.
    step: training step of the first batch.
    buffer: batches to keep ready, at least 1.
  """
  if buffer < 1:
    raise UserError(f"prefetch: a buffer of {buffer} batches: use at least 1")
  ready: queue.SimpleQueue = queue.SimpleQueue()
  room = threading.Semaphore(buffer)
  stopped = threading.Event()

  def work(position: np.ndarray, step: int) -> None:
    try:
      while True:
        room.acquire()
        if stopped.is_set():
          return
        batch, position = reader.read(position, step)
        ready.put((step, batch, position))
        step += 1
    except BaseException as error:  # pylint: disable=broad-except  (it goes to the consumer)
      ready.put(error)

  thread = threading.Thread(target=work, args=(position, step), name="prefetch", daemon=True)
  thread.start()
  try:
    while True:
      item = ready.get()
      if isinstance(item, BaseException):
        raise item
      room.release()
      yield item
  finally:
    stopped.set()
    room.release()
    thread.join()
