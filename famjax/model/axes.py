"""Names of the axes of arrays; where an axis lies on a mesh of devices is not the model's business.

Parameters carry names (`nnx.Param(..., axes=...)`), states have `state.AXES`, and activations are
named where they are made, by `constrain`. A `famjax.parallel.placement.Placement` knows what the
names mean; without one, which is the default, every function here gives back what it was given.
"""

import contextlib
import contextvars
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from flax import nnx
import jax

# Of parameters, and what they stand for. `embed` is D, `width` is D of activations.
NAMES = (
    "layers", "vocab", "embed", "heads", "kv_heads", "head", "mlp", "lora", "fam", "batch", "width",
)  # fmt: skip
Axes = tuple[str | None, ...]


class Placement(Protocol):
  """Where named axes lie."""

  def constrain(self, x: jax.Array, axes: Axes) -> jax.Array:
    """`x`, where an array of these axes has to lie."""

  def gather(self, weight: jax.Array, axes: Axes) -> jax.Array:
    """A weight as a layer uses it: whole, but for the axes that products are split over."""

  def on_parts(
      self, function: Callable[..., jax.Array], arrays: Sequence[jax.Array], axes: Sequence[Axes]
  ) -> jax.Array:
    """See the function of this name."""

  def is_split(self, axes: Axes, shape: tuple[int, ...]) -> bool:
    """Whether axes of a weight, of this shape, are in parts on several devices."""

  @property
  def platform(self) -> str:
    """Of its devices."""


_placement: contextvars.ContextVar[Placement | None]
_placement = contextvars.ContextVar("placement", default=None)


@contextlib.contextmanager
def placed_by(placement: Placement | None):
  """What is traced in this context is placed so."""
  token = _placement.set(placement)
  try:
    yield
  finally:
    _placement.reset(token)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
  """Says where an activation lies, by the names of its axes."""
  placement = _placement.get()
  return x if placement is None else placement.constrain(x, axes)


def gather(weights):
  """Weights as they are used, of a module or a part of `nnx.split`'s state.

  Called where a layer begins, it gathers them once, and not once for every block that uses them.
  """
  placement = _placement.get()
  if placement is None:
    return weights
  is_weight = lambda x: isinstance(x, nnx.Variable)
  one = lambda x: x.replace(placement.gather(x[...], x.get_metadata("axes")))
  return jax.tree.map(one, weights, is_leaf=is_weight)


def on_parts(
    function: Callable[..., jax.Array], arrays: Sequence[jax.Array], axes: Sequence[Axes]
) -> jax.Array:
  """Calls a kernel, which the compiler cannot split, on each device's part of its arrays.

  Args:
    function: of so many arrays; what it gives back lies as the first of them.
    arrays: what it is called with.
    axes: names of each one's axes.
  """
  placement = _placement.get()
  return function(*arrays) if placement is None else placement.on_parts(function, arrays, axes)


def is_split(axes: Axes, shape: tuple[int, ...]) -> bool:
  """Whether a product's outputs of these axes lie on several devices."""
  placement = _placement.get()
  return placement is not None and placement.is_split(axes, shape)


def platform() -> str:
  """Kind of the devices that what is traced now is for: "cpu", "gpu", "tpu"."""
  placement = _placement.get()
  return jax.default_backend() if placement is None else placement.platform


def names(model: nnx.Module) -> dict[str, Any]:
  """A nested dict like `train_state.split`'s parameters, with the names of each one's axes."""
  state = nnx.split(model)[1]

  def of(path, weight):
    axes = weight.get_metadata("axes")
    stacked = path[0].key in ("layers", "memory_layers") and "layers" not in axes
    return ("layers", *axes) if stacked else axes

  is_weight = lambda x: isinstance(x, nnx.Variable)
  return nnx.to_pure_dict(jax.tree_util.tree_map_with_path(of, state, is_leaf=is_weight))
