"""launch/tpu_train.sh beside slices and runs of others."""

import os
import re
import signal
import subprocess
import time

import pytest

from tests.launch.cloud import RUN, SCRIPT

SMALL_TREE = True
FOREIGN = "famjax_id=famjax-0123456789abcdef,famjax_owner=ann_on_desk\n"
OTHER_RUN = "--gin.RUN_DIR=gs://bucket/other"


def identities(cloud):
  return {path.name: path.read_text().split()[0] for path in (cloud.logs / "t").glob("*.id")}


def wait_for_run(cloud, number=1):
  """Waits until so many runs were started, and the machines know of them."""
  cloud.until(lambda: len(cloud.runs) >= number)
  cloud.until(lambda: "run on" in cloud.read("out"))


# Slices


@pytest.mark.parametrize("verb, state, labels", [
    ("create", "SUSPENDED", ""), ("train", "SUSPENDED", ""), ("delete", "SUSPENDED", ""),
    ("create", "FAILED", FOREIGN), ("train", "FAILED", FOREIGN), ("train", "SUSPENDING", FOREIGN),
    ("train", "ACTIVE", "team=nlp\n"), ("train", "ACTIVE", FOREIGN), ("delete", "ACTIVE", FOREIGN),
    ("stop", "ACTIVE", FOREIGN), ("sync", "ACTIVE", FOREIGN), ("run", "ACTIVE", FOREIGN),
])  # fmt: skip
def test_a_slice_of_others_is_left_alone(cloud, verb, state, labels):
  cloud.write("state", state + "\n")
  cloud.write("labels", labels)
  done = cloud(verb)
  assert done.returncode == 2, done.stdout + done.stderr
  assert len(done.stderr.splitlines()) == 1 and "--adopt" in done.stderr
  assert ("ann_on_desk" in done.stderr) == (labels == FOREIGN)
  assert cloud.read("state") == state + "\n" and not cloud.runs
  for verb in ("create", "delete", "scp", "ssh"):
    assert cloud.count(f"queued-resources {verb}") + cloud.count(f"tpu-vm {verb}") == 0


@pytest.mark.parametrize("state", ["SUSPENDED", "ACTIVE"])
@pytest.mark.parametrize("labels", ["", FOREIGN])
def test_adopt_takes_a_slice_over(cloud, state, labels):
  cloud.write("state", state + "\n")
  cloud.write("labels", labels)
  cloud.write("created", "2026-11-29T12:00:00Z\n")
  done = cloud("train", "--adopt")
  assert done.returncode == 0 and len(cloud.runs) == 1, done.stdout + done.stderr
  assert cloud.count("queued-resources create") == (state == "SUSPENDED")
  done = cloud("delete", run=())  # it is remembered
  assert done.returncode == 0 and not cloud.read("state"), done.stderr


def test_an_adopted_slice_that_others_made_anew_is_foreign(cloud):
  cloud.write("state", "ACTIVE\n")
  cloud.write("created", "2026-11-29T12:00:00Z\n")
  assert cloud("create", "--adopt").returncode == 0
  cloud.write("created", "2026-11-29T13:00:00Z\n")
  assert cloud("delete", run=()).returncode == 2


def test_delete_of_an_unlabelled_slice_needs_adopt(cloud):
  cloud.write("state", "ACTIVE\n")
  assert cloud("delete", run=()).returncode == 2 and cloud.read("state")
  assert cloud("delete", "--adopt", run=()).returncode == 0 and not cloud.read("state")
  done = cloud("delete", run=())
  assert done.returncode == 0 and "there is no slice t in z" in done.stdout


def test_a_slice_that_changes_hands_in_mid_run_is_left_alone(cloud):
  cloud.write("plan.t-0", "waits\n")
  training = cloud.start("train")
  wait_for_run(cloud)
  cloud.write("labels", FOREIGN)
  assert training.wait(timeout=150) == 2, cloud.read("out")
  assert "ann_on_desk" in cloud.read("out") and cloud.count("queued-resources delete") == 0


def test_ids_are_labels_of_their_own_and_survive(cloud, tmp_path):
  """gcloud takes at most 63 lower-case letters, digits, - and _ as the value of a label."""
  assert cloud("create").returncode == 0
  (call,) = [call for call in cloud.calls if "queued-resources create" in call]
  value = "([a-z0-9_-]{1,63})"
  labels = re.search(f"--labels=famjax_id={value},famjax_owner={value} ", call)
  assert labels and list(identities(cloud).values()) == [labels[1]]
  assert cloud("train").returncode == 0  # another process, the same logs
  second = cloud("train", f"--logs={tmp_path / 'second'}")  # as a second checkout has
  assert second.returncode == 2 and "--logs=DIR" in second.stderr and len(cloud.runs) == 1
  assert cloud("delete", run=()).returncode == 0
  for options in (["--zone=y"], ["--project=p"], ["--project=q"]):
    assert cloud("create", *options).returncode == 0
    cloud("delete", *options, run=())
  assert len(set(identities(cloud).values())) == len(identities(cloud)) == 4


# Launchers


def test_a_second_launcher_refuses(cloud, tmp_path):
  cloud.write("plan.t-0", "waits\n")
  first = cloud.start("train")
  wait_for_run(cloud)
  for verb, options, run in (
      ("train", [], [RUN]), ("train", [], [OTHER_RUN]), ("run", [], [OTHER_RUN]),
      ("create", [], []), ("sync", [], []), ("setup", [], []), ("delete", [], []),
      ("train", [f"--logs={tmp_path / 'second'}"], [OTHER_RUN]),
      ("train", [f"--logs={tmp_path / 'second'}", "--adopt"], [OTHER_RUN]),
  ):  # fmt: skip
    done = cloud(verb, *options, run=run)
    assert done.returncode == 2, (verb, options, done.stdout + done.stderr)
    assert len(done.stderr.splitlines()) == 1, done.stderr
    if not options:
      assert f"process {first.pid} on " in done.stderr and "logs --name=t" in done.stderr
      assert "since 20" in done.stderr and "gs://bucket/run" in done.stderr
    assert len(cloud.runs) == 1 and first.poll() is None
  assert cloud.count("queued-resources create") == 1
  assert cloud.count("queued-resources delete") == 0
  assert "running gs://bucket/run" in cloud("status", run=()).stdout


def test_the_same_command_takes_the_run_up_again(cloud):
  cloud.write("plan.t-0", "waits\n")
  cloud.write("plan.t-1", "waits\n")
  for number, end in enumerate([signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGKILL]):
    launcher = cloud.start("train", WORKERS="2")
    wait_for_run(cloud, 2)
    cloud.until(lambda number=number: cloud.read("out").count("following the run") == number)
    if end == signal.SIGINT:
      os.killpg(launcher.pid, end)  # as a terminal does
    else:
      launcher.send_signal(end)
    assert launcher.wait(timeout=100) == (-9 if end == signal.SIGKILL else 128 + end)
  assert cloud.read("out").count("interrupted while the run was going on") == 3
  assert "stop --name=t --zone=z" in cloud.read("out")
  other = cloud("train", run=[OTHER_RUN], WORKERS="2")
  assert other.returncode == 2 and "stop --name=t" in other.stderr, other.stdout + other.stderr
  launcher = cloud.start("train", WORKERS="2")
  cloud.until(lambda: cloud.read("out").count("following the run") == 4)
  cloud.write("end", "")
  assert launcher.wait(timeout=150) == 0, cloud.read("out")
  assert cloud.read("out").count("taking up the run") == 4 and len(cloud.runs) == 2


def test_another_machine_takes_a_run_up_by_adopting_it(cloud, tmp_path):
  cloud.write("plan.t-0", "waits\n")
  first = cloud.start("train")
  wait_for_run(cloud)
  first.kill()
  first.wait()
  logs = f"--logs={tmp_path / 'second'}"
  assert cloud("train", logs).returncode == 2
  wrong = cloud("train", logs, "--adopt", run=[OTHER_RUN])
  assert wrong.returncode == 2 and "with other arguments" in wrong.stderr
  second = cloud.start("train", logs, "--adopt")
  cloud.until(lambda: "following the run" in cloud.read("out"))
  cloud.write("end", "")
  assert second.wait(timeout=150) == 0, cloud.read("out")
  assert len(cloud.runs) == 1 and "taking up the run" in cloud.read("out")


def test_a_launcher_that_was_adopted_away_from_does_not_end_the_run(cloud, tmp_path):
  """Its slice has another's run now; it may not stop that."""
  cloud.write("plan.t-0", "waits\n")
  first = cloud.start("train")
  wait_for_run(cloud)
  first.kill()
  first.wait()
  second = cloud.start("train", f"--logs={tmp_path / 'second'}", "--adopt")
  cloud.until(lambda: "following the run" in cloud.read("out"))
  done = cloud("stop", run=())
  assert done.returncode == 2 and "--adopt" in done.stderr, done.stdout + done.stderr
  done = cloud("train")
  assert done.returncode == 2 and "another launcher" in done.stderr, done.stdout + done.stderr
  assert second.poll() is None and len(cloud.runs) == 1


def test_a_run_that_an_older_worker_started_is_not_overwritten(cloud):
  assert cloud("train").returncode == 0
  (cloud.place / "machines/t-0/famjax/launch/tpu_worker.sh").write_text("echo running\n")
  done = cloud("train")
  assert done.returncode == 2 and "belongs to another launcher" in done.stderr, done.stdout
  assert cloud.count("tpu-vm scp") == 1


def test_a_run_on_some_machines_is_ended_before_the_next(cloud):
  cloud.write("plan.t-0", "waits\n")
  cloud.write("plan.t-1", "waits\n")
  first = cloud.start("train", WORKERS="2")
  wait_for_run(cloud, 2)
  first.kill()
  first.wait()
  pid = int((cloud.place / "machines/t-1/famjax/run.pid").read_text().split()[0])
  os.killpg(pid, signal.SIGKILL)
  done = cloud("train", WORKERS="2")
  assert done.returncode == 0, done.stdout + done.stderr
  assert "it is not on all machines" in done.stdout and len(cloud.runs) == 4


def worker(cloud, *arguments, **variables):
  return subprocess.run(
      ["bash", "launch/tpu_worker.sh", *arguments], capture_output=True, text=True, check=False,
      cwd=cloud.place / "machines/t-0/famjax",
      env=cloud.environment | {"MACHINE": "t-0"} | variables,
  )  # fmt: skip


def test_the_machine_itself_refuses_a_second_launcher(cloud):
  """Two launchers may find the machine idle at the same time."""
  cloud.write("plan.t-0", "waits\n")
  cloud.start("train")
  wait_for_run(cloud)
  for who in ({}, {"FAMJAX_LAUNCHER": "famjax-other", "FAMJAX_ATTEMPT": "x"}):
    done = worker(cloud, "run", OTHER_RUN, **who)
    assert done.returncode == 76, done.stdout + done.stderr
    assert "refused: gs://bucket/run is alive there, started by" in done.stdout
  assert worker(cloud, "stop", FAMJAX_LAUNCHER="famjax-other").returncode == 76
  assert len(cloud.runs) == 1 and "running" in worker(cloud, "alive").stdout


def test_the_same_attempt_is_never_started_twice(cloud):
  """gcloud repeats a command by itself when its connection breaks, also when it has ended."""
  for verb in ("create", "sync", "setup"):
    assert cloud(verb).returncode == 0
  cloud.write("plan.t-0", "70\n")
  who = {"FAMJAX_LAUNCHER": "l", "FAMJAX_ATTEMPT": "a"}
  for _ in range(3):
    done = worker(cloud, "run", RUN, **who)
    assert done.returncode == 70 and "Traceback" in done.stdout and len(cloud.runs) == 1
  assert "this run has ended" in done.stdout
  assert worker(cloud, "stop", **who | {"FAMJAX_ATTEMPT": "b"}).returncode == 0
  late = worker(cloud, "run", RUN, **who | {"FAMJAX_ATTEMPT": "b"})  # overtaken by its stop
  assert late.returncode == 143 and len(cloud.runs) == 1


def test_a_failure_of_the_worker_is_none_of_the_run(cloud):
  """1 would mean that the loss diverged."""
  for verb in ("create", "sync", "setup"):
    assert cloud(verb).returncode == 0
  (cloud.place / "machines/t-0/famjax/run.log").mkdir()
  done = worker(cloud, "run", RUN, FAMJAX_LAUNCHER="l", FAMJAX_ATTEMPT="a")
  assert done.returncode == 75 and not cloud.runs


def test_a_launcher_that_is_refused_by_a_machine_does_not_try_again(cloud):
  assert cloud("train").returncode == 0
  cloud.write("plan.t-0", "waits\n")
  place = cloud.place / "machines/t-0/famjax"
  other = subprocess.Popen(
      ["bash", "launch/tpu_worker.sh", "run", OTHER_RUN], cwd=place, stdout=subprocess.DEVNULL,
      env=cloud.environment | {
          "MACHINE": "t-0", "FAMJAX_LAUNCHER": "famjax-other", "FAMJAX_ATTEMPT": "x",
          "FAMJAX_WHO": "ann_on_desk"}, start_new_session=True,
  )  # fmt: skip
  cloud.processes.append(other)
  cloud.until(lambda: len(cloud.runs) == 2)
  done = cloud("train")
  assert done.returncode == 2 and "ann_on_desk" in done.stderr, done.stdout + done.stderr
  assert len(done.stderr.splitlines()) == 1 and len(cloud.runs) == 2 and other.poll() is None


# Signals, pipes and errors of the program


@pytest.mark.parametrize("phase", ["fails.create", "fails.describe", "fails.scp", "fails.storage"])
def test_a_signal_ends_the_launcher_at_once_in_every_phase(cloud, phase):
  cloud.write(phase, "hangs\n")
  first = cloud.start("train")
  cloud.until(lambda: (cloud.place / phase).exists() and not cloud.read(phase))
  started = time.monotonic()
  first.terminate()
  assert first.wait(timeout=100) in (2, 143)
  assert time.monotonic() - started < 5
  if phase != "fails.storage":
    assert "go on. To take it up again: the same command." in cloud.read("out")
  assert cloud("train").returncode == 0  # the lock is free
  assert len(cloud.runs) == 1


def test_a_reader_that_goes_away_does_not_end_the_launcher(cloud):
  cloud.write("plan.t-0", "waits 0.5\n")
  with subprocess.Popen(
      cloud.command("train"), env=cloud.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
  ) as training:
    training.stdout.readline()
    training.stdout.close()
    assert training.wait(timeout=150) == 0
  assert len(cloud.runs) == 1
  assert "run on t-0: waits" in (cloud.logs / "t/1/0-0.log").read_text()


@pytest.mark.parametrize("plan, runs, status", [
    ("70 step\n70 step\n", 2, 70),  # the same traceback twice
    ("70 step\n70 save\n70 load\n", 3, 70),
    ("70 step\n143\n70 step\n", 4, 0),
])  # fmt: skip
def test_an_error_of_the_program_is_not_tried_for_ever(cloud, plan, runs, status):
  cloud.write("plan.t-0", plan)
  done = cloud("train", "--wait=0.01")
  assert done.returncode == status, done.stdout + done.stderr
  assert len(cloud.runs) == runs
  assert ("not tried again" in done.stdout) == (status == 70)


def test_an_error_beside_a_lost_machine_is_of_the_lost_one(cloud):
  cloud.write("plan.t-0", "70 step\n70 step\n")
  cloud.write("plan.t-1", "134\n134\n")
  done = cloud("train", WORKERS="2")
  assert done.returncode == 0, done.stdout + done.stderr
  assert len(cloud.runs) == 6


def test_status_and_logs_change_nothing(cloud):
  assert cloud("train").returncode == 0
  before = {path: path.stat().st_mtime_ns for path in cloud.logs.rglob("*")}
  calls = len(cloud.calls)
  done = cloud("status", run=())
  assert done.returncode == 0 and "machine 0-0: idle" in done.stdout
  assert {path: path.stat().st_mtime_ns for path in cloud.logs.rglob("*")} == before
  for call in cloud.calls[calls:]:
    assert "describe" in call or "tpu_worker.sh alive" in call or "config get-value" in call
  cloud.write("fails.describe", "1 ERROR: UNAVAILABLE: try later\n")
  done = cloud("status", "--name=t", run=())
  assert "t: UNKNOWN (ERROR: UNAVAILABLE: try later)" in done.stdout
  assert not (cloud.logs / "other").exists()
  assert cloud("status", "--name=other", run=()).returncode == 0
  assert not (cloud.logs / "other").exists()


@pytest.mark.parametrize("verb", "create sync setup run train status logs stop delete".split())
def test_every_verb_has_a_dry_run(cloud, verb):
  done = cloud(verb, "--dry_run", "--adopt")
  assert (done.returncode == 0) == (verb != "logs"), done.stdout + done.stderr
  assert not cloud.calls and not cloud.runs and not cloud.logs.exists()
  assert verb == "logs" or "+ gcloud" in done.stdout


@pytest.mark.parametrize("option", [
    "--name=../t", "--name=a b", "--zone=z/y", "--project=p q", "--poll=x", "--wait=",
    "--timeout=0",
])  # fmt: skip
def test_options_that_are_refused(cloud, option):
  done = subprocess.run(
      [str(SCRIPT), "train", "--name=t", "--zone=z", "--type=v5p-8", option, "--", RUN],
      capture_output=True, text=True, check=False, env=cloud.environment,
  )  # fmt: skip
  assert done.returncode == 2 and option.split("=")[0] in done.stderr
  assert len(done.stderr.splitlines()) == 1 and not cloud.calls
