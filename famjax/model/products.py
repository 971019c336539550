"""Products that keep the float32 of their sums: logits, attention's scores, what it takes of the values.

What comes back to such a product is rounded to the dtype of its factors first, as it is at any other:
float32 factors take the backward pass off a device's fast units, and are twice the bytes.
"""

import functools

import jax
import jax.numpy as jnp

from famjax.model import axes


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def float32_product(equation: str, x: jax.Array, y: jax.Array) -> jax.Array:
  """`jnp.einsum` of two arrays with a float32 result. It has no forward-mode derivative.

  Args:
    equation: as "...D,VD->...V", where `...` are axes of `x` alone, and it and the result have one axis
      more; or as "BTgd,BTmd->BTgm", where all have the same first axes.
    x: `[..., D]`.
    y: is cast to the dtype of `x`.

  Returns:
    float32 `[..., V]`.
  """
  return _product(equation, x, y)


def _product(equation, x, y):
  return jnp.einsum(equation, x, y.astype(x.dtype), preferred_element_type=jnp.float32)


def _forward(equation, x, y):
  return _product(equation, x, y), (x, y)  # a product that `decoder.remat` "dots" sees


def _backward(equation, kept, given):
  x, y = kept
  given = given.astype(x.dtype)
  of_x, of_y, of_out = letters(equation)
  to_x = jnp.einsum(f"...{of_out},{of_y}->...{of_x}", given, y.astype(x.dtype))
  if "..." in equation:
    x, given = (a.reshape(-1, a.shape[-1]) for a in (x, given))
    of_x, of_out = f"n{of_x}", f"n{of_out}"
  # XLA for CPUs turns the first factor over: a head's vectors, mostly narrower than their number, take
  # it a third of the time that scores do.
  turned = axes.platform() == "cpu" and "..." not in equation
  order = of_y[:-2] + of_y[-1] + of_y[-2] if turned else of_y
  to_y = jnp.einsum(f"{of_out},{of_x}->{order}", given, x, preferred_element_type=jnp.float32)
  return to_x, (jnp.swapaxes(to_y, -1, -2) if turned else to_y).astype(y.dtype)


float32_product.defvjp(_forward, _backward)


def letters(equation: str) -> list[str]:
  """Inputs, the other factor's axes and outputs, a letter each: of "...Hd,HdD->...D" Hd, HdD and D."""
  return equation.replace("...", "").replace("->", ",").split(",")
