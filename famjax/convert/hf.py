"""Reads and writes a directory of the Hugging Face hub: `config.json` and safetensors.

A memory that a model was given stands beside them, see `memory_files`. Tensors are read one by one
into the stacked arrays of `Decoder`: no more than the model and one tensor stands in memory.
"""

from collections.abc import Callable, Iterator
import dataclasses
import json
import pathlib
from typing import Any

from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from famjax.convert import redundant, resizing
from famjax.convert.families import SYMBOLS, Json, carried, from_hf, to_hf
from famjax.convert.memory_files import read_memory, read_memory_weights, write_memory
from famjax.convert.shapes import of_memory, shapes
from famjax.convert.tensors import INDEX, SINGLE, Tensors, check_finite
from famjax.errors import UserError
from famjax.formats import inside, read_json
from famjax.model.config import MemoryConfig, ModelConfig
from famjax.parallel.placement import put

Params = dict[str, Any]

_TENSORS = {  # our path, and the tensor's name
    "embedder/embedding": "model.embed_tokens.weight",
    "final_norm/scale": "model.norm.weight",
    "head/kernel": "lm_head.weight",
}
LAYER_TENSORS = {  # after "model.layers.{l}."
    "attention/query/kernel": "self_attn.q_proj.weight",
    "attention/key/kernel": "self_attn.k_proj.weight",
    "attention/value/kernel": "self_attn.v_proj.weight",
    "attention/out/kernel": "self_attn.o_proj.weight",
    "attention/query/bias": "self_attn.q_proj.bias",
    "attention/key/bias": "self_attn.k_proj.bias",
    "attention/value/bias": "self_attn.v_proj.bias",
    "attention/query_norm/scale": "self_attn.q_norm.weight",
    "attention/key_norm/scale": "self_attn.k_norm.weight",
    "feedforward/gate/kernel": "mlp.gate_proj.weight",
    "feedforward/up/kernel": "mlp.up_proj.weight",
    "feedforward/down/kernel": "mlp.down_proj.weight",
    "attention_norm/scale": "input_layernorm.weight",
    "attention_post_norm/scale": "post_attention_layernorm.weight",
    "feedforward_norm/scale": "pre_feedforward_layernorm.weight",
    "feedforward_post_norm/scale": "post_feedforward_layernorm.weight",
}
# A model with norms before alone calls the one before its feed-forward after what it stands behind.
_NORM_BEFORE = {"feedforward_norm/scale": "post_attention_layernorm.weight"}
_SHARD_BYTES = 5_000_000_000
_ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
_BLOCK, _CONTEXT = 512, 8192  # tokens, of an ordinary decoder that comes without a memory


def is_hf(path: pathlib.Path) -> bool:
  """Returns whether a directory is a Hugging Face model's."""
  config = inside(path, "config.json")
  return config.is_file() and "model_type" in read_json(config)


def read_config(path: pathlib.Path) -> ModelConfig:
  """Reads a model's configuration alone; see `read`."""
  return _config(path, Tensors(path), None)


def _config(path: pathlib.Path, tensors: Tensors, param_dtype: str | None) -> ModelConfig:
  hf = redundant.without_biases(read_json(inside(path, "config.json")), tensors)
  try:
    config = from_hf(hf)
  except UserError as error:
    raise UserError(f"{path / 'config.json'}: {error}") from None
  config = redundant.untie(config, tensors)
  _check_sizes(path, config, tensors)
  dtype = param_dtype or tensors.dtype(redundant.EMBEDDING)
  config = dataclasses.replace(
      config, memory=read_memory(path) or _full(hf), param_dtype=dtype, compute_dtype=dtype
  )
  try:
    config.validate()
  except UserError as error:
    raise UserError(f"{path}: {error}") from None
  return config


def read(
    path: pathlib.Path,
    param_dtype: str | None = None,
    where: Callable[[ModelConfig], Params] | None = None,
    allow_nonfinite: bool = False,
    resize_vocabulary: bool = False,
) -> tuple[Params, ModelConfig]:
  """Reads a model.

  Args:
    path: a directory with `config.json` and safetensors, in one file or in several.
    param_dtype: "float32" or "bfloat16"; None: the one that the embedding is stored in, float32 for
      float16.
    where: gives the sharding of each parameter, of a configuration; None: all are on one device.
    allow_nonfinite: NaN and infinite weights are taken.
    resize_vocabulary: embedding and head grow to all ids of the directory's tokenizer. New rows are
      the mean of the old ones.

  Returns:
    Parameters of a `Decoder`, as nested dicts, and its configuration. Its memory is the one that
    `write` left there, or else "full" attention, with room for 8,192 tokens at most.

  Raises:
    UserError: The model is of no family that famjax has, a tensor is missing, unknown or of another
      shape, a weight is NaN or infinite, or the directory holds an adapter beside the model.
  """
  _refuse_adapter(path)
  tensors = Tensors(path)
  config = _config(path, tensors, param_dtype)
  _check_shapes(path, config, tensors)
  rows = config.vocab_size
  if resize_vocabulary:
    grown = max(rows, resizing.tokenizer_size(path, rows))
    config = dataclasses.replace(config, vocab_size=grown)
  redundant.refuse_unread(set(tensors.names) - _tensors_of(config), config, tensors)
  places = {} if where is None else traverse_util.flatten_dict(where(config), sep="/")
  leaves = {}
  for name, shape in shapes(config).items():
    leaf = _aligned(shape, config.param_dtype)
    for tensor, place in _places(name, config):
      into = resizing.old_part(name, leaf, rows) if place is None else leaf[place]
      stored = tensors.read(tensor)
      into[...] = (stored.T if name.endswith("kernel") else stored).reshape(into.shape)
      if not allow_nonfinite:
        check_finite(into, tensor, path)
    if name in resizing.AXES and config.vocab_size > rows:
      resizing.fill(name, leaf, rows)
    leaves[name] = (
        put(leaf, places[name]) if places
        else jax.device_put(leaf, may_alias=True)  # a CPU takes the array as it is
    )  # fmt: skip
  leaves |= read_memory_weights(path, config, allow_nonfinite)
  return traverse_util.unflatten_dict(leaves, sep="/"), config


def write(
    path: pathlib.Path, params: Params, config: ModelConfig, like: Json | None = None
) -> None:
  """Writes a model that transformers loads.

  Args:
    path: a directory, which is made.
    params: of a `Decoder`.
    config: of the model.
    like: a `config.json`; where it is of the same network its other entries are kept, and the ids
      of symbols in any case.

  Raises:
    UserError: no family has all options of the model.
  """
  leaves = traverse_util.flatten_dict(params, sep="/")
  leaves = {name: leaf for name, leaf in leaves.items() if not of_memory(name)}
  symbols = dict.fromkeys(SYMBOLS)  # not the family's usual ones
  hf = symbols | carried(like or {}, config) | to_hf(config)
  hf |= {"dtype": config.param_dtype, "torch_dtype": config.param_dtype}
  path.mkdir(parents=True, exist_ok=True)
  shards, sizes = [[]], [0]
  for name, leaf in leaves.items():
    for tensor, place in _places(name, config):
      size = leaf.nbytes if place is None else leaf.nbytes // config.num_layers
      if sizes[-1] and sizes[-1] + size > _SHARD_BYTES:
        shards, sizes = [*shards, []], [*sizes, 0]
      shards[-1].append((tensor, name, place))
      sizes[-1] += size
  index = {}
  for number, shard in enumerate(shards, 1):
    file = f"model-{number:05}-of-{len(shards):05}.safetensors"
    file = file if len(shards) > 1 else SINGLE
    part = {tensor: _to_torch(name, leaves[name], place) for tensor, name, place in shard}
    save_file(part, path / file, metadata={"format": "pt"})
    index |= {tensor: file for tensor in part}
  if len(shards) > 1:
    whole = {"metadata": {"total_size": sum(sizes)}, "weight_map": index}
    (path / INDEX).write_text(json.dumps(whole, indent=2) + "\n")
  (path / "config.json").write_text(json.dumps(hf, indent=2) + "\n")
  if config.memory.kind != "full":
    write_memory(path, params, config)


def _refuse_adapter(path: pathlib.Path) -> None:
  """Raises UserError for a model with a PEFT adapter beside it, which transformers adds to it."""
  if all(inside(path, name).is_file() for name in _ADAPTER):
    raise UserError(
        f"{path} holds an adapter beside its model, and transformers adds the two: move"
        f" {_ADAPTER[0]} and {_ADAPTER[1]} to a directory of their own, and import them with famjax"
        " convert --from=peft --base=MODEL"
    )


def _check_sizes(path: pathlib.Path, config: ModelConfig, tensors: Tensors) -> None:
  """Raises UserError if sizes of the configuration are not those of the files.

  It comes before the shapes of all parameters are made, which hostile sizes would draw out.
  """
  last = f"model.layers.{config.num_layers - 1}."
  wanted = {
      redundant.EMBEDDING: (config.vocab_size, config.model_dim),
      f"{last}self_attn.q_proj.weight": (config.num_heads * config.head_width, config.model_dim),
      f"{last}self_attn.k_proj.weight": (config.kv_heads * config.head_width, config.model_dim),
      f"{last}mlp.gate_proj.weight": (config.hidden_width, config.model_dim),
  }
  for name, shape in wanted.items():
    _check_shape(path, name, tensors.shape(name), shape)


def _check_shapes(path: pathlib.Path, config: ModelConfig, tensors: Tensors) -> None:
  """Raises UserError if a tensor is missing, or has another shape than the configuration's."""
  for name, shape in shapes(config).items():
    for tensor, place in _places(name, config):
      wanted = _stored_shape(name, shape if place is None else shape[1:])
      _check_shape(path, tensor, tensors.shape(tensor), wanted)


def _check_shape(path: pathlib.Path, name: str, found: tuple[int, ...], wanted: tuple[int, ...]):
  if found != wanted:
    raise UserError(
        f"{path}: {name} has shape {list(found)}, and its config.json asks for {list(wanted)}"
    )


def _stored_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
  """Returns the shape of a parameter in torch, which keeps `[out, in]` of our `[in..., out...]`."""
  if name.endswith("kernel"):
    return _joined(name, shape)[::-1]
  return shape if name == "embedder/embedding" else (int(np.prod(shape)),)


def _tensors_of(config: ModelConfig) -> set[str]:
  """Returns the names of all tensors that a model is made of."""
  return {tensor for name in shapes(config) for tensor, _ in _places(name, config)}


def _places(name: str, config: ModelConfig) -> Iterator[tuple[str, int | None]]:
  """The tensors that a parameter is made of, and which of its layers each is; None: all of it."""
  if not name.startswith("layers/"):
    yield _TENSORS[name], None
    return
  names = LAYER_TENSORS | (_NORM_BEFORE if config.norm_place == "before" else {})
  for layer in range(config.num_layers):
    yield f"model.layers.{layer}.{names[name.removeprefix('layers/')]}", layer


def _joined(name: str, shape: tuple[int, ...]) -> tuple[int, int]:
  """`[in..., out...]` as `[in, out]`."""
  if name.split("/")[-2] in ("out", "down"):
    return int(np.prod(shape[:-1])), shape[-1]
  return shape[0], int(np.prod(shape[1:]))


def _to_torch(name: str, leaf: jax.Array, place: int | None) -> np.ndarray:
  """Returns a parameter as torch has it; see `_stored_shape`."""
  ours = np.asarray(leaf if place is None else leaf[place])
  if name.endswith("kernel"):
    return np.ascontiguousarray(ours.reshape(_joined(name, ours.shape)).T)
  return np.ascontiguousarray(ours if name == "embedder/embedding" else ours.reshape(-1))


def _aligned(shape: tuple[int, ...], dtype: str) -> np.ndarray:
  """An empty array that jax can take as it is on a CPU, at a multiple of 64 bytes."""
  dtype = jnp.dtype(dtype)
  raw = np.empty(int(np.prod(shape)) * dtype.itemsize + 64, np.uint8)
  start = -raw.ctypes.data % 64
  return raw[start : start + raw.size - 64].view(dtype).reshape(shape)


def _full(hf: Json) -> MemoryConfig:
  """The ordinary decoder that a model without a memory is."""
  context = min(hf.get("max_position_embeddings") or _CONTEXT, _CONTEXT)
  return MemoryConfig("full", _BLOCK, memory_segments=-(-context // _BLOCK) - 1)
