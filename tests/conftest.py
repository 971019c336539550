"""What every test shares: JAX on the CPU, and hypothesis profiles without deadlines.

Compiling takes seconds the first time a shape is seen, so that a deadline per example would measure
the compiler. The profile `ci` (HYPOTHESIS_PROFILE=ci) draws the same examples on every run; the
default one looks for new ones.
"""

import atexit
import gc
import importlib.metadata
import os
import pathlib
import shutil
import signal
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"  # no test needs a network
# Tests compile much and compute little: of the compiler's work a sixth is enough for them. With
# XLA_FLAGS set, empty say, they run what users run; .ci/run does that on its second Python.
_FAST = ["--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true"]
if importlib.metadata.version("jax").startswith("0.10."):  # later ones end at a flag that is gone
  _FAST.append("--xla_cpu_use_fusion_emitters=false")
os.environ.setdefault("XLA_FLAGS", " ".join(_FAST))
os.environ["FAMJAX_COMPILE_CACHE"] = "off"  # a test measures what it compiles
os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)  # set below, after JAX has read its settings

# A shell that starts tests in the background makes them, and all that they start, ignore SIGINT.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
  signal.signal(signal.SIGINT, signal.default_int_handler)

import hypothesis  # pylint: disable=wrong-import-position
import jax  # pylint: disable=wrong-import-position
import pytest  # pylint: disable=wrong-import-position

# Commands that tests start share what they compile: many of them compile the same programs.
if "FAMJAX_TESTS_CACHE" not in os.environ:  # the workers of a run have it from the first process
  os.environ["FAMJAX_TESTS_CACHE"] = tempfile.mkdtemp(prefix="famjax-tests-")
  atexit.register(shutil.rmtree, os.environ["FAMJAX_TESTS_CACHE"], ignore_errors=True)
os.environ |= {
    "JAX_COMPILATION_CACHE_DIR": os.environ["FAMJAX_TESTS_CACHE"],
    "JAX_COMPILATION_CACHE_MAX_SIZE": str(2**30),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}

hypothesis.settings.register_profile("default", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


def pytest_collection_finish():
  """Makes Python look for unused objects less often: traced programs have millions that are in use."""
  gc.collect()
  gc.freeze()
  gc.set_threshold(100_000, 50, 1000)


def pytest_collection_modifyitems(items):
  """Fast tests first; those marked `slow` after them, in their own order."""
  items.sort(key=lambda item: item.get_closest_marker("slow") is not None)


@pytest.fixture(scope="module", autouse=True)
def _room_for_programs():
  """Lets compiled programs go when there are many: a process may map 65,530 pieces of memory on Linux.

  Past that the compiler ends with a segmentation fault.
  """
  yield
  maps = pathlib.Path("/proc/self/maps")
  if maps.exists() and maps.read_text(encoding="utf-8").count("\n") > 25_000:
    jax.clear_caches()
    gc.collect()
