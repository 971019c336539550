"""Tests of training compile the same few steps again and again: here each is compiled once."""

import jax
import pytest


@pytest.fixture(scope="package", autouse=True)
def _compiled_steps_are_kept(tmp_path_factory):
  options = {
      "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
      "jax_persistent_cache_min_compile_time_secs": 1.0,
  }
  before = {name: getattr(jax.config, name) for name in options}
  for name, value in options.items():
    jax.config.update(name, value)
  yield
  for name, value in before.items():
    jax.config.update(name, value)
