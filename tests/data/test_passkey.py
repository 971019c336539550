"""PassKey: the paper's text to the letter, exact lengths, weights on the answer's digits alone."""

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from famjax.data import passkey
from famjax.data.passkey import Lengths
from famjax.data.passkey import PassKeyExamples
from famjax.data.passkey import PassKeyFormat
from famjax.data.vocabularies import load_vocabulary
from famjax.errors import UserError
from tests.data import vocabulary_kinds as kinds
from tests.data.pieces import sentencepiece_model

NAMES = st.sampled_from(["bytes", "passkey_words"])
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."


def the_paper(key: str, filler: str) -> str:
  """The format of SPEC section 6, copied from there."""
  return (
      "There is an important info hidden inside a lot of irrelevant text. Find it and memorize"
      " them. I will quiz you about the important information there. The pass key is <PASS KEY>."
      " Remember it. <PASS KEY> is the pass key. <filler> What is the pass key? The pass key is"
      " <PASS KEY>"
  ).replace("<PASS KEY>", key).replace("<filler>", filler)


@pytest.mark.parametrize("name", ["bytes", "passkey_words", "sentencepiece"])
def test_the_text_is_the_papers(name, tmp_path):
  name = sentencepiece_model(tmp_path) if name == "sentencepiece" else name
  vocabulary = load_vocabulary(name)
  sentence = len(vocabulary.encode(" " + FILLER))
  tokens, weights = PassKeyFormat(vocabulary).write(np.random.default_rng(3), 2 * sentence)
  key = vocabulary.decode(tokens[weights > 0].tolist())
  assert len(key) == 5 and key.isdigit()
  assert vocabulary.decode(tokens.tolist()) == the_paper(key, f"{FILLER} {FILLER}")
  assert tokens.dtype == np.int32 and weights.dtype == np.float32
  assert weights[-1] == 1 and set(weights) == {0.0, 1.0}


@pytest.mark.parametrize("kind", kinds.ENCODERS)
def test_the_text_is_the_papers_for_tokenizers_that_put_spaces_before_texts(kind):
  vocabulary = kinds.encoding_kind(kind)
  layout = PassKeyFormat(vocabulary)
  filler = len(layout._filler)
  options = dict(question_probability=1.0, question_every=2 * filler)
  for more in ({}, options):
    tokens, weights = layout.write(np.random.default_rng(3), 4 * filler, **more)
    text = vocabulary.decode(tokens.tolist())
    key = text[-5:]
    assert tokens[0] == 1 and 1 not in tokens[1:]
    assert set(vocabulary.decode(tokens[weights > 0].tolist())) <= set(key)
    if not more:
      assert text == the_paper(key, " ".join([FILLER] * 4))


@hypothesis.given(NAMES, st.integers(0, 700), st.integers(1, 18), st.integers(0, 2**32))
def test_lengths_and_weights(name, filler, digits, seed):
  vocabulary = load_vocabulary(name)
  rngs = [np.random.default_rng(seed) for _ in range(3)]
  shortest, _ = PassKeyFormat(vocabulary, digits).write(rngs[0], 0)
  tokens, weights = PassKeyFormat(vocabulary, digits).write(rngs[1], filler)
  assert len(tokens) == len(weights) == len(shortest) + filler
  assert weights.sum() == digits and np.all(weights[-digits:] == 1)
  same, _ = PassKeyFormat(vocabulary, digits).write(rngs[2], total_tokens=len(tokens))
  np.testing.assert_array_equal(tokens, same)


def test_keys_are_uniform_with_leading_zeros():
  vocabulary = load_vocabulary("passkey_words")
  rng = np.random.default_rng(0)
  keys = [PassKeyFormat(vocabulary, 2).write(rng, 0)[0][-2:] for _ in range(2000)]
  first = [vocabulary.decode([int(key[0])]) for key in keys]
  assert sorted(set(first)) == list("0123456789")
  assert all(140 <= first.count(digit) <= 260 for digit in "0123456789")


@hypothesis.given(NAMES, st.integers(0, 2000), st.integers(20, 200), st.integers(0, 2**32))
def test_inner_questions(name, filler, every, seed):
  layout = PassKeyFormat(load_vocabulary(name), key_digits=3)
  options = dict(question_probability=1.0, question_every=every)
  tokens, weights = layout.write(np.random.default_rng(seed), filler, **options)
  plain, _ = layout.write(np.random.default_rng(seed), filler)
  assert len(tokens) == len(plain)
  question = len(layout.vocabulary.encode(passkey.QUESTION.format(key="123")))
  head = len(plain) - filler - question
  np.testing.assert_array_equal(tokens[:head], plain[:head])
  np.testing.assert_array_equal(tokens[-question:], plain[-question:])
  # Each answer is the key, and no stretch has two of them.
  answers = tokens[weights > 0].reshape(-1, 3)
  assert (answers == answers[-1]).all()
  stretches = np.flatnonzero(weights[: len(tokens) - question])[::3] // every
  assert len(set(stretches)) == len(stretches)
  # Every whole stretch of filler that can hold a question has one.
  if every > question:
    first, last = -(-head // every), (head + filler) // every
    assert set(range(first, last)) <= set(stretches)
  text = layout.vocabulary.decode(tokens.tolist())
  assert text.count("What is the pass key?") == len(answers)


def test_inner_questions_come_as_often_as_asked():
  layout = PassKeyFormat(load_vocabulary("passkey_words"))
  rng = np.random.default_rng(0)
  _, weights = layout.write(rng, 200_000, question_probability=0.25, question_every=100)
  assert 400 <= weights.sum() / 5 - 1 <= 600


@hypothesis.given(
    st.integers(1, 9), st.integers(0, 9), st.integers(1, 50), st.integers(0, 99),
    st.sampled_from(["uniform", "log_uniform"]),
)
def test_drawn_lengths_stay_in_their_range(low, more, unit, seed, distribution):
  lengths = Lengths(low, low + more, unit, distribution)
  rng = np.random.default_rng(seed)
  drawn = [lengths.draw(rng, step) for step in range(50)]
  assert all(n % unit == 0 and low * unit <= n <= (low + more) * unit for n in drawn)
  assert (lengths.shortest(), lengths.longest()) == (low * unit, (low + more) * unit)


def test_both_ends_are_drawn_and_log_uniform_prefers_short_ones():
  rng = np.random.default_rng(0)
  for distribution in ("uniform", "log_uniform"):
    lengths = Lengths(1, 16, 8, distribution)
    drawn = [lengths.draw(rng, 0) // 8 for _ in range(4000)]
    assert set(drawn) == set(range(1, 17))
    low = np.mean(np.array(drawn) <= 4)
    assert (0.2 < low < 0.3) if distribution == "uniform" else (0.52 < low < 0.62)


def test_a_curriculum_raises_the_longest():
  lengths = Lengths(1, ((0, 1), (100, 2), (200, 8)), unit=10)
  rng = np.random.default_rng(0)
  longest = lambda step: max(lengths.draw(rng, step) for _ in range(200))
  assert [longest(step) for step in (0, 99, 100, 199, 200, 10**6)] == [10, 10, 20, 20, 80, 80]
  assert lengths.longest() == 80
  assert [lengths.longest(step) for step in (-1, 0, 99, 100, 10**6)] == [10, 10, 10, 20, 80]


@pytest.mark.parametrize("measure", ["document", "filler"])
def test_the_source_is_pure_and_measures_what_it_says(measure):
  vocabulary = load_vocabulary("passkey_words")
  make = lambda: PassKeyExamples(vocabulary, Lengths(80, 200), measure=measure)
  source = make()
  extra = {"document": 1, "filler": 67}[measure]
  sizes = set()
  for index in range(100):
    tokens, weights = source.example(5, index, 0)
    again, same = make().example(5, index, 0)
    np.testing.assert_array_equal(tokens, again)
    np.testing.assert_array_equal(weights, same)
    sizes.add(len(tokens))
  assert 80 + extra <= min(sizes) < max(sizes) <= 200 + extra == source.longest + 1
  assert source.example(6, 0, 0)[0].tolist() != source.example(5, 0, 0)[0].tolist()


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda v: PassKeyFormat(v).write(np.random.default_rng(0), total_tokens=66), "66 .*67"),
        (lambda v: PassKeyFormat(v).write(np.random.default_rng(0)), "filler_tokens or total_tokens"),
        (lambda v: PassKeyExamples(v, Lengths(1, 9, unit=16)), "too short"),
        (lambda v: PassKeyExamples(v, Lengths(99, 99), measure="blocks"), "measure 'blocks'"),
        (lambda v: PassKeyExamples(v, Lengths(99, 99), question_probability=0.5), "question_every"),
        (lambda v: PassKeyExamples(v, Lengths(99, 99), question_probability=2), "probability 2"),
        (lambda v: PassKeyFormat(v, 0), "key_digits 0"),
        (lambda v: Lengths(3, 2), "high 2 is below low 3"),
        (lambda v: Lengths(0, 2, distribution="log_uniform"), "low 0"),
        (lambda v: Lengths(1, 2, distribution="normal"), "'normal'"),
        (lambda v: Lengths(1, ((5, 2),)), "starts at step 0"),
        (lambda v: Lengths(1, ()), "starts at step 0"),
    ],
)
def test_what_makes_no_sense_is_named(make, message):
  with pytest.raises(UserError, match=message):
    make(load_vocabulary("passkey_words"))
