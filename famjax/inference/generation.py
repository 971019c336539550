"""Writing text in one or more rows, round by round."""

from collections.abc import Iterator, Sequence
import dataclasses
import numbers

import jax
import jax.numpy as jnp
import numpy as np

from famjax.data.decoding import BROKEN, LONGEST_RUN
from famjax.data.vocabularies import decoder_of, Vocabulary
from famjax.errors import UserError
from famjax.inference import sampling
from famjax.inference.engine import STEPS, TAIL, Engine, Reading, copied
from famjax.inference.sampling import Sampling
from famjax.inference.text import TextWriter
from famjax.model.state import State


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
  stop: str | Sequence[str] = ()
  stop_tokens: int | Sequence[int] = ()

  def __post_init__(self):
    if isinstance(self.stop, str):
      object.__setattr__(self, "stop", (self.stop,))
    if isinstance(self.stop_tokens, numbers.Integral):
      object.__setattr__(self, "stop_tokens", (self.stop_tokens,))

  def validate(self, vocab_size: int) -> None:
    """Raises UserError for a value that makes no sense."""
    self.sampling.validate()
    if not isinstance(self.max_new_tokens, numbers.Integral) or self.max_new_tokens < 0:
      raise UserError(f"max_new_tokens is {self.max_new_tokens!r}: use a whole number, 0 or more")
    if not all(isinstance(s, str) and s for s in self.stop):
      raise UserError(f"stop is {self.stop!r}: give a list of strings, none of them empty")
    for token in self.stop_tokens:
      if not isinstance(token, numbers.Integral) or not 0 <= token < vocab_size:
        raise UserError(f"stop token {token!r} is outside the vocabulary of {vocab_size}")


class Generation:
  """Rows that write, each after what it has read.

  Attributes:
    tokens: int tokens that each row has written.
    texts: of each row, so far.
    reasons: why each row ended: "length", "stop", "unread" (the reading of the prompts was ended) or,
      while it goes on, None.
  """

  def __init__(
      self,
      engine: Engine,
      vocabulary: Vocabulary,
      requests: Sequence[Request],
      reading: Reading,
      prompts: Sequence[np.ndarray],
      whole: bool = True,
  ):
    """Takes rows that have read their prompts.

    Args:
      engine: of the model.
      vocabulary: of the text.
      requests: of each row.
      reading: after the prompts. It can be used again.
      prompts: int tokens of each row that the repetition penalty is for, beside those written.
      whole: they have read their prompts to the end. If not, nothing is written.
    """
    self._reading = reading
    self.tokens: list[list[int]] = [[] for _ in requests]
    self.reasons: list[str | None] = [None if r.max_new_tokens else "length" for r in requests]
    if not whole:
      self.reasons = ["unread"] * len(requests)
    self._engine, self._requests = engine, requests
    self._samplers = sampling.stack([r.sampling for r in requests])
    V = engine.config.vocab_size
    seen, stop = np.zeros((2, len(requests), V), bool)
    for row, (request, prompt) in enumerate(zip(requests, prompts)):
      seen[row, prompt] = True
      ends = getattr(vocabulary, "stop_ids", (vocabulary.eos_id,))
      stop[row, [*ends, *request.stop_tokens]] = True
    self._seen, self._stop = jnp.asarray(seen), jnp.asarray(stop)
    tails = np.asarray(reading.tail)
    self._writers = [
        TextWriter(vocabulary, request.stop, _context(vocabulary, prompt, tail[tail >= 0]))
        for request, prompt, tail in zip(requests, prompts, tails)
    ]
    self._shared = True  # somebody else has `_reading`, so that it must not be given away
    self._steps = 1

  @property
  def reading(self) -> Reading:
    """Where the rows stand: what they have read, and all that they have written.

    A row that a stop string ended has read the tokens that made it whole. It is a copy: made at each look, and
    again by the next round, so that it is no thing to look at after every piece.
    """
    self._shared = True
    self._reading = self._engine.whole(self._reading)
    return self._reading

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
    may_return = any(request.stop for request in self._requests)
    apart = self._engine.apart(self._reading)
    if apart is not self._reading:
      self._reading, self._shared = apart, False  # it is a copy
    before, shared = (self._reading, self._seen), self._shared
    given = copied(before) if shared or may_return else before
    # What the rows remember moves on before anything waits: an interrupt finds it whole.
    new, *after = self._engine.write(*given, self._samplers, limit, self._stop)
    (self._reading, self._seen), self._shared = after, False
    self._steps = min(2 * self._steps, STEPS)
    new = jax.device_get(new)
    pieces = [""] * len(self.reasons)
    count = new.count.copy()
    for row in np.flatnonzero(going_on):
      writer = self._writers[row]
      for place, token in enumerate(new.tokens[row, : new.count[row]].tolist()):
        self.tokens[row].append(token)
        pieces[row] += writer.push(token)
        if writer.stopped:
          count[row] = place + 1
          break
      if writer.stopped or new.stopped[row]:
        self.reasons[row] = "stop"
      elif left[row] == count[row]:
        self.reasons[row] = "length"
      if self.reasons[row]:
        pieces[row] += writer.end()
    if (count < new.count).any():  # the device went on after a stop string: again, as far as it
      before = copied(before) if shared else before
      _, self._reading, self._seen = self._engine.write(
          *before, self._samplers, count, self._stop
      )
    return pieces

  def end(self) -> list[str]:
    """Gives out what was held back, if no more is to be written."""
    return [writer.end() for writer in self._writers]


def _context(vocabulary: Vocabulary, prompt: np.ndarray, tail: np.ndarray) -> list[int]:
  """Returns the last tokens that a row has read, from the start of a character on."""
  tokens = (prompt[-LONGEST_RUN:] if len(prompt) > len(tail) else tail).tolist()
  if len(tokens) < TAIL:
    return tokens  # all that there are
  broken = []
  for first in range(4):
    decoder = decoder_of(vocabulary)
    text = "".join(map(decoder.push, tokens[first:])) + decoder.pending()
    broken.append(text.count(BROKEN))
  return tokens[broken.index(min(broken)) :]


class Stream(Iterator[str]):
  """The text of one row, piece by piece, each of whole characters.

  Attributes:
    text: so far.
    tokens: so far.
    reason: why the text ended, see `Generation`; None while it goes on.
    reading: where the row stands.
    state: what it remembers.
  """

  def __init__(self, generation: Generation):
    self._generation = generation

  def __next__(self) -> str:
    while not self._generation.done:
      if piece := self.round():
        return piece
    raise StopIteration

  def round(self) -> str:
    """Writes a few tokens; returns what the text has won, which may be nothing yet."""
    return self._generation.round()[0]

  def end(self) -> str:
    """Gives out what was held back, if no more is to be written."""
    return self._generation.end()[0]

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
