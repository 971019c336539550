"""The same seed gives the same losses on every mesh of eight host devices (meshes.py)."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from tests.parallel.meshes import SETTINGS, STEPS

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def found():
  flags = "--xla_force_host_platform_device_count=8 " + os.environ.get("XLA_FLAGS", "")
  done = subprocess.run(
      [sys.executable, "-m", "tests.parallel.meshes"], check=False, text=True, capture_output=True,
      env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
  )  # fmt: skip
  assert done.returncode == 0, done.stderr[-3000:]
  found = json.loads(done.stdout)
  assert found["devices"] == 8
  return found


def test_rows_that_are_apart_stay_apart(found):
  """On a mesh of data alone gradients are added up, and nothing else is sent."""
  assert found["collectives"] == ["all-reduce"]


@pytest.mark.parametrize(
    "setting, mesh", [(name, mesh) for name, (*_, meshes) in SETTINGS.items() for mesh in meshes[1:]]
)
def test_losses_are_those_of_one_device(found, setting, mesh):
  """Sums over devices come in another order: five steps of float32 stay within 1e-5.

  "moved" is a run whose checkpoint was saved on one mesh and restored on another; the "kernel" ones
  are runs whose attention is a kernel, which each device calls on its part.
  """
  alone, here = (np.array(found[f"{setting}: {name}"]) for name in ("one device", mesh))
  looks = "look_every" in SETTINGS[setting][2]
  assert here.shape == alone.shape == (STEPS + looks, 2)
  np.testing.assert_allclose(here, alone, rtol=2e-5)
  assert len(set(alone[:, 0])) == len(alone)  # it learns
