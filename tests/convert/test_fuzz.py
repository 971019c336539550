"""Broken files of a model's directory: each is read right, or refused in one line, at once.

1,000 wrong values for each JSON format, 300 broken files for each of safetensors.
"""

import dataclasses
import json
import pathlib
import random
import shutil
import struct

import jax
import numpy as np
import pytest
from safetensors.numpy import save, save_file

from famjax.convert import hf, peft
from famjax.convert.families import FAMILIES, from_hf, to_hf
from famjax.model.config import MemoryConfig, ModelConfig
from tests import mutations

SIZES = dict(
    vocab_size=17, num_layers=2, model_dim=8, num_heads=2, num_kv_heads=1, ff_dim=12,
    memory=MemoryConfig("full", 16, memory_segments=0),
)  # fmt: skip
ADAPTER = dict(
    peft_type="LORA", r=2, lora_alpha=4.0, use_rslora=False, init_lora_weights=True, bias="none",
    use_dora=False, modules_to_save=None, rank_pattern={}, target_modules=["q_proj"],
)  # fmt: skip


def model(**options):
  """Returns random parameters, and the configuration."""
  config, draw = ModelConfig(**SIZES | options), np.random.default_rng(0)
  flat = {name: draw.standard_normal(shape, np.float32) for name, shape in hf.shapes(config).items()}
  return jax.tree.map(jax.numpy.asarray, hf.traverse_util.unflatten_dict(flat, sep="/")), config


@pytest.fixture(scope="module", name="source")
def _source(tmp_path_factory):
  """A model with a FAM, and an adapter of it below `adapter`."""
  directory = tmp_path_factory.mktemp("fuzz") / "model"
  params, config = model()
  config = dataclasses.replace(config, memory=MemoryConfig("fam", 4, 1, 2))
  hf.write(directory, params | {"fam_prompt": np.ones((2, 8), np.float32)}, config)
  lora = {
      f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_{name}.weight": np.ones(shape, "float32")
      for layer in range(2) for name, shape in (("A", (2, 8)), ("B", (8, 2)))
  }  # fmt: skip
  (directory / "adapter").mkdir()
  save_file(lora, directory / "adapter" / "adapter_model.safetensors")
  (directory / "adapter" / "adapter_config.json").write_text(json.dumps(ADAPTER))
  return directory


@pytest.fixture(name="copy")
def _copy(source, tmp_path):
  return pathlib.Path(shutil.copytree(source, tmp_path / "copy"))


def tried(documents, write, read):
  """Writes and reads every document; returns the share of those that were read."""
  fine = []
  for document in documents:
    write(document)
    fine.append(mutations.survives(read, document))
  assert any(fine) and not all(fine)
  return sum(fine) / len(fine)


def write_json(path):
  return lambda document: path.write_text(mutations.text(document))


@pytest.mark.parametrize("family", FAMILIES)
def test_config_json(family, tmp_path):
  """1,000 of the first family, 200 of each other; the weights stay."""
  plain = {
      "llama": {}, "mistral": dict(layer_kinds=("local",) * 2, local_window=5),
      "smollm3": dict(layer_kinds=("global", "nope")), "qwen2": dict(qkv_bias=True),
      "qwen3": dict(qk_norm="head"), "olmo2": dict(norm_place="after", qk_norm="width"),
  }  # fmt: skip
  gemma = dict(norm="rms_plus_one", activation="gelu", scale_embeddings=True)
  local = dict(norm_place="both", layer_kinds=("local", "global"), local_window=5)
  plain["gemma"] = gemma
  plain["gemma2"] = gemma | local | dict(attention_cap=50.0, logit_cap=30.0)
  plain["gemma3_text"] = gemma | local | dict(qk_norm="head", local_rope_theta=100.0)
  options = plain[family] | dict(rope_factor=2.0, rope_stretch=(1.0, 4.0, 32))
  if family == "mistral":
    options |= dict(local_rope_factor=2.0, local_rope_stretch=(1.0, 4.0, 32))
  elif family == "gemma2":
    options |= dict(local_rope_factor=2.0, local_rope_stretch=(1.0, 4.0, 32))
  params, config = model(**options)
  hf.write(tmp_path, params, config)
  path = tmp_path / "config.json"
  document = json.loads(path.read_text())
  assert document["model_type"] == family and from_hf(document) == from_hf(to_hf(config))
  documents = mutations.mutations(document, 1000 if family == "llama" else 200, seed=len(family))
  share = tried(documents, write_json(path), lambda: hf.read_config(tmp_path))
  assert 0.2 < share < 0.9


@pytest.mark.parametrize("name, value", [
    ("num_hidden_layers", 10**9), ("vocab_size", 10**9), ("vocab_size", 2**31 - 1),
    ("hidden_size", 10**9), ("intermediate_size", 2**24), ("num_attention_heads", 10**6),
    ("num_hidden_layers", 4096), ("head_dim", 2**20),
])  # fmt: skip
def test_sizes_of_no_machine(copy, name, value):
  document = json.loads((copy / "config.json").read_text()) | {name: value}
  (copy / "config.json").write_text(json.dumps(document))
  assert not mutations.survives(lambda: hf.read(copy), document)


def test_the_index(copy):
  names = list(hf.Tensors(copy).names)
  document = {"metadata": {"total_size": 9}, "weight_map": dict.fromkeys(names, "model.safetensors")}
  path = copy / "model.safetensors.index.json"
  tried(mutations.mutations(document, 1000), write_json(path), lambda: hf.read_config(copy))


@pytest.mark.parametrize("memory", [
    MemoryConfig("fam", 4, 1, 2), MemoryConfig("rmt", 4, 0, options={"length": 2}),
    MemoryConfig("infini", 4, 1), MemoryConfig("bswa", 4, 3, window=5),
], ids=lambda memory: memory.kind)  # fmt: skip
def test_famjax_json(copy, memory):
  (copy / "famjax.safetensors").unlink()
  document = dataclasses.asdict(memory)
  path = copy / "famjax.json"
  tried(mutations.mutations(document, 1000), write_json(path), lambda: hf.read_config(copy))


def test_adapter_config_json(copy):
  params, config = model()
  path = copy / "adapter" / "adapter_config.json"
  read = lambda: peft.read(path.parent, params, config)
  tried(mutations.mutations(ADAPTER, 1000), write_json(path), read)


def broken_files(data, count):
  """Yields files of tensors that are cut, changed in a bit, or hostile."""
  rng = random.Random(0)
  yield from hostile_files(data)
  for _ in range(count):
    kind = rng.random()
    size = struct.unpack("<Q", data[:8])[0] + 8
    changed = bytearray(data)
    if kind < 0.2:
      changed = changed[: rng.randrange(len(data))]
    elif kind < 0.3:
      changed += bytes(rng.randrange(1, 100))
    elif kind < 0.9:  # most of the file is numbers, and most of what can go wrong its header
      place = rng.randrange(size) if kind < 0.8 else rng.randrange(len(data))
      changed[place] ^= 1 << rng.randrange(8)
    else:
      header = json.loads(data[8:size])
      broken = next(mutations.mutations(header, 1, seed=rng.randrange(2**30)))
      text = mutations.text(broken).encode()
      changed = struct.pack("<Q", len(text)) + text + data[size:]
    yield bytes(changed)


def hostile_files(data):
  size = struct.unpack("<Q", data[:8])[0]
  header, numbers = json.loads(data[8 : 8 + size]), data[8 + size :]
  names = [name for name in header if name != "__metadata__"]
  first, last = names[0], names[-1]

  def made(text, length=None):
    return struct.pack("<Q", len(text) if length is None else length) + text + numbers

  def entry(**values):
    return made(json.dumps(header | {first: header[first] | values}).encode())

  yield b""
  yield struct.pack("<Q", 0)
  for length in (2**63, 2**64 - 1, 2**40, 0, 1, size + len(numbers), size - 1):
    yield made(data[8 : 8 + size], length)
  for offsets in ([0, 0], [0, 2**63], [4, 0], [-4, 0], header[last]["data_offsets"], [0, len(numbers)]):
    yield entry(data_offsets=offsets)
  for shape in ([2**62, 4], [2**32, 2**32], [0], [], [2**64], [-1], [10**9, 10**9, 0], [1.5], "a"):
    yield entry(shape=shape)
  for dtype in ("F64", "I64", "BOOL", "F8_E5M2", "F4", "C64", "x", "", None, 3, "BF16"):
    yield entry(dtype=dtype)
  text = json.dumps(header)
  twice = text[:-1] + f', "{first}": {json.dumps(header[first])}' + "}"
  for other in (twice, "[" * 10**5, "{}", "[]", "null", text.replace(first, "\\ud800"), text + " " * 99):
    yield made(other.encode())


@pytest.mark.parametrize("name", ["model", "famjax", "adapter/adapter_model"])
def test_files_of_tensors(copy, name):
  path = copy / f"{name}.safetensors"
  params, config = model()
  if name.startswith("adapter"):
    read = lambda: peft.read(path.parent, params, config)
  else:
    read = lambda: hf.read(copy)
  tried(broken_files(path.read_bytes(), 300), path.write_bytes, read)


def test_tensors_of_other_kinds(copy):
  """Integers and float64 are no weights, whatever file they stand in."""
  path = copy / "famjax.safetensors"
  for dtype in ("int32", "float64", "bool"):
    path.write_bytes(save({"fam_prompt": np.ones((2, 8), dtype)}))
    assert not mutations.survives(lambda: hf.read(copy), dtype)
