"""Lets long work outlive its terminal: output that nobody reads any more is dropped.

`famjax train ... | head -2` closes the pipe after two lines, and a window that is closed sends SIGHUP.
Neither is a reason to lose hours of training.
"""

from collections.abc import Iterator
import contextlib
import os
import signal
import sys
import threading
from typing import Any, TextIO

from etils import epath


@contextlib.contextmanager
def surviving() -> Iterator[None]:
  """Makes the process go on without its terminal: SIGHUP and closed output change nothing.

  A SIGHUP that is ignored or handled already (`nohup`) stays so.
  """
  kept = sys.stdout, sys.stderr
  sys.stdout, sys.stderr = (Surviving(stream) for stream in kept)
  main = threading.current_thread() is threading.main_thread()
  hang_up = signal.getsignal(signal.SIGHUP) if main and hasattr(signal, "SIGHUP") else None
  if hang_up == signal.SIG_DFL:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
  try:
    yield
  finally:
    if hang_up == signal.SIG_DFL:
      signal.signal(signal.SIGHUP, hang_up)
    sys.stdout, sys.stderr = kept


class Surviving:
  """A text stream that drops what it cannot write: a closed pipe, a terminal that is gone.

  Everything else is the stream's own.
  """

  def __init__(self, stream: TextIO):
    """Takes the stream to write to."""
    self._stream = stream

  def write(self, text: str) -> int:
    """Writes text, as far as somebody reads it. Returns its length."""
    with self._dropping():
      self._stream.write(text)
    return len(text)

  def writelines(self, lines) -> None:
    """Writes several texts."""
    self.write("".join(lines))

  def flush(self) -> None:
    """Hands on what was written."""
    with self._dropping():
      self._stream.flush()

  def __getattr__(self, name: str) -> Any:
    return getattr(self._stream, name)

  @contextlib.contextmanager
  def _dropping(self):
    try:
      yield
    except (OSError, ValueError):  # ValueError: the stream is closed
      silence(self._stream)


def silence(stream: TextIO) -> None:
  """Sends all that a stream still holds, and all that comes, nowhere.

  Python writes what is left of standard output when it ends. To a closed pipe that is an error, and
  the process would end with status 120.
  """
  with contextlib.suppress(OSError, ValueError):
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


class Log:
  """Prints lines and keeps them in a file, whether or not somebody reads them."""

  def __init__(self, path: epath.Path | None):
    """Opens the file, and appends to what it holds.

    Args:
      path: of the file; None: lines are printed and not kept.
    """
    self._file = None if path is None else path.open("a", encoding="utf-8")

  def print(self, *lines: str) -> None:
    """Prints lines, and keeps them."""
    print(*lines, sep="\n", flush=True)
    self.keep(*lines)

  def keep(self, *lines: str) -> None:
    """Keeps lines in the file alone."""
    if self._file is not None:
      self._file.write("".join(line + "\n" for line in lines))
      self._file.flush()

  def close(self) -> None:
    """Closes the file."""
    if self._file is not None:
      self._file.close()
