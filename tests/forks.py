"""Starts functions in processes that have already imported the libraries.

An import of JAX, Flax and Orbax takes seconds, and a test that kills a run starts it many times. Here
a server process imports them once, and each new process is a fork of it. It does no JAX work itself,
so that a fork can choose its devices.
"""

from collections.abc import Callable
import functools
import multiprocessing
import os
import pathlib
import sys
from typing import Any

from famjax import cli


def start(
    function: Callable[..., Any], *arguments: Any, log: pathlib.Path, **environment: str
) -> multiprocessing.Process:
  """Starts `function(*arguments)` in a process of its own.

  Args:
    function: Found by its name in its module. What it returns is the exit status.
    *arguments: Of the function; they can be pickled.
    log: File that gets its standard output and error, at the end of what is there.
    **environment: Variables to set before it runs.

  Returns:
    The process: see `multiprocessing.Process`.
  """
  process = _server().Process(
      target=_run, args=(function, arguments, str(log), environment), daemon=True
  )
  process.start()
  return process


def famjax(*arguments: str, log: pathlib.Path, **environment: str) -> multiprocessing.Process:
  """Starts `famjax` with command-line arguments, as `start` does."""
  return start(cli.main, list(arguments), log=log, **environment)


@functools.cache
def _server():
  """Returns the context of the server; the first process that it starts brings it up."""
  context = multiprocessing.get_context("forkserver")
  context.set_forkserver_preload([
      "famjax.cli", "famjax.configuration", "famjax.training.loop", "orbax.checkpoint.v1",
      "tests.training.toy",
  ])  # fmt: skip
  return context


def _run(function, arguments, log, environment):
  os.environ |= environment
  file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
  os.dup2(file, 1)
  os.dup2(file, 2)
  sys.stdout.reconfigure(line_buffering=True)
  sys.exit(function(*arguments))
