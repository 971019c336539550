"""Models that are small enough for tests of inference, and the checkpoint of one."""

import dataclasses
import pathlib

from flax import nnx
import numpy as np

from famjax.data.vocabularies import load_vocabulary
from famjax.inference.model import Model
from famjax.model.config import MemoryConfig, ModelConfig
from famjax.model.decoder import Decoder
from famjax.training.checkpoint import About, Checkpoints
from tests.training import toy

BYTES = load_vocabulary("bytes")
CONFIG = ModelConfig(
    vocab_size=BYTES.vocab_size, num_layers=2, model_dim=16, num_heads=2, num_kv_heads=1, ff_dim=32,
    tie_embeddings=False,
    memory=MemoryConfig("fam", block_size=4, memory_segments=1, fam_length=2),
)  # fmt: skip


def config(kind: str = "fam", **memory) -> ModelConfig:
  """`CONFIG` with another memory."""
  return dataclasses.replace(CONFIG, memory=dataclasses.replace(CONFIG.memory, kind=kind, **memory))


def model(kind: str = "fam", seed: int = 0) -> Model:
  """A random model of bytes that never takes the end symbol for the likeliest."""
  decoder = Decoder(config(kind), rngs=nnx.Rngs(seed))
  kernel = decoder.head.kernel[...]
  decoder.head.kernel[...] = kernel.at[:, BYTES.eos_id].set(0)
  return Model(decoder, BYTES)


def save(run_dir: pathlib.Path, model_config: ModelConfig, vocabulary: str = "bytes") -> dict:
  """Leaves the checkpoint of a run that has done no step; returns its parameters."""
  state, _ = toy.setting(model_config)
  with Checkpoints(run_dir / "checkpoints", keep=1) as checkpoints:
    checkpoints.save(state, np.zeros(2, np.int64), About(model_config, vocabulary), 1)
  return state.params
