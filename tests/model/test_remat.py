"""How a model runs changes what a backward pass keeps, and nothing that it computes."""

import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from famjax.model.config import REMAT_POLICIES, MemoryConfig, ModelConfig
from famjax.model.decoder import Decoder

CONFIG = ModelConfig(
    vocab_size=16, num_layers=4, model_dim=16, num_heads=2, ff_dim=64,
    memory=MemoryConfig(block_size=8, memory_segments=1, fam_length=2),
)  # fmt: skip
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 16, (4, 64)))


@pytest.fixture(scope="module")
def compiled():
  """For each policy: gradients, and bytes of temporaries of the compiled gradient."""
  results = {}
  ways = {policy: {"remat": policy} for policy in REMAT_POLICIES}
  ways["unrolled"] = {"feedback_unroll": 3, "layers_unroll": 2}  # of 8 blocks and 4 layers
  for policy, how in ways.items():
    graphdef, params = nnx.split(Decoder(dataclasses.replace(CONFIG, **how), rngs=nnx.Rngs(0)))
    loss = lambda params: jnp.square(nnx.merge(graphdef, params)(TOKENS)[0]).mean()
    gradient = jax.jit(jax.grad(loss)).lower(params).compile()
    memory = gradient.memory_analysis().temp_size_in_bytes
    results[policy] = jax.device_get(nnx.to_pure_dict(gradient(params))), memory
  return results


@pytest.mark.parametrize("policy", [*(p for p in REMAT_POLICIES if p != "none"), "unrolled"])
def test_same_gradients(compiled, policy):
  # Float32 sums in another order; gradients here are up to about 1.
  same = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
  jax.tree.map(same, compiled[policy][0], compiled["none"][0])


def test_full_keeps_least(compiled):
  memory = {policy: compiled[policy][1] for policy in REMAT_POLICIES}
  assert memory["full"] < 0.6 * memory["none"]
  assert memory["full"] <= memory["dots_no_batch"] <= memory["none"]


@pytest.mark.parametrize("unroll", [1, 8])
def test_dots_makes_no_product_again(unroll):
  """Attention's have a backward pass of their own, through which a policy sees no product by itself."""

  def products(policy):
    config = dataclasses.replace(CONFIG, remat=policy, feedback_unroll=unroll)
    graphdef, params = nnx.split(Decoder(config, rngs=nnx.Rngs(0)))
    loss = lambda params: jnp.square(nnx.merge(graphdef, params)(TOKENS)[0]).mean()
    return jax.jit(jax.grad(loss)).lower(params).as_text().count("dot_general")

  assert products("dots") == products("none") < products("full")
