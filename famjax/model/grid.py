"""Calls on a grid of blocks (blocks.py): training, and what is read at once.

A FAM needs no token's output, so that a layer may go over its blocks in two orders, which
`ModelConfig.feedback_order` chooses from. The numbers are the same, up to rounding.

  with_tokens:   Algorithm 2 as it is written, block after block, each written out in the compiled
                 program: the products after attention have the N + F vectors of a block and its FAM, so
                 that the loop never reads a layer's widest matrices for `F` vectors alone, and what
                 no backward pass keeps, scores say, is there for one block at a time. (A FAM that the last
                 block of a `detached` call writes is apart.)
  before_tokens: the feedback loop first (`memory.feedback`), of the FAM's vectors alone, then the tokens
                 of all blocks at once: a program whose size does not grow with the call, and large
                 kernels for a device that wants them.
"""

import jax
import jax.numpy as jnp

from famjax.model import axes, blocks, memory
from famjax.model.attention import KeySet
from famjax.model.blocks import Layout
from famjax.model.config import ModelConfig
from famjax.model.layers import Layer, in_turns
from famjax.model.memory import Turns
from famjax.model.state import LayerMemory


def apply_layer(
    layer: Layer,
    x: jax.Array,
    mine: LayerMemory,
    layout: Layout,
    turns: Turns,
    first: jax.Array,
    config: ModelConfig,
    detached: bool = False,
) -> tuple[jax.Array, LayerMemory]:
  """One layer over all blocks of a call: Algorithm 1, and with a FAM Algorithm 2.

  Args:
    layer: its weights.
    x: `[B, T, N, D]`, the layer's input.
    mine: the layer's memory before the first block. Of `mine.fam` the keys are made anew.
    layout: where the tokens stand.
    turns: rotations.
    first: bool `[B]`, the FAM has not been written yet.
    config: of the model.
    detached: no gradient comes back through the memory after the call. What the last block writes then
      stands alone: it has no backward pass, and where nobody reads it, it is not made at all.

  Returns:
    `x'` `[B, T, N, D]`, and the layer's memory after the call.
  """
  M = config.memory.memory_segments
  past = (
      blocks.no_past(x.shape[0], config) if mine.keys is None
      else blocks.read_ring(mine.keys, mine.values, layout)
  )  # fmt: skip
  queries, keys, values = layer.project(x, turns.token, turns.token)
  own = blocks.own_block(past, keys, values, layout, M)
  ring = blocks.write_ring(past, own, layout, M + 1)
  after = mine._replace(keys=ring.keys, values=ring.values)
  if not config.memory.length:
    return layer.close(blocks.attend(queries, past, own, None, layout, config), x), after
  order = _with_tokens if order_of(config, layout.num_blocks) == "with_tokens" else _before_tokens
  updates = layout.num_blocks - detached  # in the order; the last one apart
  x, fam = order(layer, x, mine.fam, queries, past, own, layout, turns, first, updates, config)
  if detached:
    fam = jax.lax.stop_gradient(_write_last(layer, fam, own, layout, turns, first))
  fam_keys, fam_values = layer.keys_values(fam, turns.after)
  return x, after._replace(fam=fam, fam_keys=fam_keys, fam_values=fam_values)


def order_of(config: ModelConfig, num_blocks: int) -> str:
  """What `feedback_order` "auto" means here, for calls of so many blocks."""
  if config.feedback_order != "auto":
    return config.feedback_order
  unrolled = num_blocks <= config.feedback_unroll
  return "with_tokens" if unrolled and axes.platform() != "gpu" else "before_tokens"


def _before_tokens(layer, x, fam, queries, past, own, layout, turns, first, updates, config):
  """`x'` `[B, T, N, D]` and the FAM `[B, F, D]` after so many updates: T, or all but the last."""
  parts = own.keys, own.values, turns.write, turns.read, layout.full, turns.noise
  keys, values, write, read, full, noise = _cut(parts, 0, updates)
  loop = memory.feedback(
      layer, fam, keys, values, write, read, first, full, noise, unroll=config.feedback_unroll
  )
  seen = KeySet(loop.keys, loop.values)
  if updates < layout.num_blocks:
    last = layer.keys_values(loop.fam, _at(turns.read, updates))
    seen = KeySet(*(jnp.concatenate([x, y[:, None]], axis=1) for x, y in zip(seen, last)))
  return layer.close(blocks.attend(queries, past, own, seen, layout, config), x), loop.fam


def _with_tokens(layer, x, fam, queries, past, own, layout, turns, first, updates, config):
  """`x'` `[B, T, N, D]` and the FAM `[B, F, D]` after so many updates: T, or all but the last."""
  P, N = past.num_blocks, x.shape[2]
  known = jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), past, own)  # [B, P + T, K, N, d]
  out = []
  for t, one in enumerate(_layer_of_each_block(layer, fam, layout.num_blocks, updates, N, config)):
    segments = _cut(known, max(P + t - config.memory.memory_segments, 0), P + t)
    mine, here = _cut(own, t, t + 1), layout.replace(block=layout.block + t, num_blocks=1)
    attend = lambda seen: blocks.attend(queries[:, t : t + 1], segments, mine, seen, here, config)[:, 0]  # pylint: disable=cell-var-from-loop
    if t == updates:
      seen = KeySet(*(x[:, None] for x in one.keys_values(fam, _at(turns.read, t))))
      out.append(one.close(attend(seen), x[:, t]))
      continue
    af, residual, seen = memory.read_block(
        one, fam, KeySet(mine.keys, mine.values), _at(turns.write, t), _at(turns.read, t),
        first & (t == 0),
    )  # fmt: skip
    both = one.close(  # [B, N + F, D]
        jnp.concatenate([attend(seen), af], axis=2), jnp.concatenate([x[:, t], residual], axis=1)
    )
    out.append(both[:, :N])
    new = memory.disturbed(memory.kept(both[:, N:]), _at(turns.noise, t))
    fam = memory.where_full(_at(layout.full, t), new, fam)
  return jnp.stack(out, axis=1), fam


def _write_last(layer, fam, own, layout, turns, first):
  """The FAM `[B, F, D]` after the call's last block, from the one before it."""
  t = layout.num_blocks - 1
  keys, values = _cut((own.keys, own.values), t, t + 1)
  new, *_ = memory.update(
      layer, fam, keys, values, _at(turns.write, t), _at(turns.read, t), first & (t == 0)
  )
  new = memory.disturbed(new, _at(turns.noise, t))
  return memory.where_full(_at(layout.full, t), new, fam)


def _layer_of_each_block(layer, fam, T, updates, N, config):
  """The layer, T times; a matrix's gradient is made for all blocks at once, and goes over devices once.

  What it is made of is kept up to the last block, which LoRA is spared: its gradients are small. To `in_turns`
  all blocks are one turn, whose rows stand side by side: a block more or less has other numbers of them.
  """
  if config.lora_rank:
    return [layer] * T
  B, F, _ = fam.shape
  rest = T - updates  # blocks whose FAM is read, and not written with its tokens

  def rows(path):  # of each block
    if path[-1] in ("key", "value"):
      return [F] * T
    return [F] * updates + [0] * rest if path[-1] == "query" else [N + F] * updates + [N] * rest

  taps, in_turn = in_turns(layer, 1, lambda path: (B, sum(rows(path))), fam.dtype)
  cut = lambda path, tap: zip(*(jax.lax.split(x[0], rows(path), axis=1) for x in tap))
  taps = {path: list(cut(path, tap)) for path, tap in taps.items()}
  return [in_turn({path: tap[t] for path, tap in taps.items()}) for t in range(T)]


def _cut(tree, begin, end):
  """Blocks `begin` to `end` of arrays `[B, T, ...]`."""
  return jax.tree.map(lambda x: x[:, begin:end], tree)


def _at(tree, t):
  """Block `t` of arrays `[B, T, ...]`."""
  return jax.tree.map(lambda x: x[:, t], tree)
