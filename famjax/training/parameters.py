"""What there is to say of a model's parameters: a count, names, a table, a fingerprint."""

import hashlib
import math

import jax
import jax.numpy as jnp
import numpy as np

from famjax.errors import UserError
from famjax.training.train_state import Params


def count(params: Params) -> int:
  """Number of parameters in a tree of arrays or of shapes."""
  return sum(math.prod(x.shape) for x in jax.tree.leaves(params))


def names(params: Params) -> dict[str, jax.Array]:
  """Parameters by dotted name: `layers.attention.query.kernel`."""
  leaves = jax.tree_util.tree_flatten_with_path(params)[0]
  return {".".join(str(key.key) for key in path): leaf for path, leaf in leaves}


def fingerprint(params: Params) -> str:
  """16 hex digits that stand for the values of all parameters, wherever their parts are."""
  digest = hashlib.blake2b(digest_size=8)
  for path, value in jax.tree_util.tree_leaves_with_path(params):
    digest.update(f"{jax.tree_util.keystr(path)} {value.shape} {value.dtype}".encode())
    digest.update(np.asarray(_sums(value)).tobytes())
  return digest.hexdigest()


def check_finite(params: Params, where: str) -> None:
  """Raises UserError if a parameter has values that are NaN or infinite.

  Args:
    params: tree of arrays, wherever their parts are.
    where: name of the checkpoint, for the error message.
  """
  counts = {name: _nonfinite(x) for name, x in names(params).items()}
  for name, bad in jax.device_get(counts).items():
    if bad:
      raise UserError(
          f"{where}: {bad:,} values of {name} are NaN or infinite: take another checkpoint, or"
          " famjax.load(..., allow_nonfinite=True)"
      )


@jax.jit
def _nonfinite(x: jax.Array) -> jax.Array:
  return jnp.count_nonzero(~jnp.isfinite(x))


@jax.jit
def _sums(x: jax.Array) -> jax.Array:
  """uint32 `[2]`: sums of an array's bits by place. Integers, so that no order of summing matters."""
  bits = jax.lax.bitcast_convert_type(x, {2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize])
  place, stride = jnp.zeros((), jnp.uint32), 1
  for axis in reversed(range(x.ndim)):
    iota = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    place, stride = place + iota * np.uint32(stride % 2**32), stride * x.shape[axis]

  def weighed(odd):
    x = bits.astype(jnp.uint32) ^ (place * np.uint32(odd))  # scrambled as MurmurHash3 ends
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return (x ^ (x >> 16)).sum(dtype=jnp.uint32)

  return jnp.stack([weighed(2654435761), weighed(2246822519)])


def table(params: Params) -> str:
  """One aligned line per parameter - name, shape, dtype, count - and their total."""
  rows = [
      (name, str(list(x.shape)), str(x.dtype), f"{math.prod(x.shape):,}")
      for name, x in names(params).items()
  ]
  rows = [("parameter", "shape", "dtype", "count"), *rows, ("total", "", "", f"{count(params):,}")]
  wide = [max(len(row[i]) for row in rows) for i in range(4)]
  lines = [
      f"{name:<{wide[0]}}  {shape:<{wide[1]}}  {dtype:<{wide[2]}}  {number:>{wide[3]}}"
      for name, shape, dtype, number in rows
  ]
  rule = "-" * len(lines[0])
  return "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1]])
