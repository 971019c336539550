"""FAM from block to block, with the paper's variants that the decoder's own FAM leaves out.

With none of its options it is the FAM of Algorithm 2, slower: the decoder has that one as "fam". F
is `MemoryConfig.fam_length`; a FAM stands at the last F places of its block. Added: the prompt.

    previous     tokens see the FAMs of so many blocks (B.4.2, Table 6)
    static       summary queries (SUM FAM, C.3): the FAM is written by the initial FAM's queries and
                 onto the initial FAM in every block; what was goes on through its keys and values
                 alone. There is no copy of the FAM before:
                 F_t = close(attention(Q(S), [K(F_{t-1}), K(x)]), S)
    diversity    times sum_k p_k log p_k, p the attention of a block averaged over its queries,
                 tokens and FAM, and heads (C.4, Eq. 2b); summed over layers, averaged over blocks
    reconstruct  times the mean square of what the block's queries read from the new FAM alone less
                 what they read from the block, which gets no gradient (C.5; the paper says no more
                 than that outputs are made again from the FAM and the block's queries)
"""

import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from famjax.errors import UserError
from famjax.model import memory as fam_memory
from famjax.model import strategy
from famjax.model.attention import KeySet, attend, probabilities


class Prompt(nnx.Module):
  """`fam_prompt` `[F, D]`."""

  def __init__(self, config, rngs):
    shape = (config.memory.fam_length, config.model_dim)
    drawn = jax.random.normal(rngs.params(), shape) * config.model_dim**-0.5
    self.fam_prompt = strategy.param(drawn)


@strategy.register("feedback")
@dataclasses.dataclass(frozen=True)
class Feedback(strategy.Strategy):
  """FAM and its variants; see above.

  Attributes:
    previous: 1 to any number.
    static: summary queries.
    diversity: weight of the loss of C.4; positive to spread the attention.
    reconstruct: weight of the loss of C.5.
    truncate: see `Strategy`.
  """

  previous: int = 1
  static: bool = False
  diversity: float = 0.0
  reconstruct: float = 0.0
  truncate: int = 0

  def validate(self, config):
    if self.previous < 1:
      raise UserError(f"memory option previous is {self.previous}; it must be at least 1")
    if not 1 <= config.fam_length <= config.block_size:
      raise UserError(
          f"fam_length {config.fam_length} does not fit a block of {config.block_size} tokens:"
          " use 1 up to block_size"
      )

  def weights(self, config, rngs):
    return Prompt(config, rngs)

  def climb(self, weights, config):
    return (weights.fam_prompt[...] * config.embedding_scale).astype(config.compute_dtype)

  def layer_start(self, own, layer, climbing, config):
    """The initial FAM of B.1: newest of the `previous`, the others are yet to be."""
    F, zero = config.memory.fam_length, jnp.zeros(1, jnp.int32)
    fams = jnp.zeros((self.previous, *climbing.shape), climbing.dtype).at[0].set(climbing)
    before = strategy.Block(config, zero, zero, 0, 0).turn(np.arange(-F, 0))
    turn = jax.tree.map(lambda x: x[0], before)
    return (fams, climbing), fam_memory.climb(layer, climbing, turn)

  def layer(self, own, layer, x, memory, block):
    N, F = block.config.memory.block_size, block.config.memory.fam_length
    fams, initial = memory  # [B, previous, F, D], the newest first, and [B, F, D]
    place = np.arange(N - F, N)
    queries, keys, values = strategy.project(layer, x, block)
    sets = list(block.past)
    for j in range(self.previous):
      mask = (block.index >= j)[:, None, None, None, None, None]  # FAM t-1-j; that of -1 is initial
      of_fam = layer.keys_values(fams[:, j], block.turn(place - (j + 1) * N))
      sets.append(KeySet(*(part[:, None] for part in of_fam), mask=mask))
    out = layer.close(strategy.attend_causally(layer, queries, keys, values, tuple(sets)), x)

    fam, write, read = fams[:, 0], block.turn(place), block.turn(place - N)
    own_block = KeySet(keys[:, None], values[:, None])
    asking, _, _ = layer.project(initial if self.static else fam, write, read)
    of_fam = KeySet(*(part[:, None] for part in layer.keys_values(fam, read)))
    attended = attend(asking[:, None], [of_fam, own_block], layer.cap)[:, 0]
    copied = jnp.where((block.index == 0)[:, None, None], 0, fam)  # B.1: the first has no residual
    new = layer.close(attended, initial if self.static else copied)
    penalty = self._penalty(layer, block, queries, asking, new, [*sets], of_fam, own_block)
    fams = jnp.concatenate([new[:, None], fams[:, :-1]], axis=1)
    return strategy.Output(out, (fams, initial), keys, values, penalty)

  def _penalty(self, layer, block, queries, asking, new, sets, of_fam, own_block):
    """`[B]`, or None."""
    total, n = None, queries.shape[2]
    causal = own_block._replace(mask=jnp.tril(jnp.ones((n, n), bool)))
    if self.diversity:
      tokens = probabilities(queries[:, None], [*sets, causal], layer.cap)  # [B, 1, H, n, m] each
      ours = probabilities(asking[:, None], [of_fam, own_block], layer.cap)
      sums = [p.sum((1, 2, 3)) for p in tokens]  # [B, m], over heads and queries
      sums[len(block.past)] += ours[0].sum((1, 2, 3))
      sums[-1] += ours[1].sum((1, 2, 3))
      mean = jnp.concatenate(sums, axis=-1) / (queries.shape[1] * (n + asking.shape[2]))
      entropy = -(mean * jnp.log(jnp.maximum(mean, 1e-9))).sum(-1)
      total = -self.diversity * entropy
    if self.reconstruct:
      N = block.config.memory.block_size
      place = np.arange(N - new.shape[1], N)
      made = layer.keys_values(new, block.turn(place))
      again = attend(queries[:, None], [KeySet(*(part[:, None] for part in made))], layer.cap)
      true = jax.lax.stop_gradient(attend(queries[:, None], [causal], layer.cap))
      error = jnp.square((again - true).astype(jnp.float32)).mean((1, 2, 3, 4))
      total = self.reconstruct * error + (0 if total is None else total)
    return total
