"""RoPE of every family, scaled or not, with and without a window: the logits of transformers.

float32 on both sides; 1e-4 in logits, as in test_hf.py. Import and export.
"""

import dataclasses
import json

from flax import nnx
import jax
import numpy as np
import pytest

from famjax.convert import hf
from famjax.convert.families import FAMILIES, from_hf, to_hf
from famjax.errors import UserError
from famjax.model.config import MemoryConfig, ModelConfig
from famjax.model.decoder import Decoder
from tests.convert import tiny

torch = pytest.importorskip("torch", reason="the extra hf brings torch to Python 3.11 alone")
TOKENS = np.random.default_rng(0).integers(3, 97, (1, 40))
THETA = 500.0  # waves of few tokens, so that 40 of them show every difference
KINDS = {
    "default": {"rope_type": "default", "rope_theta": THETA},
    "linear": {"rope_type": "linear", "rope_theta": THETA, "factor": 4.0},
    "llama3": {
        "rope_type": "llama3", "rope_theta": THETA, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
    },
}  # fmt: skip
MIXED = ["full_attention", "sliding_attention", "sliding_attention"]
WINDOWS = {  # families without one have no entry
    "mistral": {"none": dict(sliding_window=None), "all": dict(sliding_window=7)},
    "qwen2": {
        "none": dict(use_sliding_window=False),
        "from the second": dict(use_sliding_window=True, sliding_window=7, max_window_layers=1),
    },
    "qwen3": {
        "none": dict(use_sliding_window=False),
        "mixed": dict(use_sliding_window=True, sliding_window=7, layer_types=MIXED),
    },
    "gemma2": {
        "none": dict(layer_types=["full_attention"] * 3), "alternating": dict(sliding_window=7),
        "mixed": dict(sliding_window=7, layer_types=MIXED),
    },
    "gemma3_text": {
        "none": dict(layer_types=["full_attention"] * 3),
        "mixed": dict(sliding_window=7, layer_types=MIXED),
    },
}  # fmt: skip


def cases():
  """Yields family, changes to its config.json, and a name."""
  for family in FAMILIES:
    for window, changes in WINDOWS.get(family, {"none": {}}).items():
      for kind, entry in KINDS.items():
        if family != "gemma3_text":
          yield pytest.param(family, changes | {"rope_parameters": entry}, id=f"{family}-{kind}-{window}")
          continue
        for local, other in KINDS.items() if window != "none" else [("default", KINDS["default"])]:
          both = dict(full_attention=entry, sliding_attention=other | {"rope_theta": 50.0})
          name = f"{family}-{kind}, local {local}-{window}"
          yield pytest.param(family, changes | {"rope_parameters": both}, id=name)


def ours(directory):
  """famjax's logits, step by step: compiled functions of so many models would take minutes."""
  params, config = hf.read(directory)
  config = dataclasses.replace(config, memory=MemoryConfig("full", 64, memory_segments=0))
  graphdef = nnx.split(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))[0]
  with jax.disable_jit():
    return np.asarray(nnx.merge(graphdef, params)(TOKENS)[0])


def theirs(model):
  with torch.no_grad():
    return model(torch.tensor(TOKENS)).logits.float().numpy()


@pytest.mark.parametrize("family, changes", list(cases()))
def test_import_and_export(family, changes, tmp_path):
  expected = theirs(tiny.save(family, tmp_path / "in", **{"num_hidden_layers": 3, **changes}))
  np.testing.assert_allclose(ours(tmp_path / "in"), expected, atol=1e-4)
  hf.write(tmp_path / "out", *hf.read(tmp_path / "in"))
  np.testing.assert_allclose(theirs(tiny.load(tmp_path / "out")), expected, atol=1e-5)


LLAMA3 = {name: value for name, value in KINDS["llama3"].items() if name != "rope_theta"}
SHORT = {name: value for name, value in LLAMA3.items() if not name.startswith("original")}
WINDOW = dict(sliding_window=7, layer_types=MIXED)


@pytest.mark.parametrize(
    "family, entries",
    [
        # llama3: the top level wins over the entry, and that over max_position_embeddings.
        ("llama", dict(rope_scaling=LLAMA3, original_max_position_embeddings=64)),
        ("llama", dict(rope_scaling=SHORT, original_max_position_embeddings=64)),
        ("llama", dict(rope_scaling=SHORT, max_position_embeddings=48)),
        ("mistral", dict(rope_parameters=KINDS["llama3"], original_max_position_embeddings=64)),
        ("gemma2", dict(rope_scaling=SHORT, original_max_position_embeddings=64, **WINDOW)),
        # Entries by type of layer know no top level.
        (
            "gemma3_text",
            dict(
                rope_parameters=dict(full_attention=SHORT, sliding_attention=SHORT),
                original_max_position_embeddings=64, rope_theta=THETA, **WINDOW,
            ),
        ),
        # rope_scaling takes the place of rope_parameters, with its base.
        ("llama", dict(rope_parameters=KINDS["llama3"], rope_scaling=dict(type="linear", factor=2.0))),
        ("qwen3", dict(rope_parameters=KINDS["linear"], rope_scaling=SHORT, rope_theta=50.0)),
        ("llama", dict(rope_parameters=dict(rope_type="linear", factor=2.0), rope_theta=50.0)),
        ("smollm3", dict(rope_scaling=dict(rope_type="linear", factor=2.0))),
        # In Gemma 3 it is of global layers, and goes on top.
        ("gemma3_text", dict(rope_scaling=dict(rope_type="linear", factor=2.0), **WINDOW)),
        (
            "gemma3_text",
            dict(
                rope_parameters=dict(full_attention=KINDS["llama3"], sliding_attention=None),
                rope_scaling=dict(rope_type="linear", factor=2.0), rope_local_base_freq=50.0, **WINDOW,
            ),
        ),
        ("gemma3_text", dict(rope_parameters=KINDS["linear"], rope_theta=THETA, **WINDOW)),
        # A window that is not there after all, and one that is left out.
        ("qwen2", dict(use_sliding_window=True, sliding_window=None, max_window_layers=1)),
        ("qwen3", dict(use_sliding_window=True, max_window_layers=1)),
        # Layer types that transformers does not read.
        ("llama", dict(sliding_window=7, layer_types=MIXED, sliding_window_pattern=2)),
        ("gemma", dict(sliding_window=7, layer_types=MIXED, sliding_window_pattern=2)),
        ("gemma2", dict(sliding_window=7, sliding_window_pattern=3)),
        ("gemma3_text", dict(sliding_window=7, sliding_window_pattern=3)),
    ],
    ids=str,
)
def test_every_way_that_config_json_says_it(family, entries, tmp_path):
  tiny.save(family, tmp_path, num_hidden_layers=3)
  path = tmp_path / "config.json"
  rope = ("rope_parameters", "rope_scaling", "rope_theta", "layer_types", "sliding_window")
  found = {k: v for k, v in json.loads(path.read_text()).items() if k not in rope}
  path.write_text(json.dumps(found | entries))
  np.testing.assert_allclose(ours(tmp_path), theirs(tiny.load(tmp_path)), atol=1e-4)


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "gemma2"])
def test_entries_by_type_of_layer(family):
  """transformers 5.24 has no such model of these families, and their meaning is plain."""
  entries = dict(full_attention=KINDS["llama3"], sliding_attention=KINDS["linear"])
  more = dict(use_sliding_window=True, num_hidden_layers=3, rope_parameters=entries)
  config = from_hf(tiny.config(family, **WINDOW | more))
  assert (config.rope_factor, config.rope_stretch) == (8.0, (1.0, 4.0, 32))
  assert (config.local_rope_factor, config.local_rope_stretch) == (4.0, None)
  with pytest.raises(UserError, match="no Hugging Face family has all options"):
    to_hf(config)
  alike = dict.fromkeys(entries, KINDS["llama3"])
  one = from_hf(tiny.config(family, **WINDOW | more | {"rope_parameters": KINDS["llama3"]}))
  assert from_hf(tiny.config(family, **WINDOW | more | {"rope_parameters": alike})) == one


@pytest.mark.parametrize("family", ["llama", "mistral", "olmo2", "gemma"])
def test_entries_by_type_of_layer_that_transformers_ignores(family):
  entries = dict(full_attention=KINDS["linear"], sliding_attention=KINDS["linear"])
  with pytest.raises(UserError, match="an entry for each type of layer"):
    from_hf(tiny.config(family, rope_parameters=entries))


@pytest.mark.parametrize("kind", ["yarn", "dynamic", "longrope", "su", "mrope", "proportional"])
@pytest.mark.parametrize("family", FAMILIES)
def test_other_kinds_are_refused(family, kind):
  entry = dict(rope_type=kind, factor=2.0, rope_theta=THETA)
  entries = [{"rope_scaling": entry}, {"rope_parameters": entry}]
  if family == "gemma3_text":
    entries[1] = {"rope_parameters": dict(full_attention=KINDS["linear"], sliding_attention=entry)}
  for changes in entries:
    with pytest.raises(UserError, match=f'RoPE of type "{kind}" is not one that famjax has'):
      from_hf(tiny.config(family, **changes))


def test_a_model_whose_local_layers_are_unscaled_keeps_its_meaning():
  """Checkpoints and gin files from before `local_rope_factor`."""
  config = ModelConfig(num_layers=2, layer_kinds=("local", "global"), local_window=7, rope_factor=4.0)
  local = config.of_kind("local")
  assert (local.rope_factor, local.rope_stretch) == (1.0, None)
  with pytest.raises(UserError, match="no Hugging Face family has all options"):
    to_hf(config)  # Gemma 3's alone, which has other norms
