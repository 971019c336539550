"""Which parameters a run trains; the others stay as they are, and no gradient is made for them."""

from flax import traverse_util

from famjax.errors import UserError
from famjax.model.config import BUILT_IN, MEMORY_WEIGHTS, ModelConfig
from famjax.model.lora import NAMES as LORA
from famjax.training.train_state import Params

SETS = ("full", "lora", "fam")


def choose(trainable: str | None, model: ModelConfig) -> str:
  """The set that a run trains, by name.

  Args:
    trainable: "full", "lora" (LoRA's factors and the memory's own weights), "fam" (those alone), or
      None: "lora" for a model that has LoRA, "full" for one that has not.
    model: configuration of the model.

  Raises:
    UserError: the name is unknown, or the model has nothing of that set.
  """
  if trainable is None:
    return "lora" if model.lora_rank else "full"
  if trainable not in SETS:
    raise UserError(f"trainable {trainable!r} is unknown; choose one of {', '.join(SETS)}")
  if trainable == "lora" and not model.lora_rank:
    raise UserError("trainable is 'lora', and the model has none: set ModelConfig.lora_rank")
  if trainable == "fam" and model.memory.kind in BUILT_IN and not model.memory.length:
    raise UserError("trainable is 'fam', and the model has no FAM: choose gin/memory/fam.gin")
  return trainable


def part(params: Params, chosen: str) -> tuple[Params, Params]:
  """Parts parameters into those that are trained and the others; `join` undoes it.

  Args:
    params: nested dicts.
    chosen: from `choose`.
  """
  if chosen == "full":
    return params, {}
  trained, frozen = {}, {}
  for path, value in traverse_util.flatten_dict(params).items():
    is_trained = path[0] in MEMORY_WEIGHTS or (chosen == "lora" and path[-1] in LORA)
    (trained if is_trained else frozen)[path] = value
  return traverse_util.unflatten_dict(trained), traverse_util.unflatten_dict(frozen)


def join(trained: Params, frozen: Params) -> Params:
  """Puts two nested dicts of different names together."""
  flat = traverse_util.flatten_dict(trained) | traverse_util.flatten_dict(frozen)
  return traverse_util.unflatten_dict(flat)
