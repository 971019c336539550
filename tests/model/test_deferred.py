"""Gradients that are made after a loop are those that the loop would have made."""

import dataclasses

from flax import nnx
import jax
from jax.extend import core
import jax.numpy as jnp
import numpy as np

from famjax.model import deferred
from famjax.model.config import MemoryConfig, ModelConfig
from famjax.model.decoder import Decoder
from famjax.model.layers import projections
from famjax.model.memory import feedback


def function(weights, x):
  """A product, LoRA's two and a bias."""
  return x @ weights["w"] + (x @ weights["a"]) @ weights["b"] + weights["bias"]


def test_gradients_are_those_of_the_loop():
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape) / shape[0] ** 0.5, jnp.float32)
  weights = {"w": draw(6, 6), "a": draw(6, 2), "b": draw(2, 6), "bias": draw(6)}
  x, T = draw(3, 6), 5

  def loss(weights, x, tapped):
    def turn(x, tap):
      y = function(jax.lax.stop_gradient(weights) if tapped else weights, x)
      y = deferred.listen(y, x, tap) if tapped else y
      return jnp.sin(y), y

    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    taps = deferred.make_taps(function, weights, T, shape)
    end, all_of = jax.lax.scan(turn, x, taps)
    return (end**2).sum() + jnp.cos(all_of).sum()

  both = [jax.value_and_grad(loss, (0, 1))(weights, x, tapped) for tapped in (True, False)]
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-5), *both)


def test_factors_of_lora_are_scaled_before_they_are_rounded():
  """In the loop as elsewhere: a scale that is part of the factor gives the same numbers."""
  memory = MemoryConfig(block_size=4, memory_segments=1, fam_length=2)
  config = ModelConfig(
      vocab_size=16, num_layers=1, model_dim=8, num_heads=2, ff_dim=24, memory=memory, lora_rank=3,
      lora_alpha=5.0, compute_dtype="bfloat16",
  )  # fmt: skip
  layer = jax.tree.map(lambda x: x[0], Decoder(config, rngs=nnx.Rngs(0)).layers)
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  arrays = [x.astype(jnp.bfloat16) for x in (draw(1, 2, 8), draw(1, 1, 2, 4, 4), draw(1, 1, 2, 4, 4))]
  turn = jnp.ones((1, 1, 2, 2)), jnp.zeros((1, 1, 2, 2))

  @nnx.jit
  def loop(layer):
    return feedback(layer, *arrays, turn, turn, jnp.zeros(1, bool), None).fam.astype(jnp.float32)

  for one in projections(layer).values():
    one.lora_b[...] = draw(*one.lora_b.shape)
  scaled = loop(layer)
  for one in projections(layer).values():
    one.lora_b[...], one.lora_scale = one.lora_b[...] * one.lora_scale, 1.0
  np.testing.assert_array_equal(scaled, loop(layer))


def carries(jaxpr: core.Jaxpr):
  """Shapes of what loops inside the loop over layers take from turn to turn."""
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == "scan":
      at = eqn.params["num_consts"]
      yield eqn.params["length"], [
          var.aval.shape for var in eqn.invars[at : at + eqn.params["num_carry"]]
      ]
    for inner in core.jaxprs_in_params(eqn.params):
      yield from carries(inner)


def test_the_feedback_loop_carries_no_gradient_of_a_matrix():
  """LoRA or not: what its turns add up is of vectors alone."""
  blocks = 5  # no other loop has so many turns
  memory = MemoryConfig(block_size=4, memory_segments=1, fam_length=2)
  plain = ModelConfig(
      vocab_size=16, num_layers=3, model_dim=8, num_heads=2, ff_dim=24, memory=memory,
      feedback_order="before_tokens",
  )  # fmt: skip
  tokens = jnp.zeros((1, blocks * 4), jnp.int32)
  for config in (plain, dataclasses.replace(plain, lora_rank=3)):
    graphdef, params = nnx.split(Decoder(config, rngs=nnx.Rngs(0)))
    loss = lambda params: nnx.merge(graphdef, params)(tokens)[0].sum()  # pylint: disable=cell-var-from-loop
    found = [
        shapes for length, shapes in carries(jax.make_jaxpr(jax.grad(loss))(params).jaxpr)
        if length == blocks
    ]  # fmt: skip
    assert len(found) >= 2  # forward and backward
    matrices = {tuple(x.shape[1:]) for x in jax.tree.leaves(params["layers"]) if x.ndim > 2}
    assert matrices and not matrices & {shape for shapes in found for shape in shapes}
