"""Questions about long texts that are made, not fetched: a text of any length and its answers.

A task is a function of random numbers and an amount of filler, whose text grows with that; `ask`
finds the amount for a number of tokens. RULER's six (Hsieh et al. 2024, arXiv 2404.06654) that need no
other texts are written as its own generator has them; its words are made of syllables here, since
its word lists are a download. Remember and Rewrite are those of ARMT (arXiv 2407.04841).
"""

from collections.abc import Callable
import string
from typing import NamedTuple
import uuid

import numpy as np

from famjax.data.examples import generator, join_texts
from famjax.data.outside import check_made
from famjax.data.vocabularies import encode_pair, Vocabulary
from famjax.errors import UserError

NOISE = (
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
)
_SYLLABLES = [c + v for c in "bdfghklmnprstvz" for v in "aeiou"]


class Question(NamedTuple):
  """A text that ends where its answer begins.

  Attributes:
    text: the prompt.
    answers: strings that the answer has to hold; the score is the share of them that it does.
  """

  text: str
  answers: tuple[str, ...]

  @property
  def target(self) -> str:
    """The answer as one that is trained to be given."""
    return " " + ", ".join(self.answers)

  def score(self, said: str) -> float:
    """RULER's string_match_all: the share of answers that are in what was said, in any case."""
    return sum(answer.lower() in said.lower() for answer in self.answers) / len(self.answers)


Task = Callable[[np.random.Generator, int], Question]


def _word(rng: np.random.Generator, syllables: int = 3) -> str:
  return "".join(_SYLLABLES[i] for i in rng.integers(len(_SYLLABLES), size=syllables))


def _words(rng: np.random.Generator, count: int, syllables: int = 3) -> list[str]:
  """Different ones, longer where so many need it."""
  while len(_SYLLABLES) ** syllables < 4 * count:
    syllables += 1
  found = {}
  while len(found) < count:
    found[_word(rng, syllables)] = None
  return list(found)


def _number(rng: np.random.Generator) -> str:
  return str(rng.integers(10**6, 10**7))


def _uuid(rng: np.random.Generator) -> str:
  return str(uuid.UUID(bytes=rng.bytes(16), version=4))


def _hidden_among(rng: np.random.Generator, lines: list[str], hidden: list[str]) -> list[str]:
  """Lines with others put in at random places, in their order."""
  places = np.sort(rng.integers(len(lines) + 1, size=len(hidden)))
  for place, line in zip(places[::-1], hidden[::-1]):
    lines.insert(place, line)
  return lines


def _needle(key: str, value: str, kind: str) -> str:
  return f"One of the special magic {kind} for {key} is: {value}."


def _ask_needle(lines: list[str], key: str, value: str, kind: str) -> Question:
  one = kind[:-1]
  text = (
      f"A special magic {one} is hidden within the following text. Make sure to memorize it. I will"
      f" quiz you about the {one} afterwards.\n" + "\n".join(lines) + f"\nWhat is the special magic"
      f" {one} for {key} mentioned in the provided text? The special magic {one} for {key} mentioned"
      " in the provided text is"
  )
  return Question(text, (value,))


def niah_single_1(rng: np.random.Generator, units: int) -> Question:
  """RULER: a number for a word, hidden in sentences that repeat."""
  (key,), value = _words(rng, 1), _number(rng)
  lines = _hidden_among(rng, [NOISE] * units, [_needle(key, value, "numbers")])
  return _ask_needle(lines, key, value, "numbers")


def niah_multikey_2(rng: np.random.Generator, units: int) -> Question:
  """RULER: the number of one word, among those of many."""
  keys = _words(rng, units + 1)
  values = [_number(rng) for _ in keys]
  asked = int(rng.integers(len(keys)))
  lines = [_needle(key, value, "numbers") for key, value in zip(keys, values)]
  return _ask_needle(lines, keys[asked], values[asked], "numbers")


def niah_multikey_3(rng: np.random.Generator, units: int) -> Question:
  """RULER: the same with UUIDs for words and numbers."""
  pairs = [(_uuid(rng), _uuid(rng)) for _ in range(units + 1)]
  key, value = pairs[int(rng.integers(len(pairs)))]
  return _ask_needle([_needle(*pair, "uuids") for pair in pairs], key, value, "uuids")


def variable_tracking(rng: np.random.Generator, units: int, hops: int = 4) -> Question:
  """RULER's vt: variables that one number is handed on to, in sentences that repeat."""
  letters = np.array(list(string.ascii_uppercase))
  names = {}
  while len(names) <= hops:
    names["".join(rng.choice(letters, 5))] = None
  names, value = list(names), str(rng.integers(10**4, 10**5))
  chain = [f"VAR {names[0]} = {value}"]
  chain += [f"VAR {b} = VAR {a}" for a, b in zip(names, names[1:])]
  lines = _hidden_among(rng, [NOISE] * units, chain)
  text = (
      "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
      + "\n".join(lines) + f"\nQuestion: Find all variables that are assigned the value {value} in the"
      " text above. Answer: According to the chain(s) of variable assignment in the text above,"
      f" {len(names)} variables are assigned the value {value}, they are:"
  )  # fmt: skip
  return Question(text, tuple(names))


def common_words(rng: np.random.Generator, units: int) -> Question:
  """RULER's cwe: ten words that stand 30 times in a list, others three times."""
  words = _words(rng, 10 + units)
  common, others = words[:10], words[10:]
  listed = common * 30 + others * 3
  rng.shuffle(listed)
  text = (
      "Below is a numbered list of words. In these words, some appear more often than others."
      " Memorize the ones that appear most often.\n"
      + " ".join(f"{i}. {word}" for i, word in enumerate(listed, 1))
      + "\nQuestion: What are the 10 most common words in the above list? Answer: The top 10 words"
      " that appear most often in the list are:"
  )
  return Question(text, tuple(common))


def frequent_words(rng: np.random.Generator, units: int, alpha: float = 2.0) -> Question:
  """RULER's fwe: the three most frequent of words, whose frequency falls with rank ** -alpha."""
  count = 10 * (units + 1)
  words = _words(rng, 50)
  times = np.arange(1, len(words) + 1) ** -alpha
  times = np.maximum((times / times.sum() * count).astype(int), [3, 2, 1] + [0] * (len(words) - 3))
  times[:3] += np.array([2, 1, 0])  # the first three differ, from all others too
  listed = [word for word, n in zip(words, times) for _ in range(n)]
  listed += ["...."] * (len(listed) // 4)
  rng.shuffle(listed)
  text = (
      "Read the following coded text and track the frequency of each coded word. Find the three most"
      " frequently appeared coded words. " + " ".join(listed) + "\nQuestion: Do not provide any"
      " explanation. Please ignore the dots '....'. What are the three most frequently appeared words"
      " in the above coded text? Answer: According to the coded text above, the three most frequently"
      " appeared words are:"
  )
  return Question(text, tuple(words[:3]))


def remember(rng: np.random.Generator, units: int) -> Question:
  """ARMT's Remember: the value of one of many keys, each given once."""
  keys = _words(rng, units + 1, syllables=2)
  values = _words(rng, units + 1, syllables=2)
  asked = int(rng.integers(len(keys)))
  pairs = "; ".join(f"{key}: {value}" for key, value in zip(keys, values))
  return Question(f"{pairs}; ? {keys[asked]}:", (values[asked],))


def rewrite(rng: np.random.Generator, units: int, keys: int = 8) -> Question:
  """ARMT's Rewrite: a few keys are given values again and again; the last one counts."""
  names = _words(rng, keys, syllables=2)
  held, pairs = {}, []
  for i in range(units + keys):
    name = names[i] if i < keys else names[int(rng.integers(keys))]
    held[name] = _word(rng, 2)
    pairs.append(f"{name}: {held[name]}")
  asked = names[int(rng.integers(keys))]
  return Question(f"{'; '.join(pairs)}; ? {asked}:", (held[asked],))


_PEOPLE = ("Anna", "Boris", "Clara", "David")
_PLACES = ("attic", "bathroom", "garden", "hall", "kitchen", "office")
_THINGS = ("apple", "book", "lamp")


def state_tracking(rng: np.random.Generator, units: int) -> Question:
  """Where a thing is that people carry about (as bAbI's second task), in sentences that repeat."""
  draw = lambda things: things[int(rng.integers(len(things)))]
  where = {person: draw(_PLACES) for person in _PEOPLE}
  held_by = {thing: None for thing in _THINGS}
  lies = {thing: draw(_PLACES) for thing in _THINGS}
  facts = [f"{person} is in the {place}." for person, place in where.items()]
  facts += [f"The {thing} is in the {place}." for thing, place in lies.items()]
  for _ in range(12):
    person, thing = draw(_PEOPLE), draw(_THINGS)
    if held_by[thing] == person:
      held_by[thing], lies[thing] = None, where[person]
      facts.append(f"{person} put down the {thing}.")
    elif held_by[thing] is None and lies[thing] == where[person]:
      held_by[thing] = person
      facts.append(f"{person} picked up the {thing}.")
    else:
      where[person] = draw([place for place in _PLACES if place != where[person]])
      facts.append(f"{person} went to the {where[person]}.")
  thing = draw(_THINGS)
  holder = held_by[thing]
  text = "\n".join(_hidden_among(rng, [NOISE] * units, facts))
  place = where[holder] if holder else lies[thing]
  return Question(f"{text}\nWhere is the {thing}? It is in the", (place,))


def repeat_segment(rng: np.random.Generator, units: int) -> Question:
  """Four words that stood after four others somewhere in the text (cf. SPEC section 5)."""
  words = [_word(rng) for _ in range(units + 12)]
  start = int(rng.integers(len(words) - 8, endpoint=True))
  begun, asked = words[start : start + 4], words[start + 4 : start + 8]
  return Question(
      " ".join(words) + "\n[repeat random segment]: " + " ".join(begun), (" ".join(asked),)
  )


TASKS: dict[str, Task] = {
    "niah_single_1": niah_single_1, "niah_multikey_2": niah_multikey_2,
    "niah_multikey_3": niah_multikey_3, "vt": variable_tracking, "cwe": common_words,
    "fwe": frequent_words, "remember": remember, "rewrite": rewrite,
    "state_tracking": state_tracking, "repeat_segment": repeat_segment,
}  # fmt: skip


def task_of(name: str) -> Task:
  """A task by name. Raises UserError for one that there is not."""
  if name not in TASKS:
    raise UserError(f"task {name!r} is unknown; choose one of {', '.join(TASKS)}")
  return TASKS[name]


def ask(name: str, vocabulary: Vocabulary, tokens: int, seed: int, index: int) -> Question:
  """A question whose text and answer have at most so many tokens, and hardly fewer.

  Args:
    name: of a task.
    vocabulary: counts.
    tokens: of the text, what begins it, and the answer.
    seed: of the random numbers, with
    index: of the question.

  Raises:
    UserError: not even a text without filler is so short.
  """
  make = task_of(name)
  made = lambda units: make(generator(seed, index), units)

  def fits(units):
    question = made(units)
    pair = encode_pair(vocabulary, question.text, question.target)
    return sum(map(len, pair)) + 1 <= tokens  # and an end

  if not fits(0):
    raise UserError(f"task {name!r} has no text of {tokens} tokens: its shortest is longer")
  low, high = 0, 1
  while fits(high):
    low, high = high, 2 * high
  while high - low > 1:
    middle = (low + high) // 2
    low, high = (middle, high) if fits(middle) else (low, middle)
  return made(low)


class QuestionExamples:
  """A `Source` of questions to train on: weight 1 on answers.

  Attributes:
    vocabulary: of the texts.
    longest: tokens of the longest example.
  """

  def __init__(self, vocabulary: Vocabulary, task: str, low: int, high: int):
    """Takes what is asked.

    Args:
      vocabulary: any.
      task: one of TASKS.
      low: tokens of the shortest texts, and
      high: of the longest; each length is as likely.

    Raises:
      UserError: no such task, or lengths that make no sense.
    """
    task_of(task)
    if not 1 <= low <= high:
      raise UserError(f"questions of {low} to {high} tokens: use 1 <= low <= high")
    self.vocabulary, self.longest = vocabulary, high
    self._task, self._low = task, low
    for index in range(32):  # raises if there is no such text; some are longer than others
      ask(task, vocabulary, low, 0, index)

  def check(self) -> None:
    """Raises UserError if a text may hold a token that the model lacks."""
    made = (ask(self._task, self.vocabulary, self.longest, 1, index) for index in range(32))
    texts = (question.text + question.target for question in made)
    check_made(self.vocabulary, texts, f"task {self._task!r}")

  def example(self, seed: int, index: int, step: int) -> tuple[np.ndarray, np.ndarray]:
    """See `Source`."""
    del step
    length = int(generator(seed, index, 4).integers(self._low, self.longest, endpoint=True))
    try:
      question = ask(self._task, self.vocabulary, length, seed, index)
    except UserError:  # this one is longer than most
      question = ask(self._task, self.vocabulary, self.longest, seed, index)
    return join_texts(self.vocabulary, question.text, question.target)
