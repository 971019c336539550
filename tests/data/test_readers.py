"""Readers: pure in seed, position and step; rows are the same for any reader; nothing is lost."""

import subprocess
import sys

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from famjax.data.examples import PairExamples
from famjax.data.packing import REPEAT_PROMPT
from famjax.data.passkey import Lengths
from famjax.data.passkey import PassKeyExamples
from famjax.data.readers import ExampleReader
from famjax.data.readers import FollowingReader
from famjax.data.readers import PackedReader
from famjax.data.vocabularies import load_vocabulary
from famjax.errors import UserError
from tests.data.pieces import NumberedSource

KINDS = {
    "example": ExampleReader,
    "packed": lambda *args, **kw: PackedReader(*args, repeat_length=2, **kw),
    "following": FollowingReader,
}
LENGTH = 32  # Of a row; the packed reader's has a prompt of 24 bytes in it and a segment of 2.


def read_all(reader, steps, position=None, first=0):
  """Returns the batches of some steps, and the position after each."""
  position = reader.start() if position is None else position
  batches, positions = [], []
  for step in range(first, first + steps):
    batch, position = reader.read(position, step)
    batches.append(batch)
    positions.append(position)
  return batches, positions


def assert_same(a, b):
  assert a.keys() == b.keys()
  for name in a:
    np.testing.assert_array_equal(a[name], b[name], err_msg=name)
    assert a[name].dtype == b[name].dtype


def check_shapes(batch, rows, length):
  assert {name: (array.shape, array.dtype) for name, array in batch.items()} == {
      "tokens": ((rows, length), np.int32),
      "targets": ((rows, length), np.int32),
      "weights": ((rows, length), np.float32),
      "start_of_sequence": ((rows,), bool),
      "lengths": ((rows,), np.int32),
  }
  real = np.arange(length) < batch["lengths"][:, None]  # [B, S]
  for name in ("tokens", "targets", "weights"):
    assert not batch[name][~real].any()


@pytest.mark.parametrize("kind", KINDS)
@hypothesis.given(batch_size=st.integers(1, 5), seed=st.integers(0, 99), stop=st.integers(1, 6))
def test_a_restart_goes_on_with_the_same_batches(kind, batch_size, seed, stop):
  make = lambda: KINDS[kind](NumberedSource(2, 90), batch_size, LENGTH, seed=seed)
  whole, positions = read_all(make(), 8)
  rest, last = read_all(make(), 8 - stop, positions[stop - 1], stop)
  for a, b in zip(whole[stop:], rest, strict=True):
    assert_same(a, b)
  np.testing.assert_array_equal(positions[-1], last[-1])
  for batch, position in zip(whole, positions):
    check_shapes(batch, batch_size, LENGTH)
    assert position.dtype == np.int64 and position.size <= 3 * batch_size


@pytest.mark.parametrize("kind", KINDS)
def test_reading_changes_neither_the_reader_nor_the_position(kind):
  reader = KINDS[kind](NumberedSource(2, 90), 3, LENGTH)
  whole, positions = read_all(reader, 6)
  before = positions[2].copy()
  again, _ = read_all(reader, 3, positions[2], 3)
  for a, b in zip(whole[3:], again, strict=True):
    assert_same(a, b)
  np.testing.assert_array_equal(positions[2], before)
  other, _ = read_all(KINDS[kind](NumberedSource(2, 90), 3, LENGTH, seed=1), 1)
  assert (other[0]["lengths"] != whole[0]["lengths"]).any() or (
      other[0]["weights"] != whole[0]["weights"]
  ).any()


@pytest.mark.parametrize("kind", KINDS)
@hypothesis.given(mine=st.sets(st.integers(0, 4), min_size=1, max_size=4))
def test_rows_are_the_same_for_any_number_of_processes(kind, mine):
  make = lambda rows: KINDS[kind](NumberedSource(2, 90), 5, LENGTH, rows=rows)
  whole, positions = read_all(make(None), 6)
  for rows in (sorted(mine), sorted(set(range(5)) - mine)):
    batches, mine_positions = read_all(make(rows), 6)
    for step in range(6):
      for name in whole[step]:
        np.testing.assert_array_equal(batches[step][name], whole[step][name][rows])
      if kind == "following":
        np.testing.assert_array_equal(mine_positions[step], positions[step][rows])


@hypothesis.given(
    batch_size=st.integers(1, 4), length=st.integers(1, 12), seed=st.integers(0, 99)
)
def test_a_row_gives_its_documents_back(batch_size, length, seed):
  source = NumberedSource(2, 40)
  reader = FollowingReader(source, batch_size, length, seed=seed)
  batches, _ = read_all(reader, 60)
  for row in range(batch_size):
    document, ordinal = None, -1
    for batch in [{k: v[row] for k, v in batch.items()} for batch in batches]:
      if batch["start_of_sequence"]:
        assert document is None or offset == len(document) - 1  # The one before is complete.
        ordinal, offset = ordinal + 1, 0
        document, weights = source.example(seed, ordinal * batch_size + row, 0)
      n = batch["lengths"]
      assert n > 0
      np.testing.assert_array_equal(batch["tokens"][:n], document[offset : offset + n])
      np.testing.assert_array_equal(batch["targets"][:n], document[offset + 1 : offset + n + 1])
      np.testing.assert_array_equal(batch["weights"][:n], weights[offset + 1 : offset + n + 1])
      offset += n
      assert n == length or offset == len(document) - 1  # Padding at an end only.
    assert ordinal > 0


def test_a_document_is_made_once_while_a_row_follows_it():
  source = NumberedSource(100, 100)
  read_all(FollowingReader(source, 4, 33), 6)  # 99 tokens are three steps of 33.
  assert source.calls == [0, 1, 2, 3, 4, 5, 6, 7]


def test_a_curriculum_looks_at_the_step_at_which_a_document_began():
  vocabulary = load_vocabulary("passkey_words")
  lengths = Lengths(1, ((0, 1), (4, 6)), unit=72)
  make = lambda: FollowingReader(PassKeyExamples(vocabulary, lengths), 8, 72, seed=3)
  whole, positions = read_all(make(), 40)
  starts = np.array([batch["start_of_sequence"] for batch in whole])  # [steps, B]
  assert starts[:5].all() and not starts[5:].all(1).any()
  assert 0.15 < starts[5:].mean() < 0.45  # 3.5 steps a document.
  assert all((batch["lengths"] == 72).all() for batch in whole)  # Whole steps: no padding.
  for stop in (3, 5, 11, 30):
    rest, _ = read_all(make(), 40 - stop, positions[stop - 1], stop)
    for a, b in zip(whole[stop:], rest, strict=True):
      assert_same(a, b)


def test_the_answer_is_at_the_end_of_a_pass_key_row():
  vocabulary = load_vocabulary("passkey_words")
  source = PassKeyExamples(vocabulary, Lengths(3, 5, unit=32))
  batch, _ = ExampleReader(source, 16, 160).read(np.zeros(1, np.int64), 0)
  assert set(batch["lengths"]) == {96, 128, 160}
  for row, n in enumerate(batch["lengths"]):
    assert np.flatnonzero(batch["weights"][row]).tolist() == list(range(n - 5, n))
    key = vocabulary.decode(batch["targets"][row, n - 5 : n].tolist())
    text = vocabulary.decode([*batch["tokens"][row, :n].tolist(), batch["targets"][row, n - 1]])
    assert text.count(key) == 3 and text.endswith(f"The pass key is {key}")


def test_long_examples_are_cut():
  batch, _ = ExampleReader(NumberedSource(40, 40), 2, 8).read(np.zeros(1, np.int64), 0)
  assert batch["tokens"].tolist() == [[*range(1000, 1008)], [*range(2000, 2008)]]
  assert batch["targets"][:, -1].tolist() == [1008, 2008]
  assert batch["lengths"].tolist() == [8, 8]


@hypothesis.given(batch_size=st.integers(1, 4), length=st.integers(60, 99), seed=st.integers(0, 9))
def test_packs_hold_the_examples_and_the_repeated_segment(batch_size, length, seed):
  source = NumberedSource(2, 30)
  reader = PackedReader(source, batch_size, length, repeat_length=10, seed=seed)
  batches, positions = read_all(reader, 3)
  prompt = reader.vocabulary.encode(REPEAT_PROMPT)
  body = length + 1 - len(prompt) - 10
  index = 0
  for batch, position in zip(batches, positions):
    for row in range(batch_size):
      tokens = np.append(batch["tokens"][row], batch["targets"][row, -1])
      expected, weights = [], []
      while len(expected) < body:
        example = source.example(seed, index, 0)
        expected += example[0].tolist()
        weights += example[1].tolist()
        index += 1
      assert tokens[:body].tolist() == expected[:body]
      assert tokens[body:-10].tolist() == prompt
      segment = tokens[-10:].tolist()
      assert segment in [expected[i : i + 10] for i in range(body - 9)]
      got = batch["weights"][row]
      np.testing.assert_array_equal(got[: body - 1], np.float32(weights[1:body]))
      np.testing.assert_array_equal(got[body - 1 : -10], 0)
      np.testing.assert_array_equal(got[-10:], np.float32(0.1))
      assert batch["lengths"][row] == length
    assert position.tolist() == [index]


def test_the_repeat_is_off_at_length_0():
  reader = PackedReader(NumberedSource(5, 5), 1, 20, repeat_length=0)
  batch, position = reader.read(reader.start(), 0)
  assert batch["tokens"][0].tolist() == [1000 * (1 + i // 5) + i % 5 for i in range(20)]
  assert position.tolist() == [5]  # 21 tokens: the last target is the fifth example's first.


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda s: ExampleReader(s, 0, 8), "batch_size 0"),
        (lambda s: FollowingReader(s, 1, 8, seed=-1), "seed -1"),
        (lambda s: ExampleReader(s, 4, 8, rows=(2, 4)), r"rows \(2, 4\) are not rising numbers"),
        (lambda s: ExampleReader(s, 4, 8, rows=(2, 1)), r"rows \(2, 1\) are not rising numbers"),
        (lambda s: PackedReader(s, 1, 300), "length of 300 tokens cannot hold a segment of 256"),
        (lambda s: PackedReader(s, 1, 300, repeat_length=-1), "repeat_length -1"),
        (lambda s: PairExamples([], s.vocabulary), "no .* pairs"),
        (
            lambda s: ExampleReader(PassKeyExamples(s.vocabulary, Lengths(300, 400)), 1, 399),
            "up to 400 tokens do not fit a length of 399",
        ),
    ],
)
def test_what_makes_no_sense_is_named(make, message):
  with pytest.raises(UserError, match=message):
    make(NumberedSource())


def test_reading_needs_neither_tensorflow_nor_jax():
  program = """
import sys
import famjax, famjax.data as data
for name in ("bytes", "passkey_words"):
  source = data.PassKeyExamples(data.load_vocabulary(name), data.Lengths(300, 400))
  for reader in (data.FollowingReader(source, 2, 64), data.ExampleReader(source, 2, 400)):
    step, batch, position = next(data.prefetch(reader, reader.start(), 0))
data.LongText(data.load_vocabulary("bytes")).example(0, 0, 0)
print(sorted({"tensorflow", "seqio", "t5", "sentencepiece", "jax"} & set(sys.modules)))
"""
  done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
  assert done.stdout.strip() == "[]", done.stderr
