"""PassKey: a key, a long irrelevant text, and the question for the key (SPEC section 6).

The text is the paper's, to the letter. The filler is cut to an exact number of tokens, so that a
document can have any length from that of its other parts upwards. Loss weights are 1 on the digits
of an answer only.
"""

import dataclasses

import numpy as np

from famjax.data.examples import generator
from famjax.data.outside import check_made
from famjax.data.vocabularies import encode_after, encode_text, Vocabulary
from famjax.errors import UserError

HEAD = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them."
    " I will quiz you about the important information there. The pass key is {key}. Remember it."
    " {key} is the pass key."
)
FILLER = (
    " The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
)
QUESTION = " What is the pass key? The pass key is {key}"
TEMPLATES = (HEAD, FILLER, QUESTION)


class PassKeyFormat:
  """The PassKey text in the tokens of one vocabulary.

  Attributes:
    vocabulary: any.
    key_digits: digits of a key, 1 to 18, each drawn from 0 to 9.
  """

  def __init__(self, vocabulary: Vocabulary, key_digits: int = 5):
    if not 1 <= key_digits <= 18:
      raise UserError(f"key_digits {key_digits}: use 1 to 18")
    self.vocabulary = vocabulary
    self.key_digits = key_digits
    self._filler = self._encode(FILLER)
    self._has_digit: dict[int, bool] = {}  # By token.

  def write(
      self,
      rng: np.random.Generator,
      filler_tokens: int | None = None,
      *,
      total_tokens: int | None = None,
      question_probability: float = 0.0,
      question_every: int = 0,
  ) -> tuple[np.ndarray, np.ndarray]:
    """Returns one document, with a key of its own.

    Args:
      rng: draws the key and the places of inner questions.
      filler_tokens: length of the filler; or give `total_tokens`.
      total_tokens: length of the whole document.
      question_probability: each stretch of `question_every` tokens before the final question asks
        and answers the question once with this probability, at a place drawn uniformly, in place of
        filler; the filler starts anew after it.
      question_every: length of a stretch, in tokens from the start of the document; 0: none.

    Returns:
      tokens int32[n] and weights float32[n], 1 on the digits of answers and 0 elsewhere.

    Raises:
      UserError: the document is too short for its parts, or not exactly one length is given.
    """
    key = f"{rng.integers(10**self.key_digits):0{self.key_digits}d}"
    head = np.asarray(encode_text(self.vocabulary, HEAD.format(key=key)), np.int32)
    question = self._encode(QUESTION.format(key=key))
    if (filler_tokens is None) == (total_tokens is None):
      raise UserError("a pass key document needs either filler_tokens or total_tokens")
    if filler_tokens is None:
      filler_tokens = total_tokens - len(head) - len(question)
    if filler_tokens < 0:
      raise UserError(
          f"a pass key document of {filler_tokens + len(head) + len(question)} tokens is too short:"
          f" without filler it has {len(head) + len(question)} in this vocabulary; make it longer"
      )
    end = len(head) + filler_tokens  # Where the final question starts.
    total = end + len(question)
    weights = np.zeros(total, np.float32)
    weights[end:] = self._answer(question)
    parts, written = [head], len(head)
    if question_probability and question_every:
      inner = self._encode(QUESTION.format(key=key) + ".")
      inner_weights = self._answer(inner)
      for place in _places(rng, question_probability, question_every, len(head), end, len(inner)):
        parts += [np.resize(self._filler, place - written), inner]
        written = place + len(inner)
        weights[place:written] = inner_weights
    parts += [np.resize(self._filler, end - written), question]
    return np.concatenate(parts), weights

  def _encode(self, text: str) -> np.ndarray:
    """Returns the ids of a text that goes on from another one."""
    return np.asarray(encode_after(self.vocabulary, text), np.int32)

  def _answer(self, question: np.ndarray) -> np.ndarray:
    """Returns 1 where a token of a question holds a digit: there are none but the answer's."""
    known = self._has_digit
    for token in question.tolist():
      if token not in known:
        known[token] = any(map(str.isdigit, self.vocabulary.decode([token])))
    return np.asarray([known[token] for token in question.tolist()], np.float32)


def _places(
    rng: np.random.Generator, probability: float, every: int, start: int, end: int, length: int
) -> list[int]:
  """Returns where inner questions start: at most one in a stretch, all of it before `end`."""
  draws = rng.random((end // every, 2)).tolist()
  places = []
  for i, (ask, where) in enumerate(draws):
    first = max(i * every, start)
    choices = (i + 1) * every - length - first + 1
    if ask < probability and choices > 0:
      places.append(first + int(where * choices))
  return places


@dataclasses.dataclass(frozen=True)
class Lengths:
  """How long generated documents are: a draw of a whole number of units.

  Attributes:
    low: the smallest number of units.
    high: the largest; or a curriculum of (step, largest) pairs, each valid for documents that begin
      at that training step or later: ((0, 1), (400, 2), (800, 4)).
    unit: tokens of a unit: 1, a block, or a whole step of a row.
    distribution: "uniform", or "log_uniform", which draws the short ones more often.
  """

  low: int
  high: int | tuple[tuple[int, int], ...]
  unit: int = 1
  distribution: str = "uniform"

  def __post_init__(self):
    stages = self._stages()
    if not all(len(s) == 2 and all(isinstance(n, int) for n in s) for s in stages):
      raise UserError(f"lengths: high {self.high}: use a number, or ((0, 8), (400, 16)), say")
    if self.distribution not in ("uniform", "log_uniform"):
      raise UserError(f"lengths: distribution {self.distribution!r}: use uniform or log_uniform")
    if self.unit < 1 or self.low < (1 if self.distribution == "log_uniform" else 0):
      raise UserError(
          f"lengths: low {self.low}, unit {self.unit}: use a unit of at least 1, and a low of at"
          " least 0 (uniform) or 1 (log_uniform)"
      )
    if not stages or stages[0][0] != 0 or list(stages) != sorted(stages):
      raise UserError(f"lengths: high {self.high}: a curriculum starts at step 0, and steps grow")
    if min(high for _, high in stages) < self.low:
      raise UserError(f"lengths: high {self.high} is below low {self.low}")

  def _stages(self) -> tuple[tuple[int, int], ...]:
    if not isinstance(self.high, (tuple, list)):
      return ((0, self.high),)
    return tuple(tuple(s) if isinstance(s, (tuple, list)) else (s,) for s in self.high)

  def shortest(self) -> int:
    """Returns the smallest length that is ever drawn, in tokens."""
    return self.low * self.unit

  def longest(self, step: int | None = None) -> int:
    """Returns the largest length that is drawn up to a training step, in tokens; None: ever."""
    highs = [high for start, high in self._stages() if step is None or start <= max(step, 0)]
    return max(highs) * self.unit

  def draw(self, rng: np.random.Generator, step: int) -> int:
    """Returns the length, in tokens, of a document that begins at a training step."""
    high = [high for start, high in self._stages() if start <= step][-1]
    if self.distribution == "uniform":
      units = int(rng.integers(self.low, high, endpoint=True))
    else:
      units = min(int(self.low * ((high + 1) / self.low) ** rng.random()), high)
    return units * self.unit


class PassKeyExamples:
  """A `Source` of PassKey documents, each with a length and a key of its own.

  Attributes:
    vocabulary: any.
    lengths: the draw of the length.
    longest: tokens that a model reads of the longest document; cut, it would lose its answer.
  """

  def __init__(
      self,
      vocabulary: Vocabulary,
      lengths: Lengths,
      *,
      measure: str = "document",
      key_digits: int = 5,
      question_probability: float = 0.0,
      question_every: int = 0,
  ):
    """Takes the draw of lengths and the inner questions.

    Args:
      vocabulary: any.
      lengths: the draw of the length.
      measure: what has the drawn length: the "document", in tokens that a model reads (one fewer
        than it has, as the last one is only predicted), or its "filler".
      key_digits: digits of a key.
      question_probability: of an inner question in a stretch (`PassKeyFormat.write`).
      question_every: tokens of a stretch; the length of a row's step, say.

    Raises:
      UserError: a value makes no sense, or the shortest document cannot hold its parts.
    """
    if measure not in ("document", "filler"):
      raise UserError(f"pass key measure {measure!r}: use document or filler")
    if not 0 <= question_probability <= 1:
      raise UserError(f"question_probability {question_probability}: use a number from 0 to 1")
    if question_probability and question_every < 1:
      raise UserError(
          f"question_probability {question_probability} needs question_every, the tokens of a"
          " stretch that can hold a question"
      )
    self.vocabulary = vocabulary
    self.lengths = lengths
    self._measure = measure
    self._format = PassKeyFormat(vocabulary, key_digits)
    self._questions = dict(
        question_probability=question_probability, question_every=question_every
    )
    shortest, _ = self._write(generator(0, 0), lengths.shortest())
    self._parts = len(shortest) - 1 - lengths.shortest()  # what the draw does not count
    self.longest = self.longest_by(None)

  def check(self) -> None:
    """Raises UserError if a text may hold a token that the model lacks."""
    texts = (text.format(key="0123456789") for text in TEMPLATES)
    check_made(self.vocabulary, texts, "the pass key text")

  def longest_by(self, step: int | None) -> int:
    """Returns tokens that a model has read of the longest document up to a step; None: ever."""
    return self._parts + self.lengths.longest(step)

  def example(self, seed: int, index: int, step: int) -> tuple[np.ndarray, np.ndarray]:
    """See `Source`."""
    rng = generator(seed, index)
    return self._write(rng, self.lengths.draw(rng, step))

  def _write(self, rng: np.random.Generator, length: int) -> tuple[np.ndarray, np.ndarray]:
    if self._measure == "filler":
      return self._format.write(rng, length, **self._questions)
    return self._format.write(rng, total_tokens=length + 1, **self._questions)
