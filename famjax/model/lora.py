"""LoRA (Hu et al. 2021): products of low rank added to a model's matrices.

`product`, `joined_widening` and `joined_narrowing` add them while a `layers.Projection` computes; `merge` puts them
into the matrices, and `unmerge` takes them out again, over nested dicts of parameters named as in `Decoder`.
"""

from collections.abc import Sequence
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


def lows(equation: str, x: jax.Array, factors: Sequence[jax.Array]) -> list[jax.Array]:
  """`x @ a` for each `a`, in one product: alone each is too narrow to fill a device.

  Args:
    equation: of `x` and the kernels that the factors stand beside, "...D,DHd->...Hd".
    x: `[..., in...]`.
    factors: `[in..., r]` each.

  Returns:
    `[..., r]` of each.
  """
  inputs = letters(equation)[0]
  of_all = jnp.einsum(f"...{inputs},{inputs}r->...r", x, jnp.concatenate(factors, axis=-1))
  return jax.lax.split(of_all, [a.shape[-1] for a in factors], axis=of_all.ndim - 1)


def product(
    equation: str, x: jax.Array, low: jax.Array, kernel: jax.Array, b: jax.Array
) -> jax.Array:
  """`x @ kernel + low @ b`.

  Args:
    equation: as above, of `x` and the kernel.
    x: `[..., in...]`.
    low: `[..., r]`, see `lows`.
    kernel: `[in..., out...]`.
    b: `[r, out...]`, scaled.

  Returns:
    `[..., out...]`, in the dtype that all have.
  """
  outputs = letters(equation)[2]
  return jnp.einsum(equation, x, kernel) + jnp.einsum(f"...r,r{outputs}->...{outputs}", low, b)


# Products that are added write the output, read it and write it again, or read the input twice, which
# takes a TPU longer than to make them. Joined, the side that is not `D`, the model's width and mostly the
# narrower one, moves once, as without LoRA. Both have no forward-mode derivative.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def joined_widening(
    equation: str, split: bool, x: jax.Array, low: jax.Array, kernel: jax.Array, b: jax.Array
) -> jax.Array:
  """`product` as `[x, low] @ [kernel; b]`, where `D` is the only letter that goes in; for many `x`.

  Args:
    equation: as for `product`.
    split: outputs lie on several devices. What comes back of several matrices to one `x` is then added
      up before it goes over them, for which it must be apart from what comes back to each `low`.
  """
  return _widening_forward(equation, split, x, low, kernel, b)[0]


def _widening_forward(equation, split, x, low, kernel, b):
  del split
  return _of_both(equation, x, low, kernel, b, axis=0), (x, low, kernel, b)


def _widening_backward(equation, split, kept, of_y):
  x, low, kernel, b = kept
  inputs, of_kernel, outputs = letters(equation)
  back = f"...{outputs},{of_kernel}->...{inputs}"
  if split:
    of_x = jnp.einsum(back, of_y, kernel)
    of_low = jnp.einsum(f"...{outputs},r{outputs}->...r", of_y, b)
  else:
    of_x, of_low = _to_both(back, of_y, kernel, b, axis=0)
  return (
      of_x, of_low, _to_weight(equation, x, kernel, of_y),
      _to_weight(f"...r,r{outputs}->...{outputs}", low, b, of_y),
  )  # fmt: skip


joined_widening.defvjp(_widening_forward, _widening_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def joined_narrowing(
    equation: str, x: jax.Array, kernel: jax.Array, a: jax.Array, b: jax.Array
) -> jax.Array:
  """`product` with `x @ [kernel, a]`, where `D` is the only letter that comes out; for many `x`."""
  return _narrowing_forward(equation, x, kernel, a, b)[0]


def _narrowing_forward(equation, x, kernel, a, b):
  y, low = _to_both(equation, x, kernel, a, axis=-1)
  return y + jnp.einsum("...r,rD->...D", low, b), (x, kernel, a, b)


def _narrowing_backward(equation, kept, of_y):
  x, kernel, a, b = kept
  inputs, of_kernel, _ = letters(equation)
  # Made anew: it is a small product, and a layer that is made again need not make `y` for it.
  low = jnp.einsum(f"...{inputs},{inputs}r->...r", x, a)
  of_low = jnp.einsum("...D,rD->...r", of_y, b)
  return (
      _of_both(f"...D,{of_kernel}->...{inputs}", of_y, of_low, kernel, a, axis=-1),
      _to_weight(equation, x, kernel, of_y),
      _to_weight(f"...{inputs},{inputs}r->...r", x, a, of_low),
      _to_weight("...r,rD->...D", low, b, of_y),
  )


joined_narrowing.defvjp(_narrowing_forward, _narrowing_backward)


def narrows(equation: str) -> bool:
  """Whether `D` comes out."""
  return letters(equation)[2] == "D"


def _of_both(equation, x, low, kernel, factor, axis):
  both = jnp.concatenate([kernel, factor], axis)
  return jnp.einsum(equation, jnp.concatenate([x, low], axis=-1), both)


def _to_both(equation, x, kernel, factor, axis):
  y = jnp.einsum(equation, x, jnp.concatenate([kernel, factor], axis))
  return jnp.split(y, [kernel.shape[axis]], axis=-1)


def _to_weight(equation, x, weight, of_y):
  """The gradient of a product's second factor."""
  return jax.linear_transpose(lambda w: jnp.einsum(equation, x, w), weight)(of_y)[0]


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
