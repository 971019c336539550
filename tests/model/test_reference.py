"""The reference agrees with itself: two formulations, limits and invariances."""

import dataclasses

from hypothesis import given, settings
import numpy as np
import pytest

from tests.model import cases, reference


@settings(max_examples=15)
@given(config=cases.bswa_configs, seed=cases.seeds)
def test_loop_equals_dense_mask(config, seed):
  params = reference.to_numpy(cases.random_params(config, seed))
  tokens = cases.draw_tokens(np.random.default_rng(seed), cases.width(config))
  memory = config.memory
  mask = reference.block_mask(
      len(tokens), memory.block_size, memory.memory_segments, memory.window
  )
  np.testing.assert_allclose(
      reference.read(params, config, tokens).logits,
      reference.dense_logits(params, config, tokens, mask),
      rtol=1e-9,
      atol=1e-9,
  )


@pytest.mark.parametrize("config", cases.FAM)
def test_offset_is_relative_unless_positions_are_zero(config):
  """RoPE sees differences of positions only; a FAM at position 0 is the exception."""
  params = reference.to_numpy(cases.random_params(config, 1))
  tokens = cases.draw_tokens(np.random.default_rng(1), cases.width(config))
  plain = reference.read(params, config, tokens)
  shifted = reference.read(params, config, tokens, offset=7)
  same = np.allclose(plain.logits, shifted.logits, rtol=1e-9, atol=1e-9)
  assert same == (config.memory.fam_position != "zero")
  assert not np.allclose(plain.keys, shifted.keys)


@pytest.mark.parametrize("config", cases.FAM)
def test_fam_counts(config):
  """The FAM changes what is read; without one the reading is BSWA's."""
  params = reference.to_numpy(cases.random_params(config, 2))
  tokens = cases.draw_tokens(np.random.default_rng(2), cases.width(config))
  without = dataclasses.replace(
      config, memory=dataclasses.replace(config.memory, kind="bswa", fam_length=0)
  )
  with_fam = reference.read(params, config, tokens)
  plain = reference.read(params, without, tokens)
  size = config.memory.block_size
  assert with_fam.fam_updates == len(tokens) // size and plain.fam_updates == 0
  assert np.abs(with_fam.logits - plain.logits).max(-1).min() > 1e-4  # at every token
  kept = reference.read(params, config, tokens, kept_fam=with_fam.fam)
  assert np.abs(with_fam.logits - kept.logits).max(-1).min() > 1e-6
  assert kept.fam_updates == with_fam.fam_updates + 1
