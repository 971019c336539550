"""The chunked loss equals the direct one, and its memory does not grow with the tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from famjax.model.products import float32_product
from famjax.training.flops import products
from famjax.training.loss import distillation_loss, next_token_loss


def make(B, S, D, V, seed=0):
  rng = np.random.default_rng(seed)
  hidden = jnp.asarray(rng.normal(size=(B, S, D)), jnp.float32)
  head = jnp.asarray(rng.normal(size=(D, V)) / D**0.5, jnp.float32)
  targets = jnp.asarray(rng.integers(0, V, (B, S)), jnp.int32)
  weights = jnp.asarray(rng.choice([0, 0.1, 1], (B, S)), jnp.float32)
  return hidden, head, targets, weights


def direct(hidden, head, targets, weights):
  logits = hidden @ head
  loss = -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1)[..., 0]
  correct = logits.argmax(-1) == targets
  return (loss * weights).sum(), (weights.sum(), (correct * weights).sum())


@pytest.mark.parametrize("chunk_tokens", [1, 6, 7, 64, 4096])
def test_equals_direct_loss_and_gradient(chunk_tokens):
  hidden, head, targets, weights = make(3, 17, 8, 29)

  def chunked(hidden, head, targets, weights):
    sums = next_token_loss(lambda h: h @ head, hidden, targets, weights, chunk_tokens)
    return sums.loss, (sums.weight, sums.correct)

  evaluate = lambda f: jax.value_and_grad(f, (0, 1), has_aux=True)(hidden, head, targets, weights)
  jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6),
      evaluate(chunked),
      evaluate(direct),
  )


@pytest.mark.parametrize("chunk_tokens", [6, 4096])
def test_divergence_from_a_teacher_equals_the_direct_one(chunk_tokens):
  hidden, head, targets, weights = make(3, 17, 8, 29)
  taught, teacher, _, _ = make(3, 17, 8, 29, seed=1)

  def chunked(hidden, head, taught, teacher):
    sums = distillation_loss(
        lambda h: h @ head, hidden, lambda h: h @ teacher, taught, targets, weights, chunk_tokens
    )
    return sums.loss, (sums.weight, sums.correct)

  def expected(hidden, head, taught, teacher):
    p, q = (jax.nn.softmax(h @ w) for h, w in ((taught, teacher), (hidden, head)))
    p = jax.lax.stop_gradient(p)
    loss = (p * (jnp.log(p) - jnp.log(q))).sum(-1)
    return (loss * weights).sum(), direct(hidden, head, targets, weights)[1]

  every = (0, 1, 2, 3)
  evaluate = lambda f: jax.value_and_grad(f, every, has_aux=True)(hidden, head, taught, teacher)
  found = evaluate(chunked)
  jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=5e-5, atol=1e-5), found, evaluate(expected)
  )
  assert found[0][0] > 1 and not np.any(found[1][2]) and not np.any(found[1][3])
  same = distillation_loss(
      lambda h: h @ head, hidden, lambda h: h @ head, hidden, targets, weights, chunk_tokens
  )
  assert abs(same.loss) < 1e-4


def test_a_large_vocabulary_stands_in_memory_a_chunk_at_a_time():
  tokens, V, D = 8500, 256_000, 64
  shape = jax.ShapeDtypeStruct
  arguments = (
      shape((1, tokens, D), jnp.float32), shape((D, V), jnp.float32),
      shape((1, tokens), jnp.int32), shape((1, tokens), jnp.float32),
  )  # fmt: skip

  def loss(hidden, head, targets, weights):
    return next_token_loss(lambda h: h @ head, hidden, targets, weights, 1024).loss

  compiled = jax.jit(jax.grad(loss, (0, 1))).lower(*arguments).compile()
  memory = compiled.memory_analysis().temp_size_in_bytes
  chunk = 1024 * V * 4
  assert memory < 3.5 * chunk  # the logits of all tokens alone would be 8.3 chunks


def gradient_of(head_dtype, over):
  """The gradient by `over` of a loss whose logits are float32 sums of bfloat16 products."""
  hidden, head, targets, weights = make(2, 32, 8, 64)
  given = hidden.astype(jnp.bfloat16), head.astype(head_dtype)

  def loss(hidden, head):
    logits = lambda h: float32_product("...D,DV->...V", h, head)
    return next_token_loss(logits, hidden, targets, weights, 16).loss

  return jax.jit(jax.grad(loss, over)), given, (hidden, head, targets, weights)


def test_logits_are_made_once_and_products_stay_in_bfloat16():
  """Three products in all, forward and backward; gradients are within bfloat16's 2^-8 of float32's."""
  function, given, (hidden, head, targets, weights) = gradient_of(jnp.float32, (0, 1))
  traced = function.trace(*given)
  assert products(traced.jaxpr.jaxpr) == 3 * 2 * 2 * 32 * 8 * 64
  dots = [line for line in str(traced.jaxpr).splitlines() if "dot_general" in line]
  text = function.lower(*given).as_text()
  assert dots and "dot_general" in text
  factors = [line.split(":")[-1].split("->")[0] for line in text.splitlines() if "dot_general" in line]
  assert all(one.count("bf16") == 2 for one in factors), factors
  exact = jax.grad(lambda h, w: direct(h, w, targets, weights)[0], (0, 1))(hidden, head)
  for a, b in zip(function(*given), exact):
    np.testing.assert_allclose(a, b, rtol=0.02, atol=0.02)


def test_a_head_that_is_not_trained_costs_no_gradient():
  """The compiler drops what nobody asks for: two products of three."""
  both, hidden_alone = (
      function.lower(*given).compile().cost_analysis()["flops"]
      for function, given, _ in (gradient_of(jnp.float32, over) for over in ((0, 1), (0,)))
  )
  assert hidden_alone < 0.75 * both
