"""launch/tpu_train.sh, with a cloud in a folder: tests/launch/gcloud.sh and famjax.sh."""

import re
import subprocess
import time

import pytest

from tests.launch.cloud import HERE, ROOT, RUN, SCRIPT

ODD = ["--gin.A='one two'", '--gin.B="x" $HOME `id`', "--gin.C=a\\b;c&d|e*", "--gin.D="]


def test_a_run_that_ends(cloud):
  done = cloud("train", run=[RUN, *ODD])
  assert done.returncode == 0, done.stdout + done.stderr
  assert cloud.runs == [["t-0", "train", "--distributed", RUN, *ODD]]  # byte for byte
  (create,) = [call for call in cloud.calls if "queued-resources create" in call]
  for said in ("--accelerator-type=v5litepod-32", "v2-alpha-tpuv5-lite", "--zone=z", "--node-id=t"):
    assert said in create
  assert "--spot" not in create
  assert "run on t-0: ends" in done.stdout
  assert "run on t-0: ends" in (cloud.logs / "t" / "1" / "0-0.log").read_text()
  machine = cloud.place / "machines" / "t-0" / "famjax"
  assert (machine / "famjax" / "cli.py").is_file() and not (machine / ".git").exists()


def test_data_is_copied_to_every_machine(cloud):
  done = cloud("train", "--data=gs://bucket/two words", WORKERS="2")
  assert done.returncode == 0, done.stdout + done.stderr
  for machine in ("t-0", "t-1"):
    file = cloud.place / "machines" / machine / "data" / "pairs.tsv"
    assert file.read_text() == "of gs://bucket/two words\n"


def test_a_copy_that_fails_is_tried_again(cloud):
  """Its status, 1, is no word of famjax that the loss diverged."""
  cloud.write("copy_fails", "")
  done = cloud("train", "--data=gs://bucket/flan")
  assert done.returncode == 0, done.stdout + done.stderr
  assert "status 75: once more" in done.stdout and len(cloud.runs) == 1


@pytest.mark.parametrize("data, message", [
    ("/mnt/flan", "--data=/mnt/flan is not in a bucket"),
    ("gs://bucket/missing", "--data=gs://bucket/missing cannot be read"),
])  # fmt: skip
def test_data_is_looked_at_before_anything_is_paid_for(cloud, data, message):
  done = cloud("train", f"--data={data}")
  assert done.returncode == 2 and message in done.stderr
  assert len(done.stderr.splitlines()) == 1
  assert cloud.count("queued-resources create") == 0


def test_a_slice_that_is_there_is_used(cloud):
  assert cloud("create").returncode == 0
  assert cloud("train").returncode == 0
  assert cloud.count("queued-resources create") == 1


def test_creation_that_fails_twice(cloud):
  cloud.write("create_failures", "2")
  done = cloud("train", "--spot")
  assert done.returncode == 0, done.stdout + done.stderr
  assert cloud.count("queued-resources create") == 3
  assert cloud.count("queued-resources delete") == 2 and cloud.count("--spot") == 3
  assert "once more in 0.1 s (retry 1 of 10)" in done.stdout
  assert "once more in 0.2 s (retry 2 of 10)" in done.stdout  # the wait doubles


def test_preempted_in_mid_run(cloud):
  """The slice is given back, made anew, and the same command goes on."""
  cloud.write("plan.t-0", "preempted\n")
  done = cloud("train", run=[RUN, *ODD])
  assert done.returncode == 0, done.stdout + done.stderr
  assert [run[1:] for run in cloud.runs] == [["train", "--distributed", RUN, *ODD]] * 2
  assert cloud.count("queued-resources delete") == 1
  assert cloud.count("queued-resources create") == 2
  assert (cloud.logs / "t" / "2" / "0-0.log").is_file()


def test_told_to_stop_is_again(cloud):
  cloud.write("plan.t-0", "143\n")
  done = cloud("train")
  assert done.returncode == 0
  assert len(cloud.runs) == 2 and cloud.count("queued-resources create") == 1


@pytest.mark.parametrize("status", [1, 2])
def test_what_would_fail_again_is_not_tried_again(cloud, status):
  cloud.write("plan.t-0", f"{status}\n")
  done = cloud("train")
  assert done.returncode == status and len(cloud.runs) == 1
  assert "not tried again" in done.stdout


def test_a_worker_that_fails_ends_the_round_for_all(cloud):
  for machine, what in enumerate(("waits", "waits", "134", "waits")):
    cloud.write(f"plan.t-{machine}", what + "\n")
  started = time.monotonic()
  done = cloud("train", WORKERS="4")
  assert done.returncode == 0, done.stdout + done.stderr
  assert time.monotonic() - started < 110  # nobody waited for what the others had to do
  assert len(cloud.runs) == 8 and "a machine ended with status 134" in done.stdout
  assert "saved" in (cloud.logs / "t" / "1" / "0-3.log").read_text()


def test_two_slices_of_two_machines(cloud):
  done = cloud("train", "--slices=2", "--type=v5p-16", WORKERS="2")
  assert done.returncode == 0, done.stdout + done.stderr
  assert sorted(run[0] for run in cloud.runs) == ["t-0-0", "t-0-1", "t-1-0", "t-1-1"]
  (create,) = [call for call in cloud.calls if "queued-resources create" in call]
  assert "--node-prefix=t --node-count=2" in create and "v2-alpha-tpuv5 " in create + " "
  assert sorted(p.name for p in (cloud.logs / "t" / "1").glob("*.log")) == [
      "0-0.log", "0-1.log", "1-0.log", "1-1.log",
  ]  # fmt: skip


def test_no_retries_left(cloud):
  cloud.write("plan.t-0", "134\n" * 3)
  done = cloud("train", "--retries=2")
  assert done.returncode == 3 and len(cloud.runs) == 3
  assert "no retries left after 3 rounds" in done.stdout


def test_stop_ends_the_run_and_nothing_else(cloud):
  cloud.write("plan.t-0", "waits\n")
  other = subprocess.Popen(["bash", "-c", "exec -a famjax sleep 300"])
  training = subprocess.Popen(
      cloud.command("train", "--retries=0"), env=cloud.environment, stdout=subprocess.DEVNULL
  )
  try:
    while not cloud.runs:
      assert training.poll() is None
      time.sleep(0.1)
    assert "running" in cloud("status", run=()).stdout
    assert cloud("stop", run=()).returncode == 0
    assert training.wait(timeout=100) == 3  # it was to be started again, and there was no retry
    assert "saved" in (cloud.logs / "t" / "1" / "0-0.log").read_text()
    assert "idle" in cloud("status", run=()).stdout
    assert other.poll() is None
  finally:
    other.kill()
    training.kill()


@pytest.mark.parametrize("run, message", [
    ([], "name the run's directory"),
    (["--gin.RUN_DIR=runs/mine"], "--gin.RUN_DIR=runs/mine is on a machine that goes away"),
    ([RUN], "gs://bucket/run cannot be written"),
])  # fmt: skip
def test_the_run_directory_is_looked_at_before_anything_is_paid_for(cloud, run, message):
  cloud.write("no_bucket", "")
  done = cloud("train", run=run)
  assert done.returncode == 2 and message in done.stderr
  assert len(done.stderr.splitlines()) == 1
  assert cloud.count("queued-resources create") == 0


@pytest.mark.parametrize("arguments, message", [
    (["fly"], "unknown verb 'fly'"),
    (["train", "--zone=z", "--type=v5p-8"], "train needs --name=NAME"),
    (["train", "--name=t", "--type=v5p-8"], "train needs --zone=ZONE"),
    (["create", "--name=t", "--zone=z"], "create needs --type="),
    (["create", "--name=t", "--zone=z", "--type=gpu-8"], "--type=gpu-8: no image is known"),
    (["train", "--gin.X=1"], "unknown option --gin.X=1; options of famjax train go after --"),
    (["train", "--name=t", "--zone=z", "--type=v5p-8", "--slices=two"], "'two' is not a number"),
])  # fmt: skip
def test_bad_input_is_one_line(cloud, arguments, message):
  done = subprocess.run(
      [str(SCRIPT), *arguments], capture_output=True, text=True, check=False, env=cloud.environment
  )
  assert done.returncode == 2 and message in done.stderr
  assert len(done.stderr.splitlines()) == 1 and not cloud.calls


def test_a_dry_run_says_every_command_and_runs_none(cloud):
  done = cloud("train", "--dry_run", "--spot", "--project=p", run=[RUN, *ODD])
  assert done.returncode == 0, done.stderr
  assert not cloud.calls and not cloud.runs and not cloud.logs.exists()
  said = [line for line in done.stdout.splitlines() if line.startswith("+")]
  for part in ("storage cp", "queued-resources create", "tpu-vm scp", "setup", "tpu_worker.sh"):
    assert any(part in line for line in said), part
  run = next(line for line in said if "tpu_worker.sh" in line and "run" in line)
  assert "--project=p" in run


def test_the_command_of_the_document(cloud):
  text = (ROOT / "docs" / "tpu.md").read_text()
  (command,) = re.findall(r"^ +(launch/tpu_train.sh train (?:.*\\\n)*.*)", text, re.M)
  assert "--dry_run" in command
  done = subprocess.run(
      ["bash", "-c", command], capture_output=True, text=True, check=False, cwd=ROOT,
      env=cloud.environment,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  assert "tpu_worker.sh" in done.stdout and not cloud.calls


def test_the_other_commands_of_the_document(cloud):
  text = (ROOT / "docs" / "tpu.md").read_text()
  commands = re.findall(r"^ +(launch/tpu_train.sh (?!train)(\w+) .*)$", text, re.M)
  assert [verb for _, verb in commands] == ["status", "logs", "stop", "delete"]
  assert cloud("train").returncode == 0
  for command, verb in commands:
    done = subprocess.run(
        ["bash", "-c", f"{command.replace('=fam', '=t')} --dry_run --logs={cloud.logs}"],
        capture_output=True, text=True, check=False, cwd=ROOT, env=cloud.environment,
    )  # fmt: skip
    assert done.returncode == 0 and "\n+" in "\n" + done.stdout, (verb, done.stderr)


def test_local_is_famjax_train_on_this_machine(cloud):
  done = cloud("local", "--dry_run", run=[RUN, *ODD])
  assert done.returncode == 0 and not cloud.calls
  (line,) = done.stdout.splitlines()
  words = subprocess.run(
      ["bash", "-c", f"printf '%s\\0' {line[1:]}"], capture_output=True, check=True
  ).stdout.decode()
  assert words.split("\0")[:-1] == ["famjax", "train", RUN, *ODD]


def test_logs_are_followed(cloud):
  assert cloud("train").returncode == 0
  assert "no logs of other" in cloud("logs", "--name=other", run=()).stderr
  following = subprocess.Popen(
      cloud.command("logs", run=()), env=cloud.environment, stdout=subprocess.PIPE, text=True
  )
  try:
    lines = iter(following.stdout.readline, "")
    assert any("run on t-0: ends" in line for line in lines)
  finally:
    subprocess.run(["pkill", "-P", str(following.pid)], check=False)
    following.kill()


def test_help_is_the_header(cloud):
  done = subprocess.run([str(SCRIPT), "--help"], capture_output=True, text=True, check=True)
  for verb in "train create sync setup run status logs stop delete local".split():
    assert f"  {verb} " in done.stdout
  assert not cloud.calls


def test_scripts_are_clean():
  scripts = [*(ROOT / "launch").rglob("*.sh"), ROOT / "tests" / "run.sh", ROOT / ".ci" / "run"]
  scripts += HERE.glob("*.sh")
  done = subprocess.run(
      ["shellcheck", "-x", *map(str, scripts)], capture_output=True, text=True, check=False,
      cwd=ROOT,
  )  # fmt: skip
  assert done.returncode == 0, done.stdout
