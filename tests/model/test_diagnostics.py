"""What is looked at is what the model does: every weight from the outside, by the model itself."""

import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from famjax.errors import UserError
from famjax.model import diagnostics
from famjax.model.config import MemoryConfig, ModelConfig
from famjax.model.decoder import Decoder

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
  found = jax.jit(lambda tokens: diagnostics.look(decoder, tokens))(TOKENS)
  _, state = decoder(jnp.asarray(TOKENS[None, : 4 * N]))
  for l in range(3):
    one = jax.tree.map(lambda x: np.asarray(x[l]), found)  # pylint: disable=cell-var-from-loop
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
  one = (write, read, np.zeros((T, H, N, N)), np.full((T, H, N), -2.0), fam)
  found = diagnostics.measures(diagnostics.Look(*(jnp.asarray(part)[None] for part in one)))
  row = {name: float(column[0]) for name, column in found.items()}
  assert row["write"] == pytest.approx(F + N, rel=1e-5) and row["read"] == pytest.approx(0.25)
  assert row["slots"] == pytest.approx(1, abs=1e-4) and row["energy"] == -2
  assert row["distance"] == pytest.approx(2**0.5, rel=1e-5)


def test_windows_hide_tokens_and_not_the_fam():
  windows = dataclasses.replace(CONFIG, layer_kinds=("local", "global"), local_window=6)
  decoder = Decoder(windows, rngs=nnx.Rngs(1))
  found = jax.device_get(diagnostics.look(decoder, TOKENS))
  _, state = decoder(jnp.asarray(TOKENS[None, : 4 * N]))
  np.testing.assert_allclose(found.fam[:, -1], state.fam[:, 0], atol=2e-5)
  far = np.tril(np.ones((N, N), bool), -6)
  assert (found.own[0][..., far] == 0).all() and found.own[1][..., far].min() > 0
  outside = 1 - found.read.sum(-1) - found.own.sum(-1)  # [L, T, H, N], to the memory segment
  assert outside[0, 1:, :, :5].min() > 0 and np.abs(outside[0, 1:, :, 5:]).max() < 1e-5
  assert found.read.min() > 0


def test_what_cannot_be_looked_at():
  decoder = Decoder(CONFIG, rngs=nnx.Rngs(1))
  with pytest.raises(UserError, match="3 tokens are less than a block of 8"):
    diagnostics.look(decoder, TOKENS[:3])
  plain = dataclasses.replace(CONFIG, memory=MemoryConfig("bswa", block_size=N))
  with pytest.raises(UserError, match="'bswa', which has no FAM to look at"):
    diagnostics.look(Decoder(plain, rngs=nnx.Rngs(1)), TOKENS)
