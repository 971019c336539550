"""Which parameters a run trains; the others stay as they are, and no gradient is made for them."""

from famjax.errors import UserError
from famjax.model.config import ModelConfig
from famjax.model.lora import NAMES as LORA
from famjax.training.train_state import Params

FAM = ("fam_prompt", "fam_prefix")
SETS = {  # by `TrainConfig.trainable`: the names of the parameters that are trained
    "lora": (*LORA, *FAM),
    "fam": FAM,
}


def choose(trainable: str | None, model: ModelConfig) -> str:
  """The set that a run trains, by name.

  Args:
    trainable: "full", "lora" (LoRA's factors and the FAM's own weights), "fam" (those alone), or
      None: "lora" for a model that has LoRA, "full" for one that has not.
    model: configuration of the model.

  Raises:
    UserError: the name is unknown, or the model has nothing of that set.
  """
  if trainable is None:
    return "lora" if model.lora_rank else "full"
  if trainable not in ("full", *SETS):
    raise UserError(f"trainable {trainable!r} is unknown; choose one of full, {', '.join(SETS)}")
  if trainable == "lora" and not model.lora_rank:
    raise UserError("trainable is 'lora', and the model has none: set ModelConfig.lora_rank")
  if trainable == "fam" and not model.memory.length:
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
  for name, value in params.items():
    if isinstance(value, dict):
      trained[name], frozen[name] = part(value, chosen)
    else:
      (trained if name in SETS[chosen] else frozen)[name] = value
  return _without_empty(trained), _without_empty(frozen)


def join(trained: Params, frozen: Params) -> Params:
  """Puts two nested dicts of different names together."""
  joined = dict(trained)
  for name, value in frozen.items():
    joined[name] = join(joined.get(name, {}), value) if isinstance(value, dict) else value
  return joined


def _without_empty(params):
  return {name: value for name, value in params.items() if not isinstance(value, dict) or value}
