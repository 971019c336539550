"""The engine: however text is cut and whoever stands beside a row, it reads and writes the same."""

import dataclasses
import functools

from flax import nnx
from hypothesis import given, settings, strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from famjax.inference import engine, sampling
from famjax.inference.engine import STEPS, TAIL, Engine, Reading
from famjax.model.decoder import Decoder
from famjax.model.state import num_bytes
from tests.inference import tiny

N = tiny.CONFIG.memory.block_size
KINDS = pytest.mark.parametrize("kind", ["fam", "bswa"])
GREEDY = sampling.Sampling()


@functools.cache
def make(kind) -> Engine:
  return Engine(tiny.model(kind).decoder)


def draw(seed, *lengths):
  rng = np.random.default_rng(seed)
  return [rng.integers(3, 259, n) for n in lengths]


def close(a, b):
  np.testing.assert_allclose(a, b, atol=3e-5)


def row_of(reading: Reading, row: int):
  """What a later call can see of one row: logits, place, FAM, and its ring's live slots."""
  state = reading.state
  position = int(state.position[row])
  places = np.arange(max(position // N - 1, 0) * N, position)  # M is 1
  ring = lambda x: np.asarray(x)[:, row][:, :, places // N % 2, places % N]
  fams = [np.asarray(x)[:, row] for x in (state.fam, state.fam_keys, state.fam_values)]
  rings = ring(state.keys), ring(state.values)
  return [reading.logits[row], reading.tail[row], position, *rings, *fams]


def assert_same_row(a, row, b, other):
  jax.tree.map(close, row_of(a, row), row_of(b, other))


@given(
    rows=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 200)), min_size=1, max_size=4),
    N=st.sampled_from([1, 4, 7, 16]),
)
def test_pieces_are_all_that_rows_have_to_read_in_few_shapes(rows, N):  # pylint: disable=redefined-outer-name
  positions, lengths = np.array(rows).T
  place, shapes = positions.copy(), set()
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(engine, "CHUNK_BLOCKS", tiny.CHUNK_BLOCKS)
    pieces = list(engine.pieces(positions, lengths, N))
  for piece in pieces:
    assert 0 < piece.counts.max() <= piece.size
    moving = piece.counts > 0
    if piece.within:
      assert piece.size <= N and (place % N + piece.counts <= N)[moving].all()
    else:
      assert piece.size % N == 0 and (place % N == 0)[moving].all()
      assert piece.size // N in (1, 2, 4, tiny.CHUNK_BLOCKS)
    shapes.add((piece.size, piece.within))
    place += piece.counts
  np.testing.assert_array_equal(place, positions + lengths)
  assert len(shapes) <= 4 + 2  # four sizes of whole blocks, 16 and a power of two below N or N


@KINDS
def test_ragged_rows_read_what_each_reads_alone(kind):
  """Rows of no token, of less than a block, of whole blocks, of more than a chunk; then once more,
  from wherever they stand."""
  first = draw(0, 7, 0, 2 * N, engine.CHUNK_BLOCKS * N + 9)
  second = draw(1, 2 * N + 3, 5, 0, 1)
  together = make(kind).read(second, make(kind).read(first, make(kind).start(4)))
  for row in range(4):
    alone = make(kind).read([first[row]], make(kind).start(1))
    alone = make(kind).read([second[row]], alone)
    assert_same_row(together, row, alone, 0)
    whole = make(kind).read([np.concatenate([first[row], second[row]])], make(kind).start(1))
    assert_same_row(together, row, whole, 0)


@KINDS
def test_a_reading_can_be_used_again(kind):
  before = make(kind).read(draw(0, 6, 9), make(kind).start(2))
  kept = jax.device_get(before)
  once = make(kind).read(draw(1, 30, 2), before)
  make(kind).score(draw(1, 30, 2), before)
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(before), kept)
  jax.tree.map(np.testing.assert_array_equal, make(kind).read(draw(1, 30, 2), before), once)


def test_the_last_tokens_are_known():
  rows = draw(6, 3, 0, 40)
  reading = make("fam").read(rows, make("fam").start(3))
  for row, tokens in enumerate(rows):
    last = tokens[-TAIL:].tolist()
    assert reading.tail[row].tolist() == [-1] * (TAIL - len(last)) + last


def test_every_shape_is_compiled_once():
  """Reading and writing in rounds, with and without a copy, from the start and from the host."""
  model = tiny.model(seed=9)  # of its own, but of a structure that others have compiled for
  list(model.generate("a" * 41, max_new_tokens=40))
  functions = engine._read, engine._write  # pylint: disable=protected-access
  sizes = [f._cache_size() for f in functions]
  stream = model.generate("b" * 41, max_new_tokens=40, temperature=1.0, top_p=0.5, stop=["\n"])
  list(stream)
  from_host = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), stream.reading)
  list(model.generate("c" * 44, max_new_tokens=40, state=from_host, repetition_penalty=1.1))
  assert [f._cache_size() for f in functions] == sizes


def test_progress_is_told_of_every_token():
  told = []
  make("fam").read(draw(0, 50, 3), make("fam").start(2), progress=told.append)
  assert sum(told) == 53 and len(told) > 2


@KINDS
def test_scores_are_the_log_probabilities_of_one_call(kind):
  rows = draw(2, engine.CHUNK_BLOCKS * N + 11, 1, 0, 2 * N)
  scores, reading = make(kind).score(rows, make(kind).start(4))
  after = make(kind).read(rows, make(kind).start(4))
  again, _ = make(kind).score(rows, after)
  for row, tokens in enumerate(rows):
    assert_same_row(reading, row, after, row)
    (begun, _), (log_probs, likeliest) = scores[row], again[row]
    assert begun.shape == log_probs.shape == likeliest.shape == (len(tokens),)
    if not len(tokens):
      continue
    model = tiny.model(kind)
    logits, _ = model(np.concatenate([tokens, tokens])[None], model.init_state())
    expected = jax.nn.log_softmax(logits[0])
    place = np.arange(len(tokens))
    assert np.isnan(begun[0]) and not scores[row].likeliest[0]
    close(begun[1:], expected[place[:-1], tokens[1:]])
    close(log_probs, expected[len(tokens) - 1 + place, tokens])
    best = expected.argmax(-1)[len(tokens) - 1 :][: len(tokens)]
    np.testing.assert_array_equal(likeliest, best == tokens)


@KINDS
def test_rows_are_taken(kind):
  before = make(kind).read(draw(3, 2 * N + 1, 4, 0), make(kind).start(3))
  after = before.take([1, 0, 1])
  for row, came in enumerate((1, 0, 1)):
    assert_same_row(after, row, before, came)


def test_the_likeliest_tokens_are_those_that_are_written():
  """The scores of what was written greedily, token by token, from where it was written."""
  model = tiny.model()
  reading = model.read("The sky")
  stream = model.generate(state=reading, max_new_tokens=12)
  list(stream)
  (scores,), _ = make("fam").score([np.array(stream.tokens)], reading)
  assert scores.likeliest.all()
  (scores,), _ = make("fam").score([np.array(stream.tokens) ^ 1], reading)
  assert not scores.likeliest[0]


def write(kind, reading, count, how=GREEDY, stop=(), most=STEPS):
  """Writes up to `count[b]` tokens in every row, `most` in a round."""
  B = len(count)
  seen, tokens = np.zeros((B, 259), bool), [[] for _ in range(B)]
  ends = np.zeros((B, 259), bool)
  ends[:, list(stop)] = True
  stopped = np.zeros(B, bool)
  how = sampling.stack(how if isinstance(how, list) else [how] * B)
  reading = jax.tree.map(jnp.copy, reading)
  while True:
    written = np.array([len(row) for row in tokens])
    limit = np.where(stopped, 0, np.minimum(np.array(count) - written, most))
    if not limit.any():
      return tokens, make(kind).whole(reading)
    new, reading, seen = make(kind).write(reading, seen, how, limit, ends)
    new = jax.device_get(new)
    for row in range(B):
      tokens[row] += new.tokens[row, : new.count[row]].tolist()
    stopped |= new.stopped


@KINDS
def test_greedy_writing_is_that_of_reading_everything_anew_for_every_token(kind):
  """Rows of unlike length; from within a block over more than three boundaries."""
  prompts, count = draw(3, 9, 2 * N, 3), 4 * N + 2
  after = make(kind).read(prompts, make(kind).start(3))
  written, reading = write(kind, after, [count] * 3)
  for row, prompt in enumerate(prompts):
    tokens = prompt.tolist()
    for _ in range(count):
      logits, _ = make(kind).read([np.array(tokens)], make(kind).start(1))
      tokens.append(int(logits[0].argmax()))
    assert written[row] == tokens[len(prompt) :] and len(set(written[row])) > 2
    whole = make(kind).read([np.array(tokens)], make(kind).start(1))
    assert_same_row(reading, row, whole, 0)


@KINDS
def test_rows_write_what_each_writes_alone(kind):
  """With settings and lengths of their own, and in other rounds."""
  prompts = draw(4, 5, 13, 1)
  how = [
      sampling.Sampling(temperature=1.0, seed=3),
      sampling.Sampling(temperature=2.0, top_k=20, repetition_penalty=1.5),
      sampling.Sampling(repetition_penalty=2.0),
  ]
  count = [3 * N, N - 1, 2 * STEPS + 1]
  together, reading = write(kind, make(kind).read(prompts, make(kind).start(3)), count, how)
  for row in range(3):
    after = make(kind).read([prompts[row]], make(kind).start(1))
    (alone,), reading_alone = write(kind, after, [count[row]], how[row], most=5)
    assert together[row] == alone and len(alone) == count[row]
    assert_same_row(reading, row, reading_alone, 0)


def test_stacked_layers_write_what_unstacked_ones_write(monkeypatch):
  """The form that a TPU uses, of which a CPU makes no use otherwise."""
  mine = make("fam")
  reading = mine.read(draw(3, 6, 9), mine.start(2))
  expected, after = write("fam", reading, [STEPS + 3, 9])
  monkeypatch.setitem(vars(mine), "_writer", (mine.graphdef, mine.params))
  monkeypatch.setattr(mine, "_writes_apart", False)
  tokens, stacked = write("fam", reading, [STEPS + 3, 9])
  assert tokens == expected
  for row in range(2):
    assert_same_row(stacked, row, after, row)


def test_a_round_writes_in_place_what_the_round_before_it_gave():
  """Each layer's memory by itself: no ring goes into arrays of all layers and out of them between."""
  config = tiny.config("fam")
  config = dataclasses.replace(config, memory=dataclasses.replace(config.memory, block_size=2048))
  mine = Engine(Decoder(config, rngs=nnx.Rngs(0)))
  reading = mine.read(draw(3, 6, 9), mine.start(2))
  jax.tree.map(np.testing.assert_array_equal, mine.whole(mine.apart(reading)), reading)
  assert mine.whole(reading) is reading
  seen, none = np.zeros((2, 259), bool), np.zeros((2, 259), bool)
  arguments = sampling.stack([GREEDY] * 2), np.array([3, 3]), none
  given = mine.apart(reading)
  _, after, seen = mine.write(given, seen, *arguments)
  assert mine.apart(after) is after
  assert all(ring.is_deleted() for ring in given.state.keys)  # it has been given away
  program = engine._write.lower(*mine._writer, after, seen, *arguments).compile()
  rings = num_bytes((after.state.keys, after.state.values))
  assert program.memory_analysis().temp_size_in_bytes < rings  # a block's end takes half of that


def test_a_stop_token_is_neither_written_nor_read():
  (prompt,) = draw(5, 9)
  after = make("fam").read([prompt], make("fam").start(1))
  (free,), _ = write("fam", after, [20])
  place = next(i for i, token in enumerate(free) if token not in free[:i] and i > 3)
  (stopped,), reading = write("fam", after, [20], stop=[free[place], 2])
  assert stopped == free[:place]
  assert_same_row(reading, 0, make("fam").read([np.array([*prompt, *stopped])], make("fam").start(1)), 0)


@KINDS
def test_writing_in_bfloat16_remembers_what_reading_in_bfloat16_does(kind):
  """Over three boundaries. Sums run in another order, and the FAM feeds roundings of 2^-8 back."""
  config = dataclasses.replace(tiny.config(kind), compute_dtype="bfloat16")
  mine = Engine(Decoder(config, rngs=nnx.Rngs(0)))
  prompts = draw(7, 6, 3)
  how = sampling.stack([GREEDY, GREEDY])
  seen, none = np.zeros((2, 259), bool), np.zeros((2, 259), bool)
  after = mine.read(prompts, mine.start(2))
  written, reading, _ = mine.write(after, seen, how, [3 * N, 3 * N], none)
  reading = mine.whole(reading)
  assert written.count.tolist() == [3 * N, 3 * N] and reading.state.keys.dtype == jnp.bfloat16
  rows = [np.array([*p, *t]) for p, t in zip(prompts, np.asarray(written.tokens)[:, : 3 * N])]
  expected = mine.read(rows, mine.start(2))
  for row in range(2):
    for ours, theirs in zip(row_of(reading, row), row_of(expected, row)):
      ours, theirs = np.asarray(ours, np.float32), np.asarray(theirs, np.float32)
      largest = np.abs(theirs).max(initial=0.01)
      np.testing.assert_allclose(ours, theirs, atol=0.06 * largest)
