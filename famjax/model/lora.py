"""LoRA (Hu et al. 2021): products of low rank added to a model's matrices.

`layers.Projection` adds them while it computes; here they go into the matrices, and out again. The
functions are pure, over nested dicts of parameters named as in `Decoder`.
"""

import dataclasses
from typing import Any

from flax import traverse_util
import jax
import jax.numpy as jnp

from famjax.model.config import ModelConfig

Params = dict[str, Any]
NAMES = ("lora_a", "lora_b")


def merge(params: Params, config: ModelConfig) -> tuple[Params, ModelConfig]:
  """Adds every product to its matrix, for inference and export.

  Returns:
    Parameters without LoRA's own, and their configuration; both as they were if there is none.
  """
  if not config.lora_rank:
    return params, config
  merged = _added(params, params, config.lora_scale)
  return merged, dataclasses.replace(config, lora_rank=0).normalised()


def unmerge(merged: Params, params: Params, config: ModelConfig) -> Params:
  """Takes the products of `params` out of `merged` again, but for rounding, and puts them beside it."""
  plain = traverse_util.flatten_dict(_added(merged, params, -config.lora_scale))
  flat = traverse_util.flatten_dict(params)
  factors = {path: value for path, value in flat.items() if path[-1] in NAMES}
  return traverse_util.unflatten_dict(plain | factors)


@jax.jit
def _add(kernel: jax.Array, a: jax.Array, b: jax.Array, scale: float) -> jax.Array:
  """`kernel + scale * a @ b`, all `[L, ...]`, layer by layer, so that float32 is of one layer."""

  def layer(arrays):
    kernel, a, b = arrays
    rank = a.shape[-1]
    product = jnp.matmul(
        a.reshape(-1, rank), b.reshape(rank, -1), precision=jax.lax.Precision.HIGHEST
    )
    added = kernel.astype(jnp.float32) + scale * product.reshape(kernel.shape)
    return added.astype(kernel.dtype)

  return jax.lax.map(layer, (kernel, a, b))


def _added(params: Params, factors: Params, scale: float) -> Params:
  """`params` without factors, and with the products of `factors` added to its kernels."""
  flat, factors = (traverse_util.flatten_dict(tree) for tree in (params, factors))
  new = {path: value for path, value in flat.items() if path[-1] not in NAMES}
  for path, value in new.items():
    a, b = (factors.get((*path[:-1], name)) for name in NAMES)
    if path[-1] == "kernel" and a is not None:
      new[path] = _add(value, a, b, scale)
  return traverse_util.unflatten_dict(new)
