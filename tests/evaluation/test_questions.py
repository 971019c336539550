"""Asking questions: what is scored, where it goes on, what it leaves."""

import json

import pytest

from famjax import cli
from famjax.errors import UserError
from famjax.evaluation.questions import QuestionEval
from famjax.evaluation.record import Record
from famjax.inference.model import Completion
from tests.inference import tiny

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


def ask(model, directory, what=ASK, about=None):
  return what.run(model, Record(directory, about or {}))


def test_shares_and_what_is_left_behind(tmp_path, capsys):
  result = ask(Knows(), tmp_path)
  third = pytest.approx(2 / 3)
  assert result.results["score"] == {t: {"150": third, "300": third} for t in ASK.tasks}
  assert result.table == [["task", "150", "300"], *([t, "0.667", "0.667"] for t in ASK.tasks)]
  assert (tmp_path / "report.png").stat().st_size > 5_000
  lines = [json.loads(line) for line in (tmp_path / "record.jsonl").read_text().splitlines()]
  assert len(lines) == 12 and lines[2]["said"] == " no" and lines[2]["score"] == 0
  assert "rewrite 150 tokens: 3/3" in capsys.readouterr().err  # progress


def test_it_goes_on_where_it_was(tmp_path):
  with pytest.raises(KeyboardInterrupt):
    ask(Knows(fails_at=5), tmp_path)
  with open(tmp_path / "record.jsonl", "a", encoding="utf-8") as file:
    file.write('{"task": "rew')  # a line that was cut
  done = len((tmp_path / "record.jsonl").read_text().splitlines()) - 1
  model = Knows()
  ask(model, tmp_path)
  assert done == 5 and model.asked == 12 - done
  more = QuestionEval(ASK.tasks, (150, 300, 600), ASK.samples, ASK.batch_size)
  ask(model := Knows(), tmp_path, more)
  assert model.asked == 6  # of the new length alone
  with pytest.raises(UserError, match="holds the results of .*: name another --out"):
    ask(Knows(), tmp_path, about={"step": 4})


def test_the_command_asks_a_checkpoint(tmp_path, capsys):
  tiny.save(tmp_path / "run", tiny.config())
  command = [
      "eval", "--gin_file=gin/eval/memory.gin", f"--checkpoint={tmp_path / 'run'}",
      "--gin.LENGTHS=(700,)", "--gin.SAMPLES=2",
  ]  # fmt: skip
  assert cli.main(command) == 0
  assert "| state_tracking | 0.000 |" in capsys.readouterr().out
  home = tmp_path / "run" / "eval" / "memory"
  report = json.loads((home / "report.json").read_text())
  assert report["of"]["step"] == 1 and report["asked"]["samples"] == 2
  assert "| rewrite        | 0.000 |" in (home / "report.md").read_text()
  (step,) = (tmp_path / "run" / "checkpoints").iterdir()
  capsys.readouterr()
  assert cli.main([*command[:2], f"--checkpoint={step}", *command[3:]]) == 0
  assert not (step / "eval").exists()
  assert not capsys.readouterr().err  # the same model: nothing is asked again
  assert cli.main([*command[:2], "--checkpoint=gs://bucket/run", *command[3:]]) == 2
  assert "add --out=DIR" in capsys.readouterr().err
  assert cli.main([*command, "--gin.TASKS=('nothing',)"]) == 2
  assert "task 'nothing' is unknown" in capsys.readouterr().err
