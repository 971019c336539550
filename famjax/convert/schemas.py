"""Schemas of the JSON files in a model's directory; see `famjax.formats`.

A key that a file leaves out is `UNSET`, because null often means something else.
"""

from typing import Annotated, Any

import msgspec
from msgspec import UNSET, UnsetType

from famjax import formats

Width = Annotated[int, msgspec.Meta(ge=1, le=2**24)]
Natural = Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]

# The keys of a schema may be left out or null.
_Text = str | None | UnsetType
_Flag = bool | None | UnsetType
_Width = Width | None | UnsetType
_Count = formats.Count | None | UnsetType
_Whole = Annotated[int, msgspec.Meta(ge=-(2**31), le=2**31 - 1)] | None | UnsetType
_Positive = formats.Positive | None | UnsetType
_Object = dict[str, Any] | None | UnsetType


class ModelFile(msgspec.Struct):
  """`config.json` of a decoder, as transformers 4 or 5 writes it."""

  model_type: str
  vocab_size: _Count = UNSET
  hidden_size: _Width = UNSET
  intermediate_size: _Width = UNSET
  num_hidden_layers: formats.Layers | None | UnsetType = UNSET
  num_attention_heads: _Width = UNSET
  num_key_value_heads: _Width = UNSET
  head_dim: _Width = UNSET
  rms_norm_eps: _Positive = UNSET
  tie_word_embeddings: _Flag = UNSET
  hidden_act: _Text = UNSET
  hidden_activation: _Text = UNSET
  query_pre_attn_scalar: _Positive = UNSET
  attn_logit_softcapping: _Positive = UNSET
  final_logit_softcapping: _Positive = UNSET
  sliding_window: _Whole = UNSET  # -1 or 0 where no layer is local
  use_sliding_window: _Flag = UNSET
  sliding_window_pattern: _Whole = UNSET
  max_window_layers: _Whole = UNSET
  layer_types: list[str] | None | UnsetType = UNSET
  no_rope_layers: list[Natural] | None | UnsetType = UNSET
  no_rope_layer_interval: _Count = UNSET
  max_position_embeddings: _Count = UNSET
  original_max_position_embeddings: _Count = UNSET
  rope_theta: _Positive = UNSET
  rope_local_base_freq: _Positive = UNSET
  rope_scaling: _Object = UNSET
  rope_parameters: _Object = UNSET
  partial_rotary_factor: _Positive = UNSET
  attention_bias: _Flag = UNSET
  mlp_bias: _Flag = UNSET
  use_bidirectional_attention: _Flag = UNSET
  quantization_config: Any = UNSET


class Rope(msgspec.Struct):
  """RoPE of all layers, or of one type of layer, in `config.json`."""

  rope_type: _Text = UNSET
  type: _Text = UNSET
  rope_theta: _Positive = UNSET
  factor: _Positive = UNSET
  low_freq_factor: _Positive = UNSET
  high_freq_factor: _Positive = UNSET
  original_max_position_embeddings: _Count = UNSET
  partial_rotary_factor: _Positive = UNSET


class Index(msgspec.Struct):
  """`model.safetensors.index.json`: the file that holds each tensor."""

  weight_map: dict[str, str]


class Adapter(msgspec.Struct):
  """`adapter_config.json` of PEFT's LoRA, with PEFT's defaults."""

  peft_type: str | None = None
  r: Width = 8
  lora_alpha: formats.Positive = 8.0
  use_rslora: bool | None = False
  init_lora_weights: bool | str | None = True


_Option = bool | int | float | str | None
_Options = dict[str, _Option | list[_Option]]


class Memory(msgspec.Struct):
  """`famjax.json`; `MemoryConfig.validate` checks the rest."""

  kind: str | UnsetType = UNSET
  block_size: Width | UnsetType = UNSET
  memory_segments: Annotated[int, msgspec.Meta(ge=0, le=2**20)] | UnsetType = UNSET
  fam_length: Annotated[int, msgspec.Meta(ge=0, le=2**24)] | UnsetType = UNSET
  fam_init: str | UnsetType = UNSET
  fam_position: str | UnsetType = UNSET
  stop_gradient: bool | UnsetType = UNSET
  window: formats.Count | None | UnsetType = UNSET
  options: _Options | list[tuple[str, _Option | list[_Option]]] | UnsetType = UNSET


def checked(found: Any, schema: type[msgspec.Struct], where: str) -> dict[str, Any]:
  """Returns the keys of a schema that a JSON object has, with values of the right types.

  Args:
    found: value as `json.loads` returns it.
    schema: one of the structs above.
    where: name of the file, for the error message.

  Raises:
    UserError: A value is not what the schema allows.
  """
  return msgspec.to_builtins(formats.check(found, schema, where))
