"""From tokens to text while they are being written: whole characters, up to a stop string."""

from collections.abc import Sequence

from famjax.data.decoding import overlap
from famjax.data.vocabularies import decoder_of, Vocabulary


class TextWriter:
  """Turns the tokens of one row into text, piece by piece.

  The pieces and what `end` returns join to what the vocabulary decodes from all tokens at once, up
  to the first stop string. A stop string is found as soon as its last character is there.

  Attributes:
    stopped: A stop string has come. Neither the stop string nor anything after it is in the text.
  """

  def __init__(
      self, vocabulary: Vocabulary, stop: Sequence[str] = (), context: Sequence[int] = ()
  ):
    """Begins a text.

    Args:
      vocabulary: of the tokens.
      stop: strings that end the text.
      context: tokens just before the first one. The text is what the tokens add to theirs.
    """
    self.stopped = False
    self._pieces: list[str] = []
    self._stop = tuple(filter(None, stop))
    self._decoder = decoder_of(vocabulary)
    for token in context:
      self._decoder.push(token)
    self._skip = len(self._decoder.pending())  # characters that the context has given already
    self._held = ""  # text that may be the beginning of a stop string
    self._ended = False

  @property
  def text(self) -> str:
    """All text that was given out."""
    self._pieces = ["".join(self._pieces)]
    return self._pieces[0]

  def push(self, token: int) -> str:
    """Takes one more token, and returns the text that is certain now; "" after a stop string."""
    if self.stopped:
      return ""
    new = self._after_context(self._decoder.push(token))
    return self._give(self._held + new, self._decoder.pending() if self._stop else "")

  def end(self) -> str:
    """Returns the text that was held back, when no more tokens come.

    An unfinished character becomes U+FFFD, as the vocabulary decodes it.
    """
    if self.stopped or self._ended:
      return ""
    self._ended = True
    return self._give(self._held + self._after_context(self._decoder.end()), "", last=True)

  def _after_context(self, text: str) -> str:
    skipped = min(self._skip, len(text))
    self._skip -= skipped
    return text[skipped:]

  def _give(self, text: str, pending: str, last: bool = False) -> str:
    """Returns the part of `text` that no stop string begins in, and keeps the rest.

    Args:
      text: text that was not given out, and is certain.
      pending: text after it that the decoder holds back. A stop string that is whole there counts.
      last: no text follows.
    """
    if self._stop:
      whole = text + pending[self._skip :]
      found = [(place + len(stop), place) for stop in self._stop if (place := whole.find(stop)) >= 0]
      if found:  # The stop string that is whole first ends the text.
        end, _ = min(found)
        begins = [place for stop in self._stop if (place := whole[:end].find(stop)) >= 0]
        self.stopped, self._held, text = True, "", whole[: min(begins)]
      elif not last:
        held = max(overlap(text, stop) for stop in self._stop)
        text, self._held = text[: len(text) - held], text[len(text) - held :]
    self._pieces.append(text)
    return text
