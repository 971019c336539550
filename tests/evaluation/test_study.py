"""A study: runs side by side, what is finished stays, and one that fails spoils no other.

Most tests put a script in the place of Python that trains nothing, and leaves or fails what a run
would; one test, marked slow, trains.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from famjax import cli
from famjax.errors import TerminatedError, UserError
from famjax.evaluation import study
from famjax.evaluation.study import Study

# Stands for `python -m famjax.cli COMMAND ...`: notes that it was called, and obeys FAIL=COMMAND.
FAKE = """#!{python} -SE
import json, pathlib, sys
command, values = sys.argv[3], {{}}
for argument in sys.argv[4:]:
  if argument.startswith("--gin."):
    name, _, value = argument[6:].partition("=")
    values[name] = value
run = pathlib.Path(values["RUN_DIR"])
run.mkdir(parents=True, exist_ok=True)
with open(run / "calls", "a") as calls:
  print(command, *sys.argv[4:], file=calls)
print("step 1  of " + command)
if "WAIT" in values:  # as training does, SIGTERM is taken note of, and ends the run in good order
  import signal, time
  done = []
  signal.signal(signal.SIGTERM, lambda *_: done.append(print("saved") or sys.exit(143)))
  print("waiting", flush=True)
  time.sleep(60)
if values.get("FAIL") == command:
  sys.exit("famjax: error: it was told to fail")
if command == "eval":
  result = dict(parameters=10, longest_trained_blocks=8, accuracy={{"8": float(values["SCORE"])}})
  result |= dict(steps=int(values.get("HAS", values.get("STEPS", 1))), asked=dict(blocks=[int(values.get("ASK", 8))]))
  (run / "passkey.json").write_text(json.dumps(result))
"""


@pytest.fixture(name="fake", autouse=True)
def _fake(request, tmp_path, monkeypatch):
  if not request.node.get_closest_marker("slow"):
    script = tmp_path / "python"
    script.write_text(FAKE.format(python=sys.executable))
    script.chmod(0o755)
    monkeypatch.setattr(study.sys, "executable", str(script))


def plan(gin_files, bindings):
  """STEPS=... and ASK=... say what a run is; REFUSE=... that it cannot be."""
  values = dict(binding.partition("=")[::2] for binding in bindings)
  assert gin_files[0] == "base.gin" and "RUN_DIR" in values and "SEED" in values
  if "REFUSE" in values:
    raise UserError(values["REFUSE"])
  return study.Plan(int(values.get("STEPS", 1)), {"blocks": (int(values.get("ASK", 8)),)})


def run(root, models, bindings=(), **options):
  return study.run(Study(str(root), models, **options), ["base.gin"], bindings, plan)


def calls(root, name):
  return (root / name / "calls").read_text().splitlines()


def test_every_model_and_seed_is_trained_and_asked_and_reported(tmp_path, capfd):
  root = tmp_path / "study"
  models = {"FAM": ["SCORE=1"], "BSWA M1": ["one.gin", "SCORE=0", "TWO=2"]}
  results = run(root, models, ["TWO=3"], seeds=(0, 4), parallel=3, title="What it is")
  assert [(r["name"], r["seed"], r["accuracy"]["8"]) for r in results] == [
      ("FAM", 0, 1.0), ("BSWA M1", 0, 0.0), ("FAM", 4, 1.0), ("BSWA M1", 4, 0.0)
  ]  # fmt: skip
  common = "--gin_file=base.gin --gin_file=one.gin --gin.SCORE=0 --gin.TWO=2 --gin.TWO=3"
  arguments = f"{common} --gin.RUN_DIR={root / 'bswa-m1-4'} --gin.SEED=4"
  assert calls(root, "bswa-m1-4") == [f"train {arguments}", f"eval {arguments}"]
  written = json.loads((root / "report.json").read_text())
  assert written["results"] == results and written["title"] == "What it is"
  assert written["command"] == ["famjax", "study", "--gin_file=base.gin", "--gin.TWO=3"]
  assert written["seconds"] > 0 and written["machine"]["cpu_cores"] and written["sample"] is None
  assert all(r["train_seconds"] >= 0 for r in results)
  table = (root / "passkey.md").read_text()
  assert table.count("\n") == 6 and table in capfd.readouterr().out
  assert (root / "passkey.png").read_bytes().startswith(b"\x89PNG")
  assert (root / "fam-0.log").read_text() == "step 1  of train\nstep 1  of eval\n"


def test_what_is_finished_is_not_trained_again(tmp_path, capfd):
  root = tmp_path / "study"
  first = run(root, {"FAM": ["SCORE=1"]})
  assert run(root, {"FAM": ["SCORE=0"]}) == first
  assert "FAM, seed 0: done before" in capfd.readouterr().out
  again = run(root, {"FAM": ["SCORE=0"], "BSWA": ["SCORE=0.5"]})
  assert [r["accuracy"]["8"] for r in again] == [1.0, 0.5] and again[0] == first[0]
  assert len(calls(root, "fam-0")) == len(calls(root, "bswa-0")) == 2


@pytest.mark.parametrize("change", ["STEPS=2", "ASK=16"])
def test_a_finished_run_is_taken_up_again_for_more_steps_and_other_questions(tmp_path, change):
  root = tmp_path / "study"
  run(root, {"FAM": ["SCORE=1"], "BSWA": ["SCORE=0"]})
  fam, _ = run(root, {"FAM": ["SCORE=0.5", change], "BSWA": ["SCORE=1"]})
  assert fam["accuracy"] == {"8": 0.5}
  assert len(calls(root, "fam-0")) == 4 and len(calls(root, "bswa-0")) == 2


def test_nothing_is_started_when_one_run_could_not_be(tmp_path):
  root = tmp_path / "study"
  with pytest.raises(UserError, match="^BSWA, seed 1: it belongs to another configuration$"):
    run(root, {"FAM": [], "BSWA": ["REFUSE=it belongs to another configuration"]}, seeds=(1,))
  assert not root.exists()


@pytest.mark.parametrize("command", ["train", "eval"])
@pytest.mark.parametrize("parallel", [1, 2])
def test_a_run_that_fails_is_named_and_the_others_are_reported(tmp_path, command, parallel):
  """The first one fails, which would have gone on from the prompt."""
  root = tmp_path / "study"
  models = {"FAM": ["SCORE=1", f"FAIL={command}"], "BSWA": ["SCORE=0.5"]}
  with pytest.raises(UserError) as error:
    run(root, models, parallel=parallel, prompt="The pass key is")
  log = root / "fam-0.log"
  assert str(error.value) == (
      f"FAM, seed 0 failed (famjax: error: it was told to fail); its log is {log}"
  )
  assert log.read_text().splitlines()[-1] == "famjax: error: it was told to fail"
  written = json.loads((root / "report.json").read_text())
  assert [r["name"] for r in written["results"]] == ["BSWA"] and written["sample"] is None
  # Mended, it goes on; the time of all of its sittings counts.
  (root / "fam-0.seconds").write_text("100.0\n")
  fam, _ = run(root, {"FAM": ["SCORE=1"], "BSWA": ["SCORE=0"]}, parallel=parallel)
  assert fam["train_seconds"] >= 100 and len(calls(root, "bswa-0")) == 2


def test_fewer_steps_than_were_trained_are_no_result(tmp_path):
  root = tmp_path / "study"
  run(root, {"FAM": ["SCORE=1", "STEPS=3"]})
  report = (root / "report.json").read_text()
  models = {"FAM": ["SCORE=1", "HAS=3", "STEPS=2"]}
  with pytest.raises(UserError, match="FAM, seed 0 has 3 steps of training, and 2 were asked for"):
    run(root, models)
  assert (root / "report.json").read_text() == report


@pytest.fixture(name="ctrl_c")
def _ctrl_c():
  """Ctrl-C as at a terminal; what a script starts in the background ignores it."""
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  yield
  signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize(
    "sent, raised, message",
    [
        (signal.SIGTERM, TerminatedError, "the same command goes on from there"),
        (signal.SIGINT, KeyboardInterrupt, None),
    ],
)
def test_a_signal_ends_what_runs_in_good_order_and_starts_no_more(
    tmp_path, capfd, sent, raised, message
):
  root = tmp_path / "study"
  log = root / "fam-0.log"

  def stop():
    while not (log.exists() and "waiting" in log.read_text()):
      time.sleep(0.05)
    os.kill(os.getpid(), sent)

  before = signal.getsignal(signal.SIGTERM)
  threading.Thread(target=stop).start()
  with pytest.raises(raised, match=message):
    run(root, {"FAM": ["SCORE=1", "WAIT=1"], "BSWA": ["SCORE=1"]})
  assert signal.getsignal(signal.SIGTERM) is before
  assert log.read_text().endswith("saved\n") and (root / "fam-0.seconds").exists()
  assert not (root / "bswa-0").exists() and not (root / "report.json").exists()
  assert "BSWA" not in capfd.readouterr().out
  fam, _ = run(root, {"FAM": ["SCORE=1"], "BSWA": ["SCORE=0"]})
  assert fam["accuracy"] == {"8": 1.0}


def test_when_every_run_fails_there_is_no_report(tmp_path):
  with pytest.raises(UserError, match="A, seed 0 failed .*; B, seed 0 failed "):
    run(tmp_path / "study", {"A": ["FAIL=train"], "B": ["FAIL=train"]})
  assert not (tmp_path / "study" / "report.json").exists()


def test_a_run_that_was_asked_by_hand_takes_part(tmp_path):
  """`famjax eval` has left passkey.json, but the study has not timed the training."""
  root = tmp_path / "study"
  (root / "fam-0").mkdir(parents=True)
  (root / "fam-0" / "passkey.json").write_text("{}")
  (fam,) = run(root, {"FAM": ["SCORE=1"]})
  assert fam["accuracy"] == {"8": 1.0} and len(calls(root, "fam-0")) == 2


def test_names_become_files_and_a_point_in_one_keeps_those_of_its_seeds_apart(tmp_path):
  root = tmp_path / "study"
  run(root, {"FAM, 0.5": ["SCORE=1"]}, seeds=(0, 1))
  assert {p.name for p in root.glob("*.log")} == {"fam-0.5-0.log", "fam-0.5-1.log"}


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="needs sched_getaffinity")
def test_runs_share_the_cores_of_the_process(monkeypatch):
  monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 2, 3, 5, 8})
  shares = study._core_shares  # pylint: disable=protected-access
  assert shares(2) == [[0, 2], [3, 5]] and shares(5) == [[0], [2], [3], [5], [8]]
  assert shares(1) == [[]] and shares(6) == [[]] * 6  # Then nobody is kept to a part.


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(models={}), "at least one model"),
        (dict(seeds=()), "one seed"),
        (dict(seeds=3), r"Study.seeds is 3: give seeds, as \(0,\)"),
        (dict(seeds=0), r"Study.seeds is 0: give seeds, as \(0,\)"),
        (dict(seeds=(1, 0, 1)), "each seed is one run"),
        (dict(parallel=0), "Study.parallel is 0"),
        (dict(models={"BSWA M1": [], "FAM": [], "bswa-m1": []}), "'BSWA M1' has the directory of"),
    ],
)
def test_studies_that_make_no_sense(tmp_path, change, message):
  what = Study(**{"run_dir": str(tmp_path / "study"), "models": {"FAM": []}} | change)
  with pytest.raises(UserError, match=message):
    study.run(what, [], [], plan)
  assert not (tmp_path / "study").exists()


def test_study_needs_a_file_that_describes_one(capsys):
  assert cli.main(["study"]) == 2 and "quickstart.gin" in capsys.readouterr().err
  assert cli.main(["study", "--gin_file=gin/runs/passkey_base.gin"]) == 2
  assert capsys.readouterr().err.startswith("famjax: error: ")


@pytest.mark.slow
def test_the_quickstart_in_two_steps(tmp_path, monkeypatch, capfd):
  root = tmp_path / "study"
  arguments = [
      "study", "--gin_file=gin/runs/quickstart.gin", f"--gin.STUDY_DIR={root}",
      "--gin.TRAIN_STEPS=2", "--gin.LONGEST_BLOCKS=8", "--gin.EVAL_BLOCKS=(6, 9)",
      "--gin.PassKeyEval.examples=3",
      "--gin.ModelConfig.num_layers=1", "--gin.ModelConfig.model_dim=16", "--gin.BATCH_SIZE=2",
      "--gin.ModelConfig.ff_dim=16",
  ]  # fmt: skip
  assert cli.main(arguments) == 0
  shown = capfd.readouterr().out
  written = json.loads((root / "report.json").read_text())
  fam, bswa = written["results"]
  assert (fam["name"], bswa["name"]) == ("FAM", "BSWA M2")
  assert fam["parameters"] - bswa["parameters"] == 16 * 16  # the FAM's prompt
  for result in (fam, bswa):
    assert set(result["accuracy"]) == {"6", "9"} and result["steps"] == 2
    assert result["longest_trained_blocks"] == 8 and result["train_seconds"] > 0
  assert written["sample"]["prompt"] + " |" + written["sample"]["continuation"] in shown
  # Again: nothing is started, and the report stands.
  with monkeypatch.context() as patch:
    patch.setattr(subprocess, "Popen", None)
    assert cli.main(arguments) == 0
  assert capfd.readouterr().out.count("done before") == 2
  # What cannot be run, or would not be the run that the directory has, is refused at once.
  report = (root / "report.json").read_text()
  for change, message in (
      ("Study.models={'FAM': [], 'BAD': ['NOSUCH=1']}", "BAD, seed 0: no gin file of this run uses"),
      ("LEARNING_RATE=1e-4", f"FAM, seed 0: run directory {root / 'fam-0'} belongs to another con"),
      ("TRAIN_STEPS=3", f"FAM, seed 0: run directory {root / 'fam-0'} belongs to another configur"),
      ("EVAL_BLOCKS=(6, 3)", "FAM, seed 0: a pass key document of 49 tokens is too short"),
  ):
    with monkeypatch.context() as patch:
      patch.setattr(subprocess, "Popen", None)
      assert cli.main([*arguments, f"--gin.{change}"]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"famjax: error: {message}")
  assert (root / "report.json").read_text() == report
  # Other questions are asked of the models that are there.
  assert cli.main([*arguments, "--gin.EVAL_BLOCKS=(7,)", "--gin.Study.models={'FAM': []}"]) == 0
  (again,) = json.loads((root / "report.json").read_text())["results"]
  assert set(again["accuracy"]) == {"7"} and again["train_seconds"] > fam["train_seconds"]
