"""An import needs little more memory than the checkpoint has bytes."""

import subprocess
import sys

import jax
import numpy as np
import pytest

from famjax.convert import hf
from famjax.model.config import MemoryConfig, ModelConfig
from famjax.training.parameters import count

CONFIG = ModelConfig(
    vocab_size=20_000, num_layers=12, model_dim=768, num_heads=12, ff_dim=2304,
    memory=MemoryConfig("full", 512, 0),
)  # fmt: skip
# Peak of a process after its imports, and after the command; both in KiB.
SCRIPT = """
import resource, sys
import jax
from famjax import cli, conversion
jax.block_until_ready(jax.numpy.ones(3) + 1)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
assert cli.main(["convert", "--from=hf", *sys.argv[1:]]) == 0
print("peak", before, peak())
"""


@pytest.mark.slow
def test_the_peak_of_an_import(tmp_path):
  """1.3 times the checkpoint, and 48 MiB for the code of what writes, which is loaded meanwhile."""
  draw = np.random.default_rng(0)
  shapes = hf.shapes(CONFIG)
  params = {name: draw.standard_normal(shape, np.float32) for name, shape in shapes.items()}
  tree = hf.traverse_util.unflatten_dict(params, sep="/")
  hf.write(tmp_path / "in", jax.tree.map(jax.numpy.asarray, tree), CONFIG)
  size = 4 * count(tree)
  assert size > 400e6
  arguments = [f"--src={tmp_path / 'in'}", f"--dst={tmp_path / 'out'}"]
  done = subprocess.run(
      [sys.executable, "-c", SCRIPT, *arguments], check=True, capture_output=True, text=True
  )
  _, before, after = done.stdout.splitlines()[-1].split()
  assert (int(after) - int(before)) * 1024 < 1.3 * size + 48 * 2**20
