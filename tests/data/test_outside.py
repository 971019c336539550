"""Tokens that the model lacks: refused before training begins, whatever the data comes from."""

import numpy as np
import pytest

from famjax.data import ExampleReader, Lengths, PairExamples, PassKeyExamples, QuestionExamples, prefetch
from famjax.data.outside import check_inside
from famjax.data.vocabularies import ByteVocabulary, WordVocabulary, check_fits, load_vocabulary
from famjax.errors import UserError
from famjax.training import loop
from tests.training import toy


class Lacking(ByteVocabulary):
  """Bytes, and tokens that the model lacks."""

  def __init__(self, **outside):
    self.outside = {f"<{name}>": token for name, token in outside.items()}

  def encode(self, text):
    for name, token in self.outside.items():
      if name.casefold() in text.casefold():
        raise UserError(f"the model lacks the token {name!r} (id {token})")
    return super().encode(text)


def test_a_text_is_encoded_only_if_it_could_hold_one():
  vocabulary = Lacking(tool=300)
  for text in ("a <TOOL> b", "<tool>"):
    with pytest.raises(UserError, match="a.txt, record 3: the model lacks the token '<tool>'"):
      check_inside(vocabulary, text, "a.txt, record 3")
  vocabulary.encode = None  # nothing calls it
  check_inside(vocabulary, "a tool <b>", "a.txt")
  vocabulary.outside = {}
  check_inside(vocabulary, "<tool>", "a.txt")


def test_a_piece_of_a_word_is_looked_for_in_every_text():
  vocabulary = Lacking()
  vocabulary.outside = {"\u2581to": 300}  # stands for " to"; what it is of a text, encoding alone says
  encoded = []
  vocabulary.encode = encoded.append
  check_inside(vocabulary, "go to", "a.txt")
  assert encoded == ["go to"]


@pytest.mark.parametrize(
    "pairs, message",
    [
        ([("a", "b"), ("a", "<tool>")], "pair 1: the model lacks the token '<tool>'"),
        ([("a\ud800", "b")], "pair 0 is not UTF-8 at character 1"),
        ([("a", 3)], r"pair 0 is \('a', 3\): give an instruction and an answer"),
        ([("a", "b", "c")], "pair 0 is .*: give an instruction and an answer"),
    ],
)
def test_pairs_are_looked_through(pairs, message):
  with pytest.raises(UserError, match=message):
    PairExamples(pairs, Lacking(tool=300)).check()
  PairExamples([("a", "b")], Lacking(tool=300)).check()


@pytest.mark.parametrize(
    "make, piece, what",
    [
        (lambda v: QuestionExamples(v, "remember", 60, 90), ": ba", "task 'remember'"),
        (lambda v: PassKeyExamples(v, Lengths(400, 500)), "\u0120sky", "the pass key text"),
    ],
)
def test_texts_that_are_made_are_refused_if_they_could_hold_one(make, piece, what):
  make(Lacking(tool=300)).check()  # no text has such brackets
  vocabulary = Lacking()
  vocabulary.outside = {piece: 300}  # this encode finds none of them: how they are spelt is not known
  vocabulary.encode = ByteVocabulary().encode
  with pytest.raises(UserError, match=f"{what}: a text may hold the token .* .id 300.*--resize_vocabulary"):
    make(vocabulary).check()


@pytest.mark.parametrize("name", ["pad_id", "eos_id", "begin_ids", "stop_ids"])
def test_ids_around_texts_fit_the_model(name):
  vocabulary = WordVocabulary("abc")
  check_fits(vocabulary, vocabulary.vocab_size)
  for wrong in (vocabulary.vocab_size, -1):
    value = (1, wrong) if name.endswith("s") else wrong
    setattr(vocabulary, name, value)
    with pytest.raises(UserError, match=f"is {wrong}.*, and the model's ids end at"):
      check_fits(vocabulary, 6 if wrong == 6 else vocabulary.vocab_size)


def test_training_is_refused_before_anything_is_written(tmp_path):
  words = load_vocabulary("passkey_words")
  for change, message in (
      (dict(pad_id=10**6), "pad_token_id is 1000000, and the model's ids end at"),
      (dict(outside={"sky": 300}), "pair 0: lacks"),
  ):
    vocabulary = WordVocabulary(words._symbols)  # pylint: disable=protected-access
    vars(vocabulary).update(change)
    if "outside" in change:
      vocabulary.encode = lambda text: (_ for _ in ()).throw(UserError("lacks"))
    model = toy.dataclasses.replace(toy.MODEL, vocab_size=vocabulary.vocab_size)
    reader = ExampleReader(PairExamples([("sky", "blue")], vocabulary), 2, 8)
    with pytest.raises(UserError, match=message):
      loop.train(tmp_path / "run", model, reader, toy.OPTIMIZER, toy.TRAIN)
    assert not (tmp_path / "run").exists()


class Wrong(toy.ToyReader):
  """Has an id in its third batch that the model lacks."""

  def read(self, position, step):
    batch, position = super().read(position, step)
    if step == 2:
      batch["targets"] = batch["targets"].copy()
      batch["targets"][1, 3] = self.seed
    return batch, position


@pytest.mark.parametrize("wrong", [16, 2**31 - 1])
def test_an_id_that_the_model_lacks_never_reaches_it(wrong):
  ahead = prefetch(Wrong(seed=wrong), np.zeros(2, np.int64), 0, vocab_size=16)
  message = f"step 2: row 1 of the batch has the token {wrong} at 3, and the model's vocab_size is 16"
  assert next(ahead)[0] == 0
  with pytest.raises(UserError, match=message):
    list(ahead)


def test_training_looks_at_the_ids_of_every_batch(tmp_path):
  with pytest.raises(UserError, match="step 2: row 1 of the batch has the token 16 at 3"):
    loop.train(tmp_path / "run", toy.MODEL, Wrong(seed=16), toy.OPTIMIZER, toy.TRAIN)
