"""Gradients of weights that a loop uses in every turn, made once for all turns.

The feedback loop multiplies a few vectors by all of a layer's matrices, block after block. A scan's
backward pass would add a whole matrix's gradient to a sum in every turn, which moves far more bytes
than the vectors' own products. Here a turn leaves behind what went into each product and the gradient
of what came out, a few vectors each, and one product over all turns makes the gradient of a matrix. Blocks
that are written out, tokens and all, have taps for another reason: each gradient would go over devices.

    taps = make_taps(function, weights, turns, x)          zeros, one for each turn
    in a turn:  y = listen(function(stop_gradient(weights), x), x, tap)

The gradient of a tap is by definition `(x, gradient of y)`; that of `make_taps` makes of all of them
the weights' gradient.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Tap = tuple[jax.Array, jax.Array]


def make_taps(
    function: Callable[[Any, jax.Array], jax.Array],
    weights: Any,
    turns: int,
    x: jax.ShapeDtypeStruct,
) -> Tap:
  """Zeros to hand to `listen`, one in each turn of a loop.

  Args:
    function: of weights and `x`, each row of which it takes for itself; there may be more axes of
      rows, for several turns at once.
    weights: a pytree of arrays, which get their gradient here.
    turns: T.
    x: what a turn gives to the function, `[B, ...]`.

  Returns:
    `[T, *x.shape]` and `[T, *y.shape]`, for a loop to go over.
  """

  def zeros(weights):
    y = jax.eval_shape(function, weights, x)
    return tuple(jnp.zeros((turns, *one.shape), one.dtype) for one in (x, y))

  make = jax.custom_vjp(zeros)

  def backward(weights, gradients):
    # Rows before turns: of devices that share the rows each then multiplies its own.
    every_x, of_every_y = (jnp.swapaxes(x, 0, 1) for x in gradients)
    return jax.vjp(lambda weights: function(weights, every_x), weights)[1](of_every_y)

  make.defvjp(lambda weights: (zeros(weights), weights), backward)
  return make(weights)


@jax.custom_vjp
def listen(y: jax.Array, x: jax.Array, tap: Tap) -> jax.Array:
  """`y`, made of `x` in this turn; the tap hears of both in the backward pass."""
  del x, tap
  return y


def _listen_forward(y, x, tap):
  del tap
  return y, x


def _listen_backward(x, of_y):
  return of_y, jnp.zeros_like(x), (x, of_y)


listen.defvjp(_listen_forward, _listen_backward)
