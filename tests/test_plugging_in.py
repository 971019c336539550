"""The memory that WORKSPACE.md shows, text and all."""

import pathlib
import re
import sys

import numpy as np

import famjax
from famjax import cli
from famjax.model import strategy

ROOT = pathlib.Path(__file__).resolve().parent.parent
TEXT = (ROOT / "WORKSPACE.md").read_text().partition("## Adding a memory strategy")[2]


def test_a_memory_from_outside_trains_goes_on_and_writes(tmp_path, monkeypatch):
  blocks = re.findall(r"```\w*\n(.*?)```", TEXT, re.S)
  assert len(blocks) == 2 and len(blocks[0].splitlines()) <= 40
  (tmp_path / "my_memory.py").write_text(blocks[0])
  (tmp_path / "mean.gin").write_text(blocks[1])
  monkeypatch.syspath_prepend(tmp_path)
  monkeypatch.chdir(tmp_path)
  strategy.of(famjax.MemoryConfig("rmt"))  # registers those of the package, for good
  monkeypatch.setattr(strategy, "_KINDS", dict(strategy._KINDS))  # pylint: disable=protected-access
  run = [
      "train", "--gin_file=gin/runs/long_text.gin", "--gin_file=gin/models/tiny.gin",
      "--gin_file=mean.gin", "--gin.RUN_DIR=runs/mean", "--gin.BATCH_SIZE=2", "--gin.BLOCK_SIZE=16",
      "--gin.LENGTH=32", "--gin.ModelConfig.num_layers=2", "--gin.ModelConfig.model_dim=16",
      "--gin.TrainConfig.eval_every=0",
  ]  # fmt: skip
  for steps in (2, 4):  # the second one goes on from the first one's checkpoint
    assert cli.main([*run, f"--gin.TRAIN_STEPS={steps}"]) == 0
  model = famjax.load("runs/mean")
  memory = model.config.memory
  assert memory.kind == "mean" and dict(memory.options) == {"decay": 0.8}
  text = "A text of more than two blocks, so that there is a mean."
  tokens = np.frombuffer(text.encode(), np.uint8)[None].astype(np.int32)
  whole, state = model(tokens, model.init_state(1))
  assert np.isfinite(whole).all() and np.abs(state.memory["layers"]).max() > 0
  wanted = famjax.Request(max_new_tokens=3)
  one, two = model.complete([text, text + " "], wanted)  # rows at different places of their blocks
  assert one == model.complete([text], wanted)[0] and two == model.complete([text + " "], wanted)[0]

  del strategy._KINDS["mean"]  # pylint: disable=protected-access
  strategy._make.cache_clear()  # pylint: disable=protected-access
  by_name = famjax.MemoryConfig("my_memory:Mean", options={"decay": 0.8})
  assert strategy.of(by_name) == sys.modules["my_memory"].Mean(0.8)
