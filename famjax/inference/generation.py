"""Writing text in one or more rows, round by round."""

from collections.abc import Iterator, Sequence
import dataclasses

import numpy as np

from famjax.data.vocabularies import Vocabulary
from famjax.errors import UserError
from famjax.inference import sampling
from famjax.inference.engine import STEPS, Engine, Reading
from famjax.inference.sampling import Sampling
from famjax.inference.text import TextWriter
from famjax.model.state import State

_CONTEXT = 8  # tokens before the text that its first character may depend on


@dataclasses.dataclass(frozen=True)
class Request:
  """What one row is to write.

  Attributes:
    max_new_tokens: at most so many tokens.
    sampling: how they are picked.
    stop: strings that end the text; they are not part of it.
    stop_tokens: tokens that end it; they are neither written nor read. The vocabulary's end symbol
      is always one of them.
  """

  max_new_tokens: int = 100
  sampling: Sampling = Sampling()
  stop: tuple[str, ...] = ()
  stop_tokens: tuple[int, ...] = ()

  def validate(self, vocab_size: int) -> None:
    """Raises UserError for a value that makes no sense."""
    self.sampling.validate()
    if self.max_new_tokens < 0:
      raise UserError(f"max_new_tokens is {self.max_new_tokens}: use 0 or more")
    if isinstance(self.stop, str) or not all(isinstance(s, str) and s for s in self.stop):
      raise UserError(f"stop is {self.stop!r}: give a list of strings, none of them empty")
    for token in self.stop_tokens:
      if not 0 <= token < vocab_size:
        raise UserError(f"stop token {token} is outside the vocabulary of {vocab_size}")


class Generation:
  """Rows that write, each after what it has read.

  Attributes:
    reading: where the rows stand: what they have read and all that they have written. A row that a
      stop string ended has read the tokens that made it whole.
    tokens: int tokens that each row has written.
    texts: of each row, so far.
    reasons: why each row ended: "length", "stop" or, while it goes on, None.
  """

  def __init__(
      self,
      engine: Engine,
      vocabulary: Vocabulary,
      requests: Sequence[Request],
      reading: Reading,
      prompts: Sequence[Sequence[int]],
  ):
    """Takes rows that have read their prompts.

    Args:
      engine: of the model.
      vocabulary: of the text.
      requests: of each row.
      reading: after the prompts. It can be used again.
      prompts: tokens that the repetition penalty is for, and that the text goes on from.
    """
    self.reading = reading
    self.tokens: list[list[int]] = [[] for _ in requests]
    self.reasons: list[str | None] = [None if r.max_new_tokens else "length" for r in requests]
    self._engine, self._requests = engine, requests
    self._samplers = sampling.stack([r.sampling for r in requests])
    V = engine.config.vocab_size
    self._seen = np.zeros((len(requests), V), bool)
    for row, prompt in enumerate(prompts):
      self._seen[row, list(prompt)] = True
    self._stop = np.zeros((len(requests), V), bool)
    for row, r in enumerate(requests):
      self._stop[row, [vocabulary.eos_id, *r.stop_tokens]] = True
    self._writers = [
        TextWriter(vocabulary, r.stop, prompt[-_CONTEXT:]) for r, prompt in zip(requests, prompts)
    ]
    self._shared = True  # `reading` is the caller's, and must not be given away
    self._steps = 1

  @property
  def done(self) -> bool:
    return None not in self.reasons

  @property
  def texts(self) -> list[str]:
    return [writer.text for writer in self._writers]

  def round(self) -> list[str]:
    """Writes a few tokens in every row that goes on; returns what each row's text has won.

    Rounds grow from one token to `STEPS`, so that the first one is soon there.
    """
    written = np.array([len(tokens) for tokens in self.tokens])
    left = np.array([r.max_new_tokens for r in self._requests]) - written
    going_on = np.array([reason is None for reason in self.reasons])
    limit = np.where(going_on, np.minimum(left, self._steps), 0)
    keep = self._shared or any(r.stop for r in self._requests)
    before = self.reading, self._seen

    def write(limit, keep):
      return self._engine.write(
          *before, self._samplers, written, limit, self._stop, keep=keep
      )

    new, self.reading, self._seen = write(limit, keep)
    pieces = [""] * len(self.reasons)
    count = new.count.copy()
    for row in np.flatnonzero(going_on):
      writer = self._writers[row]
      for place, token in enumerate(new.tokens[row, : new.count[row]].tolist()):
        pieces[row] += writer.push(token)
        if writer.stopped:
          count[row] = place + 1
          break
      self.tokens[row] += new.tokens[row, : count[row]].tolist()
      if writer.stopped or new.stopped[row]:
        self.reasons[row] = "stop"
      elif left[row] == count[row]:
        self.reasons[row] = "length"
      if self.reasons[row]:
        pieces[row] += writer.end()
    if (count < new.count).any():  # the device went on after a stop string: again, as far as it
      _, self.reading, self._seen = write(count, keep=True)
    self._shared, self._steps = False, min(2 * self._steps, STEPS)
    return pieces


class Stream(Iterator[str]):
  """The text of one row, piece by piece, each of whole characters.

  Attributes:
    text: so far.
    tokens: so far.
    reason: why the text ended: "length" or "stop"; None while it goes on.
    reading: where the row stands.
    state: what it remembers.
  """

  def __init__(self, generation: Generation):
    self._generation = generation

  def __next__(self) -> str:
    while not self._generation.done:
      (piece,) = self._generation.round()
      if piece:
        return piece
    raise StopIteration

  @property
  def text(self) -> str:
    return self._generation.texts[0]

  @property
  def tokens(self) -> list[int]:
    return self._generation.tokens[0]

  @property
  def reason(self) -> str | None:
    return self._generation.reasons[0]

  @property
  def reading(self) -> Reading:
    return self._generation.reading

  @property
  def state(self) -> State:
    return self._generation.reading.state
