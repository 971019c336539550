"""Reads and writes a directory of the Hugging Face hub: `config.json` and safetensors.

A memory that a model was given stands beside them in `famjax.json` and `famjax.safetensors`, which
transformers does not look at. Tensors are read one by one into the stacked arrays of `Decoder`, so
that no more than the model and one tensor stands in memory.
"""

from collections.abc import Callable, Iterator
import dataclasses
import json
import pathlib
import re
from typing import Any

from flax import nnx, traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from safetensors.numpy import load_file, save_file

from famjax.convert.families import SYMBOLS, Json, carried, from_hf, known, to_hf
from famjax.errors import UserError
from famjax.formats import read_json
from famjax.model import strategy
from famjax.model.config import MEMORY_WEIGHTS, MemoryConfig, ModelConfig
from famjax.model.decoder import Decoder
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
_NOT_WEIGHTS = re.compile(r"rotary_emb\.inv_freq$")
_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float32"}  # stored, and as it is read
_SHARD_BYTES = 5_000_000_000
_INDEX = "model.safetensors.index.json"
_MEMORY, _MEMORY_WEIGHTS = "famjax.json", "famjax.safetensors"
_BLOCK, _CONTEXT = 512, 8192  # tokens, of an ordinary decoder that comes without a memory


def is_hf(path: pathlib.Path) -> bool:
  """Whether a directory is a Hugging Face model's."""
  return (path / "config.json").is_file() and "model_type" in read_json(path / "config.json")


def read_config(path: pathlib.Path) -> ModelConfig:
  """Reads a model's configuration alone; see `read`."""
  return _config(path, _Tensors(path), None)


def _config(path: pathlib.Path, tensors: "_Tensors", param_dtype: str | None) -> ModelConfig:
  hf = read_json(path / "config.json")
  config = from_hf(hf)
  dtype = param_dtype or tensors.dtype(_TENSORS["embedder/embedding"])
  config = dataclasses.replace(
      config, memory=read_memory(path) or _full(hf), param_dtype=dtype, compute_dtype=dtype
  )
  try:
    config.validate()
  except UserError as error:
    raise UserError(f"{path}: {error}") from None
  return config


def refuse_t5x(path: pathlib.Path) -> None:
  """Raises UserError for a checkpoint of T5X: a msgpack file, and a directory for each large array."""
  if (path / "checkpoint").is_file() and any(path.glob("target.*")):
    raise UserError(
        f"{path} is a checkpoint of T5X: T5 and Flan-T5 are encoder-decoders, and famjax has"
        f" decoders: {known()}"
    )


def read(
    path: pathlib.Path,
    param_dtype: str | None = None,
    where: Callable[[ModelConfig], Params] | None = None,
) -> tuple[Params, ModelConfig]:
  """Reads a model.

  Args:
    path: a directory with `config.json` and safetensors, in one file or in several.
    param_dtype: "float32" or "bfloat16"; None: the one that the embedding is stored in, float32 for
      float16.
    where: gives the sharding of each parameter, of a configuration; None: all are on one device.

  Returns:
    Parameters of a `Decoder`, as nested dicts, and its configuration. Its memory is the one that
    `write` left there, or else "full" attention, with room for 8,192 tokens at most.

  Raises:
    UserError: no such family, or a tensor is missing, unknown, or of another shape.
  """
  tensors = _Tensors(path)
  config = _config(path, tensors, param_dtype)
  leaves, unused = {}, set(tensors.names)
  places = {} if where is None else traverse_util.flatten_dict(where(config), sep="/")
  for name, shape in shapes(config).items():
    leaf = _aligned(shape, config.param_dtype)
    for tensor, place in _places(name, config):
      into = leaf if place is None else leaf[place]
      into[...] = _from_torch(name, tensors.read(tensor), into.shape, tensor)
      unused.discard(tensor)
    leaves[name] = (
        put(leaf, places[name]) if places
        else jax.device_put(leaf, may_alias=True)  # a CPU takes the array as it is
    )  # fmt: skip
  if config.tie_embeddings:  # some directories hold it all the same
    unused.discard(_TENSORS["head/kernel"])
  unused = sorted(name for name in unused if not _NOT_WEIGHTS.search(name))
  if unused:
    raise UserError(f"{path} has the tensor {unused[0]}, which no part of its model takes")
  leaves |= read_memory_weights(path, config)
  return traverse_util.unflatten_dict(leaves, sep="/"), config


def write(path: pathlib.Path, params: Params, config: ModelConfig, like: Json | None = None) -> None:
  """Writes a model that transformers loads.

  Args:
    path: a directory, which is made.
    params: of a `Decoder`.
    config: of the model.
    like: a `config.json`; where it is of the same network its other entries are kept, and the ids of
      symbols in any case.

  Raises:
    UserError: no family has all options of the model.
  """
  leaves = traverse_util.flatten_dict(params, sep="/")
  leaves = {name: leaf for name, leaf in leaves.items() if not _of_memory(name)}
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
    file = file if len(shards) > 1 else "model.safetensors"
    part = {tensor: _to_torch(name, leaves[name], place) for tensor, name, place in shard}
    save_file(part, path / file, metadata={"format": "pt"})
    index |= {tensor: file for tensor in part}
  if len(shards) > 1:
    whole = {"metadata": {"total_size": sum(sizes)}, "weight_map": index}
    (path / _INDEX).write_text(json.dumps(whole, indent=2) + "\n")
  (path / "config.json").write_text(json.dumps(hf, indent=2) + "\n")
  if config.memory.kind != "full":
    write_memory(path, params, config)


def write_memory(path: pathlib.Path, params: Params, config: ModelConfig) -> None:
  """Writes a memory and its own weights beside files that others read."""
  (path / _MEMORY).write_text(json.dumps(dataclasses.asdict(config.memory), indent=2) + "\n")
  leaves = traverse_util.flatten_dict(params, sep="/")
  own = {name: np.asarray(leaf) for name, leaf in leaves.items() if _of_memory(name)}
  if own:
    save_file(own, path / _MEMORY_WEIGHTS)


def read_memory(path: pathlib.Path) -> MemoryConfig | None:
  """The memory that `write_memory` left, if any."""
  if not (path / _MEMORY).is_file():
    return None
  try:
    memory = MemoryConfig(**read_json(path / _MEMORY))
  except TypeError as error:
    raise UserError(f"{path / _MEMORY} is no memory that famjax knows ({error})") from None
  strategy.check_saved(memory, str(path / _MEMORY))
  return memory


def read_memory_weights(path: pathlib.Path, config: ModelConfig) -> dict[str, jax.Array]:
  """A memory's own weights, if `write_memory` left any: a nested dict."""
  path = path / _MEMORY_WEIGHTS
  if not path.is_file():
    return {}
  found = load(path)
  held = {name: leaf.shape for name, leaf in found.items()}
  wanted = {name: shape for name, shape in _all_shapes(config).items() if _of_memory(name)}
  if held != wanted:
    raise UserError(f"{path} holds {held}, and the memory in {_MEMORY} takes {wanted}")
  return traverse_util.unflatten_dict({k: jnp.asarray(x) for k, x in found.items()}, sep="/")


def load(path: pathlib.Path) -> dict[str, np.ndarray]:
  """The tensors of one file. Raises UserError if it cannot be read."""
  try:
    return load_file(path)
  except Exception as error:  # a cut file
    raise UserError(f"{path} cannot be read ({error}): fetch it again") from None


class _Tensors:
  """The tensors of a directory, wherever they are.

  A file is opened for each tensor anew: it is mapped into memory as far as it was read, and would
  stand there beside the model.
  """

  def __init__(self, path: pathlib.Path):
    self._path = path
    if (path / _INDEX).is_file():
      self._file_of = read_json(path / _INDEX).get("weight_map")
      if not isinstance(self._file_of, dict) or not self._file_of:
        raise UserError(f"{path / _INDEX} has no weight_map: fetch it again")
    elif (path / "model.safetensors").is_file():
      with self._open("model.safetensors") as file:
        self._file_of = dict.fromkeys(file.keys(), "model.safetensors")
    else:
      raise UserError(f"{path} has no model.safetensors: convert its weights to safetensors first")
    missing = [file for file in sorted(set(self._file_of.values())) if not (path / file).is_file()]
    if missing:
      raise UserError(f"{path} lacks {missing[0]}, which its index names: fetch it again")
    self.names = list(self._file_of)

  def dtype(self, name: str) -> str:
    """"float32" or "bfloat16"."""
    with self._open(self._file(name)) as file:
      return self._dtype(file, name)

  def read(self, name: str) -> np.ndarray:
    with self._open(self._file(name)) as file:
      self._dtype(file, name)
      return file.get_tensor(name)

  def _file(self, name):
    if name not in self._file_of:
      raise UserError(f"{self._path} lacks the tensor {name}")
    return self._file_of[name]

  def _open(self, file):
    try:
      return safetensors.safe_open(self._path / file, framework="numpy")
    except Exception as error:  # a cut file
      raise UserError(f"{self._path / file} cannot be read ({error}): fetch it again") from error

  def _dtype(self, file, name):
    try:
      stored = file.get_slice(name).get_dtype()
    except safetensors.SafetensorError:
      where = self._file_of[name]
      raise UserError(f"{self._path}: {where} lacks {name}, which the index says it has") from None
    if stored not in _DTYPES:
      raise UserError(f"{self._path} stores {name} as {stored}; there is {', '.join(_DTYPES)}")
    return _DTYPES[stored]


def shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
  """Shapes of all parameters but the memory's, by path."""
  return {name: shape for name, shape in _all_shapes(config).items() if not _of_memory(name)}


def _all_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
  _, params = nnx.split(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))
  leaves = traverse_util.flatten_dict(nnx.to_pure_dict(params), sep="/")
  return {name: leaf.shape for name, leaf in leaves.items()}


def _of_memory(name: str) -> bool:
  return name.partition("/")[0] in MEMORY_WEIGHTS


def _places(name: str, config: ModelConfig) -> Iterator[tuple[str, int | None]]:
  """The tensors that a parameter is made of, and which of its layers each is; None: all of it."""
  if not name.startswith("layers/"):
    yield _TENSORS[name], None
    return
  names = LAYER_TENSORS | (_NORM_BEFORE if config.norm_place == "before" else {})
  for layer in range(config.num_layers):
    yield f"model.layers.{layer}.{names[name.removeprefix('layers/')]}", layer


def _from_torch(name: str, tensor: np.ndarray, shape: tuple[int, ...], where: str) -> np.ndarray:
  """torch keeps `[out, in]`, and we keep `[in..., out...]`."""
  ours = tensor.T if name.endswith("kernel") else tensor
  if ours.size != np.prod(shape) or (ours.ndim == 2 and not _fits(name, ours.shape, shape)):
    raise UserError(f"{where} has shape {list(tensor.shape)}, and its config.json asks for {shape}")
  return ours.reshape(shape)


def _fits(name: str, matrix: tuple[int, ...], shape: tuple[int, ...]) -> bool:
  """Whether a matrix of `matrix` is an array of `shape` with axes joined."""
  return matrix == (_joined(name, shape) if name.endswith("kernel") else shape)


def _joined(name: str, shape: tuple[int, ...]) -> tuple[int, int]:
  """`[in..., out...]` as `[in, out]`."""
  if name.split("/")[-2] in ("out", "down"):
    return int(np.prod(shape[:-1])), shape[-1]
  return shape[0], int(np.prod(shape[1:]))


def _to_torch(name: str, leaf: jax.Array, place: int | None) -> np.ndarray:
  """Undoes `_from_torch`; q/k norms over the whole width are one axis there."""
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
