"""Tasks of public data sets, through seqio and t5's metrics (`famjax.data.evaluation_tasks`).

A ranked task takes the option that the model finds likeliest after its context, a generated one
what the model writes up to the end of its prompt's line. Questions that follow one another about one document share it: it is read
once, in constant memory, and each question goes on from a copy of that state.

A line of the record is a question: task, split, index, "of", a hash of what is asked, and "said":
the log-probability of every option, or a text.
"""

from collections.abc import Iterable, Iterator, Sequence
import dataclasses
import hashlib
import itertools
import math
import pathlib
import re
import statistics
import sys
from typing import Any, NamedTuple

import numpy as np

from famjax.data import evaluation_tasks
from famjax.data.prompts import Ranked
from famjax.data.vocabularies import begun
from famjax.errors import UserError
from famjax.evaluation.record import Measured, Record
from famjax.inference.engine import Reading
from famjax.inference.generation import Request
from famjax.inference.model import Model

NORMALIZED = ("sum", "tokens")
# An answer ends with its line. Some tokenizers have no line breaks: it ends with the next question.
STOP = ("\n", "Q:", "Question:", "Title:", "Summary:")
_END = 512  # tokens of a context that are kept at its end, where the question is


@dataclasses.dataclass(frozen=True)
class TaskEval:
  """Which tasks a model is given.

  Attributes:
    tasks: names of `famjax.data.evaluation_tasks.TASKS`.
    directory: of the data, TFDS's and other files; None: TFDS's own directory, and no files.
    split: of all tasks; None: the one of each that has public answers.
    examples: the first so many questions of each; None: all.
    batch_size: texts side by side.
    max_new_tokens: of an answer, which ends with its line.
    normalize: options are compared by the "sum" of their tokens' log-probabilities, which is t5's
      default, or by its mean over "tokens".
    longest: tokens of a context; a longer one loses its middle, just before the question, and so
      does one that an ordinary decoder has no room for. The paper cuts at 256k.
    seed: of the metrics' random numbers: t5's ROUGE is the median of a bootstrap.
  """

  tasks: tuple[str, ...] = evaluation_tasks.GPT3
  directory: str | None = None
  split: str | None = None
  examples: int | None = None
  batch_size: int = 4
  max_new_tokens: int = 64
  normalize: str = "sum"
  longest: int = 262144
  seed: int = 0

  def validate(self) -> None:
    """Raises UserError for a value that makes no sense."""
    for name in self.tasks:
      evaluation_tasks.spec_of(name)
    if not self.tasks or len(set(self.tasks)) < len(self.tasks):
      raise UserError(f"TaskEval.tasks is {self.tasks}: name each task once, and at least one")
    if self.normalize not in NORMALIZED:
      raise UserError(f"TaskEval.normalize is {self.normalize!r}: use one of {NORMALIZED}")
    counts = (self.batch_size, self.max_new_tokens, self.longest)
    if min(*counts, 1 if self.examples is None else self.examples) < 1:
      raise UserError(
          "TaskEval.examples, batch_size, max_new_tokens and longest must be at least 1"
      )

  def run(self, model: Model, record: Record) -> Measured:
    """Asks all questions that have no answer yet.

    Args:
      model: compares options, and writes answers greedily.
      record: of what it said.

    Returns:
      By task what its metrics say, in percent, and the number of "examples"; "mean" of the ranked
      and of the generated ones. A row for each.

    Raises:
      UserError: data are missing, or have no labels; the model's context is shorter than a text.
    """
    per_token = self.normalize == "tokens"
    tasks = evaluation_tasks.register(self.tasks, model.vocabulary, self.directory, per_token)
    splits = [self.split or evaluation_tasks.spec_of(name).split for name in self.tasks]
    for task, split in zip(tasks, splits):  # found out before anything is asked
      evaluation_tasks.prepare(task, split)
    found = {
        task.name: self._measure(task, split, model, record) for task, split in zip(tasks, splits)
    }
    rows = [["task", "metric", "score", "examples"]]
    means: dict[str, list[float]] = {"ranked": [], "generated": []}
    for name, metrics in found.items():
      spec = evaluation_tasks.spec_of(name)
      rows.append([name, spec.score, f"{metrics[spec.score]:.1f}", f"{metrics['examples']:,}"])
      means["ranked" if isinstance(spec, Ranked) else "generated"].append(metrics[spec.score])
    _plot(rows[1:], record.directory / "report.png")
    mean = {kind: statistics.mean(scores) for kind, scores in means.items() if scores}
    rows += [[f"mean of {len(means[k])} {k}", "", f"{v:.1f}", ""] for k, v in mean.items()]
    return Measured({"tasks": found, "mean": mean}, rows, {})

  def _measure(self, task: Any, split: str, model: Model, record: Record) -> dict[str, float]:
    ranked = isinstance(evaluation_tasks.spec_of(task.name), Ranked)
    how = {"task": task.name, "split": split}
    how |= {} if ranked else {"max_new_tokens": self.max_new_tokens}
    before = {
        (line["index"], line["of"]): line["said"]
        for line in record.lines
        if how.items() <= line.items()
    }
    answer = self._compare if ranked else self._write
    questions = itertools.islice(self._questions(task, split, model, ranked), self.examples)
    document, reading, asked, said = None, None, [], {}
    for shared, batch in batches(questions, self.batch_size, model.config.memory.block_size):
      if not asked and not any(map(_labelled, batch)):
        raise UserError(f"task {task.name!r} has no labels in {split!r}: name another split")
      asked += [question._replace(contexts=[]) for question in batch]
      said |= {q.index: before[key] for q in batch if (key := (q.index, q.of)) in before}
      left = [question for question in batch if question.index not in said]
      if not left:
        continue
      if shared is not document:
        document, reading = shared, model.read(shared) if shared.size else None
      for question, one in zip(left, answer(model, left, shared.size, reading)):
        said[question.index] = one
        record.add(how | {"index": question.index, "of": question.of, "said": one})
      print(f"{task.name}: {len(said):,} questions", file=sys.stderr, flush=True)
    if not asked:
      raise UserError(f"task {task.name!r} has nothing to ask in {split!r}: are its files whole?")
    asked.sort(key=lambda question: question.index)
    return self._metrics(task, asked, said)

  def _metrics(self, task: Any, asked: "list[Question]", said: dict[int, Any]) -> dict[str, float]:
    """What the task's own metrics say, as seqio's evaluator would ask them."""
    targets, outputs = [], []
    for question in asked:
      several = said[question.index]
      several = several if isinstance(several, list) else [several]
      for example, output in zip(question.examples, several, strict=True):
        targets.append(task.postprocess_fn(output, example=example, is_target=True))
        outputs.append(task.postprocess_fn(output, example=example, is_target=False))
    found: dict[str, float] = {"examples": len(asked)}
    before = np.random.get_state()
    np.random.seed(self.seed)
    try:
      for metric in task.metric_fns:
        found |= {name: float(value) for name, value in metric(targets, outputs).items()}
    finally:
      np.random.set_state(before)
    return {name: value for name, value in found.items() if math.isfinite(value)}

  def _questions(
      self, task: Any, split: str, model: Model, ranked: bool
  ) -> "Iterator[Question]":
    """The questions of a split, in its order."""
    import tensorflow as tf  # pylint: disable=g-import-not-at-top

    def contexts(examples):
      room = model.config.memory.context
      if room is not None:  # of an ordinary decoder
        room -= max(len(x["targets"]) for x in examples) if ranked else self.max_new_tokens
        if room < 1:
          raise UserError(f"task {task.name!r}: the model's context has no room for an answer")
      longest = min(self.longest, room or self.longest)
      return [_cut(_begun(model, x["inputs"]), longest) for x in examples]

    dataset = task.get_dataset(sequence_length=None, split=split, shuffle=False)
    numbered = zip(itertools.count(), dataset.as_numpy_iterator())
    number = lambda row: int(row[1]["idx"][0]) if "idx" in row[1] else row[0]
    try:
      for index, rows in itertools.groupby(numbered, number):
        examples = [example for _, example in rows]
        asked = contexts(examples)
        for example in examples:
          del example["inputs"], example["inputs_pretokenized"]  # they may be long
        yield Question(index, asked, examples, _hash(asked, examples))
    except tf.errors.OpError as error:  # what Python raised in the pipeline, and where
      lines = [line for line in str(error).split("\n") if line.strip()]
      what = next((line for line in lines if "Error: " in line), lines[0])
      what = re.sub(r"^\{\{.*?\}\} ", "", what)  # TensorFlow's own place
      raise UserError(f"task {task.name!r}, split {split!r}: {what}") from error

  def _compare(
      self, model: Model, questions: "list[Question]", start: int, after: Reading | None
  ) -> list[list[float]]:
    """The log-probability of every option of each question."""
    pairs = [
        (context[start:], example["targets"])
        for question in questions
        for context, example in zip(question.contexts, question.examples)
    ]
    scored = dict(model.scores_after(pairs, self.batch_size, after))
    log_probs = (scored[i].log_prob for i in range(len(pairs)))
    return [list(itertools.islice(log_probs, len(q.examples))) for q in questions]

  def _write(
      self, model: Model, questions: "list[Question]", start: int, after: Reading | None
  ) -> list[str]:
    """What the model writes after each question, up to the end of the line or the next question."""
    prompts = [question.contexts[0][start:] for question in questions]
    request = Request(max_new_tokens=self.max_new_tokens, stop=STOP)
    return [completion.text for completion in model.complete(prompts, request, after)]


def _begun(model: Model, inputs: np.ndarray) -> np.ndarray:
  return np.asarray(begun(model.vocabulary, inputs.tolist()), np.int32)


class Question(NamedTuple):
  """What is asked at once.

  Attributes:
    index: of the question in its split.
    contexts: int32 `[n]`, the tokens before each option; of a generated task, of the one prompt.
    examples: of the seqio task, as many, without their inputs.
    of: a hash of contexts and options. Files that are added, or another prompt, move the indices.
  """

  index: int
  contexts: list[np.ndarray]
  examples: list[dict[str, Any]]
  of: str = ""


def _hash(contexts: list[np.ndarray], examples: list[dict[str, Any]]) -> str:
  found = hashlib.sha256()
  for context, example in zip(contexts, examples):
    for tokens in (context, example["targets"]):
      found.update(len(tokens).to_bytes(8, "little") + np.asarray(tokens, np.int32).tobytes())
  return found.hexdigest()[:16]


def _labelled(question: Question) -> bool:
  """Whether one option is right, or there is an answer: TFDS hides some of them."""
  if "is_correct" in question.examples[0]:
    return any(x["is_correct"] for x in question.examples)
  return any(answer not in (b"", b"<unk>") for answer in question.examples[0]["answers"])


def batches(
    questions: Iterable[Question], size: int, block_size: int
) -> Iterator[tuple[np.ndarray, list[Question]]]:
  """Puts questions together; those that follow one another about one document share its reading.

  Args:
    questions: in the order of their split.
    size: of a batch, at most.
    block_size: what is shared is whole blocks of so many tokens.

  Yields:
    The tokens int32 `[n]` with which all contexts of the batch begin, none at all for questions
    that have nothing to share, and the questions. Batches about one document yield the same array.
  """
  nothing, single = np.zeros(0, np.int32), []
  for run in _runs(questions, block_size):
    if len(run) == 1:
      single += run
      if len(single) == size:
        yield nothing, single
        single = []
      continue
    first, *others = [context for question in run for context in question.contexts]
    length = min(_common(first, other) for other in others)
    shortest = min(len(context) for context in (first, *others))
    length = min(length, shortest - 1) // block_size * block_size
    document = first[:length] if length else nothing
    for begin in range(0, len(run), size):
      yield document, run[begin : begin + size]
  if single:
    yield nothing, single


def _runs(questions: Iterable[Question], block_size: int) -> Iterator[list[Question]]:
  """Questions in a row that share at least a block, and half of what there is to read."""
  run: list[Question] = []
  for question in questions:
    if run:
      before, here = run[-1].contexts[0], question.contexts[0]
      if _common(before, here) < max(block_size + 1, len(here) // 2):
        yield run
        run = []
    run.append(question)
  if run:
    yield run


def _common(a: np.ndarray, b: np.ndarray) -> int:
  """How many tokens two texts begin with alike."""
  length = min(len(a), len(b))
  different = np.flatnonzero(a[:length] != b[:length])
  return int(different[0]) if different.size else length


def _cut(tokens: np.ndarray, longest: int) -> np.ndarray:
  """A text without what is too much for it, which is taken out just before its end."""
  if len(tokens) <= longest:
    return tokens
  end = min(_END, longest // 2)
  return np.concatenate([tokens[: longest - end], tokens[len(tokens) - end :]])


def _plot(rows: Sequence[Sequence[str]], path: pathlib.Path) -> None:
  """A bar for each row of name, metric and score."""
  import matplotlib  # pylint: disable=g-import-not-at-top

  matplotlib.use("Agg")
  import matplotlib.pyplot as plt  # pylint: disable=g-import-not-at-top

  size = (8, 1.2 + 0.28 * len(rows))
  figure, axes = plt.subplots(figsize=size, dpi=150, layout="constrained")
  bars = axes.barh(range(len(rows)), [float(score) for _, _, score, _ in rows])
  axes.bar_label(bars, labels=[score for _, _, score, _ in rows], padding=3, fontsize="small")
  axes.set_yticks(range(len(rows)), labels=[f"{name}, {metric}" for name, metric, _, _ in rows])
  axes.invert_yaxis()
  axes.set(xlabel="score, %", xlim=(0, 108))
  axes.grid(axis="x", alpha=0.25)
  figure.savefig(path)
  plt.close(figure)
