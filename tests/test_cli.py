"""The command line, as a user meets it: exit status, lines, and what is written."""

import os
import pathlib
import resource
import signal
import subprocess
import sys

import jax
import pytest

from famjax import cli, configuration
from famjax.errors import DivergedError, TerminatedError
from famjax.training.checkpoint import load_params
from famjax.training.storage import list_steps

SMALL = [
    "train", "--gin_file=gin/runs/long_text.gin", "--gin_file=gin/models/tiny.gin",
    "--gin.ModelConfig.num_layers=1", "--gin.ModelConfig.model_dim=16",
    "--gin.ModelConfig.ff_dim=16", "--gin.BATCH_SIZE=2", "--gin.LENGTH=16", "--gin.BLOCK_SIZE=8",
    "--gin.MEMORY_SEGMENTS=1", "--gin.FAM_LENGTH=2", "--gin.TrainConfig.tensorboard=False",
    "--gin.TrainConfig.log_every=2", "--gin.TrainConfig.eval_batches=1",
    "--gin.TrainConfig.rsp_probability=0.5",
]  # fmt: skip


@pytest.fixture(name="corpus")
def _corpus(tmp_path):
  directory = tmp_path / "a corpus"
  directory.mkdir()
  for i in range(20):
    (directory / f"{i}.txt").write_text(f"This is text number {i}. " * (i + 1))
  return str(directory)


def start(*arguments):
  return subprocess.Popen(
      [sys.executable, "-m", "famjax.cli", *arguments],
      stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
      env={**os.environ, "JAX_PLATFORMS": "cpu"},
  )  # fmt: skip


def test_help_is_quick_and_imports_no_jax():
  seconds = lambda: sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])  # of processor time
  before = seconds()
  process = start("--help")
  out, err = process.communicate()
  assert seconds() - before < 2
  assert process.returncode == 0 and "train" in out and not err
  code = "import sys, famjax.cli; print({'jax', 'tensorflow', 'gin'} & set(sys.modules))"
  assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"


def test_a_run_from_the_command_line(tmp_path, corpus, capsys):
  run_dir = tmp_path / "run"
  options = [*SMALL, f"--gin.CORPUS={corpus}", f"--gin.RUN_DIR={run_dir}"]
  assert cli.main([*options, "--gin.TRAIN_STEPS=2"]) == 0
  out = capsys.readouterr().out
  saved = (run_dir / "config.gin").read_text()
  assert saved.strip() in out and f"LongText.directory = {corpus!r}" in saved
  assert (run_dir / "parameters.txt").read_text().strip() in out
  # The saved file is a run file: the same run is found to be done, with nothing else given.
  assert cli.main(["train", f"--gin_file={run_dir / 'config.gin'}"]) == 0
  assert "has all of its 2 steps" in capsys.readouterr().out
  assert cli.main([*options, "--gin.TRAIN_STEPS=2", "--gin.FollowingReader.seed=5"]) == 2
  assert "FollowingReader.seed" in (error := capsys.readouterr().err) or "data.seed" in error
  params, model, vocabulary, step = load_params(run_dir)
  assert model.model_dim == 16 and vocabulary == "bytes" and step == 2
  assert params["embedder"]["embedding"].shape == (259, 16)
  # Another corpus in the same place is other data.
  (pathlib.Path(corpus) / "new.txt").write_text("A text that came later.")
  assert cli.main([*options, "--gin.TRAIN_STEPS=3"]) == 2
  error = capsys.readouterr().err
  assert "data.corpus is 19 files, " in error and " there and 20 files, " in error


def test_sigterm_ends_with_a_line_and_status_143_and_the_restart_is_bitwise(tmp_path, corpus):
  run_dir, whole = tmp_path / "run", tmp_path / "whole"
  options = [*SMALL, f"--gin.CORPUS={corpus}"]
  process = start(*options, f"--gin.RUN_DIR={run_dir}", "--gin.TRAIN_STEPS=1000000")
  for line in process.stdout:
    if line.startswith("step "):
      break
  process.send_signal(signal.SIGTERM)
  out, err = process.communicate(timeout=600)
  assert process.returncode == 143, err
  (stopped,) = list_steps(run_dir / "checkpoints")
  assert out.splitlines()[-1] == (
      f"famjax: SIGTERM: saved {run_dir} after step {stopped} of 1000000; the same command goes on"
      " from there"
  )
  options.append(f"--gin.TRAIN_STEPS={stopped + 3}")
  for directory in (run_dir, whole):
    assert cli.main([*options, f"--gin.RUN_DIR={directory}"]) == 0
  equal = jax.tree.map(lambda a, b: (a == b).all(), load_params(run_dir)[0], load_params(whole)[0])
  assert all(jax.tree.leaves(equal))


WRONG = {
    "no run file": (["train"], "--gin_file"),
    "missing gin file": (["train", "--gin_file=gin/runs/none.gin"], "gin/runs/none.gin"),
    "nothing set": ([*SMALL], "RUN_DIR must be set"),
    "unknown macro": ([*SMALL, "--gin.RUN_DIR=x", "--gin.BATCH=3"], "'BATCH'; there is BATCH_SIZE"),
    "unknown name": ([*SMALL, "--gin.RUN_DIR=x", "--gin.TrainCfg.seed=3"], "TrainConfig"),
    "missing corpus": ([*SMALL, "--gin.RUN_DIR=x", "--gin.CORPUS=/nowhere"], "corpus /nowhere"),
    "corpus without text": ([*SMALL, "--gin.RUN_DIR=x", "--gin.CORPUS=empty"], "corpus empty"),
    "accumulate": (
        [*SMALL, "--gin.RUN_DIR=x", "--gin.TrainConfig.accumulate=3"],
        "accumulate 3 does not divide a batch of 2",
    ),
    "long FAM": ([*SMALL, "--gin.RUN_DIR=x", "--gin.FAM_LENGTH=9"], "fam_length 9 is longer"),
    "vocabulary file": (
        [*SMALL, "--gin.RUN_DIR=x", "--gin.VOCABULARY=/nowhere.model"], "/nowhere.model",
    ),
    "model for a vocabulary": (
        [*SMALL, "--gin.RUN_DIR=x", "--gin.ModelConfig.vocab_size=100"], "259 entries",
    ),
    "a run directory below a file": (
        [*SMALL, "--gin.TRAIN_STEPS=1", "--gin.RUN_DIR=/etc/passwd/x"], "/etc/passwd",
    ),
    "a seed for a study": (
        ["study", "--gin_file=gin/runs/quickstart.gin", "--gin.SEED=3"], "set SEEDS",
    ),
    "models of a study": (
        ["study", "--gin_file=gin/runs/quickstart.gin", "--gin.Study.models=FAM"],
        "Study.models is 'FAM': it must be dict",
    ),
    "a file for a study": (
        ["study", "--gin_file=gin/runs/quickstart.gin", "--gin.STUDY_DIR=/etc/passwd"],
        "/etc/passwd",
    ),
    "no such checkpoint": (
        [*SMALL, "--gin.RUN_DIR=x", "--gin.TrainConfig.init_checkpoint=/nowhere"], "/nowhere",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_bad_input_is_one_line_and_status_2_and_nothing_is_written(
    tmp_path, monkeypatch, capfd, what
):
  arguments, message = WRONG[what]
  (tmp_path / "empty").mkdir()
  monkeypatch.chdir(tmp_path)
  assert cli.main(arguments) == 2
  shown = capfd.readouterr()
  assert shown.err.startswith("famjax: error: ") and message in shown.err
  assert shown.err.count("\n") == 1 and not shown.out
  assert [p.name for p in tmp_path.rglob("*")] == ["empty"]


def test_a_vocabulary_that_does_not_match_a_checkpoint(tmp_path, corpus, capsys):
  options = [*SMALL, "--gin.TRAIN_STEPS=1", f"--gin.CORPUS={corpus}"]
  assert cli.main([*options, f"--gin.RUN_DIR={tmp_path / 'a'}"]) == 0
  options += [
      f"--gin.RUN_DIR={tmp_path / 'b'}", f"--gin.TrainConfig.init_checkpoint={tmp_path / 'a'}",
      "--gin.VOCABULARY=passkey_words", "--gin.ModelConfig.vocab_size=259",
  ]  # fmt: skip
  assert cli.main(options) == 2
  assert "vocabulary 'bytes', not 'passkey_words'" in capsys.readouterr().err
  assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    "error, status, line",
    [
        (DivergedError("loss is nan at step 7"), 1, "step 7"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (TerminatedError("SIGTERM: it goes on from there"), 143, "goes on from there"),
        (OSError(28, "No space left on device", "/full"), 74, "No space left on device: '/full'"),
        (RuntimeError("a peer is gone"), 70, "Traceback"),
    ],
)
def test_a_run_that_diverges_or_is_interrupted(monkeypatch, capsys, error, status, line):
  def fail(bindings):
    del bindings
    raise error

  monkeypatch.setattr(configuration, "train_from_gin", fail)
  assert cli.main([*SMALL, "--gin.RUN_DIR=x"]) == status
  assert line in capsys.readouterr().err
  assert not pathlib.Path("x").exists()


def test_unknown_commands_and_options_are_refused(capsys):
  for arguments in (["trian"], ["train", "--steps=3"], []):
    with pytest.raises(SystemExit) as end:
      cli.main(arguments)
    assert end.value.code == 2
  assert "usage: famjax" in capsys.readouterr().err
