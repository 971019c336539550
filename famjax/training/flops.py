"""Model FLOPs by a written formula, and the share of the hardware's peak that a run reaches.

A matrix product of `[a, b]` and `[b, c]` is `2abc` FLOPs. Per token, forward:

    matrices   2 * (L * P + D * V)        P = D*H*d + 2*D*K*d + H*d*D + 3*D*ff, a layer's matrices
    attention  4 * L * H * d * keys       keys: visible tokens (SPEC section 1), averaged over the
                                          places of a row; what a kernel masks out is not counted
    FAM        L/N * (2*F*P + 4*H*d*F * (N + F) + 4*H*d*F * N)
                                          a block's F vectors through the layer's matrices; their
                                          attention to the block and to one another; the block's
                                          N tokens' attention to them

Training is three times the forward pass: the backward pass makes a gradient for each of the two
factors of every product. For products with matrices that are not trained (LoRA) it is twice, and
attention, the FAM's too, remains three times; LoRA's own products are left out. The FAM that a row's
last block writes is read by no token of the step: it counts where rows go on from step to step, once,
and not where it is made for random state passing, which wants one row's.
A teacher adds its forward pass. What rematerialisation computes again is not counted, so that a policy
that saves memory shows as a lower utilisation. Norms, RoPE, softmax and the embedding's lookup are
left out, as in the PaLM paper (Chowdhery et al. 2022, appendix B).

Utilisation (MFU) is FLOPs per token times tokens per second over the peak of the devices, dense
bfloat16 whatever the compute dtype. A CPU has no such published number: there it is None.
"""

import math
from typing import NamedTuple

from jax.extend import core
import numpy as np

from famjax.model.config import MemoryConfig, ModelConfig

# Dense bfloat16 FLOP/s of one JAX device, by its `device_kind`.
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
}


class FlopsPerToken(NamedTuple):
  """Training FLOPs per token.

  Attributes:
    matrices: of products with weights, for tokens.
    attention: of tokens' attention to tokens.
    fam: everything that the FAM adds; 0 for BSWA.
  """

  matrices: float
  attention: float
  fam: float

  @property
  def total(self) -> float:
    return sum(self)


def visible_keys(memory: MemoryConfig, length: int, followed: bool) -> float:
  """Token keys that a query sees (SPEC section 1), averaged over the places of a row.

  Args:
    memory: block size, segments, window.
    length: S, tokens of a row in one step.
    followed: the row goes on from an earlier step, so that all segments exist.
  """
  N, M = memory.block_size, memory.memory_segments
  place = np.arange(length)
  segments = M if followed else np.minimum(place // N, M)
  keys = segments * N + place % N + 1
  return float(np.mean(keys if memory.window is None else np.minimum(keys, memory.window)))


def flops_per_token(
    config: ModelConfig, length: int, followed: bool = False, frozen: bool = False,
    teacher: ModelConfig | None = None,
) -> FlopsPerToken:  # fmt: skip
  """Training FLOPs per token; see the formula above.

  Args:
    config: of the model.
    length: S, tokens of a row in one step.
    followed: rows go on from step to step.
    frozen: the matrices are not trained: no gradient is made for them, only for their inputs.
    teacher: of a model that is run forward beside it.
  """
  one = _forward(config, length, followed)
  passes = 2.0 if frozen else 3.0
  last = min(1.0, config.memory.block_size / length)  # of the blocks, those at a row's end
  written = (1 - last) * (passes * one.through + 3 * one.writing)
  written += last * followed * (one.through + one.writing)
  own = FlopsPerToken(passes * one.matrices, 3 * one.attention, written + 3 * one.reading)
  if teacher is None:
    return own
  other = _forward(teacher, length, False)
  return FlopsPerToken(own.matrices + other.matrices, own.attention + other.attention, own.fam)


def reading_flops_per_token(config: ModelConfig, length: int, followed: bool = False) -> float:
  """FLOPs per token of a forward pass whose state goes on: prefill and decoding."""
  return sum(_forward(config, length, followed))


class _Forward(NamedTuple):
  """The formula's terms, per token; the FAM's are `through` matrices, `writing` it and `reading` it."""

  matrices: float
  attention: float
  through: float
  writing: float
  reading: float


def _forward(config: ModelConfig, length: int, followed: bool) -> _Forward:
  L, D, V, ff = config.num_layers, config.model_dim, config.vocab_size, config.hidden_width
  H, K, d = config.num_heads, config.kv_heads, config.head_width
  N, F = config.memory.block_size, config.memory.length
  layer = D * H * d + 2 * D * K * d + H * d * D + 3 * D * ff
  attend = 4.0 * H * d  # for each query and key: one product for the logit, one for the result
  keys = np.mean([
      visible_keys(config.of_kind(kind).memory, length, followed)
      for kind in config.layer_kinds or config.kinds()
  ])  # averaged over layers
  return _Forward(
      matrices=2.0 * (L * layer + D * V),
      attention=L * attend * float(keys),
      through=L / N * 2 * F * layer,
      writing=L / N * attend * F * (N + F),
      reading=L / N * attend * F * N,
  )


def products(jaxpr: core.Jaxpr) -> float:
  """FLOPs of all matrix products of a traced program, those that it makes again included.

  What nothing reads does not count: a compiler drops it. A loop whose end depends on data counts
  once, of branches the largest counts, and a kernel as it says itself (`pallas_call`'s cost estimate).

  Args:
    jaxpr: of the program, `jax.jit(f).trace(...).jaxpr.jaxpr`.
  """
  total, read = 0.0, {id(x) for x in jaxpr.outvars}
  for eqn in reversed(jaxpr.eqns):
    if not eqn.effects and not any(id(x) in read for x in eqn.outvars):
      continue
    read |= {id(x) for x in eqn.invars}
    if eqn.primitive.name == "dot_general":
      (contracted, _), _ = eqn.params["dimension_numbers"]
      shape = eqn.invars[0].aval.shape
      size = math.prod(eqn.outvars[0].aval.shape) * math.prod(shape[i] for i in contracted)
      total += 2.0 * size
    if eqn.primitive.name == "pallas_call":
      cost = eqn.params["cost_estimate"]
      total += cost.flops if cost else 0.0
      continue
    inner = [products(part) for part in core.jaxprs_in_params(eqn.params)]
    turns = 1
    if eqn.primitive.name == "scan":
      turns = eqn.params["length"]
    elif eqn.primitive.name == "shard_map":  # what it does on each device
      turns = eqn.params["mesh"].size
    total += turns * (max(inner) if eqn.primitive.name == "cond" else sum(inner))
  return total


def utilisation(
    flops: FlopsPerToken, tokens_per_second: float, device_kind: str, devices: int = 1
) -> float | None:
  """The share of the devices' peak that a run reaches (MFU); None where no peak is known."""
  peak = PEAK_FLOPS.get(device_kind)
  return None if peak is None else flops.total * tokens_per_second / (peak * devices)
