"""RoPE's cosines and sines against float64: before a row's start, after it, and far out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from famjax.model import rope
from famjax.model.config import MemoryConfig, ModelConfig
from tests.model import cases


def largest_error(start, steps, width, theta):
  """max |cos - exact|, |sin - exact| over starts, steps and pairs."""
  config = ModelConfig(head_dim=width, rope_theta=theta)
  start, steps = np.asarray(start, np.int32), np.asarray(steps)
  cos, sin = rope.rotation(jnp.asarray(start), steps, rope.frequencies(config))
  exact = start[..., None].astype(np.float64) + steps
  angle = exact[..., None] * theta ** (-np.arange(0, width, 2) / width)
  return max(np.abs(cos - np.cos(angle)).max(), np.abs(sin - np.sin(angle)).max())


@pytest.mark.parametrize("width,theta", [(4, 100.0), (64, 10_000.0), (128, 500_000.0)])
def test_rotation_is_exact_near_the_start_of_a_row(width, theta):
  """Positions -F .. -1 are the initial FAM's; a first block has cosines made in float64."""
  assert largest_error(0, np.arange(-256, 2048), width, theta) < 2e-7
  assert largest_error(np.arange(-16, 17), [0], width, theta) < 2e-6
  assert largest_error(np.arange(-256, 257), [0, 1], width, theta) < 4e-5


@pytest.mark.parametrize("start,most", [(60_000, 2e-4), (1_000_000, 1e-3), (5_000_000, 5e-3)])
def test_rotation_is_close_far_out(start, most):
  """float32 angles alone would be off by 0.03 at 1,000,000."""
  assert largest_error(start + 500 * np.arange(4), np.arange(500), 64, 10_000.0) < most


def test_some_of_the_steps_are_those_of_all():
  which = np.array([[3, 4], [0, 6]])
  every = rope.rotation(jnp.array([7, 70_000]), np.arange(7), rope.frequencies(ModelConfig()))
  some = rope.rotation(jnp.array([7, 70_000]), np.arange(7), rope.frequencies(ModelConfig()), which)
  for a, b in zip(every, some):
    np.testing.assert_array_equal(np.take_along_axis(a, which[..., None], axis=1), b)


@pytest.mark.parametrize("block,most", [(-1, 2e-7), (60, 2e-4), (15_000, 1e-3)])
def test_a_fam_between_two_tokens_is_there_far_out_too(block, most):
  """Positions "float", N 64, F 3: a quarter apart, which float32 cannot hold past 4,000,000."""
  memory = MemoryConfig("fam", block_size=64, fam_length=3, fam_position="float")
  start, steps = rope.fam_positions(jnp.int32(block), jnp.int32(0), memory)
  np.testing.assert_array_equal(start, (block + 1) * 64 - 1)
  np.testing.assert_array_equal(steps, [0.25, 0.5, 0.75])
  assert largest_error(start, steps, 64, 10_000.0) < most


def test_layers_do_not_make_cosines_anew():
  """XLA for CPUs fuses what it can into all that reads it, and layers that are written out read the same."""

  def cosines(layers):
    config = cases.fam(4, 1, 2, layers, (2, 1), layers_unroll=layers, feedback_unroll=4)
    params = cases.random_params(config, 0)
    run = jax.jit(lambda params: cases.model(config, params)(jnp.zeros((1, 16), jnp.int32))[0])
    return run.lower(params).compile().as_text().count(" cosine(")

  assert cosines(3) == cosines(2) > 0
