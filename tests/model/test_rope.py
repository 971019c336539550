"""RoPE's cosines and sines against float64: before a row's start, after it, and far out."""

import jax.numpy as jnp
import numpy as np
import pytest

from famjax.model import rope


def largest_error(positions, width, theta):
  """max |cos - exact|, |sin - exact| over positions and pairs."""
  cos, sin = rope.rotation(jnp.asarray(positions), width, theta)
  angle = np.asarray(positions, np.float64)[:, None] * theta ** (-np.arange(0, width, 2) / width)
  return max(np.abs(cos - np.cos(angle)).max(), np.abs(sin - np.sin(angle)).max())


@pytest.mark.parametrize("width,theta", [(4, 100.0), (64, 10_000.0), (128, 500_000.0)])
def test_rotation_is_exact_near_the_start_of_a_row(width, theta):
  """Positions -F .. -1 are the initial FAM's; "float" puts it between integers."""
  assert largest_error(np.arange(-16, 17), width, theta) < 2e-6
  assert largest_error(np.linspace(-1, 1, 9, dtype=np.float32), width, theta) < 2e-7
  assert largest_error(np.arange(-256, 257), width, theta) < 4e-5


@pytest.mark.parametrize("start,most", [(60_000, 2e-4), (1_000_000, 1e-3), (5_000_000, 5e-3)])
def test_rotation_is_close_far_out(start, most):
  """float32 angles alone would be off by 0.03 at 1,000,000."""
  assert largest_error(start + np.arange(2_000), 64, 10_000.0) < most
