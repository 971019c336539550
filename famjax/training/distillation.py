"""Self-distillation: a model with windows and a FAM learns from the decoder that it was made of.

The teacher is the frozen original with full attention over the same text. Its next-token
distribution is what the student has to have, so that a checkpoint gets a memory without instruction
data. (Not in the paper. The idea stands in "Artificial Hippocampus Networks", arXiv 2510.07318.)
"""

import dataclasses

from famjax.errors import UserError
from famjax.model.config import MemoryConfig, ModelConfig
from famjax.training.config import TrainConfig


def teacher_config(
    config: TrainConfig, model: ModelConfig, chosen: str, length: int
) -> ModelConfig | None:
  """The configuration of the frozen original; None: there is no teacher.

  Args:
    config: `objective`.
    model: of the student.
    chosen: which parameters are trained, see `trainable.choose`; the teacher has the others.
    length: S, tokens of a row, which it sees all of.
  """
  if config.objective != "distill":
    return None
  N = model.memory.block_size
  full = MemoryConfig("full", N, memory_segments=-(-length // N) - 1)
  rank = 0 if chosen == "lora" else model.lora_rank
  return dataclasses.replace(model, memory=full, lora_rank=rank, remat="none")


def notes(path: str, original: ModelConfig, length: int) -> list[str]:
  """What there is to say of a teacher: how far it can be believed.

  Args:
    path: where it is.
    original: the configuration that its checkpoint records.
    length: S, tokens of a row.
  """
  memory = original.memory
  if memory.context is None:
    return [f"note: {path} was trained with a window; its teaching is with full attention all the same"]
  if memory.context < length:
    return [
        f"note: {path} is an ordinary decoder of {memory.context} tokens, and it teaches rows of {length}:"
        " what it says beyond is as good as its RoPE; lower LENGTH"
    ]
  return []


def check(config: TrainConfig, chosen: str) -> None:
  """Raises UserError if there is nothing that can be a teacher."""
  if config.objective == "next_token":
    return
  if chosen == "full":
    raise UserError(
        "objective 'distill' learns from the frozen original, and all parameters are trained: set"
        " ModelConfig.lora_rank, or TrainConfig.trainable to 'fam'"
    )
  if config.follow_rows:
    raise UserError(
        "objective 'distill' needs whole texts, for its teacher's full attention: leave follow_rows"
        " out"
    )
  if not config.init_checkpoint:
    raise UserError("objective 'distill' needs a model to learn from: set TrainConfig.init_checkpoint")
