"""Which tiles of keys a tile of queries meets, which stand where, and what of them is seen.

The attention kernels (block_attention.py) go over tiles in a grid; all that is known when they are
made is a `Shape`. What a function takes and gives may be traced, and says nothing of values.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

TILE = 512  # tokens; of queries and of keys


class Shape(NamedTuple):
  """What the kernels know when they are made; see `block_attention.attend` for the letters."""

  T: int
  P: int
  G: int
  N: int
  F: int
  segments: int  # that are seen at all
  tile: int
  window: int | None
  cap: float | None
  stop_gradient: bool
  interpret: bool

  @property
  def tiles(self) -> int:
    """Of a block."""
    return self.N // self.tile

  @property
  def query_tiles(self) -> int:
    """Of a block's queries, those of the G heads that share keys one after another."""
    return self.G * self.tiles


def tile_of(N: int) -> int:
  """The largest tile of at most `TILE` tokens that divides a block and suits a TPU's lanes."""
  return next((tile for tile in (TILE, 384, 256, 128) if N % tile == 0), N)


def past_of_query(shape: Shape, t, i, j, before):
  """What tile `j` of the keys is to tile `i` of the queries of block `t`.

  Returns:
    its distance in blocks, the numbers of both in their blocks, and whether any keys are seen.
  """
  blocks, own = parts(j, shape.tiles)
  distance, query = shape.segments - blocks, parts(i, shape.tiles)[1]
  return distance, query, own, (t - distance >= -before) & meets(shape, distance, query, own)


def parts(x, size):
  """How often `size` fits into `x` >= 0, and what is left; `//` and `%` ask for signs as well."""
  size = jnp.int32(size)
  return jax.lax.div(x, size), jax.lax.rem(x, size)


def meets(shape: Shape, distance, query, key):
  """Whether some query of a tile sees some key of a tile `distance` blocks back."""
  apart = distance * shape.N + (query - key) * shape.tile  # tokens between their first ones
  meets = apart + shape.tile > 0
  if shape.window is not None:
    meets &= apart - shape.tile + 1 < shape.window
  return meets


def hides(shape: Shape, distance, query, key):
  """Whether some query of a tile does not see some key of a tile that it meets."""
  apart = distance * shape.N + (query - key) * shape.tile
  hides = apart - shape.tile + 1 < 0
  if shape.window is not None:
    hides |= apart + shape.tile > shape.window
  return hides


def seen(shape: Shape, distance, query, key, keys_down: bool):
  """bool `[tile, tile]`: which keys are seen; queries across if keys go down, else the other way."""
  apart = distance * shape.N + (query - key) * shape.tile
  return visible(apart, shape.tile, shape.tile, shape.window, keys_down)


def visible(apart, rows: int, columns: int, window: int | None, keys_down: bool) -> jax.Array:
  """bool `[rows, columns]`: which keys of a tile are seen, whose first is `apart` before the first query.

  A GPU's kernels (tiles_gpu.py) ask this too.
  """
  place = lambda axis: jax.lax.broadcasted_iota(jnp.int32, (rows, columns), axis)
  apart = apart + (place(1) - place(0) if keys_down else place(0) - place(1))
  seen = apart >= 0
  return seen if window is None else seen & (apart < window)


# Maps from the place in a grid to the number of a tile. A tile that is not seen is not fetched: its
# number is that of one that is there already, or is fetched next.


def query_maps(shape: Shape):
  """For a grid `[B, T, K, query tile, key tile]`."""

  def query(b, t, k, i, j, before):
    return b, t, k, i, 0

  def lane(b, t, k, i, j, before):
    return b, t, k, 0, i

  def key(b, t, k, i, j, before):
    distance, query, own, _ = past_of_query(shape, t, i, j, before[b])
    exists = t - distance >= -before[b]
    own = jnp.where(distance == 0, jnp.minimum(own, query), own)
    block = jnp.maximum(shape.P + t - distance, shape.P - before[b])
    return b, block, k, jnp.where(exists, own, 0), 0

  def fam(b, t, k, i, j, before):
    return b, t, k, 0, 0

  return query, lane, key, fam


def key_maps(shape: Shape):
  """For a grid `[B, block of keys, K, key tile, distance and query tile]`."""

  def query_tile(c, j, u):
    distance, i = parts(u, shape.query_tiles)
    head, own = parts(i, shape.tiles)
    t = jnp.clip(c - shape.P + distance, 0, shape.T - 1)
    own = jnp.where(distance == 0, jnp.maximum(own, j), own)
    return t, head * shape.tiles + own

  def query(b, c, k, j, u, before):
    t, i = query_tile(c, j, u)
    return b, t, k, i, 0

  def lane(b, c, k, j, u, before):
    t, i = query_tile(c, j, u)
    return b, t, k, 0, i

  def key(b, c, k, j, u, before):
    return b, c, k, j, 0

  return query, lane, key


def pairs(shape: Shape, B: int, K: int, distances: int, fam: int) -> int:
  """Queries times keys of all tiles that meet, in rows whose past is whole, and of `fam` vectors."""
  tiles = range(shape.tiles)
  meet = 0
  for distance in range(distances):
    blocks = min(shape.T, max(shape.T + shape.P - distance, 0))  # with a block so far before
    meet += blocks * sum(bool(meets(shape, distance, i, j)) for i in tiles for j in tiles)
  return B * K * shape.G * (meet * shape.tile**2 + shape.T * shape.N * fam)
