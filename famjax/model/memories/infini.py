"""Infini-attention (Munkhdalai et al. 2024, arXiv 2404.07143): a layer's past as one matrix.

With s(x) = elu(x) + 1, queries and keys before RoPE, for each key/value head:

    A_mem = s(Q) M / (s(Q) z)                          read, before the block is written
    A     = sigmoid(b) A_mem + (1 - sigmoid(b)) A_dot  A_dot: attention within the window, with RoPE
    M'    = M + s(K)^T V                               "linear"
    M'    = M + s(K)^T (V - s(K) M / (s(K) z))         "delta"
    z'    = z + sum_i s(K_i)

One gate `b` for each query head and layer is all that is added. M `[K, d, d]` and z `[K, d]` are
float32. The gate wants a rate of its own and no decay (`OptimizerConfig.own_rates`): with the rate
of the rest it hardly moves. The paper has no memory segments, M = 0.
"""

import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp

from famjax.errors import UserError
from famjax.model import rope, strategy

_SMALL = 1e-6


class Gate(nnx.Module):
  """`memory_gate` `[H]`, b."""

  def __init__(self, config):
    self.memory_gate = strategy.param(jnp.zeros(config.num_heads))


@strategy.register("infini")
@dataclasses.dataclass(frozen=True)
class InfiniAttention(strategy.Strategy):
  """Infini-attention.

  Attributes:
    update: "linear" or "delta".
    truncate: see `Strategy`.
  """

  update: str = "delta"
  truncate: int = 0

  def validate(self, config):
    if self.update not in ("linear", "delta"):
      raise UserError(f"memory option update {self.update!r} is unknown; choose linear or delta")

  def layer_weights(self, config, rngs):
    return Gate(config)

  def layer_start(self, own, layer, climbing, config):
    K, d = config.kv_heads, config.head_width
    return (jnp.zeros((K, d, d)), jnp.zeros((K, d))), climbing

  def layer(self, own, layer, x, memory, block):
    (B, n, _), K = x.shape, block.config.kv_heads
    matrix, total = memory
    turn = block.turn(block.places)
    still = jnp.ones_like(turn[0]), jnp.zeros_like(turn[1])
    queries, keys, values = layer.project(x, still, still)  # not rotated
    H, d = queries.shape[1], queries.shape[3]

    # Read: [B, K, G * n, d] of the H / K query heads that share a memory.
    features = _features(queries / layer.scale).reshape(B, K, -1, d)
    recalled = _recall(features, matrix, total).reshape(B, H, n, d)
    dot = strategy.attend_causally(
        layer, rope.rotate(queries, turn), rotated := rope.rotate(keys, turn), values, block.past
    )
    gate = jax.nn.sigmoid(own.memory_gate[...])[:, None, None]
    gate = jnp.where((block.index > 0)[:, None, None, None], gate, 0)  # block 0 has nothing to read
    attended = (gate * recalled + (1 - gate) * dot).astype(values.dtype)

    # Write.
    features, new = _features(keys), values.astype(jnp.float32)  # [B, K, n, d]
    if self.update == "delta":
      new = new - _recall(features, matrix, total)
    after = matrix + jnp.einsum("BKnd,BKne->BKde", features, new), total + features.sum(2)
    return strategy.Output(layer.close(attended, x), after, rotated, values)


def _features(x: jax.Array) -> jax.Array:
  """elu(x) + 1, float32."""
  return jax.nn.elu(x.astype(jnp.float32)) + 1


def _recall(features: jax.Array, matrix: jax.Array, total: jax.Array) -> jax.Array:
  """What a memory holds for features `[B, K, n, d]`; nothing, where it is empty."""
  found = jnp.einsum("BKnd,BKde->BKne", features, matrix)
  weight = jnp.einsum("BKnd,BKd->BKn", features, total)[..., None]
  return found / jnp.maximum(weight, _SMALL)
