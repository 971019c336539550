"""Associative Recurrent Memory Transformer (Rodkin et al. 2024, arXiv 2407.04841).

P learned vectors stand behind a block's tokens. Each layer has a matrix A `[D, 6 r]` and a sum
z `[6 r]`, which it reads for every vector of its input, and writes from what became of the P:

    x      = x + A phi(W_q x) / (z . phi(W_q x))                    read, then the layer
    v'     = A phi(k) / (z . phi(k))      k = W_k m, v = W_v m      what is there already
    A     += beta (v - v') phi(k)^T       beta = sigmoid(W_b m)     delta rule
    z     += gamma phi(k)                 gamma = 1 - z . phi(k) / |phi(k)|^2

gamma stays within 0 to 1, and has no gradient.

phi is DPFP-3: with y = [relu(x); relu(-x)], the products of y with itself turned by 1, 2 and 3
places. P is `MemoryConfig.fam_length`, r is `width`. Added: P x D, and in every layer
D (2 r + D + 1). W_v starts at 0, so that a new memory changes nothing. The P vectors begin anew in
every block: all that goes on is in A and z.
"""

import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp

from famjax.errors import UserError
from famjax.model import strategy
from famjax.model.memories.rmt import Tokens

_SMALL = 1e-5


class Association(nnx.Module):
  """`query` and `key` `[D, r]`, `value` `[D, D]`, `beta` `[D]`."""

  def __init__(self, config, width, rngs):
    D = config.model_dim
    draw = lambda: strategy.param(jax.random.normal(rngs.params(), (D, width)) * D**-0.5)
    self.query, self.key = draw(), draw()
    self.value = strategy.param(jnp.zeros((D, D)))
    self.beta = strategy.param(jnp.zeros(D))


@strategy.register("armt")
@dataclasses.dataclass(frozen=True)
class AssociativeMemory(strategy.Strategy):
  """Associative Recurrent Memory Transformer.

  Attributes:
    width: r, of keys and queries.
    truncate: see `Strategy`.
  """

  width: int = 64
  truncate: int = 0

  def validate(self, config):
    strategy.need_vectors(config)
    if self.width < 1:
      raise UserError(f"memory option width is {self.width}; it must be at least 1")

  def extra(self, config):
    return 0, config.fam_length

  def weights(self, config, rngs):
    return Tokens(config, rngs)

  def layer_weights(self, config, rngs):
    return Association(config, self.width, rngs)

  def layer_start(self, own, layer, climbing, config):
    size = 6 * self.width
    return (jnp.zeros((config.model_dim, size)), jnp.zeros(size)), climbing

  def inputs(self, weights, x, memory, block):
    return weights.behind(x, block.config)

  def layer(self, own, layer, x, memory, block):
    matrix, total = memory
    found = _recall(_features(x, own.query), matrix, total)
    x = x + found.astype(x.dtype)
    queries, keys, values = strategy.project(layer, x, block)
    x = layer.close(strategy.attend_causally(layer, queries, keys, values, block.past), x)

    m = x[:, -block.after :].astype(jnp.float32)
    phi = _features(m, own.key)  # [B, P, 6 r]
    new = m @ own.value[...] - _recall(phi, matrix, total)
    beta = jax.nn.sigmoid(m @ own.beta[...])
    known = jnp.einsum("BPf,Bf->BP", phi, total) / (jnp.square(phi).sum(-1) + _SMALL)
    gamma = jax.lax.stop_gradient(jnp.clip(1 - known, 0, 1))
    after = (
        matrix + jnp.einsum("BP,BPD,BPf->BDf", beta, new, phi),
        total + jnp.einsum("BP,BPf->Bf", gamma, phi),
    )
    return strategy.Output(x, after, keys, values)


def _features(x: jax.Array, kernel) -> jax.Array:
  """DPFP-3 of `x @ kernel`: float32 `[..., 6 r]`, none below 0."""
  x = x.astype(jnp.float32) @ kernel[...]
  y = jax.nn.relu(jnp.concatenate([x, -x], axis=-1))
  return jnp.concatenate([y * jnp.roll(y, j, axis=-1) for j in (1, 2, 3)], axis=-1)


def _recall(features: jax.Array, matrix: jax.Array, total: jax.Array) -> jax.Array:
  """`[B, n, D]`: what a memory holds for features `[B, n, 6 r]`."""
  weight = jnp.einsum("Bnf,Bf->Bn", features, total)[..., None]
  return jnp.einsum("BDf,Bnf->BnD", matrix, features) / (weight + _SMALL)
