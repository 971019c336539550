"""Tests of locks: two processes in one directory, holders that are killed, machines far away."""

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import msgspec
import pytest

from famjax import cli, locks
from famjax.convert import hf
from famjax.errors import UserError
from famjax.inference import session
from famjax.training.checkpoint import load_params
from tests.inference import tiny

HOLD = """
import sys, time
from famjax import locks
with locks.held(sys.argv[1], "run directory"):
  print("held", flush=True)
  time.sleep(300)
"""


@contextlib.contextmanager
def holder(directory):
  """A process that holds a directory."""
  process = subprocess.Popen([sys.executable, "-c", HOLD, str(directory)], stdout=subprocess.PIPE, text=True)
  try:
    assert process.stdout.readline() == "held\n"
    yield process
  finally:
    process.kill()
    process.wait()
    process.stdout.close()


def files(directory):
  return sorted(path.name for path in pathlib.Path(directory).iterdir())


def elsewhere(directory, beat=1, **changes):
  """Leaves the lock of a process on another machine; returns its file."""
  other = locks.Holder("far", "far/boot/pid", 7, "99", "2026-01-01 00:00:00", True, beat)
  other = msgspec.structs.replace(other, **changes)
  path = pathlib.Path(directory, locks.PREFIX + "0" * 32)
  path.write_bytes(msgspec.json.encode(other))
  return path


def test_a_directory_whose_name_is_not_utf_8_is_refused_at_once(tmp_path):
  """Nothing could be saved in it at the end."""
  directory = tmp_path / os.fsdecode(b"a\xff")
  with pytest.raises(UserError, match="its name is not UTF-8"):
    locks.Lock(directory, "run directory").acquire()
  assert not directory.exists()


def test_a_second_process_is_refused_and_told_by_whom(tmp_path):
  with holder(tmp_path) as first:
    with pytest.raises(UserError) as refused:
      locks.Lock(tmp_path, "run directory").acquire()
    said = str(refused.value)
    assert f"run directory {tmp_path} is in use by process {first.pid} on " in said
    assert len(said.splitlines()) == 1
    assert len(files(tmp_path)) == 1  # the first one's alone
  with locks.held(tmp_path, "run directory"):
    pass
  assert not files(tmp_path)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_lock_survives_no_killed_holder(tmp_path, how):
  with holder(tmp_path) as first:
    first.send_signal(how)
    first.wait()
    assert len(files(tmp_path)) == 1  # what it left
    started = time.monotonic()
    with locks.held(tmp_path, "run directory"):
      assert len(files(tmp_path)) == 1
    assert time.monotonic() - started < 5  # nobody waits for a process that is known to be gone
  assert not files(tmp_path)


def test_a_number_that_another_process_has_by_now_is_no_holder(tmp_path):
  me = locks.Lock(tmp_path, "x")._me  # pylint: disable=protected-access
  elsewhere(tmp_path, machine=me.machine, pid=os.getpid(), process="1")
  with locks.held(tmp_path, "run directory"):
    assert len(files(tmp_path)) == 1


def test_a_directory_that_was_made_goes_again(tmp_path):
  with locks.held(tmp_path / "a" / "b", "run directory"):
    assert len(files(tmp_path / "a" / "b")) == 1
  assert not files(tmp_path)
  with locks.held(tmp_path / "a" / "b", "run directory"):
    (tmp_path / "a" / "b" / "result").touch()
  assert files(tmp_path / "a" / "b") == ["result"]


def test_a_holder_on_another_machine_that_lives(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(locks, "LEASE", 20.0)
  elsewhere(tmp_path)
  ended = threading.Event()

  def rewrite():
    for beat in range(2, 1000):
      if ended.wait(0.2):
        return
      elsewhere(tmp_path, beat)

  thread = threading.Thread(target=rewrite)
  thread.start()
  try:
    with pytest.raises(UserError, match="process 7 on far, since 2026-01-01"):
      locks.Lock(tmp_path, "run directory").acquire()
  finally:
    ended.set()
    thread.join()
  assert "waiting up to 20 s" in capsys.readouterr().err


@pytest.mark.parametrize("error", [FileNotFoundError, PermissionError])  # hidepid=2 and hidepid=1
def test_a_holder_whose_process_is_hidden_is_not_taken_to_be_gone(tmp_path, monkeypatch, capsys, error):
  """Systems of many users hide processes; the holder's file says whether it lives."""
  me = locks.Lock(tmp_path, "x")._me  # pylint: disable=protected-access
  read = pathlib.Path.read_text

  def hidden(path, *args, **options):
    if str(path) == "/proc/7/stat":
      raise error(str(path))
    return read(path, *args, **options)

  def kill(pid, number):
    assert (pid, number) == (7, 0)
    raise PermissionError

  monkeypatch.setattr(pathlib.Path, "read_text", hidden)
  monkeypatch.setattr(os, "kill", kill)
  monkeypatch.setattr(locks, "LEASE", 0.5)
  elsewhere(tmp_path, machine=me.machine)
  started = time.monotonic()
  with locks.held(tmp_path, "run directory"):
    assert time.monotonic() - started >= 0.5  # it might have been rewritten
  assert "waiting up to" in capsys.readouterr().err


def test_a_holder_on_another_machine_that_is_gone(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(locks, "LEASE", 0.5)
  elsewhere(tmp_path)
  started = time.monotonic()
  with locks.held(tmp_path, "run directory"):
    assert time.monotonic() - started >= 0.5
    assert len(files(tmp_path)) == 1
  capsys.readouterr()


def test_a_holder_that_stood_still_writes_nothing_more(tmp_path, monkeypatch):
  monkeypatch.setattr(locks, "BEAT", 0.05)
  with locks.held(tmp_path, "run directory") as lock:
    time.sleep(0.3)
    lock.check()
    (file,) = tmp_path.iterdir()
    assert json.loads(file.read_text())["beat"] > 2
    file.unlink()  # somebody else has taken over
    time.sleep(0.3)
    with pytest.raises(UserError, match="another process took over the directory"):
      lock.check()
    assert not files(tmp_path)  # and the lock does not come back


def test_of_many_at_once_at_most_one_has_it(tmp_path):
  """Processes that start together: never two at a time, and each that is refused is told by whom."""
  script = """
import os, pathlib, sys, time
from famjax import locks
from famjax.errors import UserError
place = pathlib.Path(sys.argv[1])
while time.time() < float(sys.argv[2]): pass
for _ in range(30):
  try:
    with locks.held(place / "lock", "run directory"):
      inside = os.open(place / "inside", os.O_CREAT | os.O_EXCL)  # fails if somebody is there
      os.close(inside)
      time.sleep(0.002)
      os.unlink(place / "inside")
      print("held")
  except UserError as error:
    assert " is in use by process " in str(error), error
"""
  start = str(time.time() + 5)
  processes = [
      subprocess.Popen([sys.executable, "-c", script, str(tmp_path), start], stdout=subprocess.PIPE, text=True)
      for _ in range(3)
  ]
  held = [process.communicate(timeout=120)[0].count("held") for process in processes]
  assert [process.returncode for process in processes] == [0, 0, 0]
  assert sum(held) > 0


@pytest.mark.parametrize("text", ["", "{", "[]", '{"host": 3}', '{"pid": "x"}', "\x00\xff"])
def test_what_is_no_lock_of_ours_is_one_line(tmp_path, text):
  (tmp_path / (locks.PREFIX + "x")).write_text(text, encoding="latin-1")
  with pytest.raises(UserError, match="delete it") as refused:
    locks.Lock(tmp_path, "run directory").acquire()
  assert len(str(refused.value).splitlines()) == 1


RUN = [
    "train", "--gin_file=gin/runs/passkey_base.gin", "--gin.TRAIN_STEPS=2", "--gin.LONGEST_BLOCKS=5",
    "--gin.BATCH_SIZE=2", "--gin.LENGTH=16", "--gin.ModelConfig.model_dim=8",
    "--gin.ModelConfig.num_layers=1", "--gin.FAM_LENGTH=2",
]  # fmt: skip


def test_two_trainings_in_one_directory(tmp_path, capsys):
  with holder(tmp_path / "run"):
    assert cli.main([*RUN, f"--gin.RUN_DIR={tmp_path / 'run'}"]) == 2
  assert f"run directory {tmp_path / 'run'} is in use by process" in capsys.readouterr().err
  assert not (tmp_path / "run" / "checkpoints").exists()
  assert cli.main([*RUN, f"--gin.RUN_DIR={tmp_path / 'run'}"]) == 0
  assert load_params(tmp_path / "run").step == 2
  assert not any(map(locks.is_lock, files(tmp_path / "run")))


def test_two_studies_in_one_directory(tmp_path, capsys):
  with holder(tmp_path):
    study = ["study", "--gin_file=gin/runs/quickstart.gin", f"--gin.STUDY_DIR={tmp_path}"]
    assert cli.main(study) == 2
  assert f"study directory {tmp_path} is in use by process" in capsys.readouterr().err


def test_two_conversions_into_one_directory(tmp_path, capsys):
  tiny.save(tmp_path / "run", tiny.config("full"))
  convert = ["convert", "--to=hf", f"--src={tmp_path / 'run'}", f"--dst={tmp_path / 'out'}"]
  with holder(tmp_path / "out"):
    assert cli.main(convert) == 2
  assert f"directory {tmp_path / 'out'} is in use by process" in capsys.readouterr().err
  assert cli.main(convert) == 0
  assert hf.is_hf(tmp_path / "out") and not any(map(locks.is_lock, files(tmp_path / "out")))


def test_two_talks_in_one_session(tmp_path, capsys):
  run = tmp_path / "run"
  tiny.save(run, tiny.CONFIG)
  arguments = ["generate", str(run), "--prompt=One.", "--max_new_tokens=2", f"--session={tmp_path / 's'}"]
  assert cli.main(arguments) == 0
  before = files(tmp_path / "s")
  with holder(tmp_path / "s"):
    assert cli.main(arguments) == 2
    assert f"session {tmp_path / 's'} is in use by process" in capsys.readouterr().err
    model = tiny.model()
    with pytest.raises(UserError, match="is in use by process"):
      session.save(tmp_path / "s", model.read("One."), model)
  assert cli.main(arguments) == 0
  assert before and not any(map(locks.is_lock, files(tmp_path / "s")))


def test_a_lock_is_not_put_beside_other_files(tmp_path, capsys):
  run = tmp_path / "run"
  tiny.save(run, tiny.CONFIG)
  (tmp_path / "s").mkdir()
  (tmp_path / "s" / "letter.txt").write_text("mine")
  arguments = ["generate", str(run), "--prompt=One.", f"--session={tmp_path / 's'}"]
  assert cli.main(arguments) == 2
  assert "directory of something else (letter.txt)" in capsys.readouterr().err
  assert files(tmp_path / "s") == ["letter.txt"]


def test_nothing_stays_behind_when_a_lock_cannot_be_written(tmp_path):
  with pytest.raises(OSError):
    locks.Lock(tmp_path / "a" / ("x" * 300), "run directory").acquire()
  assert not files(tmp_path)


def test_words_of_a_stranger_are_one_plain_line(tmp_path):
  me = locks.Lock(tmp_path, "x")._me  # pylint: disable=protected-access
  elsewhere(
      tmp_path, machine=me.machine, pid=me.pid, process=me.process, host="\x1b[31m", since="a\nb"
  )
  with pytest.raises(UserError) as refused:
    locks.Lock(tmp_path, "run directory").acquire()
  assert str(refused.value).isprintable()
