"""Feedback Attention Memory: Algorithm 2 of the paper (SPEC section 2).

    Q,  Kx, Vx = qkv(norm(x))                                             N tokens of block t
    Qf, Kf, Vf = qkv(norm(Fp))                                            F vectors, after block t-1
    a  = attention(Q[i], [K_{t-M..t-1}, Kf, Kx[0..i]], [V..., Vf, Vx]) @ Wo + x[i]
    x' = a + ff(norm(a))                                                  the layer's output
    af = attention(Qf, [Kf, Kx], [Vf, Vx]) @ Wo + Fp                      sees the whole block
    Fn = af + ff(norm(af))                                                the FAM after block t

`update` is the lower half. Both halves stand in grid.py, block after block. `Fn` needs no token's
output, so that `feedback` can run the lower half over all blocks of a call first, with the FAM alone as
its carry; the tokens of all blocks then go through attention and feed-forward at once (SPEC section 4).
"""

from typing import NamedTuple

import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp

from famjax.model import axes
from famjax.model.attention import KeySet, attend
from famjax.model.layers import Layer, in_turns

KEPT = "fam"  # name of what `kept` marks
Turn = tuple[jax.Array, jax.Array]  # cosine and sine


class Turns(NamedTuple):
  """Cosines and sines of a call, the same in all layers; within a block only those of tokens count.

  Attributes:
    token: `[B, T, n, d/2]`, at the tokens' positions.
    write: `[B, T, F, d/2]`, of the FAM that a block writes.
    read: `[B, T, F, d/2]`, of the FAM that a block sees: the one that the block before it wrote.
    after: `[B, F, d/2]`, of the FAM that the row's next call sees.
    prompt: `[F, d/2]`, of the initial FAM.
    noise: `[B, T, F, D]`, what `disturbed` adds after each block; None: nothing.
  """

  token: Turn
  write: Turn
  read: Turn
  after: Turn
  prompt: Turn
  noise: jax.Array | None = None


class Feedback(NamedTuple):
  """What `feedback` leaves behind.

  Attributes:
    fam: `[B, F, D]`, the FAM after the last full block.
    keys: `[B, T, K, F, d]`, of the FAM that each block sees: what the block before it wrote.
    values: `[B, T, K, F, d]`.
  """

  fam: jax.Array
  keys: jax.Array
  values: jax.Array


def update(
    layer: Layer,
    fam: jax.Array,
    block_keys: jax.Array,
    block_values: jax.Array,
    write: Turn,
    read: Turn,
    first: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """One turn of the feedback loop: what a FAM becomes after a block.

  Args:
    layer: the layer whose FAM it is; its own weights are used.
    fam: `[B, F, D]`, Fp.
    block_keys: `[B, 1, K, N, d]`, Kx, rotated; the block is full.
    block_values: `[B, 1, K, N, d]`, Vx.
    write: turns `[B, F, d/2]` at the positions of the FAM that is being written (Qf).
    read: turns `[B, F, d/2]` at the positions of `fam` itself (Kf).
    first: bool `[B]`, this is the first update: the initial FAM carries no context yet, and a zero
      tensor stands in its place in the residual (B.1).

  Returns:
    Fn `[B, F, D]`, and Kf, Vf `[B, K, F, d]`.
  """
  block = KeySet(block_keys, block_values)
  attended, residual, seen = read_block(layer, fam, block, write, read, first)
  return layer.close(attended, residual), seen.keys[:, 0], seen.values[:, 0]


def read_block(
    layer: Layer, fam: jax.Array, block: KeySet, write: Turn, read: Turn, first: jax.Array
) -> tuple[jax.Array, jax.Array, KeySet]:
  """`update` up to `layer.close`: what a FAM's vectors read of a block and of themselves.

  `block` is full and has no mask.

  Returns:
    What `close` takes, `[B, H, F, d]` and `[B, F, D]`, and Kf with Vf, `[B, 1, K, F, d]`.
  """
  queries, *seen = layer.project(fam, write, read)
  seen = KeySet(*(x[:, None] for x in seen))
  sets = [seen, block]
  if axes.platform() == "gpu":  # each set has kernels of its own, and a few vectors wait for all of them
    sets = [KeySet(*(jnp.concatenate(x, axis=3) for x in zip(seen[:2], block[:2])))]  # [B, 1, K, F + N, d]
  attended = attend(queries[:, None], sets, layer.cap)[:, 0]
  return attended, jnp.where(first[:, None, None], 0, fam), seen


def feedback(
    layer: Layer,
    fam: jax.Array,
    block_keys: jax.Array,
    block_values: jax.Array,
    write: Turn,
    read: Turn,
    first: jax.Array,
    full: jax.Array | None,
    noise: jax.Array | None = None,
    *,
    unroll: int = 1,
) -> Feedback:
  """The feedback loop over all blocks of a call.

  Args:
    layer: as in `update`.
    fam: `[B, F, D]`, before the first block.
    block_keys: `[B, T, K, N, d]`.
    block_values: `[B, T, K, N, d]`.
    write: turns `[B, T, F, d/2]`.
    read: turns `[B, T, F, d/2]`.
    first: bool `[B]`, whether an update at the first block would be the row's first.
    full: bool `[B, T]`, whether a block's end is reached in this call; a block that is not full
      does not update the FAM. None: all are.
    noise: `[B, T, F, D]`, see `disturbed`; None: nothing is added.
    unroll: blocks in one turn of the compiled loop.
  """

  T = block_keys.shape[1]
  B, F, _ = fam.shape
  taps, in_turn = in_turns(layer, T, lambda _: (B, F), fam.dtype)

  def step(fam, block):
    t, keys, values, write, read, full, noise, taps = block
    new, *seen = update(in_turn(taps), fam, keys, values, write, read, first & (t == 0))
    return where_full(full, disturbed(new, noise), fam), seen

  # The axis of the blocks stays, with one of them: what the backward pass keeps of a block's keys
  # is then a slice of those that there are. Without it they would be copied.
  per_block = lambda x: jnp.moveaxis(x, 1, 0)
  keys, values = (per_block(x)[:, :, None] for x in (block_keys, block_values))
  blocks = jnp.arange(T), keys, values, *jax.tree.map(per_block, (write, read, full, noise)), taps
  fam, read_back = jax.lax.scan(step, fam, blocks, unroll=unroll)
  return Feedback(fam, *jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), read_back))


def where_full(full: jax.Array | None, new: jax.Array, fam: jax.Array) -> jax.Array:
  """The FAM `[B, F, D]` after a block: the new one in rows where it is full, bool `[B]`; None: in all."""
  return new if full is None else jnp.where(full[:, None, None], new, fam)


def disturbed(fam: jax.Array, noise: jax.Array | None) -> jax.Array:
  """Returns a FAM with noise that is relative to its size.

  Args:
    fam: `[B, F, D]`.
    noise: `[B, F, D]`, in units of each vector's root mean square; None: there is none.
  """
  if noise is None:
    return fam
  size = jnp.sqrt(jnp.square(fam).mean(-1, keepdims=True))
  return fam + jax.lax.stop_gradient(size) * noise.astype(fam.dtype)


def kept(fam: jax.Array) -> jax.Array:
  """A block's FAM that goes with its tokens, which every layer keeps for its backward pass (`decoder.remat`).

  It is `F` of `N` vectors. Made again it would ask for the layer's last product with the tokens beside it,
  which nothing else in the backward pass needs.
  """
  return checkpoint_name(fam, KEPT)


def climb(layer: Layer, prompt: jax.Array, turn: Turn) -> jax.Array:
  """Carries the FAM prompt one layer up, on its own (B.1): full attention among its F vectors.

  Args:
    layer: the layer to go through.
    prompt: `[F, D]`, which is that layer's initial FAM.
    turn: turns `[F, d/2]`.

  Returns:
    `[F, D]`, the next layer's initial FAM.
  """
  queries, keys, values = layer.project(prompt, turn, turn)
  seen = KeySet(keys[None, None], values[None, None])
  attended = attend(queries[None, None], [seen], layer.cap)[0, 0]
  return layer.close(attended, prompt)
