"""SPEC section 3 on random shapes: causality, any cut, rows, bounded state, unfinished blocks.

Properties 1, 2, 4, 5 and 7; the others (limits, weights, gradients) are in test_limits.py and
test_gradients.py. Everything is float32.
"""

import functools

from hypothesis import given, settings, strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.model import cases
from tests.model.cases import BATCH, Stream


def feed_ragged(stream, rows, draw, rng):
  """Feeds rows, each at its own pace, in three ways; padding is garbage.

  The ways: a padded piece of any length, a padded piece that stays in each row's block, one token.
  """
  done, most, size = [0] * len(rows), cases.piece(stream.config), stream.config.memory.block_size
  while any(count < len(row) for count, row in zip(done, rows)):
    left = [len(row) - count for count, row in zip(done, rows)]
    way = draw(st.sampled_from(["any", "within", "one"] if min(left) > 0 else ["any", "within"]))
    if way == "one":
      stream.feed([[row[count]] for count, row in zip(done, rows)])
      done = [count + 1 for count in done]
      continue
    room = [size - count % size if way == "within" else most for count in done]
    longest = [min(count, here) for count, here in zip(left, room)]
    counts = [draw(st.integers(0, count)) for count in longest]
    counts = counts if any(counts) else longest
    tokens = cases.draw_tokens(rng, len(rows), size if way == "within" else most)
    for i, (row, count) in enumerate(zip(rows, counts)):
      tokens[i, :count] = row[done[i] : done[i] + count]
      done[i] += count
    stream.feed(tokens, lengths=counts, within=way == "within")


def at_once(config, params, rows, aligned=True):
  """Rows of any lengths in one padded call from a fresh state."""
  stream = Stream(config, params)
  tokens = np.zeros((BATCH, cases.width(config)), int)
  for i, row in enumerate(rows):
    tokens[i, : len(row)] = row
  stream.feed(tokens, lengths=[len(row) for row in rows], aligned=aligned)
  return stream


def feed_at_once(stream, tokens):
  stream.feed(tokens, aligned=True)


def feed_in_pieces(stream, tokens, size):
  """Pieces of `size` tokens, as prefixes of padded calls."""
  most = cases.piece(stream.config)
  for start in range(0, tokens.shape[1], size):
    count = min(size, tokens.shape[1] - start)
    padded = np.pad(tokens[:, start : start + count], ((0, 0), (0, most - count)))
    stream.feed(padded, lengths=[count] * BATCH)


def assert_same(left, right, live=False):
  """Two streams gave the same logits and hold the same state: every field, every slot of the ring.

  With `live`, ring slots that no query will see may differ: a row that starts leaves them as they
  are.
  """
  for row in range(BATCH):
    np.testing.assert_allclose(left.logits(row), right.logits(row), **cases.TOLERANCE)
  assert_same_state(left.config, left.state, right.state, live)


def assert_same_state(config, left, right, live=False):
  if live:
    for row in range(BATCH):
      cases.assert_same_row(config, left, row, right, row)
  else:
    compare = functools.partial(np.testing.assert_allclose, **cases.TOLERANCE)
    jax.tree.map(compare, left, right)


def ragged_rows(data, config, rng):
  longest = cases.width(config)
  lengths = [data.draw(st.integers(1, longest)) for _ in range(BATCH)]
  lengths[0] = longest  # the whole width is always used
  return [cases.draw_tokens(rng, length) for length in lengths]


@settings(max_examples=25)
@given(config=cases.configs, seed=cases.seeds, data=st.data())
def test_no_logit_before_a_changed_token_changes(config, seed, data):
  """Property 1; block 0 and both sides of every boundary are drawn often."""
  rng = np.random.default_rng(seed)
  params = cases.random_params(config, seed)
  length, size = cases.width(config), config.memory.block_size
  edges = [0, size - 1, size, 2 * size - 1, 2 * size, 3 * size - 1, 3 * size, length - 1]
  places = st.sampled_from(sorted(set(edges))) | st.integers(0, length - 1)
  tokens = cases.draw_tokens(rng, BATCH, length)
  changed, js = tokens.copy(), []
  for row in range(BATCH):
    j = data.draw(places, label=f"changed token of row {row}")
    changed[row, j] = (changed[row, j] + rng.integers(1, cases.VOCAB)) % cases.VOCAB
    js.append(j)
  cut = data.draw(st.integers(1, cases.piece(config)), label="tokens in a piece")
  for feed in (feed_at_once, functools.partial(feed_in_pieces, size=cut)):
    before, after = Stream(config, params), Stream(config, params)
    feed(before, tokens)
    feed(after, changed)
    for row, j in enumerate(js):
      difference = np.abs(before.logits(row) - after.logits(row)).max(-1)
      np.testing.assert_array_equal(difference[:j], 0)
      assert difference[j] > 1e-3
      boundary = (j // size + 1) * size  # the next block sees the change through its memory
      segments = config.memory.memory_segments > 0 and config.memory.window is None
      if boundary < length and (segments or config.memory.kind == "fam"):
        assert difference[boundary] > 0


@settings(max_examples=20)
@given(config=cases.configs, seed=cases.seeds, data=st.data())
def test_pieces_and_single_tokens_equal_at_once(config, seed, data):
  """Property 2, both rows at the same place."""
  rng = np.random.default_rng(seed)
  params = cases.random_params(config, seed)
  tokens = cases.draw_tokens(rng, BATCH, cases.width(config))
  whole = at_once(config, params, tokens)
  pieces, singles = Stream(config, params), Stream(config, params)
  feed_in_pieces(pieces, tokens, data.draw(st.integers(2, cases.piece(config))))
  for place in range(tokens.shape[1]):
    singles.feed(tokens[:, place : place + 1])
  for other in (pieces, singles):
    assert_same(other, whole)


@settings(max_examples=8)
@given(config=st.sampled_from(cases.FEW), seed=cases.seeds)
def test_aligned_blocks_equal_at_once(config, seed):
  """Property 2: block by block, the last one unfinished; and at once without `aligned`."""
  rng = np.random.default_rng(seed)
  params = cases.random_params(config, seed)
  size, length = config.memory.block_size, cases.width(config)
  tokens = cases.draw_tokens(rng, BATCH, length)
  whole, blocks = at_once(config, params, tokens), Stream(config, params)
  for start in range(0, length, size):
    count = min(size, length - start)
    block = np.pad(tokens[:, start : start + count], ((0, 0), (0, size - count)))
    blocks.feed(block, lengths=[count] * BATCH, aligned=True)
  assert_same(blocks, whole)
  assert_same(at_once(config, params, tokens, aligned=False), whole)


@settings(max_examples=8)
@given(config=st.sampled_from(cases.FEW), seed=cases.seeds, data=st.data())
def test_init_state_and_no_state_are_fresh_rows(config, seed, data):
  """A fresh state, `start_of_sequence` over any state, and no state at all mean the same."""
  rng = np.random.default_rng(seed)
  params = cases.random_params(config, seed)
  tokens = cases.draw_tokens(rng, BATCH, cases.width(config))
  whole = at_once(config, params, tokens)
  stream = Stream(config, params, state=cases.init_state(config, params))
  stream.feed(tokens, aligned=True)
  assert_same(stream, whole)
  stream.feed(tokens, start=[True] * BATCH)
  assert_same(stream, whole, live=True)
  logits, state = cases.call(config, params, jnp.asarray(tokens, jnp.int32), None, None, None)
  for row in range(BATCH):
    np.testing.assert_allclose(logits[row], whole.logits(row), **cases.TOLERANCE)
  assert_same_state(config, state, whole.state)


@settings(max_examples=25)
@given(config=cases.configs, seed=cases.seeds, data=st.data())
def test_rows_at_different_places_equal_at_once(config, seed, data):
  """Property 2: each row has its own length and its own cuts, and padding is garbage."""
  rng = np.random.default_rng(seed)
  params = cases.random_params(config, seed)
  rows = ragged_rows(data, config, rng)
  whole = at_once(config, params, rows)
  ragged = Stream(config, params)
  feed_ragged(ragged, rows, data.draw, rng)
  assert_same(ragged, whole)


@settings(max_examples=25)
@given(config=cases.configs, seed=cases.seeds, data=st.data())
def test_a_row_that_starts_is_a_fresh_row(config, seed, data):
  """Properties 2 and 4: one row starts again anywhere, also in a call that feeds it nothing."""
  rng = np.random.default_rng(seed)
  params = cases.random_params(config, seed)
  stream, history = Stream(config, params), [[], []]
  row, starts_in = data.draw(st.integers(0, 1)), data.draw(st.integers(1, 3))
  for call in range(5):
    starts = np.arange(BATCH) == row if call == starts_in else np.zeros(BATCH, bool)
    history = [[] if start else tokens for start, tokens in zip(starts, history)]
    room = [min(cases.piece(config), cases.width(config) - len(tokens)) for tokens in history]
    counts = [data.draw(st.integers(0, most)) for most in room]
    tokens = cases.draw_tokens(rng, BATCH, cases.piece(config))
    stream.feed(tokens, lengths=counts, start=starts)
    for row_history, row_tokens, count in zip(history, tokens, counts):
      row_history.extend(row_tokens[:count])
  assert_same(stream, at_once(config, params, history), live=True)


@settings(max_examples=20)
@given(config=cases.configs, seed=cases.seeds, data=st.data())
def test_an_aligned_call_may_start_rows(config, seed, data):
  """Property 4: one row starts, the other goes on, each as if both did, bit for bit."""
  rng = np.random.default_rng(seed)
  params = cases.random_params(config, seed)
  size, length = config.memory.block_size, cases.width(config)
  blocks = data.draw(st.integers(1, 3))
  past = cases.draw_tokens(rng, BATCH, length)
  tokens = cases.draw_tokens(rng, BATCH, length)
  stream = Stream(config, params)
  stream.feed(past, lengths=[blocks * size] * BATCH, aligned=True)
  went_on = Stream(config, params, state=stream.state)
  logits = stream.feed(tokens, start=[True, False], aligned=True)
  started = Stream(config, params, state=stream.state)
  fresh = started.feed(tokens, start=[True, True], aligned=True)
  continued = went_on.feed(tokens, aligned=True)
  np.testing.assert_array_equal(logits[0], fresh[0])
  np.testing.assert_array_equal(logits[1], continued[1])
  cases.assert_same_row(config, stream.state, 0, started.state, 0, exact=True)
  cases.assert_same_row(config, stream.state, 1, went_on.state, 1, exact=True)


@settings(max_examples=15)
@given(config=cases.configs, seed=cases.seeds, data=st.data())
def test_rows_do_not_see_each_other(config, seed, data):
  """Property 4: whatever the neighbour reads, and whether it starts, changes no bit of a row."""
  rng = np.random.default_rng(seed)
  params = cases.random_params(config, seed)
  most, row = cases.piece(config), data.draw(st.integers(0, 1))
  mine, other = Stream(config, params), Stream(config, params)
  neighbour = np.arange(BATCH) != row
  for _ in range(3):
    tokens = cases.draw_tokens(rng, BATCH, most)
    beside = np.where(neighbour[:, None], (tokens + 1) % cases.VOCAB, tokens)
    lengths, other_lengths = rng.integers(1, most + 1, (2, BATCH))
    other_lengths[row] = lengths[row]
    mine.feed(tokens, lengths=lengths)
    other.feed(beside, lengths=other_lengths, start=neighbour & data.draw(st.booleans()))
    np.testing.assert_array_equal(mine.logits(row), other.logits(row))
    cases.assert_same_row(config, mine.state, row, other.state, row, exact=True)
    assert not np.array_equal(mine.logits(1 - row)[-1], other.logits(1 - row)[-1])


def shapes(state):
  return jax.tree.map(lambda x: (x.shape, x.dtype), state)


@pytest.mark.parametrize("config", [cases.FAM[0], cases.FAM[3], cases.BSWA[1]])
def test_state_is_as_large_after_many_tokens_as_after_none(config):
  """Property 5: in one call and over many, with a state and without."""
  params = cases.random_params(config, 5)
  stream = Stream(config, params)
  expected = shapes(stream.state)
  tokens = cases.draw_tokens(np.random.default_rng(5), BATCH, 40)
  for place in range(40):
    stream.feed(tokens[:, place : place + 1])
    assert shapes(stream.state) == expected
  far = stream.state.replace(position=stream.state.position + 24_000_000)  # a whole number of rings
  stream = Stream(config, params, state=far)
  logits = stream.feed(tokens[:, :1])
  assert np.isfinite(logits).all() and shapes(stream.state) == expected

  for length in (1_000, 1_000_000):
    many = jax.ShapeDtypeStruct((BATCH, length), jnp.int32)
    logits, state = jax.eval_shape(
        lambda tokens: cases.model(config, params)(tokens, aligned=True), many
    )
    assert logits.shape == (BATCH, length, cases.VOCAB)
    assert shapes(state) == expected


@settings(max_examples=20)
@given(config=cases.fam_configs, seed=cases.seeds, data=st.data())
def test_an_unfinished_block_does_not_update_the_fam(config, seed, data):
  """Property 7: the FAM waits for the block's last token, and is then what one call makes it."""
  rng = np.random.default_rng(seed)
  params = cases.random_params(config, seed)
  size, blocks = config.memory.block_size, data.draw(st.integers(0, 2))
  rows = cases.draw_tokens(rng, BATCH, (blocks + 1) * size)
  stream = Stream(config, params)
  if blocks:
    before = at_once(config, params, rows[:, : blocks * size])
    feed_ragged(stream, list(rows[:, : blocks * size]), data.draw, rng)
    assert_same(stream, before)
  waiting = stream.state
  place = blocks * size
  while place < (blocks + 1) * size - 1:
    count = data.draw(st.integers(1, (blocks + 1) * size - 1 - place))
    tokens = cases.draw_tokens(rng, BATCH, cases.piece(config))
    tokens[:, :count] = rows[:, place : place + count]
    stream.feed(tokens, lengths=[count] * BATCH)
    place += count
    np.testing.assert_array_equal(stream.state.fam, waiting.fam)
    np.testing.assert_array_equal(stream.state.fam_updates, waiting.fam_updates)
    for name in ("fam_keys", "fam_values"):  # made anew from the same FAM
      left, right = getattr(stream.state, name), getattr(waiting, name)
      np.testing.assert_allclose(left, right, **cases.TOLERANCE)
  stream.feed(rows[:, place:])
  assert np.abs(np.asarray(stream.state.fam - waiting.fam)).max() > 1e-3
  np.testing.assert_array_equal(stream.state.fam_updates, waiting.fam_updates + 1)
  assert_same(stream, at_once(config, params, rows))


@settings(max_examples=20)
@given(config=cases.configs, seed=cases.seeds, data=st.data())
def test_padding_reaches_nothing(config, seed, data):
  """Property 7: other garbage behind `lengths` changes no bit of a logit or of the state."""
  rng = np.random.default_rng(seed)
  params = cases.random_params(config, seed)
  aligned = data.draw(st.booleans())
  most = cases.width(config) if aligned else cases.piece(config)
  left, right = Stream(config, params), Stream(config, params)
  for _ in range(1 if aligned else 4):
    tokens = cases.draw_tokens(rng, BATCH, most)
    garbage = cases.draw_tokens(rng, BATCH, most)
    lengths = [data.draw(st.integers(0, most)) for _ in range(BATCH)]
    kept = np.arange(most) < np.array(lengths)[:, None]
    left.feed(tokens, lengths=lengths, aligned=aligned)
    right.feed(np.where(kept, tokens, garbage), lengths=lengths, aligned=aligned)
    for row in range(BATCH):
      np.testing.assert_array_equal(left.logits(row), right.logits(row))
    jax.tree.map(np.testing.assert_array_equal, left.state, right.state)
