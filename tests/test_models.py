"""Gin files of published models: each is what importing the model gives, of as many parameters.

`PUBLISHED` holds the models' own `config.json` in Hugging Face's words, without what has no part in
the network. No weights are made: a model here is its shapes.
"""

import dataclasses
import pathlib
import re

from flax import nnx
import gin
import pytest

from famjax import configuration
from famjax.convert.families import FAMILIES, from_hf
from famjax.model.config import MemoryConfig, ModelConfig
from famjax.model.decoder import Decoder
from famjax.training import parameters

GIN = pathlib.Path(configuration.__file__).parent.parent / "gin"
RUN = "gin/runs/packed_task.gin"  # brings a small model, whose sizes must all be replaced
BINDINGS = ["RUN_DIR=x", "TASK=passkey", "VOCABULARY=bytes"]
OURS = {"tiny", "small", "flan_1b", "flan_8b", "flan_24b"}  # their vocabulary is the run's


def _hf(kind, size, **more):
  """A `config.json`: a family, (width, layers, heads, key/value heads, feed-forward), the rest."""
  names = (
      "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
      "intermediate_size",
  )  # fmt: skip
  return {"model_type": kind} | dict(zip(names, size, strict=True)) | more


def _llama2(*size):
  return _hf(
      "llama", size, vocab_size=32000, hidden_act="silu", rms_norm_eps=1e-5, rope_scaling=None,
      tie_word_embeddings=False,
  )  # fmt: skip


def _llama3(*size, factor=None, tied=False):
  scaling = factor and {
      "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_type": "llama3",
      "original_max_position_embeddings": 8192,
  }  # fmt: skip
  return _hf(
      "llama", size, vocab_size=128256, hidden_act="silu", rms_norm_eps=1e-5, rope_theta=500000.0,
      rope_scaling=scaling, tie_word_embeddings=tied, attention_bias=False, mlp_bias=False,
  )  # fmt: skip


def _smollm2(*size, theta=100000):
  return _hf(
      "llama", size, vocab_size=49152, hidden_act="silu", rms_norm_eps=1e-5, rope_theta=theta,
      rope_scaling=None, tie_word_embeddings=True, attention_bias=False, mlp_bias=False,
  )  # fmt: skip


def _mistral(vocab, theta, window):
  return _hf(
      "mistral", (4096, 32, 32, 8, 14336), vocab_size=vocab, hidden_act="silu", rms_norm_eps=1e-5,
      rope_theta=theta, sliding_window=window, tie_word_embeddings=False,
  )  # fmt: skip


def _qwen2_5(*size, tied=True, vocab=151936):
  return _hf(
      "qwen2", size, vocab_size=vocab, hidden_act="silu", rms_norm_eps=1e-6, rope_theta=1000000.0,
      tie_word_embeddings=tied, use_sliding_window=False, sliding_window=32768,
      max_window_layers=size[1],
  )  # fmt: skip


def _qwen3(*size, tied=True):
  return _hf(
      "qwen3", size, vocab_size=151936, hidden_act="silu", rms_norm_eps=1e-6, rope_theta=1000000,
      tie_word_embeddings=tied, head_dim=128, attention_bias=False, rope_scaling=None,
      use_sliding_window=False, sliding_window=None, max_window_layers=size[1],
  )  # fmt: skip


def _gemma(*size):
  return _hf(
      "gemma", size, vocab_size=256000, hidden_act="gelu", head_dim=256, rms_norm_eps=1e-6,
      rope_theta=10000.0, attention_bias=False,
  )  # fmt: skip


def _gemma2(*size):
  return _hf(
      "gemma2", size, vocab_size=256000, hidden_activation="gelu_pytorch_tanh", head_dim=256,
      rms_norm_eps=1e-6, rope_theta=10000.0, attention_bias=False, query_pre_attn_scalar=256,
      sliding_window=4096, attn_logit_softcapping=50.0, final_logit_softcapping=30.0,
  )  # fmt: skip


def _gemma3(*size, window, vocab=262144, scaling=None):
  return _hf(
      "gemma3_text", size, vocab_size=vocab, hidden_activation="gelu_pytorch_tanh", head_dim=256,
      rms_norm_eps=1e-6, rope_theta=1000000, rope_local_base_freq=10000, rope_scaling=scaling,
      attention_bias=False, query_pre_attn_scalar=256, sliding_window=window,
      sliding_window_pattern=6, attn_logit_softcapping=None, final_logit_softcapping=None,
  )  # fmt: skip


def _olmo2(*size):
  return _hf(
      "olmo2", size, vocab_size=100352, hidden_act="silu", rms_norm_eps=1e-6, rope_theta=500000,
      rope_scaling=None, tie_word_embeddings=False, attention_bias=False,
  )  # fmt: skip


PUBLISHED = {
    "llama2_7b": _llama2(4096, 32, 32, 32, 11008),
    "llama2_13b": _llama2(5120, 40, 40, 40, 13824),
    "llama3_8b": _llama3(4096, 32, 32, 8, 14336),
    "llama3_1_8b": _llama3(4096, 32, 32, 8, 14336, factor=8.0),
    "llama3_2_1b": _llama3(2048, 16, 32, 8, 8192, factor=32.0, tied=True),
    "llama3_2_3b": _llama3(3072, 28, 24, 8, 8192, factor=32.0, tied=True),
    "smollm2_135m": _smollm2(576, 30, 9, 3, 1536),
    "smollm2_360m": _smollm2(960, 32, 15, 5, 2560),
    "smollm2_1_7b": _smollm2(2048, 24, 32, 32, 8192, theta=130000),
    "smollm3_3b": _hf(
        "smollm3", (2048, 36, 16, 4, 11008), vocab_size=128256, hidden_act="silu",
        rms_norm_eps=1e-6, rope_theta=5000000.0, rope_scaling=None, tie_word_embeddings=True,
        no_rope_layer_interval=4, no_rope_layers=[1, 1, 1, 0] * 9, use_sliding_window=False,
    ),
    "mistral_7b_v0_1": _mistral(32000, 10000.0, 4096),
    "mistral_7b_v0_3": _mistral(32768, 1000000.0, None),
    "qwen2_5_0_5b": _qwen2_5(896, 24, 14, 2, 4864),
    "qwen2_5_1_5b": _qwen2_5(1536, 28, 12, 2, 8960),
    "qwen2_5_3b": _qwen2_5(2048, 36, 16, 2, 11008),
    "qwen2_5_7b": _qwen2_5(3584, 28, 28, 4, 18944, tied=False, vocab=152064),
    "qwen3_0_6b": _qwen3(1024, 28, 16, 8, 3072),
    "qwen3_1_7b": _qwen3(2048, 28, 16, 8, 6144),
    "qwen3_4b": _qwen3(2560, 36, 32, 8, 9728),
    "qwen3_8b": _qwen3(4096, 36, 32, 8, 12288, tied=False),
    "gemma_2b": _gemma(2048, 18, 8, 1, 16384),
    "gemma_7b": _gemma(3072, 28, 16, 16, 24576),
    "gemma2_2b": _gemma2(2304, 26, 8, 4, 9216),
    "gemma2_9b": _gemma2(3584, 42, 16, 8, 14336),
    "gemma3_270m": _gemma3(640, 18, 4, 1, 2048, window=512),
    "gemma3_1b": _gemma3(1152, 26, 4, 1, 6912, window=512),
    "gemma3_4b": _gemma3(  # `text_config` of a model that reads pictures too
        2560, 34, 8, 4, 10240, window=1024, vocab=262208,
        scaling={"factor": 8.0, "rope_type": "linear"},
    ),
    "olmo2_1b": _olmo2(2048, 16, 16, 16, 8192),
    "olmo2_7b": _olmo2(4096, 32, 32, 32, 11008),
    "olmo2_13b": _olmo2(5120, 40, 40, 40, 13824),
}  # fmt: skip


def _from_gin(name: str) -> ModelConfig:
  """The model of a run on which `gin/models/{name}.gin` is stacked."""
  configuration.configure([RUN, f"gin/models/{name}.gin"], BINDINGS)
  config = gin.get_configurable("ModelConfig")()
  config.validate()
  return config


def _number_of_parameters(config: ModelConfig) -> int:
  """Of the model without a memory, which are those of the published one."""
  config = dataclasses.replace(config, memory=MemoryConfig(kind="bswa"))
  shapes = nnx.eval_shape(lambda: nnx.state(Decoder(config, rngs=nnx.Rngs(0)), nnx.Param))
  return parameters.count(nnx.to_pure_dict(shapes))


def test_every_gin_file_of_a_model_is_here():
  assert {path.stem for path in (GIN / "models").glob("*.gin")} == OURS | set(PUBLISHED)
  assert {hf["model_type"] for hf in PUBLISHED.values()} == set(FAMILIES)


def test_every_gin_file_of_a_family_is_included():
  texts = "".join(path.read_text() for path in (GIN / "models").glob("*.gin"))
  included = set(re.findall(r'^include "gin/families/(\w+).gin"$', texts, re.M))
  assert included == {path.stem for path in (GIN / "families").glob("*.gin")}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_gin_file_is_the_published_model(name):
  config = _from_gin(name)
  of_the_run = dict(compute_dtype="bfloat16", param_dtype="bfloat16", remat="full")
  imported = dataclasses.replace(from_hf(PUBLISHED[name]), memory=config.memory, **of_the_run)
  assert config.normalised() == imported


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_first_line_has_the_number_of_parameters(name):
  first = (GIN / f"models/{name}.gin").read_text().splitlines()[0]
  said = re.match(r"# .+: ([\d,]+) parameters\.", first)
  assert said and said[1] == f"{_number_of_parameters(_from_gin(name)):,}"
