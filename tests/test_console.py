"""Tests of work whose terminal or pipe goes away."""

import io
import os
import pty
import signal
import subprocess
import sys
import time

import pytest

from famjax import console
from famjax.training.checkpoint import load_params
from tests.inference import tiny

STEPS = 300


def training(run_dir):
  """Returns the command line of a run that takes a few seconds."""
  return [
      sys.executable, "-m", "famjax.cli", "train", "--gin_file=gin/runs/passkey_base.gin",
      f"--gin.RUN_DIR={run_dir}", f"--gin.TRAIN_STEPS={STEPS}", "--gin.LONGEST_BLOCKS=5",
      "--gin.BATCH_SIZE=2", "--gin.LENGTH=16", "--gin.TrainConfig.log_every=1",
      "--gin.ModelConfig.model_dim=8", "--gin.ModelConfig.num_layers=1", "--gin.FAM_LENGTH=2",
      "--gin.TrainConfig.checkpoint_every=100",
  ]  # fmt: skip


def assert_whole(run_dir):
  """Checks that a run has done all of its steps, saved them, and kept every line."""
  assert load_params(run_dir).step == STEPS
  lines = (run_dir / "log.txt").read_text().splitlines()
  assert sum(line.startswith("step ") for line in lines) == STEPS
  assert any("starting from random parameters" in line for line in lines)


@pytest.mark.slow
def test_training_goes_on_when_its_pipe_is_closed(tmp_path):
  """As in `famjax train ... | head -2`."""
  run = subprocess.Popen(training(tmp_path / "run"), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
  for _ in range(2):
    assert run.stdout.readline()
  run.stdout.close()
  run.stderr.close()
  assert run.wait(timeout=300) == 0
  assert_whole(tmp_path / "run")


@pytest.mark.slow
def test_training_goes_on_when_its_terminal_is_closed(tmp_path):
  """The window is closed: SIGHUP comes, and every write fails."""
  terminal, inside = pty.openpty()
  takes = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
  run = subprocess.Popen(
      [sys.executable, "-c", takes, *training(tmp_path / "run")], stdin=inside, stdout=inside,
      stderr=inside, start_new_session=True,
  )  # fmt: skip
  os.close(inside)
  seen = b""
  while b"first step" not in seen:
    seen += os.read(terminal, 4096)
  os.close(terminal)  # the kernel sends SIGHUP to the session
  assert run.wait(timeout=300) == 0
  assert_whole(tmp_path / "run")


def test_a_short_command_ends_without_a_word(tmp_path):
  """As in `famjax score ... | true`."""
  tiny.save(tmp_path, tiny.CONFIG)
  command = [sys.executable, "-m", "famjax.cli", "score", str(tmp_path), "--text=To read", "--tokens"]
  score = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
  score.stdout.close()
  errors = score.stderr.read()
  assert score.wait(timeout=300) == 141
  assert not errors


class Gone(io.StringIO):
  """A stream that nobody reads."""

  def write(self, text):
    raise BrokenPipeError(32, "Broken pipe")


def test_what_cannot_be_written_is_dropped(monkeypatch):
  closed = io.StringIO()
  closed.close()
  for stream in (Gone(), closed):
    monkeypatch.setattr(sys, "stdout", stream)
    with console.surviving():
      print("nobody reads this", flush=True)
      sys.stdout.writelines(["nor", "this"])
    assert sys.stdout is stream


def test_what_can_be_written_is_written(capsys):
  with console.surviving():
    print("out", end="")
    print("err", end="", file=sys.stderr)
    assert sys.stdout.encoding and not sys.stdout.isatty()
  assert capsys.readouterr() == ("out", "err")


def test_sighup_is_ignored_meanwhile_alone():
  came = []
  before = signal.signal(signal.SIGHUP, lambda *_: came.append(True))
  try:
    with console.surviving():
      os.kill(os.getpid(), signal.SIGHUP)  # somebody handles it already: it stays so
      time.sleep(0.01)
    assert came
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    with console.surviving():
      os.kill(os.getpid(), signal.SIGHUP)
      assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_DFL
  finally:
    signal.signal(signal.SIGHUP, before)


class Ascii(io.TextIOWrapper):
  """A stream of ASCII alone."""

  def __init__(self):
    super().__init__(io.BytesIO(), encoding="ascii")


def test_characters_that_a_stream_lacks_are_escaped(monkeypatch):
  stream = Ascii()
  monkeypatch.setattr(sys, "stdout", stream)
  with console.surviving():
    print("größer")
    print("after", flush=True)
  assert stream.buffer.getvalue() == b"gr\\xf6\\xdfer\nafter\n"


def test_an_error_that_passes_drops_one_write_alone(monkeypatch):
  class Full(io.StringIO):
    left = 1

    def write(self, text):
      if self.left and not text.isspace():
        self.left -= 1
        raise OSError(28, "No space left on device")
      return super().write(text)

  stream = Full()
  monkeypatch.setattr(sys, "stdout", stream)
  with console.surviving():
    print("lost")
    print("kept", flush=True)
  assert stream.getvalue().split() == ["kept"]


def test_a_closed_descriptor_is_no_stream(monkeypatch):
  monkeypatch.setattr(sys, "stdout", None)
  with console.surviving():
    print("nobody reads this", flush=True)
    sys.stdout.write("nor this")
  assert sys.stdout is None
  console.silence(None)
  before = len(os.listdir("/proc/self/fd"))
  for _ in range(20):
    console.silence(io.StringIO())  # has no descriptor
  assert len(os.listdir("/proc/self/fd")) == before
