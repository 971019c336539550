"""Tests that a run which is killed again and again ends with the same bits as one that is not."""

import json
import os
import random
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

from famjax.training.storage import list_steps

KILLS, STEPS, EVERY = 14, 80, 5
RUN = f"""
import dataclasses, sys
from famjax.training.loop import train
from tests.training import toy
config = dataclasses.replace(
    toy.TRAIN, train_steps={STEPS}, log_every=1, checkpoint_every={EVERY}, follow_rows=True,
    rsp_probability=0.5, random_offset=True, keep_checkpoints=2,
)
train(sys.argv[1], toy.MODEL, toy.ToyReader(), toy.OPTIMIZER, config)
"""


def start(run_dir, cache):
  """Starts a run, or goes on with one. Compiled programs are shared, as on a user's machine."""
  place = {
      "JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
      "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
  }  # fmt: skip
  return subprocess.Popen(
      [sys.executable, "-c", RUN, str(run_dir)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
      text=True, env=os.environ | place,
  )  # fmt: skip


def arrays(run_dir):
  """Returns every array of the last checkpoint, by name."""
  from orbax.checkpoint import v1 as ocp  # pylint: disable=import-outside-toplevel

  directory = run_dir / "checkpoints"
  assert list_steps(directory)[-1] == STEPS
  with ocp.training.Checkpointer(directory) as checkpointer:
    found = checkpointer.load_checkpointables(STEPS)
  leaves = jax.tree_util.tree_leaves_with_path(found)
  return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def losses(run_dir):
  lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
  return {line["step"]: line["loss"] for line in lines if line["split"] == "train"}


@pytest.mark.slow
def test_a_run_that_is_killed_ends_with_the_same_bits(tmp_path):
  rng = random.Random(0)
  whole = start(tmp_path / "whole", tmp_path / "cache")
  assert whole.communicate(timeout=300)[0] and whole.returncode == 0
  kills = 0
  while True:
    run = start(tmp_path / "killed", tmp_path / "cache")
    # Lines of this process until it is killed: some kills come before its first checkpoint.
    left = rng.randrange(1, 12) if kills < KILLS else STEPS + 1
    for line in run.stdout:
      left -= line.startswith("step ")
      if left <= 0:
        break
    if kills == KILLS:
      run.stdout.read()
      assert run.wait(timeout=300) == 0
      break
    run.send_signal(signal.SIGKILL)
    run.wait()
    run.stdout.close()
    kills += 1
  expected, found = arrays(tmp_path / "whole"), arrays(tmp_path / "killed")
  assert expected.keys() == found.keys() and len(expected) > 40
  for name, array in expected.items():
    assert array.dtype == found[name].dtype, name
    assert array.tobytes() == found[name].tobytes(), name
  assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
  assert len(losses(tmp_path / "whole")) == STEPS
