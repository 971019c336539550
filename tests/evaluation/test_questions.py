"""Asking questions: what is scored, where it goes on, what it leaves."""

import json
import pathlib

import pytest

from famjax import cli
from famjax.configuration import configure
from famjax.errors import UserError
from famjax.evaluation import questions
from famjax.evaluation.questions import QuestionEval
from famjax.inference.model import Completion
from tests.inference import tiny

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
ASK = QuestionEval(tasks=("rewrite", "remember"), lengths=(150, 300), samples=3, batch_size=2)


class Knows:
  """A model that reads the last value of the key that it is asked for; every third time it errs."""

  def __init__(self, fails_at=None):
    self.config, self.vocabulary = tiny.config(), tiny.BYTES
    self.asked, self.fails_at = 0, fails_at

  def complete(self, prompts, requests):
    said = []
    for prompt in prompts:
      if self.asked == self.fails_at:
        raise KeyboardInterrupt
      self.asked += 1
      pairs, _, key = self.vocabulary.decode(list(prompt)).partition("; ? ")
      value = pairs.rpartition(f"{key} ")[2].partition(";")[0]
      said.append(Completion(f" {value}" if self.asked % 3 else " no", [], "limit"))
    return said


def test_shares_and_what_is_left_behind(tmp_path, capsys):
  result = questions.evaluate(Knows(), ASK, tmp_path, {"step": 3})
  third = pytest.approx(2 / 3)
  assert result["score"] == {t: {"150": third, "300": third} for t in ASK.tasks}
  assert json.loads((tmp_path / "report.json").read_text())["of"] == {"step": 3, "seed": 0}
  assert "| rewrite | 0.667 | 0.667 |" in (tmp_path / "report.md").read_text()
  assert (tmp_path / "report.png").stat().st_size > 5_000
  lines = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
  assert len(lines) == 12 and lines[2]["said"] == " no" and lines[2]["score"] == 0
  assert "rewrite 150 tokens: 3/3" in capsys.readouterr().err  # progress


def test_it_goes_on_where_it_was(tmp_path):
  with pytest.raises(KeyboardInterrupt):
    questions.evaluate(Knows(fails_at=5), ASK, tmp_path, {})
  with open(tmp_path / "answers.jsonl", "a", encoding="utf-8") as file:
    file.write('{"task": "rew')  # a line that was cut
  done = len((tmp_path / "answers.jsonl").read_text().splitlines()) - 1
  model = Knows()
  questions.evaluate(model, ASK, tmp_path, {})
  assert done == 5 and model.asked == 12 - done
  more = QuestionEval(ASK.tasks, (150, 300, 600), ASK.samples, ASK.batch_size)
  questions.evaluate(model := Knows(), more, tmp_path, {})
  assert model.asked == 6  # of the new length alone
  with pytest.raises(UserError, match="holds the answers of .*: name another --out"):
    questions.evaluate(Knows(), ASK, tmp_path, {"step": 4})


def test_the_command_asks_a_checkpoint(tmp_path, capsys):
  tiny.save(tmp_path / "run", tiny.config())
  command = [
      "eval", "--gin_file=gin/eval/memory.gin", f"--checkpoint={tmp_path / 'run'}",
      "--gin.LENGTHS=(700,)", "--gin.SAMPLES=2",
  ]  # fmt: skip
  assert cli.main(command) == 0
  assert "| state_tracking | 0.000 |" in capsys.readouterr().out
  assert (tmp_path / "run" / "eval" / "memory" / "report.json").is_file()
  assert cli.main([*command, "--gin.TASKS=('nothing',)"]) == 2
  assert "task 'nothing' is unknown" in capsys.readouterr().err


@pytest.mark.parametrize("path", sorted((ROOT / "gin" / "eval").glob("*.gin")), ids=lambda p: p.stem)
def test_every_file_resolves(path):
  import gin  # pylint: disable=import-outside-toplevel

  configure([str(path)], ["SAMPLES=3"])
  config = gin.get_configurable("QuestionEval")()
  config.validate()
  assert config.samples == 3 and path.read_text().startswith("# ")
