"""One softmax over several disjoint sets of keys.

A block's queries see three kinds of keys: the memory segments', the FAM's and their own block's.
Each kind is a `KeySet`. Scores are made set by set against the maximum of all, and results and sums
are added up: neither keys nor scores are copied next to one another here, and a mask stands only
where a set needs one.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from famjax.model import axes
from famjax.model.products import float32_product

_MASKED = -1e30  # finite, so that a row without any visible key would give numbers and not NaN


class KeySet(NamedTuple):
  """Keys and values that the last `t` blocks of a call see.

  Attributes:
    keys: `[B, t, K, m, d]`, rotated.
    values: `[B, t, K, m, d]`.
    mask: None, all are visible; or bool, broadcastable to `[B, t, 1, 1, n, m]`.
  """

  keys: jax.Array
  values: jax.Array
  mask: jax.Array | None = None


def attend(
    queries: jax.Array, key_sets: list[KeySet], cap: float | None = None
) -> jax.Array:
  """Attention of every block's queries over the union of its key sets.

  Args:
    queries: `[B, T, H, n, d]`, scaled and rotated. Query head `h` reads key/value head `h // (H // K)`.
    key_sets: sets with `t <= T` blocks; a set of fewer blocks belongs to the last ones.
    cap: scores are bent to stay within it, `cap * tanh(score / cap)`; None: they are not.

  Returns:
    `[B, T, H, n, d]`, in the dtype of the values; scores and softmax are float32.
  """
  B, T, H, n, d = queries.shape
  K = key_sets[0].keys.shape[2]
  G = H // K
  if G * n == 1 and axes.platform() in ("tpu", "gpu"):
    # Of one vector and a matrix XLA makes a sum there, for which it writes all values as float32: on a
    # TPU four times the cycles of two vectors (docs/results/kernels.md).
    both = jnp.pad(queries, [(0, 0)] * 3 + [(0, 1), (0, 0)])
    return attend(both, key_sets, cap)[:, :, :, :1]
  # The G heads that share keys stand in one axis with their n tokens, `g`: with two axes there, XLA
  # copies the keys on a CPU, five times the work of a decoding step.
  queries = queries.reshape(B, T, K, G * n, d)
  key_sets = [one for one in key_sets if one.keys.shape[3]]  # none has a maximum of nothing
  of = [queries[:, T - one.keys.shape[1] :] for one in key_sets]
  if len(of) > 1 and axes.platform() == "gpu":
    # Of the same queries XLA would make one product, and copy all keys for it.
    of[0] = jax.lax.optimization_barrier(of[0])
  scores = [_scores(queries, one, G, cap) for queries, one in zip(of, key_sets)]
  top = [_pad_blocks(score.max(axis=-1), T, _MASKED) for score in scores]
  top = jax.lax.stop_gradient(functools.reduce(jnp.maximum, top))  # [B, T, K, G, n]
  out = total = 0
  for score, (keys, values, _) in zip(scores, key_sets):
    t = keys.shape[1]
    weight = jnp.exp(score - top[:, T - t :, ..., None])
    total += _pad_blocks(weight.sum(axis=-1), T, 0)
    weight = weight.astype(values.dtype).reshape(B, t, K, G * n, -1)
    part = float32_product("BTKgm,BTKmd->BTKgd", weight, values)
    out += _pad_blocks(part, T, 0)
  out = out / total.reshape(B, T, K, G * n, 1)
  return out.astype(values.dtype).reshape(B, T, H, n, d)


def probabilities(
    queries: jax.Array, key_sets: list[KeySet], cap: float | None = None
) -> list[jax.Array]:
  """What `attend` weighs the values of each set with, written out: for looking at, not for speed.

  Args are those of `attend`.

  Returns:
    float32 `[B, T, H, n, m]` of each set; over all of them they sum to 1.
  """
  B, T, H, n, d = queries.shape
  K = key_sets[0].keys.shape[2]
  queries = queries.reshape(B, T, K, H // K * n, d)
  scores = [
      _pad_blocks(_scores(queries[:, T - one.keys.shape[1] :], one, H // K, cap), T, _MASKED)
      for one in key_sets
  ]
  weights = jax.nn.softmax(jnp.concatenate(scores, axis=-1), axis=-1).reshape(B, T, H, n, -1)
  return jnp.split(weights, np.cumsum([score.shape[-1] for score in scores])[:-1].tolist(), axis=-1)


def _scores(queries: jax.Array, one: KeySet, G: int, cap: float | None) -> jax.Array:
  """float32 `[B, t, K, G, n, m]`: scores of queries `[B, t, K, G * n, d]` against a set."""
  score = float32_product("BTKgd,BTKmd->BTKgm", queries, one.keys)
  score = score.reshape(*score.shape[:3], G, score.shape[3] // G, score.shape[4])
  if cap is not None:
    score = cap * jnp.tanh(score / cap)
  return score if one.mask is None else jnp.where(one.mask, score, _MASKED)


def _pad_blocks(x: jax.Array, T: int, value: float) -> jax.Array:
  """Puts blocks of `value` before `[B, t, ...]` up to `[B, T, ...]`."""
  missing = T - x.shape[1]
  if not missing:
    return x
  return jnp.pad(x, [(0, 0), (missing, 0)] + [(0, 0)] * (x.ndim - 2), constant_values=value)
