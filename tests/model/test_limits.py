"""SPEC section 3 on random shapes: limits (property 3) and weights (6).

float32 against the float64 reference, which is written from the paper and goes token by token
(reference.py). Every logit and every field of the state is compared.
"""

import dataclasses

from hypothesis import given, settings, strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from famjax.model.state import empty_state, restart
from tests.model import cases, reference
from tests.model.cases import BATCH, Stream


def with_memory(config, **changes):
  return dataclasses.replace(config, memory=dataclasses.replace(config.memory, **changes))


@settings(max_examples=40)
@given(config=cases.configs, seed=cases.seeds, data=st.data())
def test_model_equals_reference(config, seed, data):
  """Algorithms 1 and 2, rows of any length, each at its own offset."""
  rng = np.random.default_rng(seed)
  params = cases.random_params(config, seed)
  longest = cases.width(config)
  lengths = [longest, data.draw(st.integers(1, longest), label="length of row 1")]
  offsets = [data.draw(st.integers(0, 100), label="offset") for _ in range(BATCH)]
  tokens = cases.draw_tokens(rng, BATCH, longest)
  stream = Stream(config, params)
  stream.state = stream.state.replace(offset=jnp.asarray(offsets, jnp.int32))
  stream.feed(tokens, lengths=lengths, start=[True] * BATCH, aligned=True)
  for row, (length, offset) in enumerate(zip(lengths, offsets)):
    reading = cases.read(config, params, tokens[row, :length], offset=offset)
    assert stream.state.offset[row] == offset
    cases.assert_equals_reference(config, stream, row, reading)


@settings(max_examples=15)
@given(config=cases.configs, seed=cases.seeds)
def test_token_by_token_equals_reference(config, seed):
  """The decoding step, across every block boundary, after a fresh `init_state`."""
  params = cases.random_params(config, seed)
  tokens = cases.draw_tokens(np.random.default_rng(seed), BATCH, cases.width(config))
  stream = Stream(config, params)
  for place in range(tokens.shape[1]):
    stream.feed(tokens[:, place : place + 1])
  for row in range(BATCH):
    reading = cases.read(config, params, tokens[row])
    cases.assert_equals_reference(config, stream, row, reading)


@settings(max_examples=12)
@given(
    config=st.sampled_from([cases.FAM[0], cases.FAM[4], cases.FAM[7]]),
    seed=cases.seeds,
    data=st.data(),
)
def test_kept_fam_equals_reference(config, seed, data):
  """Random state passing: row 0 starts from a kept FAM (ordinary residual), row 1 afresh."""
  rng = np.random.default_rng(seed)
  params = cases.random_params(config, seed)
  kept = rng.standard_normal(
      (config.num_layers, config.memory.fam_length, config.model_dim)
  ).astype(np.float32)
  tokens = cases.draw_tokens(rng, BATCH, cases.width(config))
  offsets = [data.draw(st.integers(0, 100), label="offset") for _ in range(BATCH)]
  state = restart(
      empty_state(config, BATCH, past=False),
      jnp.array([True, False]),
      fam=jnp.asarray(kept),
      fam_updates=jnp.asarray(data.draw(st.integers(1, 5)), jnp.int32),
  )
  state = state.replace(offset=jnp.asarray(offsets, jnp.int32))
  updates = int(state.fam_updates[0])
  stream = Stream(config, params, state=state)
  stream.feed(tokens, start=[False, True], aligned=True)
  first = cases.read(config, params, tokens[0], offset=offsets[0], kept_fam=kept)
  first = dataclasses.replace(first, fam_updates=first.fam_updates + updates - 1)
  second = cases.read(config, params, tokens[1], offset=offsets[1])
  cases.assert_equals_reference(config, stream, 0, first)
  cases.assert_equals_reference(config, stream, 1, second)


@settings(max_examples=15)
@given(config=cases.bswa_configs, seed=cases.seeds)
def test_bswa_equals_dense_attention_under_the_block_mask(config, seed):
  params = cases.random_params(config, seed)
  memory = config.memory
  tokens = cases.draw_tokens(np.random.default_rng(seed), BATCH, cases.width(config))
  mask = reference.block_mask(
      tokens.shape[1], memory.block_size, memory.memory_segments, memory.window
  )
  stream = Stream(config, params)
  stream.feed(tokens, aligned=True)
  for row in range(BATCH):
    dense = reference.dense_logits(reference.to_numpy(params), config, tokens[row], mask)
    np.testing.assert_allclose(stream.logits(row), dense, **cases.TOLERANCE)


@settings(max_examples=10)
@given(config=st.sampled_from([cases.BSWA[3], cases.bswa(4, 4, 0, 2, (4, 2))]), seed=cases.seeds)
def test_bswa_with_enough_segments_is_full_causal_attention(config, seed):
  """M >= T - 1: no key has left the memory by the last token."""
  length = cases.width(config)
  assert config.memory.memory_segments >= -(-length // config.memory.block_size) - 1
  params = cases.random_params(config, seed)
  tokens = cases.draw_tokens(np.random.default_rng(seed), BATCH, length)
  whole, singles = Stream(config, params), Stream(config, params)
  whole.feed(tokens, aligned=True)
  for place in range(length):
    singles.feed(tokens[:, place : place + 1])
  for row in range(BATCH):
    dense = reference.dense_logits(
        reference.to_numpy(params), config, tokens[row], reference.causal_mask(length)
    )
    np.testing.assert_allclose(whole.logits(row), dense, **cases.TOLERANCE)
    np.testing.assert_allclose(singles.logits(row), dense, **cases.TOLERANCE)


@settings(max_examples=8)
@given(config=st.sampled_from([cases.BSWA[0], cases.BSWA[4]]), seed=cases.seeds)
def test_fam_of_length_0_is_bswa(config, seed):
  """Bit for bit, logits and state, with the same parameters."""
  empty = with_memory(config, kind="fam", fam_length=0)
  params = cases.random_params(config, seed)
  same = cases.random_params(empty, seed)
  assert jax.tree.structure(params) == jax.tree.structure(same)
  tokens = cases.draw_tokens(np.random.default_rng(seed), BATCH, cases.width(config))
  left, right = Stream(config, params), Stream(empty, params)
  piece = tokens[:, : cases.piece(config)]
  for tokens, aligned in ((tokens, True), (piece, False)):
    np.testing.assert_array_equal(
        left.feed(tokens, aligned=aligned), right.feed(tokens, aligned=aligned)
    )
    for row in range(BATCH):
      cases.assert_same_row(config, left.state, row, right.state, row, exact=True)


@pytest.mark.parametrize("config", cases.FAM)
def test_a_fam_adds_f_times_d_parameters(config):
  """Property 6: the prompt is the only new weight (a prefix: one such array per layer)."""

  def sizes(config):
    leaves = jax.tree_util.tree_leaves_with_path(cases.abstract(config)[1])
    return {jax.tree_util.keystr(path): leaf.size for path, leaf in leaves}

  with_fam, without = sizes(config), sizes(with_memory(config, kind="bswa"))
  new = {name: size for name, size in with_fam.items() if name not in without}
  prefix = config.memory.fam_init == "prefix"
  expected = config.memory.fam_length * config.model_dim * (config.num_layers if prefix else 1)
  assert sum(with_fam.values()) - sum(without.values()) == expected
  assert list(new.values()) == [expected]
  assert ("fam_prefix" if prefix else "fam_prompt") in next(iter(new))


@pytest.mark.parametrize("tie_embeddings", [True, False])
def test_bfloat16_compute_over_float32_parameters(tie_embeddings):
  """Close to float32; the logits themselves are not rounded to bfloat16's 8 bits."""
  exact = dataclasses.replace(cases.FAM[0], tie_embeddings=tie_embeddings)
  half = dataclasses.replace(exact, compute_dtype="bfloat16")
  params = cases.random_params(exact, 5)
  assert {str(x.dtype) for x in jax.tree.leaves(cases.abstract(half)[1])} == {"float32"}
  tokens = jnp.asarray(cases.draw_tokens(np.random.default_rng(5), 2, cases.width(exact)), jnp.int32)
  expected, _ = cases.call(exact, params, tokens, None, None, None)
  logits, state = cases.call(half, params, tokens, None, None, None)
  assert logits.dtype == jnp.float32 and state.fam.dtype == state.keys.dtype == jnp.bfloat16
  assert (logits != logits.astype(jnp.bfloat16)).mean() > 0.9
  off = jnp.abs(logits - expected).mean() / jnp.abs(expected).mean()
  assert 1e-4 < off < 0.1  # 8 bits, through two layers of peaked attention
