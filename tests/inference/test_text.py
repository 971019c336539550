"""Text from tokens: whole characters, spaces that are not lost, and stop strings."""

from hypothesis import given, strategies as st
import pytest

from famjax.data.vocabularies import load_vocabulary
from famjax.inference.text import TextWriter

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


def test_an_unfinished_character_is_left_out_and_a_broken_one_is_replaced():
  tokens = BYTES.encode("a\u20ac")
  assert write(tokens[:-1])[1].text == "a"
  assert write([*tokens[:-1], *BYTES.encode("b")])[1].text == "a\ufffdb"
  # Of bytes that never become a character all but the last three are given out at once.
  assert [len(p) for p in write([3 + 0xFF] * 200)[0]][3:-1] == [1] * 197


@given(data=st.binary(max_size=90))
def test_any_bytes_give_what_decoding_them_gives(data):
  """Up to an end that might have become a character."""
  _, writer = write([3 + byte for byte in data])
  whole = BYTES.decode([3 + byte for byte in data])
  assert whole.startswith(writer.text) and len(whole) - len(writer.text) <= 3
  assert set(whole[len(writer.text) :]) <= {"\ufffd"}


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
