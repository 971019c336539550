"""LoRA of ours in PEFT, and PEFT's in famjax: the same logits, there and back the same factors.

float32 on both sides; 1e-4 in logits, as in test_hf.py.
"""

import dataclasses
import json
import shutil

from flax import nnx, traverse_util
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from famjax import cli
from famjax.convert import hf
from famjax.convert import peft as ours
from famjax.errors import UserError
from famjax.model.config import MemoryConfig
from famjax.model.decoder import Decoder
from famjax.training.checkpoint import About, load_params, save_params
from famjax.training.train_state import split
from tests.convert import tiny

torch = pytest.importorskip("torch", reason="the extra hf brings torch to Python 3.11 alone")
peft = pytest.importorskip("peft", reason="the extra hf brings peft to Python 3.11 alone")
TOKENS = np.random.default_rng(0).integers(3, 97, (2, 40))
FULL = MemoryConfig("full", 40, memory_segments=0)
FAM = MemoryConfig("fam", 8, memory_segments=1, fam_length=2)
OPTIONS = dict(lora_rank=3, lora_alpha=7.5)
_WEIGHTS, _CONFIG = "adapter_model.safetensors", "adapter_config.json"


def with_lora(plain, memory=FULL, **options):
  """A model with random factors, and with a random FAM of the memory."""
  params, config = plain
  config = dataclasses.replace(config, memory=memory, **{**OPTIONS, **options})
  draw = np.random.default_rng(0)
  flat = traverse_util.flatten_dict(params)
  _, fresh = nnx.eval_shape(lambda: split(Decoder(config, rngs=nnx.Rngs(0))))
  for path, leaf in traverse_util.flatten_dict(fresh).items():
    if path not in flat:
      flat[path] = 0.2 * draw.standard_normal(leaf.shape).astype(np.float32)
  return traverse_util.unflatten_dict(flat), config


def logits(params, config):
  graphdef = nnx.split(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))[0]
  return np.asarray(jax.jit(lambda tokens: nnx.merge(graphdef, params)(tokens)[0])(TOKENS))


def theirs(model):
  with torch.no_grad():
    return model(torch.tensor(TOKENS)).logits.float().numpy()


def same(made, again):
  assert again[1].normalised() == made[1].normalised()
  jax.tree.map(np.testing.assert_array_equal, again[0], made[0])


@pytest.fixture(scope="module", name="places")
def _places(tmp_path_factory):
  """A base with its tokenizer, a run with LoRA and a FAM, its adapter, and another base."""
  directory = tmp_path_factory.mktemp("places")
  tiny.save("llama", directory / "base", vocab_size=320)
  tiny.save_tokenizer(directory / "base", "The sky is blue.")
  params, config = hf.read(directory / "base")
  made = with_lora((params, config), FAM)
  ours.write(directory / "adapter", *made)
  save_params(directory / "run", made[0], About(made[1], "bytes"))
  embedding = {"embedding": params["embedder"]["embedding"] + 1}
  hf.write(directory / "other", params | {"embedder": embedding}, config)
  return directory


@pytest.fixture(scope="module", name="plain")
def _plain(places):
  return hf.read(places / "base")


@pytest.fixture(scope="module", name="made")
def _made(plain):
  return with_lora(plain, FAM)


@pytest.mark.parametrize(
    "kind, options",
    [
        ("qwen2", {}),  # biases beside LoRA
        ("llama", dict(lora_alpha=None, lora_targets=("key|value", "down"))),
    ],
)
def test_peft_computes_what_famjax_does(kind, options, tmp_path):
  model = tiny.save(kind, tmp_path / "base")
  plain = theirs(model)
  base = hf.read(tmp_path / "base")
  made = with_lora(base, **options)
  ours.write(tmp_path / "adapter", *made, "owner/name")
  adapted = peft.PeftModel.from_pretrained(model, tmp_path / "adapter").eval()
  missing = peft.set_peft_model_state_dict(
      adapted, peft.load_peft_weights(tmp_path / "adapter", device="cpu")
  )
  assert not missing.unexpected_keys and not [k for k in missing.missing_keys if "lora" in k]
  found = theirs(adapted)
  np.testing.assert_allclose(found, logits(*made), atol=1e-4)
  assert np.abs(found - plain).max() > 0.1
  settings = adapted.peft_config["default"]
  assert settings.base_model_name_or_path == "owner/name" and settings.r == 3
  same(made, ours.read(tmp_path / "adapter", *base))


def test_an_adapter_that_peft_made(places, plain, tmp_path):
  """In bfloat16, as some are, and scaled by alpha / r ** 0.5."""
  settings = peft.LoraConfig(
      r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM",
      init_lora_weights="gaussian", use_rslora=True, lora_dropout=0.1,
  )  # fmt: skip
  model = peft.get_peft_model(tiny.load(places / "base"), settings)
  for name, weight in model.named_parameters():
    if "lora" in name:
      weight.data = (0.3 * torch.randn_like(weight)).bfloat16().float()
  model.eval().save_pretrained(tmp_path)
  tensors = load_file(tmp_path / _WEIGHTS)
  small = {name: np.asarray(jax.numpy.bfloat16(tensor)) for name, tensor in tensors.items()}
  save_file(small, tmp_path / _WEIGHTS)
  params, config = plain
  params, config = ours.read(tmp_path, params, dataclasses.replace(config, memory=FULL))
  assert config.lora_alpha == 12 and config.lora_targets == ("attention/query", "feedforward/down")
  assert params["layers"]["attention"]["query"]["lora_a"].dtype == "float32"
  np.testing.assert_allclose(logits(params, config), theirs(model), atol=1e-4)


def test_there_and_back_by_the_command(places, made, tmp_path, capsys):
  """A FAM goes along, and the base's tokenizer."""
  base, adapter, back = (str(path) for path in (places / "base", tmp_path / "a", tmp_path / "b"))
  convert = lambda *arguments: cli.main(["convert", f"--base={base}", *arguments])
  assert convert("--to=peft", f"--src={places / 'run'}", f"--dst={adapter}") == 0
  count = sum(tensor.size for tensor in load_file(tmp_path / "a" / _WEIGHTS).values())
  assert capsys.readouterr().out == f"{count:,} parameters of float32 written to {adapter}\n"
  assert hf.read_json(tmp_path / "a" / _CONFIG)["base_model_name_or_path"] == base
  assert convert("--from=peft", f"--src={adapter}", f"--dst={back}") == 0
  loaded = load_params(back)
  assert loaded.vocabulary == str(tmp_path / "b" / "tokenizer")
  assert loaded.model.memory == FAM and "fam_prompt" in loaded.params
  same(made, (loaded.params, loaded.model))


@pytest.mark.parametrize("has_memory", [True, False])
def test_the_adapters_memory_or_else_the_bases(has_memory, places, plain, tmp_path):
  shutil.copytree(places / "adapter", tmp_path, dirs_exist_ok=True)
  prompt, memory = np.ones((3, 32), np.float32), dataclasses.replace(FAM, fam_length=3)
  if not has_memory:
    for name in ("famjax.json", "famjax.safetensors"):
      (tmp_path / name).unlink()
  params, config = plain
  params, config = ours.read(
      tmp_path, params | {"fam_prompt": prompt}, dataclasses.replace(config, memory=memory)
  )
  assert config.memory == (FAM if has_memory else memory)
  assert (params["fam_prompt"] is prompt) == (not has_memory)


def rename(directory, old, new):
  """Changes names of tensors; those that are "gone" are left out."""
  tensors = load_file(directory / _WEIGHTS)
  tensors = {name.replace(old, new): tensor for name, tensor in tensors.items()}
  tensors = {name: tensor for name, tensor in tensors.items() if "gone" not in name}
  save_file(tensors, directory / _WEIGHTS)


@pytest.mark.parametrize(
    "what, message",
    [
        (dict(use_dora=True), "use_dora is true, and famjax supports only plain LoRA: merge it"),
        (dict(bias="all"), 'bias is "all", and famjax supports only plain LoRA: merge it'),
        (dict(modules_to_save=["lm_head"]), r'modules_to_save is \["lm_head"\]'),
        (dict(rank_pattern={"q_proj": 8}), 'rank_pattern is {"q_proj": 8}'),
        (dict(alpha_pattern={"q_proj": 8}), 'alpha_pattern is {"q_proj": 8}'),
        (dict(init_lora_weights="pissa"), 'init_lora_weights is "pissa", which changes the base'),
        (dict(peft_type="IA3"), 'peft_type is "IA3", and famjax supports only LORA'),
        (dict(r=None), "adapter_config.json: r is null: Expected int"),
        (dict(lora_alpha=0), "adapter_config.json: lora_alpha is 0: Expected float > 0"),
        (dict(r=4), r"k_proj.lora_A.weight is \[3, 32\], and rank and base ask for \[4, 32\]"),
        (dict(use_rslora="yes"), 'use_rslora is "yes": Expected bool'),
        (("base_model.model.model.", "model."), "PEFT takes names that begin with base_model.model"),
        (("base_model.model.model.", ""), "PEFT takes names that begin with base_model.model"),
        (("model.layers", "model.model.layers"), "PEFT takes names that begin with base_model.model"),
        (("model.layers", "language_model.layers"), "PEFT takes names that begin with base_model"),
        ((".weight", ""), "famjax supports LoRA on q_proj, .* only"),
        (("mlp.up_proj", "mlp.fc1"), r"has \S+mlp.fc1\S+, and famjax supports LoRA on q_proj, .* only"),
        (("model.layers.2", "gone"), r"lacks \S+layers.2\S+, and famjax supports LoRA only in all layers"),
        (("model.layers.2.mlp.up", "model.layers.3.mlp.up"), "lacks .*layers.2.mlp.up_proj"),
        (("", "gone"), "adapter_model.safetensors holds no tensor: fetch it again"),
        (_CONFIG, "has no adapter_config.json of a PEFT adapter"),
        (_WEIGHTS, "has no adapter_model.safetensors: save the adapter as safetensors first"),
        ("famjax.safetensors", "a memory without its famjax.safetensors: put that back"),
    ],
    ids=str,
)
def test_adapters_that_cannot_be_taken(what, message, places, plain, tmp_path):
  shutil.copytree(places / "adapter", tmp_path, dirs_exist_ok=True)
  if isinstance(what, dict):
    changed = json.loads((tmp_path / _CONFIG).read_text()) | what
    (tmp_path / _CONFIG).write_text(json.dumps(changed))
  elif isinstance(what, tuple):
    rename(tmp_path, *what)
  else:
    (tmp_path / what).unlink()
  with pytest.raises(UserError, match=message) as error:
    ours.read(tmp_path, *plain)
  assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_the_name_of_the_adapter_in_names_of_tensors(places, plain, tmp_path):
  """As torch's state_dict has them; PEFT takes both alike."""
  shutil.copytree(places / "adapter", tmp_path / "in")
  rename(tmp_path / "in", ".weight", ".default.weight")
  same(ours.read(places / "adapter", *plain), ours.read(tmp_path / "in", *plain))
  adapted = [
      theirs(peft.PeftModel.from_pretrained(tiny.load(places / "base"), directory).eval())
      for directory in (places / "adapter", tmp_path / "in")
  ]
  np.testing.assert_array_equal(*adapted)
  tensors = load_file(tmp_path / "in" / _WEIGHTS)
  name = min(tensors)
  save_file(tensors | {name.replace(".default", ""): tensors[name]}, tmp_path / "in" / _WEIGHTS)
  with pytest.raises(UserError, match="twice, with and without .default"):
    ours.read(tmp_path / "in", *plain)


def test_an_adapter_of_a_deeper_model(places, plain):
  params, config = plain
  with pytest.raises(UserError, match=r"has \S+layers.2\S+, and the base has only 2 layers"):
    ours.read(places / "adapter", params, dataclasses.replace(config, num_layers=2))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--from=peft", "--src=adapter"], "--from=peft needs --base, the model that the adapter"),
        (["--from=peft", "--src=adapter", "--base=run"], "the base has LoRA of its own"),
        (["--from=hf", "--src=base", "--base=base"], "it goes with --from=peft or --to=peft"),
        (["--to=peft", "--src=base"], "has no LoRA: export it whole with --to=hf"),
        (["--to=peft", "--src=run", "--base=run"], "run is no Hugging Face directory: make one"),
        (["--to=peft", "--src=run", "--base=./nowhere"], "./nowhere is not there, and no name on"),
        (["--to=peft", "--src=run", "--base=other"], "has another embedder/embedding than other"),
    ],
)
def test_wrong_input_is_one_line_and_nothing_is_written(
    arguments, message, places, monkeypatch, capsys
):
  monkeypatch.chdir(places)
  assert cli.main(["convert", *arguments, "--dst=new"]) == 2
  shown = capsys.readouterr()
  assert message in shown.err and shown.err.count("\n") == 1 and not shown.out
  assert not (places / "new").exists()


def test_what_no_family_has_is_not_exported(made, tmp_path):
  params, config = made
  with pytest.raises(UserError, match="no Hugging Face family has all options of this model"):
    ours.write(tmp_path / "out", params, dataclasses.replace(config, norm="layer"))
  assert not (tmp_path / "out").exists()
