"""Models of transformers, in torch and in famjax: the same logits, there and back the same bytes.

float32 on both sides; 1e-4 in logits of size 7 to 10. Sums run in another order, no more.
"""

import dataclasses
import json

from flax import nnx
import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from famjax.convert import hf
from famjax.convert.families import FAMILIES
from famjax.errors import UserError
from famjax.model.config import MemoryConfig
from famjax.model.decoder import Decoder
from tests.convert import tiny

torch = pytest.importorskip("torch", reason="the extra hf brings torch to Python 3.11 alone")
import safetensors.torch  # pylint: disable=wrong-import-position
TOKENS = np.random.default_rng(0).integers(3, 97, (2, 60))


def ours(directory, **memory):
  """famjax's logits, of a window that covers the text if no memory is given."""
  params, config = hf.read(directory)
  if memory:
    config = dataclasses.replace(config, memory=MemoryConfig(**memory))
  graphdef = nnx.split(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))[0]
  return np.asarray(jax.jit(lambda tokens: nnx.merge(graphdef, params)(tokens)[0])(TOKENS))


def theirs(model):
  with torch.no_grad():
    return model(torch.tensor(TOKENS)).logits.float().numpy()


@pytest.mark.parametrize("kind", FAMILIES)
def test_logits_there_and_back(kind, tmp_path):
  model = tiny.save(kind, tmp_path / "in")
  expected = theirs(model)
  close = lambda a: np.testing.assert_allclose(a, expected, atol=1e-4)
  close(ours(tmp_path / "in", kind="full", block_size=64, memory_segments=0))
  close(ours(tmp_path / "in", kind="bswa", block_size=8, memory_segments=7))
  params, config = hf.read(tmp_path / "in")
  hf.write(tmp_path / "out", params, config, hf.read_json(tmp_path / "in" / "config.json"))
  weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("in", "out")]
  assert weights[0] == weights[1]
  np.testing.assert_array_equal(theirs(tiny.load(tmp_path / "out")), expected)


def test_a_short_window_and_a_fam_are_something_else(tmp_path):
  """So that the test above can fail."""
  expected = theirs(tiny.save("llama", tmp_path))
  for memory in (
      dict(kind="bswa", block_size=8, memory_segments=3),
      dict(kind="fam", block_size=8, memory_segments=7, fam_length=2),
  ):
    params, config = hf.read(tmp_path)
    config = dataclasses.replace(config, memory=MemoryConfig(**memory))
    model = Decoder(config, rngs=nnx.Rngs(0))
    graphdef, own = nnx.split(model)
    params = params | {name: own[name] for name in ("fam_prompt",) if memory["kind"] == "fam"}
    logits = jax.jit(lambda tokens: nnx.merge(graphdef, params)(tokens)[0])(TOKENS)  # pylint: disable=cell-var-from-loop
    assert np.abs(logits - expected)[:, 40:].max() > 0.01


def test_bfloat16_in_several_files(tmp_path):
  tiny.save("qwen2", tmp_path / "in", dtype="bfloat16", shard="20KB")
  index = hf.read_json(tmp_path / "in" / "model.safetensors.index.json")
  assert len(set(index["weight_map"].values())) > 2
  params, config = hf.read(tmp_path / "in")
  assert config.param_dtype == config.compute_dtype == "bfloat16"
  assert all(leaf.dtype == "bfloat16" for leaf in jax.tree.leaves(params))
  hf.write(tmp_path / "out", params, config)
  a, b = (tiny.load(tmp_path / name).state_dict() for name in ("in", "out"))
  assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
  assert a["model.norm.weight"].dtype == torch.bfloat16


def test_float16_is_read_as_float32(tmp_path):
  expected = theirs(tiny.save("llama", tmp_path, dtype="float16").float())
  params, config = hf.read(tmp_path)
  assert config.param_dtype == "float32"
  assert all(leaf.dtype == "float32" for leaf in jax.tree.leaves(params))
  np.testing.assert_allclose(ours(tmp_path), expected, atol=1e-4)


def test_an_export_is_cut_into_files(tmp_path, monkeypatch):
  tiny.save("llama", tmp_path / "in")
  params, config = hf.read(tmp_path / "in")
  monkeypatch.setattr(hf, "_SHARD_BYTES", 20_000)
  hf.write(tmp_path / "out", params, config)
  assert len(list((tmp_path / "out").glob("model-0*-of-0*.safetensors"))) > 2
  again, _ = hf.read(tmp_path / "out")
  jax.tree.map(np.testing.assert_array_equal, again, params)
  np.testing.assert_array_equal(theirs(tiny.load(tmp_path / "out")), theirs(tiny.load(tmp_path / "in")))


def test_a_memory_goes_along(tmp_path):
  tiny.save("llama", tmp_path / "in")
  params, config = hf.read(tmp_path / "in")
  assert config.memory == MemoryConfig("full", 512, memory_segments=0)  # 128 positions
  config = dataclasses.replace(config, memory=MemoryConfig("fam", 8, 1, 2))
  params = params | {"fam_prompt": np.ones((2, 32), np.float32)}
  hf.write(tmp_path / "out", params, config)
  again, same = hf.read(tmp_path / "out")
  assert same == config
  np.testing.assert_array_equal(again["fam_prompt"], params["fam_prompt"])
  np.testing.assert_array_equal(theirs(tiny.load(tmp_path / "out")), theirs(tiny.load(tmp_path / "in")))


def broken(directory, what):
  """Makes a directory that cannot be read."""
  if what == "a family":
    change(directory, model_type="mamba")
  elif what == "a shape":
    change(directory, intermediate_size=40)
  elif what == "a tensor too many":
    change(directory, num_hidden_layers=2)
  elif what == "a tensor too few":
    change(directory, num_hidden_layers=4)
  elif what == "no weights":
    (directory / "model.safetensors").unlink()
  elif what == "a cut file":
    data = (directory / "model.safetensors").read_bytes()
    (directory / "model.safetensors").write_bytes(data[:1000])
  elif what == "float8":
    tensors = safetensors.torch.load_file(directory / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.float8_e4m3fn)
    safetensors.torch.save_file(tensors, directory / "model.safetensors")
  elif what == "an index of nothing":
    (directory / "model.safetensors.index.json").write_text("{}")
  elif what == "an index of too much":
    names = safetensors.torch.load_file(directory / "model.safetensors")
    index = dict.fromkeys([*names, "model.layers.3.mlp.up_proj.weight"], "model.safetensors")
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    change(directory, num_hidden_layers=4)
    for name in names:
      if ".2." in name:
        index[name.replace(".2.", ".3.")] = "model.safetensors"
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
  elif what == "another memory":
    (directory / "famjax.json").write_text('{"size": 3}')
  elif what == "weights of another memory":
    memory = MemoryConfig("fam", 8, 1, 2)
    (directory / "famjax.json").write_text(json.dumps(dataclasses.asdict(memory)))
    save_file({"fam_prompt": np.ones((3, 32), np.float32)}, directory / "famjax.safetensors")
  elif what == "no JSON":
    (directory / "config.json").write_text('{"model_type"')


def change(directory, **values):
  path = directory / "config.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    "what, message",
    [
        ("a family", 'of type "mamba" cannot be converted; there is llama'),
        ("a shape", r"mlp.gate_proj.weight has shape \[48, 32\], and its config.json asks for \[40, 32\]"),
        ("a tensor too many", r"has the tensor model.layers.2\S+, which no part of its model takes"),
        ("a tensor too few", r"lacks the tensor model.layers.3"),
        ("no weights", "has no model.safetensors: fetch the weights of the model, in safetensors"),
        ("a cut file", "cannot be read .*: fetch it again"),
        ("float8", "stores model.norm.weight as F8_E4M3; there is F32, BF16, F16"),
        ("an index of nothing", "index.json: Object missing required field weight_map"),
        ("an index of too much", 'model.safetensors lacks "model.layers.3.*which the index says it has'),
        ("another memory", "famjax.json is no memory that famjax knows: .*size"),
        ("weights of another memory", r"safetensors holds .*\[3, 32\].*takes .*\[2, 32\]"),
        ("no JSON", "config.json cannot be read .*: fetch it again"),
    ],
)
def test_directories_that_cannot_be_read(what, message, tmp_path):
  tiny.save("llama", tmp_path)
  broken(tmp_path, what)
  with pytest.raises(UserError, match=message) as error:
    hf.read(tmp_path)
  assert "\n" not in str(error.value)
