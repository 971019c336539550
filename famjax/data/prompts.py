"""What a task asks, as text: a prompt with options to rank, or a prompt with answers.

A `Ranked` or `Generated` says where a data set comes from and how one of its examples is put into
words. Templates are those of `str.format`, filled with the features of an example; a feature inside
another is `{question[stem]}`. Nothing here needs TensorFlow; `evaluation_tasks` makes seqio tasks
of it.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
import dataclasses
import pathlib
from typing import Any, NamedTuple

import numpy as np

from famjax.errors import UserError

Example = dict[str, Any]  # features: str, numbers, lists and dicts of them


@dataclasses.dataclass(frozen=True)
class Files:
  """A data set in the files that its makers give out.

  Attributes:
    pattern: of the file below the directory of all data; `{split}` is the split's name there.
    splits: names of splits, and what they are called in the files.
    read: gives the examples of a file and a split, as it is called there.
    home: where to get it.
  """

  pattern: str
  splits: dict[str, str]
  read: Callable[[pathlib.Path, str], Iterator[Example]]
  home: str

  def find(self, directory: str | None, split: str) -> pathlib.Path:
    """The file of a split, the newest version of several. Raises UserError if there is none."""
    pattern = self.pattern.format(split=self.splits[split])
    if directory is None:
      raise UserError(f"{pattern} is in no TFDS: set DATA_DIR; it comes from {self.home}")
    found = sorted(pathlib.Path(directory).glob(pattern))
    if not found:
      raise UserError(f"there is no {pattern} in {directory}: get it from {self.home}")
    return found[-1]


def as_it_is(example: Example) -> Iterable[Example]:
  """One example of one."""
  return (example,)


class Choice(NamedTuple):
  """A question as texts to compare.

  Attributes:
    prompts: what each option stands after.
    options: as many.
    correct: whether each is right.
  """

  prompts: list[str]
  options: list[str]
  correct: list[bool]


@dataclasses.dataclass(frozen=True)
class Ranked:
  """A task whose answer is the likeliest of several options.

  Attributes:
    source: a TFDS name with its version, or files.
    split: that is asked, if none is named.
    prompt: a template; several, if what stands before the options differs.
    options: templates; or the name of a feature that lists them, to be put after a space.
    label: the feature that says which is right: its number, or a bool for each.
    each: makes the examples that are asked of one in the data.
    classes: how many options every question has, if an option's number is a class that has an F1.
    score: the metric that stands for the task.
  """

  source: str | Files
  split: str
  prompt: str | tuple[str, ...]
  options: str | tuple[str, ...]
  label: str = "label"
  each: Callable[[Example], Iterable[Example]] = as_it_is
  classes: int | None = None
  score: str = "accuracy"

  def ask(self, data: Example) -> Iterator[Choice]:
    """Puts an example of the data into words."""
    for x in self.each(data):
      if isinstance(self.options, str):
        options = [f" {option}" for option in x[self.options]]
      else:
        options = [option.format(**x) for option in self.options]
      several = [self.prompt] * len(options) if isinstance(self.prompt, str) else self.prompt
      label = x[self.label]
      correct = label if isinstance(label, list) else [i == label for i in range(len(options))]
      yield Choice([prompt.format(**x) for prompt in several], options, correct)


class Query(NamedTuple):
  """A prompt, and the answers that are all right."""

  prompt: str
  answers: list[str]


def first_line(said: str) -> str:
  """What was said up to the end of its first line."""
  return said.split("\n")[0].strip()


@dataclasses.dataclass(frozen=True)
class Generated:
  """A task whose answer is written.

  Attributes:
    source: a TFDS name with its version, or files.
    split: that is asked, if none is named.
    prompt: a template.
    answers: of an example, at least one.
    metrics: "trivia_qa", "squad" (both: em, f1) or "rouge" (rouge1, rouge2, rougeL).
    score: the one of them that stands for the task.
    each: makes the examples that are asked of one in the data.
    taken: the part of what was said that is the answer.
  """

  source: str | Files
  split: str
  prompt: str
  answers: Callable[[Example], Sequence[str]]
  metrics: tuple[str, ...]
  score: str
  each: Callable[[Example], Iterable[Example]] = as_it_is
  taken: Callable[[str], str] = first_line

  def ask(self, data: Example) -> Iterator[Query]:
    """Puts an example of the data into words."""
    for x in self.each(data):
      yield Query(self.prompt.format(**x), list(self.answers(x)))


Spec = Ranked | Generated


def plain(value: Any) -> Any:
  """Python's own values for those that TFDS gives: str for bytes, lists for arrays."""
  if isinstance(value, dict):
    return {name: plain(inner) for name, inner in value.items()}
  if isinstance(value, bytes):
    return value.decode("utf-8", "replace")
  if hasattr(value, "to_list"):  # ragged
    return plain(value.to_list())
  if isinstance(value, (np.ndarray, np.generic)):
    return plain(value.tolist())
  return [plain(inner) for inner in value] if isinstance(value, list) else value
