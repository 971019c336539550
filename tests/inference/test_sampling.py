"""Picking tokens, against the same rules written slowly, one row and one token at a time."""

import dataclasses

from hypothesis import given, settings, strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from famjax.errors import UserError
from famjax.inference import sampling
from famjax.inference.sampling import Sampling

V, B = 11, 3
truncate = jax.jit(sampling.truncated)
pick = jax.jit(sampling.pick)


def kept(logits, how: Sampling) -> set[int]:
  """Tokens that stay: the k likeliest, of these the fewest that reach p, of these min-p."""
  ranked = sorted(range(V), key=lambda token: -logits[token])
  ranked = ranked[: how.top_k or V]
  odds = np.exp(np.array([logits[t] for t in ranked], np.float64))
  odds /= odds.sum()
  if how.top_p < 1:
    reached = 1 + next((i for i, total in enumerate(odds.cumsum()) if total >= how.top_p), V)
    ranked, odds = ranked[:reached], odds[:reached]
  return {t for t, o in zip(ranked, odds) if o >= how.min_p * odds[0]}


settings_of_a_row = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.5, 1.0, 3.0]),
    top_k=st.integers(0, V + 2),
    top_p=st.sampled_from([0.05, 0.4, 0.93, 1.0]),
    min_p=st.sampled_from([0.0, 0.03, 0.4, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.7, 0.6]),
    seed=st.integers(0, 2**32 - 1),
)


def draw_logits(seed):
  return np.random.default_rng(seed).permutation(np.linspace(-4, 3, B * V)).astype("f4").reshape(B, V)


@settings(max_examples=60)
@given(seed=st.integers(0, 999), rows=st.lists(settings_of_a_row, min_size=B, max_size=B))
def test_truncation_keeps_what_the_rules_keep(seed, rows):
  logits = draw_logits(seed)
  left = np.asarray(truncate(logits, sampling.stack(rows)))
  for row in range(B):
    assert set(np.flatnonzero(left[row] > -np.inf)) == kept(logits[row], rows[row])
    np.testing.assert_array_equal(left[row][left[row] > -np.inf], logits[row][left[row] > -np.inf])


@settings(max_examples=60)
@given(seed=st.integers(0, 999), rows=st.lists(settings_of_a_row, min_size=B, max_size=B))
def test_a_row_picks_by_its_own_settings_whatever_stands_beside_it(seed, rows):
  rng = np.random.default_rng(seed)
  logits, seen = draw_logits(seed), rng.random((B, V)) < 0.4
  index = rng.integers(0, 50, B).astype(np.int32)
  together = np.asarray(pick(logits, seen, sampling.stack(rows), index))
  for row, how in enumerate(rows):
    penalty = how.repetition_penalty
    punished = np.where(logits[row] > 0, logits[row] / penalty, logits[row] * penalty)
    final = np.where(seen[row], punished, logits[row])
    if how.temperature == 0:
      assert together[row] == final.argmax()
    else:
      assert together[row] in kept(final / how.temperature, how)
    alone = pick(np.repeat(logits[row : row + 1], B, 0), np.repeat(seen[row : row + 1], B, 0),
                 sampling.stack([how] * B), np.repeat(index[row : row + 1], B))  # fmt: skip
    assert set(np.asarray(alone)) == {together[row]}


def test_draws_follow_the_probabilities():
  """20,000 draws; 4 standard deviations of a share are below 0.015."""
  n = 20_000
  logits = np.log(np.array([[0.5, 0.3, 0.15, 0.05]], np.float32))
  for heat, expected in ((1.0, [0.5, 0.3, 0.15, 0.05]), (0.5, np.square([0.5, 0.3, 0.15, 0.05]))):
    how = sampling.stack([Sampling(temperature=heat, seed=5)])
    how = jax.tree.map(lambda x: jnp.repeat(x, n), how)
    drawn = pick(jnp.repeat(logits, n, 0), jnp.zeros((n, 4), bool), how, jnp.arange(n))
    shares = np.bincount(drawn, minlength=4) / n
    np.testing.assert_allclose(shares, np.array(expected) / np.sum(expected), atol=0.015)


def test_seeds_and_places_give_draws_of_their_own():
  n = 1000
  flat = jnp.zeros((n, V))
  how = lambda seeds: dataclasses.replace(
      jax.tree.map(lambda x: jnp.repeat(x, n), sampling.stack([Sampling(temperature=1.0)])),
      seed=jnp.asarray(seeds, jnp.uint32),
  )
  seen, index = jnp.zeros((n, V), bool), jnp.arange(n)
  one = np.asarray(pick(flat, seen, how(np.full(n, 1)), index))
  two = np.asarray(pick(flat, seen, how(np.full(n, 2)), index))
  by_seed = np.asarray(pick(flat, seen, how(np.arange(n)), jnp.zeros(n, int)))
  for other in (two, by_seed, np.roll(one, 1)):
    assert abs((one == other).mean() - 1 / V) < 0.04


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(temperature=-0.5), "temperature is -0.5: use 0"),
        (dict(temperature=float("nan")), "temperature is nan"),
        (dict(top_k=-1), "top_k is -1"),
        (dict(top_p=0.0), "top_p is 0.0"),
        (dict(top_p=1.1), "top_p is 1.1"),
        (dict(min_p=1.5), "min_p is 1.5"),
        (dict(repetition_penalty=0.0), "repetition_penalty is 0.0"),
        (dict(seed=-1), "seed is -1"),
        (dict(seed=0.5), "seed is 0.5: use a whole number"),
        (dict(top_k=2**40), "top_k is 1099511627776"),
        (dict(top_p="all"), "top_p is 'all': use a number"),
    ],
)
def test_settings_that_make_no_sense(change, message):
  with pytest.raises(UserError, match=message):
    Sampling(**change).validate()


@pytest.mark.parametrize("temperature", [1e-38, 1e-45, 1.2e-38, 1e-300, 5e-324, 1e-31])
def test_a_temperature_near_zero_takes_the_likeliest(temperature):
  """Also of equal ones the first, as 0 does."""
  logits = np.random.default_rng(0).normal(size=(4, 50)).astype(np.float32) * [[1], [1e-6], [0], [1e4]]
  cold, zero = (
      sampling.stack([Sampling(temperature=t, seed=i, top_p=p) for i, p in enumerate((1, 0.9, 0.1, 1))])
      for t in (temperature, 0.0)
  )
  args = jnp.asarray(logits, jnp.float32), jnp.zeros((4, 50), bool)
  np.testing.assert_array_equal(
      sampling.pick(*args, cold, jnp.arange(4)), sampling.pick(*args, zero, jnp.arange(4))
  )


@pytest.mark.parametrize(
    "settings",
    [
        dict(top_p=1e-45), dict(top_p=1e-300), dict(min_p=1e-300), dict(min_p=1), dict(top_k=2**31 - 1),
        dict(repetition_penalty=1e-300), dict(repetition_penalty=1e300), dict(repetition_penalty=1e-40),
        dict(temperature=1e300), dict(temperature=1e-20), dict(temperature=3e38, top_p=1e-30),
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["usual", "equal", "mostly -inf", "huge", "tiny"])
def test_extreme_settings_pick_a_token_that_is_possible(settings, kind):
  draw = np.random.default_rng(1).normal(size=(8, 30)).astype(np.float32)
  logits = {
      "usual": draw, "equal": np.zeros_like(draw), "huge": draw * 1e38, "tiny": draw * 1e-38,
      "mostly -inf": np.where(np.arange(30) % 10 == 3, draw, -np.inf).astype(np.float32),
  }[kind]  # fmt: skip
  seen = np.arange(30)[None] % 2 == np.arange(8)[:, None] % 2
  samplers = sampling.stack(
      [Sampling(**{"temperature": 1.0, "seed": i} | settings) for i in range(8)]
  )
  picked = np.asarray(sampling.pick(jnp.asarray(logits), jnp.asarray(seen), samplers, jnp.arange(8)))
  assert ((0 <= picked) & (picked < 30)).all()
  assert np.isfinite(logits[np.arange(8), picked]).all()
  if settings in (dict(top_p=1e-45), dict(top_p=1e-300)) and kind not in ("equal", "tiny"):
    assert (picked == logits.argmax(-1)).all()


def test_numbers_beyond_a_computers_are_one_line():
  for settings in (dict(temperature=10**400), dict(repetition_penalty=10**400)):
    with pytest.raises(UserError, match="larger than any float: use a smaller number"):
      Sampling(**settings).validate()
