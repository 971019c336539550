"""Reads and writes LoRA adapters in PEFT's format: `adapter_config.json` and safetensors.

An adapter holds LoRA's factors alone; the model that they are added to is elsewhere. A memory and
the FAM's own weights stand beside them as in `hf`, and PEFT does not look at them.
"""

import dataclasses
import json
import pathlib
import re

from flax import traverse_util
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from famjax.convert import hf, memory_files, schemas
from famjax.convert.families import Json, to_hf
from famjax.convert.tensors import check_finite, load
from famjax.errors import UserError
from famjax.formats import inside, read_json, shown
from famjax.model import lora
from famjax.model.config import MEMORY_WEIGHTS, PROJECTIONS, ModelConfig

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_MODULES = {  # our projection, and the module's name within its layer
    name: hf.LAYER_TENSORS[f"{name}/kernel"].removesuffix(".weight") for name in PROJECTIONS
}
_FACTORS = {"lora_a": "lora_A", "lora_b": "lora_B"}
_LAYERS = "base_model.model.model.layers"
_INFIX = re.compile(r"(\.lora_[AB])\.default(\.weight)$")  # PEFT's name of the adapter
_ANYWHERE = re.compile(r"(^|\.)layers\.\d+\..*lora_[AB]")
_KNOWN = re.compile(
    rf"{re.escape(_LAYERS)}\.\d+\.({'|'.join(map(re.escape, _MODULES.values()))})"
    r"\.lora_[AB]\.weight"
)
# Entries that make something else of LoRA wherever they are set.
_PLAIN_WITHOUT = (
    "use_dora", "bias", "lora_bias", "modules_to_save", "rank_pattern", "alpha_pattern",
    "fan_in_fan_out", "layer_replication", "use_qalora", "use_bdlora", "trainable_token_indices",
    "target_parameters", "alora_invocation_tokens", "arrow_config", "kasa_config",
    "monteclora_config", "velora_config",
)  # fmt: skip
# How factors started matters where the base's matrices were changed for it, as PiSSA does.
_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
_WAY_OUT = "merge it with PEFT's merge_and_unload, and convert the model with --from=hf"


def to_peft(
    params: hf.Params, config: ModelConfig, base: str | None = None
) -> tuple[dict[str, np.ndarray], Json]:
  """A model's LoRA as PEFT has it.

  Args:
    params: of a `Decoder` with LoRA.
    config: of the model.
    base: where PEFT finds the model that LoRA is added to, a directory or a name on the hub.

  Returns:
    Its tensors by name, and `adapter_config.json`.

  Raises:
    UserError: the model has no LoRA, or no Hugging Face family has all of its options.
  """
  if not config.lora_rank:
    raise UserError("the model has no LoRA: export it whole with --to=hf")
  to_hf(dataclasses.replace(config, lora_rank=0))  # raises where PEFT would have no base
  leaves = traverse_util.flatten_dict(params, sep="/")
  names = [name for name in PROJECTIONS if config.lora_rank_of(name)]
  tensors = {}
  for name in names:
    for factor in lora.NAMES:
      for layer, ours in enumerate(np.asarray(leaves[f"layers/{name}/{factor}"])):
        matrix = ours.reshape(_joined(factor, ours.shape))
        tensors[_tensor(layer, name, factor)] = np.ascontiguousarray(matrix.T)
  alpha = config.lora_alpha or config.lora_rank
  return tensors, {
      "peft_type": "LORA",
      "task_type": "CAUSAL_LM",
      "base_model_name_or_path": base,
      "r": config.lora_rank,
      "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
      "lora_dropout": 0.0,
      "target_modules": [_MODULES[name].rpartition(".")[2] for name in names],
      "bias": "none",
      "fan_in_fan_out": False,
      "inference_mode": True,
  }


def from_peft(
    tensors: dict[str, np.ndarray], adapter: Json, config: ModelConfig
) -> tuple[hf.Params, ModelConfig]:
  """PEFT's LoRA as factors of ours.

  Args:
    tensors: of the adapter, by name.
    adapter: its `adapter_config.json`.
    config: of the model that LoRA is added to.

  Returns:
    The factors alone, as nested dicts, and the configuration of the model with them.

  Raises:
    UserError: it is not plain LoRA, or not of this model.
  """
  rank, alpha = _rank_and_alpha(adapter)
  tensors = _without_infix(tensors)
  strange = sorted(name for name in tensors if not _KNOWN.fullmatch(name))
  if strange and _ANYWHERE.search(strange[0]) and not strange[0].startswith(f"{_LAYERS}."):
    raise UserError(
        f"it has {shown(strange[0])}, and PEFT takes names that begin with {_LAYERS}. and passes"
        " over all others: rename its tensors, or save it anew with PEFT's save_pretrained"
    )
  if strange:
    known = ", ".join(module.rpartition(".")[2] for module in _MODULES.values())
    raise UserError(f"it has {shown(strange[0])}, and famjax supports LoRA on {known} only: {_WAY_OUT}")
  modules = {_KNOWN.fullmatch(name)[1] for name in tensors}
  if not modules:
    raise UserError(f"{_WEIGHTS} holds no tensor: fetch it again")
  targets = tuple(name for name, module in _MODULES.items() if module in modules)
  config = dataclasses.replace(config, lora_rank=rank, lora_alpha=alpha, lora_targets=targets)
  config.validate()
  shapes = {
      path: shape
      for path, shape in hf.shapes(config).items()
      if path.rpartition("/")[2] in lora.NAMES
  }
  for path, shape in shapes.items():  # before any array is made
    _check_tensors(tensors, path, shape)
  factors = {path: np.empty(shape, np.float32) for path, shape in shapes.items()}
  unused = set(tensors)
  for path, leaf in factors.items():
    for tensor, into in zip(_tensors(path, len(leaf)), leaf, strict=True):
      into[...] = tensors[tensor].T.reshape(into.shape)
      unused.discard(tensor)
  if unused:
    raise UserError(f"it has {min(unused)}, and the base has only {config.num_layers} layers")
  factors = {path: jnp.asarray(leaf) for path, leaf in factors.items()}
  return traverse_util.unflatten_dict(factors, sep="/"), config


def _without_infix(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Returns an adapter's tensors without the adapter's name in theirs, as PEFT takes them."""
  renamed = {}
  for name, tensor in tensors.items():
    plain = _INFIX.sub(r"\1\2", name)
    if plain in renamed:
      raise UserError(f"it has {plain} twice, with and without .default: leave the right one")
    renamed[plain] = tensor
  return renamed


def _tensors(path: str, layers: int) -> list[str]:
  """Returns the names of a factor's tensors, one for each layer."""
  name, _, factor = path.removeprefix("layers/").rpartition("/")
  return [_tensor(layer, name, factor) for layer in range(layers)]


def _check_tensors(tensors: dict[str, np.ndarray], path: str, shape: tuple[int, ...]) -> None:
  """Raises UserError if a factor lacks a tensor, or one has another shape."""
  rows, columns = _joined(path.rpartition("/")[2], shape[1:])
  for tensor in _tensors(path, shape[0]):
    if tensor not in tensors:
      raise UserError(f"it lacks {tensor}, and famjax supports LoRA only in all layers: {_WAY_OUT}")
    found = tensors[tensor].shape
    if found != (columns, rows):
      raise UserError(
          f"{tensor} is {list(found)}, and rank and base ask for {[columns, rows]}"
      )


def write(
    path: pathlib.Path, params: hf.Params, config: ModelConfig, base: str | None = None
) -> int:
  """Writes an adapter that PEFT loads; see `to_peft`. The directory is made.

  Returns:
    How many parameters the adapter has.
  """
  tensors, adapter = to_peft(params, config, base)
  path.mkdir(parents=True, exist_ok=True)
  save_file(tensors, path / _WEIGHTS, metadata={"format": "pt"})
  (path / _CONFIG).write_text(json.dumps(adapter, indent=2) + "\n")
  memory_files.write_memory(path, params, config)
  return sum(tensor.size for tensor in tensors.values())


def read(
    path: pathlib.Path, params: hf.Params, config: ModelConfig
) -> tuple[hf.Params, ModelConfig]:
  """Adds an adapter to a model.

  Args:
    path: directory of the adapter.
    params: of the model that it was made for.
    config: of that model.

  Returns:
    Parameters of a model with LoRA, and its configuration. Its memory is the one that `write` left,
    or else the base's.

  Raises:
    UserError: the adapter is not plain LoRA, or of another model, or cannot be read.
  """
  settings, weights = inside(path, _CONFIG), inside(path, _WEIGHTS)
  if not settings.is_file():
    raise UserError(f"{path} has no {_CONFIG} of a PEFT adapter")
  if not weights.is_file():
    raise UserError(f"{path} has no {_WEIGHTS}: save the adapter as safetensors first")
  if config.lora_rank:
    raise UserError("the base has LoRA of its own: name the model that the adapter was made for")
  memory = memory_files.read_memory(path)
  if memory is not None:
    config = dataclasses.replace(config, memory=memory)
    params = {name: tree for name, tree in params.items() if name not in MEMORY_WEIGHTS}
  try:
    tensors = load(weights)
    for name, tensor in tensors.items():
      check_finite(tensor, name, weights, "save or fetch the adapter again")
    factors, config = from_peft(tensors, read_json(settings), config)
  except UserError as error:
    raise UserError(str(error) if str(path) in str(error) else f"{path}: {error}") from None
  if memory is not None:
    params = params | memory_files.read_memory_weights(path, config)
  flat = traverse_util.flatten_dict(params) | traverse_util.flatten_dict(factors)
  return traverse_util.unflatten_dict(flat), config


def _tensor(layer: int, name: str, factor: str) -> str:
  return f"{_LAYERS}.{layer}.{_MODULES[name]}.{_FACTORS[factor]}.weight"


def _joined(factor: str, shape: tuple[int, ...]) -> tuple[int, int]:
  """`[in..., r]` as `[in, r]`, and `[r, out...]` as `[r, out]`; torch has both transposed."""
  if factor == "lora_a":
    return int(np.prod(shape[:-1])), shape[-1]
  return shape[0], int(np.prod(shape[1:]))


def _rank_and_alpha(adapter: Json) -> tuple[int, float]:
  """Returns those of plain LoRA; raises UserError for any other adapter."""
  settings = schemas.checked(adapter, schemas.Adapter, _CONFIG)
  if settings["peft_type"] != "LORA":
    raise UserError(f"peft_type is {shown(settings['peft_type'])}, and famjax supports only LORA")
  for name in _PLAIN_WITHOUT:
    if adapter.get(name) and adapter[name] != "none":
      raise UserError(
          f"{name} is {shown(adapter[name])}, and famjax supports only plain LoRA: {_WAY_OUT}"
      )
  start = settings["init_lora_weights"]
  if start not in _STARTS:
    raise UserError(
        f"init_lora_weights is {shown(start)}, which changes the base as well: {_WAY_OUT}"
    )
  rank, alpha = settings["r"], settings["lora_alpha"]
  return rank, alpha * rank**0.5 if settings["use_rslora"] else alpha
