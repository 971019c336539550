"""MELODI's short-term memory (Chen et al. 2024, arXiv 2410.03156).

S summary vectors stand behind a block's tokens, and begin anew in every block, from learned ones.
In each layer tokens and summaries `[x; u]` see what the layer kept of the block before, as keys:

    [x'; u'] = layer([x; u]), seeing [short_{t-1}; x; u], causal
    short_t  = Mix([x'; u']) + u'       what the layer keeps
    u''      = Mix'([x'; u']) + u'      what the next layer is given in place of u'

Mix is a norm and a linear map over the sequence, from N + S vectors to S. S is
`MemoryConfig.fam_length`. Added: S x D summaries, and in every layer 2 (N + S) S weights and 2 D of
norms. The paper's relative bias is RoPE here, and short_{t-1} stands at the S places before the
block; its long-term memory, one layer's queue, is left out.
"""

import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from famjax.model import strategy
from famjax.model.attention import KeySet
from famjax.model.layers import Norm
from famjax.model.memories.rmt import Tokens


class Mix(nnx.Module):
  """A norm, and a linear map over the sequence: `[B, N + S, D]` to `[B, S, D]`."""

  def __init__(self, config, rngs):
    N, S = config.memory.block_size, config.memory.fam_length
    self.norm = Norm(config)
    self.kernel = strategy.param(jax.random.normal(rngs.params(), (N + S, S)) * (N + S) ** -0.5)

  def __call__(self, x):
    return jnp.einsum("BnD,nS->BSD", self.norm(x), self.kernel[...].astype(x.dtype))


class Mixes(nnx.Module):
  """The two of a layer."""

  def __init__(self, config, rngs):
    self.keep = Mix(config, rngs)
    self.hand_on = Mix(config, rngs)


@strategy.register("melodi")
@dataclasses.dataclass(frozen=True)
class ShortMemory(strategy.Strategy):
  """MELODI's short-term memory.

  Attributes:
    truncate: see `Strategy`.
  """

  truncate: int = 0

  def validate(self, config):
    strategy.need_vectors(config)

  def extra(self, config):
    return 0, config.fam_length

  def weights(self, config, rngs):
    return Tokens(config, rngs)

  def layer_weights(self, config, rngs):
    return Mixes(config, rngs)

  def layer_start(self, own, layer, climbing, config):
    shape = (config.memory.fam_length, config.model_dim)
    return jnp.zeros(shape, config.compute_dtype), climbing

  def inputs(self, weights, x, memory, block):
    return weights.behind(x, block.config)

  def layer(self, own, layer, x, memory, block):
    S = block.after
    queries, keys, values = strategy.project(layer, x, block)
    short = layer.keys_values(memory, block.turn(np.arange(-S, 0)))
    exists = (block.index > 0)[:, None, None, None, None, None]
    seen = KeySet(*(part[:, None] for part in short), mask=exists)
    x = layer.close(
        strategy.attend_causally(layer, queries, keys, values, (*block.past, seen)), x
    )
    u = x[:, -S:]
    handed_on = jnp.concatenate([x[:, :-S], own.hand_on(x) + u], axis=1)
    return strategy.Output(handed_on, own.keep(x) + u, keys, values)
