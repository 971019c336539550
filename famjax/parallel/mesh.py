"""A mesh of devices.

`data` and `fsdp` split the rows of a batch, `fsdp` the weights as well, `tensor` products.
"""

import dataclasses
import math
from typing import Sequence

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh
import numpy as np

from famjax.errors import UserError

AXES = ("data", "fsdp", "tensor")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """Devices along each axis of the mesh; -1, of one axis at most, for what is left.

  Attributes:
    data: copies of the weights; each reads other rows. Slices of a multi-slice machine are split
      over this axis alone, whose devices talk the least.
    fsdp: parts that every weight is cut into; it is put together where a layer uses it. Each part's
      device reads rows of its own.
    tensor: parts that the heads, the feed-forward's hidden width and the vocabulary are cut into.
      Its devices work on the same rows, and talk in every layer.
  """

  data: int = 1
  fsdp: int = -1
  tensor: int = 1

  def validate(self) -> None:
    """Raises UserError for a value that makes no sense."""
    for name in AXES:
      size = getattr(self, name)
      if size < 1 and size != -1:
        raise UserError(f"mesh axis {name} is {size}: use a number of devices, or -1 for the rest")
    if [getattr(self, name) for name in AXES].count(-1) > 1:
      raise UserError("more than one mesh axis is -1: only one can have what is left")

  def sizes(self, devices: int) -> dict[str, int]:
    """The size of each axis on so many devices.

    Raises:
      UserError: they do not come out.
    """
    self.validate()
    sizes = {name: getattr(self, name) for name in AXES}
    known = math.prod(size for size in sizes.values() if size != -1)
    rest = devices // known
    sizes = {name: rest if size == -1 else size for name, size in sizes.items()}
    if math.prod(sizes.values()) != devices:
      said = " x ".join(f"{name} {getattr(self, name)}" for name in AXES)
      raise UserError(
          f"a mesh of {said} does not come out on {devices} devices: change MeshConfig, -1 takes"
          " what is left"
      )
    return sizes


def make_mesh(
    config: MeshConfig = MeshConfig(), devices: Sequence[jax.Device] | None = None
) -> Mesh:
  """A mesh of all devices, or of those given, near ones side by side.

  Raises:
    UserError: the sizes do not come out, or the slices cannot be split over `data`.
  """
  devices = jax.devices() if devices is None else list(devices)
  sizes = config.sizes(len(devices))
  slices = len({getattr(device, "slice_index", 0) for device in devices})
  if slices > 1:
    if sizes["data"] % slices:
      raise UserError(
          f"{slices} slices cannot share a data axis of {sizes['data']}: set MeshConfig.data to a"
          f" multiple of {slices}"
      )
    inner = (sizes["data"] // slices, sizes["fsdp"], sizes["tensor"])
    grid = mesh_utils.create_hybrid_device_mesh(
        inner, (slices, 1, 1), devices, allow_split_physical_axes=True
    )
  elif devices[0].platform == "cpu":
    grid = np.asarray(devices).reshape(tuple(sizes.values()))  # in the order of processes
  else:
    grid = mesh_utils.create_device_mesh(
        tuple(sizes.values()), devices, allow_split_physical_axes=True
    )
  return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))
