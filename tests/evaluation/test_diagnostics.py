"""What is looked at is what the model does: every weight from the outside, by the model itself."""

import dataclasses
import json

from flax import nnx
import jax.numpy as jnp
import numpy as np
import pytest

from famjax import cli
from famjax.errors import UserError
from famjax.evaluation import diagnostics
from famjax.model.config import MemoryConfig, ModelConfig
from famjax.model.decoder import Decoder
from tests.inference import tiny

N, F = 8, 3
CONFIG = ModelConfig(
    vocab_size=40, num_layers=3, model_dim=16, num_heads=4, num_kv_heads=2, ff_dim=24,
    attention_cap=2.0, layer_kinds=("nope", "global"),
    memory=MemoryConfig("fam", block_size=N, memory_segments=1, fam_length=F),
)  # fmt: skip
TOKENS = np.random.default_rng(0).integers(0, 40, 4 * N + 3).astype(np.int32)


@pytest.mark.parametrize("init", ["prompt", "prefix"])
def test_the_fam_is_the_models_own(init):
  memory = dataclasses.replace(CONFIG.memory, fam_init=init)
  decoder = Decoder(dataclasses.replace(CONFIG, memory=memory), rngs=nnx.Rngs(1))
  found = diagnostics.look(decoder, TOKENS)
  _, state = decoder(jnp.asarray(TOKENS[None, : 4 * N]))
  for l, one in enumerate(found):
    np.testing.assert_allclose(one.fam[-1], state.fam[l, 0], atol=2e-5)
    np.testing.assert_allclose(one.write.sum(-1), 1, rtol=1e-5)
    assert one.write.shape == (4, 4, F, F + N) and one.read.shape == (4, 4, N, F)
    outside = 1 - one.read.sum(-1) - one.own.sum(-1)  # what goes to the memory segment
    np.testing.assert_allclose(outside[0], 0, atol=1e-5)  # block 0 has none
    assert outside[1:].min() > 0 and (np.triu(one.own[0, 0], 1) == 0).all()


def test_measures_of_what_is_known():
  T, H, D = 3, 2, 4
  write = np.full((T, H, F, F + N), 1 / (F + N))  # alike over all keys
  read = np.zeros((T, H, N, F))
  read[..., 0] = 0.25  # one vector alone is read
  fam = np.broadcast_to(np.eye(F, D), (T, F, D))
  (row,) = diagnostics.measures([
      diagnostics.Look(write, read, np.zeros((T, H, N, N)), np.full((T, H, N), -2.0), fam)
  ])
  assert row["write"] == pytest.approx(F + N) and row["read"] == pytest.approx(0.25)
  assert row["slots"] == pytest.approx(1, abs=1e-4) and row["energy"] == -2
  assert row["distance"] == pytest.approx(2**0.5)


def test_the_command_leaves_a_picture(tmp_path, capsys):
  tiny.save(tmp_path / "run", tiny.config())
  command = ["look", str(tmp_path / "run"), "--text=A text of some blocks."]
  command += [f"--out={tmp_path / 'look'}"]
  assert cli.main(command) == 0
  assert "distance" in capsys.readouterr().out
  assert len(json.loads((tmp_path / "look" / "fam.json").read_text())["layers"]) == 2
  assert (tmp_path / "look" / "fam.png").stat().st_size > 10_000
  tiny.save(tmp_path / "plain", tiny.config("bswa"))
  assert cli.main(["look", str(tmp_path / "plain"), "--text=abcdefgh"]) == 2
  assert "'bswa', which has no FAM to look at" in capsys.readouterr().err
  windows = dataclasses.replace(CONFIG, layer_kinds=("local", "global"), local_window=20)
  with pytest.raises(UserError, match="layers with a window are not drawn"):
    diagnostics.look(Decoder(windows, rngs=nnx.Rngs(1)), TOKENS)
  with pytest.raises(UserError, match="3 tokens are less than a block of 8"):
    diagnostics.look(Decoder(CONFIG, rngs=nnx.Rngs(1)), TOKENS[:3])
