"""Two processes of two host devices train as one of four does, whatever becomes of them meanwhile."""

import contextlib
import json
import os
import socket
import time

import numpy as np
import pytest

from famjax.training.storage import list_steps
from tests import forks

pytestmark = pytest.mark.slow

STEPS = 40
RUN = [
    "--gin_file=gin/runs/passkey_base.gin", f"--gin.TRAIN_STEPS={STEPS}", "--gin.LENGTH=96",
    "--gin.LONGEST_BLOCKS=12", "--gin.ModelConfig.num_layers=2", "--gin.ModelConfig.model_dim=32",
    "--gin.MESH_DATA=1", "--gin.MESH_FSDP=2", "--gin.MESH_TENSOR=2",
    "--gin.TrainConfig.log_every=1", "--gin.TrainConfig.checkpoint_every=5",
]  # fmt: skip


@contextlib.contextmanager
def processes(run_dir, number, *more):
  """So many processes with four devices in all; whatever is left of them is killed at the end."""
  with socket.socket() as free:
    free.bind(("localhost", 0))
    address = f"localhost:{free.getsockname()[1]}"
  many = ["--distributed"] if number > 1 else []
  flags = f"--xla_force_host_platform_device_count={4 // number} " + os.environ["XLA_FLAGS"]
  started = [
      forks.famjax(
          "train", *many, *RUN, *more, f"--gin.RUN_DIR={run_dir}",
          log=run_dir.with_name(f"{run_dir.name}.{i}.log"), XLA_FLAGS=flags,
          JAX_COORDINATOR_ADDRESS=address, JAX_NUM_PROCESSES=str(number), JAX_PROCESS_ID=str(i),
      )
      for i in range(number)
  ]  # fmt: skip
  try:
    yield started
  finally:
    for process in started:
      process.kill()
      process.join()


def status(process, timeout=400):
  """Waits at most `timeout` seconds for a process. Returns its exit status; None: it goes on."""
  process.join(timeout)
  return process.exitcode


def steps_done(run_dir):
  """Losses by step, as far as they are written."""
  file = run_dir / "metrics.jsonl"
  lines = file.read_text().splitlines(keepends=True) if file.exists() else []
  lines = [json.loads(line) for line in lines if line.endswith("\n")]
  return {line["step"]: line["loss"] for line in lines if line["split"] == "train"}


def wait_for_step(run_dir, step, process):
  while max(steps_done(run_dir), default=0) < step:
    assert process.is_alive(), "it ended before"
    time.sleep(0.02)


@pytest.fixture(scope="module", name="one")
def _one(tmp_path_factory):
  """The directory of a run of one process that nothing befell."""
  run_dir = tmp_path_factory.mktemp("runs") / "one"
  with processes(run_dir, 1) as [alone]:
    assert status(alone) == 0
  return run_dir


def test_killed_stopped_and_started_again(one, tmp_path):
  """The losses are those of one process that nothing befell, up to the order of float32 sums."""
  expected = steps_done(one)
  assert sorted(expected) == list(range(1, STEPS + 1))

  run_dir = tmp_path / "two"
  with processes(run_dir, 2) as [first, second]:
    wait_for_step(run_dir, 12, first)  # two checkpoints at least
    second.kill()
  killed_at = max(steps_done(run_dir))
  assert killed_at < STEPS
  *_, older, newest = sorted(list_steps(run_dir / "checkpoints"))
  broken = run_dir / "checkpoints" / str(newest)
  (broken / "commit_success.txt").unlink(missing_ok=True)  # the kill may have come before it

  with processes(run_dir, 2) as [first, second]:
    wait_for_step(run_dir, killed_at + 5, first)
    second.terminate()  # one of them is told, and both save and end
    assert status(first, timeout=100) == 143 and status(second, timeout=100) == 143
  stopped_at = max(steps_done(run_dir))
  assert killed_at < stopped_at < STEPS
  log = (tmp_path / "two.0.log").read_text()
  assert f"saved {run_dir} after step {stopped_at} of {STEPS}" in log
  assert f"checkpoint {broken} is not whole" in log
  assert f"resuming {run_dir} after step {older}" in log  # the first process has said so to both
  assert broken.with_name(f"{newest}.unreadable").is_dir()

  with processes(run_dir, 2) as [first, second]:
    assert status(first) == 0 and status(second) == 0
  log = (tmp_path / "two.0.log").read_text()
  assert f"resuming {run_dir} after step {stopped_at}" in log
  assert "loss" in log and "loss" not in (tmp_path / "two.1.log").read_text()  # it is silent
  found = steps_done(run_dir)
  assert sorted(found) == sorted(expected)
  np.testing.assert_allclose(
      [found[step] for step in expected], list(expected.values()), rtol=1e-4
  )


def test_lora_on_a_checkpoint_of_another_run(one, tmp_path):
  """Each process reads its part of the base, and they agree on what it is."""
  lora = [
      "--gin_file=gin/options/lora.gin", "--gin.LORA_RANK=2", "--gin.TRAIN_STEPS=3",
      f"--gin.TrainConfig.init_checkpoint={one}",
  ]  # fmt: skip
  found = []
  for number in (1, 2):
    run_dir = tmp_path / str(number)
    with processes(run_dir, number, *lora) as started:
      assert [status(process) for process in started] == [0] * number
    found.append(steps_done(run_dir))
    assert (run_dir / "base" / "0").is_dir()
  np.testing.assert_allclose(list(found[1].values()), list(found[0].values()), rtol=1e-4)
  assert found[0][3] != found[0][1]
