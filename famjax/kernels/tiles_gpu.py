"""How the attention kernels for GPUs (block_attention_gpu.py) are cut: tiles, and what meets what."""

from collections.abc import Callable
import functools
import math
from typing import NamedTuple

import jax
from jax.experimental import pallas as pl
import jax.numpy as jnp

from famjax.kernels.tiles import parts, visible

SMALLEST = 16  # rows of a tile: less the matrix units do not take
FAM_TILE = 64  # rows of a FAM in one tile, if it has as many
# Cards whose shared memory holds what the tiles take, 128 KiB; those for desktops have 99.
_CARDS = ("8.0", "9.0", "10.0")


class Tiling(NamedTuple):
  """How a kernel is cut.

  Attributes:
    held: rows of the tile that a program holds.
    passed: rows of the tiles that it goes over.
    warps: of 32 threads that share them.
    stages: tiles on their way from memory at once.
  """

  held: int
  passed: int
  warps: int
  stages: int


class Tilings(NamedTuple):
  """Of the forward pass, of the gradient of queries, and of that of keys."""

  forward: Tiling
  queries: Tiling
  keys: Tiling


class Shape(NamedTuple):
  """What the kernels know when they are made; see `attend` for the letters."""

  T: int
  P: int
  G: int
  N: int
  F: int
  segments: int
  window: int | None
  cap: float | None
  stop_gradient: bool
  interpret: bool
  tilings: Tilings

  @property
  def fam_tile(self) -> int:
    """Rows of a tile of the FAM, which is padded to whole tiles."""
    return min(FAM_TILE, max(SMALLEST, pl.next_power_of_2(self.F)))

  @property
  def fam_tiles(self) -> int:
    return pl.cdiv(self.F, self.fam_tile)

  def cut(self, tiling: Tiling) -> Tiling:
    """The tiling for blocks of N."""
    return tiling._replace(held=_fit(tiling.held, self.N), passed=_fit(tiling.passed, self.N))


def tilings_of(width: int) -> Tilings:
  """Those that were fastest on an H200 (docs/results/gpu.md) for heads of a width `d`."""
  if width <= 128:
    return Tilings(Tiling(128, 64, 8, 3), Tiling(128, 64, 8, 3), Tiling(64, 64, 4, 2))
  return Tilings(Tiling(64, 64, 8, 2), Tiling(64, 32, 8, 2), Tiling(64, 32, 8, 2))


def _fit(size: int, N: int) -> int:
  """The largest power of two up to `size` that divides a block."""
  return math.gcd(size, N)


def suits(N: int, d: int) -> bool:
  """Whether the kernels are at home: in tiles of 64 at least, and on a card that has room for them."""
  card = getattr(jax.devices()[0], "compute_capability", None)
  return N % 64 == 0 and d <= 256 and card in _CARDS


def loop(start, end, body: Callable, carry):
  """`fori_loop` whose counter is an int32, whatever the ends are."""
  return jax.lax.fori_loop(jnp.int32(start), end, body, carry)


def over_keys(shape: Shape, tiling: Tiling, before, add: Callable, carry):
  """Calls `add(carry, block, tile, seen)` for the tiles of keys that a tile of queries sees.

  Args:
    shape: of the call.
    tiling: of the kernel.
    before: int32, blocks of the row that the past has.
    add: gives the next carry; `seen` is bool `[held, passed]`, or None: all of the tile.
    carry: the first.
  """
  i, t = pl.program_id(0), pl.program_id(1)
  held, passed = tiling.held, tiling.passed
  tiles = shape.N // passed
  first = jnp.maximum(t - shape.segments, -before)  # block
  ahead = (t - first) * shape.N + i * held  # tokens from the first key to the first query
  start = 0 if shape.window is None else jnp.maximum(ahead - shape.window + 1, 0) // passed
  whole = (t - first) * tiles + i * held // passed

  def tile(masked, c, carry):
    block, j = parts(c, tiles)
    away = ahead - c * passed
    seen = visible(away, held, passed, shape.window, keys_down=False) if masked else None
    return add(carry, shape.P + first + block, j, seen)

  carry = loop(start, whole, functools.partial(tile, shape.window is not None), carry)
  end = whole + pl.cdiv(i * held % passed + held, passed)
  return loop(jnp.maximum(whole, start), end, functools.partial(tile, True), carry)


def over_fam(shape: Shape, rows: int, add: Callable, carry):
  """Calls `add(carry, tile, seen)` for the tiles of the FAM, of which all but the padding is seen."""

  def tile(j, carry):
    seen = None
    if shape.F % shape.fam_tile:
      column = jax.lax.broadcasted_iota(jnp.int32, (rows, shape.fam_tile), 1)
      seen = j * shape.fam_tile + column < shape.F
    return add(carry, j, seen)

  return tile(0, carry) if shape.fam_tiles == 1 else loop(0, shape.fam_tiles, tile, carry)


def query_specs(shape: Shape, tiling: Tiling, K: int, d: int) -> tuple[pl.BlockSpec, ...]:
  """Of queries, of what there is one of per query, of keys, of the FAM, and of `before`."""
  G, heads = shape.G, K * shape.G
  at = lambda h: (h // heads, h % heads // G, h % G)

  def query(i, t, h):
    b, k, g = at(h)
    return b, t, k, g, i, 0

  def key(i, t, h):
    b, k, _ = at(h)
    return b, 0, k, 0, 0

  def fam(i, t, h):
    b, k, _ = at(h)
    return b, t, k, 0, 0

  return (
      pl.BlockSpec((None, None, None, None, tiling.held, d), query),
      pl.BlockSpec((None, None, None, None, tiling.held), lambda *at: query(*at)[:-1]),
      pl.BlockSpec((None, shape.P + shape.T, None, shape.N, d), key),
      pl.BlockSpec((None, None, None, shape.fam_tiles * shape.fam_tile, d), fam),
      pl.BlockSpec((1,), lambda i, t, h: (h // heads,)),
  )


def key_specs(shape: Shape, K: int, d: int) -> tuple[pl.BlockSpec, ...]:
  """Of queries and of what there is one of per query, all that a head's keys meet; of `before`."""
  all_of = (None, shape.T, None, shape.G, shape.N)
  where = lambda h: (h // K, 0, h % K, 0, 0)
  return (
      pl.BlockSpec((*all_of, d), lambda j, c, h: (*where(h), 0)),
      pl.BlockSpec(all_of, lambda j, c, h: where(h)),
      pl.BlockSpec((1,), lambda j, c, h: (h // K,)),
  )
