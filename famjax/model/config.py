"""What a model is made of, as two frozen dataclasses.

Symbols (SPEC and paper): `N` block size, `M` memory segments, `F` FAM length, `L` layers, `D` model
width, `H` query heads, `K` key/value heads, `d` head width, `V` vocabulary.
"""

import dataclasses
import itertools
import math
import re
from typing import Any

from famjax.errors import UserError

# The matrices of a layer, as `lora_targets` name them.
PROJECTIONS = (
    "attention/query", "attention/key", "attention/value", "attention/out", "feedforward/gate",
    "feedforward/up", "feedforward/down",
)  # fmt: skip
# The weights that a FAM adds to a model; it has one of them.
FAM_WEIGHTS = ("fam_prompt", "fam_prefix")
# First names of all weights that a memory of any kind adds to a decoder.
MEMORY_WEIGHTS = (*FAM_WEIGHTS, "memory", "memory_layers")
# Kinds of memory that the decoder itself has; others are `strategy`'s.
BUILT_IN = ("fam", "bswa", "full")
# Options of a `ModelConfig` that change no result.
HOW_IT_RUNS = ("remat", "layers_unroll", "feedback_unroll", "feedback_order", "attention_kernel")
# What a layer keeps for its backward pass; the rest is computed again. See `decoder.remat`.
REMAT_POLICIES = ("none", "dots", "dots_no_batch", "full")
# How a layer goes over blocks and their FAMs. See `grid`.
FEEDBACK_ORDERS = ("auto", "with_tokens", "before_tokens")
# What makes the attention of whole blocks. See `blocks.attend`.
ATTENTION_KERNELS = ("auto", "none", "pallas", "interpret", "interpret_gpu")


# Bounds that no model reaches: a directory from anywhere may ask for more than any machine has.
_MOST_LAYERS, _MOST_SEGMENTS = 4096, 65_536


@dataclasses.dataclass(frozen=True)
class MemoryConfig:
  """Which past a block can see (SPEC sections 1 and 2; defaults: Table 4).

  Attributes:
    kind: "fam" (Algorithm 2), "bswa" (Algorithm 1), or "full": all that came before, which may be
      (M + 1) * N tokens at most, an ordinary decoder. A FAM of length 0 is BSWA. Other kinds are
      registered (strategy.py): "rmt", "infini", ...; "module:Class" imports one.
    block_size: N, tokens in a block.
    memory_segments: M, earlier blocks whose keys and values stay visible.
    fam_length: F, feedback vectors of a layer. Ignored by "bswa" and "full".
    fam_init: "prompt", a learnable `[F, D]` carried up through the layers (B.1), or "prefix", a
      learnable `[L, F, D]` (B.4.6).
    fam_position: where a FAM written by a block stands for RoPE (B.2.1): "last", the last F
      positions of the block; "float", spread between this block and the next; "zero", always 0.
    stop_gradient: no gradient through the keys and values of earlier blocks (Transformer-XL;
      M1_SG of Fig. 3a). The FAM's own path keeps its gradient.
    options: of a registered kind, by name; a dictionary, which becomes a tuple of pairs.
    window: a query at position p sees token keys at positions above `p - window` alone, as far as
      the segments hold them (Transformer-XL, B.4.7); None: whole blocks.
  """

  kind: str = "fam"
  block_size: int = 1024
  memory_segments: int = 3
  fam_length: int = 64
  fam_init: str = "prompt"
  fam_position: str = "last"
  stop_gradient: bool = False
  window: int | None = None
  options: dict[str, Any] | tuple[tuple[str, Any], ...] = ()

  def __post_init__(self):
    items = self.options.items() if isinstance(self.options, dict) else self.options
    frozen = lambda value: tuple(map(frozen, value)) if isinstance(value, list) else value
    object.__setattr__(self, "options", tuple(sorted((k, frozen(v)) for k, v in items)))

  @property
  def length(self) -> int:
    """F: feedback vectors per layer; 0 for BSWA."""
    return self.fam_length if self.kind == "fam" else 0

  @property
  def context(self) -> int | None:
    """Tokens that a row may have; None: any number."""
    return (self.memory_segments + 1) * self.block_size if self.kind == "full" else None

  def check_context(self, tokens: int) -> None:
    """Raises UserError if a row of so many tokens is more than an ordinary decoder holds."""
    if self.context is not None and tokens > self.context:
      raise UserError(
          f"{tokens} tokens are more than the {self.context} that full attention has room for here:"
          " raise memory_segments, or give the model a memory, MemoryConfig(kind='fam', ...)"
      )

  def validate(self) -> None:
    """Raises UserError for a value that makes no sense."""
    self._validate_strategy()
    _one_of("fam_init", self.fam_init, ("prompt", "prefix"))
    _one_of("fam_position", self.fam_position, ("last", "float", "zero"))
    _at_least("block_size", self.block_size, 1)
    _at_least("memory_segments", self.memory_segments, 0)
    _at_most("memory_segments", self.memory_segments, _MOST_SEGMENTS)
    _at_least("fam_length", self.fam_length, 0)
    if self.length > self.block_size:
      raise UserError(
          f"fam_length {self.fam_length} is longer than a block of {self.block_size} tokens:"
          " a FAM stands at the last positions of its block; lower fam_length or raise block_size"
      )
    if self.window is not None:
      _at_least("window", self.window, 1)
      held = (self.memory_segments + 1) * self.block_size
      if self.window >= held:
        raise UserError(
            f"window {self.window} hides nothing of the {held} tokens that a block and its segments"
            f" hold (block_size {self.block_size}, memory_segments {self.memory_segments}): lower it,"
            " or leave it out"
        )

  def _validate_strategy(self):
    from famjax.model import strategy  # pylint: disable=import-outside-toplevel

    how = strategy.of(self)
    if how is None:
      if self.options:
        raise UserError(f"memory options {dict(self.options)} are given, and {self.kind!r} has none")
      return
    if self.window is not None:
      raise UserError(f"window is {self.window}, and memory kind {self.kind!r} has none: leave it out")
    for name in ("fam_init", "fam_position"):
      if getattr(self, name) != getattr(type(self), name):
        what = f"{name} is {getattr(self, name)!r}, which only kind 'fam' has"
        raise UserError(f"{what}, and the kind is {self.kind!r}: leave it out")
    how.validate(self)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """A decoder-only Transformer. The defaults are the paper's: pre-norm, RoPE, SwiGLU, no biases.

  The options below `rope_theta` are what the families of open decoders differ in; a FAM vector
  goes through each of them as a token does.

  Attributes:
    vocab_size: V.
    num_layers: L.
    model_dim: D.
    num_heads: H, query heads.
    num_kv_heads: K: H is multi-head, 1 multi-query, between them grouped-query attention. None: H.
    head_dim: d; None: D // H.
    ff_dim: hidden width of the feed-forward; None: 4 * D.
    norm: "rms", "rms_plus_one" (Gemma: it multiplies by 1 + scale) or "layer".
    norm_eps: added to the variance.
    tie_embeddings: logits through the transposed embedding, else through a head of its own.
    rope_theta: base of the RoPE wavelengths.
    rope_factor: wavelengths are so many times longer.
    rope_stretch: (low, high, context), Llama 3: of waves that fit more than `high` times into
      `context` tokens none is stretched by `rope_factor`, those that fit less than `low` times are
      stretched in full, and those between them in part. None: all in full.
    norm_place: of the norms around attention and feed-forward: "before", "after" (OLMo 2: on what
      they give to the residual) or "both" (Gemma 2).
    qkv_bias: queries, keys and values have a bias (Qwen 2).
    qk_norm: queries and keys are normed before they are rotated: each "head" (Qwen 3), or all heads
      of a vector together, "width" (OLMo 2); None: they are not.
    query_scale: scores are multiplied by it; None: d ** -0.5.
    attention_cap: scores are bent to stay within it, `cap * tanh(score / cap)` (Gemma 2).
    logit_cap: logits are bent likewise.
    activation: of the feed-forward's gate, "silu" or "gelu" (its tanh form).
    scale_embeddings: token embeddings and the FAM prompt are multiplied by D ** 0.5 (Gemma).
    layer_kinds: of each layer: "global"; "local", whose tokens see `local_window` tokens at most,
      with a RoPE of their own; or "nope", without RoPE. Fewer than `num_layers` are a pattern: it
      repeats, and is cut at the last layer. None: all are global.
    local_window: of local layers, on top of what their memory lets them see.
    local_rope_theta: `rope_theta` of local layers; None: the same.
    local_rope_factor: `rope_factor` of local layers. The default leaves them unscaled, as Gemma 3
      does; Mistral, Qwen and Gemma 2 scale all layers alike.
    local_rope_stretch: `rope_stretch` of local layers.
    lora_rank: every matrix that `lora_targets` name gets a product of this rank added to it, whose
      two factors are parameters of their own (LoRA); 0: none.
    lora_alpha: the product is multiplied by lora_alpha / lora_rank; None: by 1.
    lora_targets: patterns, each of which some of `PROJECTIONS` must hold.
    compute_dtype: "float32" or "bfloat16", of activations and matrix products.
    param_dtype: dtype of the parameters, but for LoRA's and the FAM's, which are float32.
    remat: what a layer keeps for its backward pass, one of REMAT_POLICIES.
    layers_unroll: layers that a compiled program has one after another before its loop over them
      turns: all of a small model's save a processor copies of what the backward pass keeps.
    feedback_unroll: blocks of the feedback loop that a compiled program has one after another before
      it turns: all of a call's save copies, and take longer to compile.
    feedback_order: how a layer goes over the blocks of a call, one of FEEDBACK_ORDERS: "with_tokens",
      block after block, all written out in the compiled program, a FAM's vectors beside its block's
      tokens in the products after attention; "before_tokens", the feedback loop alone, then all tokens
      at once; "auto", the first where `feedback_unroll` has room for a call's blocks (a call that
      is not `aligned` has one more than its tokens fill) and the device is no GPU, else the second.
    attention_kernel: of whole blocks (training, prefill), one of ATTENTION_KERNELS: "auto", the GPU's
      kernel on an A100, H100 or their like, in bfloat16, of blocks that 64 divides and heads of up to
      256, else plain JAX; "none", plain JAX; "pallas", the kernel of a TPU
      (`famjax.kernels.block_attention`) or a GPU (`block_attention_gpu`), elsewhere plain JAX;
      "interpret" and "interpret_gpu", these two interpreted, on any machine and slowly, for tests.
    memory: which past a block can see.
  """

  vocab_size: int = 256
  num_layers: int = 4
  model_dim: int = 128
  num_heads: int = 4
  num_kv_heads: int | None = None
  head_dim: int | None = None
  ff_dim: int | None = None
  norm: str = "rms"
  norm_eps: float = 1e-6
  tie_embeddings: bool = True
  rope_theta: float = 10000.0
  rope_factor: float = 1.0
  rope_stretch: tuple[float, float, float] | None = None
  norm_place: str = "before"
  qkv_bias: bool = False
  qk_norm: str | None = None
  query_scale: float | None = None
  attention_cap: float | None = None
  logit_cap: float | None = None
  activation: str = "silu"
  scale_embeddings: bool = False
  layer_kinds: tuple[str, ...] | None = None
  local_window: int | None = None
  local_rope_theta: float | None = None
  local_rope_factor: float = 1.0
  local_rope_stretch: tuple[float, float, float] | None = None
  lora_rank: int = 0
  lora_alpha: float | None = None
  lora_targets: tuple[str, ...] = ("attention", "feedforward")
  compute_dtype: str = "float32"
  param_dtype: str = "float32"
  remat: str = "none"
  layers_unroll: int = 1
  feedback_unroll: int = 1
  feedback_order: str = "auto"
  attention_kernel: str = "auto"
  memory: MemoryConfig = MemoryConfig()

  def __post_init__(self):
    # JSON and gin give lists.
    for name in ("rope_stretch", "local_rope_stretch", "layer_kinds", "lora_targets"):
      if getattr(self, name) is not None:
        object.__setattr__(self, name, tuple(getattr(self, name)))
    _at_most("num_layers", self.num_layers, _MOST_LAYERS)  # before a pattern is repeated so often
    if self.layer_kinds and len(self.layer_kinds) < self.num_layers:  # a pattern
      kinds = itertools.islice(itertools.cycle(self.layer_kinds), self.num_layers)
      object.__setattr__(self, "layer_kinds", tuple(kinds))

  @property
  def kv_heads(self) -> int:
    """K."""
    return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

  @property
  def head_width(self) -> int:
    """d."""
    return self.model_dim // self.num_heads if self.head_dim is None else self.head_dim

  @property
  def hidden_width(self) -> int:
    """Hidden width of the feed-forward."""
    return 4 * self.model_dim if self.ff_dim is None else self.ff_dim

  @property
  def attention_scale(self) -> float:
    """What scores are multiplied by."""
    return self.head_width**-0.5 if self.query_scale is None else self.query_scale

  @property
  def embedding_scale(self) -> float:
    """What token embeddings, and vectors that stand beside them, are multiplied by."""
    return self.model_dim**0.5 if self.scale_embeddings else 1.0

  @property
  def lora_scale(self) -> float:
    """What LoRA's products are multiplied by."""
    return self.lora_alpha / self.lora_rank if self.lora_alpha and self.lora_rank else 1.0

  def lora_rank_of(self, projection: str) -> int:
    """LoRA's rank in one of `PROJECTIONS`; 0: it has none."""
    return self.lora_rank if any(re.search(p, projection) for p in self.lora_targets) else 0

  def normalised(self) -> "ModelConfig":
    """The same model, of several ways to say the same one."""
    usual = self.model_dim / self.num_heads
    local = "local" in self.kinds()
    named = tuple(name for name in PROJECTIONS if self.lora_rank_of(name))
    return dataclasses.replace(
        self,
        num_kv_heads=None if self.kv_heads == self.num_heads else self.kv_heads,
        head_dim=None if self.head_width == usual else self.head_width,
        ff_dim=self.hidden_width,
        layer_kinds=None if self.kinds() == ("global",) else self.layer_kinds,
        local_window=self.local_window if local else None,
        **self._normalised_rope(),
        query_scale=None if self.attention_scale == self.head_width**-0.5 else self.query_scale,
        lora_alpha=None if self.lora_scale == 1 else self.lora_alpha,
        lora_targets=ModelConfig.lora_targets if named in ((), PROJECTIONS) else named,
    )

  def _normalised_rope(self) -> dict[str, Any]:
    """Returns the RoPE options without those of a kind of layer that the model does not have."""
    options = {"local_rope_theta": None, "local_rope_factor": 1.0, "local_rope_stretch": None}
    if "local" not in self.kinds():
      return options
    theta = self.local_rope_theta or self.rope_theta
    if "global" not in self.kinds():  # then one RoPE turns all layers
      options |= {"rope_theta": theta, "rope_factor": self.local_rope_factor}
      options |= {"rope_stretch": self.local_rope_stretch}
    elif theta != self.rope_theta:
      options["local_rope_theta"] = theta
    options |= {"local_rope_factor": self.local_rope_factor}
    return options | {"local_rope_stretch": self.local_rope_stretch}

  def kinds(self) -> tuple[str, ...]:
    """The kinds of layers that there are; `of_kind` says what each is."""
    return tuple(dict.fromkeys(self.layer_kinds)) if self.layer_kinds else ("global",)

  def of_kind(self, kind: str) -> "ModelConfig":
    """The configuration of a model all of whose layers are as those of this kind."""
    plain = dataclasses.replace(self, layer_kinds=None)
    if kind == "global":
      return plain
    if kind == "nope":
      return dataclasses.replace(plain, rope_theta=math.inf)
    windows = [w for w in (self.memory.window, self.local_window) if w is not None]
    return dataclasses.replace(
        plain,
        rope_theta=self.local_rope_theta or self.rope_theta,
        rope_factor=self.local_rope_factor,
        rope_stretch=self.local_rope_stretch,
        memory=dataclasses.replace(self.memory, window=min(windows)),
    )

  def validate(self) -> None:
    """Raises UserError for a value that makes no sense."""
    for name in (
        "vocab_size", "num_layers", "model_dim", "num_heads", "kv_heads", "head_width",
        "hidden_width",
    ):  # fmt: skip
      _at_least(name, getattr(self, name), 1)
    for name in (
        "rope_theta", "rope_factor", "norm_eps", "query_scale", "attention_cap", "logit_cap",
        "local_rope_theta", "local_rope_factor", "lora_alpha",
    ):  # fmt: skip
      value = getattr(self, name)
      if value is not None and not 0 < value < math.inf:
        raise UserError(f"{name} is {value}; it must be above 0")
    if self.num_heads % self.kv_heads:
      raise UserError(
          f"num_kv_heads {self.kv_heads} does not divide num_heads {self.num_heads}:"
          " each key/value head serves the same number of query heads"
      )
    if self.head_dim is None and self.model_dim % self.num_heads:
      raise UserError(
          f"num_heads {self.num_heads} does not divide model_dim {self.model_dim}; set head_dim"
      )
    if self.head_width % 2:
      raise UserError(f"head width {self.head_width} is odd: RoPE turns pairs; make it even")
    _one_of("norm", self.norm, ("rms", "rms_plus_one", "layer"))
    _one_of("norm_place", self.norm_place, ("before", "after", "both"))
    _one_of("qk_norm", self.qk_norm, (None, "head", "width"))
    _one_of("activation", self.activation, ("silu", "gelu"))
    self._validate_kinds()
    _at_least("lora_rank", self.lora_rank, 0)
    for pattern in self.lora_targets:
      _check_pattern("lora_targets", pattern)
      if self.lora_rank and not any(re.search(pattern, name) for name in PROJECTIONS):
        raise UserError(
            f"lora_targets: {pattern!r} is in no name of a matrix; there is {', '.join(PROJECTIONS)}"
        )
    _one_of("compute_dtype", self.compute_dtype, ("float32", "bfloat16"))
    _one_of("param_dtype", self.param_dtype, ("float32", "bfloat16"))
    _one_of("remat", self.remat, REMAT_POLICIES)
    _at_least("layers_unroll", self.layers_unroll, 1)
    _at_least("feedback_unroll", self.feedback_unroll, 1)
    _one_of("feedback_order", self.feedback_order, FEEDBACK_ORDERS)
    _one_of("attention_kernel", self.attention_kernel, ATTENTION_KERNELS)
    self.memory.validate()
    if self.attention_kernel not in ("auto", "none") and self.memory.kind not in BUILT_IN:
      raise UserError(
          f"memory kind {self.memory.kind!r} has no kernel: attention_kernel must be 'auto' or 'none'"
      )

  def _validate_kinds(self):
    _check_stretch("rope_stretch", self.rope_stretch)
    _check_stretch("local_rope_stretch", self.local_rope_stretch)
    if self.layer_kinds is None:
      return
    if self.memory.kind not in BUILT_IN:
      raise UserError(f"memory kind {self.memory.kind!r} knows no layer_kinds: all layers are global")
    for kind in self.layer_kinds:
      _one_of("layer kind", kind, ("global", "local", "nope"))
    if len(self.layer_kinds) != self.num_layers:
      raise UserError(
          f"layer_kinds names {len(self.layer_kinds)} layers, and num_layers is {self.num_layers}"
      )
    if "local" in self.layer_kinds and (self.local_window is None or self.local_window < 1):
      raise UserError(
          f"local_window is {self.local_window}; local layers need one, of 1 token at least"
      )


def _check_stretch(name: str, stretch: tuple[float, ...] | None) -> None:
  if stretch is None:
    return
  if len(stretch) != 3 or not 0 < stretch[0] < stretch[1] < math.inf or not 0 < stretch[2] < math.inf:
    raise UserError(f"{name} is {stretch}; it must be (low, high, context), low < high")


def _one_of(name: str, value, allowed) -> None:
  if value not in allowed:
    raise UserError(f"{name} {value!r} is unknown; choose one of {', '.join(map(str, allowed))}")


def _check_pattern(name: str, pattern: str) -> None:
  """Raises UserError for a pattern that is no regular expression, or that could search for hours.

  A model's directory may come from anywhere, and a pattern with nested repeats can take exponential time.
  """
  try:
    re.compile(pattern)
  except (re.error, TypeError, RecursionError, OverflowError) as error:
    raise UserError(f"{name}: {pattern!r} is no pattern ({error})") from None
  repeats = re.findall(r"[*+?{]", pattern)
  if len(pattern) > 200 or len(repeats) > 4 or re.search(r"\)\s*[*+?{]", pattern):
    raise UserError(f"{name}: {pattern!r:.60} repeats a group or is too long; name the matrices")


def _at_least(name: str, value: int, least: int) -> None:
  if value < least:
    raise UserError(f"{name} is {value}; it must be at least {least}")


def _at_most(name: str, value: int, most: int) -> None:
  if value > most:
    raise UserError(f"{name} is {value}; it must be at most {most}")
