"""Text from tokens: whole characters, spaces that are not lost, and stop strings."""

import time

from hypothesis import assume, given, settings, strategies as st
import pytest

from famjax.data.vocabularies import load_vocabulary
from famjax.inference.text import TextWriter
from tests.data.test_decoding import sequences
from tests.data.vocabulary_kinds import KINDS

BYTES = load_vocabulary("bytes")
WORDS = load_vocabulary("passkey_words")
texts = st.text(st.sampled_from("ab\n \u00e9\u20ac\U0001f600"), max_size=12)


def write(tokens, vocabulary=BYTES, **options):
  """Everything that is given out, token by token, and the writer."""
  writer, pieces = TextWriter(vocabulary, **options), []
  for token in tokens:
    pieces.append(writer.push(token))
    if writer.stopped:
      break
  pieces.append(writer.end())
  assert "".join(pieces) == writer.text
  return pieces, writer


@given(text=texts)
def test_pieces_are_whole_characters_and_join_to_the_text(text):
  pieces, writer = write(BYTES.encode(text))
  assert writer.text == text and not any("\ufffd" in piece for piece in pieces)


@given(text=texts, stop=st.lists(st.text("ab\n \u00e9", min_size=1, max_size=3), max_size=3))
def test_the_text_ends_before_the_first_stop_string(text, stop):
  pieces, writer = write(BYTES.encode(text), stop=stop)
  places = [(text.find(s), s) for s in stop if s in text]
  if not places:
    assert writer.text == text and not writer.stopped
    return
  assert writer.stopped
  # The one that is whole first ends the text; of those, the one that begins first is cut off.
  ends = min(place + len(s) for place, s in places)
  heard = text[:ends]
  assert writer.text == heard[: min(heard.find(s) for s in stop if s in heard)]
  # What was given out was never taken back: it was the text's beginning at all times.
  assert "".join(pieces) == writer.text


def test_what_may_become_a_stop_string_is_held_back_and_no_more():
  pieces, _ = write(BYTES.encode("ab\nUxyz"), stop=["\nUser:"])
  assert pieces == ["a", "b", "", "", "\nUx", "y", "z", ""]
  pieces, writer = write(BYTES.encode("ab\nUser: no"), stop=["\nUser:"])
  assert writer.text == "ab" and writer.stopped and len(pieces) == 2 + 6 + 1


def test_unfinished_and_broken_characters_are_replaced():
  tokens = BYTES.encode("a\u20ac")
  assert write(tokens[:-1])[0] == ["a", "", "", "\ufffd"]
  assert write([*tokens[:-1], *BYTES.encode("b")])[1].text == "a\ufffdb"
  # Bytes that never become a character are given out at once.
  assert [len(p) for p in write([3 + 0xFF] * 200)[0]] == [1] * 200 + [0]


@given(data=st.binary(max_size=90))
def test_any_bytes_give_what_decoding_them_gives(data):
  _, writer = write([3 + byte for byte in data])
  assert writer.text == BYTES.decode([3 + byte for byte in data])


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60)
@given(data=st.data())
def test_pieces_join_to_what_the_tokens_add_to_the_context(kind, data):
  vocabulary = KINDS[kind]()
  context, tokens = (data.draw(sequences(vocabulary)) for _ in range(2))
  before = vocabulary.decode(context)
  assume(not before.endswith("\ufffd"))
  whole = vocabulary.decode([*context, *tokens])
  assert write(tokens, vocabulary)[1].text == vocabulary.decode(tokens)
  assert write(tokens, vocabulary, context=context)[1].text == whole[len(before) :]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60)
@given(data=st.data(), stop=st.lists(st.sampled_from([" is", "x", "\u672c", "e s", ".", "a", "ky"]), max_size=2))
def test_a_stop_string_ends_the_text_of_every_kind(kind, data, stop):
  vocabulary = KINDS[kind]()
  tokens = data.draw(sequences(vocabulary))
  tokens += vocabulary.encode("the sky is \u65e5\u672c\u8a9e.")
  ends = (n for n in range(len(tokens) + 1) if any(s in vocabulary.decode(tokens[:n]) for s in stop))
  end = next(ends, None)
  _, writer = write(tokens, vocabulary, stop=stop)
  text = vocabulary.decode(tokens[:end])
  assert writer.stopped == (end is not None)
  if writer.stopped:
    whole = min(text.find(s) + len(s) for s in stop if s in text)
    text = text[: min(place for s in stop if (place := text[:whole].find(s)) >= 0)]
  assert writer.text == text


def test_characters_of_byte_tokens():
  vocabulary = KINDS["llama"]()
  tokens = vocabulary.encode("\u672c\u8a9e")
  assert len(tokens) == 6
  assert write(tokens, vocabulary)[1].text == "\u672c\u8a9e"
  writer = TextWriter(vocabulary, stop=["\u8a9e"])
  assert [writer.push(token) for token in tokens][-1] == "\u672c" and writer.stopped
  assert (writer.text, writer.end(), writer.push(tokens[0])) == ("\u672c", "", "")
  # A prompt that ends in a run of bytes is not written again.
  assert write(tokens[3:], vocabulary, context=tokens[:3])[1].text == "\u8a9e"
  assert write(tokens[4:], vocabulary, context=tokens[:4])[1].text == "\u8a9e"


def test_the_stop_string_that_is_whole_first_counts_whatever_the_cuts():
  vocabulary = KINDS["gemma"]()
  for pieces in (["a", "re", "turn"], [*"areturn"], [*"are", "turn"]):
    tokens = [vocabulary._tokenizer.token_to_id(piece) for piece in pieces]
    assert write(tokens, vocabulary, stop=["turn", "u", "retu"])[1].text == "a"
    assert write(tokens, vocabulary, stop=["eturn", "tu"])[1].text == "are"


def test_a_push_costs_constant_time():
  for kind in ("llama", "bytes", "trained byte level"):
    vocabulary = KINDS[kind]()
    tokens = (vocabulary.encode("the sky is \u65e5\u672c. ") * 10_000)[:10_000]
    writer, started = TextWriter(vocabulary, ["\u8a9e"], tokens[:8]), time.process_time()
    for token in tokens:
      writer.push(token)
    assert time.process_time() - started < 1.5  # 0.1 to 0.3 s
    assert len(writer.text) > len(vocabulary.decode(tokens)) - 8


def test_a_character_after_broken_bytes_is_heard():
  tokens = [3 + 0x80] * 7 + BYTES.encode("\u00e9b")
  pieces, writer = write(tokens)
  assert writer.text == "\ufffd" * 7 + "\u00e9b"
  _, writer = write(tokens, stop=["\u00e9"])
  assert writer.stopped and writer.text == "\ufffd" * 7


def test_a_prompt_may_end_in_the_middle_of_a_character():
  tokens = BYTES.encode("\u20acb")
  assert write(tokens[2:], context=tokens[:2])[1].text == "\u20acb"


@pytest.mark.parametrize("prompt, answer", [("The pass key is", " 31415 ."), ("key is 3", "1415")])
def test_the_space_after_a_prompt_is_kept(prompt, answer):
  """Words are written with a space before them, but none where a text begins."""
  tokens = WORDS.encode(answer)
  _, writer = write(tokens, WORDS, context=WORDS.encode(prompt))
  assert prompt + writer.text == WORDS.decode(WORDS.encode(prompt) + tokens)
  assert write(tokens, WORDS)[1].text == WORDS.decode(tokens)
