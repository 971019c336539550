"""RoPE's cosines and sines against float64: before a row's start, after it, and far out."""

import jax.numpy as jnp
import numpy as np
import pytest

from famjax.model import rope
from famjax.model.config import MemoryConfig, ModelConfig


def largest_error(positions, width, theta, fraction=0.0):
  """max |cos - exact|, |sin - exact| over positions and pairs."""
  config = ModelConfig(head_dim=width, rope_theta=theta)
  frequency = rope.frequencies(config)
  cos, sin = rope.rotation(jnp.asarray(positions), frequency, jnp.float32(fraction))
  exact = np.asarray(positions, np.float64) + np.asarray(fraction, np.float64)
  angle = exact[:, None] * theta ** (-np.arange(0, width, 2) / width)
  return max(np.abs(cos - np.cos(angle)).max(), np.abs(sin - np.sin(angle)).max())


@pytest.mark.parametrize("width,theta", [(4, 100.0), (64, 10_000.0), (128, 500_000.0)])
def test_rotation_is_exact_near_the_start_of_a_row(width, theta):
  """Positions -F .. -1 are the initial FAM's."""
  assert largest_error(np.arange(-16, 17), width, theta) < 2e-6
  assert largest_error(np.arange(-256, 257), width, theta) < 4e-5


@pytest.mark.parametrize("start,most", [(60_000, 2e-4), (1_000_000, 1e-3), (5_000_000, 5e-3)])
def test_rotation_is_close_far_out(start, most):
  """float32 angles alone would be off by 0.03 at 1,000,000."""
  assert largest_error(start + np.arange(2_000), 64, 10_000.0) < most


@pytest.mark.parametrize("block,most", [(-1, 2e-7), (60, 2e-4), (15_000, 1e-3)])
def test_a_fam_between_two_tokens_is_there_far_out_too(block, most):
  """Positions "float", N 64, F 3: a quarter apart, which float32 cannot hold past 4,000,000."""
  memory = MemoryConfig("fam", block_size=64, fam_length=3, fam_position="float")
  positions, fraction = rope.fam_positions(jnp.int32(block), jnp.int32(0), memory)
  np.testing.assert_array_equal(positions, [(block + 1) * 64 - 1] * 3)
  np.testing.assert_array_equal(fraction, [0.25, 0.5, 0.75])
  assert largest_error(positions, 64, 10_000.0, fraction) < most
