"""Where arrays lie on a mesh, by the names of their axes."""

from collections.abc import Callable, Sequence
import dataclasses
import math
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np

from famjax.errors import UserError
from famjax.model.axes import Axes
from famjax.parallel.mesh import AXES

MeshAxes = str | tuple[str, ...] | None


@dataclasses.dataclass(frozen=True)
class AxisRules:
  """The mesh axes that a named axis is split over, of every name that arrays have (`model.axes`).

  Attributes:
    batch: rows.
    embed: D of weights. It is whole again where a layer uses them.
    vocab: V.
    heads: H, query heads.
    kv_heads: K. Where the mesh does not divide it, as the one of multi-query attention, it is whole.
    mlp: the feed-forward's hidden width.
    width: D of activations.
    layers: L. Layers are gone through one after another: splitting them only costs.
    head: d.
    lora: LoRA's rank.
    fam: F.
  """

  batch: MeshAxes = ("data", "fsdp")
  embed: MeshAxes = "fsdp"
  vocab: MeshAxes = "tensor"
  heads: MeshAxes = "tensor"
  kv_heads: MeshAxes = "tensor"
  mlp: MeshAxes = "tensor"
  width: MeshAxes = None
  layers: MeshAxes = None
  head: MeshAxes = None
  lora: MeshAxes = None
  fam: MeshAxes = None

  def of(self, name: str | None) -> tuple[str, ...]:
    """Mesh axes of a name; None has none."""
    axes = getattr(self, name) if name else None
    return (axes,) if isinstance(axes, str) else tuple(axes or ())

  def validate(self) -> None:
    """Raises UserError for a mesh axis that there is not."""
    for field in dataclasses.fields(self):
      for axis in self.of(field.name):
        if axis not in AXES:
          raise UserError(
              f"AxisRules.{field.name}: there is no mesh axis {axis!r}; choose of {', '.join(AXES)}"
          )


@dataclasses.dataclass(frozen=True)
class Placement:
  """A mesh, and what names mean on it; see `famjax.model.axes`.

  Attributes:
    mesh: of devices.
    rules: of names.
  """

  mesh: Mesh
  rules: AxisRules = AxisRules()

  def spec(self, axes: Axes, shape: tuple[int, ...], what: str = "an array") -> PartitionSpec:
    """The mesh axes of each axis of an array.

    Args:
      axes: names.
      shape: sizes, as many.
      what: the array's name, for errors.

    Raises:
      UserError: two axes lie on the same mesh axis, or the mesh does not divide one.
    """
    spec, taken = [], {}
    for name, size in zip(axes, shape, strict=True):
      on = tuple(axis for axis in self.rules.of(name) if self.mesh.shape[axis] > 1)
      parts = math.prod(self.mesh.shape[axis] for axis in on)
      if name == "kv_heads" and size % parts:
        on, parts = (), 1
      if size % parts:
        raise UserError(
            f"{what}: {name} is {size}, and the mesh splits it into {parts} ({' x '.join(on)}):"
            f" choose another mesh, or set AxisRules.{name} to None"
        )
      for axis in on:
        if axis in taken:
          raise UserError(
              f"{what}: {taken[axis]} and {name} both lie on the mesh axis {axis!r}: change"
              f" AxisRules.{taken[axis]} or AxisRules.{name}"
          )
        taken[axis] = name
      spec.append(on[0] if len(on) == 1 else on or None)
    return PartitionSpec(*spec)

  def sharding(self, axes: Axes, shape: tuple[int, ...], what: str = "an array") -> NamedSharding:
    """`spec` on the mesh."""
    return NamedSharding(self.mesh, self.spec(axes, shape, what))

  def shardings(self, tree: Any, axes: Any) -> Any:
    """Where the arrays of a tree lie.

    Args:
      tree: of arrays, or of shapes.
      axes: the same tree, with the names of each array's axes; None: it is whole everywhere.
    """

    def of(path, x, axes):
      axes = (None,) * x.ndim if axes is None else axes
      return self.sharding(axes, x.shape, jax.tree_util.keystr(path, simple=True, separator="."))

    return jax.tree_util.tree_map_with_path(of, tree, axes)

  def shapes(self, tree: Any, axes: Any) -> Any:
    """The tree's shapes and dtypes, each with its sharding."""
    shape = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    return jax.tree.map(shape, tree, self.shardings(tree, axes))

  def constrain(self, x: jax.Array, axes: Axes) -> jax.Array:
    """See `famjax.model.axes`."""
    return jax.lax.with_sharding_constraint(x, self.sharding(axes, x.shape, "an activation"))

  def gather(self, weight: jax.Array, axes: Axes) -> jax.Array:
    """See `famjax.model.axes`: `embed` is whole."""
    kept = tuple(None if name == "embed" else name for name in axes)
    return jax.lax.with_sharding_constraint(weight, self.sharding(kept, weight.shape, "a weight"))

  def on_parts(
      self, function: Callable[..., jax.Array], arrays: Sequence[jax.Array], axes: Sequence[Axes]
  ) -> jax.Array:
    """See `famjax.model.axes`."""
    specs = tuple(self.spec(names, x.shape, "an array of a kernel") for x, names in zip(arrays, axes))
    split = jax.shard_map(
        function, mesh=self.mesh, in_specs=specs, out_specs=specs[0], check_vma=False
    )
    return split(*arrays)

  def is_split(self, axes: Axes, shape: tuple[int, ...]) -> bool:
    """See `famjax.model.axes`."""
    return any(self.spec(axes, shape, "a weight"))

  @property
  def platform(self) -> str:
    """See `famjax.model.axes`."""
    return self.mesh.devices.flat[0].platform

  @property
  def whole(self) -> NamedSharding:
    """Of an array that every device has all of."""
    return NamedSharding(self.mesh, PartitionSpec())

  @property
  def row_parts(self) -> int:
    """Parts that the rows of a batch are split into."""
    return math.prod(self.mesh.shape[axis] for axis in self.rules.of("batch"))

  def rows(self, batch_size: int) -> tuple[int, ...]:
    """Numbers of the rows that this process's devices work on; they need not be side by side."""
    sharding = self.sharding(("batch",), (batch_size,), "a batch")
    places = sharding.addressable_devices_indices_map((batch_size,)).values()
    rows = {row for (place,) in places for row in range(*place.indices(batch_size))}
    return tuple(sorted(rows))

  def batch(
      self, local: dict[str, np.ndarray], rows: tuple[int, ...], batch_size: int
  ) -> dict[str, jax.Array]:
    """A batch `[B, ...]` on the mesh, of which this process has read `rows`."""

    def put(x):
      shape = (batch_size, *x.shape[1:])
      sharding = self.sharding(("batch", *(None,) * (x.ndim - 1)), shape, "a batch")

      def part(index):
        first, last, _ = index[0].indices(batch_size)
        at = int(np.searchsorted(rows, first))
        return x[at : at + last - first][(slice(None), *index[1:])]

      return jax.make_array_from_callback(shape, sharding, part)

    return jax.tree.map(put, local)


def put(tree: Any, shardings: Any) -> Any:
  """Arrays that every process has all of, as those of a mesh; what is on one already stays there."""

  def one(x, sharding):
    if sharding.is_fully_addressable:
      return jax.device_put(x, sharding)
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
      return x
    x = np.asarray(x)
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

  return jax.tree.map(one, tree, shardings)
