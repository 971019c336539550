"""SPEC section 3, property 8: gradients reach the FAM prompt and cross segments unless stopped.

Gradients are compared with finite differences of the float64 reference, so that they are the right
ones and not just there.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from famjax.model import axes, layers
from tests.model import cases, reference


@functools.partial(jax.jit, static_argnames=("config", "cuts"), compiler_options=cases.QUICK)
def gradient(config, params, tokens, weights, cuts=None, lengths=None):
  """d sum(weights * logits) / d params, for tokens [B, S] read in calls that end at `cuts`."""

  def loss(params):
    model, state, start, total = cases.model(config, params), None, 0, 0.0
    for cut in cuts or (tokens.shape[1],):
      logits, state = model(
          tokens[:, start:cut], state, lengths=lengths, aligned=start == 0 and cuts is None
      )
      total += (weights[:, start:cut] * logits).sum()
      start = cut
    return total

  return jax.grad(loss)(params)


def draw(config, seed, batch=1):
  rng = np.random.default_rng(seed)
  tokens = cases.draw_tokens(rng, batch, cases.width(config))
  weights = rng.standard_normal((*tokens.shape, cases.VOCAB)).astype(np.float32)
  return cases.random_params(config, seed), jnp.asarray(tokens, jnp.int32), weights


def leaves(tree):
  flat = jax.tree_util.tree_leaves_with_path(tree)
  return {jax.tree_util.keystr(path): leaf for path, leaf in flat}


def finite_difference(config, params, tokens, weights, direction, step=1e-5):
  """Central difference of sum(weights * logits) of the reference along `direction`."""

  def loss(sign):
    moved = jax.tree.map(lambda p, d: p + sign * step * d, params, direction)
    return (weights * reference.read(moved, config, tokens).logits).sum()

  return (loss(1) - loss(-1)) / (2 * step)


@pytest.mark.parametrize("config", [cases.FAM[1], cases.FAM[7], cases.BSWA[3]])
def test_every_gradient_equals_finite_differences(config):
  """One random direction for each parameter array."""
  params, tokens, weights = draw(config, 3)
  grads = reference.to_numpy(gradient(config, params, tokens, weights))
  exact = reference.to_numpy(params)
  rng = np.random.default_rng(4)
  for name, grad in leaves(grads).items():
    direction = jax.tree_util.tree_map_with_path(
        lambda path, p: rng.standard_normal(p.shape) * (jax.tree_util.keystr(path) == name), exact
    )
    expected = finite_difference(config, exact, tokens[0], weights[0], direction)
    along = (grad * leaves(direction)[name]).sum()
    assert abs(expected) > 1e-3, name
    np.testing.assert_allclose(along, expected, rtol=2e-3, atol=2e-3, err_msg=name)


def test_gradient_of_the_fam_prompt_equals_finite_differences():
  """Entry by entry: through the climb up the layers and every update."""
  config = cases.FAM[1]
  params, tokens, weights = draw(config, 6)
  grads = reference.to_numpy(gradient(config, params, tokens, weights))["fam_prompt"]
  exact = reference.to_numpy(params)
  expected = np.zeros_like(grads)
  for place in np.ndindex(grads.shape):
    direction = jax.tree.map(np.zeros_like, exact)
    direction["fam_prompt"][place] = 1
    expected[place] = finite_difference(config, exact, tokens[0], weights[0], direction)
  assert np.abs(expected).min() > 0
  np.testing.assert_allclose(grads, expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("config", [cases.FAM[4], cases.FAM[6]])
def test_gradients_reach_the_fam_from_its_last_use(config):
  """Also when the logits of the last block alone are asked, and segments are stopped."""
  config = dataclasses.replace(
      config, memory=dataclasses.replace(config.memory, stop_gradient=True)
  )
  params, tokens, weights = draw(config, 7)
  weights[:, : 3 * config.memory.block_size] = 0
  grads = gradient(config, params, tokens, weights)
  name = "fam_prefix" if config.memory.fam_init == "prefix" else "fam_prompt"
  grad = np.asarray(reference.to_numpy(grads)[name])
  assert np.abs(grad).reshape(-1, config.model_dim).max(-1).min() > 1e-6  # every vector of it


@pytest.mark.parametrize("stop_gradient", [False, True])
@pytest.mark.parametrize("cuts", [None, (2, 7, 9), (4, 5, 6, 9)])
def test_gradients_cross_segments_unless_stopped(stop_gradient, cuts):
  """Three blocks, two layers, M = 1: the last block's gradient reaches all, or itself alone."""
  config = dataclasses.replace(
      cases.bswa(3, 1, 0, 2, (2, 1), tie_embeddings=False, stop_gradient=stop_gradient),
      vocab_size=9,
  )
  params = cases.random_params(config, 8)
  tokens = jnp.arange(9)[None]  # every place has an embedding of its own
  weights = np.random.default_rng(8).standard_normal((1, 9, 9)).astype(np.float32)
  weights[:, :6] = 0
  grads = reference.to_numpy(gradient(config, params, tokens, weights, cuts=cuts))
  reached = np.abs(grads["embedder"]["embedding"]).max(-1) > 1e-7
  expected = np.arange(9) >= 6 if stop_gradient else np.ones(9, bool)
  np.testing.assert_array_equal(reached, expected)


def test_gradients_cross_blocks_through_the_fam_alone():
  """With stopped segments the feedback loop still carries gradient from block 2 to block 0."""
  config = dataclasses.replace(
      cases.fam(3, 1, 2, 1, (2, 1), tie_embeddings=False, stop_gradient=True), vocab_size=9
  )
  params = cases.random_params(config, 8)
  weights = np.random.default_rng(8).standard_normal((1, 9, 9)).astype(np.float32)
  weights[:, :6] = 0
  grads = reference.to_numpy(gradient(config, params, jnp.arange(9)[None], weights))
  assert (np.abs(grads["embedder"]["embedding"]).max(-1) > 1e-7).all()


def test_padding_gets_no_gradient():
  """Property 7: embeddings that stand in padding alone have a gradient of exactly 0."""
  config = dataclasses.replace(cases.fam(3, 1, 2, 2, (2, 1), tie_embeddings=False), vocab_size=9)
  params = cases.random_params(config, 9)
  weights = np.random.default_rng(9).standard_normal((1, 9, 9)).astype(np.float32)
  weights[:, 7:] = 0
  tokens, lengths = jnp.arange(9)[None], jnp.array([7])
  grads = reference.to_numpy(gradient(config, params, tokens, weights, lengths=lengths))
  reached = np.abs(grads["embedder"]["embedding"]).max(-1)
  np.testing.assert_array_equal(reached > 0, np.arange(9) < 7)


@functools.cache
def _on_a_cpu(lora_rank):
  config = dataclasses.replace(cases.FAM[1], lora_rank=lora_rank)
  return leaves(gradient.__wrapped__(config, *draw(config, 5, batch=2)))


@pytest.mark.parametrize(
    "lora_rank, platform, split",
    [(0, "gpu", False), (0, "tpu", False), (2, "gpu", False), (2, "tpu", False), (2, "tpu", True)],
)
def test_products_are_the_same_as_a_cpu_and_an_accelerator_are_given_them(
    monkeypatch, lora_rank, platform, split
):
  """Over one axis of tokens and over several; on a TPU with LoRA's factors joined to matrices."""
  config = dataclasses.replace(cases.FAM[1], lora_rank=lora_rank)
  params, tokens, weights = draw(config, 5, batch=2)
  here = _on_a_cpu(lora_rank)
  monkeypatch.setattr(axes, "platform", lambda: platform)
  monkeypatch.setattr(axes, "is_split", lambda *_: split)
  monkeypatch.setattr(layers, "_MANY", 1)
  there = leaves(gradient.__wrapped__(config, params, tokens, weights))
  for name, value in here.items():
    # Sums of float32 in another order: one rounding of the weights alone makes 0.5 to 1.6e-3 of LoRA's factors.
    room = (1e-3 if lora_rank or platform == "tpu" else 1e-4) * float(jnp.abs(value).max())
    np.testing.assert_allclose(there[name], value, rtol=0, atol=room, err_msg=name)
