"""Vocabularies: text comes back as it was, ids stay in range, wrong names give one line."""

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from famjax.data import passkey
from famjax.data.vocabularies import absolute
from famjax.data.vocabularies import load_vocabulary
from famjax.data.vocabularies import WordVocabulary
from famjax.errors import UserError
from tests.data.pieces import sentencepiece_model


@hypothesis.given(st.text())
def test_bytes_are_lossless(text):
  vocabulary = load_vocabulary("bytes")
  ids = vocabulary.encode(text)
  assert len(ids) == len(text.encode())
  assert all(3 <= i < vocabulary.vocab_size for i in ids)
  assert vocabulary.decode([*ids, vocabulary.eos_id, vocabulary.pad_id]) == text


def test_bytes_of_half_a_character_are_replaced():
  vocabulary = load_vocabulary("bytes")
  assert vocabulary.decode(vocabulary.encode("aé")[:-1]) == "a\ufffd"


@hypothesis.given(st.lists(st.integers(-2, 600)))
def test_any_ids_decode(ids):
  for name in ("bytes", "passkey_words"):
    assert isinstance(load_vocabulary(name).decode(np.array(ids, np.int32)), str)


@hypothesis.given(st.integers(0, 10**9 - 1), st.integers(0, 40))
def test_words_are_lossless_on_pass_key_texts(number, repeats):
  vocabulary = load_vocabulary("passkey_words")
  key = f"{number:09d}"
  text = passkey.HEAD.format(key=key) + passkey.FILLER * repeats
  text += passkey.QUESTION.format(key=key) + "." + passkey.QUESTION.format(key=key)
  ids = vocabulary.encode(text)
  assert vocabulary.unk_id not in ids
  assert vocabulary.decode(ids) == text


def test_words_are_few_and_closed():
  vocabulary = load_vocabulary("passkey_words")
  assert vocabulary.vocab_size == len(vocabulary._symbols) <= 64
  assert vocabulary.encode("The zebra is 42.").count(vocabulary.unk_id) == 1
  assert vocabulary.decode(vocabulary.encode("The zebra is 42.")) == "The <unk> is 42."
  assert vocabulary.encode("42") == WordVocabulary("0123456789").encode("42")


@pytest.mark.parametrize("adds_space, trims", [(True, True), (True, False), (False, False)])
def test_sentencepiece_joins_parts_as_if_they_were_one_text(tmp_path, adds_space, trims):
  vocabulary = load_vocabulary(sentencepiece_model(tmp_path, adds_space, trims))
  head, question = passkey.HEAD.format(key="01234"), passkey.QUESTION.format(key="01234")
  whole = vocabulary.encode(head + passkey.FILLER + question)
  assert whole == sum(map(vocabulary.encode, (head, passkey.FILLER, question)), [])
  assert vocabulary.decode(whole) == head + passkey.FILLER + question
  assert max(whole) < vocabulary.vocab_size and vocabulary.eos_id == 1


def test_a_missing_or_wrong_file_is_named(tmp_path):
  with pytest.raises(UserError, match="nowhere.model.*passkey_words"):
    load_vocabulary(str(tmp_path / "nowhere.model"))
  broken = tmp_path / "broken.model"
  broken.write_text("not a model")
  with pytest.raises(UserError, match="broken.model"):
    load_vocabulary(str(broken))


def test_a_name_that_means_the_same_in_any_folder(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  path = sentencepiece_model(tmp_path / "m")
  assert absolute("m/tiny.model") == path and absolute("bytes") == "bytes"
