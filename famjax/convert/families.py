"""Families of open decoders: their `config.json` in Hugging Face's words, and ours.

One entry per family says what all of its models have in common (`fixed`), what its `config.json`
calls by names of its own (`names`), and what it leaves out when it has its usual value (`usual`).
Everything else is common to all, `_COMMON` and `_rope`. There are no per-family models:
`famjax.model` has options, and a family is a choice of them.
"""

from collections.abc import Mapping
import contextlib
import dataclasses
from typing import Any, NamedTuple

from famjax.convert import schemas
from famjax.errors import UserError
from famjax.formats import shown
from famjax.model.config import ModelConfig

Json = dict[str, Any]

# What config.json calls it, and what ModelConfig does.
_COMMON = {
    "vocab_size": "vocab_size",
    "hidden_size": "model_dim",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "head_dim": "head_dim",
    "intermediate_size": "ff_dim",
    "rms_norm_eps": "norm_eps",
    "tie_word_embeddings": "tie_embeddings",
}
_REQUIRED = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"
)  # fmt: skip
_ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu", "gelu_new": "gelu"}
_GEMMA = dict(norm="rms_plus_one", activation="gelu", scale_embeddings=True)
_GEMMA_2 = _GEMMA | dict(norm_place="both")
_CAPS = {"attn_logit_softcapping": "attention_cap", "final_logit_softcapping": "logit_cap"}
_TRAINED_CONTEXT = "original_max_position_embeddings"
_ROPE = (
    "rope_parameters", "rope_scaling", "rope_theta", "rope_local_base_freq",
    "partial_rotary_factor", _TRAINED_CONTEXT,
)  # fmt: skip
# Types of layers in transformers, and kinds in ModelConfig.
_LAYER_TYPES = {"full_attention": "global", "sliding_attention": "local"}
SYMBOLS = ("bos_token_id", "eos_token_id", "pad_token_id")
# Switches that famjax has nothing for: each is refused unless it has this value.
_NEEDED = {
    "partial_rotary_factor": 1.0, "attention_bias": False, "mlp_bias": False,
    "use_bidirectional_attention": False,
}  # fmt: skip


class Family(NamedTuple):
  """One family.

  Attributes:
    architecture: class of its language model in transformers.
    fixed: options of `ModelConfig` that all of its models have.
    usual: what `config.json` may leave out, by its names.
    names: more names, beside the common ones.
    every: without `layer_types`, each `every`-th layer is global and the others local; 0: all are
      global.
    typed: transformers reads `layer_types` of this family.
  """

  architecture: str
  fixed: Mapping[str, Any] = {}
  usual: Mapping[str, Any] = {}
  names: Mapping[str, str] = {}
  every: int = 0
  typed: bool = True


FAMILIES = {  # by `model_type`; the plainest first, which is what an export prefers
    "llama": Family("LlamaForCausalLM", typed=False),  # SmolLM2 too
    "mistral": Family(
        "MistralForCausalLM", usual={"sliding_window": 4096, "num_key_value_heads": 8}, typed=False
    ),
    "smollm3": Family(
        "SmolLM3ForCausalLM",
        usual={"tie_word_embeddings": True, "rope_theta": 2e6, "num_key_value_heads": 4},
    ),
    "qwen2": Family("Qwen2ForCausalLM", {"qkv_bias": True}, {"num_key_value_heads": 32}),
    "qwen3": Family(
        "Qwen3ForCausalLM", {"qk_norm": "head"}, {"head_dim": 128, "num_key_value_heads": 32}
    ),
    "olmo2": Family(
        "Olmo2ForCausalLM", {"norm_place": "after", "qk_norm": "width"}, {"rms_norm_eps": 1e-5},
        typed=False,
    ),
    "gemma": Family(
        "GemmaForCausalLM", _GEMMA,
        {"tie_word_embeddings": True, "head_dim": 256, "num_key_value_heads": 16}, typed=False,
    ),
    "gemma2": Family(
        "Gemma2ForCausalLM", _GEMMA_2,
        {
            "tie_word_embeddings": True, "head_dim": 256, "query_pre_attn_scalar": 256,
            "num_key_value_heads": 4, "sliding_window": 4096, "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
        _CAPS, every=2,
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM", _GEMMA_2 | {"qk_norm": "head"},
        {
            "tie_word_embeddings": True, "head_dim": 256, "query_pre_attn_scalar": 256,
            "num_key_value_heads": 4, "sliding_window": 4096, "rope_theta": 1e6,
            "rope_local_base_freq": 1e4,
        },
        _CAPS, every=6,
    ),
}  # fmt: skip


def from_hf(hf: Json) -> ModelConfig:
  """Returns the configuration of a Hugging Face model, without a memory.

  Args:
    hf: its `config.json`, as transformers 4 or 5 writes it.

  Raises:
    UserError: The model is of no family in `FAMILIES`, a value is not allowed, or famjax lacks an
      option of the model.
  """
  kind = hf.get("model_type")
  if hf.get("is_encoder_decoder"):
    raise UserError(
        f"a model of type {shown(kind)} is an encoder-decoder, and famjax supports decoders: {known()}"
    )
  if not isinstance(kind, str) or kind not in FAMILIES:
    raise UserError(f"a model of type {shown(kind)} cannot be converted; {known()}")
  family = FAMILIES[kind]
  hf = {**family.usual, **schemas.checked(hf, schemas.ModelFile, kind)}
  _refuse_what_is_missing(kind, hf)
  options = {ours: hf[theirs] for theirs, ours in _COMMON.items() if hf.get(theirs) is not None}
  options |= {ours: hf[theirs] for theirs, ours in family.names.items() if theirs in hf}
  if hf.get("tie_word_embeddings") is None:
    options["tie_embeddings"] = family.usual.get("tie_word_embeddings", False)
  options |= family.fixed
  activation = hf.get("hidden_activation") or hf.get("hidden_act")
  # Gemma 1 was published with "gelu", and transformers runs it with the tanh form.
  if activation is not None and (kind, activation) != ("gemma", "gelu"):
    if _ACTIVATIONS.get(activation) != options.get("activation", "silu"):
      raise UserError(
          f"{kind}: the activation {shown(activation)} is not one that famjax has for it"
      )
  if hf.get("query_pre_attn_scalar") is not None:
    options["query_scale"] = hf["query_pre_attn_scalar"] ** -0.5
  layers = _layers(kind, family, hf)
  options |= layers | _rope(kind, family, hf)
  config = ModelConfig(**options)
  config.validate()
  return config.normalised()


def _refuse_what_is_missing(kind: str, hf: Json) -> None:
  """Raises UserError for a key that must be there, or a switch that famjax does not have."""
  if hf.get("quantization_config"):
    raise UserError(f"{kind}: the weights are quantized; fetch the model in bfloat16 or float32")
  missing = [name for name in _REQUIRED if hf.get(name) is None]
  if missing:
    raise UserError(f"{kind}: config.json lacks {missing[0]}")
  for name, value in _NEEDED.items():
    if hf.get(name) not in (value, None):
      raise UserError(f"{kind}: {name} is {hf[name]}, and famjax supports only {value}")


def to_hf(config: ModelConfig) -> Json:
  """The `config.json` of a model, of the plainest family that has all it needs.

  Raises:
    UserError: no family has.
  """
  wanted = _network(config)
  for kind in FAMILIES:
    hf = _as_family(kind, config)
    with contextlib.suppress(UserError):  # a family without some option
      if from_hf(hf) == wanted:
        return hf
  raise UserError(f"no Hugging Face family has all options of this model; {known()}")


def _network(config: ModelConfig) -> ModelConfig:
  """The configuration without what `config.json` has no words for."""
  return dataclasses.replace(
      config.normalised(), memory=ModelConfig().memory, remat="none", compute_dtype="float32",
      param_dtype="float32",
  )  # fmt: skip


def _as_family(kind: str, config: ModelConfig) -> Json:
  """The `config.json` that this family would have; what it has no words for is left out."""
  family = FAMILIES[kind]
  hf = {"architectures": [family.architecture], "model_type": kind}
  hf |= {theirs: getattr(config, ours) for theirs, ours in {**_COMMON, **family.names}.items()}
  hf |= {"num_key_value_heads": config.kv_heads, "head_dim": config.head_width}
  hf |= {"intermediate_size": config.hidden_width}
  gelu = config.activation == "gelu"
  hf["hidden_activation" if gelu else "hidden_act"] = "gelu_pytorch_tanh" if gelu else "silu"
  if gelu and kind == "gemma":
    hf["hidden_act"] = hf["hidden_activation"]
  if "query_pre_attn_scalar" in family.usual:
    hf["query_pre_attn_scalar"] = round(config.attention_scale**-2)
  kinds = config.layer_kinds or ("global",) * config.num_layers
  if kind == "smollm3":
    hf["no_rope_layers"] = [int(kind != "nope") for kind in kinds]
    hf["use_sliding_window"] = False
  elif kind in ("qwen2", "qwen3"):
    hf["use_sliding_window"] = "local" in kinds
  # Without local layers transformers makes a mask of Gemma's window all the same: not of null.
  if "local" in kinds or kind == "mistral":
    hf["sliding_window"] = config.local_window
  if kind not in ("llama", "mistral", "olmo2", "gemma"):
    names = {"global": "full_attention", "local": "sliding_attention", "nope": "full_attention"}
    hf["layer_types"] = [names[kind] for kind in kinds]
  rope = _rope_entry(config.rope_theta, config.rope_factor, config.rope_stretch)
  # transformers 4 knows these names alone; 5 takes the first two instead of rope_parameters.
  hf["rope_theta"] = config.rope_theta
  if rope["rope_type"] != "default":
    hf["rope_scaling"] = {name: value for name, value in rope.items() if name != "rope_theta"}
  if kind == "gemma3_text":
    theta = config.local_rope_theta or config.rope_theta
    hf["rope_local_base_freq"] = theta
    local = _rope_entry(theta, config.local_rope_factor, config.local_rope_stretch)
    rope = {"full_attention": rope, "sliding_attention": local}
  hf["rope_parameters"] = rope
  return hf


def _rope_entry(
    theta: float, factor: float, stretch: tuple[float, float, float] | None
) -> Json:
  """Returns RoPE as `rope_parameters` of transformers 5 has it."""
  rope = {"rope_type": "default", "rope_theta": theta}
  if stretch is not None:
    low, high, context = stretch
    return rope | {
        "rope_type": "llama3", "factor": factor, "low_freq_factor": low,
        "high_freq_factor": high, _TRAINED_CONTEXT: int(context),
    }  # fmt: skip
  return rope | ({"rope_type": "linear", "factor": factor} if factor != 1 else {})


def carried(like: Json, config: ModelConfig) -> Json:
  """Returns the entries of another `config.json` that an export keeps.

  Args:
    like: the file that came with the tokenizer.
    config: of the model that is exported.

  Returns:
    All entries but RoPE's, which has names of several versions, if the file is of the same network.
    Its vocabulary may have been resized, and its head untied. Else only the ids of symbols.
  """
  may_differ = dict(vocab_size=config.vocab_size, tie_embeddings=config.tie_embeddings)
  with contextlib.suppress(UserError):
    if dataclasses.replace(from_hf(like), **may_differ) == _network(config):
      return {name: value for name, value in like.items() if name not in _ROPE}
  return {name: like[name] for name in SYMBOLS if name in like}


def _layers(kind: str, family: Family, hf: Json) -> Json:
  """Returns `layer_kinds` and `local_window`; {}: all layers are global."""
  count, window = hf["num_hidden_layers"], hf.get("sliding_window")
  first_local = hf.get("max_window_layers")
  first_local = 28 if first_local is None else first_local
  if kind == "smollm3":
    every = hf.get("no_rope_layer_interval") or 4
    has_rope = hf.get("no_rope_layers") or [(layer + 1) % every for layer in range(count)]
    kinds = ["global" if has else "nope" for has in has_rope]
    if hf.get("use_sliding_window") or "sliding_attention" in (hf.get("layer_types") or ()):
      raise UserError("smollm3: use_sliding_window is set, and famjax supports SmolLM3 only without it")
  elif kind == "mistral":
    kinds = ["global" if window is None else "local"] * count
  elif kind in ("qwen2", "qwen3") and not hf.get("use_sliding_window"):
    kinds = ["global"] * count
  elif family.typed and hf.get("layer_types"):
    unknown = set(hf["layer_types"]) - set(_LAYER_TYPES)
    if unknown:
      raise UserError(
          f"{kind}: a layer of type {shown(sorted(unknown)[0])} is not one that famjax has"
      )
    kinds = [_LAYER_TYPES[name] for name in hf["layer_types"]]
  elif kind in ("qwen2", "qwen3"):
    window = hf.get("sliding_window", 4096)  # null: no window after all
    first_local = count if window is None else first_local
    kinds = ["local" if layer >= first_local else "global" for layer in range(count)]
  else:
    every = hf.get("sliding_window_pattern") if kind == "gemma3_text" else None
    every = family.every if every is None else every
    if family.every and every < 1:
      raise UserError(f"{kind}: sliding_window_pattern is {every}, and it must be at least 1")
    kinds = ["local" if every and (layer + 1) % every else "global" for layer in range(count)]
  if len(kinds) != count:
    raise UserError(
        f"{kind}: config.json names the types of {len(kinds)} layers, and num_hidden_layers is"
        f" {count}"
    )
  if set(kinds) == {"global"}:
    return {}
  if "local" in kinds and (window is None or window < 1):
    raise UserError(
        f"{kind}: sliding_window is {shown(window)}, and it must be the number of tokens that a"
        " local layer sees"
    )
  local = {"local_window": window} if "local" in kinds else {}
  return {"layer_kinds": tuple(kinds), **local}


def _rope(kind: str, family: Family, hf: Json) -> Json:
  """Returns the options of RoPE, of global and of local layers.

  transformers 5 writes `rope_parameters`, flat or with an entry for each type of layer; 4 writes
  `rope_scaling` and `rope_theta`. Where several are there, the order is that of transformers 5.
  """
  parameters, scaling = hf.get("rope_parameters") or {}, hf.get("rope_scaling") or {}
  theta, context = hf.get("rope_theta", 10000.0), hf.get("max_position_embeddings")
  if kind == "gemma3_text":
    local = parameters.get("sliding_attention") or {}
    local = _one_rope(kind, local, hf["rope_local_base_freq"], context)
    entry = parameters.get("full_attention") or {}
    if isinstance(entry, dict):
      entry = {**entry, **scaling}
    return _one_rope(kind, entry, theta, context) | _of_local(local)
  parameters = scaling or parameters
  if not set(_LAYER_TYPES) & set(parameters):
    if hf.get(_TRAINED_CONTEXT):
      parameters = {**parameters, _TRAINED_CONTEXT: hf[_TRAINED_CONTEXT]}
    rope = _one_rope(kind, parameters, theta, context)
    return rope | _of_local(rope)
  if not family.typed:
    raise UserError(
        f"{kind}: RoPE in config.json has an entry for each type of layer, and transformers reads"
        " none of them for this family: leave one entry, without the name of a type"
    )
  entries = [parameters.get(name) or {} for name in _LAYER_TYPES]
  full, local = (_one_rope(kind, entry, theta, context) for entry in entries)
  return full | _of_local(local)


def _of_local(rope: Json) -> Json:
  """Returns the options of RoPE under the names that they have for local layers."""
  return {f"local_{name}": value for name, value in rope.items()}


def _one_rope(kind: str, entry: Any, theta: float | None, context: int | None) -> Json:
  """Returns `rope_theta`, `rope_factor` and `rope_stretch` of one entry of `config.json`.

  Args:
    kind: the family.
    entry: a JSON object.
    theta: base, if the entry has none. None: config.json has null there.
    context: tokens that a llama3 entry was trained on, if it does not say so.
  """
  entry = schemas.checked(entry, schemas.Rope, f"{kind}: RoPE in config.json")
  entry = {name: value for name, value in entry.items() if value is not None}
  if entry.get("partial_rotary_factor", 1.0) != 1.0:
    raise UserError(
        f"{kind}: partial_rotary_factor is not 1, and famjax supports RoPE only on whole heads"
    )
  rope = {"rope_theta": entry.get("rope_theta", theta), "rope_factor": 1.0, "rope_stretch": None}
  if rope["rope_theta"] is None:
    raise UserError(f"{kind}: the base of its RoPE is null in config.json: set rope_theta")
  match entry.get("rope_type", entry.get("type", "default")):
    case "default":
      return rope
    case "linear":
      names = ("factor",)
    case "llama3":
      names = ("factor", "low_freq_factor", "high_freq_factor", _TRAINED_CONTEXT)
      entry = {_TRAINED_CONTEXT: context, **entry}
    case other:
      raise UserError(f"{kind}: RoPE of type {shown(other)} is not one that famjax has")
  missing = [name for name in names if entry.get(name) is None]
  if missing:
    raise UserError(f"{kind}: its RoPE lacks {missing[0]} in config.json")
  factor, *stretch = (entry[name] for name in names)
  return rope | {"rope_factor": factor, "rope_stretch": tuple(stretch) or None}


def known() -> str:
  """The families that there are, for a line that refuses another one."""
  return f"there is {', '.join(FAMILIES)}"
