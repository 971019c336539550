"""Attention of blocks to their memory segments, their FAM and themselves, as TPU kernels.

What `famjax.model.attention.attend` says with key sets, without scores in memory: a tile of queries
meets a tile of keys at a time, and a running maximum and sum stand for the softmax (Rabe and Staats
2021; Dao et al. 2022). Which tiles meet follows from their places alone, so that no mask is an array.

    queries of block t   see   blocks t-M .. t-1, FAM of t, block t up to themselves

Tiles of keys go by `segments * N / tile`, oldest first, the own block last; a block's FAM, a few
vectors, is seen with the first. The backward pass makes the weights again from the sums (`lse`), with
keys down and queries across, so that what there is one of per query lies along the lanes: one kernel
for the queries and the FAM, one for the tokens' keys and values.
"""

import functools

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from famjax.kernels import tiles

_MASKED = -1e30  # finite: a row whose first tile hides everything is cleared by the next
_ROWS = ((1,), (1,)), ((), ())  # a product over the last axis of both
_COLUMNS = ((0,), (0,)), ((), ())  # over the first axis of both


@functools.partial(
    jax.jit, static_argnames=("segments", "window", "cap", "stop_gradient", "interpret")
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
) -> jax.Array:
  """Attention of T blocks; differentiable in all arrays but `before`.

  Args:
    queries: `[B, T, K, G, N, d]`, scaled and rotated.
    keys: `[B, P + T, K, N, d]`, rotated: P blocks of the past, then the T of the queries.
    values: as `keys`.
    fam_keys: `[B, T, K, F, d]`, of the FAM that each block sees; None: there is none.
    fam_values: as `fam_keys`.
    before: int32 `[B]`, how many of the P blocks, the last ones, the row has really read.
    segments: M, blocks before its own that a query sees.
    window: a query sees token keys less than so many tokens back alone; None: whole blocks.
    cap: scores are bent to stay within it; None: they are not.
    stop_gradient: keys and values of earlier blocks get no gradient of this.
    interpret: runs on any machine, slowly: for tests.

  Returns:
    `[B, T, K, G, N, d]`, in the dtype of the values; scores, softmax and sums are float32.
  """
  B, T, K, G, N, d = queries.shape
  if window is not None:
    segments = min(segments, (window + N - 2) // N)
  segments = min(segments, keys.shape[1] - 1)  # more there are not
  shape = tiles.Shape(
      T, keys.shape[1] - T, G, N, 0 if fam_keys is None else fam_keys.shape[3], segments,
      tiles.tile_of(N), window, cap, stop_gradient, interpret,
  )  # fmt: skip
  fam = (fam_keys, fam_values) if shape.F else ()
  out = _attend(shape, before, queries.reshape(B, T, K, G * N, d), keys, values, fam)
  return out.reshape(queries.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(shape, before, queries, keys, values, fam):
  return _forward(shape, before, queries, keys, values, fam)[0]


def _attend_forward(shape, before, queries, keys, values, fam):
  out, lse = _forward(shape, before, queries, keys, values, fam)
  return out, (before, queries, keys, values, fam, out, lse)


def _attend_backward(shape, kept, given):
  before, queries, keys, values, fam, out, lse = kept
  delta = jnp.sum(out.astype(jnp.float32) * given.astype(jnp.float32), axis=-1)[..., None, :]
  of_queries, *of_fam = _backward_queries(
      shape, before, queries, keys, values, fam, given, lse, delta
  )
  of_keys, of_values = _backward_keys(shape, before, queries, keys, values, given, lse, delta)
  return None, of_queries, of_keys, of_values, tuple(of_fam)


_attend.defvjp(_attend_forward, _attend_backward)


def _spec(rows: int, columns: int, index_map) -> pl.BlockSpec:
  """Tiles `[rows, columns]` of an array of five axes."""
  return pl.BlockSpec((None, None, None, rows, columns), index_map)


def _scores(a, b, cap):
  """float32 products of all rows of `a` with all of `b`, bent, and what bent them."""
  score = jax.lax.dot_general(a, b, _ROWS, preferred_element_type=jnp.float32)
  if cap is None:
    return score, None
  bent = jnp.tanh(score / cap)
  return cap * bent, bent


def _forward(shape, before, queries, keys, values, fam):
  """Results `[B, T, K, G * N, d]`, and the logarithm of each query's sum, `[B, T, K, 1, G * N]`."""
  B, T, K, n, d = queries.shape
  query, lane, key, of_fam = tiles.query_maps(shape)
  rows, token = _spec(shape.tile, d, query), _spec(shape.tile, d, key)
  statistics = pltpu.VMEM((shape.tile, 1), jnp.float32)
  return _call(
      functools.partial(_forward_kernel, shape),
      (B, T, K, shape.query_tiles, (shape.segments + 1) * shape.tiles),
      (before, queries, keys, values, *fam),
      [rows, token, token, *[_spec(shape.F, d, of_fam)] * len(fam)],
      [
          (rows, jax.ShapeDtypeStruct(queries.shape, values.dtype)),
          (_spec(1, shape.tile, lane), jax.ShapeDtypeStruct((B, T, K, 1, n), jnp.float32)),
      ],
      [statistics, statistics, pltpu.VMEM((shape.tile, d), jnp.float32)],
      shape, products=2, sequential=1, pairs=tiles.pairs(shape, B, K, shape.segments + 1, shape.F),
  )  # fmt: skip


def _forward_kernel(shape, before, *refs):
  queries, keys, values, *fam, out, lse, top, total, acc = refs
  b, t, i, j = pl.program_id(0), pl.program_id(1), pl.program_id(3), pl.program_id(4)

  def add(keys, values, seen=None):
    score, _ = _scores(queries[...], keys[...], shape.cap)  # [query, key]
    if seen is not None:
      score = jnp.where(seen, score, _MASKED)
    new = jnp.maximum(top[...], score.max(axis=-1, keepdims=True))
    weight = jnp.exp(score - new)
    shrink = jnp.exp(top[...] - new)
    total[...] = total[...] * shrink + weight.sum(axis=-1, keepdims=True)
    acc[...] = acc[...] * shrink + jnp.dot(
        weight.astype(values.dtype), values[...], preferred_element_type=jnp.float32
    )
    top[...] = new

  @pl.when(j == 0)
  def _():
    top[...] = jnp.full_like(top, _MASKED)
    total[...] = jnp.zeros_like(total)
    acc[...] = jnp.zeros_like(acc)
    if fam:
      add(*fam)

  distance, query, own, visible = tiles.past_of_query(shape, t, i, j, before[b])
  hides = tiles.hides(shape, distance, query, own)
  pl.when(visible & ~hides)(lambda: add(keys, values))

  @pl.when(visible & hides)
  def _():
    add(keys, values, tiles.seen(shape, distance, query, own, keys_down=False))

  @pl.when(j == pl.num_programs(4) - 1)
  def _():
    out[...] = (acc[...] / total[...]).astype(out.dtype)
    column = top[...] + jnp.log(total[...])
    lse[...] = jnp.transpose(jnp.broadcast_to(column, (shape.tile, 8)))[:1]


def _weights(shape, queries, keys, values, given, lse, delta, seen=None):
  """Of tiles, float32 `[key, query]`: the weights, and the gradient of the scores."""
  score, bent = _scores(keys, queries, shape.cap)
  if seen is not None:
    score = jnp.where(seen, score, _MASKED)
  weight = jnp.exp(score - lse)
  of_weight = jax.lax.dot_general(values, given, _ROWS, preferred_element_type=jnp.float32)
  of_score = weight * (of_weight - delta)
  return weight, of_score if bent is None else of_score * (1 - bent * bent)


def _backward_queries(shape, before, queries, keys, values, fam, given, lse, delta):
  """Gradients of queries, and of the FAM's keys and values if there are any."""
  B, T, K, _, d = queries.shape
  query, lane, key, of_fam = tiles.query_maps(shape)
  rows, token = _spec(shape.tile, d, query), _spec(shape.tile, d, key)
  row, vectors = _spec(1, shape.tile, lane), _spec(shape.F, d, of_fam)
  return _call(
      functools.partial(_backward_queries_kernel, shape, len(fam)),
      (B, T, K, shape.query_tiles, (shape.segments + 1) * shape.tiles),
      (before, queries, keys, values, *fam, given, lse, delta),
      [rows, token, token, *[vectors] * len(fam), rows, row, row],
      [
          (rows, jax.ShapeDtypeStruct(queries.shape, queries.dtype)),
          *[(vectors, jax.ShapeDtypeStruct(x.shape, x.dtype)) for x in fam],
      ],
      [
          pltpu.VMEM((shape.tile, d), jnp.float32),
          *[pltpu.VMEM((shape.F, d), jnp.float32) for _ in fam],
      ],
      shape, products=3, sequential=2, pairs=tiles.pairs(shape, B, K, shape.segments + 1, shape.F),
  )  # fmt: skip


def _backward_queries_kernel(shape, num_fam, before, *refs):
  queries, keys, values, *rest = refs
  fam, rest = rest[:num_fam], rest[num_fam:]
  given, lse, delta, of_queries, *rest = rest
  of_fam, (acc, *fam_acc) = rest[:num_fam], rest[num_fam:]
  b, t, i, j = pl.program_id(0), pl.program_id(1), pl.program_id(3), pl.program_id(4)

  def add(keys, values, seen=None):
    weight, of_score = _weights(
        shape, queries[...], keys[...], values[...], given[...], lse[...], delta[...], seen
    )
    of_score = of_score.astype(keys.dtype)
    acc[...] += jax.lax.dot_general(
        of_score, keys[...], _COLUMNS, preferred_element_type=jnp.float32
    )
    return weight, of_score

  if fam:

    @pl.when((i == 0) & (j == 0))
    def _():
      for one in fam_acc:
        one[...] = jnp.zeros_like(one)

  @pl.when(j == 0)
  def _():
    acc[...] = jnp.zeros_like(acc)
    if fam:
      weight, of_score = add(*fam)
      fam_acc[0][...] += jnp.dot(of_score, queries[...], preferred_element_type=jnp.float32)
      fam_acc[1][...] += jnp.dot(
          weight.astype(given.dtype), given[...], preferred_element_type=jnp.float32
      )

  distance, query, own, visible = tiles.past_of_query(shape, t, i, j, before[b])
  hides = tiles.hides(shape, distance, query, own)

  @pl.when(visible & ~hides)
  def _():
    add(keys, values)

  @pl.when(visible & hides)
  def _():
    add(keys, values, tiles.seen(shape, distance, query, own, keys_down=True))

  last = j == pl.num_programs(4) - 1

  @pl.when(last)
  def _():
    of_queries[...] = acc[...].astype(of_queries.dtype)

  if fam:

    @pl.when(last & (i == pl.num_programs(3) - 1))
    def _():
      for ref, one in zip(of_fam, fam_acc):
        ref[...] = one[...].astype(ref.dtype)


def _backward_keys(shape, before, queries, keys, values, given, lse, delta):
  """Gradients of the tokens' keys and values."""
  B, C, K, _, d = keys.shape
  query, lane, key = tiles.key_maps(shape)
  rows, row = _spec(shape.tile, d, query), _spec(1, shape.tile, lane)
  token = _spec(shape.tile, d, key)
  distances = 1 if shape.stop_gradient else shape.segments + 1
  return _call(
      functools.partial(_backward_keys_kernel, shape),
      (B, C, K, shape.tiles, distances * shape.query_tiles),
      (before, queries, keys, values, given, lse, delta),
      [rows, token, token, rows, row, row],
      [(token, jax.ShapeDtypeStruct(x.shape, x.dtype)) for x in (keys, values)],
      [pltpu.VMEM((shape.tile, d), jnp.float32)] * 2,
      shape, products=4, sequential=1, pairs=tiles.pairs(shape, B, K, distances, 0),
  )  # fmt: skip


def _backward_keys_kernel(shape, before, *refs):
  queries, keys, values, given, lse, delta, of_keys, of_values, key_acc, value_acc = refs
  b, c, own, u = pl.program_id(0), pl.program_id(1), pl.program_id(3), pl.program_id(4)
  distance, i = tiles.parts(u, shape.query_tiles)
  query = tiles.parts(i, shape.tiles)[1]
  t = c - shape.P + distance

  def add(seen=None):
    weight, of_score = _weights(
        shape, queries[...], keys[...], values[...], given[...], lse[...], delta[...], seen
    )
    key_acc[...] += jnp.dot(
        of_score.astype(queries.dtype), queries[...], preferred_element_type=jnp.float32
    )
    value_acc[...] += jnp.dot(
        weight.astype(given.dtype), given[...], preferred_element_type=jnp.float32
    )

  @pl.when(u == 0)
  def _():
    key_acc[...] = jnp.zeros_like(key_acc)
    value_acc[...] = jnp.zeros_like(value_acc)

  exists = (t >= 0) & (t < shape.T) & (c - shape.P >= -before[b])
  visible = exists & tiles.meets(shape, distance, query, own)
  hides = tiles.hides(shape, distance, query, own)
  pl.when(visible & ~hides)(add)

  @pl.when(visible & hides)
  def _():
    add(tiles.seen(shape, distance, query, own, keys_down=True))

  @pl.when(u == pl.num_programs(4) - 1)
  def _():
    of_keys[...] = key_acc[...].astype(of_keys.dtype)
    of_values[...] = value_acc[...].astype(of_values.dtype)


def _call(
    kernel, grid, arguments, in_specs, outputs, scratch, shape, *, products, sequential, pairs
):
  """One kernel; `products` of matrices for each of `pairs`, the last `sequential` axes in turn."""
  queries = arguments[1]
  arrays = [*arguments, *(out for _, out in outputs)]
  fetched = 2 * pairs // shape.tile * queries.shape[-1] * queries.dtype.itemsize  # tiles that meet
  cost = pl.CostEstimate(
      flops=2 * products * pairs * queries.shape[-1],
      transcendentals=pairs,
      bytes_accessed=fetched + sum(x.size * x.dtype.itemsize for x in arrays),
  )
  return pl.pallas_call(
      kernel,
      grid_spec=pltpu.PrefetchScalarGridSpec(
          num_scalar_prefetch=1, grid=grid, in_specs=in_specs, out_specs=[s for s, _ in outputs],
          scratch_shapes=scratch,
      ),
      out_shape=[out for _, out in outputs],
      compiler_params=pltpu.CompilerParams(
          dimension_semantics=("parallel",) * (5 - sequential) + ("arbitrary",) * sequential
      ),
      cost_estimate=cost,
      interpret=shape.interpret,
  )(*arguments)  # fmt: skip
