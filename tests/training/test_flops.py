"""The FLOPs formula against a count by hand and against the compiler's own."""

import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp
import pytest

from famjax.model.config import MemoryConfig, ModelConfig
from famjax.model.decoder import Decoder
from famjax.training.flops import flops_per_token, products, reading_flops_per_token
from famjax.training.flops import utilisation, visible_keys
from famjax.training.train_state import split


def brute_force(memory, length, followed):
  keys = 0
  for p in range(length):
    block = p // memory.block_size
    first = block - memory.memory_segments
    first = first if followed else max(first, 0)
    seen = p - first * memory.block_size + 1
    keys += seen if memory.window is None else min(seen, memory.window)
  return keys / length


@pytest.mark.parametrize("followed", [False, True])
@pytest.mark.parametrize("segments, window", [(0, None), (1, None), (3, None), (2, 5)])
def test_visible_keys(segments, window, followed):
  memory = MemoryConfig("bswa", block_size=4, memory_segments=segments, window=window)
  for length in (4, 12, 28):
    assert visible_keys(memory, length, followed) == brute_force(memory, length, followed)


def test_the_fam_costs_about_f_over_n():
  config = ModelConfig(vocab_size=256, num_layers=18, model_dim=1536, num_heads=12, ff_dim=12288)
  bswa = dataclasses.replace(config, memory=dataclasses.replace(config.memory, kind="bswa"))
  flops, reading = flops_per_token(config, 8192), reading_flops_per_token(config, 8192)
  assert flops_per_token(bswa, 8192) == flops._replace(fam=0.0)
  without = reading_flops_per_token(bswa, 8192)
  assert reading / without == pytest.approx(1 + 64 / 1024, rel=0.005)
  assert flops.total - flops.fam == 3 * without
  # In training nobody reads the last of eight blocks' FAM; where rows go on it is made, and that is all.
  assert flops.fam / (3 * without) == pytest.approx(7 / 8 * 64 / 1024, rel=0.05)
  follow = flops_per_token(config, 8192, followed=True)
  reading = reading_flops_per_token(config, 8192, followed=True)
  written = (reading - reading_flops_per_token(bswa, 8192, followed=True)) / 8  # and read, in a block
  assert follow.fam - flops.fam == pytest.approx(written, rel=0.05)


def test_one_block_agrees_with_the_compiler():
  """One block and one layer, so that nothing is inside a loop that the compiler counts once."""
  N = 64
  memory = MemoryConfig("bswa", block_size=N, memory_segments=0)
  config = ModelConfig(
      vocab_size=512, num_layers=1, model_dim=128, num_heads=2, num_kv_heads=1, memory=memory
  )
  graphdef, params = split(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))
  tokens = jax.ShapeDtypeStruct((1, N), jnp.int32)
  forward = jax.jit(lambda p, t: nnx.merge(graphdef, p)(t)[0]).lower(params, tokens).compile()
  counted = forward.cost_analysis()["flops"] / N
  formula = flops_per_token(config, N)
  masked = 4 * config.num_heads * config.head_width * (N - 1) / 2  # computed, then masked out
  assert counted == pytest.approx(formula.total / 3 + masked, rel=0.03)


def test_utilisation():
  flops = flops_per_token(ModelConfig(), 1024)
  rate = 197e12 / flops.total
  assert utilisation(flops, rate, "TPU v5 lite") == pytest.approx(1)
  assert utilisation(flops, rate, "TPU v5 lite", devices=4) == pytest.approx(0.25)
  assert utilisation(flops, rate, "cpu") is None


def test_a_frozen_model_costs_two_passes_of_its_matrices_and_three_of_its_attention():
  config = ModelConfig()
  N, F, L = config.memory.block_size, config.memory.length, config.num_layers
  whole, frozen = (flops_per_token(config, 2048, frozen=frozen) for frozen in (False, True))
  assert frozen.attention == whole.attention and frozen.matrices == whole.matrices * 2 / 3
  attention = 3 * L / N * 4 * config.num_heads * config.head_width * F * (N + (N + F) / 2)
  assert frozen.fam - attention == pytest.approx((whole.fam - attention) * 2 / 3)


def test_products_of_a_program_count_loops_and_what_is_made_again():
  weight = jnp.ones((8, 8))

  def layers(x, again):
    step = lambda x, _: (jnp.tanh(x @ weight), None)
    step = jax.checkpoint(step) if again else step
    return jax.lax.scan(step, x, length=5)[0].sum()

  x = jnp.ones((4, 8))
  product = 2 * 4 * 8 * 8
  traced = lambda f, *args: jax.jit(f, static_argnums=1).trace(*args).jaxpr.jaxpr
  assert products(traced(layers, x, False)) == 5 * product
  # The backward pass has one product, for the input; made again, the forward one comes twice.
  assert products(traced(jax.grad(layers), x, False)) == 10 * product
  assert products(traced(jax.grad(layers), x, True)) == 15 * product
  branches = lambda x, on: jax.lax.cond(x[0, 0] > 0, lambda x: x @ weight, lambda x: x, x)
  assert products(traced(branches, x, None)) == product
  unread = lambda x, _: (x @ weight, (x @ weight) @ weight)[0]
  assert products(traced(unread, x, None)) == product
