"""Tests of noise on the FAM between the blocks of a call."""

import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from famjax.model import memory
from famjax.model.config import MemoryConfig, ModelConfig
from famjax.model.decoder import Decoder

B, T, N, F = 2, 4, 4, 2
CONFIG = ModelConfig(
    vocab_size=17, num_layers=2, model_dim=8, num_heads=2, ff_dim=16, feedback_unroll=T,
    memory=MemoryConfig("fam", block_size=N, memory_segments=1, fam_length=F),
)  # fmt: skip


def setting(order, **changes):
  """Returns a decoder, tokens and noise."""
  config = dataclasses.replace(CONFIG, feedback_order=order, **changes)
  decoder = Decoder(config, rngs=nnx.Rngs(0))
  tokens = jax.random.randint(jax.random.key(1), (B, T * N), 0, 17)
  return decoder, tokens, 0.5 * jax.random.normal(jax.random.key(2), (B, T, F, 8))


@pytest.mark.parametrize("order", ["with_tokens", "before_tokens"])
@pytest.mark.parametrize("detached", [False, True])
def test_one_call_is_calls_of_one_block_with_noise_between(order, detached):
  decoder, tokens, noise = setting(order)
  whole, after = decoder.hidden(tokens, noise=noise, detached=detached)
  state, pieces = None, []
  for t in range(T):
    piece, state = decoder.hidden(tokens[:, t * N : (t + 1) * N], state, aligned=True)
    fam = np.asarray(state.fam, np.float64)  # [L, B, F, D]
    size = np.sqrt(np.square(fam).mean(-1, keepdims=True))
    state = state.replace(fam=jnp.asarray(fam + size * np.asarray(noise[:, t]), jnp.float32))
    pieces.append(piece)
  # Float32, in other orders of summing.
  np.testing.assert_allclose(whole, jnp.concatenate(pieces, axis=1), atol=1e-5, rtol=1e-5)
  np.testing.assert_allclose(after.fam, state.fam, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("order", ["with_tokens", "before_tokens"])
def test_noise_after_a_block_changes_later_blocks_alone(order):
  decoder, tokens, noise = setting(order)
  plain, _ = decoder.hidden(tokens)
  changed, _ = decoder.hidden(tokens, noise=noise.at[:, 0].set(0).at[:, 2:].set(0))
  different = np.abs(np.asarray(changed - plain)).max(axis=(0, 2)) > 1e-6  # [S]
  assert not different[: 2 * N].any() and different[2 * N :].all()
  same, _ = decoder.hidden(tokens, noise=jnp.zeros_like(noise))
  np.testing.assert_array_equal(same, plain)


def test_a_block_that_is_not_full_gets_no_noise():
  decoder, tokens, noise = setting("before_tokens")
  lengths = jnp.array([2 * N + 1, 4 * N])
  _, after = decoder.hidden(tokens, lengths=lengths, noise=noise)
  _, cut = decoder.hidden(tokens[:, : 2 * N], noise=noise[:, :2])
  np.testing.assert_allclose(after.fam[:, 0], cut.fam[:, 0], atol=1e-5)


def test_noise_has_the_size_of_each_vector():
  fam = jnp.array([[[3.0, 4.0], [0.0, 0.0]]])
  noise = jnp.array([[[1.0, -2.0], [1.0, 1.0]]])
  size = np.sqrt(12.5)
  np.testing.assert_allclose(
      memory.disturbed(fam, noise), [[[3 + size, 4 - 2 * size], [0, 0]]], rtol=1e-6
  )
  assert memory.disturbed(fam, None) is fam
