"""Decoding token by token gives what decoding at once gives, for every kind of vocabulary."""

import time

import hypothesis
import hypothesis.strategies as st
import pytest

from famjax.data import decoding
from famjax.data.vocabularies import decoder_of
from tests.data import vocabulary_kinds as kinds
from tests.data.vocabulary_kinds import KINDS

pytest.importorskip("tokenizers", reason="the core runs without it")


def decoded(vocabulary, ids):
  """All that a decoder gives, token by token."""
  decoder = decoder_of(vocabulary)
  return "".join(map(decoder.push, ids)) + decoder.end()


def byte_tokens(vocabulary, data):
  """Ids of `<0xE6>` and so on; the last ids of a vocabulary without them."""
  if hasattr(vocabulary, "_tokenizer"):
    known = vocabulary._tokenizer.token_to_id
  else:
    known = getattr(getattr(vocabulary, "_model", None), "piece_to_id", lambda name: None)
  return [known(f"<0x{byte:02X}>") or vocabulary.vocab_size - 1 - byte % 7 for byte in data]


@st.composite
def sequences(draw, vocabulary):
  """Any ids: text, special tokens, runs of bytes that are characters and such that are not."""
  parts = draw(
      st.lists(
          st.one_of(
              st.lists(st.integers(-2, vocabulary.vocab_size + 1), max_size=6),
              st.integers(0, 4).map(lambda i: [i]),
              st.text("\u65e5\u672c\u00e9\U0001f600", max_size=3).map(
                  lambda text: byte_tokens(vocabulary, text.encode())
              ),
              st.binary(max_size=4).map(lambda data: byte_tokens(vocabulary, data)),
              st.sampled_from(
                  ["a b", "the sky is.", "  x ", "<tool>", "\u65e5", " aab aa", "n't", "<note> "]
              ).map(vocabulary.encode),
          ),
          max_size=6,
      )
  )
  return sum(parts, [])


@pytest.mark.parametrize("kind", KINDS)
@hypothesis.settings(max_examples=120)
@hypothesis.given(data=st.data())
def test_pieces_join_to_the_text(kind, data):
  vocabulary = KINDS[kind]()
  ids = data.draw(sequences(vocabulary))
  assert decoded(vocabulary, ids) == vocabulary.decode(ids)


@pytest.mark.parametrize("kind", KINDS)
@hypothesis.settings(max_examples=60)
@hypothesis.given(data=st.data())
def test_pending_text_is_what_the_end_would_add(kind, data):
  """But for characters that are not finished."""
  vocabulary = KINDS[kind]()
  ids = data.draw(sequences(vocabulary))
  decoder = decoder_of(vocabulary)
  given = "".join(map(decoder.push, ids))
  pending = decoder.pending()
  assert pending == decoder.pending()
  if pending or kind != "whole":
    rest = vocabulary.decode(ids)[len(given) + len(pending) :]
    assert vocabulary.decode(ids).startswith(given + pending) or decoding.BROKEN in rest + pending
  assert given + decoder.end() == vocabulary.decode(ids)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "whole"])
def test_text_is_not_held_back_and_costs_constant_time(kind):
  """10,000 tokens take as long a token as 1,000, and their text comes while they are pushed."""
  vocabulary = KINDS[kind]()
  ids = (vocabulary.encode("the sky is blue. ") * 10_000)[:10_000]
  decoder = decoder_of(vocabulary)
  started = time.process_time()
  given = sum(len(decoder.push(i)) for i in ids)
  assert time.process_time() - started < 1.0  # 0.02 to 0.1 s; quadratic costs take minutes
  assert given >= len(vocabulary.decode(ids)) - 8


def test_a_run_of_bytes_that_does_not_end_is_given_out_all_the_same():
  vocabulary = KINDS["llama"]()
  ids = byte_tokens(vocabulary, "\u65e5".encode()) * 1000
  decoder, given = decoder_of(vocabulary), []
  for i in ids:
    given.append(decoder.push(i))
  assert "".join(given) == "\u65e5" * 1000 and given.index("\u65e5" * 341) == 1024
  for end in (ids, [*ids, *byte_tokens(vocabulary, b"\xff")], [*ids, 5], ids[:-1]):
    assert decoded(vocabulary, end) == vocabulary.decode(end)
  assert vocabulary.decode(ids[:-1]) == "\u65e5" * 999 + "\ufffd"


@pytest.mark.parametrize("kind", ["llama", "gemma", "metaspace"])
def test_the_space_after_a_special_token_stays(kind):
  vocabulary = KINDS[kind]()
  known = vocabulary._tokenizer.token_to_id
  ids = [known(name) for name in ("\u2581is", "<tool>", "\u2581in")]
  assert decoded(vocabulary, ids).strip() == "is in" == vocabulary.decode(ids).strip()


def test_a_byte_of_a_string():
  assert [decoding.byte_of(s) for s in ("<0xE6>", "<0x0a>", "<0x+A>", "<0x++>", "<0xZZ>", "<0xE6")] == [
      0xE6, 10, 10, None, None, None
  ]  # fmt: skip
  assert decoding.byte_of("<0x\u0664\u0664>") is None


@pytest.mark.parametrize("name", kinds.DECODERS)
def test_decoding_at_once_is_the_librarys(name):
  import tokenizers  # pylint: disable=g-import-not-at-top

  vocabulary = KINDS[name]()
  theirs = tokenizers.Tokenizer.from_file(f"{vocabulary.path}/tokenizer.json")
  ids = list(range(vocabulary.vocab_size))
  assert vocabulary.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
