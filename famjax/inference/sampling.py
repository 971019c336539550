"""How the next token is picked from logits: greedily, or drawn from what truncation leaves.

Logits pass, in this order, the repetition penalty, the temperature, and three truncations: top-k,
top-p, min-p; each is off by default. Every row of a batch has its own settings, which are data and
not code: no setting compiles anything anew.
"""

import dataclasses
import numbers

from flax import struct
import jax
import jax.numpy as jnp
import numpy as np

from famjax.errors import UserError


_LEAST = 1e-30  # a lower temperature takes the likeliest token, as 0 does


@dataclasses.dataclass(frozen=True)
class Sampling:
  """Settings of one row.

  Attributes:
    temperature: 0 takes the likeliest token; else logits are divided by it and drawn from.
    top_k: only the k likeliest tokens; 0: all.
    top_p: only the likeliest tokens whose probabilities together reach p (nucleus); 1: all.
    min_p: only tokens at least min_p times as probable as the likeliest; 0: all.
    repetition_penalty: positive logits of tokens that the prompt or the text so far holds are
      divided by it, negative ones multiplied (CTRL, Keskar et al. 2019); 1: none.
    seed: of the draws; the same seed gives the same text.
  """

  temperature: float = 0.0
  top_k: int = 0
  top_p: float = 1.0
  min_p: float = 0.0
  repetition_penalty: float = 1.0
  seed: int = 0

  def validate(self) -> None:
    """Raises UserError for a value that makes no sense."""
    for name in ("top_k", "seed"):
      if not isinstance(getattr(self, name), numbers.Integral):
        raise UserError(f"{name} is {getattr(self, name)!r}: use a whole number")
    for name in ("temperature", "top_p", "min_p", "repetition_penalty"):
      if not isinstance(getattr(self, name), numbers.Real):
        raise UserError(f"{name} is {getattr(self, name)!r}: use a number")
      try:
        float(getattr(self, name))
      except OverflowError:
        raise UserError(f"{name} is larger than any float: use a smaller number") from None
    for name, fine, wanted in (
        ("temperature", 0 <= self.temperature < np.inf, "0 for the likeliest token, or more"),
        ("top_k", 0 <= self.top_k < 2**31, "0 for all tokens, or more"),
        ("top_p", 0 < self.top_p <= 1, "a number above 0, up to 1"),
        ("min_p", 0 <= self.min_p <= 1, "a number from 0 to 1"),
        ("repetition_penalty", 0 < self.repetition_penalty < np.inf, "1 for none, or more"),
        ("seed", 0 <= self.seed < 2**32, "a number from 0 to 2 ** 32 - 1"),
    ):
      if not fine:
        raise UserError(f"{name} is {getattr(self, name)}: use {wanted}")


@struct.dataclass
class Samplers:
  """Settings of B rows, as arrays `[B]`; `seed` is uint32."""

  temperature: jax.Array
  top_k: jax.Array
  top_p: jax.Array
  min_p: jax.Array
  repetition_penalty: jax.Array
  seed: jax.Array


def stack(rows: list[Sampling]) -> Samplers:
  """Returns the settings of several rows, side by side.

  A temperature below 1e-30 becomes 0. Other numbers but 0 are put between 1e-30 and 1e30: they and
  their reciprocals are then ordinary numbers of float32, so that nothing becomes NaN.
  """
  dtypes = {"top_k": np.int32, "seed": np.uint32}
  columns = {}
  for field in dataclasses.fields(Sampling):
    values = np.array([getattr(row, field.name) for row in rows])
    if field.name == "temperature":
      values = np.where(values < _LEAST, 0, values)
    if field.name not in dtypes:
      values = np.asarray(values, np.float64)
      values = np.where(values == 0, 0, np.clip(values, _LEAST, 1 / _LEAST))
    columns[field.name] = values.astype(dtypes.get(field.name, np.float32))
  return Samplers(**columns)


def pick(logits: jax.Array, seen: jax.Array, samplers: Samplers, position: jax.Array) -> jax.Array:
  """The next token of every row.

  Args:
    logits: float32 `[B, V]`.
    seen: bool `[B, V]`, tokens that the penalty is for.
    samplers: of the rows.
    position: int32 `[B]`, tokens that the row has read. A row's draw depends on its seed and on this
      alone: not on the rows beside it, nor on how its writing was cut into calls.

  Returns:
    int32 `[B]`.
  """
  penalty = samplers.repetition_penalty[:, None]
  punished = jnp.where(logits > 0, logits / penalty, logits * penalty)
  logits = jnp.where(seen, punished, logits)
  greedy = logits.argmax(-1).astype(jnp.int32)

  def draw():
    heat = jnp.where(samplers.temperature > 0, samplers.temperature, 1)[:, None]
    # The likeliest have 0, so that no quotient is infinite but for those that are never drawn.
    best = logits.max(-1, keepdims=True)
    shifted = jnp.where(logits == best, 0, logits - best) / heat
    left = truncated(shifted, samplers, best=jnp.zeros_like(best))
    key = lambda seed, place: jax.random.fold_in(jax.random.key(seed), place)
    drawn = jax.vmap(jax.random.categorical)(jax.vmap(key)(samplers.seed, position), left)
    return jnp.where(samplers.temperature > 0, drawn.astype(jnp.int32), greedy)

  return jax.lax.cond(jnp.any(samplers.temperature > 0), draw, lambda: greedy)


def truncated(
    logits: jax.Array, samplers: Samplers, best: jax.Array | None = None
) -> jax.Array:
  """Returns logits `[B, V]` with -inf for the tokens that top-k, top-p and min-p leave out.

  The likeliest token always stays; tokens as likely as the last one that stays do too.

  Args:
    logits: float32 `[B, V]`.
    samplers: of the rows.
    best: float32 `[B, 1]`, the largest logit of each row. None: it is looked for.
  """
  V = logits.shape[-1]
  best = logits.max(-1, keepdims=True) if best is None else best
  lowest = best + jnp.log(samplers.min_p)[:, None]  # min-p; -inf: all stay

  def by_rank():
    ranked = jnp.flip(jnp.sort(logits, axis=-1), axis=-1)
    k = jnp.where(samplers.top_k > 0, jnp.minimum(samplers.top_k, V), V)
    ranked = jnp.where(jnp.arange(V) < k[:, None], ranked, -jnp.inf)
    probability = jax.nn.softmax(ranked, axis=-1)
    before = jnp.cumsum(probability, axis=-1) - probability  # of all likelier tokens
    top_p = samplers.top_p[:, None]
    stays = ((before < top_p) | (top_p >= 1)) & (ranked > -jnp.inf)  # sums are not exact near 1
    stays = stays | (jnp.arange(V) == 0)
    return jnp.where(stays, ranked, jnp.inf).min(-1, keepdims=True)

  some = jnp.any((samplers.top_k > 0) | (samplers.top_p < 1))
  lowest = jnp.maximum(lowest, jax.lax.cond(some, by_rank, lambda: jnp.full_like(best, -jnp.inf)))
  return jnp.where(logits >= lowest, logits, -jnp.inf)
