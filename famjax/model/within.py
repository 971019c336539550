"""Calls that stay within a block: decoding, and what is read up to a block's end.

A ring is far larger than the few tokens that such a call adds. It stays as it is: the tokens' keys
and values are given out beside it, and `state.settle` puts them into it, after every call, or once
for all tokens of a decoding loop, which then goes through the ring but never copies it. The FAM, too,
stays as it is, up to the end of a row's block: then the feedback loop turns once, after the call.
"""

import functools

import jax
import jax.numpy as jnp

from famjax.model import memory
from famjax.model.attention import KeySet, attend
from famjax.model.blocks import Layout
from famjax.model.config import MemoryConfig, ModelConfig
from famjax.model.layers import Layer
from famjax.model.memory import Turn
from famjax.model.state import LayerMemory, Recent, State, each_layer, layer_memories


def apply_layer(
    layer: Layer,
    x: jax.Array,
    mine: LayerMemory,
    layout: Layout,
    turn: Turn,
    config: ModelConfig,
) -> tuple[jax.Array, LayerMemory]:
  """`grid.apply_layer` for a call within a block.

  Args:
    layer: its weights.
    x: `[B, 1, n, D]`, the layer's input.
    mine: the layer's memory before the call.
    layout: where the tokens stand.
    turn: `[B, 1, n, d/2]`, of the tokens.
    config: of the model.

  Returns:
    `x'` `[B, 1, n, D]`, and what the call adds to the layer's memory: `recent_keys` and `recent_values`
    `[B, K, n, d]` of its tokens, for `append`. Ring and FAM are as they were.
  """
  queries, keys, values = layer.project(x, turn, turn)
  seen = lambda ring: _as_block(_cut(ring, layout) if config.memory.stop_gradient else ring)
  num_recent = 0 if mine.recent_keys is None else mine.recent_keys.shape[2] - layout.head
  in_ring, in_recent, in_own = _masks(layout, num_recent, config.memory)
  in_recent = jnp.pad(in_recent, [(0, 0)] * 5 + [(layout.head, 0)], constant_values=True)  # the FAM
  key_sets = [KeySet(seen(mine.keys), seen(mine.values), in_ring), KeySet(keys, values, in_own)]
  if num_recent:
    key_sets.append(KeySet(mine.recent_keys[:, None], mine.recent_values[:, None], in_recent))
  if not layout.head:
    key_sets.append(KeySet(mine.fam_keys[:, None], mine.fam_values[:, None]))
  added = LayerMemory(recent_keys=keys[:, 0], recent_values=values[:, 0])
  return layer.close(attend(queries, key_sets, layer.cap), x), added


def append(state: State, added: LayerMemory, layout: Layout) -> State:
  """The state with a call's tokens behind its recent ones, in all layers.

  Once attention has read those: a layer that wrote first what it reads then, or a scan over layers that
  gave out all of them, would copy them.

  Args:
    state: before the call, but for what it has started anew.
    added: what `apply_layer` added in each layer.
    layout: where the tokens stand.
  """
  put = functools.partial(_append, layout=layout)
  before = layer_memories(state)
  keys = each_layer(put, added.recent_keys, before.recent_keys)
  values = each_layer(put, added.recent_values, before.recent_values)
  due = layout.full[:, 0] & bool(jax.tree.leaves(state.fam_keys)[0].shape[-2])
  if state.recent is not None:
    due |= state.recent.due & (layout.count == 0)
  count = layout.recent + layout.count
  return state.replace(recent=Recent(keys, values, count, due, layout.head))


def write_fam(
    layer: Layer, mine: LayerMemory, state: State, write: Turn, read: Turn
) -> LayerMemory:
  """One turn of the feedback loop for the rows whose block is full (`state.recent.due`).

  Args:
    layer: its weights.
    mine: the layer's memory.
    state: where the rows stand.
    write: turns `[B, F, d/2]` of the FAM that the full block writes.
    read: of the one before it.

  Returns:
    The FAM with its keys and values, as they were in the other rows; the ring is left out.
  """
  due, head = state.recent.due, state.recent.head
  own = lambda ring, recent: _own_block(ring, recent[:, :, head:], state)
  fam, _, _ = memory.update(
      layer, mine.fam, own(mine.keys, mine.recent_keys), own(mine.values, mine.recent_values),
      write, read, state.fam_updates == 0,
  )  # fmt: skip
  new = fam, *layer.keys_values(fam, write)
  old = mine.fam, mine.fam_keys, mine.fam_values
  keep = lambda new, old: jnp.where(due.reshape(-1, *(1,) * (new.ndim - 1)), new, old)
  fam, *new = map(keep, new, old)
  beside = None, None
  if head:
    recent = mine.recent_keys, mine.recent_values
    beside = [x.at[:, :, :head].set(y) for x, y in zip(recent, new)]
  return LayerMemory(None, None, fam, *new, *beside)


def _append(new, recent, layout):
  """`[B, K, head + s, d]`: the call's tokens `[B, K, n, d]` behind the recent ones."""
  if recent is None:
    return new
  row = jnp.arange(new.shape[0])[:, None]
  place = (layout.head + layout.recent)[:, None] + jnp.arange(layout.num_slots)  # [B, n]
  return recent.at[row, :, place].set(jnp.swapaxes(new, 1, 2), mode="drop")


def _own_block(ring, recent, state):
  """`[B, 1, K, N, d]`: the block that ends at a row's position, the last tokens being recent ones."""
  row, (R, N) = jnp.arange(ring.shape[0]), ring.shape[2:4]
  place = jnp.arange(N) - (N - state.recent.count)[:, None]  # [B, N], among the recent
  late = jnp.take_along_axis(recent, place.clip(0, recent.shape[2] - 1)[:, None, :, None], axis=2)
  stored = ring[row, :, (state.position // N - 1) % R]
  return jnp.where((place >= 0)[:, None, :, None], late, stored)[:, None]


def _as_block(ring):
  """A layer's ring `[B, K, M+1, N, d]` as the keys of one block, `[B, 1, K, (M+1) * N, d]`."""
  B, K, R, N, d = ring.shape
  return ring.reshape(B, 1, K, R * N, d)


def _cut(ring, layout):
  """The ring with gradients stopped, but for those of the block that is being filled."""
  R = ring.shape[2]
  filling = jnp.arange(R) == (layout.block % R)[:, None]  # [B, R]
  return jnp.where(filling[:, None, :, None, None], ring, jax.lax.stop_gradient(ring))


def _masks(layout: Layout, num_recent: int, config: MemoryConfig) -> tuple[jax.Array, ...]:
  """Which ring slots, which recent tokens and which of the call's own its tokens see.

  Returns:
    bool `[B, 1, 1, 1, n or 1, (M+1) * N]`, `[B, 1, 1, 1, n or 1, s]` and `[B, 1, 1, 1, n, n]`.
  """
  R, N = config.memory_segments + 1, config.block_size
  query = jnp.swapaxes((layout.block * N)[:, None, None] + layout.slots, 1, 2)  # [B, n, 1]
  oldest = ((layout.block - R + 1) * N).clip(0)[:, None, None]  # first position that is seen
  begin = query[:, :1] - layout.recent[:, None, None]  # first position that is not in the ring
  newest = begin[:, 0] // N  # [B, 1] block that the ring is at
  block = newest - (newest - jnp.arange(R)) % R  # [B, R], of each place in the ring
  stored = (block[..., None] * N + jnp.arange(N)).reshape(-1, 1, R * N)
  recent = begin + jnp.arange(num_recent)  # [B, 1, s]
  own = jnp.swapaxes(query, 1, 2)  # [B, 1, n]
  in_ring = (stored >= oldest) & (stored < begin)
  in_recent = (recent >= oldest) & (recent < query[:, :1])
  in_own = own <= query
  if config.window is not None:
    in_ring &= query - stored < config.window
    in_recent &= query - recent < config.window
    in_own &= query - own < config.window
  return tuple(mask[:, None, None, None] for mask in (in_ring, in_recent, in_own))
