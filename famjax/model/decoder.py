"""The decoder: tokens of any length and a state in, logits and a state out.

Layer by layer (SPEC section 4): the feedback loop is closed within a layer, and the initial FAM
sees no token, so that a layer reads the whole call before the next one starts. Stacked layers run under
one `jax.lax.scan`; inside a layer, `memory.feedback` scans over blocks with the FAM as its carry.
Training, prefill and decoding are this one definition, with other shapes.
"""

from typing import NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp

from famjax.model import blocks, memory, rope
from famjax.model.attention import KeySet, attend
from famjax.model.config import ModelConfig
from famjax.model.layers import Layer, Norm, Projection
from famjax.model.state import State, empty_state


class Turns(NamedTuple):
  """Cosines and sines of a call, the same in all layers.

  Attributes:
    token: `[B, T, n, d/2]`, at the tokens' positions.
    write: `[B, T, F, d/2]`, of the FAM that a block writes.
    read: `[B, T, F, d/2]`, of the FAM that a block sees: the one that the block before it wrote.
    after: `[B, F, d/2]`, of the FAM that the row's next call sees.
    prompt: `[F, d/2]`, of the initial FAM.
  """

  token: memory.Turn
  write: memory.Turn
  read: memory.Turn
  after: memory.Turn
  prompt: memory.Turn


class LayerMemory(NamedTuple):
  """One layer's part of a `State`; shapes without the leading L."""

  keys: jax.Array | None
  values: jax.Array | None
  fam: jax.Array
  fam_keys: jax.Array
  fam_values: jax.Array


def apply_layer(
    layer: Layer,
    x: jax.Array,
    past: blocks.Past,
    fam: jax.Array,
    cached: tuple[jax.Array, jax.Array] | None,
    layout: blocks.Layout,
    turns: Turns,
    first: jax.Array,
    config: ModelConfig,
) -> tuple[jax.Array, LayerMemory]:
  """One layer over all blocks of a call: Algorithm 1, and with a FAM Algorithm 2.

  Args:
    layer: its weights.
    x: `[B, T, n, D]`, the layer's input.
    past: keys and values of earlier calls.
    fam: `[B, F, D]`, before the first block.
    cached: keys and values `[B, F, K, d]` of `fam` where they are at hand (within a block).
    layout: where the tokens stand.
    turns: rotations.
    first: bool `[B]`, the FAM has not been written yet.
    config: of the model.

  Returns:
    `x'` `[B, T, n, D]`, and the layer's memory after the call.
  """
  queries, keys, values = layer.project(x, turns.token, turns.token)
  own = blocks.own_block(past, keys, values, layout, config.memory.memory_segments)
  key_sets = blocks.token_key_sets(past, own, layout, config.memory)
  if not config.memory.length:  # BSWA
    fam_keys = fam_values = keys[:, 0, :0]
  elif layout.within:
    loop, (fam_keys, fam_values) = feedback_within(layer, fam, own, cached, layout, turns, first)
  else:
    loop = memory.feedback(
        layer, fam, own.keys, own.values, turns.write, turns.read, first, layout.full
    )
    fam_keys, fam_values = layer.keys_values(loop.fam, turns.after)
  if config.memory.length:
    key_sets.insert(-1, KeySet(loop.keys, loop.values))
    fam = loop.fam
  x = layer.close(attend(queries, key_sets), x)
  ring = blocks.write_ring(past, own, layout, config.memory.memory_segments + 1)
  return x, LayerMemory(ring.keys, ring.values, fam, fam_keys, fam_values)


def feedback_within(
    layer: Layer,
    fam: jax.Array,
    ring: blocks.Past,
    cached: tuple[jax.Array, jax.Array] | None,
    layout: blocks.Layout,
    turns: Turns,
    first: jax.Array,
) -> tuple[memory.Feedback, tuple[jax.Array, jax.Array]]:
  """The feedback loop within a block: it turns once, for rows whose block is now full.

  Args are those of `apply_layer`; `ring` holds the new tokens' keys.

  Returns:
    As `memory.feedback`, and the keys and values `[B, F, K, d]` of the FAM after the call.
  """
  if cached is None:
    cached = layer.keys_values(fam, _at_block(turns.read, 0))
  full = layout.full[:, 0]

  def turn():
    R = ring.keys.shape[1]
    block = jax.tree.map(lambda x: x[jnp.arange(x.shape[0]), layout.block % R], ring)
    new, _, _ = memory.update(
        layer, fam, block.keys, block.values,
        _at_block(turns.write, 0), _at_block(turns.read, 0), first,
    )  # fmt: skip
    new = jnp.where(full[:, None, None], new, fam)
    return new, layer.keys_values(new, turns.after)

  after, fresh = jax.lax.cond(jnp.any(full), turn, lambda: (fam, cached))
  return memory.Feedback(after, cached[0][:, None], cached[1][:, None]), fresh


def remat(function, policy: str):
  """Wraps a layer so that its backward pass keeps what `policy` says and makes the rest again.

  Args:
    function: any function of arrays.
    policy: "none" keeps everything; "dots" keeps matrix products; "dots_no_batch" keeps products
      with weights, not attention's; "full" keeps the layer's input alone.
  """
  policies = jax.checkpoint_policies
  kept = {
      "dots": policies.dots_saveable,
      "dots_no_batch": policies.dots_with_no_batch_dims_saveable,
      "full": policies.nothing_saveable,
  }
  return function if policy == "none" else jax.checkpoint(function, policy=kept[policy])


class Embedder(nnx.Module):
  """The token embedding, which is also the head where they are tied."""

  def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
    shape = (config.vocab_size, config.model_dim)
    embedding = jax.random.normal(rngs.params(), shape) * config.model_dim**-0.5
    self.embedding = nnx.Param(embedding.astype(config.param_dtype), axes=("vocab", "embed"))


class Decoder(nnx.Module):
  """A decoder-only Transformer with the memory that its configuration names.

  The module holds weights and nothing else; whatever a row remembers is in a `State`.

  Attributes:
    embedder: `embedding` `[V, D]`.
    layers: a `Layer` whose parameters carry a leading axis L.
    final_norm: before the logits.
    head: `kernel` `[D, V]`, where embeddings are not tied.
    fam_prompt: `[F, D]`, the only weight that a FAM adds; or
    fam_prefix: `[L, F, D]`, its prefix form.
  """

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
    config.validate()
    self.config = config
    L, F, D, V = config.num_layers, config.memory.length, config.model_dim, config.vocab_size
    self.embedder = Embedder(config, rngs)
    layer = lambda key: Layer(config, nnx.Rngs(key))
    graphdef, _ = nnx.split(nnx.eval_shape(lambda: layer(jax.random.key(0))))
    stacked = jax.vmap(lambda key: nnx.split(layer(key))[1])(jax.random.split(rngs.params(), L))
    self.layers = nnx.merge(graphdef, stacked)
    self.final_norm = Norm(config)
    if not config.tie_embeddings:
      self.head = Projection(
          "...D,DV->...V", (D, V), ("embed", "vocab"),
          fan_in=D, param_dtype=config.param_dtype, rngs=rngs,
      )  # fmt: skip
    if F and config.memory.fam_init == "prompt":
      drawn = jax.random.randint(rngs.params(), (F,), 0, V)  # starts from random tokens' embeddings
      self.fam_prompt = nnx.Param(self.embedder.embedding[...][drawn], axes=("fam", "embed"))
    elif F:
      drawn = jax.random.randint(rngs.params(), (L, F), 0, V)
      self.fam_prefix = nnx.Param(
          self.embedder.embedding[...][drawn], axes=("layers", "fam", "embed")
      )

  def __call__(
      self,
      tokens: jax.Array,
      state: State | None = None,
      *,
      start_of_sequence: jax.Array | None = None,
      lengths: jax.Array | None = None,
      aligned: bool = False,
      within_block: bool = False,
  ) -> tuple[jax.Array, State]:
    """Reads tokens after what `state` remembers.

    Args:
      tokens: int32 `[B, S]`, S of any length.
      state: of B rows. None: every row starts here, whatever `start_of_sequence` says.
      start_of_sequence: bool `[B]`, rows that start here: nothing before counts, and their FAM is
        the initial one, made from the weights in this call, with gradient. None: no row does.
      lengths: int32 `[B]`, how many of the S tokens are real in each row, the rest being padding
        that reaches nothing. None: all.
      aligned: promises that every row stands at a block boundary (or starts here), which saves
        training and prefill a block of padding.
      within_block: promises that no row's tokens reach into another block than the one that it is
        in, which saves the rest of that block. A single token never does.

    Returns:
      float32 logits `[B, S, V]` and the state after the tokens.
    """
    hidden, state = self.hidden(
        tokens, state, start_of_sequence=start_of_sequence, lengths=lengths,
        aligned=aligned, within_block=within_block,
    )  # fmt: skip
    return self.logits(hidden), state

  def logits(self, hidden: jax.Array) -> jax.Array:
    """`[..., D]` from `hidden` to float32 logits `[..., V]`."""
    x = self.final_norm(hidden)
    if self.config.tie_embeddings:
      kernel = self.embedder.embedding[...].astype(x.dtype)
      return jnp.einsum("...D,VD->...V", x, kernel, preferred_element_type=jnp.float32)
    kernel = self.head.kernel[...].astype(x.dtype)
    return jnp.einsum("...D,DV->...V", x, kernel, preferred_element_type=jnp.float32)

  def hidden(
      self,
      tokens: jax.Array,
      state: State | None = None,
      *,
      start_of_sequence: jax.Array | None = None,
      lengths: jax.Array | None = None,
      aligned: bool = False,
      within_block: bool = False,
  ) -> tuple[jax.Array, State]:
    """As `__call__`, up to the last layer's output `[B, S, D]`."""
    config, (B, S) = self.config, tokens.shape
    if state is None:
      state = empty_state(config, B, past=False)
      start_of_sequence, aligned = jnp.ones(B, bool), True
    starting = start_of_sequence is not None
    if starting:
      zero = lambda x: jnp.where(start_of_sequence, 0, x)
      state = state.replace(
          position=zero(state.position), fam_updates=zero(state.fam_updates)
      )
    N = config.memory.block_size
    layout = blocks.make_layout(
        state.position, S, lengths, aligned=aligned, within=within_block and not aligned, N=N
    )
    turns = self._turns(layout, state.offset)
    first = state.fam_updates == 0

    def body(carry, layer_inputs):
      x, initial = carry
      weights, prefix, mine = layer_inputs
      layer = nnx.merge(graphdef, weights)
      past = (
          blocks.no_past(B, config) if mine.keys is None
          else blocks.read_ring(mine.keys, mine.values, layout)
      )  # fmt: skip
      fam, cached = mine.fam, (mine.fam_keys, mine.fam_values)
      if starting and config.memory.length:
        here = initial if prefix is None else prefix.astype(x.dtype)
        fam, cached = jnp.where(start_of_sequence[:, None, None], here, fam), None
        initial = None if initial is None else memory.climb(layer, initial, turns.prompt)
      x, after = apply_layer(layer, x, past, fam, cached, layout, turns, first, config)
      return (x, initial), after

    graphdef, weights = nnx.split(self.layers)
    dtype = jnp.dtype(config.compute_dtype)
    x = self.embedder.embedding[...].astype(dtype)[layout.place(tokens, N)]
    prompt = self.fam_prompt[...].astype(dtype) if starting and self._has("fam_prompt") else None
    prefix = self.fam_prefix[...] if starting and self._has("fam_prefix") else None
    remembered = LayerMemory(
        state.keys, state.values, state.fam, state.fam_keys, state.fam_values
    )
    (x, _), after = jax.lax.scan(
        remat(body, config.remat), (x, prompt), (weights, prefix, remembered)
    )
    full = layout.full
    updates = layout.num_blocks if full is None else full.sum(axis=1, dtype=jnp.int32)
    return layout.pick(x, S), State(
        position=state.position + layout.count,
        offset=state.offset,
        fam_updates=state.fam_updates + (updates if config.memory.length else 0),
        **after._asdict(),
    )

  def init_state(self, batch_size: int) -> State:
    """The state of rows that have read nothing, their initial FAM made from the weights."""
    state = empty_state(self.config, batch_size)
    _, started = self.hidden(
        jnp.zeros((batch_size, 1), jnp.int32),
        state,
        start_of_sequence=jnp.ones(batch_size, bool),
        lengths=jnp.zeros(batch_size, jnp.int32),
    )
    return started

  def _turns(self, layout: blocks.Layout, offset: jax.Array) -> Turns:
    config = self.config
    N, d = config.memory.block_size, config.head_width
    turn = lambda positions, fraction=0.0: rope.rotation(positions, d, config.rope_theta, fraction)
    fam_turn = lambda block, offset: turn(*rope.fam_positions(block, offset, config.memory))
    block = layout.block[:, None] + jnp.arange(layout.num_blocks)  # [B, T]
    next_block = layout.block + (layout.slot + layout.count) // N  # [B], after the call
    return Turns(
        token=turn(layout.positions(N) + offset[:, None, None]),
        write=fam_turn(block, offset[:, None]),
        read=fam_turn(block - 1, offset[:, None]),
        after=fam_turn(next_block - 1, offset),
        prompt=fam_turn(jnp.int32(-1), jnp.int32(0)),
    )

  def _has(self, name: str) -> bool:
    return hasattr(self, name)


def _at_block(turn: memory.Turn, t: int) -> memory.Turn:
  return jax.tree.map(lambda x: x[:, t], turn)
