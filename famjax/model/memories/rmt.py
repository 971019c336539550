"""Memory tokens at the model's ends: Recurrent Memory Transformer, and AutoCompressors.

Recurrent Memory Transformer (Bulatov et al. 2022, arXiv 2207.06881): P vectors stand before a
block's tokens and, the same ones, behind them; what the last layer makes of those behind them
stands in both places of the next block.

    y_t = decoder([m_t; x_t; m_t])        causal      m_{t+1} = norm(y_t)[-P:]

AutoCompressors (Chevalier et al. 2023, arXiv 2305.14788): summary vectors stand behind the tokens
alone, and what became of those of all blocks before stands before them.

    y_t = decoder([s_1 .. s_{t-1}; x_t; u])                  s_t = norm(y_t)[-P:]

P is `MemoryConfig.fam_length`. Both add P x D parameters.
"""

import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from famjax.errors import UserError
from famjax.model import strategy
from famjax.model.attention import KeySet, attend


class Tokens(nnx.Module):
  """P vectors `[P, D]` as large as embeddings are."""

  def __init__(self, config, rngs):
    shape = (config.memory.fam_length, config.model_dim)
    drawn = jax.random.normal(rngs.params(), shape) * config.model_dim**-0.5
    self.tokens = strategy.param(drawn)

  def __call__(self, config):
    """In the dtype of activations, scaled as embeddings are."""
    return (self.tokens[...] * config.embedding_scale).astype(config.compute_dtype)

  def behind(self, x, config):
    """`[B, n, D]` with the P vectors behind it."""
    new = self(config)
    return jnp.concatenate([x, jnp.broadcast_to(new, (x.shape[0], *new.shape))], axis=1)


@strategy.register("rmt")
@dataclasses.dataclass(frozen=True)
class RecurrentMemory(strategy.Strategy):
  """Recurrent Memory Transformer.

  Attributes:
    truncate: blocks after which back-propagation through the memory ends, the paper's k2 (its
      published code drops the cut); 0: it goes through all.
  """

  truncate: int = 0

  def validate(self, config):
    strategy.need_vectors(config)

  def extra(self, config):
    return config.fam_length, config.fam_length

  def weights(self, config, rngs):
    return Tokens(config, rngs)

  def start(self, weights, config):
    return weights(config)

  def inputs(self, weights, x, memory, block):
    return jnp.concatenate([memory, x, memory], axis=1)

  def outputs(self, weights, x, memory, norm, block):
    return norm(x[:, -block.after :])


@strategy.register("autocompressors")
@dataclasses.dataclass(frozen=True)
class AutoCompressors(strategy.Strategy):
  """AutoCompressors, with a bound: the oldest summaries give way.

  A summary has no place in the paper's models; here, where RoPE gives one to every key, those of
  before stand just before the block, and those that are being written just behind it.

  Attributes:
    most: summaries that are kept; the paper keeps all, so that its state grows with the text.
    truncate: as above; the paper trains with 2.
  """

  most: int = 30
  truncate: int = 0

  def validate(self, config):
    strategy.need_vectors(config)
    if self.most < 1:
      raise UserError(f"memory option most is {self.most}; it must be at least 1")

  def extra(self, config):
    return self.most * config.fam_length, config.fam_length

  def weights(self, config, rngs):
    return Tokens(config, rngs)

  def start(self, weights, config):
    shape = (self.most * config.memory.fam_length, config.model_dim)
    return jnp.zeros(shape, config.compute_dtype)

  def inputs(self, weights, x, memory, block):
    return jnp.concatenate([memory, weights.behind(x, block.config)], axis=1)

  def layer(self, own, layer, x, memory, block):
    N, P = block.config.memory.block_size, block.after
    turn = block.turn(np.clip(block.places, -1, N))
    queries, keys, values = layer.project(x, turn, turn)
    n = x.shape[1]
    written = jnp.minimum(block.index, self.most) * P  # vectors before the block that are summaries
    exists = jnp.arange(n) >= (block.before - written)[:, None]  # [B, n]; they stand at the end
    mask = jnp.tril(jnp.ones((n, n), bool)) & exists[:, None, None, None, None]
    own_keys = KeySet(keys[:, None], values[:, None], mask)
    attended = attend(queries[:, None], [*block.past, own_keys], layer.cap)[:, 0]
    return strategy.Output(layer.close(attended, x), memory, keys, values)

  def outputs(self, weights, x, memory, norm, block):
    return jnp.concatenate([memory, norm(x[:, -block.after :])], axis=1)[:, block.after :]
