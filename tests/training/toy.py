"""A model, a reader and configs that are small enough for tests of training, and need no seqio."""

import dataclasses

from flax import nnx
import jax
import numpy as np

from famjax.model.config import MemoryConfig, ModelConfig
from famjax.model.decoder import Decoder
from famjax.training.config import TrainConfig
from famjax.training.optimizer import OptimizerConfig, make_optimizer, make_schedule
from famjax.training.step import make_train_step
from famjax.training.train_state import init_train_state, split

MODEL = ModelConfig(
    vocab_size=16, num_layers=2, model_dim=16, num_heads=2, num_kv_heads=1, ff_dim=32,
    memory=MemoryConfig("fam", block_size=4, memory_segments=1, fam_length=2),
)  # fmt: skip
BSWA = dataclasses.replace(MODEL, memory=dataclasses.replace(MODEL.memory, kind="bswa"))
TRAIN = TrainConfig(train_steps=6, log_every=2, tensorboard=False, loss_chunk=16, eval_batches=2)
OPTIMIZER = OptimizerConfig("adamw", learning_rate=1e-2)


class Vocabulary:
  """Sixteen symbols."""

  vocab_size = 16
  name = "toy"


@dataclasses.dataclass(frozen=True)
class ToyReader:
  """Random tokens that repeat with a short period; rows restart every `document` steps."""

  batch_size: int = 4
  length: int = 12
  seed: int = 0
  document: int = 3
  vocabulary: Vocabulary = Vocabulary()

  @property
  def rows(self) -> tuple[int, ...]:
    return tuple(range(self.batch_size))

  def start(self) -> np.ndarray:
    return np.zeros(2, np.int64)

  def read(self, position, step):
    rng = np.random.default_rng([self.seed, int(position[0]), step])
    period = rng.integers(2, 14, (self.batch_size, 5))
    text = np.tile(period, 6)[:, : self.length + 1].astype(np.int32)
    lengths = rng.integers(0, self.length + 1, self.batch_size).astype(np.int32)
    lengths[rng.random(self.batch_size) < 0.7] = self.length
    start = (position[0] + np.arange(self.batch_size)) % self.document == 0
    real = np.arange(self.length) < lengths[:, None]
    weights = np.where(real, rng.choice([0.0, 0.1, 1.0], real.shape), 0).astype(np.float32)
    batch = {
        "tokens": text[:, :-1],
        "targets": text[:, 1:],
        "weights": weights,
        "start_of_sequence": start if position[0] else np.ones_like(start),
        "lengths": np.full_like(lengths, self.length) if not start.all() else lengths,
    }
    return batch, position + np.array([1, self.batch_size])


def setting(model=MODEL, train=TRAIN, optimizer=OPTIMIZER, batch_size=4):
  """A train state and its step."""
  graphdef, params = split(Decoder(model, rngs=nnx.Rngs(train.seed)))
  transformation = make_optimizer(optimizer, train.train_steps)
  schedule = make_schedule(optimizer, train.train_steps)
  state = init_train_state(params, transformation, model, train, batch_size)
  return state, make_train_step(graphdef, model, train, transformation, schedule)


def run(state, step, reader, steps, position=None, first=0):
  """`steps` steps; the state, the reader's position and the metrics of each."""
  position = reader.start() if position is None else position
  metrics = []
  for s in range(first, first + steps):
    batch, position = reader.read(position, s)
    state, m = step(state, batch)
    metrics.append(jax.device_get(m))
  return state, position, metrics


def assert_equal(a, b):
  """Two trees have the same structure and the same bits."""
  assert jax.tree.structure(a) == jax.tree.structure(b)
  jax.tree.map(np.testing.assert_array_equal, a, b)
