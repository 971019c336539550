"""Keeps two processes from writing into one directory: a run, a study, a session, a conversion.

Each process that asks for a directory writes a file of its own into it, `.lock-ID`, and then looks for
the files of others. Nothing but writing, listing and deleting files is needed, so that it works on a
disk, on a shared file system and in a bucket alike. If two processes ask at once, at most one gets the lock.

A process that was killed leaves its file behind. On the same machine, the process id shows whether it still runs.
From another machine, a file that has not changed for `LEASE` seconds is taken to be left behind: the
holder rewrites it every `BEAT` seconds.
"""

from collections.abc import Iterator
import contextlib
import functools
import json
import os
import pathlib
import socket
import sys
import threading
import time
from typing import Annotated
import uuid

from etils import epath
import msgspec

from famjax import formats
from famjax.errors import UserError

PREFIX = ".lock-"
BEAT, LEASE = 10.0, 60.0  # seconds
_POLL = 0.1


class Holder(msgspec.Struct):
  """Says who has a lock.

  Attributes:
    host: name of the machine.
    machine: identifies the machine, its current boot and the namespace of process ids.
    pid: number of the process.
    process: time at which the process started, in ticks since the machine started.
    since: local time at which the lock was asked for.
    held: whether the process has got the lock; False: it still asks.
    beat: number of times that the file was written.
  """

  host: str
  machine: str
  pid: Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)]
  process: str
  since: str
  held: bool = False
  beat: int = 0

  @property
  def words(self) -> str:
    """Host, process and time, as an error message names them."""
    return f"process {self.pid} on {formats.plain(self.host, 60)}, since {formats.plain(self.since, 60)}"


class Lock:
  """A lock of one directory, held until `release`."""

  def __init__(self, directory: epath.PathLike, what: str):
    """Prepares a lock; `acquire` gets it.

    Args:
      directory: of this machine or of a bucket.
      what: noun for error messages, such as "run directory".
    """
    self._directory, self._what = epath.Path(directory), what
    self._file = self._directory / f"{PREFIX}{uuid.uuid4().hex}"
    self._temporary = self._directory / f".tmp{self._file.name}"
    self._writing = threading.Lock()
    self._me = Holder(
        socket.gethostname(), _machine(), os.getpid(), _process_start(os.getpid()),
        time.strftime("%Y-%m-%d %H:%M:%S"),
    )  # fmt: skip
    self._made: list[epath.Path] = []
    self._ended, self._lost = threading.Event(), False
    self._thread = threading.Thread(target=self._beat, name="lock", daemon=True)

  def acquire(self) -> None:
    """Gets the lock; makes the directory if it is missing.

    Raises:
      UserError: Another process has it; the line names host, process and time. Or the directory's
        name is not UTF-8.
    """
    formats.check_name(os.fspath(self._directory), self._what)
    try:
      _make(self._directory, self._made)
      self._write()
      self._thread.start()  # who asks beats too, so that others know that it lives
      self._wait_for_others()
      self.check()
      self._me.held = True
      self._write()
    except BaseException:
      self.release()
      raise

  @property
  def lost(self) -> bool:
    """Whether another process has taken over, because this one was suspended."""
    with contextlib.suppress(OSError):  # a bucket out of reach says nothing
      self._lost = self._lost or not self._file.exists()
    return self._lost

  def check(self) -> None:
    """Raises UserError if another process has taken over."""
    if self.lost:
      raise UserError(
          f"{self._what} {self._directory}: this process was suspended for more than {LEASE:.0f} s, and"
          " another process took over the directory; nothing more is saved"
      )

  def release(self) -> None:
    """Gives the lock back, and removes directories that were made for it and are empty."""
    self._ended.set()
    if self._thread.is_alive():
      self._thread.join()
    for path in (self._file, self._temporary):
      with contextlib.suppress(OSError):
        path.unlink()
    for path in reversed(self._made):
      with contextlib.suppress(OSError):
        if not any(path.iterdir()):
          path.rmdir()

  def _write(self) -> None:
    with self._writing:  # the thread that beats writes too
      self._me.beat += 1
      text = msgspec.json.encode(self._me).decode()
      if "://" in os.fspath(self._file):  # a bucket writes whole objects
        self._file.write_text(text)
      else:
        self._temporary.write_text(text, encoding="utf-8")
        self._temporary.replace(self._file)

  def _beat(self) -> None:
    """Rewrites the file again and again. Runs in a thread of its own."""
    while not self._ended.wait(BEAT):
      with contextlib.suppress(Exception):  # it may go better next time; buckets raise anything
        if self.lost:
          return
        self._write()

  def _wait_for_others(self) -> None:
    """Returns once nobody else has the lock or asks for it with more right."""
    until = time.monotonic() + LEASE
    for file in _locks(self._directory):
      if file.name == self._file.name:
        continue
      while (other := _read(file)) is not None:
        started = _process_start(other.pid) if other.machine == self._me.machine else None
        if started is None:
          alive = _is_rewritten(file, other, self._what)
        else:
          alive = started == other.process
        if not alive:
          for left in (file, file.with_name(f".tmp{file.name}")):
            with contextlib.suppress(OSError):
              left.unlink()
          break
        # Both have written before they looked, so that each sees the other: the smaller name stays.
        if other.held or file.name < self._file.name or time.monotonic() > until:
          raise UserError(
              f"{self._what} {self._directory} is in use by {other.words}: wait until it ends, or"
              " name another directory"
          )
        time.sleep(_POLL)


@contextlib.contextmanager
def held(directory: epath.PathLike, what: str) -> Iterator[Lock]:
  """Holds the lock of a directory. Args and errors are those of `Lock`."""
  lock = Lock(directory, what)
  lock.acquire()
  try:
    yield lock
  finally:
    lock.release()


def is_lock(name: str) -> bool:
  """Returns whether a file of this name belongs to a lock."""
  return name.startswith((PREFIX, f".tmp{PREFIX}"))


def _locks(directory: epath.Path) -> list[epath.Path]:
  return sorted(path for path in directory.iterdir() if path.name.startswith(PREFIX))


def _read(file: epath.Path) -> Holder | None:
  """Returns who holds a lock; None if its file is gone."""
  if not file.exists():
    return None
  try:
    return formats.check(json.loads(file.read_text()), Holder, str(file))
  except FileNotFoundError:
    return None
  except ValueError:  # a `UserError` too: what is no lock of ours is left to whoever made it
    raise UserError(f"{file} is not a famjax lock file: delete it if no process uses the directory") from None


def _is_rewritten(file: epath.Path, seen: Holder, what: str) -> bool:
  """Returns whether the holder on another machine rewrites its file within `LEASE` seconds."""
  until = time.monotonic() + LEASE
  print(
      f"famjax: note: the {what} has a lock of {seen.words}; waiting up to {LEASE:.0f} s to see"
      " whether that process still runs", file=sys.stderr, flush=True,
  )  # fmt: skip
  while time.monotonic() < until:
    time.sleep(min(_POLL, LEASE / 10))
    now = _read(file)
    if now is None or now.beat != seen.beat:
      return now is not None
  return False


def _make(directory: epath.Path, made: list[epath.Path]) -> None:
  """Makes a directory, and appends those that were not there, the outermost first."""
  if "://" in os.fspath(directory):
    directory.mkdir(parents=True, exist_ok=True)
    return
  for path in reversed([directory, *directory.parents]):
    if not path.exists():
      path.mkdir(exist_ok=True)
      made.append(path)
  directory.mkdir(exist_ok=True)  # says so if it is a file


@functools.cache
def _machine() -> str:
  """Returns what stands for this machine since its start, and for the namespace of its processes."""
  try:
    boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{socket.gethostname()}/{boot}/{os.readlink('/proc/self/ns/pid')}"
  except OSError:
    return f"{socket.gethostname()}/{uuid.getnode()}"


def _process_start(pid: int) -> str | None:
  """Returns when a process started, because its number is used again later.

  Returns:
    "": There is no such process. None: It is hidden, as other users' processes can be.
  """
  try:
    stat = pathlib.Path(f"/proc/{pid}/stat").read_text()
    state, *rest = stat.rpartition(")")[2].split()
    return "" if state in "ZX" else rest[18]
  except ProcessLookupError:  # it has just ended
    return ""
  except OSError:  # no such process, a hidden one (`hidepid`), or a system without /proc
    pass
  try:
    os.kill(pid, 0)
  except (ProcessLookupError, OverflowError):
    return ""
  except PermissionError:
    return None
  return None if pathlib.Path("/proc/self").exists() else "alive"
