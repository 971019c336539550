"""Families: `config.json` in transformers' words and ours, and what famjax has no words for."""

import dataclasses
import json

import pytest

from famjax.convert.families import FAMILIES, carried, from_hf, to_hf
from famjax.errors import UserError
from famjax.model.config import ModelConfig
from tests.convert import tiny

LLAMA = {
    "model_type": "llama", "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192,
    "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
    "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "hidden_act": "silu",
}  # fmt: skip
GELU = {"hidden_act": "gelu_pytorch_tanh"}
SCALING = {
    "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_type": "llama3",
    "original_max_position_embeddings": 8192,
}  # fmt: skip


@pytest.mark.parametrize("kind", FAMILIES)
def test_there_and_back(kind):
  config = from_hf(tiny.config(kind))
  hf = to_hf(config)
  assert hf["model_type"] == kind and hf["architectures"] == [FAMILIES[kind].architecture]
  assert from_hf(json.loads(json.dumps(hf))) == config


def test_llama_3_2_as_it_is_published():
  """1B, as transformers 4 wrote it, and as 5 does."""
  config = from_hf(LLAMA | {"rope_theta": 500000.0, "rope_scaling": SCALING})
  assert config == ModelConfig(
      vocab_size=128256, num_layers=16, model_dim=2048, num_heads=32, num_kv_heads=8, ff_dim=8192,
      norm_eps=1e-5, rope_theta=5e5, rope_factor=32.0, rope_stretch=(1.0, 4.0, 8192),
  )  # fmt: skip
  assert config == from_hf(LLAMA | {"rope_parameters": SCALING | {"rope_theta": 500000.0}})


def test_what_config_json_leaves_out():
  """Usual values of a family that a short config.json does not name."""
  small = {"vocab_size": 32, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 8}
  small |= {"num_hidden_layers": 12, "num_key_value_heads": 1}
  gemma3 = from_hf(small | {"model_type": "gemma3_text", "sliding_window": 512})
  assert gemma3.layer_kinds == (("local",) * 5 + ("global",)) * 2 and gemma3.local_window == 512
  assert (gemma3.rope_theta, gemma3.local_rope_theta) == (1e6, 1e4) and gemma3.tie_embeddings
  gemma2 = from_hf(small | {"model_type": "gemma2"})
  assert gemma2.layer_kinds == ("local", "global") * 6 and gemma2.local_window == 4096
  assert (gemma2.attention_cap, gemma2.logit_cap, gemma2.attention_scale) == (50.0, 30.0, 1 / 16)
  smollm3 = from_hf(small | {"model_type": "smollm3"})
  assert smollm3.layer_kinds == ("global", "global", "global", "nope") * 3
  assert from_hf(small | {"model_type": "mistral"}).layer_kinds == ("local",) * 12
  assert from_hf(small | {"model_type": "mistral", "sliding_window": None}).layer_kinds is None
  qwen = small | {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 9}
  assert from_hf(qwen | {"sliding_window": 8}).layer_kinds == ("global",) * 9 + ("local",) * 3
  assert from_hf(qwen | {"use_sliding_window": False}).layer_kinds is None
  gelu = small | {"model_type": "gemma", "hidden_act": "gelu"}  # as Gemma 1 was published
  assert from_hf(gelu).activation == "gelu"


@pytest.mark.parametrize("kind", ["llama", "olmo2", "qwen2", "qwen3", "smollm3"])
def test_values_that_a_family_does_not_read(kind):
  """Published files hold them, and transformers takes them too."""
  plain = LLAMA | {"model_type": kind}
  odd = {"sliding_window": -1, "max_window_layers": -1, "sliding_window_pattern": 0}
  assert from_hf(plain | odd) == from_hf(plain)
  assert from_hf(plain | odd | {"sliding_window": 0}) == from_hf(plain)


def test_a_model_of_ours_becomes_the_plainest_family_that_it_fits():
  config = ModelConfig(vocab_size=32, model_dim=16, num_heads=2, num_kv_heads=1)
  assert to_hf(config)["model_type"] == "llama"
  local = dataclasses.replace(config, layer_kinds=("local",) * 4, local_window=7)
  assert to_hf(local)["model_type"] == "mistral"
  with pytest.raises(UserError, match="no Hugging Face family has all options of this model"):
    to_hf(dataclasses.replace(config, norm="layer"))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model_type": "t5", "is_encoder_decoder": True}, '"t5" is an encoder-decoder.*llama'),
        ({"model_type": "gpt2"}, 'of type "gpt2" cannot be converted; there is llama'),
        ({"attention_bias": True}, "llama: attention_bias is True, and famjax supports only False"),
        ({"hidden_act": "relu"}, 'llama: the activation "relu" is not one that famjax has for it'),
        ({"rope_scaling": {"type": "yarn", "factor": 4}}, 'RoPE of type "yarn" is not one'),
        ({"model_type": "qwen3", "use_sliding_window": True, "layer_types": ["chunked"]}, '"chunked"'),
        ({"model_type": "smollm3", "use_sliding_window": True}, "use_sliding_window is set"),
        ({"rope_scaling": "linear"}, 'rope_scaling is "linear": Expected object'),
        ({"num_hidden_layers": None}, "llama: config.json lacks num_hidden_layers"),
        ({"quantization_config": {"bits": 4}}, "llama: the weights are quantized"),
        ({"partial_rotary_factor": 0.5}, "llama: partial_rotary_factor is 0.5"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8}}, "lacks low_freq_factor"),
        ({"model_type": "gemma2", "sliding_window": None} | GELU, "sliding_window is null"),
        ({"model_type": "mistral", "sliding_window": 0}, "mistral: sliding_window is 0, and it must"),
        ({"model_type": "gemma3_text", "sliding_window_pattern": 0} | GELU, "pattern is 0, and it"),
        ({"rope_theta": None}, "llama: the base of its RoPE is null in config.json"),
        ({"model_type": "gemma3_text", "rope_local_base_freq": None} | GELU, "RoPE is null"),
        ({"max_position_embeddings": 1e6}, "max_position_embeddings is 1000000.0: Expected int"),
    ],
)
def test_what_cannot_be_converted(changes, message):
  with pytest.raises(UserError, match=message):
    from_hf(LLAMA | changes)


def test_llama_scaling_without_the_context_it_was_trained_on():
  short = {name: value for name, value in SCALING.items() if "original" not in name}
  config = from_hf(LLAMA | {"rope_scaling": short, "max_position_embeddings": 4096})
  assert config.rope_stretch == (1.0, 4.0, 4096)


@pytest.mark.parametrize("kind", FAMILIES)
def test_transformers_4_finds_rope_where_it_looks(kind):
  """It knows `rope_theta`, `rope_scaling` and `rope_local_base_freq` alone."""
  config = from_hf(tiny.config(kind))
  old = {name: value for name, value in to_hf(config).items() if name != "rope_parameters"}
  assert from_hf(old) == config


def test_an_export_keeps_other_entries_of_the_same_network_alone():
  extra = {"max_position_embeddings": 999, "eos_token_id": [2, 7], "use_cache": False}
  like = LLAMA | extra | {"rope_scaling": SCALING}
  kept = carried(like, from_hf(like))
  assert extra.items() <= kept.items() and "rope_scaling" not in kept
  assert carried(like, dataclasses.replace(from_hf(like), num_layers=3)) == {"eos_token_id": [2, 7]}
  assert carried({"model_type": "gpt2", "bos_token_id": 4}, from_hf(LLAMA)) == {"bos_token_id": 4}
