"""Directories from the wild: heads, indexes, names, links, values; what transformers makes of them."""

import json
import pathlib
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import famjax
from famjax import cli
from famjax.convert import hf
from famjax.errors import UserError
from famjax.training.checkpoint import load_params
from tests.convert import tiny
from tests.convert.test_hf import ours, theirs

torch = pytest.importorskip("torch", reason="the extra hf brings torch to Python 3.11 alone")
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
FILE, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture(scope="module", name="source")
def _source(tmp_path_factory):
  directory = tmp_path_factory.mktemp("source")
  tiny.save("llama", directory, tie_word_embeddings=True)
  return directory


@pytest.fixture(name="copy")
def _copy(source, tmp_path):
  return pathlib.Path(shutil.copytree(source, tmp_path / "copy"))


def change(directory, edit):
  """Writes the tensors that `edit` makes of a directory's."""
  tensors = load_file(directory / FILE)
  save_file(edit(dict(tensors)), directory / FILE, metadata={"format": "pt"})
  return tensors


def configure(directory, **values):
  path = directory / "config.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | values))


def refused(directory, message):
  with pytest.raises(UserError, match=message) as error:
    hf.read(directory)
  assert "\n" not in str(error.value) and str(directory) in str(error.value)


@pytest.mark.parametrize("family", ["llama", "gemma", "gemma2", "gemma3_text", "qwen3"])
def test_a_head_of_its_own_under_tied_embeddings(family, tmp_path):
  """transformers keeps a head with other values than the embedding, and so do import and export."""
  tiny.save(family, tmp_path / "in", tie_word_embeddings=True)
  change(tmp_path / "in", lambda t: t | {HEAD: t[EMBEDDING][::-1].copy()})
  expected = theirs(tiny.load(tmp_path / "in"))
  np.testing.assert_allclose(ours(tmp_path / "in"), expected, atol=1e-4)
  params, config = hf.read(tmp_path / "in")
  assert not config.tie_embeddings and hf.read_config(tmp_path / "in") == config
  like = hf.read_json(tmp_path / "in" / "config.json")
  hf.write(tmp_path / "out", params, config, like)
  np.testing.assert_array_equal(theirs(tiny.load(tmp_path / "out")), expected)
  written = hf.read_json(tmp_path / "out" / "config.json")
  assert written["tie_word_embeddings"] is False
  assert written["max_position_embeddings"] == like["max_position_embeddings"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_head_that_repeats_the_embedding(tmp_path, dtype):
  copy = tmp_path / "in"
  tiny.save("llama", copy, dtype=dtype, tie_word_embeddings=True)
  params, config = hf.read(copy)
  change(copy, lambda t: t | {HEAD: t[EMBEDDING]})
  again, same = hf.read(copy)
  assert same == config and same.tie_embeddings and "head" not in again
  np.testing.assert_array_equal(again["embedder"]["embedding"], params["embedder"]["embedding"])
  change(copy, lambda t: t | {HEAD: t[EMBEDDING][::-1].copy()})
  assert "head" in hf.read(copy)[0]


def test_a_head_in_place_of_the_embedding(copy):
  """transformers ties the other way round."""
  change(copy, lambda t: {HEAD if name == EMBEDDING else name: x for name, x in t.items()})
  np.testing.assert_allclose(ours(copy), theirs(tiny.load(copy)), atol=1e-4)
  assert hf.read(copy)[1].tie_embeddings


@pytest.mark.parametrize("head", [True, False])
@pytest.mark.parametrize("rename", [
    lambda name: name.removeprefix("model."),
    lambda name: f"model.{name}" if name.startswith("model.") else name,
], ids=["no prefix", "two prefixes"])  # fmt: skip
def test_the_prefix_of_names(copy, rename, head):
  """transformers adds `model.` to names without it, and takes away a second one."""
  if head:
    configure(copy, tie_word_embeddings=False)
  more = lambda t: {HEAD: t[EMBEDDING] + 1} if head else {}
  change(copy, lambda t: {rename(name): x for name, x in (t | more(t)).items()})
  np.testing.assert_allclose(ours(copy), theirs(tiny.load(copy)), atol=1e-4)


def test_two_names_of_one_weight(copy):
  change(copy, lambda t: t | {"embed_tokens.weight": t[EMBEDDING]})
  hf.read(copy)
  change(copy, lambda t: t | {"embed_tokens.weight": t[EMBEDDING] + 1})
  refused(copy, "has embed_tokens.weight and model.embed_tokens.weight with other values")


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("name", ["model.rotary_emb", "model.layers.1.self_attn.rotary_emb"])
def test_frequencies_of_rope_are_compared(copy, name, dtype):
  model = tiny.load(copy)
  right = model.model.rotary_emb.inv_freq.numpy().astype(dtype)
  change(copy, lambda t: t | {f"{name}.inv_freq": right})
  hf.read(copy)
  plain = (1 / 5e5 ** (np.arange(0, 8, 2) / 8)).astype(dtype)  # where positions are scaled instead
  change(copy, lambda t: t | {f"{name}.inv_freq": plain})
  hf.read(copy)
  change(copy, lambda t: t | {f"{name}.inv_freq": (right * 1.1).astype(dtype)})
  refused(copy, f"{name}.inv_freq has other frequencies than the RoPE of config.json")


@pytest.mark.parametrize("switch", [True, False])
def test_biases_that_are_zero_are_none(copy, switch):
  configure(copy, attention_bias=switch)
  sizes = dict(q_proj=32, k_proj=16, v_proj=16, o_proj=32)
  biases = lambda fill: {
      f"model.layers.{layer}.self_attn.{name}.bias": np.full(size, fill, np.float32)
      for layer in range(3) for name, size in sizes.items()
  }  # fmt: skip
  change(copy, lambda t: t | biases(0))
  np.testing.assert_allclose(ours(copy), theirs(tiny.load(copy)), atol=1e-4)
  change(copy, lambda t: t | biases(0) | {"model.layers.2.self_attn.o_proj.bias": np.ones(32, "float32")})
  refused(copy, "attention_bias is True" if switch else "o_proj.bias, which no part of its model takes")


def test_a_memory_s_weights_without_its_memory(copy):
  save_file({"fam_prompt": np.ones((2, 32), np.float32)}, copy / "famjax.safetensors")
  refused(copy, "holds famjax.safetensors of a memory without famjax.json")


def test_a_memory_without_its_weights(copy):
  (copy / "famjax.json").write_text(json.dumps({"kind": "fam", "block_size": 8, "fam_length": 2}))
  refused(copy, "has a memory without its famjax.safetensors: put that back")


def test_an_adapter_beside_its_model(copy):
  (copy / "adapter_config.json").write_text("{}")
  hf.read(copy)  # which transformers cannot add
  save_file({"a": np.ones(1, np.float32)}, copy / "adapter_model.safetensors")
  refused(copy, "holds an adapter beside its model, and transformers adds the two")


def shards(directory, **other):
  """Cuts a directory's weights into two files with an index."""
  tensors = load_file(directory / FILE)
  (directory / FILE).unlink()
  names, files = sorted(tensors), ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
  for number, file in enumerate(files):
    save_file({name: tensors[name] for name in names[number::2]}, directory / file)
  index = {name: files[place % 2] for place, name in enumerate(names)} | other
  (directory / INDEX).write_text(json.dumps({"weight_map": index}))
  return files, index


def test_an_index_beside_one_file(copy):
  whole = load_file(copy / FILE)
  (copy / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(whole, FILE)}))
  hf.read(copy)
  files, index = shards(copy)
  hf.read(copy)
  save_file(whole, copy / FILE)
  refused(copy, f"holds {FILE} and {INDEX}, which names other files")
  (copy / INDEX).unlink()
  hf.read(copy)
  (copy / FILE).unlink()
  refused(copy, f"has model-00001-of-00002.safetensors without {INDEX}")


@pytest.mark.parametrize("what, message", [
    ("a name too few", "holds .*, which model.safetensors.index.json does not say"),
    ("a name too many", "lacks .*model.layers.9.* which the index says it has"),
    ("another file", "holds .*, which model.safetensors.index.json does not say"),
    ("a missing file", "lacks .*model-3.safetensors.*, which its index names"),
])  # fmt: skip
def test_an_index_that_is_out_of_date(copy, what, message):
  files, index = shards(copy)
  name = min(index)
  if what == "a name too few":
    index.pop(name)
  elif what == "a name too many":
    index["model.layers.9.mlp.up_proj.weight"] = files[0]
  elif what == "another file":
    index[name] = files[1]
  else:
    index[name] = "model-3.safetensors"
  (copy / INDEX).write_text(json.dumps({"weight_map": index}))
  refused(copy, message)


@pytest.mark.parametrize("file", ["../secret/model.safetensors", "{}/secret/model.safetensors", "a/b", "..", ""])
def test_an_index_that_names_files_elsewhere(copy, tmp_path, file):
  whole = load_file(copy / FILE)
  (tmp_path / "secret").mkdir()
  (copy / FILE).rename(tmp_path / "secret" / FILE)
  index = dict.fromkeys(whole, file.format(tmp_path))
  (copy / INDEX).write_text(json.dumps({"weight_map": index}))
  refused(copy, "which is no plain name of a file in it")


@pytest.mark.parametrize("name", [
    FILE, "config.json", INDEX, "famjax.json", "famjax.safetensors", "tokenizer.json",
    "tokenizer_config.json", "chat_template.jinja", "generation_config.json",
])  # fmt: skip
def test_links_out_of_the_directory(copy, tmp_path, name, capsys):
  """They are neither read nor copied."""
  tiny.save_tokenizer(copy, "The sky is blue.")
  (tmp_path / "secret").mkdir()
  secret = tmp_path / "secret" / name
  if (copy / name).exists():
    (copy / name).rename(secret)
  else:
    secret.write_text("{}")
  (copy / name).symlink_to(secret)
  assert cli.main(["convert", "--from=hf", f"--src={copy}", f"--dst={tmp_path / 'out'}"]) == 2
  shown = capsys.readouterr().err
  assert f"{name} is a link to {secret}, which is outside of" in shown and shown.count("\n") == 1
  assert not list(tmp_path.rglob(f"out/**/{name}"))


def test_links_of_the_hub_s_cache(copy, tmp_path):
  """A snapshot links to the blobs of its model; and a link may name the directory itself."""
  model = tmp_path / "models--owner--name"
  snapshot, blobs = model / "snapshots" / "0123", model / "blobs"
  snapshot.mkdir(parents=True)
  blobs.mkdir()
  for number, file in enumerate(sorted(copy.iterdir())):
    shutil.copy(file, blobs / str(number))
    (snapshot / file.name).symlink_to(f"../../blobs/{number}")
  (tmp_path / "here").symlink_to(snapshot)
  for directory in (snapshot, tmp_path / "here"):
    assert hf.read(directory)[1] == hf.read(copy)[1]
  (snapshot / "config.json").unlink()
  (snapshot / "config.json").symlink_to(copy / "config.json")
  refused(snapshot, "which is outside of")
  for place in (model, model / "snapshots"):
    with pytest.raises(UserError, match="is a folder of the hub's cache; owner/name is in .*snapshots/0123"):
      famjax.load(str(place))
  shutil.rmtree(snapshot)
  snapshot.mkdir()
  for place in (model, snapshot):
    with pytest.raises(UserError, match="without a snapshot of owner/name: fetch it with: hf download"):
      famjax.load(str(place))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite(tmp_path, dtype, value, capsys):
  tiny.save("llama", tmp_path / "in", dtype=dtype)
  name = "model.layers.1.mlp.up_proj.weight"

  def spoil(tensors):
    tensors[name] = tensors[name].copy()
    tensors[name][3, 4:6] = value
    return tensors

  change(tmp_path / "in", spoil)
  refused(tmp_path / "in", f'2 of 1536 values of "{name}" are NaN or infinite')
  params, _ = hf.read(tmp_path / "in", allow_nonfinite=True)
  assert (~np.isfinite(np.asarray(params["layers"]["feedforward"]["up"]["kernel"], "float32"))).sum() == 2
  convert = ["convert", "--from=hf", f"--src={tmp_path / 'in'}", f"--dst={tmp_path / 'out'}"]
  assert cli.main(convert) == 2 and "--allow_nonfinite" in capsys.readouterr().err
  assert cli.main([*convert, "--allow_nonfinite"]) == 0


def test_a_memory_that_is_not_finite(copy):
  hf_params, config = hf.read(copy)
  (copy / "famjax.json").write_text(json.dumps({"kind": "fam", "block_size": 8, "fam_length": 2}))
  save_file({"fam_prompt": np.full((2, 32), np.nan, np.float32)}, copy / "famjax.safetensors")
  refused(copy, '64 of 64 values of "fam_prompt" are NaN or infinite')


@pytest.mark.parametrize("tied", [True, False])
def test_a_vocabulary_that_grows_to_its_tokenizer(tmp_path, tied, capsys):
  source, run, back = (tmp_path / name for name in ("in", "run", "back"))
  tiny.save_tokenizer(source, "The sky is blue. The sun is yellow.")
  size = len(json.loads((source / "tokenizer.json").read_text())["model"]["vocab"])
  tiny.save("llama", source, vocab_size=size - 3, tie_word_embeddings=tied)
  assert cli.main(["convert", "--from=hf", f"--src={source}", f"--dst={run}", "--resize_vocabulary"]) == 0
  assert f"the vocabulary grew from {size - 3} to {size} ids" in capsys.readouterr().out
  loaded, (params, _) = load_params(run), hf.read(source)
  assert loaded.model.vocab_size == size and hf.read(source)[1].vocab_size == size - 3
  tables = [(loaded.params["embedder"]["embedding"], params["embedder"]["embedding"])]
  if not tied:
    tables.append((loaded.params["head"]["kernel"].T, params["head"]["kernel"].T))
  for new, old in tables:
    np.testing.assert_array_equal(new[:-3], old)
    np.testing.assert_allclose(new[-3:], np.tile(np.asarray(old, "float64").mean(0), (3, 1)), atol=1e-6)
  assert json.loads((run / "tokenizer" / "config.json").read_text())["vocab_size"] == size
  assert famjax.load(str(run)).vocabulary.vocab_size == size
  assert cli.main(["convert", "--to=hf", f"--src={run}", f"--dst={back}"]) == 0
  written = json.loads((back / "config.json").read_text())
  assert written["vocab_size"] == size and written["max_position_embeddings"] == 128
  torch_model = tiny.load(back)
  torch_model.resize_token_embeddings(size)
  np.testing.assert_allclose(ours(back), theirs(torch_model), atol=1e-4)
  same, config = hf.read(back, resize_vocabulary=True)
  assert config.vocab_size == size and np.array_equal(same["embedder"]["embedding"], tables[0][0])


def test_options_of_an_import_belong_to_it(capsys):
  for way, option in (("--to=hf", "--resize_vocabulary"), ("--to=peft", "--allow_nonfinite")):
    assert cli.main(["convert", way, "--src=a", "--dst=b", option]) == 2
    assert f"{option} goes with --from=hf" in capsys.readouterr().err


@pytest.mark.parametrize("files, message", [
    (["adapter_config.json"], "is an adapter of PEFT, .* --from=peft --src=.*model --base=MODEL"),
    (["adapter_config.json", "adapter_model.safetensors"], "is an adapter of PEFT"),
    (["model-Q4_K_M.gguf"], "holds model-Q4_K_M.gguf and no config.json"),
    (["model.safetensors"], "holds model.safetensors and no config.json"),
])  # fmt: skip
def test_directories_of_something_else(files, message, tmp_path, capsys):
  directory = tmp_path / "model"
  directory.mkdir()
  for file in files:
    (directory / file).write_text("{}")
  with pytest.raises(UserError, match=message):
    famjax.load(str(directory))
  assert cli.main(["convert", "--from=hf", f"--src={directory}", f"--dst={tmp_path / 'new'}"]) == 2
  assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("file, message", [
    ("pytorch_model.bin", "famjax reads no .*pytorch_model.bin.*PyTorch's own: .* save_pretrained"),
    ("model.pt", "PyTorch's own"),
    ("weights.gguf", "GGUF of llama.cpp: fetch the original model"),
    ("tf_model.h5", "TensorFlow's"),
    ("flax_model.msgpack", "Flax's"),
    ("training_args.bin", "has no model.safetensors: fetch the weights"),
])  # fmt: skip
def test_weights_of_another_format(copy, file, message):
  (copy / FILE).rename(copy / file)
  refused(copy, message)


def test_paths_that_are_no_directory(copy, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(UserError, match="hf download HuggingFaceTB/SmolLM2-135M --local-dir SmolLM2-135M"):
    famjax.load("HuggingFaceTB/SmolLM2-135M")
  with pytest.raises(UserError, match="is an address, .* hf download owner/name --local-dir name"):
    famjax.load("https://huggingface.co/owner/name/tree/main")
  with pytest.raises(UserError, match="is a file: name the directory"):
    famjax.load(str(copy / FILE))
  (copy / "config.json").unlink()
  (copy / "config.json").symlink_to("gone.json")
  with pytest.raises(UserError, match="config.json is a link to gone.json, which is gone"):
    famjax.load(str(copy))
