"""Models that are small enough for tests of inference, and the checkpoint of one."""

import dataclasses
import pathlib

from flax import nnx
import jax
import numpy as np
import pytest

from famjax.data.vocabularies import load_vocabulary
from famjax.inference import engine
from famjax.inference.model import Model
from famjax.model.config import MemoryConfig, ModelConfig
from famjax.model.decoder import Decoder
from famjax.training.checkpoint import About, Checkpoints
from tests.training import toy

BYTES = load_vocabulary("bytes")
CHUNK_BLOCKS = engine.CHUNK_BLOCKS  # as it is outside of `few_shapes`
CONFIG = ModelConfig(
    vocab_size=BYTES.vocab_size, num_layers=2, model_dim=16, num_heads=2, num_kv_heads=1, ff_dim=32,
    tie_embeddings=False,
    memory=MemoryConfig("fam", block_size=4, memory_segments=1, fam_length=2),
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def few_shapes():
  """Lets models read two blocks in a call at most: three shapes are compiled in place of five."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(engine, "CHUNK_BLOCKS", 2)
    yield


def config(kind: str = "fam", **memory) -> ModelConfig:
  """`CONFIG` with another memory."""
  return dataclasses.replace(CONFIG, memory=dataclasses.replace(CONFIG.memory, kind=kind, **memory))


def model(kind: str = "fam", seed: int = 0, **memory) -> Model:
  """A random model of bytes that never takes the end symbol for the likeliest."""
  decoder = Decoder(config(kind, **memory), rngs=nnx.Rngs(seed))
  kernel = decoder.head.kernel[...]
  decoder.head.kernel[...] = kernel.at[:, BYTES.eos_id].set(0)
  return Model(decoder, BYTES)


def save(run_dir: pathlib.Path, model_config: ModelConfig, vocabulary: str = "bytes") -> dict:
  """Leaves the checkpoint of a run that has done no step; returns its parameters."""
  state, _ = toy.setting(model_config)
  with Checkpoints(run_dir / "checkpoints", keep=1) as checkpoints:
    checkpoints.save(state, np.zeros(2, np.int64), About(model_config, vocabulary), 1)
  return state.params


def log_likelihoods(model: Model, pairs) -> list[float]:
  """Of texts after contexts, by one call that reads all of them from their start to their end."""
  rows = [np.concatenate(pair) for pair in pairs]
  tokens = np.zeros((len(rows), max(map(len, rows))), np.int32)
  for row, text in zip(tokens, rows):
    row[: len(text)] = text
  logits, _ = model(tokens, model.init_state(len(rows)))
  log_probs = np.asarray(jax.nn.log_softmax(logits[:, :-1]))
  log_probs = np.take_along_axis(log_probs, tokens[:, 1:, None], axis=-1)[..., 0]
  return [
      float(row[len(context) - 1 : len(context) + len(text) - 1].sum())
      for row, (context, text) in zip(log_probs, pairs)
  ]
