"""A decoder that goes from block to block, for memories whose layers need the block before whole.

A FAM's loop is closed within its layer, so that the decoder reads a call layer by layer. The rivals
(`strategy`) are not all like that: some feed what the last layer made to the first. Here a
`jax.lax.scan` over blocks goes around the one over layers. What a row remembers is its strategy's
memory after the last full block, and the tokens of the block that is being filled: these are gone
through again in the next call, so that any cut of a sequence has one meaning.
"""

from typing import TYPE_CHECKING, Any

from flax import nnx
import jax
import jax.numpy as jnp

from famjax.model import axes, strategy
from famjax.model.attention import KeySet
from famjax.model.config import ModelConfig
from famjax.model.layers import Layer
from famjax.model.state import Segments, State
from famjax.model.strategy import Block, Strategy

if TYPE_CHECKING:
  from famjax.model.decoder import Decoder


def make_weights(how: Strategy, config: ModelConfig, rngs: nnx.Rngs):
  """The modules that a strategy adds to a model: its own, and the layers', stacked; None: none."""
  own = lambda key: how.layer_weights(config, nnx.Rngs(key))
  shapes = nnx.eval_shape(lambda: own(jax.random.key(0)))
  stacked = None
  if shapes is not None:
    keys = jax.random.split(rngs.params(), config.num_layers)
    stacked = nnx.merge(nnx.split(shapes)[0], jax.vmap(lambda key: nnx.split(own(key))[1])(keys))
  return how.weights(config, rngs), stacked


def empty_memory(config: ModelConfig, batch_size: int) -> Any:
  """A strategy's memory, all zeros: of each layer `[L, B, ...]`, of the model `[B, ...]`."""
  how, L, B = strategy.of(config.memory), config.num_layers, batch_size

  def one():
    rngs = nnx.Rngs(0)
    layer, own = Layer(config, rngs), how.layer_weights(config, rngs)
    weights = how.weights(config, rngs)
    of_layer, _ = how.layer_start(own, layer, how.climb(weights, config), config)
    return of_layer, how.start(weights, config)

  of_layer, of_model = jax.eval_shape(one)
  zeros = lambda *rows: lambda x: jnp.zeros((*rows, *x.shape), x.dtype)
  return {"layers": jax.tree.map(zeros(L, B), of_layer), "model": jax.tree.map(zeros(B), of_model)}


def initial_memory(decoder: "Decoder") -> Any:
  """What rows that have read nothing remember, without an axis of rows; it depends on weights."""
  config = decoder.config
  how = strategy.of(config.memory)
  weights = getattr(decoder, "memory", None)
  split, merge = _layers(decoder)

  def step(climbing, parts):
    layer, own = merge(parts)
    of_layer, climbing = how.layer_start(own, layer, climbing, config)
    return climbing, of_layer

  _, of_layers = jax.lax.scan(step, how.climb(weights, config), split)
  return {"layers": of_layers, "model": how.start(weights, config)}


def hidden(
    decoder: "Decoder",
    tokens: jax.Array,
    state: State,
    start_of_sequence: jax.Array | None,
    lengths: jax.Array | None,
    aligned: bool,
    remat,
) -> tuple[jax.Array, State]:
  """`Decoder.hidden` for a model with a strategy; `state` is never None here.

  Args:
    remat: wraps the step over layers.
  """
  config, (B, S) = decoder.config, tokens.shape
  how, N, M = strategy.of(config.memory), config.memory.block_size, config.memory.memory_segments
  memory, past = state.memory, state.segments
  position = state.position
  if start_of_sequence is not None:
    position = jnp.where(start_of_sequence, 0, position)
    first = initial_memory(decoder)
    memory = {
        part: jax.tree.map(_choose(start_of_sequence, axis), first[part], memory[part])
        for part, axis in (("layers", 1), ("model", 0))
    }
  slot = jnp.zeros_like(position) if aligned else position % N
  count = jnp.full_like(position, S) if lengths is None else lengths
  T = -(-S // N) if aligned else -(-(S + N - 1) // N)

  # The grid [B, T, N]: what the row's unfinished block holds, and the call's tokens after it.
  place = jnp.arange(T * N)
  index = place - slot[:, None]
  grid = jnp.take_along_axis(tokens, index.clip(0, S - 1), axis=1)
  known = jnp.pad(state.tokens, ((0, 0), (0, (T - 1) * N)))
  grid = jnp.where(index < 0, known, jnp.where(index < count[:, None], grid, 0))
  end = slot + count
  full = (jnp.arange(1, T + 1) * N <= end[:, None]) & (count > 0)[:, None]  # [B, T]

  x = decoder.embed(grid.reshape(B, T, N))
  weights = getattr(decoder, "memory", None)
  split, merge = _layers(decoder)
  before, after = how.extra(config.memory)

  def block_step(carry, inputs):
    memory, past = carry
    t, x, full = inputs
    if how.truncate:
      cut = (t > 0) & (t % how.truncate == 0)
      memory = jax.tree.map(lambda m: jnp.where(cut, jax.lax.stop_gradient(m), m), memory)
    block = Block(config, position // N + t, state.offset, before, after)
    x = how.inputs(weights, x, memory["model"], block)
    x = axes.constrain(x, "batch", None, "width")

    def layer_step(x, parts):
      parts, memory, past = parts
      layer, own = merge(parts)
      here = Block(config, block.index, state.offset, before, after, _seen(past, block, config))
      out = how.layer(own, layer, x, memory, here)
      memory = jax.tree.map(_choose(full, 0), out.memory, memory)
      penalty = jnp.zeros(B) if out.penalty is None else jnp.where(full, out.penalty, 0)
      return out.x, (memory, _pushed(past, out, block, full), penalty)

    x, (of_layers, past, penalty) = jax.lax.scan(
        remat(layer_step, config.remat), x, (split, memory["layers"], past),
        unroll=config.layers_unroll,
    )  # fmt: skip
    of_model = how.outputs(weights, x, memory["model"], decoder.final_norm, block)
    of_model = jax.tree.map(_choose(full, 0), of_model, memory["model"])
    memory = {"layers": of_layers, "model": of_model}
    return (memory, past), (block.tokens_of(x, axis=1), penalty.sum(0))

  blocks = jnp.arange(T), jnp.moveaxis(x, 1, 0), full.T
  (memory, past), (out, penalty) = jax.lax.scan(block_step, (memory, past), blocks)
  out = jnp.moveaxis(out, 0, 1).reshape(B, T * N, -1)
  out = jnp.take_along_axis(out, (slot[:, None] + jnp.arange(S))[..., None], axis=1)
  rest = jnp.pad(grid, ((0, 0), (0, N)))  # of the block after the last full one
  begin = end // N * N
  rest = jnp.take_along_axis(rest, begin[:, None] + jnp.arange(N), axis=1)
  # A row that reads nothing may stand within a block where others are aligned.
  rest = jnp.where((count > 0)[:, None], rest, state.tokens)
  return out, state.replace(
      position=position + count, memory=memory, segments=past, tokens=rest,
      fam_updates=jnp.where(position == 0, 0, state.fam_updates) + full.sum(1, dtype=jnp.int32),
      penalty=penalty.sum(0) / jnp.maximum(full.sum(1), 1),
  )  # fmt: skip


def _layers(decoder):
  """All layers' weights, as a scan takes them, and what makes modules of one layer's part."""
  graph, weights = nnx.split(decoder.layers)
  own_graph, own = nnx.split(getattr(decoder, "memory_layers", None))

  def merge(parts):
    weights, own = parts
    layer = nnx.merge(graph, axes.gather(weights))
    return layer, nnx.merge(own_graph, axes.gather(own))

  return (weights, own), merge


def _choose(rows: jax.Array, axis: int):
  """A function of two arrays: the first in these rows, which lie on `axis`, else the second.

  The first one may lack the axis.
  """

  def choose(new, old):
    new = jnp.expand_dims(new, axis) if new.ndim < old.ndim else new
    mask = rows.reshape((1,) * axis + (-1,) + (1,) * (old.ndim - axis - 1))
    return jnp.where(mask, new.astype(old.dtype), old)

  return choose


def _seen(past: Segments, block: Block, config: ModelConfig) -> tuple[KeySet, ...]:
  """A layer's memory segments `[B, K, M, N, d]` as keys; none before a row's start is seen."""
  B, K, M, N, d = past.keys.shape
  if not M:
    return ()
  keys, values = past.keys, past.values
  if config.memory.stop_gradient:
    keys, values = jax.lax.stop_gradient((keys, values))
  exists = jnp.arange(M) >= M - block.index[:, None]  # [B, M]
  mask = jnp.repeat(exists, N, axis=1)[:, None, None, None, None]  # [B, t, K, G, n, M * N]
  flat = lambda x: x.reshape(B, 1, K, M * N, d)
  return (KeySet(flat(keys), flat(values), mask),)


def _pushed(past: Segments, out, block: Block, full: jax.Array) -> Segments:
  """The memory segments after a block: the oldest gives way to it, if it is full."""
  if not past.keys.shape[2]:
    return past

  def push(old, new):
    new = block.tokens_of(new, axis=2)[:, :, None]
    moved = jnp.concatenate([old[:, :, 1:], new.astype(old.dtype)], axis=2)
    return jnp.where(full[:, None, None, None, None], moved, old)

  return Segments(push(past.keys, out.keys), push(past.values, out.values))
