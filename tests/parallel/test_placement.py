"""Which mesh axes arrays lie on, by the names of their axes."""

import dataclasses

import jax
from jax.sharding import AbstractMesh, AxisType, PartitionSpec
import pytest

from famjax.errors import UserError
from famjax.model import axes
from famjax.model.config import MemoryConfig, ModelConfig
from famjax.model.state import AXES, empty_state
from famjax.parallel.mesh import AXES as MESH_AXES
from famjax.parallel.mesh import MeshConfig, make_mesh
from famjax.parallel.placement import AxisRules, Placement
from famjax.training.config import TrainConfig
from famjax.training.optimizer import OptimizerConfig, make_optimizer
from famjax.training.train_state import abstract, axes_of, init_train_state, param_axes

MODEL = ModelConfig(
    vocab_size=512, num_layers=2, model_dim=256, num_heads=8, num_kv_heads=4, ff_dim=384,
    lora_rank=8, qk_norm="width", qkv_bias=True, norm="layer", tie_embeddings=False,
    memory=MemoryConfig("fam", block_size=4, memory_segments=1, fam_length=2),
)  # fmt: skip


def placement(data=2, fsdp=4, tensor=4, **rules):
  mesh = AbstractMesh((data, fsdp, tensor), MESH_AXES, axis_types=(AxisType.Auto,) * 3)
  return Placement(mesh, AxisRules(**rules))


def test_there_is_a_rule_for_every_name_and_no_other():
  assert {field.name for field in dataclasses.fields(AxisRules)} == set(axes.NAMES)


PREFIX = dataclasses.replace(MODEL.memory, fam_init="prefix")


@pytest.mark.parametrize("model", [MODEL, dataclasses.replace(MODEL, lora_rank=0, memory=PREFIX)])
def test_every_axis_of_every_parameter_has_a_name(model):
  shapes = abstract(model)[1]
  named = param_axes(model)
  check = lambda x, names: len(x.shape) == len(names) and set(names) <= set(axes.NAMES)
  assert all(jax.tree.leaves(jax.tree.map(check, shapes, named)))


def test_names_of_a_state_fit_its_arrays():
  state = jax.eval_shape(lambda: empty_state(MODEL, 8))
  assert all(len(AXES[name]) == x.ndim for name, x in vars(state).items() if x is not None)


def test_weights_are_split_over_fsdp_and_tensor():
  found = jax.tree.map(
      lambda s: s.spec, placement().shardings(abstract(MODEL)[1], param_axes(MODEL))
  )
  assert found["embedder"]["embedding"] == PartitionSpec("tensor", "fsdp")
  assert found["layers"]["attention"]["query"]["kernel"] == PartitionSpec(None, "fsdp", "tensor", None)
  assert found["layers"]["feedforward"]["down"]["lora_b"] == PartitionSpec(None, None, "fsdp")


def test_rows_are_split_over_data_and_fsdp():
  assert placement().spec(("batch", None), (16, 3)) == PartitionSpec(("data", "fsdp"), None)
  assert placement().row_parts == 8


def test_key_heads_that_do_not_come_out_are_whole():
  assert placement().spec(("embed", "kv_heads", "head"), (256, 1, 64))[1] is None
  assert placement().spec(("embed", "kv_heads", "head"), (256, 4, 64))[1] == "tensor"


def test_mesh_axes_of_one_device_are_left_out():
  assert placement(data=1, fsdp=1).spec(("batch", "embed"), (3, 5)) == PartitionSpec(None, None)


@pytest.mark.parametrize(
    "rules, message",
    [
        (dict(mlp="fsdp"), "down.kernel: mlp and embed both lie on the mesh axis 'fsdp'"),
        (dict(heads=("data", "tensor"), embed=("data", "fsdp")), "both lie on the mesh axis 'data'"),
    ],
)
def test_two_axes_on_one_mesh_axis_are_an_error(rules, message):
  with pytest.raises(UserError, match=message):
    placement(**rules).shardings(abstract(MODEL)[1], param_axes(MODEL))


def test_an_axis_that_does_not_come_out_is_an_error():
  with pytest.raises(UserError, match="embedding: vocab is 510, and the mesh splits it into 4"):
    odd = dataclasses.replace(MODEL, vocab_size=510)
    placement().shardings(abstract(odd)[1], param_axes(odd))


def test_a_mesh_axis_that_there_is_not_is_an_error():
  with pytest.raises(UserError, match="AxisRules.mlp: there is no mesh axis 'model'"):
    AxisRules(mlp="model").validate()


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_optimizers_slots_lie_where_their_parameters_do(name):
  """Adafactor keeps a row and a column of each large matrix: they have one axis less."""
  model = dataclasses.replace(MODEL, lora_rank=0)
  optimizer = make_optimizer(OptimizerConfig(name), 10)
  start = lambda p: init_train_state(p, optimizer, model, TrainConfig(rsp_probability=0.5), 8)
  state = jax.eval_shape(start, abstract(model)[1])
  names = axes_of(state, model)
  found = jax.tree.map(lambda s: s.spec, placement().shardings(state, names))
  for slot in jax.tree.leaves(found.opt_state, is_leaf=lambda x: isinstance(x, dict)):
    if isinstance(slot, dict):
      spec = slot["layers"]["feedforward"]["gate"]["kernel"]  # [2, 256, 384]
      assert spec in (
          PartitionSpec(None, "fsdp", "tensor"), PartitionSpec(None, "fsdp"),
          PartitionSpec(None, "tensor"), PartitionSpec(None),
      )  # fmt: skip
  kernel = lambda slot: slot["layers"]["feedforward"]["gate"]["kernel"]
  if name == "adamw":
    assert kernel(found.opt_state[1].mu) == PartitionSpec(None, "fsdp", "tensor")
  else:
    factors = found.opt_state[1]
    assert kernel(factors.v_row) == PartitionSpec(None, "fsdp")
    assert kernel(factors.v_col) == PartitionSpec(None, "tensor")
  assert found.kept_fam == PartitionSpec(None, None, None)


@pytest.mark.parametrize(
    "config, sizes",
    [
        (MeshConfig(), (1, 8, 1)), (MeshConfig(-1, 2, 2), (2, 2, 2)),
        (MeshConfig(2, 4, 1), (2, 4, 1)), (MeshConfig(tensor=8), (1, 1, 8)),
    ],
)  # fmt: skip
def test_sizes_of_a_mesh(config, sizes):
  assert tuple(config.sizes(8).values()) == sizes


@pytest.mark.parametrize(
    "config, message",
    [
        (MeshConfig(data=3), "data 3 x fsdp -1 x tensor 1 does not come out on 8 devices"),
        (MeshConfig(2, 2, 1), "does not come out on 8 devices"),
        (MeshConfig(-1, -1), "more than one mesh axis is -1"),
        (MeshConfig(tensor=0), "mesh axis tensor is 0"),
        (MeshConfig(data=16), "does not come out"),
    ],
)
def test_a_mesh_that_does_not_come_out_is_an_error(config, message):
  with pytest.raises(UserError, match=message):
    config.sizes(8)


def test_a_batch_on_one_device():
  import numpy as np  # pylint: disable=import-outside-toplevel

  here = Placement(make_mesh(devices=jax.devices()[:1]))
  assert here.rows(6) == (0, 1, 2, 3, 4, 5)
  batch = here.batch({"tokens": np.arange(12).reshape(6, 2)}, here.rows(6), 6)
  np.testing.assert_array_equal(batch["tokens"], np.arange(12).reshape(6, 2))
  assert batch["tokens"].shape == (6, 2) and batch["tokens"].sharding.mesh.shape["fsdp"] == 1


@pytest.mark.parametrize(
    "rows, accumulate, parts, message",
    [(12, 1, 8, "12 rows cannot be dealt out evenly to 8 devices: .* multiple of 8"),
     (16, 4, 8, "8 devices and 4 microbatches: .* multiple of 32"), (6, 4, 1, "accumulate 4 does")],
)  # fmt: skip
def test_rows_that_cannot_be_dealt_out_are_an_error(rows, accumulate, parts, message):
  with pytest.raises(UserError, match=message):
    TrainConfig(accumulate=accumulate).check_batch_size(rows, parts)
