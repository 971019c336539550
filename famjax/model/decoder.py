"""The decoder: tokens of any length and a state in, logits and a state out.

Layer by layer (SPEC section 4): the feedback loop is closed within a layer, and the initial FAM
sees no token, so that a layer reads the whole call before the next one starts. Stacked layers run under
one `jax.lax.scan`; inside a layer, grid.py goes over blocks with the FAM as its carry; of a call within
a block, `write_fam` turns it after all layers. Training, prefill and decoding are this one definition,
with other shapes.
"""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from famjax.model import axes, blocks, grid, memory, recurrent, rope, strategy, within
from famjax.model.config import ModelConfig
from famjax.model.layers import Layer, Norm, Projection
from famjax.model.products import float32_product
from famjax.model.state import LayerMemory, State, empty_state
from famjax.model.state import is_unstacked, layer_memories, settle, unstack


def remat(function, policy: str):
  """Wraps a layer so that its backward pass keeps what `policy` says and makes the rest again.

  Args:
    function: any function of arrays.
    policy: "none" keeps everything; "dots" keeps matrix products; "dots_no_batch" keeps products
      with weights, not attention's; "full" keeps the layer's input. All of them keep
      what `memory.kept` marks as well: FAMs that go with their tokens.
  """
  if policy == "none":
    return function
  policies = jax.checkpoint_policies
  kept = {
      "dots": policies.dots_saveable,
      "dots_no_batch": policies.dots_with_no_batch_dims_saveable,
      "full": policies.nothing_saveable,
  }
  fam = policies.save_only_these_names(memory.KEPT)
  return jax.checkpoint(function, policy=policies.save_from_both_policies(kept[policy], fam))


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
    layers: a `Layer` whose parameters carry a leading axis L; `unstacked`: L of them.
    final_norm: before the logits.
    head: `kernel` `[D, V]`, where embeddings are not tied.
    fam_prompt: `[F, D]`, the only weight that a FAM adds; or
    fam_prefix: `[L, F, D]`, its prefix form.
    memory, memory_layers: what a memory of another kind adds to the model and to its layers.
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
    how = strategy.of(config.memory)
    if how is not None:
      own, of_layers = recurrent.make_weights(how, config, rngs)
      for name, module in (("memory", own), ("memory_layers", of_layers)):
        if module is not None:
          setattr(self, name, module)
    if F and config.memory.fam_init == "prompt":
      drawn = jax.random.randint(rngs.params(), (F,), 0, V)  # starts from random tokens' embeddings
      prompt = self.embedder.embedding[...][drawn].astype(jnp.float32)
      self.fam_prompt = nnx.Param(prompt, axes=("fam", "embed"))
    elif F:
      drawn = jax.random.randint(rngs.params(), (L, F), 0, V)
      prefix = self.embedder.embedding[...][drawn].astype(jnp.float32)
      self.fam_prefix = nnx.Param(prefix, axes=("layers", "fam", "embed"))

  def __call__(
      self,
      tokens: jax.Array,
      state: State | None = None,
      *,
      start_of_sequence: jax.Array | None = None,
      lengths: jax.Array | None = None,
      aligned: bool = False,
      within_block: bool = False,
      detached: bool = False,
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
      detached: promises that no gradient comes back through the state after the tokens, but for a
        `penalty`, as between steps of training. It saves the last block's FAM its backward pass, and
        where the state is not read either, the whole of it; other memories make no use of it.

    Returns:
      float32 logits `[B, S, V]` and the state after the tokens.
    """
    hidden, state = self.hidden(
        tokens, state, start_of_sequence=start_of_sequence, lengths=lengths,
        aligned=aligned, within_block=within_block, detached=detached,
    )  # fmt: skip
    return self.logits(hidden), state

  def embed(self, tokens: jax.Array) -> jax.Array:
    """Tokens `[...]` to `[..., D]`, the first layer's input."""
    dtype = jnp.dtype(self.config.compute_dtype)
    return self.scaled(self.embedder.embedding[...].astype(dtype)[tokens])

  def scaled(self, vectors: jax.Array) -> jax.Array:
    """Vectors `[..., D]` of the size of embeddings as the first layer takes them."""
    dtype = jnp.dtype(self.config.compute_dtype)
    return vectors.astype(dtype) * jnp.asarray(self.config.embedding_scale, dtype)

  def logits(self, hidden: jax.Array) -> jax.Array:
    """`[..., D]` from `hidden` to float32 logits `[..., V]`."""
    x, cap = self.final_norm(hidden), self.config.logit_cap
    if self.config.tie_embeddings:
      kernel, equation = self.embedder.embedding[...], "...D,VD->...V"
    else:
      kernel, equation = self.head.kernel[...], "...D,DV->...V"
    logits = float32_product(equation, x, kernel)
    return logits if cap is None else cap * jnp.tanh(logits / cap)

  def gathered(self) -> "Decoder":
    """The same decoder; what stands outside its layers is gathered, if it is split (`axes`).

    A loss that goes through the vocabulary chunk by chunk wants it before the first.
    """
    of_layers = lambda path, _: path[0] in ("layers", "memory_layers")
    graphdef, layers, outside = nnx.split(self, of_layers, ...)
    return nnx.merge(graphdef, layers, axes.gather(outside))

  def hidden(
      self,
      tokens: jax.Array,
      state: State | None = None,
      *,
      start_of_sequence: jax.Array | None = None,
      lengths: jax.Array | None = None,
      aligned: bool = False,
      within_block: bool = False,
      detached: bool = False,
      noise: jax.Array | None = None,
  ) -> tuple[jax.Array, State]:
    """As `__call__`, up to the last layer's output `[B, S, D]`.

    Args:
      noise: `[B, T, F, D]`, added to the FAM of every layer after each of the T blocks of the call
        (`memory.disturbed`), for training. None: nothing is added.
    """
    config, (B, S) = self.config, tokens.shape
    if state is None:
      config.memory.check_context(S)
      state = empty_state(config, B, past=False)
      start_of_sequence, aligned = jnp.ones(B, bool), True
    if strategy.of(config.memory) is not None:
      return recurrent.hidden(self, tokens, state, start_of_sequence, lengths, aligned, remat)
    if self.is_unstacked and not is_unstacked(state):
      state = unstack(state)
    starting = start_of_sequence is not None
    if starting:
      zero = lambda x: jnp.where(start_of_sequence, 0, x)
      state = state.replace(
          position=zero(state.position), fam_updates=zero(state.fam_updates)
      )
    N = config.memory.block_size
    layout = blocks.make_layout(state, S, lengths, aligned=aligned, within=within_block, N=N)
    if state.recent is not None and (starting or not layout.within):
      raise ValueError(
          "a state with recent tokens reads on within a block alone: write_fam and settle it first"
      )
    kinds = [config.of_kind(kind) for kind in config.kinds()]
    turns_of_kinds = [
        turns_of(layout, state.offset, kind)._replace(noise=noise) for kind in kinds
    ]
    first = state.fam_updates == 0

    def body(kind, carry, layer, prefix, mine):
      x, initial = carry
      turns = turns_of_kinds[kind]
      if starting and config.memory.length:
        here = initial if prefix is None else prefix.astype(x.dtype)
        mine = mine._replace(fam=jnp.where(start_of_sequence[:, None, None], here, mine.fam))
        if layout.within:  # on a grid, the feedback loop makes them
          read = fam_turn(layout.block - 1, state.offset, kinds[kind])
          fam_keys, fam_values = layer.keys_values(mine.fam, read)
          mine = mine._replace(fam_keys=fam_keys, fam_values=fam_values)
        initial = None if initial is None else memory.climb(layer, initial, turns.prompt)
      if layout.within:
        x, after = within.apply_layer(layer, x, mine, layout, turns.token, kinds[kind])
        if starting:
          after = after._replace(fam=mine.fam, fam_keys=mine.fam_keys, fam_values=mine.fam_values)
      else:
        x, after = grid.apply_layer(layer, x, mine, layout, turns, first, kinds[kind], detached)
      return (axes.constrain(x, "batch", None, None, "width"), initial), after

    x = self.embed(layout.place(tokens, N))
    x = axes.constrain(x, "batch", None, None, "width")
    prompt = None
    if starting and self._has("fam_prompt"):
      prompt = self.scaled(self.fam_prompt[...])
    prefix = self.fam_prefix[...] if starting and self._has("fam_prefix") else None
    (x, _), after = self._over_layers(body, (x, prompt), prefix, layer_memories(state))
    new = state.replace(position=state.position + layout.count)
    if starting or not layout.within:
      new = new.replace(fam=after.fam, fam_keys=after.fam_keys, fam_values=after.fam_values)
    x, full = layout.pick(x, S), layout.full
    if layout.within:
      new = within.append(new, after, layout)
      return x, settle(self.write_fam(new)) if state.recent is None else new
    updates = layout.num_blocks if full is None else full.sum(axis=1, dtype=jnp.int32)
    updates = state.fam_updates + (updates if config.memory.length else 0)
    return x, new.replace(keys=after.keys, values=after.values, fam_updates=updates)

  def write_fam(self, state: State) -> State:
    """Turns the feedback loop once in rows whose block the last call within it has filled.

    Args:
      state: with recent tokens (`state.with_recent`). Without them nothing is due.

    Returns:
      The state with their FAM, its keys and its values, in all layers. The loop may go on.
    """
    config = self.config
    if state.recent is None or not config.memory.length:
      return state
    if self.is_unstacked and not is_unstacked(state):
      state = unstack(state)
    block = state.position // config.memory.block_size - 1  # [B], the full one
    kinds = [config.of_kind(kind) for kind in config.kinds()]
    write = [fam_turn(block, state.offset, kind) for kind in kinds]
    read = [fam_turn(block - 1, state.offset, kind) for kind in kinds]

    def layer_fam(kind, carry, layer, prefix, mine):
      del prefix
      return carry, within.write_fam(layer, mine, state, write[kind], read[kind])

    before, recent, due = layer_memories(state), state.recent, state.recent.due
    same = before._replace(keys=None, values=None)
    if not recent.head:
      same = same._replace(recent_keys=None, recent_values=None)
    after = jax.lax.cond(
        jnp.any(due), lambda: self._over_layers(layer_fam, (), None, before)[1], lambda: same
    )
    if recent.head:
      recent = recent.replace(keys=after.recent_keys, values=after.recent_values)
    return state.replace(
        fam=after.fam, fam_keys=after.fam_keys, fam_values=after.fam_values,
        fam_updates=state.fam_updates + due, recent=recent.replace(due=jnp.zeros_like(due)),
    )  # fmt: skip

  def _over_layers(self, body, carry, prefix, remembered):
    """`jax.lax.scan` over stacked layers, or a loop over unstacked ones: `body` of its kind each."""
    config, kinds = self.config, self.config.kinds()
    kind_of = [kinds.index(kind) for kind in config.layer_kinds or kinds * config.num_layers]
    if not self.is_unstacked:
      graphdef, weights = nnx.split(self.layers)

      def of_kind(k):
        def run(carry, weights, *given):
          return body(k, carry, nnx.merge(graphdef, axes.gather(weights)), *given)

        return run

      bodies = [of_kind(k) for k in range(len(kinds))]

      def step(carry, inputs):
        kind, *given = inputs
        if len(kinds) == 1:
          return bodies[0](carry, *given)
        return jax.lax.switch(kind, bodies, carry, *given)

      inputs = jnp.array(kind_of), weights, prefix, remembered
      return jax.lax.scan(remat(step, config.remat), carry, inputs, unroll=config.layers_unroll)
    after = []
    for l, layer in enumerate(self.layers):
      mine = LayerMemory(*(None if field is None else field[l] for field in remembered))
      carry, new = body(kind_of[l], carry, layer, None if prefix is None else prefix[l], mine)
      after.append(new)
    return carry, LayerMemory(*(None if field[0] is None else field for field in zip(*after)))

  @property
  def is_unstacked(self) -> bool:
    return not isinstance(self.layers, Layer)

  def unstacked(self) -> "Decoder":
    """The same decoder with its layers apart, for decoding on a CPU or a GPU.

    XLA copies there what a scan hands to a layer before it uses it, and a decoding step does little
    more than to go through the weights once: with 30M parameters 26 ms instead of 8 on a CPU. There the
    arrays are views of this decoder's, but for parts that are not aligned in memory, which are copied;
    on a GPU all are copies. It takes states of either form and returns those of `state.unstack`.
    """
    graphdef, weights = nnx.split(self.layers)
    decoder = nnx.merge(*nnx.split(self))

    def view(x, l):
      on_cpu = all(device.platform == "cpu" for device in x.devices())
      return jax.device_put(np.asarray(x)[l], may_alias=True) if on_cpu else x[l]

    decoder.layers = nnx.List([
        nnx.merge(graphdef, jax.tree.map(lambda x: view(x, l), weights))  # pylint: disable=cell-var-from-loop
        for l in range(self.config.num_layers)
    ])
    return decoder

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

  def _has(self, name: str) -> bool:
    return hasattr(self, name)


def turns_of(layout: blocks.Layout, offset: jax.Array, config: ModelConfig) -> memory.Turns:
  """The rotations of a call, for layers of one kind; `offset` int32 `[B]` is the rows'."""
  N = config.memory.block_size
  block = layout.blocks  # [B, T]
  next_block = layout.block + (layout.slot + layout.count) // N  # [B], after the call
  return memory.Turns(
      token=rope.rotation(
          block * N + offset[:, None], np.arange(N), rope.frequencies(config), layout.slots
      ),
      write=fam_turn(block, offset[:, None], config),
      read=fam_turn(block - 1, offset[:, None], config),
      after=fam_turn(next_block - 1, offset, config),
      prompt=fam_turn(jnp.int32(-1), jnp.int32(0), config),
  )


def fam_turn(block: jax.Array, offset: jax.Array, config: ModelConfig) -> memory.Turn:
  """The rotation of the FAM that blocks `block` write, for layers of one kind; see `rope`."""
  return rope.rotation(*rope.fam_positions(block, offset, config.memory), rope.frequencies(config))
