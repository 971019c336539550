"""Keeps compiled programs on disk, so that the second run of a command compiles nothing.

JAX reads its settings from the environment, so that they reach the processes of a study too. A
setting of JAX's own that the user has made (`JAX_COMPILATION_CACHE_DIR`) wins.
"""

import hashlib
import math
import os
import pathlib
import platform
import sys

from famjax.errors import UserError

OFF = "off"
_SETTINGS = {
    "JAX_COMPILATION_CACHE_DIR": "jax_compilation_cache_dir",
    "JAX_COMPILATION_CACHE_MAX_SIZE": "jax_compilation_cache_max_size",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "jax_persistent_cache_min_compile_time_secs",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "jax_persistent_cache_min_entry_size_bytes",
}


def default_directory() -> pathlib.Path:
  """Returns `famjax/compiled` below the user's cache directory (`XDG_CACHE_HOME`, `~/.cache`)."""
  home = os.environ.get("XDG_CACHE_HOME", "")
  # The XDG specification ignores relative paths.
  cache = pathlib.Path(home) if os.path.isabs(home) else pathlib.Path.home() / ".cache"
  return cache / "famjax" / "compiled"


def enable(directory: str | None, gigabytes: float) -> None:
  """Makes JAX keep compiled programs in a directory, from now on.

  Programs of each kind of processor are kept in a separate subdirectory: a home
  directory may be shared by machines of several kinds, and a program of one can crash on another.

  Args:
    directory: Where programs are kept. None: `FAMJAX_COMPILE_CACHE`, or else the user's cache
      directory. "off": nowhere.
    gigabytes: Size of the directory. The programs that were used last stay.

  Raises:
    UserError: The size is not above 0.
  """
  if not 0 < gigabytes < math.inf:
    raise UserError(f"--compile_cache_gb={gigabytes}: use a number above 0, or --compile_cache=off")
  chosen = directory or os.environ.get("FAMJAX_COMPILE_CACHE")
  if directory == OFF:  # for the processes of a study too, and whatever the user has set for JAX
    os.environ["FAMJAX_COMPILE_CACHE"] = OFF
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
  if chosen == OFF or (directory is None and "JAX_COMPILATION_CACHE_DIR" in os.environ):
    return
  try:
    place = pathlib.Path(chosen or default_directory()).expanduser().absolute() / _processor()
    place.mkdir(parents=True, exist_ok=True)
    writable = os.access(place, os.W_OK)
  except (OSError, RuntimeError):
    writable = False
  if not writable:
    if directory is not None:
      raise UserError(f"--compile_cache={directory} cannot be written: name another one, or off")
    return  # a home that is read-only: every run compiles anew, as without a cache
  values = str(place), int(gigabytes * 2**30), 0, -1
  for (variable, option), value in zip(_SETTINGS.items(), values):
    os.environ[variable] = str(value)
    if "jax" in sys.modules:
      sys.modules["jax"].config.update(option, value)


def _processor() -> str:
  """Returns 12 hex digits that stand for the processor's instruction set."""
  try:
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    known = {line for line in lines if line.startswith(("flags", "Features", "model name"))}
  except OSError:
    known = {platform.processor()}
  text = "\n".join([platform.machine(), *sorted(known)])
  return hashlib.sha256(text.encode()).hexdigest()[:12]
