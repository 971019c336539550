"""Tests that a run which is killed again and again ends with the same bits as one that is not."""

import dataclasses
import json
import random
import time

import jax
import numpy as np
import pytest

from famjax.training.loop import train
from famjax.training.storage import list_steps
from tests import forks
from tests.training import toy

KILLS, STEPS, EVERY = 14, 80, 5


def run(run_dir):
  """Starts a run, or goes on with one."""
  config = dataclasses.replace(
      toy.TRAIN, train_steps=STEPS, log_every=1, checkpoint_every=EVERY, follow_rows=True,
      rsp_probability=0.5, random_offset=True, keep_checkpoints=2,
  )  # fmt: skip
  train(run_dir, toy.MODEL, toy.ToyReader(), toy.OPTIMIZER, config)


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
  whole = forks.start(run, tmp_path / "whole", log=tmp_path / "whole.log")
  rng = random.Random(0)
  for kill in range(KILLS):
    log = tmp_path / f"{kill}.log"
    process = forks.start(run, tmp_path / "killed", log=log)
    steps = rng.randrange(1, 12)  # of this process: some kills come before its first checkpoint
    while not log.exists() or log.read_text().count("\nstep ") < steps:
      assert process.is_alive(), log.read_text()
      time.sleep(0.005)
    process.kill()
    process.join()
  last = forks.start(run, tmp_path / "killed", log=tmp_path / "last.log")
  for process in (whole, last):
    process.join(timeout=300)
    assert process.exitcode == 0
  assert (tmp_path / "whole.log").read_text()
  expected, found = arrays(tmp_path / "whole"), arrays(tmp_path / "killed")
  assert expected.keys() == found.keys() and len(expected) > 40
  for name, array in expected.items():
    assert array.dtype == found[name].dtype, name
    assert array.tobytes() == found[name].tobytes(), name
  assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
  assert len(losses(tmp_path / "whole")) == STEPS
