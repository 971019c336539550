"""LoRA (Hu et al. 2021): products of low rank added to a model's matrices.

`product` and `joined_product` add them while a `layers.Projection` computes; `merge` puts them into the
matrices, and `unmerge` takes them out again, over nested dicts of parameters named as in `Decoder`.
"""

import dataclasses
import functools
from typing import Any

from flax import traverse_util
import jax
import jax.numpy as jnp

from famjax.model.config import ModelConfig
from famjax.model.products import letters

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


def product(equation: str, x: jax.Array, kernel: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
  """`x @ kernel + (x @ a) @ b`.

  Args:
    equation: of `x` and the kernel, "...D,DHd->...Hd".
    x: `[..., in...]`.
    kernel: `[in..., out...]`.
    a: `[in..., r]`.
    b: `[r, out...]`, scaled.

  Returns:
    `[..., out...]`, in the dtype that all have.
  """
  inputs, _, outputs = letters(equation)
  low = jnp.einsum(f"...{inputs},{inputs}r->...r", x, a)
  return jnp.einsum(equation, x, kernel) + jnp.einsum(f"...r,r{outputs}->...{outputs}", low, b)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def joined_product(
    equation: str, x: jax.Array, kernel: jax.Array, a: jax.Array, b: jax.Array
) -> jax.Array:
  """`product`, in which the side that is not `D` moves once, as without LoRA; for many `x`.

  Products that are added write the output, read it and write it again, or read the input twice, which
  takes a TPU longer than to make them. Where `D` goes in, `b` stands below the kernel, `[x, x @ a] @
  [kernel; b]`; where it comes out `a` beside it, `x @ [kernel, a]`. The backward pass does the other of
  both. `D`, the model's width, is mostly the narrower side, and the one that no mesh splits a product
  over. There is no forward-mode derivative.

  Args:
    equation: as for `product`, of whose inputs or outputs `D` is the only letter.
  """
  return _product_forward(equation, x, kernel, a, b)[0]


def _product_forward(equation, x, kernel, a, b):
  inputs, _, outputs = letters(equation)
  if _widens(equation):
    low = jnp.einsum(f"...{inputs},{inputs}r->...r", x, a)
    y = _of_both(equation, x, low, kernel, b, axis=0)
  else:
    y, low = _to_both(equation, x, kernel, a, axis=-1)
    y += jnp.einsum(f"...r,r{outputs}->...{outputs}", low, b)
  return y, (x, kernel, a, b)


def _product_backward(equation, kept, of_y):
  x, kernel, a, b = kept
  inputs, of_kernel, outputs = letters(equation)
  # Made anew: it is a small product, and a layer that is made again need not make `y` for it.
  low = jnp.einsum(f"...{inputs},{inputs}r->...r", x, a)
  back = f"...{outputs},{of_kernel}->...{inputs}"
  if _widens(equation):
    of_x, of_low = _to_both(back, of_y, kernel, b, axis=0)
    of_x += jnp.einsum(f"...r,{inputs}r->...{inputs}", of_low, a)
  else:
    of_low = jnp.einsum(f"...{outputs},r{outputs}->...r", of_y, b)
    of_x = _of_both(back, of_y, of_low, kernel, a, axis=-1)
  of = lambda equation, x, weight, of_y: jax.linear_transpose(  # pylint: disable=g-long-lambda
      lambda w: jnp.einsum(equation, x, w), weight
  )(of_y)[0]
  return (
      of_x, of(equation, x, kernel, of_y), of(f"...{inputs},{inputs}r->...r", x, a, of_low),
      of(f"...r,r{outputs}->...{outputs}", low, b, of_y),
  )  # fmt: skip


joined_product.defvjp(_product_forward, _product_backward)


def _widens(equation):
  """Whether `D` goes in."""
  return letters(equation)[0] == "D"


def _of_both(equation, x, low, kernel, factor, axis):
  both = jnp.concatenate([kernel, factor], axis)
  return jnp.einsum(equation, jnp.concatenate([x, low], axis=-1), both)


def _to_both(equation, x, kernel, factor, axis):
  y = jnp.einsum(equation, x, jnp.concatenate([kernel, factor], axis))
  return jnp.split(y, [kernel.shape[axis]], axis=-1)


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
