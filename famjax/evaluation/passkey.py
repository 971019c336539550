"""PassKey retrieval at any length, read in constant memory (SPEC section 6, Fig. 3a)."""

import dataclasses
import functools
import os
import time

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from famjax.data.examples import generator
from famjax.data.passkey import PassKeyFormat
from famjax.data.readers import Reader
from famjax.data.vocabularies import Vocabulary
from famjax.errors import UserError
from famjax.evaluation import record, report
from famjax.inference.model import Model
from famjax.model.config import MemoryConfig
from famjax.model.state import empty_state

_SEED = 1 << 40  # far from the seeds of training data, so that no evaluation key was trained on


@dataclasses.dataclass(frozen=True)
class PassKeyEval:
  """Which documents a model is asked about.

  Attributes:
    blocks: lengths of the documents, in blocks of the model.
    examples: documents of each length.
    key_digits: digits of a key.
    chunk_blocks: blocks read in one call, which bounds memory.
    seed: of keys; the same documents for every model.
  """

  blocks: tuple[int, ...] = (8, 16, 32, 64)
  examples: int = 64
  key_digits: int = 5
  chunk_blocks: int = 16
  seed: int = 0

  def validate(self) -> None:
    """Raises UserError for a value that makes no sense."""
    many = isinstance(self.blocks, (tuple, list)) and self.blocks
    if not many or not all(isinstance(n, int) and n > 0 for n in self.blocks):
      raise UserError(
          f"PassKeyEval.blocks is {self.blocks}: give lengths of at least one block, as (8, 16)"
      )
    if min(self.examples, self.chunk_blocks) < 1:
      raise UserError("PassKeyEval.examples and chunk_blocks must be at least 1")

  def check(self, vocabulary: Vocabulary, memory: MemoryConfig) -> None:
    """Raises UserError also for documents too short for their parts or too long for a model."""
    self.validate()
    text = PassKeyFormat(vocabulary, self.key_digits)
    text.write(generator(_SEED, 0), total_tokens=min(self.blocks) * memory.block_size + 1)
    memory.check_context(max(self.blocks) * memory.block_size)


def accuracy_by_blocks(model: Model, config: PassKeyEval) -> dict[int, float]:
  """Share of keys that a model gives back whole, for each length of document.

  A key counts when every one of its digits is the model's likeliest next token, which is so exactly
  when greedy generation writes it.

  Args:
    model: with the vocabulary of the PassKey text.
    config: what to ask.

  Returns:
    `{blocks: accuracy}`.
  """
  config.check(model.vocabulary, model.config.memory)
  return {n: float(key_correct(model, n, config).mean()) for n in config.blocks}


def key_correct(model: Model, num_blocks: int, config: PassKeyEval) -> np.ndarray:
  """bool `[examples]`: whose key came back, for documents of `num_blocks` blocks exactly."""
  N = model.config.memory.block_size
  text = PassKeyFormat(model.vocabulary, config.key_digits)
  documents = [
      text.write(generator(_SEED + config.seed, i), total_tokens=num_blocks * N + 1)
      for i in range(config.examples)
  ]
  tokens, weights = (np.stack(x) for x in zip(*documents))  # [examples, num_blocks * N + 1]
  predicted = _predict(model, tokens[:, :-1], config.chunk_blocks * N)
  return ((predicted == tokens[:, 1:]) | (weights[:, 1:] == 0)).all(axis=1)


def _predict(model: Model, tokens: np.ndarray, chunk: int) -> np.ndarray:
  """The likeliest next token after every one of `tokens` `[B, S]`, read chunk by chunk."""
  graphdef, params = nnx.split(model.decoder)
  B, S = tokens.shape
  state, start = empty_state(model.config, B), jnp.ones(B, bool)
  out = []
  for first in range(0, S, chunk):
    piece = tokens[:, first : first + chunk]
    length = piece.shape[1]
    piece = np.pad(piece, ((0, 0), (0, chunk - length)))
    best, state = _read(graphdef, params, piece, state, start, jnp.full(B, length))
    start = jnp.zeros(B, bool)
    out.append(best[:, :length])
  return np.concatenate(jax.device_get(out), axis=1)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
def _read(graphdef, params, tokens, state, start, lengths):
  logits, state = nnx.merge(graphdef, params)(
      tokens, state, start_of_sequence=start, lengths=lengths, aligned=True
  )
  return logits.argmax(-1), state


def evaluate(model: Model, config: PassKeyEval) -> dict:
  """Accuracies with what they were measured on, ready for a report."""
  started = time.time()
  accuracy = accuracy_by_blocks(model, config)
  return {
      "accuracy": {str(n): a for n, a in accuracy.items()},
      "asked": dataclasses.asdict(config) | {"blocks": list(config.blocks)},
      "eval_seconds": round(time.time() - started, 2),
  }


def evaluate_run(
    run_dir: str | os.PathLike[str], config: PassKeyEval, reader: Reader
) -> dict:
  """Evaluates a run's newest checkpoint and leaves `passkey.json` in its directory.

  Args:
    run_dir: of the run.
    config: what to ask.
    reader: of the run's training data, for the lengths that the model has seen.

  Returns:
    What is in the file: that of `evaluate`, and of `record.evaluate_run`.
  """
  ask = lambda model, step: evaluate(model, config)
  return record.evaluate_run(run_dir, reader, report.PASSKEY, ask)
