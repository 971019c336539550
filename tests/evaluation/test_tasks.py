"""Tasks of data sets: a tiny model is asked small files, and says what it would say alone."""

import json
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest

seqio = pytest.importorskip("seqio", reason="the core runs without it")

from famjax import cli  # pylint: disable=wrong-import-position
from famjax.data import evaluation_tasks
from famjax.errors import UserError
from famjax.evaluation import tasks
from famjax.evaluation.record import Record
from famjax.evaluation.tasks import Question, TaskEval, batches
from famjax.inference.model import Model
from tests.data import gpt3_files, long_context_files
from tests.inference import tiny

TFDS = ("winogrande", "copa", "record", "lambada", "race_h")


@pytest.fixture(name="data", scope="module")
def _data(tmp_path_factory):
  directory = tmp_path_factory.mktemp("data")
  gpt3_files.prepare_all(directory, [evaluation_tasks.TASKS[name].source for name in TFDS])
  yield str(directory)
  for name in set(seqio.TaskRegistry.names()) & set(evaluation_tasks.TASKS):
    seqio.TaskRegistry.remove(name)


@pytest.fixture(name="model", scope="module")
def _model():
  return tiny.model("fam")


def asked(name, data):
  """Every example of a task, in its order."""
  (task,) = evaluation_tasks.register((name,), directory=data)
  split = evaluation_tasks.TASKS[name].split
  return list(task.get_dataset(None, split, shuffle=False).as_numpy_iterator())


@pytest.mark.parametrize("name", ["quality", "winogrande", "record"])
def test_the_likeliest_option_is_taken(model, data, tmp_path, name):
  """One context; a context for each option; options of unequal length."""
  what = TaskEval((name,), data, batch_size=2)
  record = Record(tmp_path, {})
  found = what.run(model, record)
  examples = asked(name, data)
  said = [x for line in sorted(record.lines, key=lambda line: line["index"]) for x in line["said"]]
  direct = tiny.log_likelihoods(model, [(x["inputs"], x["targets"]) for x in examples])
  np.testing.assert_allclose(said, direct, rtol=1e-4)
  right, questions = 0, {int(x["idx"][0]) for x in examples}
  for question in questions:
    options = [i for i, x in enumerate(examples) if x["idx"][0] == question]
    right += bool(examples[max(options, key=lambda i: direct[i])]["is_correct"])
  result = found.results["tasks"][name]
  assert result["accuracy"] == pytest.approx(100 * right / len(questions))
  assert result["examples"] == len(questions) and found.results["mean"] == {
      "ranked": pytest.approx(result["accuracy"])
  }


@pytest.mark.parametrize("name", ["qasper", "lambada"])
def test_what_is_written_is_what_it_writes_alone(model, data, tmp_path, name):
  record = Record(tmp_path, {})
  found = TaskEval((name,), data, batch_size=2, max_new_tokens=12).run(model, record)
  for line, x in zip(record.lines, asked(name, data), strict=True):
    alone = "".join(model.generate(x["inputs"], max_new_tokens=12, stop="\n"))
    assert line["said"] == alone
  assert found.table[1][0] == name and found.table[-1][0] == "mean of 1 generated"


def test_a_document_is_read_once(model, data, tmp_path, monkeypatch):
  lengths = []
  read = Model.read
  monkeypatch.setattr(
      Model, "read", lambda self, text: (lengths.append(len(text)), read(self, text))[1]
  )
  TaskEval(("quality", "qasper"), data, batch_size=1, max_new_tokens=2).run(model,
      Record(tmp_path, {}))
  article = len(long_context_files.ARTICLE) + len("\n\nQuestion: ")
  assert len(lengths) == 2 and article - 4 < lengths[0] <= article
  assert all(length % model.config.memory.block_size == 0 for length in lengths)


def test_it_goes_on(model, data, tmp_path, monkeypatch):
  what = TaskEval(("quality", "copa", "narrativeqa"), data, batch_size=1, max_new_tokens=4)
  whole = what.run(model, Record(tmp_path / "whole", {}))
  added, add = [], Record.add

  def stop(self, line):
    if len(added) == 4:
      raise KeyboardInterrupt
    added.append(line)
    add(self, line)

  monkeypatch.setattr(Record, "add", stop)
  with pytest.raises(KeyboardInterrupt):
    what.run(model, Record(tmp_path / "out", {}))
  added.clear()
  assert what.run(model, Record(tmp_path / "out", {})) == whole
  assert [line["task"] for line in added] == ["copa", "narrativeqa", "narrativeqa"]
  assert (tmp_path / "out" / "report.png").stat().st_size > 5_000
  added.clear()
  longer = TaskEval(("quality", "narrativeqa"), data, max_new_tokens=5)  # only what is written
  longer.run(model, Record(tmp_path / "out", {}))
  assert {line["task"] for line in added} == {"narrativeqa"}


def test_a_story_that_comes_later_takes_no_answers_of_others(model, data, tmp_path):
  what = TaskEval(("narrativeqa",), str(tmp_path / "data"), max_new_tokens=3)
  shutil.copytree(data, tmp_path / "data")
  record = Record(tmp_path / "out", {})
  what.run(model, record)
  (tmp_path / "data" / "narrativeqa" / "tmp" / "cc33.content").write_text("It was late. " * 9)
  qaps = tmp_path / "data" / "narrativeqa" / "qaps.csv"
  head, *rows = qaps.read_text().splitlines(True)
  qaps.write_text("".join([head, *rows[::-1]]))  # the new one is the first
  whole = what.run(model, record)
  assert whole == what.run(model, Record(tmp_path / "fresh", {}))
  assert whole.results["tasks"]["narrativeqa"]["examples"] == 3
  assert len(record.lines) == 4  # the second was the second before


def test_an_ordinary_decoder_reads_what_it_has_room_for(data, tmp_path):
  full = tiny.model("full", block_size=64, memory_segments=1)
  record = Record(tmp_path, {})
  TaskEval(("quality", "qasper"), data, max_new_tokens=4).run(full, record)
  x = asked("quality", data)[1]
  room = 128 - max(len(x["targets"]) for x in asked("quality", data)[:4])
  cut = [*x["inputs"][: room // 2], *x["inputs"][-(room - room // 2) :]]
  (expected,) = tiny.log_likelihoods(full, [(cut, x["targets"])])
  assert record.lines[0]["said"][1] == pytest.approx(expected, rel=1e-4)
  with pytest.raises(UserError, match="has no room for an answer"):
    TaskEval(("qasper",), data, max_new_tokens=128).run(full, Record(tmp_path / "none", {}))


def test_by_the_token(model, data, tmp_path):
  """What options are compared by is no part of what is asked again."""
  record = Record(tmp_path, {})
  TaskEval(("record",), data).run(model, record)
  lines = len(record.lines)
  found = TaskEval(("record",), data, normalize="tokens").run(model, record)
  assert len(record.lines) == lines
  examples = asked("record", data)
  means = [log_prob / len(x["targets"]) for log_prob, x in zip(record.lines[0]["said"], examples)]
  right = bool(examples[int(np.argmax(means))]["is_correct"])
  assert found.results["tasks"]["record"]["accuracy"] == 100 * right


def test_only_the_first_and_only_so_long(model, data, tmp_path):
  record = Record(tmp_path, {})
  found = TaskEval(("quality",), data, examples=2, longest=64).run(model, record)
  assert [line["index"] for line in record.lines] == [0, 1] and found.table[1][3] == "2"
  x = asked("quality", data)[0]
  cut = [*x["inputs"][:32], *x["inputs"][-32:]]
  (expected,) = tiny.log_likelihoods(model, [(cut, x["targets"])])
  assert record.lines[0]["said"][0] == pytest.approx(expected, rel=1e-4)


def test_questions_about_one_document_stand_together():
  texts = ["A" * 40 + "1", "b", "cc", "D" * 30 + "12", "D" * 30 + "13", "D" * 30 + "24", "e",
      "D" * 31]
  rows = [Question(i, [np.frombuffer(t.encode(), np.uint8)], []) for i, t in enumerate(texts)]
  found = [(bytes(shared), [q.index for q in batch]) for shared, batch in batches(rows, 2, 8)]
  document = b"D" * 24  # whole blocks
  assert found == [(b"", [0, 1]), (document, [3, 4]), (document, [5]), (b"", [2, 6]), (b"", [7])]


def test_the_command(data, tmp_path, capsys):
  tiny.save(tmp_path / "run", tiny.config())
  command = ["eval", f"--checkpoint={tmp_path / 'run'}", f"--gin.DATA_DIR={data}"]
  some = ["--gin.TASKS=('race_h', 'lambada')", "--gin.EXAMPLES=1", "--gin.MAX_NEW_TOKENS=3"]
  assert cli.main([*command, "--gin_file=gin/eval/gpt3.gin", *some]) == 0
  out = capsys.readouterr().out
  assert "| race_h " in out and "mean of 1 ranked" in out and "mean of 1 generated" in out
  report = json.loads((tmp_path / "run" / "eval" / "gpt3" / "report.json").read_text())
  assert report["asked"]["examples"] == 1 and set(report["tasks"]) == {"race_h", "lambada"}
  assert set(report["tasks"]["lambada"]) == {"examples", "em", "f1"}
  # In a process of its own, which imports t5 when gin is configured.
  one = ["--gin_file=gin/eval/gpt3.gin", "--gin.TASKS=('lambada',)", "--gin.EXAMPLES=1"]
  alone = [sys.executable, "-m", "famjax.cli", *command, *one, f"--out={tmp_path / 'alone'}"]
  done = subprocess.run([*alone, "--gin.MAX_NEW_TOKENS=3"], capture_output=True, text=True, check=False)
  assert done.returncode == 0 and "| lambada " in done.stdout, done.stderr
  file = "--gin_file=gin/eval/long_context.gin"
  assert cli.main([*command[:2], file, "--gin.DATA_DIR=/nowhere", "--gin.TASKS=('xlsum',)"]) == 2
  error = capsys.readouterr().err
  assert "no xlsum/english_test.jsonl in /nowhere: get it from https://" in error


def test_data_that_cannot_be_used(model, data, tmp_path):
  with pytest.raises(UserError, match="'quality' has no labels in 'test'"):
    TaskEval(("quality",), data, split="test").run(model, record := Record(tmp_path / "a", {}))
  assert not record.lines  # found out before anything was asked
  without = tmp_path / "without" / "narrativeqa" / "qaps.csv"
  without.parent.mkdir(parents=True)
  without.write_text((pathlib.Path(data) / "narrativeqa" / "qaps.csv").read_text())
  with pytest.raises(UserError, match="'narrativeqa' has nothing to ask in 'test'"):
    TaskEval(("narrativeqa",), str(tmp_path / "without")).run(model, Record(tmp_path / "c", {}))
  broken = tmp_path / "data" / "xlsum" / "english_test.jsonl"
  broken.parent.mkdir(parents=True)
  broken.write_text('{"text": "It rained."}\n')
  with pytest.raises(UserError, match="'xlsum', split 'test': KeyError: 'summary'") as error:
    TaskEval(("xlsum",), str(tmp_path / "data")).run(model, Record(tmp_path / "b", {}))
  assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(tasks=("piqua",)), "'piqua' is unknown; there is piqa"),
        (dict(tasks=()), "at least one"),
        (dict(tasks=("piqa", "piqa")), "each task once"),
        (dict(normalize="mean"), "use one of"),
        (dict(examples=0), "at least 1"),
        (dict(batch_size=0), "at least 1"),
    ],
)
def test_what_makes_no_sense(change, message):
  with pytest.raises(UserError, match=message):
    TaskEval(**change).validate()
  assert tasks.NORMALIZED[0] == TaskEval().normalize
