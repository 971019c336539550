"""What a model is made of, as two frozen dataclasses.

Symbols (SPEC and paper): `N` block size, `M` memory segments, `F` FAM length, `L` layers, `D` model
width, `H` query heads, `K` key/value heads, `d` head width, `V` vocabulary.
"""

import dataclasses
import math

from famjax.errors import UserError

# What a layer keeps for its backward pass; the rest is computed again. See `decoder.remat`.
REMAT_POLICIES = ("none", "dots", "dots_no_batch", "full")


@dataclasses.dataclass(frozen=True)
class MemoryConfig:
  """Which past a block can see (SPEC sections 1 and 2; defaults: Table 4).

  Attributes:
    kind: "fam" (Algorithm 2) or "bswa" (Algorithm 1). A FAM of length 0 is BSWA.
    block_size: N, tokens in a block.
    memory_segments: M, earlier blocks whose keys and values stay visible.
    fam_length: F, feedback vectors of a layer. Ignored by "bswa".
    fam_init: "prompt", a learnable `[F, D]` carried up through the layers (B.1), or "prefix", a
      learnable `[L, F, D]` (B.4.6).
    fam_position: where a FAM written by a block stands for RoPE (B.2.1): "last", the last F
      positions of the block; "float", spread between this block and the next; "zero", always 0.
    stop_gradient: no gradient through the keys and values of earlier blocks (Transformer-XL;
      M1_SG of Fig. 3a). The FAM's own path keeps its gradient.
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

  @property
  def length(self) -> int:
    """F: feedback vectors per layer; 0 for BSWA."""
    return self.fam_length if self.kind == "fam" else 0

  def validate(self) -> None:
    """Raises UserError for a value that makes no sense."""
    _one_of("memory kind", self.kind, ("fam", "bswa"))
    _one_of("fam_init", self.fam_init, ("prompt", "prefix"))
    _one_of("fam_position", self.fam_position, ("last", "float", "zero"))
    _at_least("block_size", self.block_size, 1)
    _at_least("memory_segments", self.memory_segments, 0)
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


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """A decoder-only Transformer: pre-norm, RoPE, SwiGLU, no biases but LayerNorm's.

  Attributes:
    vocab_size: V.
    num_layers: L.
    model_dim: D.
    num_heads: H, query heads.
    num_kv_heads: K: H is multi-head, 1 multi-query, between them grouped-query attention. None: H.
    head_dim: d; None: D // H.
    ff_dim: hidden width of the feed-forward; None: 4 * D.
    norm: "rms" or "layer".
    norm_eps: added to the variance.
    tie_embeddings: logits through the transposed embedding, else through a head of its own.
    rope_theta: base of the RoPE wavelengths.
    compute_dtype: "float32" or "bfloat16", of activations and matrix products.
    param_dtype: dtype of the parameters.
    remat: what a layer keeps for its backward pass, one of REMAT_POLICIES.
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
  compute_dtype: str = "float32"
  param_dtype: str = "float32"
  remat: str = "none"
  memory: MemoryConfig = MemoryConfig()

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

  def validate(self) -> None:
    """Raises UserError for a value that makes no sense."""
    for name in (
        "vocab_size", "num_layers", "model_dim", "num_heads", "kv_heads", "head_width",
        "hidden_width",
    ):  # fmt: skip
      _at_least(name, getattr(self, name), 1)
    for name in ("rope_theta", "norm_eps"):
      if not 0 < getattr(self, name) < math.inf:
        raise UserError(f"{name} is {getattr(self, name)}; it must be above 0")
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
    _one_of("norm", self.norm, ("rms", "layer"))
    _one_of("compute_dtype", self.compute_dtype, ("float32", "bfloat16"))
    _one_of("param_dtype", self.param_dtype, ("float32", "bfloat16"))
    _one_of("remat", self.remat, REMAT_POLICIES)
    self.memory.validate()


def _one_of(name: str, value, allowed) -> None:
  if value not in allowed:
    raise UserError(f"{name} {value!r} is unknown; choose one of {', '.join(allowed)}")


def _at_least(name: str, value: int, least: int) -> None:
  if value < least:
    raise UserError(f"{name} is {value}; it must be at least {least}")
