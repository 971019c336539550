"""Compares tensors that repeat something with what they repeat, before they are left out."""

import dataclasses
import re

import numpy as np

from famjax.convert.families import Json
from famjax.convert.tensors import Tensors
from famjax.errors import UserError
from famjax.model import rope
from famjax.model.config import ModelConfig

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_FREQUENCIES = re.compile(r"model\.(?:layers\.(\d+)\.self_attn\.)?rotary_emb\.inv_freq")
_BIASES = {"attention_bias": "self_attn", "mlp_bias": "mlp"}


def untie(config: ModelConfig, tensors: Tensors) -> ModelConfig:
  """Returns the configuration with the head that a directory really has, as transformers finds it.

  If a tied model comes with a head of other values, transformers keeps both. If it comes with a
  head and without an embedding, the head is both; `tensors` then has it under the embedding's name.
  """
  if not config.tie_embeddings or HEAD not in tensors:
    return config
  if EMBEDDING not in tensors:
    tensors.rename(HEAD, EMBEDDING)
    return config
  tied = tensors.equal(HEAD, EMBEDDING)
  return dataclasses.replace(config, tie_embeddings=tied)


def without_biases(hf: Json, tensors: Tensors) -> Json:
  """Returns a `config.json` without biases that famjax lacks, if all of their values are 0."""
  for switch, module in _BIASES.items():
    pattern = re.compile(rf"model\.layers\.\d+\.{module}\.\w+\.bias")
    names = [name for name in tensors.names if pattern.fullmatch(name)]
    if hf.get(switch) is True and names and all(tensors.zero(name) for name in names):
      hf = {**hf, switch: False}
  return hf


def refuse_unread(unread: set[str], config: ModelConfig, tensors: Tensors) -> None:
  """Raises UserError for a tensor that no part of a model takes and that changes the model.

  Args:
    unread: names of the tensors that were not read.
    config: of the model.
    tensors: of the directory.
  """
  if config.tie_embeddings:
    unread = unread - {HEAD}  # `untie` has compared it
  for name in sorted(unread):
    matched = _FREQUENCIES.fullmatch(name)
    if matched and not _has_rope(tensors.read(name), config, matched[1]):
      raise UserError(
          f"{tensors.path}: {name} has other frequencies than the RoPE of config.json, which"
          " transformers takes: set rope_theta and rope_scaling to what the model was trained with,"
          " and delete that tensor"
      )
    if not matched and not (name.endswith("bias") and tensors.zero(name)):
      raise UserError(f"{tensors.path} has the tensor {name}, which no part of its model takes")


def _has_rope(frequencies: np.ndarray, config: ModelConfig, layer: str | None) -> bool:
  """Returns whether frequencies are those of a layer; None: of any layer.

  transformers 4 scaled positions in place of frequencies, and stored these unscaled. Many files
  hold them in 16 bits.
  """
  kinds = config.kinds()
  if layer is not None and config.layer_kinds and int(layer) < config.num_layers:
    kinds = (config.layer_kinds[int(layer)],)
  for kind in kinds:
    scaled = config.of_kind("global" if kind == "nope" else kind)
    plain = dataclasses.replace(scaled, rope_factor=1.0, rope_stretch=None)
    for expected in (rope.frequencies(scaled), rope.frequencies(plain)):
      if expected.shape == frequencies.shape and np.allclose(
          frequencies.astype(np.float64), expected, rtol=0.01, atol=1e-7
      ):
        return True
  return False
