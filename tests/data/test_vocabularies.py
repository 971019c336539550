"""Vocabularies: text comes back as it was, ids stay in range, wrong names give one line."""

import pathlib

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from famjax.data import passkey
from famjax.data.examples import join_texts
from famjax.data.sentencepieces import SentencePieceVocabulary
from famjax.data.vocabularies import absolute, begun, check_fits, encode_after, encode_pair, encode_text
from famjax.data.vocabularies import load_vocabulary, WordVocabulary
from famjax.errors import UserError
from tests.data import vocabulary_kinds as kinds
from tests.data.pieces import sentencepiece_model
from tests.mutations import survives


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
  rest = [encode_after(vocabulary, text) for text in (passkey.FILLER, question)]
  assert whole == sum(rest, vocabulary.encode(head))
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


JOINING = {name: (lambda name=name: kinds.encoding_kind(name)) for name in kinds.ENCODERS} | {
    "byte level, space": lambda: kinds.byte_level(True),
    "byte level": lambda: kinds.byte_level(False),
    "bytes": lambda: load_vocabulary("bytes"),
    "pieces, all spaces": kinds.KINDS["pieces, all spaces"],
    "pieces, as they are": kinds.KINDS["pieces, as they are"],
}
_CODE = [
    ("def f(x):\n", "    return x"), ("a", "b"), ("a ", "b"), ("a", " b"), ("a\n", "  b"), (" a", " b"),
    ("a", "    b"), ("a  ", "  b"), ("x", ".")
]  # fmt: skip


@pytest.mark.parametrize("kind", JOINING)
@hypothesis.settings(max_examples=60)
@hypothesis.given(
    pair=st.sampled_from(_CODE) | st.tuples(*[st.text("ab \n.\u65e5", min_size=1, max_size=6)] * 2)
)
def test_texts_that_go_on_join_to_the_text_of_both(kind, pair):
  vocabulary, (inputs, targets) = JOINING[kind](), pair
  tokens, weights = join_texts(vocabulary, inputs, targets)
  ids = tokens.tolist()
  alone = vocabulary.decode(vocabulary.encode(inputs + targets))
  if kind == "metaspace decoder":  # it drops all spaces of a first token
    assert vocabulary.decode(ids).lstrip(" ") == alone.lstrip(" ")
  else:
    assert vocabulary.decode(ids) == alone
  if "pieces" not in kind:  # SentencePiece makes lines one
    assert alone.lstrip(" ") == (inputs + targets).lstrip(" ")
  first, rest = encode_pair(vocabulary, inputs, targets)
  assert ids == [*first, *rest, vocabulary.eos_id]
  assert first == encode_text(vocabulary, inputs) and weights.tolist() == [0] * len(first) + [1] * (len(rest) + 1)
  whole = encode_text(vocabulary, inputs + targets)
  if whole[: len(first)] == first:  # no token reaches across
    assert [*first, *rest] == whole
  # What stands before the text is not known, as after a reading.
  assert vocabulary.decode([*first, *encode_after(vocabulary, targets)]) == vocabulary.decode(ids)


def test_the_four_spaces_of_an_indent_stay():
  for kind in JOINING:
    vocabulary = JOINING[kind]()
    tokens, _ = join_texts(vocabulary, "def f(x):\n", "    return x")
    line = " " if "pieces" in kind else "\n"
    assert vocabulary.decode(tokens.tolist()).lstrip() == f"def f(x):{line}    return x", kind


@pytest.mark.parametrize("kind", ["pieces", "unigram", "pieces, no prefix"])
def test_texts_of_tokenizers_that_drop_spaces(kind):
  vocabulary = kinds.KINDS[kind]()
  for inputs, targets in [*_CODE[1:5], ("the sky", " is blue"), ("the sky is ", "blue"), ("re", "turn")]:
    whole, (first, rest) = vocabulary.encode(inputs + targets), encode_pair(vocabulary, inputs, targets)
    assert vocabulary.decode([*first, *rest]) == vocabulary.decode(whole)


@pytest.mark.parametrize("kind", kinds.ENCODERS)
def test_ids_of_a_text_are_those_of_transformers(kind):
  transformers = pytest.importorskip("transformers", reason="the extra hf brings it")
  vocabulary = kinds.encoding_kind(kind)
  theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=f"{vocabulary.path}/tokenizer.json")
  for text in ("the sky", " the sky", "  x", "\n", "\u65e5", "a<tool> is<note>the", " <tool> x"):
    assert encode_text(vocabulary, text) == theirs(text)["input_ids"]
    assert vocabulary.decode(vocabulary.encode(text)) == theirs.decode(
        theirs(text)["input_ids"], skip_special_tokens=True, clean_up_tokenization_spaces=False
    )


def test_a_begin_symbol_is_written_once():
  """transformers writes it twice before a text that has it; nothing here does."""
  vocabulary = kinds.encoding_kind("gemma")
  assert vocabulary.begin_ids == [1]
  ids = vocabulary.encode("is")
  for text in ("is", "<s>is"):
    assert encode_text(vocabulary, text) == [1, *ids] == begun(vocabulary, ids)
    assert encode_pair(vocabulary, text, "x")[0] == [1, *ids]
    assert join_texts(vocabulary, text, "x")[0].tolist()[: 1 + len(ids)] == [1, *ids]
  assert begun(load_vocabulary("bytes"), [4]) == [4]


def test_an_id_that_the_model_has_not_is_refused(tmp_path):
  for config, message in (
      ({"eos_token_id": 99}, r"eos_token_id is 99, and the model's ids end at 9: .*--resize_vocab"),
      ({"eos_token_id": [2, -3]}, "eos_token_id is -3"),
      ({"pad_token_id": 10}, "pad_token_id is 10"),
      ({"eos_token_id": 400}, "eos_token_id is 400"),
  ):
    name = str(config)
    vocabulary = load_vocabulary(kinds.save(tmp_path / name, kinds.document(), **config))
    with pytest.raises(UserError, match=message):
      check_fits(vocabulary, 10)
  check_fits(vocabulary, 401)
  check_fits(load_vocabulary("bytes"), 259)
  only_pad = load_vocabulary(kinds.save(tmp_path / "pad", kinds.document(), pad_token_id=10))
  check_fits(only_pad, 10, padding=False)  # read and written without padding
  none = load_vocabulary(kinds.save(tmp_path / "none", kinds.document(), pad_token_id=-1))
  assert none.pad_id == none.eos_id  # as Llama's first release has it


@pytest.mark.parametrize("kind", kinds.KINDS)
def test_half_of_a_surrogate_pair_is_one_line(kind):
  vocabulary = kinds.KINDS[kind]()
  for encode in (vocabulary.encode, lambda t: encode_text(vocabulary, t), lambda t: encode_pair(vocabulary, "a", t)):
    with pytest.raises(UserError, match="the text is not UTF-8 at character 2; convert it"):
      encode("ab\ud800c")


def test_bytes_that_are_no_model_are_one_line(tmp_path):
  """A model whose bytes are changed is refused, or reads texts."""
  good = (tmp_path / "m.model")
  good.write_bytes(pathlib.Path(kinds.KINDS["pieces"]().path).read_bytes())
  data, random = good.read_bytes(), np.random.default_rng(0)

  def act(path):
    vocabulary = SentencePieceVocabulary(str(path))
    vocabulary.decode(vocabulary.encode("the sky is \u65e5"))
    vocabulary.decode(range(300))
    encode_after(vocabulary, "x", "y")

  for number in range(300):
    broken = bytearray(data[: random.integers(len(data))] if number % 3 == 0 else data)
    for place in random.integers(len(broken) or 1, size=1 + number % 4):
      broken[place : place + 1] = bytes(random.integers(256, size=1 + number % 5).astype(np.uint8))
    path = tmp_path / f"{number}.model"
    path.write_bytes(broken)
    survives(lambda path=path: act(path), number)
