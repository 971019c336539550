"""Packing: exact lengths, every example in order, the weights of SPEC section 5."""

import hypothesis
import hypothesis.strategies as st
import numpy as np

from famjax.data.examples import join
from famjax.data.examples import PairExamples
from famjax.data.packing import pack
from famjax.data.packing import repeat_segment
from famjax.data.vocabularies import load_vocabulary

PAIRS = st.lists(
    st.tuples(
        st.lists(st.integers(3, 99), max_size=9), st.lists(st.integers(100, 199), max_size=9)
    ),
    max_size=12,
)


@hypothesis.given(PAIRS, st.integers(1, 80))
def test_a_pack_is_the_examples_one_after_another(pairs, length):
  examples = [join(*pair) for pair in pairs]
  tokens, weights, used = pack(iter(examples), length)
  whole = [token for inputs, targets in pairs for token in inputs + targets]
  assert tokens.tolist() == whole[:length]
  assert tokens.dtype == np.int32 and weights.dtype == np.float32
  np.testing.assert_array_equal(weights, (tokens >= 100).astype(np.float32))
  assert sum(len(t) for t, _ in examples[:used]) >= len(tokens)
  assert used == 0 or sum(len(t) for t, _ in examples[: used - 1]) < length


@hypothesis.given(st.integers(1, 200), st.integers(1, 60), st.integers(0, 9), st.integers(0, 999))
def test_the_repeated_segment_is_in_the_pack(size, length, prompt, seed):
  length = min(length, size)
  rng = np.random.default_rng(seed)
  tokens = rng.integers(0, 50, size).astype(np.int32)
  weights = rng.integers(0, 2, size).astype(np.float32)
  out, out_weights = repeat_segment(rng, tokens, weights, [7] * prompt, length)
  assert len(out) == len(out_weights) == size + prompt + length
  np.testing.assert_array_equal(out[:size], tokens)
  np.testing.assert_array_equal(out_weights[:size], weights)
  assert out[size : size + prompt].tolist() == [7] * prompt
  assert not out_weights[size : size + prompt].any()
  assert (out_weights[size + prompt :] == np.float32(0.1)).all()
  segment = out[size + prompt :].tolist()
  assert any(tokens[i : i + length].tolist() == segment for i in range(size - length + 1))


def test_every_place_can_be_repeated():
  rng = np.random.default_rng(0)
  tokens = np.arange(5, dtype=np.int32)
  starts = {int(repeat_segment(rng, tokens, tokens * 0.0, [], 3)[0][5]) for _ in range(100)}
  assert starts == {0, 1, 2}


def test_pairs_are_answers_with_an_end():
  vocabulary = load_vocabulary("bytes")
  pairs = [("1 + 1 =", " 2"), ("2 + 2 =", " 4"), ("3 + 3 =", " 6")]
  source = PairExamples(pairs, vocabulary)
  seen = []
  for index in range(3, 6):
    tokens, weights = source.example(0, index, 0)
    assert vocabulary.decode(tokens[weights == 0].tolist()) + vocabulary.decode(
        tokens[weights == 1].tolist()
    ) == vocabulary.decode(tokens.tolist())
    assert tokens[-1] == vocabulary.eos_id and weights[-1] == 1
    seen.append(vocabulary.decode(tokens.tolist()))
  assert sorted(seen) == [a + b for a, b in pairs]
