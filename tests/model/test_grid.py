"""The orders in which a layer goes over its blocks give the same numbers and the same gradients.

That each of them equals the slow reference is tested with everything else: cases.FAM has both.
"""

import dataclasses
import re

import jax
from jax.extend import core
import jax.numpy as jnp
import numpy as np
import pytest

from famjax.model import axes, grid
from famjax.model.config import ModelConfig
from famjax.training.flops import products, reading_flops_per_token
from tests.model import cases

ROWS, SIZE = 2, 4
CALLS = (9, 8)  # tokens: without a past, two blocks and a rest; from there, several blocks


def read(config, params, tokens, weights, lengths):
  """A sum over all logits and the last FAM, of a text that is read in two calls."""
  decoder, state, start, total = cases.model(config, params), None, 0, 0.0
  for call, length in zip(CALLS, lengths):
    part = slice(start, start + call)
    logits, state = decoder(tokens[:, part], state, lengths=length)
    real = jnp.arange(call) < length[:, None]
    total += (weights[:, part] * logits * real[..., None]).sum()
    start += call
  return total + jnp.sin(state.fam / 64).sum()  # a FAM without a norm has entries of some hundreds


@pytest.mark.parametrize("segments, of_memory, options", [
    (0, {}, {"feedback_unroll": 2}),
    (2, {}, {"feedback_unroll": 9, "lora_rank": 2, "remat": "full"}),
    (2, {"stop_gradient": True}, {"attention_kernel": "interpret"}),
    (2, {"window": 6}, {"attention_kernel": "interpret_gpu", "feedback_unroll": 9}),
], ids=str)  # fmt: skip
def test_orders_are_equal(monkeypatch, segments, of_memory, options):
  config = cases.fam(SIZE, segments, 2, 2, (2, 1), **of_memory, **options)
  rng = np.random.default_rng(segments)
  params = cases.random_params(config, 0)
  tokens = jnp.asarray(cases.draw_tokens(rng, ROWS, sum(CALLS)), jnp.int32)
  weights = rng.standard_normal((*tokens.shape, cases.VOCAB)).astype(np.float32)
  lengths = [jnp.array(length) for length in ([9, 6], [8, 7])]

  def found(order, platform):
    here = dataclasses.replace(config, feedback_order=order)
    step = jax.value_and_grad(lambda params: read(here, params, tokens, weights, lengths))
    monkeypatch.setattr(axes, "platform", lambda: platform)
    return jax.jit(step, compiler_options=cases.QUICK)(params)

  value, grads = found("before_tokens", "cpu")
  forms = [("with_tokens", "cpu", 0)]
  if "attention_kernel" not in options:  # a GPU has a FAM's keys in one set; the sum has terms of 900 in all
    forms += [("before_tokens" if segments else "with_tokens", "gpu", 4e-3)]
  for order, platform, room in forms:
    other, of_other = found(order, platform)
    np.testing.assert_allclose(other, value, rtol=1e-5, atol=room)
    for a, b in zip(jax.tree.leaves(of_other), jax.tree.leaves(grads), strict=True):
      # Sums in another order, through weights that make the largest entries of size 1 to 400: up to
      # 1.3e-4 of the largest on the processors that were tried.
      np.testing.assert_allclose(a, b, rtol=0, atol=5e-4 * float(jnp.abs(b).max()))


@pytest.mark.parametrize("order, blocks, options", [
    ("with_tokens", 1, {"remat": "full"}),
    ("before_tokens", 3, {}),
    ("with_tokens", 3, {"lora_rank": 2, "remat": "full", "feedback_unroll": 2}),
    ("before_tokens", 3, {"lora_rank": 2, "remat": "full", "feedback_unroll": 2}),
], ids=str)  # fmt: skip
def test_detached_changes_neither_numbers_nor_the_gradients_of_outputs(order, blocks, options):
  """A row that goes on and one that starts, which ends within a block; a sum of the state counts for nothing."""
  config = cases.fam(SIZE, 1, 2, 2, (2, 1), feedback_order=order, **options)
  params = cases.random_params(config, 0)
  rng = np.random.default_rng(blocks)
  tokens = jnp.asarray(cases.draw_tokens(rng, ROWS, blocks * SIZE), jnp.int32)
  lengths = jnp.array([blocks * SIZE, blocks * SIZE - 1])
  real = (jnp.arange(tokens.shape[1]) < lengths[:, None])[..., None]
  weights = real * rng.standard_normal((*tokens.shape, cases.VOCAB)).astype(np.float32)

  def found(params, detached):
    decoder = cases.model(config, params)
    _, state = decoder(tokens[:, :SIZE])
    logits, state = decoder(
        tokens, state, start_of_sequence=jnp.array([False, True]), lengths=lengths,
        aligned=True, detached=detached,
    )  # fmt: skip
    return (weights * logits).sum() + detached * jnp.sin(state.fam).sum(), state

  step = jax.jit(jax.grad(found, has_aux=True), static_argnums=1, compiler_options=cases.QUICK)
  (grads, state), (of_detached, state_of_detached) = step(params, False), step(params, True)
  # Products of other shapes, whose sums are in another order.
  for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(state_of_detached), strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * max(1.0, float(jnp.abs(a).max())))
  for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(of_detached), strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-4 * float(jnp.abs(a).max()))


@pytest.mark.parametrize("order", ["with_tokens", "before_tokens"])
def test_detached_leaves_out_the_last_backward_pass(order):
  """By products of the program, the last F vectors' two in three; less their keys and values, which tokens read."""
  blocks, rows = 4, SIZE + 2
  config = cases.fam(SIZE, 0, 2, 2, (2, 1), feedback_order=order, fam_init="prefix", feedback_unroll=9)
  params = cases.random_params(config, 0)
  tokens = jnp.zeros((1, blocks * SIZE), jnp.int32)

  def flops(detached):
    loss = lambda params: cases.model(config, params)(tokens, detached=detached)[0].sum()
    return products(jax.make_jaxpr(jax.grad(loss))(params).jaxpr)

  whole, less = flops(False), flops(True)
  layer = reading_flops_per_token(config, SIZE) - 2 * config.vocab_size * config.model_dim
  of_token = layer * SIZE / rows  # a FAM's vector costs the same, and its backward pass twice that
  assert 0.8 < (whole - less) / (2 * config.memory.length * of_token) < 1


def rows_of_products(jaxpr: core.Jaxpr, width: int):
  """Rows of what is multiplied by a matrix that `width` vectors come out of."""
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == "dot_general" and eqn.outvars[0].aval.shape[-1] == width:
      yield int(np.prod(eqn.outvars[0].aval.shape[:-1]))
    for inner in core.jaxprs_in_params(eqn.params):
      yield from rows_of_products(inner, width)


@pytest.mark.parametrize("order, rows", [
    ("with_tokens", [SIZE + 2] * 5),  # each block's
    ("before_tokens", [2, 5 * SIZE]),  # of the loop's body, and of all tokens
])  # fmt: skip
def test_how_many_vectors_the_widest_matrices_multiply(order, rows):
  config = cases.fam(SIZE, 1, 2, 1, (2, 1), feedback_order=order, fam_init="prefix")
  params = cases.random_params(config, 0)
  tokens = jnp.zeros((1, 5 * SIZE), jnp.int32)
  program = jax.make_jaxpr(lambda params: cases.model(config, params)(tokens)[0])(params)
  found = list(rows_of_products(program.jaxpr, config.hidden_width))
  assert found == sorted(2 * rows)  # gate and up


@pytest.mark.parametrize("platform, keys", [("gpu", SIZE + 3), ("tpu", 3)])
def test_keys_that_a_fam_reads(monkeypatch, platform, keys):
  """Its own and its block's: two sets, but on a GPU, where each would have kernels of its own."""
  config = cases.fam(SIZE, 1, 3, 1, (2, 1), feedback_order="before_tokens", fam_init="prefix")
  params = cases.random_params(config, 0)
  tokens = jnp.zeros((1, 5 * SIZE), jnp.int32)
  monkeypatch.setattr(axes, "platform", lambda: platform)
  update = jax.make_jaxpr(lambda params: cases.model(config, params)(tokens)[1].fam)(params)
  # Scores of the F vectors of each of two heads, which share their keys.
  assert [n for n in (SIZE + 3, 3) if 6 in rows_of_products(update.jaxpr, n)] == [keys]


def test_no_last_product_is_made_again_for_the_backward_pass():
  """A block's FAM is kept, and nothing else needs what `down` gives."""
  blocks = 5
  config = cases.fam(SIZE, 1, 2, 1, (2, 1), feedback_order="with_tokens", remat="full")
  params = cases.random_params(config, 0)
  tokens = jnp.zeros((1, blocks * SIZE), jnp.int32)
  loss = lambda params: cases.model(config, params)(tokens)[0].sum()
  program = jax.jit(jax.grad(loss)).lower(params).as_text()
  ff, rows = config.hidden_width, SIZE + config.memory.length
  shape = f"dot_general[^\n]*x{ff}xf32>, tensor<{ff}x{config.model_dim}xf32>\\) -> tensor<{rows}x"
  assert len(re.findall(shape, program)) == blocks


@pytest.mark.parametrize("order", ["with_tokens", "before_tokens"])
def test_a_matrix_has_one_gradient_for_all_blocks(order):
  """Devices send gradients of whole matrices, so that there is one of tokens and FAM, or one of each."""
  blocks = 5
  config = cases.fam(SIZE, 1, 2, 1, (2, 1), feedback_order=order, fam_init="prefix")
  params = cases.random_params(config, 0)
  tokens = jnp.zeros((1, blocks * SIZE), jnp.int32)
  loss = lambda params: cases.model(config, params)(tokens)[0].sum()
  program = jax.jit(jax.grad(loss)).lower(params).as_text()
  rows = blocks * (SIZE + config.memory.length), blocks * SIZE, blocks * config.memory.length
  factors = f"tensor<({'|'.join(map(str, rows))})x({config.model_dim}|{config.hidden_width})xf32>"
  gradients = re.findall(f"dot_general[^\n]*contracting_dims = .0. x .0.[^\n]*{factors}, {factors}", program)
  assert len(gradients) == 3 * (1 if order == "with_tokens" else 2)  # gate, up and down


def test_what_auto_means():
  for platform, unrolled in {"tpu": "with_tokens", "cpu": "with_tokens", "gpu": "before_tokens"}.items():
    with axes.placed_by(cases.On(platform)):
      for config, blocks, order in (
          (ModelConfig(feedback_unroll=8), 8, unrolled),
          (ModelConfig(feedback_unroll=8), 9, "before_tokens"),
          (ModelConfig(), 1, unrolled),
          (ModelConfig(feedback_order="with_tokens"), 2, "with_tokens"),
          (ModelConfig(feedback_order="before_tokens", feedback_unroll=8), 2, "before_tokens"),
      ):
        assert grid.order_of(config, blocks) == order
