"""Lets long work outlive its terminal: output that nobody reads any more is dropped.

`famjax train ... | head -2` closes the pipe after two lines, and a window that is closed sends SIGHUP.
Neither is a reason to lose hours of training.
"""

from collections.abc import Iterator
import contextlib
import errno
import os
import pathlib
import signal
import sys
import threading
from typing import Any, TextIO


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

  All other attributes come from the stream.
  """

  def __init__(self, stream: TextIO | None):
    """Takes the stream to write to. None, as Python has it for a closed descriptor: nothing is kept."""
    self._stream = open(os.devnull, "w", encoding="utf-8") if stream is None else stream

  def write(self, text: str) -> int:
    """Writes text, as far as somebody reads it. Returns its length.

    A character that the stream's encoding lacks is written as an escape.
    """
    with self._dropping():
      try:
        self._stream.write(text)
      except UnicodeEncodeError:
        encoding = self._stream.encoding or "ascii"
        self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
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
    except OSError as error:
      if error.errno in _GONE:  # another error, such as a full disk, may pass
        silence(self._stream)
    except ValueError:
      if not self._stream.closed:
        raise


_GONE = (errno.EPIPE, errno.EIO, errno.EBADF, errno.ENXIO)


def silence(stream: TextIO | None) -> None:
  """Discards what a stream still buffers and everything that is written to it later.

  Python writes what is left of standard output when it ends. To a closed pipe that is an error, and
  the process would end with status 120.
  """
  with contextlib.suppress(OSError, ValueError, AttributeError):
    target = stream.fileno()
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, target)
    os.close(nowhere)


class Log:
  """Prints lines and keeps them in a file, whether or not somebody reads them."""

  def __init__(self, path: pathlib.Path | None):
    """Opens the file, and appends to what it holds.

    Args:
      path: of the file, which may be an `epath.Path` in a bucket; None: lines are printed and not
        kept.
    """
    if path is None:
      self._file = None
    elif "://" in os.fspath(path):
      self._file = path.open("a", encoding="utf-8")
    else:  # a line that UTF-8 lacks does not end a run
      self._file = open(path, "a", encoding="utf-8", errors="backslashreplace")

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
