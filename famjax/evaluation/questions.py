"""Questions about texts of any length (`famjax.data.questions`), read in constant memory.

What was answered is written line by line, so that an evaluation goes on where it was stopped:

    answers.jsonl   a line for each question: task, length, index, score, what was said
    report.json     shares by task and length, and what they were measured on
    report.md       the same as a table
    report.png      and as a picture
"""

from collections.abc import Iterator
import dataclasses
import json
import pathlib
import statistics
import sys

import numpy as np

from famjax.data.questions import Question, ask, task_of
from famjax.data.vocabularies import begin_ids
from famjax.errors import UserError
from famjax.evaluation import report
from famjax.inference.generation import Request
from famjax.inference.model import Model

_SEED = 1 << 41  # far from the seeds of training data
Found = dict[str, dict[int, list[float]]]  # scores by task and length


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


def evaluate(model: Model, config: QuestionEval, out: pathlib.Path, about: dict) -> dict:
  """Asks all questions that have no answer yet, and writes the report.

  Args:
    model: reads and answers greedily.
    config: what is asked.
    out: directory of the report.
    about: whose model it is; a directory holds the answers of one.

  Returns:
    What `report.json` holds.

  Raises:
    UserError: the directory holds another model's answers, or a task has no text of a length.
  """
  config.validate()
  model.config.memory.check_context(max(config.lengths))
  for task in config.tasks:  # found out before anything is asked
    ask(task, model.vocabulary, min(config.lengths), _SEED + config.seed, 0)
  about = about | {"seed": config.seed}
  found = _answered(out, about)
  with open(out / "answers.jsonl", "a", encoding="utf-8") as file:
    for task, length, indices in _left(config, found):
      questions = [
          ask(task, model.vocabulary, length, _SEED + config.seed, index) for index in indices
      ]
      for index, question, said in zip(indices, questions, _answers(model, questions)):
        score = question.score(said)
        line = {"task": task, "length": length, "index": index, "score": score, "said": said}
        file.write(json.dumps(line | {"answers": question.answers}) + "\n")
        found.setdefault(task, {}).setdefault(length, {})[index] = score
      file.flush()
      scores = found[task][length].values()
      done = f"{len(scores)}/{config.samples}  {statistics.mean(scores):.3f}"
      print(f"{task} {length:,} tokens: {done}", file=sys.stderr, flush=True)
  shares = {
      task: {
          str(length): statistics.mean(found[task][length][i] for i in range(config.samples))
          for length in config.lengths
      }
      for task in config.tasks
  }
  asked = dataclasses.asdict(config)
  result = {"score": shares, "asked": asked, "of": about, "machine": report.machine()}
  report.write_json(out / "report.json", result)
  (out / "report.md").write_text(table(shares) + "\n", encoding="utf-8")
  _plot(shares, out / "report.png")
  return result


def table(shares: dict[str, dict[str, float]]) -> str:
  """A row for each task, a column for each length."""
  lengths = list(next(iter(shares.values())))
  rows = [["task", *(f"{int(n):,}" for n in lengths)], ["---"] + ["---:"] * len(lengths)]
  rows += [[task, *(f"{by_length[n]:.3f}" for n in lengths)] for task, by_length in shares.items()]
  return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _left(config: QuestionEval, found) -> Iterator[tuple[str, int, list[int]]]:
  """Task, length and the numbers of the questions of each batch that is still to be asked."""
  for task in config.tasks:
    for length in config.lengths:
      done = found.get(task, {}).get(length, {})
      left = [i for i in range(config.samples) if i not in done]
      for first in range(0, len(left), config.batch_size):
        yield task, length, left[first : first + config.batch_size]


def _answers(model: Model, questions: list[Question]) -> list[str]:
  """What the model says, each row at most twice as long as it need be."""
  encode = model.vocabulary.encode
  prompts = [[*begin_ids(model.vocabulary), *encode(q.text)] for q in questions]
  requests = [Request(max_new_tokens=2 * len(encode(q.target)) + 2) for q in questions]
  return [completion.text for completion in model.complete(prompts, requests)]


def _answered(out: pathlib.Path, about: dict) -> dict:
  """Scores by task, length and number that are there already."""
  out.mkdir(parents=True, exist_ok=True)
  of, answers, found = out / "of.json", out / "answers.jsonl", {}
  about = json.loads(json.dumps(about))
  if of.exists() and json.loads(of.read_text(encoding="utf-8")) != about:
    theirs = of.read_text(encoding="utf-8").strip()
    raise UserError(f"{out} holds the answers of {theirs}: name another --out")
  of.write_text(json.dumps(about) + "\n", encoding="utf-8")
  if answers.exists():
    whole = answers.read_text(encoding="utf-8")
    whole = whole[: whole.rfind("\n") + 1]  # the last line may have been cut
    answers.write_text(whole, encoding="utf-8")
    for line in map(json.loads, whole.splitlines()):
      of_task = found.setdefault(line["task"], {})
      of_task.setdefault(line["length"], {})[line["index"]] = line["score"]
  return found


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
