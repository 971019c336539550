"""Prefetching: the same batches in the same order, a bounded lead, and a thread that ends."""

import threading
import time

import numpy as np
import pytest

from famjax.data.prefetch import prefetch
from famjax.data.readers import FollowingReader
from famjax.errors import UserError
from tests.data.pieces import NumberedSource


class CountingReader:
  """Batches that tell their step; fails at one of them."""

  def __init__(self, fails_at=None):
    self.reads = 0
    self.fails_at = fails_at

  def start(self):
    return np.zeros(1, np.int64)

  def read(self, position, step):
    if step == self.fails_at:
      raise UserError("corpus gone: no such file")
    self.reads += 1
    return {"tokens": np.full((1, 1), step)}, position + 1


def threads():
  return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


def wait_until(condition):
  deadline = time.monotonic() + 10
  while not condition() and time.monotonic() < deadline:
    time.sleep(0.005)
  assert condition()


def test_batches_come_in_order_with_the_position_after_them():
  make = lambda: FollowingReader(NumberedSource(2, 40), 3, 8)
  reader, position = make(), make().start()
  ahead = prefetch(make(), make().start(), 5)
  for expected, (step, batch, after) in zip(range(5, 25), ahead):
    plain, position = reader.read(position, expected)
    assert step == expected
    np.testing.assert_array_equal(batch["tokens"], plain["tokens"])
    np.testing.assert_array_equal(after, position)
  ahead.close()


def test_it_reads_no_further_ahead_than_the_buffer():
  reader = CountingReader()
  ahead = prefetch(reader, reader.start(), 0, buffer=3)
  next(ahead)
  wait_until(lambda: reader.reads == 4)
  time.sleep(0.05)
  assert reader.reads == 4
  next(ahead)
  wait_until(lambda: reader.reads == 5)
  ahead.close()


def test_the_thread_ends_with_the_iterator():
  reader = CountingReader()
  ahead = prefetch(reader, reader.start(), 0)
  next(ahead)
  assert threads()
  ahead.close()
  assert not threads()

  def consume():
    for step, _, _ in prefetch(reader, reader.start(), 0):
      if step == 3:
        raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    consume()
  wait_until(lambda: not threads())


def test_an_exception_comes_after_the_batches_before_it():
  reader = CountingReader(fails_at=3)
  ahead = prefetch(reader, reader.start(), 0)
  assert [next(ahead)[0] for _ in range(3)] == [0, 1, 2]
  with pytest.raises(UserError, match="corpus gone"):
    next(ahead)
  assert not threads()


def test_an_empty_buffer_is_named():
  with pytest.raises(UserError, match="buffer of 0"):
    next(prefetch(CountingReader(), np.zeros(1, np.int64), 0, buffer=0))
