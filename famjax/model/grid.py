"""Calls on a grid of blocks (blocks.py): training, and what is read at once.

A FAM needs no token's output, so that a layer may go over its blocks in two orders, which
`ModelConfig.feedback_order` chooses from. The numbers are the same, up to rounding.

  with_tokens:   Algorithm 2 as it is written, block after block, each written out in the compiled
                 program: the products after attention have the N + F vectors of a block and its FAM, so
                 that the loop never reads a layer's widest matrices for `F` vectors alone, and what
                 no backward pass keeps, scores say, is there for one block at a time.
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
  x, fam = order(layer, x, mine.fam, queries, past, own, layout, turns, first, config)
  fam_keys, fam_values = layer.keys_values(fam, turns.after)
  return x, after._replace(fam=fam, fam_keys=fam_keys, fam_values=fam_values)


def order_of(config: ModelConfig, num_blocks: int) -> str:
  """What `feedback_order` "auto" means here, for calls of so many blocks."""
  if config.feedback_order != "auto":
    return config.feedback_order
  unrolled = num_blocks <= config.feedback_unroll
  return "with_tokens" if unrolled and axes.platform() != "gpu" else "before_tokens"


def _before_tokens(layer, x, fam, queries, past, own, layout, turns, first, config):
  """`x'` `[B, T, N, D]` and the FAM `[B, F, D]` after the call."""
  loop = memory.feedback(
      layer, fam, own.keys, own.values, turns.write, turns.read, first, layout.full,
      unroll=config.feedback_unroll,
  )  # fmt: skip
  seen = KeySet(loop.keys, loop.values)
  return layer.close(blocks.attend(queries, past, own, seen, layout, config), x), loop.fam


def _with_tokens(layer, x, fam, queries, past, own, layout, turns, first, config):
  """`x'` `[B, T, N, D]` and the FAM `[B, F, D]` after the call."""
  P, N = past.num_blocks, x.shape[2]
  known = jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), past, own)  # [B, P + T, K, N, d]
  cut = lambda tree, begin, end: jax.tree.map(lambda x: x[:, begin:end], tree)
  out = []
  for t, one in enumerate(_layer_of_each_block(layer, layout.num_blocks, fam, N, config)):
    at = lambda tree, t=t: jax.tree.map(lambda x: x[:, t], tree)
    segments = cut(known, max(P + t - config.memory.memory_segments, 0), P + t)
    mine, here = cut(own, t, t + 1), layout.replace(block=layout.block + t, num_blocks=1)
    af, residual, seen = memory.read_block(
        one, fam, KeySet(mine.keys, mine.values), at(turns.write), at(turns.read), first & (t == 0)
    )
    a = blocks.attend(queries[:, t : t + 1], segments, mine, seen, here, config)[:, 0]
    both = one.close(  # [B, N + F, D]
        jnp.concatenate([a, af], axis=2), jnp.concatenate([x[:, t], residual], axis=1)
    )
    out.append(both[:, :N])
    new = memory.kept(both[:, N:])
    fam = new if layout.full is None else jnp.where(layout.full[:, t, None, None], new, fam)
  return jnp.stack(out, axis=1), fam


def _layer_of_each_block(layer, T, fam, N, config):
  """The layer, T times; a matrix's gradient is made for all blocks at once, and goes over devices once.

  What it is made of is kept up to the last block, which LoRA is spared: its gradients are small.
  """
  if config.lora_rank:
    return [layer] * T
  (B, F, _), fam_only = fam.shape, ("query", "key", "value")
  rows = lambda path: (B, F if path[-1] in fam_only else N + F)
  taps, in_turn = in_turns(layer, T, rows, fam.dtype)
  taps = {path: list(zip(*map(jnp.unstack, tap))) for path, tap in taps.items()}
  return [in_turn({path: tap[t] for path, tap in taps.items()}) for t in range(T)]
