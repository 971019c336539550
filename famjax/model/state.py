"""What a model remembers between calls: one explicit pytree of constant size."""

from collections.abc import Callable
from typing import Any, NamedTuple

from flax import struct
import jax
import jax.numpy as jnp

from famjax.model import axes
from famjax.model.config import BUILT_IN, ModelConfig


@struct.dataclass
class Recent:
  """The last tokens of a decoding loop, beside the ring, which it leaves as it is. `settle` puts them into it.

  Attributes:
    keys: `[L, B, K, head + s, d]`, rotated: the FAM's, if they stand here, then the tokens'.
    values: as `keys`.
    count: int32 `[B]`, how many of the s places are in use.
    due: bool `[B]`, the row's last token filled its block: `Decoder.write_fam` comes before the next, and
      before `settle`.
    head: F or 0. Before the tokens a FAM needs no kernel of its own, which a GPU pays for; it is copied with them
      in each token, which others pay for.
  """

  keys: jax.Array
  values: jax.Array
  count: jax.Array
  due: jax.Array
  head: int = struct.field(pytree_node=False)


@struct.dataclass
class Segments:
  """The memory segments of a model that goes from block to block (recurrent.py).

  Attributes:
    keys: `[L, B, K, M, N, d]`, rotated, of the last M full blocks, the oldest first.
    values: as `keys`.
  """

  keys: jax.Array
  values: jax.Array


@struct.dataclass
class State:
  """The memory of B rows, passed into a call and out of it.

  Attributes:
    position: int32 `[B]`, tokens that each row has read since its start.
    offset: int32 `[B]`, the row's random position offset (B.2.2); 0 at inference.
    keys: `[L, B, K, M+1, N, d]`, rotated keys of the last M full blocks and of the block that is
      being filled; block `c` of a row stands at `c % (M+1)`. None: no row has a past.
    values: as `keys`.
    fam: `[L, B, F, D]`, each layer's FAM after the row's last full block (`Recent.due`: not yet).
    fam_keys: `[L, B, K, F, d]`, its keys, rotated for the next block's queries; kept so that a
      decoding step does not make them again.
    fam_values: `[L, B, K, F, d]`.
    fam_updates: int32 `[B]`, times that the FAM was written; 0: it is the initial FAM.
    recent: the last tokens, where they are not in the ring; None between calls.

  With a memory of another kind (strategy.py) the ring is None, `fam_updates` counts full blocks, and
  there are

    memory: the strategy's, after the last full block: "layers" `[L, B, ...]`, "model" `[B, ...]`.
    segments: keys and values of that block and those before it.
    tokens: int32 `[B, N]`, of the block that is being filled.
    penalty: float32 `[B]`, what the last call adds to the loss: a mean over its full blocks.

  An unstacked state has a tuple of L arrays where one with a leading L stands above.
  """

  position: jax.Array
  offset: jax.Array
  keys: jax.Array | None
  values: jax.Array | None
  fam: jax.Array
  fam_keys: jax.Array
  fam_values: jax.Array
  fam_updates: jax.Array
  recent: Recent | None = None
  memory: Any = None
  segments: Segments | None = None
  tokens: jax.Array | None = None
  penalty: jax.Array | None = None


# Names of the axes of a state's fields (`axes`); those that are not here are whole.
AXES = {
    "position": ("batch",),
    "offset": ("batch",),
    "keys": ("layers", "batch", "kv_heads", None, None, "head"),
    "values": ("layers", "batch", "kv_heads", None, None, "head"),
    "fam": ("layers", "batch", "fam", "width"),
    "fam_keys": ("layers", "batch", "kv_heads", "fam", "head"),
    "fam_values": ("layers", "batch", "kv_heads", "fam", "head"),
    "fam_updates": ("batch",),
    "tokens": ("batch", None),
    "penalty": ("batch",),
}


def axes_of(state: State) -> State:
  """`AXES` as a state."""
  named = {f: AXES.get(f) for f, x in vars(state).items() if x is not None}
  if state.memory is not None:
    ring = AXES["keys"]
    rows = lambda *names: lambda x: (*names, *(None,) * (x.ndim - len(names)))
    named |= {
        "memory": {
            "layers": jax.tree.map(rows("layers", "batch"), state.memory["layers"]),
            "model": jax.tree.map(rows("batch"), state.memory["model"]),
        },
        "segments": Segments(ring, ring),
    }
  return state.replace(**named)


class LayerMemory(NamedTuple):
  """One layer's part of a `State`; shapes without the leading L.

  Functions of within.py give None back for what they leave as it is, and `within.apply_layer` in
  `recent_keys` and `recent_values` its call's tokens alone, `[B, K, n, d]`.
  """

  keys: jax.Array | None = None
  values: jax.Array | None = None
  fam: jax.Array | None = None
  fam_keys: jax.Array | None = None
  fam_values: jax.Array | None = None
  recent_keys: jax.Array | None = None
  recent_values: jax.Array | None = None


def layer_memories(state: State) -> LayerMemory:
  """All layers' parts, with the leading L."""
  recent = state.recent
  return LayerMemory(
      state.keys, state.values, state.fam, state.fam_keys, state.fam_values,
      *((None, None) if recent is None else (recent.keys, recent.values)),
  )  # fmt: skip


def empty_state(config: ModelConfig, batch_size: int, *, past: bool = True) -> State:
  """A state of zeros: its rows have read nothing.

  Its FAM is not the initial one, which depends on weights: mark the rows `start_of_sequence` in
  the first call, or use `Decoder.init_state`.

  Args:
    config: gives L, M, N, F, K, d, D and the dtype.
    batch_size: B.
    past: False leaves `keys` and `values` None.
  """
  L, B, N = config.num_layers, batch_size, config.memory.block_size
  M = config.memory.memory_segments
  F, K, d = config.memory.length, config.kv_heads, config.head_width
  dtype = jnp.dtype(config.compute_dtype)
  zeros = lambda: jnp.zeros(B, jnp.int32)
  ring = lambda: jnp.zeros((L, B, K, M + 1, N, d), dtype) if past else None
  heads = lambda: jnp.zeros((L, B, K, F, d), dtype)
  other = {}
  if config.memory.kind not in BUILT_IN:
    from famjax.model import recurrent  # pylint: disable=import-outside-toplevel

    segments = lambda: jnp.zeros((L, B, K, M, N, d), dtype)
    other = {
        "memory": recurrent.empty_memory(config, B), "segments": Segments(segments(), segments()),
        "tokens": jnp.zeros((B, N), jnp.int32), "penalty": jnp.zeros(B),
    }  # fmt: skip
    past = False
  return State(
      position=zeros(), offset=zeros(), keys=ring(), values=ring(),
      fam=jnp.zeros((L, B, F, config.model_dim), dtype),
      fam_keys=heads(), fam_values=heads(), fam_updates=zeros(), **other,
  )  # fmt: skip


def restart(state: State, rows: jax.Array, *, fam: jax.Array, fam_updates: jax.Array) -> State:
  """Starts rows anew from a kept FAM: random state passing (B.2.3).

  Args:
    state: any state.
    rows: bool `[B]`, which rows.
    fam: `[L, F, D]`, the FAM that they start from.
    fam_updates: int32 scalar, times that it was written; at least 1, so that the first update has
      the ordinary residual.

  Returns:
    The state with those rows at position 0. Their `fam_keys` are left as they are: only a call
    with `start_of_sequence` given, which makes the FAM's keys anew, may follow.
  """
  return state.replace(
      position=jnp.where(rows, 0, state.position),
      fam=jnp.where(rows[:, None, None], fam[:, None].astype(state.fam.dtype), state.fam),
      fam_updates=jnp.where(rows, fam_updates, state.fam_updates),
  )


def with_recent(state: State, size: int) -> State:
  """The state with room for at most `size` tokens beside the ring, for a decoding loop.

  The loop asks `Decoder.write_fam` for the FAM of rows whose block a token has filled, before the
  next token. It is not for gradients where `stop_gradient` is set, which is done to the ring alone. A
  state without a ring stays as it is.
  """
  if state.keys is None:
    return state
  head = jax.tree.leaves(state.fam_keys)[0].shape[-2] if axes.platform() == "gpu" else 0
  more = lambda fam: jnp.pad(fam[..., :head, :], [(0, 0)] * (fam.ndim - 2) + [(0, size), (0, 0)])
  keys, values = jax.tree.map(more, (state.fam_keys, state.fam_values))
  count, due = jnp.zeros_like(state.position), jnp.zeros_like(state.position, bool)
  return state.replace(recent=Recent(keys, values, count, due, head))


def settle(state: State) -> State:
  """Puts the recent tokens into the ring, in place where its buffer can be used again.

  No row's FAM may be due any more: it would stay as it is.
  """
  if state.recent is None:
    return state
  count = state.recent.count
  begin, head = state.position - count, state.recent.head

  def put(ring, new):
    """`ring` `[B, K, M+1, N, d]` with the tokens of `new` `[B, K, head + s, d]`."""
    R, N = ring.shape[2:4]
    new = new[:, :, head:]
    place = jnp.arange(new.shape[2])
    position = begin[:, None] + place  # [B, s]
    kept = (place < count[:, None]) & (position >= (state.position - R * N)[:, None])
    slot = jnp.where(kept, position % N, N)  # the others go past the end, that is nowhere
    row = jnp.arange(ring.shape[0])[:, None]
    new = jnp.swapaxes(new, 1, 2)
    return ring.at[row, :, position // N % R, slot].set(new, mode="drop")

  return state.replace(
      keys=each_layer(put, state.keys, state.recent.keys),
      values=each_layer(put, state.values, state.recent.values),
      recent=None,
  )


def take(state: State, rows: jax.Array) -> State:
  """The rows `rows` int32 `[b]` of a state between calls; one may be there several times."""
  pick = lambda x, names: jnp.take(x, rows, axis=names.index("batch"))
  return jax.tree.map(pick, state, axes_of(state))


_STACKED = ("keys", "values", "fam", "fam_keys", "fam_values")


def unstack(state: State) -> State:
  """The state with a tuple of L arrays for each array `[L, ...]`, as `Decoder.unstacked` takes it."""
  return _each_stacked(lambda x: None if x is None else tuple(x), state)


def is_unstacked(state: State) -> bool:
  """Whether it has a tuple of arrays, one of each layer."""
  return isinstance(state.fam, tuple)


def stack(state: State) -> State:
  """Undoes `unstack`."""
  return _each_stacked(jnp.stack, state)


def each_layer(function: Callable, first: Any, *others: Any) -> Any:
  """What `function` makes of each layer's arrays: of arrays `[L, ...]`, or of tuples of L; others may be None."""
  if isinstance(first, tuple):
    return tuple(map(function, first, *(x or (None,) * len(first) for x in others)))
  return jax.vmap(function)(first, *others)


def _each_stacked(function, state):
  new = {name: function(getattr(state, name)) for name in _STACKED}
  recent = state.recent
  if recent is not None:
    recent = recent.replace(keys=function(recent.keys), values=function(recent.values))
  return state.replace(**new, recent=recent)


def num_bytes(tree: Any) -> int:
  """Bytes of a state, the same after any number of tokens (SPEC 3.5); or of other arrays or shapes."""
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
