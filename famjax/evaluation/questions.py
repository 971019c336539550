"""Questions about texts of any length (`famjax.data.questions`), read in constant memory.

A line of the record is a question: task, length, index, score, what was said.
"""

from collections.abc import Iterator
import dataclasses
import pathlib
import statistics
import sys

import numpy as np

from famjax.data.questions import Question, ask, task_of
from famjax.data.vocabularies import encode_after, encode_text
from famjax.errors import UserError
from famjax.evaluation.record import Measured, Record
from famjax.inference.generation import Request
from famjax.inference.model import Model

_SEED = 1 << 41  # far from the seeds of training data
Found = dict[str, dict[int, dict[int, float]]]  # scores by task, length and number


@dataclasses.dataclass(frozen=True)
class QuestionEval:
  """What a model is asked.

  Attributes:
    tasks: names of `famjax.data.questions.TASKS`.
    lengths: of the texts with their answers, in tokens.
    samples: questions of each task and length.
    batch_size: of them side by side.
    seed: of the questions; the same ones for every model of a vocabulary.
  """

  tasks: tuple[str, ...] = ("niah_single_1",)
  lengths: tuple[int, ...] = (1024, 4096)
  samples: int = 20
  batch_size: int = 4
  seed: int = 0

  def validate(self) -> None:
    """Raises UserError for a value that makes no sense."""
    for name in self.tasks:
      task_of(name)
    if not self.tasks or not self.lengths or min(*self.lengths, self.samples, self.batch_size) < 1:
      raise UserError("QuestionEval needs tasks, and lengths, samples and a batch of at least 1")

  def run(self, model: Model, record: Record) -> Measured:
    """Asks all questions that have no answer yet.

    Args:
      model: reads and answers greedily.
      record: of its answers.

    Returns:
      Shares of answers given, "score": a row for each task, a column for each length.

    Raises:
      UserError: a task has no text of a length, or the model's context is shorter.
    """
    model.config.memory.check_context(max(self.lengths))
    for task in self.tasks:  # found out before anything is asked
      ask(task, model.vocabulary, min(self.lengths), _SEED + self.seed, 0)
    found: Found = {}
    for line in record.lines:
      found.setdefault(line["task"], {}).setdefault(line["length"], {})[line["index"]] = line["score"]
    for task, length, indices in self._left(found):
      questions = [
          ask(task, model.vocabulary, length, _SEED + self.seed, index) for index in indices
      ]
      scores = found.setdefault(task, {}).setdefault(length, {})
      for index, question, said in zip(indices, questions, _answers(model, questions)):
        scores[index] = question.score(said)
        what = {"task": task, "length": length, "index": index, "score": scores[index]}
        record.add(what | {"said": said, "answers": question.answers})
      done = f"{len(scores)}/{self.samples}  {statistics.mean(scores.values()):.3f}"
      print(f"{task} {length:,} tokens: {done}", file=sys.stderr, flush=True)
    shares = {
        task: {
            str(length): statistics.mean(found[task][length][i] for i in range(self.samples))
            for length in self.lengths
        }
        for task in self.tasks
    }
    _plot(shares, record.directory / "report.png")
    head = ["task", *(f"{length:,}" for length in self.lengths)]
    rows = [[task, *(f"{s:.3f}" for s in by.values())] for task, by in shares.items()]
    curve = {n: statistics.mean(by[str(n)] for by in shares.values()) for n in self.lengths}
    return Measured({"score": shares}, [head, *rows], curve)

  def _left(self, found: Found) -> Iterator[tuple[str, int, list[int]]]:
    """Task, length and the numbers of the questions of each batch that is still to be asked."""
    for task in self.tasks:
      for length in self.lengths:
        done = found.get(task, {}).get(length, {})
        left = [i for i in range(self.samples) if i not in done]
        for first in range(0, len(left), self.batch_size):
          yield task, length, left[first : first + self.batch_size]


def _answers(model: Model, questions: list[Question]) -> list[str]:
  """What the model says, each row at most twice as long as it need be."""
  vocabulary = model.vocabulary
  prompts = [encode_text(vocabulary, q.text) for q in questions]
  lengths = [len(encode_after(vocabulary, q.target, q.text)) for q in questions]
  requests = [Request(max_new_tokens=2 * length + 2) for length in lengths]
  return [completion.text for completion in model.complete(prompts, requests)]


def _plot(shares: dict[str, dict[str, float]], path: pathlib.Path) -> None:
  import matplotlib  # pylint: disable=import-outside-toplevel

  matplotlib.use("Agg")
  import matplotlib.pyplot as plt  # pylint: disable=import-outside-toplevel

  figure, axes = plt.subplots(figsize=(8, 5), dpi=150, layout="constrained")
  for i, (task, by_length) in enumerate(shares.items()):
    style = ("-", "--", ":")[i // 10 % 3]
    lengths = np.array([int(n) for n in by_length])
    axes.plot(lengths, list(by_length.values()), style, marker="o", label=task)
  axes.set(xlabel="length, tokens", ylabel="share of answers given", ylim=(-0.02, 1.02))
  axes.set_xscale("log", base=2)
  axes.grid(alpha=0.25)
  axes.legend(frameon=False, fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
  figure.savefig(path)
  plt.close(figure)
