"""The attention of `block_attention` as GPU kernels: the same function, in Triton by way of Pallas.

What a TPU's grid does tile by tile, a GPU does in loops: a program holds a tile of queries and goes
over the tiles of keys that it sees, which lie side by side from its oldest segment to its own block.
All but those on the diagonal are seen whole. Backward, one kernel goes the same way for the queries,
and one holds a tile of keys and goes over the queries that see it; a block's FAM is such a tile too.
Logarithms and exponentials are of base 2, which is what the hardware has.
"""

import functools
import math

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
import jax.numpy as jnp

from famjax.kernels.tiles import parts, visible
from famjax.kernels.tiles_gpu import SMALLEST, Shape, Tilings, key_specs, loop, over_fam, over_keys
from famjax.kernels.tiles_gpu import query_specs, tilings_of

_MASKED = -1e30  # finite: a row whose first tile hides everything is cleared by the next
_LOG2E = math.log2(math.e)


@functools.partial(
    jax.jit,
    static_argnames=("segments", "window", "cap", "stop_gradient", "interpret", "tilings"),
)
def attend(
    queries: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    fam_keys: jax.Array | None,
    fam_values: jax.Array | None,
    before: jax.Array,
    *,
    segments: int,
    window: int | None = None,
    cap: float | None = None,
    stop_gradient: bool = False,
    interpret: bool = False,
    tilings: Tilings | None = None,
) -> jax.Array:
  """`block_attention.attend` on a GPU; N must be a multiple of 16 (`SMALLEST`).

  Args:
    queries: `[B, T, K, G, N, d]`, scaled and rotated.
    keys: `[B, P + T, K, N, d]`.
    values: as `keys`.
    fam_keys: `[B, T, K, F, d]`; None: there is none.
    fam_values: as `fam_keys`.
    before: int32 `[B]`.
    segments: M.
    window: tokens that a query sees, itself included; None: whole blocks.
    cap: of scores.
    stop_gradient: keys and values of earlier blocks get no gradient of this.
    interpret: runs on any machine, slowly: for tests.
    tilings: None: `tilings_of` the width.

  Returns:
    `[B, T, K, G, N, d]`, in the dtype of the values; scores, softmax and sums are float32.
  """
  T, G, N, d = queries.shape[1], *queries.shape[3:]
  if window is not None:
    segments = min(segments, (window + N - 2) // N)
  segments = min(segments, keys.shape[1] - 1)  # more there are not
  F = 0 if fam_keys is None else fam_keys.shape[3]
  width = max(SMALLEST, pl.next_power_of_2(d))
  shape = Shape(
      T, keys.shape[1] - T, G, N, F, segments, window, cap, stop_gradient, interpret,
      tilings or tilings_of(width),
  )  # fmt: skip
  wide = lambda x: _pad_to(x, -1, width)
  rows = shape.fam_tiles * shape.fam_tile
  fam = tuple(_pad_to(wide(x), -2, rows) for x in (fam_keys, fam_values)) if F else ()
  return _attend(shape, before, wide(queries), wide(keys), wide(values), fam)[..., :d]


def _pad_to(x, axis, size):
  missing = size - x.shape[axis]
  if not missing:
    return x
  pads = [(0, 0)] * x.ndim
  pads[axis] = (0, missing)
  return jnp.pad(x, pads)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(shape, before, queries, keys, values, fam):
  return _forward(shape, before, queries, keys, values, fam)[0]


def _attend_forward(shape, before, queries, keys, values, fam):
  out, lse = _forward(shape, before, queries, keys, values, fam)
  return out, (before, queries, keys, values, fam, out, lse)


def _attend_backward(shape, kept, given):
  before, queries, keys, values, fam, out, lse = kept
  delta = jnp.sum(out.astype(jnp.float32) * given.astype(jnp.float32), axis=-1)
  of_queries = _backward_queries(shape, before, queries, keys, values, fam, given, lse, delta)
  of_keys = _backward_keys(shape, before, queries, keys, values, given, lse, delta)
  of_fam = _backward_fam(shape, queries, fam, given, lse, delta) if fam else ()
  return None, of_queries, *of_keys, of_fam


_attend.defvjp(_attend_forward, _attend_backward)


def _dot(a, b, a_axis=1, b_axis=0):
  """float32 product of two matrices, over an axis of each; of float32 ones a precise one."""
  precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
  return jax.lax.dot_general(
      a, b, (((a_axis,), (b_axis,)), ((), ())), precision=precision,
      preferred_element_type=jnp.float32,
  )  # fmt: skip


def _scores(a, b, cap):
  """Products of all rows of `a` with all of `b`, bent, times log2(e); and what bent them."""
  score = _dot(a, b, 1, 1)
  if cap is None:
    return score * _LOG2E, None
  bent = jnp.tanh(score / cap)
  return score.dtype.type(cap * _LOG2E) * bent, bent


def _tile(ref, *at, size):
  """Tile `at[-1]` of `size` rows."""
  *outer, i = at
  return ref[(*outer, pl.ds(i * size, size), slice(None))]


def _forward(shape, before, queries, keys, values, fam):
  """Results `[B, T, K, G, N, d]`, and the logarithm of each query's sum, `[B, T, K, G, N]`."""
  B, T, K, G, N, d = queries.shape
  tiling = shape.cut(shape.tilings.forward)
  query, row, key, of_fam, count = query_specs(shape, tiling, K, d)
  return _call(
      functools.partial(_forward_kernel, shape, tiling),
      (N // tiling.held, T, B * K * G),
      (before, queries, keys, values, *fam),
      [count, query, key, key, *[of_fam] * len(fam)],
      [
          (query, jax.ShapeDtypeStruct(queries.shape, values.dtype)),
          (row, jax.ShapeDtypeStruct((B, T, K, G, N), jnp.float32)),
      ],
      shape, tiling, products=2, distances=shape.segments + 1, fam=shape.F,
  )  # fmt: skip


def _forward_kernel(shape, tiling, before, queries, keys, values, *refs):
  *fam, out, lse = refs
  q = queries[...]
  rows, d = q.shape

  def add(carry, k, v, seen):
    acc, top, total = carry
    score, _ = _scores(q, k, shape.cap)
    if seen is not None:
      score = jnp.where(seen, score, _MASKED)
    new = jnp.maximum(top, score.max(axis=1))
    weight = jnp.exp2(score - new[:, None])
    shrink = jnp.exp2(top - new)
    acc = acc * shrink[:, None] + _dot(weight.astype(v.dtype), v)
    return acc, new, total * shrink + weight.sum(axis=1)

  def add_tile(carry, block, j, seen):
    at = dict(size=tiling.passed)
    return add(carry, _tile(keys, block, j, **at), _tile(values, block, j, **at), seen)

  carry = (
      jnp.zeros((rows, d), jnp.float32),
      jnp.full(rows, _MASKED, jnp.float32),
      jnp.zeros(rows, jnp.float32),
  )
  if fam:
    carry = over_fam(shape, rows, functools.partial(_add_fam, shape, fam, add), carry)
  acc, top, total = over_keys(shape, tiling, before[0], add_tile, carry)
  out[...] = (acc / total[:, None]).astype(out.dtype)
  lse[...] = top + jnp.log2(total)


def _add_fam(shape, fam, add, carry, j, seen):
  return add(carry, *(_tile(x, j, size=shape.fam_tile) for x in fam), seen)


def _backward_queries(shape, before, queries, keys, values, fam, given, lse, delta):
  """Gradient of queries."""
  B, T, K, G, N, d = queries.shape
  tiling = shape.cut(shape.tilings.queries)
  query, row, key, of_fam, count = query_specs(shape, tiling, K, d)
  return _call(
      functools.partial(_backward_queries_kernel, shape, tiling),
      (N // tiling.held, T, B * K * G),
      (before, queries, keys, values, given, lse, delta, *fam),
      [count, query, key, key, query, row, row, *[of_fam] * len(fam)],
      [(query, jax.ShapeDtypeStruct(queries.shape, queries.dtype))],
      shape, tiling, products=3, distances=shape.segments + 1, fam=shape.F,
  )[0]  # fmt: skip


def _backward_queries_kernel(
    shape, tiling, before, queries, keys, values, given, lse, delta, *refs
):
  *fam, of_queries = refs
  q, do, sums, away = queries[...], given[...], lse[...][:, None], delta[...][:, None]

  def add(acc, k, v, seen):
    score, bent = _scores(q, k, shape.cap)
    weight = jnp.exp2(score - sums)
    if seen is not None:
      weight = jnp.where(seen, weight, 0.0)
    of_score = weight * (_dot(do, v, 1, 1) - away)
    if bent is not None:
      of_score = of_score * (1 - bent * bent)
    return acc + _dot(of_score.astype(k.dtype), k)

  def add_tile(acc, block, j, seen):
    at = dict(size=tiling.passed)
    return add(acc, _tile(keys, block, j, **at), _tile(values, block, j, **at), seen)

  acc = jnp.zeros(q.shape, jnp.float32)
  if fam:
    acc = over_fam(shape, q.shape[0], functools.partial(_add_fam, shape, fam, add), acc)
  acc = over_keys(shape, tiling, before[0], add_tile, acc)
  of_queries[...] = acc.astype(of_queries.dtype)


def _backward_keys(shape, before, queries, keys, values, given, lse, delta):
  """Gradients of the tokens' keys and values."""
  B, C, K, N, d = keys.shape
  tiling = shape.cut(shape.tilings.keys)
  query, row, count = key_specs(shape, K, d)
  key = pl.BlockSpec((None, None, None, tiling.held, d), lambda j, c, h: (h // K, c, h % K, j, 0))
  return _call(
      functools.partial(_backward_keys_kernel, shape, tiling),
      (N // tiling.held, C, B * K),
      (before, queries, keys, values, given, lse, delta),
      [count, query, key, key, query, row, row],
      [(key, jax.ShapeDtypeStruct(x.shape, x.dtype)) for x in (keys, values)],
      shape, tiling, products=4, distances=1 if shape.stop_gradient else shape.segments + 1, fam=0,
  )  # fmt: skip


def _backward_keys_kernel(
    shape, tiling, before, queries, keys, values, given, lse, delta, of_keys, of_values
):
  j, block = pl.program_id(0), pl.program_id(1) - shape.P  # < 0: of the past
  held, passed, tiles = tiling.held, tiling.passed, shape.N // tiling.passed
  first = jnp.maximum(block, 0)  # block of the queries
  last = block if shape.stop_gradient else jnp.minimum(block + shape.segments, shape.T - 1)
  end = jnp.where(block >= -before[0], last - first + 1, 0) * tiles
  own = jnp.where(block >= 0, j * held // passed, 0)  # the first tile that sees any of these keys
  whole = jnp.where(block >= 0, pl.cdiv((j + 1) * held, passed), 0)
  behind = (first - block) * shape.N - j * held  # tokens from the first key to the first query
  if shape.window is not None:  # tiles whose first query is too far behind the last key
    end = jnp.minimum(end, jnp.maximum(held + shape.window - 2 - behind, -1) // passed + 1)
  of_tile = _pass_queries(shape, tiling, keys[...], values[...], queries, given, lse, delta)

  def tile(g, masked, c, carry):
    t, i = parts(c, tiles)
    seen = None
    if masked:
      seen = visible(behind + c * passed, held, passed, shape.window, keys_down=True)
    return of_tile(carry, first + t, g, i, seen)

  def of_head(g, carry):
    middle = jnp.minimum(whole, end)
    carry = loop(own, middle, functools.partial(tile, g, True), carry)
    return loop(middle, end, functools.partial(tile, g, shape.window is not None), carry)

  zero = jnp.zeros(keys.shape, jnp.float32)
  for ref, one in zip((of_keys, of_values), _over_heads(shape.G, of_head, (zero, zero))):
    ref[...] = one.astype(ref.dtype)


def _over_heads(G, of_head, carry):
  return of_head(0, carry) if G == 1 else loop(0, G, of_head, carry)


def _pass_queries(shape, tiling, k, v, queries, given, lse, delta):
  """What a tile of queries adds to the gradients of a tile of keys and values."""

  def add(carry, t, g, i, seen):
    of_key, of_value = carry
    q = _tile(queries, t, g, i, size=tiling.passed)
    do = _tile(given, t, g, i, size=tiling.passed)
    rows = pl.ds(i * tiling.passed, tiling.passed)
    score, bent = _scores(k, q, shape.cap)
    weight = jnp.exp2(score - lse[t, g, rows][None])
    if seen is not None:
      weight = jnp.where(seen, weight, 0.0)
    of_value = of_value + _dot(weight.astype(do.dtype), do)
    of_score = weight * (_dot(v, do, 1, 1) - delta[t, g, rows][None])
    if bent is not None:
      of_score = of_score * (1 - bent * bent)
    return of_key + _dot(of_score.astype(q.dtype), q), of_value

  return add


def _backward_fam(shape, queries, fam, given, lse, delta):
  """Gradients of the FAM's keys and values."""
  B, T, K, F, d = fam[0].shape  # F with its padding
  tiling = shape.cut(shape.tilings.keys)
  query, row, _ = key_specs(shape, K, d)
  tile = (None, None, None, shape.fam_tile, d)
  vectors = pl.BlockSpec(tile, lambda j, t, h: (h // K, t, h % K, j, 0))
  return _call(
      functools.partial(_backward_fam_kernel, shape, tiling),
      (shape.fam_tiles, T, B * K),
      (queries, *fam, given, lse, delta),
      [query, vectors, vectors, query, row, row],
      [(vectors, jax.ShapeDtypeStruct(x.shape, x.dtype)) for x in fam],
      shape, tiling, products=4, distances=0, fam=F,
  )  # fmt: skip


def _backward_fam_kernel(
    shape, tiling, queries, keys, values, given, lse, delta, of_keys, of_values
):
  t, tiles = pl.program_id(1), shape.N // tiling.passed
  of_tile = _pass_queries(shape, tiling, keys[...], values[...], queries, given, lse, delta)

  def of_head(g, carry):
    return loop(0, tiles, lambda i, carry: of_tile(carry, t, g, i, None), carry)

  zero = jnp.zeros(keys.shape, jnp.float32)
  for ref, one in zip((of_keys, of_values), _over_heads(shape.G, of_head, (zero, zero))):
    ref[...] = one.astype(ref.dtype)


def _call(
    kernel, grid, arguments, in_specs, outputs, shape, tiling, *, products, distances, fam
):
  """One kernel, of so many products of matrices for each pair of a query and a key."""
  queries = next(x for x in arguments if x.ndim == 6)
  B, T, K, G, N, d = queries.shape
  blocks = sum(min(T, max(T + shape.P - distance, 0)) for distance in range(1, distances))
  own = (N + max(tiling.held, tiling.passed)) // 2 if distances else 0  # tiles on the diagonal whole
  pairs = B * K * G * N * (blocks * N + T * (own + fam))
  arrays = [*arguments, *(out for _, out in outputs)]
  return pl.pallas_call(
      kernel,
      grid=grid,
      in_specs=in_specs,
      out_specs=[spec for spec, _ in outputs],
      out_shape=[out for _, out in outputs],
      compiler_params=triton.CompilerParams(num_warps=tiling.warps, num_stages=tiling.stages),
      cost_estimate=pl.CostEstimate(
          flops=2 * products * pairs * d,
          transcendentals=pairs,
          bytes_accessed=sum(x.size * x.dtype.itemsize for x in arrays),
      ),
      interpret=shape.interpret,
      name=kernel.func.__name__.strip("_"),
  )(*arguments)
