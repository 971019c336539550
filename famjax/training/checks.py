"""Checks a run before anything is written: what does not fit together is one line."""

from collections.abc import Callable
import os
from typing import Any

from famjax.data import FollowingReader, Reader
from famjax.data.vocabularies import check_fits
from famjax.errors import UserError
from famjax.model import diagnostics
from famjax.model.config import ModelConfig
from famjax.parallel.mesh import MeshConfig
from famjax.parallel.placement import AxisRules
from famjax.training import distillation, run_directory, trainable
from famjax.training.config import TrainConfig
from famjax.training.optimizer import OptimizerConfig, check_names
from famjax.training.train_state import abstract


def check(
    run_dir: str | os.PathLike[str],
    model: ModelConfig,
    train_reader: Reader,
    optimizer: OptimizerConfig = OptimizerConfig(),
    config: TrainConfig = TrainConfig(),
    eval_reader: Reader | None = None,
    vocabulary: str = "bytes",
    mesh: MeshConfig = MeshConfig(),
    rules: AxisRules = AxisRules(),
    *,
    settings: Callable[[], dict[str, str]] = dict,
) -> dict[str, Any]:
  """Returns what the run is, see `run_directory.describe`, if `train` could begin or go on with it.

  Args are those of `train`. Of how many devices there are nothing depends: the run may be of another
  machine.

  Raises:
    UserError: it could not.
  """
  check_step(
      model, optimizer, config, mesh, rules, train_reader.batch_size, train_reader.length
  )
  for reader in filter(None, (train_reader, eval_reader)):
    _check_reader(reader, model, config)
  if config.eval_every and eval_reader is None:
    raise UserError(f"eval_every is {config.eval_every}, and there is no eval_reader: set both")
  description = run_directory.describe(
      model, optimizer, config, train_reader, vocabulary, settings()
  )
  run_directory.check(run_directory.place(run_dir), description)
  return description


def check_step(
    model: ModelConfig,
    optimizer: OptimizerConfig,
    config: TrainConfig,
    mesh: MeshConfig,
    rules: AxisRules,
    batch_size: int,
    length: int,
) -> None:
  """Raises UserError if no step of B rows of S tokens can be made of these."""
  for part in (model, optimizer, config, mesh, rules):
    part.validate()
  config.check_batch_size(batch_size)
  if config.look_every:
    diagnostics.check(model)
  if optimizer.own_rates:
    check_names(optimizer, abstract(model)[1])
  distillation.check(config, trainable.choose(config.trainable, model))
  if model.memory.context is not None and config.follow_rows:
    raise UserError(
        "follow_rows is set, and full attention has room for so many tokens alone: leave it out, or"
        " give the model a memory, gin/memory/fam.gin"
    )
  _check_length(length, model)


def _check_length(length: int, model: ModelConfig) -> None:
  """Raises UserError if rows of so many tokens do not fit the model."""
  block_size = model.memory.block_size
  if length % block_size:
    raise UserError(
        f"the length of a batch, {length} tokens, is not a multiple of block_size {block_size}:"
        " change one of them"
    )
  model.memory.check_context(length)


def _check_reader(reader: Reader, model: ModelConfig, config: TrainConfig) -> None:
  """Raises UserError if a reader's batches do not fit the model."""
  size = reader.vocabulary.vocab_size
  _check_length(reader.length, model)
  if tuple(reader.rows) != tuple(range(reader.batch_size)):
    raise UserError(
        f"a reader gives rows {reader.rows} of {reader.batch_size}: one process reads them all;"
        " leave rows out"
    )
  if isinstance(reader, FollowingReader) and not config.follow_rows:
    raise UserError(
        "FollowingReader goes on in a document from step to step, and follow_rows is off: the model"
        " would start anew in the middle of it; set TrainConfig.follow_rows"
    )
  if size > model.vocab_size:
    raise UserError(
        f"the vocabulary has {size} entries and the model's vocab_size is {model.vocab_size}: raise"
        " vocab_size or use another vocabulary"
    )
  check_fits(reader.vocabulary, model.vocab_size)
  source = getattr(reader, "source", None)
  if hasattr(source, "check"):
    source.check()
