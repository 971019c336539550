"""Where every array of the paper's three runs lies, against what is written down beside this file.

    python -m tests.parallel.test_snapshots     # writes it down anew; look at the difference
"""

import pathlib

import jax
from jax.sharding import AbstractMesh, AxisType
import pytest

from famjax import configuration
from famjax.model import axes, grid
from famjax.parallel.mesh import AXES
from famjax.parallel.placement import Placement
from famjax.training import trainable
from famjax.training.optimizer import make_optimizer
from famjax.training.train_state import abstract, axes_of, init_train_state
from tests.model import cases

SIZES = {"1b": 32, "8b": 64, "24b": 128}  # and their chips
PLACE = pathlib.Path(__file__).with_name("snapshots")


def run_of(size: str) -> dict:
  """What the gin files of a size make."""
  files = ["gin/runs/finetune_flan.gin", f"gin/models/flan_{size}.gin", f"gin/slices/flan_{size}.gin"]
  return configuration.run_from_gin(files, ["ModelConfig.vocab_size=256000"])


def snapshot(size: str) -> str:
  """One line for every array of the training state: name, shape, dtype, mesh axes."""
  run = run_of(size)
  sizes = run["mesh"].sizes(SIZES[size])
  mesh = AbstractMesh(tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES))
  model, optimizer = run["model"], make_optimizer(run["optimizer"], 10)

  def begin(params):
    trained, frozen = trainable.part(params, trainable.choose(None, model))
    return init_train_state(trained, optimizer, model, run["config"], run["batch_size"], frozen)

  state = jax.eval_shape(begin, abstract(model)[1])
  placed = Placement(mesh, run["rules"]).shapes(state, axes_of(state, model))
  lines = [f"mesh {' x '.join(f'{name} {size}' for name, size in sizes.items())}"]
  for path, x in jax.tree_util.tree_leaves_with_path(placed):
    name = jax.tree_util.keystr(path, simple=True, separator=".")
    on = ["whole" if axes is None else str(axes).replace("'", "") for axes in x.sharding.spec]
    lines.append(f"{name}  {list(x.shape)} {x.dtype}: {', '.join(on) or 'whole'}")
  return "\n".join(lines) + "\n"


@pytest.mark.parametrize("size", SIZES)
def test_shardings_are_those_that_are_written_down(size):
  assert snapshot(size) == (PLACE / f"flan_{size}.txt").read_text()


def test_a_fam_goes_with_its_tokens():
  for size in SIZES:
    run = run_of(size)
    blocks = run["length"] // run["model"].memory.block_size
    with axes.placed_by(cases.On("tpu")):
      assert grid.order_of(run["model"], blocks) == "with_tokens"


def test_every_large_frozen_weight_is_split():
  for size in SIZES:
    lines = (PLACE / f"flan_{size}.txt").read_text().splitlines()
    kernels = [line for line in lines if line.startswith("frozen.") and "scale" not in line]
    assert len(kernels) == 8 and all("fsdp" in line for line in kernels)


if __name__ == "__main__":
  PLACE.mkdir(exist_ok=True)
  for one in SIZES:
    (PLACE / f"flan_{one}.txt").write_text(snapshot(one))
