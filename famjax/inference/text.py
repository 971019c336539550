"""From tokens to text while they are being written: whole characters, up to a stop string."""

from collections.abc import Sequence

from famjax.data.vocabularies import Vocabulary

_BROKEN = "\ufffd"  # what a vocabulary decodes an unfinished character to, once or for every byte
_PATIENCE = 64  # tokens that are decoded again and again, while none of them ends a character


class TextWriter:
  """Turns the tokens of one row into text, piece by piece.

  Attributes:
    text: all that was given out.
    stopped: a stop string has come; it is not part of the text, nor is anything after it.
  """

  def __init__(
      self, vocabulary: Vocabulary, stop: Sequence[str] = (), context: Sequence[int] = ()
  ):
    """Takes what ends the text.

    Args:
      vocabulary: of the tokens.
      stop: strings.
      context: tokens just before the first one, so that a space between them and it is not lost.
    """
    self.text, self.stopped = "", False
    self._vocabulary, self._stop = vocabulary, tuple(filter(None, stop))
    # Decoding starts a little before the first token that is not text yet: a vocabulary may write a
    # token otherwise where a text begins. `_given` characters of what is decoded are out.
    self._tokens, self._fresh = list(context), 0
    self._given = len(_whole(vocabulary.decode(self._tokens)))
    self._held = ""  # what may be the beginning of a stop string

  def push(self, token: int) -> str:
    """Takes one more token, and returns the text that is certain now."""
    self._tokens.append(token)
    self._fresh += 1
    decoded = self._vocabulary.decode(self._tokens)
    whole = _whole(decoded)
    new = whole[self._given :]
    if whole == decoded or self._fresh > _PATIENCE:
      self._tokens, self._fresh = self._tokens[-self._fresh :], 0
      self._given = len(self._vocabulary.decode(self._tokens)) - (len(decoded) - len(whole))
    else:
      self._given += len(new)
    return self._give(self._held + new)

  def end(self) -> str:
    """Returns what was held back, when no more tokens come; an unfinished character is left out."""
    held, self._held = self._held, ""
    self.text += held
    return held

  def _give(self, text: str) -> str:
    places = [place for stop in self._stop if (place := text.find(stop)) >= 0]
    if places:
      self.stopped, self._held = True, ""
      text = text[: min(places)]
    else:
      held = max((_overlap(text, stop) for stop in self._stop), default=0)
      text, self._held = text[: len(text) - held], text[len(text) - held :]
    self.text += text
    return text


def _overlap(text: str, stop: str) -> int:
  """Length of the longest end of `text` that `stop` begins with."""
  most = min(len(text), len(stop) - 1)
  return next((n for n in range(most, 0, -1) if text.endswith(stop[:n])), 0)


def _whole(text: str) -> str:
  """Text without what later bytes may still make a character: at most three are missing."""
  held = next((n for n in range(3) if not text[: len(text) - n].endswith(_BROKEN)), 3)
  return text[: len(text) - held]
