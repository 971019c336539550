"""Tests of compiled programs that are kept on disk, in processes of their own."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from famjax import compile_cache
from famjax.errors import UserError
from tests.inference import tiny

# Runs a command and prints how many programs JAX compiled, and how many it took from the cache.
_COUNTING = """
import collections, json, sys
import jax
counts = collections.Counter()
jax.monitoring.register_event_listener(lambda name, **_: counts.update([name]))
from famjax import cli
status = cli.main(sys.argv[1:])
print(json.dumps({
    "status": status,
    "hits": counts["/jax/compilation_cache/cache_hits"],
    "misses": counts["/jax/compilation_cache/cache_misses"],
}))
"""


def run(*arguments, **environment):
  """Returns what a command wrote before, and its counts."""
  clean = {
      name: value for name, value in os.environ.items()
      if name not in ("JAX_COMPILATION_CACHE_DIR", "FAMJAX_COMPILE_CACHE")
  }  # fmt: skip
  done = subprocess.run(
      [sys.executable, "-c", _COUNTING, *map(str, arguments)], capture_output=True, text=True,
      check=False, timeout=300, env=clean | environment,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  *text, counts = done.stdout.splitlines()
  return text, json.loads(counts)


@pytest.fixture(scope="module", name="generate")
def _generate(tmp_path_factory):
  directory = tmp_path_factory.mktemp("run")
  tiny.save(directory, tiny.CONFIG)
  return ["generate", directory, "--prompt=To read", "--max_new_tokens=20"]


def test_the_second_generate_compiles_nothing(generate, tmp_path):
  home = {"XDG_CACHE_HOME": str(tmp_path)}
  text, first = run(*generate, **home)
  again, second = run(*generate, **home)
  assert first["status"] == second["status"] == 0
  assert first["misses"] > 0
  assert second["misses"] == 0 and second["hits"] >= first["misses"]
  assert text == again
  (directory,) = (tmp_path / "famjax" / "compiled").iterdir()  # one for this processor
  assert list(directory.glob("*-cache"))


def test_off_keeps_nothing(generate, tmp_path):
  _, counts = run(*generate, "--compile_cache=off", XDG_CACHE_HOME=str(tmp_path))
  assert counts == {"status": 0, "hits": 0, "misses": 0}
  assert not list(tmp_path.iterdir())


def test_a_home_that_cannot_be_written_is_passed_over(generate, tmp_path):
  (tmp_path / "famjax").write_text("a file where the directory would be")
  _, counts = run(*generate, XDG_CACHE_HOME=str(tmp_path))
  assert counts == {"status": 0, "hits": 0, "misses": 0}


def test_the_size_has_a_limit(tmp_path):
  """JAX deletes the programs that were used longest ago."""
  script = """
import sys
from famjax import compile_cache
compile_cache.enable(sys.argv[1], float(sys.argv[2]))
import jax, jax.numpy as jnp
for n in range(8):
  jax.jit(lambda x: jnp.sin(x @ x).sum(0) * n)(jnp.ones((32, 32))).block_until_ready()
"""
  most = 30_000  # bytes
  subprocess.run(
      [sys.executable, "-c", script, str(tmp_path), str(most / 2**30)], check=True, timeout=120
  )
  sizes = [path.stat().st_size for path in tmp_path.rglob("*-cache")]
  assert sizes and sum(sizes) <= most


@pytest.mark.parametrize("gigabytes", [0.0, -1.0, float("nan"), float("inf")])
def test_a_size_that_makes_no_sense(gigabytes):
  with pytest.raises(UserError, match="--compile_cache_gb"):
    compile_cache.enable(None, gigabytes)


def test_a_directory_that_cannot_be_made(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(UserError, match="cannot be written"):
    compile_cache.enable(str(tmp_path / "file" / "in"), 1.0)


def test_what_the_user_has_set_for_jax_stays(monkeypatch, tmp_path):
  monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))
  monkeypatch.delenv("FAMJAX_COMPILE_CACHE", raising=False)
  compile_cache.enable(None, 1.0)
  assert os.environ["JAX_COMPILATION_CACHE_DIR"] == str(tmp_path)
  assert pathlib.Path(tmp_path).is_dir() and not list(tmp_path.iterdir())


def test_off_reaches_other_processes(monkeypatch):
  for name in ("FAMJAX_COMPILE_CACHE", "JAX_ENABLE_COMPILATION_CACHE"):
    monkeypatch.setenv(name, "")
  compile_cache.enable(compile_cache.OFF, 1.0)
  assert os.environ["FAMJAX_COMPILE_CACHE"] == "off"
  assert os.environ["JAX_ENABLE_COMPILATION_CACHE"] == "false"


def test_a_user_without_a_home_has_no_cache(monkeypatch, tmp_path):
  def fail():
    raise RuntimeError("Could not determine home directory.")

  for name in ("FAMJAX_COMPILE_CACHE", "JAX_COMPILATION_CACHE_DIR"):
    monkeypatch.delenv(name, raising=False)
  monkeypatch.setenv("XDG_CACHE_HOME", "relative")
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(pathlib.Path, "home", fail)
  compile_cache.enable(None, 1.0)
  assert not list(tmp_path.iterdir()) and "JAX_COMPILATION_CACHE_DIR" not in os.environ
