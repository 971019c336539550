"""Where the tokens of a call stand on the blocks of their rows, and the ring that outlives it.

Rows need not stand at the same place: row `b` has read `position[b]` tokens, so that its next one
is slot `position % N` of block `position // N`. A call lays its tokens out on a grid of `T` blocks
`[B, T, N]`, the first of which is the block that the row is in. Three layouts:

  aligned: every row stands at a block boundary (training, prefill): token `i` is grid slot `i`.
  ragged:  rows stand anywhere: token `i` of row `b` is grid slot `position[b] % N + i`.
  within:  rows stand anywhere and stay in their block (decoding): the grid is the call's tokens and
           nothing else, `[B, 1, n]` with n = S; other keys are in the ring or beside it (within.py).
"""

import functools

from flax import struct
import jax
import jax.numpy as jnp

from famjax.errors import UserError
from famjax.kernels import block_attention, block_attention_gpu, tiles_gpu
from famjax.model import attention, axes
from famjax.model.attention import KeySet
from famjax.model.config import MemoryConfig, ModelConfig
from famjax.model.state import State


@struct.dataclass
class Layout:
  """The grid of a call.

  Attributes:
    block: int32 `[B]`, index in its row of the first grid block.
    slot: int32 `[B]`, place of the row's next token in that block.
    count: int32 `[B]`, real tokens of this call.
    recent: int32 `[B]`, tokens before these that are not yet in the ring.
    head: vectors of a FAM that stand before them, see `Recent`.
    valid: bool `[B, T, n]`, grid slots that hold a token of this call; None: all.
    full: bool `[B, T]`, blocks whose last token is in this call; None: all.
    num_blocks: T.
    num_slots: n.
    within: no row's tokens reach into another block.
    aligned: every `slot` is 0.
  """

  block: jax.Array
  slot: jax.Array
  count: jax.Array
  recent: jax.Array
  valid: jax.Array | None
  full: jax.Array | None
  num_blocks: int = struct.field(pytree_node=False)
  num_slots: int = struct.field(pytree_node=False)
  head: int = struct.field(pytree_node=False)
  within: bool = struct.field(pytree_node=False)
  aligned: bool = struct.field(pytree_node=False)

  @property
  def blocks(self) -> jax.Array:
    """int32 `[B, T]`: index in its row of every grid block."""
    return self.block[:, None] + jnp.arange(self.num_blocks)

  @property
  def slots(self) -> jax.Array | None:
    """int32 `[B, 1, n]`: place in its block of every grid slot; None: 0 to N - 1."""
    return self.slot[:, None, None] + jnp.arange(self.num_slots) if self.within else None

  def place(self, tokens: jax.Array, N: int) -> jax.Array:
    """`[B, S]` tokens to the grid, `[B, T, n]`; slots without a token hold 0."""
    B, S = tokens.shape
    if self.aligned:
      tokens = jnp.pad(tokens, ((0, 0), (0, self.num_blocks * N - S)))
    elif not self.within:
      index = jnp.arange(self.num_blocks * N) - self.slot[:, None]
      tokens = jnp.take_along_axis(tokens, index.clip(0, S - 1), axis=1)
    tokens = tokens.reshape(B, self.num_blocks, self.num_slots)
    return tokens if self.valid is None else jnp.where(self.valid, tokens, 0)

  def pick(self, grid: jax.Array, S: int) -> jax.Array:
    """`[B, T, n, ...]` on the grid back to the call's tokens, `[B, S, ...]`."""
    flat = grid.reshape(grid.shape[0], -1, *grid.shape[3:])
    if self.within or self.aligned:
      return flat[:, :S]
    index = self.slot[:, None] + jnp.arange(S)
    return jax.vmap(lambda row, at: row[at])(flat, index)


def make_layout(
    state: State, S: int, lengths: jax.Array | None, *, aligned: bool, within: bool, N: int
) -> Layout:
  """Lays `S` tokens of each row out on blocks of `N`; see `Layout`."""
  position = state.position
  within = (within or S == 1) and not aligned
  T = 1 if within else -(-S // N) if aligned else -(-(S + N - 1) // N)
  slot = jnp.zeros_like(position) if aligned else position % N
  count = jnp.full_like(position, S) if lengths is None else lengths
  valid = full = None
  if not aligned or lengths is not None or S % N:
    end = (slot + count)[:, None]
    full = (jnp.arange(1, T + 1) * N <= end) & (count > 0)[:, None]
    place = slot[:, None] + jnp.arange(S) if within else jnp.arange(T * N)
    valid = ((place >= slot[:, None]) & (place < end)).reshape(len(position), T, -1)
  return Layout(
      block=position // N, slot=slot, count=count, valid=valid, full=full,
      recent=jnp.zeros_like(position) if state.recent is None else state.recent.count,
      head=0 if state.recent is None else state.recent.head,
      num_blocks=T, num_slots=S if within else N, within=within, aligned=aligned,
  )  # fmt: skip


@struct.dataclass
class Past:
  """A layer's ring, in the order in which a call reads it.

  Attributes:
    keys: `[B, P, K, N, d]`, oldest first: the block that the grid's first block takes the place of
      in the ring, then the M segments; P = M+1. P = 0: no past.
    values: as `keys`.
  """

  keys: jax.Array
  values: jax.Array

  @property
  def num_blocks(self) -> int:
    return self.keys.shape[1]


def read_ring(keys: jax.Array, values: jax.Array, layout: Layout) -> Past:
  """Brings a layer's ring `[B, K, M+1, N, d]` into reading order."""
  R = keys.shape[2]
  order = (layout.block[:, None] + jnp.arange(R)) % R  # blocks block-M-1 .. block-1
  take = lambda ring: _take_blocks(jnp.moveaxis(ring, 2, 1), order)
  return Past(take(keys), take(values))


def no_past(batch_size: int, config: ModelConfig) -> Past:
  """The past of rows that all start in this call: P = 0."""
  shape = (batch_size, 0, config.kv_heads, config.memory.block_size, config.head_width)
  empty = jnp.zeros(shape, config.compute_dtype)
  return Past(empty, empty)


def own_block(
    past: Past, keys: jax.Array, values: jax.Array, layout: Layout, segments: int
) -> Past:
  """Every grid block's keys and values, whether they came in this call or an earlier one.

  Args:
    past: from `read_ring` or `no_past`.
    keys: `[B, T, K, N, d]`, of this call's tokens.
    values: as `keys`.
    layout: of the call.
    segments: M.

  Returns:
    `[B, T, K, N, d]` each. Slots that no token has filled hold what the ring held there before, so
    that a state does not depend on how its tokens were cut into calls.
  """
  if layout.valid is None:
    return Past(keys, values)

  def fill(old, new):
    missing = segments + 1 - old.shape[1]  # of a ring, M + 1 blocks, that has no past
    old = jnp.pad(old, [(0, 0), (missing, 0)] + [(0, 0)] * 3)
    begun = jnp.where(layout.valid[:, :1, None, :, None], new[:, :1], old[:, :1])
    new = jnp.concatenate([begun, new[:, 1:]], axis=1)
    before = jnp.concatenate([old, new], axis=1)[:, : layout.num_blocks]
    return jnp.where(layout.valid[:, :, None, :, None], new, before)

  return Past(fill(past.keys, keys), fill(past.values, values))


def write_ring(past: Past, own: Past, layout: Layout, R: int) -> Past:
  """A layer's ring `[B, K, M+1, N, d]` after a call on a grid."""
  N = own.keys.shape[3]
  last = layout.block + jnp.maximum(layout.slot + layout.count - 1, 0) // N  # last block touched
  behind = (last[:, None] - jnp.arange(R)) % R  # ring place j holds block last - behind
  index = (last - layout.block)[:, None] - behind + past.num_blocks

  def gather(old, new):
    ring = _take_blocks(jnp.concatenate([old, new], axis=1), index.clip(0))
    ring = jnp.where((index >= 0)[..., None, None, None], ring, 0)
    return jnp.moveaxis(ring, 1, 2)

  return Past(gather(past.keys, own.keys), gather(past.values, own.values))


def attend(
    queries: jax.Array, past: Past, own: Past, fam: KeySet | None, layout: Layout, config: ModelConfig
) -> jax.Array:
  """Attention of a call's blocks to their segments, their FAM and themselves (Algorithm 1 and 2).

  Args:
    queries: `[B, T, H, N, d]`, scaled and rotated.
    past: from `read_ring` or `no_past`.
    own: from `own_block`.
    fam: `[B, T, K, F, d]`, what each block sees of it; None: there is none.
    layout: of the call.
    config: says which kernel does it.

  Returns:
    `[B, T, H, N, d]`.

  Raises:
    UserError: the kernel is for blocks of another size, or a FAM of more than one vector.
  """
  kernel = _kernel_of(config)
  if kernel is not None:
    return _by_kernel(kernel, queries, past, own, fam, layout, config)
  key_sets = token_key_sets(past, own, layout, config.memory)
  if fam is not None:
    key_sets.insert(-1, fam)
  return attention.attend(queries, key_sets, config.attention_cap)


def _kernel_of(config: ModelConfig):
  """What does it here, `attend` of one of `famjax.kernels`; None: plain JAX."""
  how, N = config.attention_kernel, config.memory.block_size
  if how in ("none", "interpret", "interpret_gpu"):
    kernels = {"interpret": block_attention, "interpret_gpu": block_attention_gpu}
    return functools.partial(kernels[how].attend, interpret=True) if how in kernels else None
  platform = axes.platform()
  if platform == "gpu" and how == "auto":  # what it is slower for, or too large for, stays plain
    suits = config.compute_dtype == "bfloat16" and tiles_gpu.suits(N, config.head_width)
    return block_attention_gpu.attend if suits else None
  if platform not in ("gpu", "tpu") or how == "auto":
    return None
  divisor = 128 if platform == "tpu" else tiles_gpu.SMALLEST
  if N % divisor:
    raise UserError(
        f"attention_kernel 'pallas' on a {platform.upper()} needs a block_size that {divisor} divides,"
        f" not {N}: choose another, or 'none'"
    )
  if platform == "tpu" and config.memory.length == 1:
    raise UserError(  # its compiler fails at products of one bfloat16 vector
        "attention_kernel 'pallas' on a TPU needs a fam_length of at least 2: choose one, or 'none'"
    )
  return (block_attention if platform == "tpu" else block_attention_gpu).attend


def _by_kernel(attend_by, queries, past, own, fam, layout, config):
  memory = config.memory
  B, T, H, N, d = queries.shape
  K = config.kv_heads
  heads = ("batch", None, "kv_heads", None, None)
  # Heads that share keys stay on one device, but for multi-query attention's, which are all there are.
  split = ("batch", None, "kv_heads", "heads" if K == 1 else None, None, None)
  arrays = [
      (queries.reshape(B, T, K, H // K, N, d), split),
      (jnp.concatenate([past.keys, own.keys], axis=1), heads),
      (jnp.concatenate([past.values, own.values], axis=1), heads),
      (jnp.minimum(layout.block, past.num_blocks), ("batch",)),
      *((x, heads) for x in (() if fam is None else (fam.keys, fam.values))),
  ]

  def kernel(queries, keys, values, before, fam_keys=None, fam_values=None):
    return attend_by(
        queries, keys, values, fam_keys, fam_values, before,
        segments=memory.memory_segments, window=memory.window, cap=config.attention_cap,
        stop_gradient=memory.stop_gradient,
    )  # fmt: skip

  out = axes.on_parts(kernel, *zip(*arrays))
  return out.reshape(queries.shape)


def token_key_sets(past: Past, own: Past, layout: Layout, memory: MemoryConfig) -> list[KeySet]:
  """The token keys that a block's queries see: segments, and their own block up to themselves.

  Algorithm 1: `[K_{t-M..t-1}, K_t[0..i]]`. On a grid there is one set for each distance in blocks,
  a slice of the same keys, so that no key is copied for the M blocks that see it.
  """
  cut = jax.lax.stop_gradient if memory.stop_gradient else lambda x: x
  N = memory.block_size
  T, P = layout.num_blocks, past.num_blocks
  keys = jnp.concatenate([past.keys, own.keys], axis=1)  # [B, P + T, K, N, d]
  values = jnp.concatenate([past.values, own.values], axis=1)
  sets = []
  for distance in range(memory.memory_segments, -1, -1):
    start = max(P - distance, 0)
    t = P + T - distance - start  # blocks of the call that have a block at this distance
    if t <= 0 or (memory.window is not None and distance * N - (N - 1) >= memory.window):
      continue
    mask = _distance_mask(distance, t, layout, memory, has_past=P > 0)
    seen = lambda x: x[:, start : start + t]
    if distance == 0:
      sets.append(KeySet(own.keys, own.values, mask))
    else:
      sets.append(KeySet(cut(seen(keys)), cut(seen(values)), mask))
  return sets


def _distance_mask(distance, t, layout, memory, *, has_past):
  """Which keys `distance` blocks back are visible: bool, broadcastable to `[B, t, 1, 1, n, m]`."""
  N = memory.block_size
  place = jnp.arange(N)
  apart = distance * N + place[:, None] - place  # [n, m] tokens from key to query
  masks = []
  if distance == 0:
    masks.append(apart >= 0)
  if memory.window is not None and distance * N + N - 1 >= memory.window:
    masks.append(apart < memory.window)
  if distance and has_past:  # a row's first blocks have nothing before them
    exists = layout.block[:, None] + jnp.arange(t) >= distance  # [B, t]
    masks.append(exists[:, :, None, None, None, None])
  if not masks:
    return None
  mask = masks[0]
  for other in masks[1:]:
    mask = mask & other
  return mask


def _take_blocks(x: jax.Array, index: jax.Array) -> jax.Array:
  """`x[b, index[b, j]]` for `x` `[B, P, ...]` and `index` `[B, J]`."""
  return jax.vmap(lambda row, at: row[at])(x, index)
