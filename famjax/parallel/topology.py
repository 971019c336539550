"""Chips that are not here: TPU slices by name, which the compiler takes for the real thing."""

import os
from typing import Sequence

import jax

from famjax.errors import UserError

# Bytes of a chip's memory, by the kind that its device names (cloud.google.com/tpu/docs, "System
# architecture"); for a chip of two cores that are devices of their own, of each.
HBM_BYTES = {
    "TPU v4": 32 << 30, "TPU v5 lite": 16 << 30, "TPU v5": 95 << 30, "TPU v6 lite": 32 << 30,
}  # fmt: skip

# libtpu asks around which machine of a slice this is, and warns; any answer will do. It also locks
# the chips that it takes, and here it takes none.
_ALONE = {
    "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}  # fmt: skip


def devices_of(name: str, slices: int = 1) -> Sequence[jax.Device]:
  """The devices of a slice, for ahead-of-time compilation. libtpu is needed, a TPU is not.

  Args:
    name: generation and shape in chips, "v5e:4x8", "v5p:4x4x8".
    slices: how many of them, for a multi-slice machine.

  Raises:
    UserError: libtpu is missing or does not know the name.
  """
  from jax.experimental import topologies  # pylint: disable=import-outside-toplevel

  for variable, value in _ALONE.items():
    os.environ.setdefault(variable, value)
  try:
    import libtpu  # noqa: F401  # pylint: disable=import-outside-toplevel,unused-import
  except ImportError as e:
    raise UserError(
        "compiling for a TPU needs its compiler: install the extra tpu, pip install 'famjax[tpu]'"
    ) from e
  try:
    described = topologies.get_topology_desc(
        platform="tpu", topology_name=name, num_slices=slices
    )
    return described.devices
  except Exception as e:  # it raises anything
    raise UserError(
        f"--topology={name}: the TPU compiler does not know it"
        f" ({str(e).splitlines()[0][:120]}); give generation and chips, v5e:4x8 or v5p:4x4x8, say"
    ) from e


def hbm_bytes(device: jax.Device) -> int | None:
  """Bytes of memory of a device; None: not known."""
  return HBM_BYTES.get(device.device_kind)
