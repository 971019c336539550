"""The process that renders chat templates (`template_worker`): started when it is first needed.

It is asked over pipes, answers in about a millisecond, and serves all templates and threads. It ends
with the process that started it, and is started anew after a template that goes beyond a limit.
"""

import atexit
from collections.abc import Mapping
import contextlib
import importlib.util
import json
import os
import pathlib
import selectors
import subprocess
import sys
import threading
import time
from typing import Any

from famjax.errors import one_line, UserError

_CPU_SECONDS = 4  # of one rendering
_SECONDS = 8.0  # of one rendering, however busy the machine is
_START_SECONDS = 60.0
_MEMORY = 2**29
_ANSWER_BYTES = 2**27
_LIMITS = {
    "memory": f"more than {_MEMORY // 2**20} MB of memory",
    "text": "a text of more than 16 MB",
    "time": f"more than {_CPU_SECONDS} s or {_MEMORY // 2**20} MB of memory",
}
# What a template may see of the environment: the clock of `strftime_now`.
_ENVIRONMENT = ("TZ", "LANG", "LC_ALL", "LC_TIME", "LD_LIBRARY_PATH", "PATH", "SYSTEMROOT")


class Refused(Exception):
  """What a template itself refused; the message is one line."""


def render(source: str, names: Mapping[str, Any] | None) -> str:
  """Returns the text of a template.

  Args:
    source: in Jinja.
    names: variables of the template, as JSON has them; None: it is compiled alone.

  Raises:
    Refused: the template is wrong, or raises an error.
    UserError: it goes beyond a limit, or a variable is not JSON.
  """
  try:
    request = json.dumps({"source": source, "names": names}).encode()
  except (TypeError, ValueError, RecursionError) as error:
    line = one_line(error)
    raise UserError(f"a chat template takes JSON values alone ({line}): give others") from None
  with _LOCK:
    answer = _worker().ask(request)
  if "limit" in answer:
    raise UserError(f"the chat template needs {_LIMITS[answer['limit']]}: use another template")
  if "error" in answer:
    raise Refused(answer["error"])
  return answer["text"]


class _Worker:
  """The process, and its pipes."""

  def __init__(self):
    folders = []
    for name in ("jinja2", "markupsafe"):
      spec = importlib.util.find_spec(name)
      if spec is None or spec.origin is None:
        raise UserError(f"chat templates need the package {name}; install it")
      folders.append(str(pathlib.Path(spec.origin).parent.parent))
    file = pathlib.Path(__file__).with_name("template_worker.py")
    self.process = subprocess.Popen(  # pylint: disable=consider-using-with
        [sys.executable, "-I", str(file), str(_CPU_SECONDS - 1), str(_MEMORY), *folders],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0,
        env={name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}, cwd="/",
        process_group=0,
    )  # fmt: skip
    self._rest = b""
    try:
      ready = self._line(_START_SECONDS)
    except BaseException:
      self.stop()
      raise
    if not ready:
      self.stop()
      raise UserError("the process that renders chat templates does not start: is jinja2 whole?")

  def ask(self, request: bytes) -> dict[str, str]:
    """Returns the answer to a request. The process is ended unless it has answered."""
    answer = None
    try:
      with contextlib.suppress(BrokenPipeError):
        self.process.stdin.write(request + b"\n")
        answer = self._line(_SECONDS)
      return json.loads(answer.decode("utf-8", "surrogatepass")) if answer else {"limit": "time"}
    finally:
      if not answer:
        self.stop()

  def stop(self) -> None:
    """Ends the process."""
    global _worker_now
    _worker_now = None
    self.process.kill()
    self.close()
    self.process.wait()

  def close(self) -> None:
    """Closes this process's ends of the pipes."""
    for pipe in (self.process.stdin, self.process.stdout):
      with contextlib.suppress(OSError):
        pipe.close()

  def _line(self, seconds: float) -> bytes:
    """Returns the next line, without its end; b"" if none comes in time."""
    end = time.monotonic() + seconds
    parts, size = [self._rest], len(self._rest)
    with selectors.DefaultSelector() as selector:
      selector.register(self.process.stdout, selectors.EVENT_READ)
      while b"\n" not in parts[-1]:
        left = end - time.monotonic()
        if left <= 0 or size > _ANSWER_BYTES or not selector.select(left):
          return b""
        data = os.read(self.process.stdout.fileno(), 2**16)
        if not data:
          return b""
        parts.append(data)
        size += len(data)
    line, self._rest = b"".join(parts).split(b"\n", 1)
    return line


_LOCK = threading.Lock()
_worker_now: _Worker | None = None


def _worker() -> _Worker:
  """The process of this process; `_LOCK` is held."""
  global _worker_now
  if _worker_now is None or _worker_now.process.poll() is not None:
    _worker_now = _Worker()
  return _worker_now


def _forget() -> None:
  """In a process that was forked: the worker is its parent's."""
  global _LOCK, _worker_now
  _LOCK = threading.Lock()
  if _worker_now is not None:
    _worker_now.close()
    _worker_now.process.returncode = 0  # not this process's child
  _worker_now = None


def _stop() -> None:
  if _worker_now is not None:
    _worker_now.stop()


if hasattr(os, "register_at_fork"):
  os.register_at_fork(after_in_child=_forget)
atexit.register(_stop)
