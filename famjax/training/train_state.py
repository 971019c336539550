"""Everything that the next training step depends on, but the data: one pytree."""

from typing import Any

from flax import nnx
from flax import struct
from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax

from famjax.model import axes, state
from famjax.model.config import ModelConfig
from famjax.model.decoder import Decoder
from famjax.model.state import State, empty_state
from famjax.training.config import TrainConfig

Params = dict[str, Any]


@struct.dataclass
class TrainState:
  """The state of a run between two steps.

  Attributes:
    step: int32 scalar, steps done.
    params: nested dict of the parameters that are trained, named as in `Decoder`.
    frozen: the other ones, see `trainable`; {} if all are trained.
    opt_state: optax's.
    rng: uint32 `[2]`, key data of the run's seed; step `s` draws from `fold_in(rng, s)`, so that it
      never changes.
    carry: where each row stopped, if rows are followed; else None.
    kept_fam: `[L, F, D]`, row 0's FAM after its last full block (random state passing, B.2.3); None
      if it is off or there is no FAM.
    kept_updates: int32 scalar, times that `kept_fam` was written; 0: nothing is kept yet.
  """

  step: jax.Array
  params: Params
  frozen: Params
  opt_state: optax.OptState
  rng: jax.Array
  carry: State | None
  kept_fam: jax.Array | None
  kept_updates: jax.Array | None


def split(model: nnx.Module) -> tuple[nnx.GraphDef, Params]:
  """Parts a model into its structure, a static value, and its parameters, a nested dict of arrays.

  `nnx.merge(graphdef, params)` makes it whole again.
  """
  graphdef, params = nnx.split(model)
  return graphdef, nnx.to_pure_dict(params)


def abstract(config: ModelConfig) -> tuple[nnx.GraphDef, Params]:
  """`split` of a configuration's `Decoder`, with shapes and dtypes in place of weights."""
  return split(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))


def param_axes(config: ModelConfig) -> dict[str, Any]:
  """Names of the axes of each parameter (`famjax.model.axes`), a nested dict like `abstract`'s."""
  return axes.names(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))


def axes_of(template: TrainState, model: ModelConfig) -> TrainState:
  """A state with the names of each array's axes (`famjax.model.axes`) in place of the array.

  None stands for an array that is whole on every device.

  Args:
    template: of shapes; parameters may be trained or frozen.
    model: whose they are.
  """
  named = traverse_util.flatten_dict(param_axes(model))
  shapes = traverse_util.flatten_dict(template.params)

  def of_slot(path, x):
    """Optimizers keep trees like the parameters; Adafactor's have one axis less."""
    keys = tuple(entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey))
    if keys not in shapes:
      return None
    names, shape = named[keys], shapes[keys].shape
    if x.shape == shape:
      return names
    field = [entry.name for entry in path if isinstance(entry, jax.tree_util.GetAttrKey)][-1]
    if len(shape) < 2 or field not in ("v_row", "v_col"):
      return None
    lost = np.argsort(shape)[-1 if field == "v_row" else -2]  # as optax chooses the two to factor
    kept = [i for i in range(len(shape)) if i != lost]
    return tuple(names[i] for i in kept) if x.shape == tuple(shape[i] for i in kept) else None

  of_params = lambda params: traverse_util.unflatten_dict(
      {path: named[path] for path in traverse_util.flatten_dict(params)}
  )
  return TrainState(
      step=None,
      params=of_params(template.params),
      frozen=of_params(template.frozen),
      opt_state=jax.tree_util.tree_map_with_path(of_slot, template.opt_state),
      rng=None,
      carry=None if template.carry is None else state.axes_of(template.carry),
      kept_fam=None if template.kept_fam is None else ("layers", "fam", "width"),
      kept_updates=None,
  )


def init_train_state(
    params: Params,
    optimizer: optax.GradientTransformation,
    model_config: ModelConfig,
    config: TrainConfig,
    batch_size: int,
    frozen: Params | None = None,
) -> TrainState:
  """The state before the first step.

  Args:
    params: initial parameters, those that are trained.
    optimizer: gives the optimizer's state.
    model_config: gives the shapes of the carried state and of the kept FAM.
    config: `seed`, `follow_rows`, `rsp_probability`.
    batch_size: B, rows of a batch.
    frozen: the other parameters.
  """
  L, F, D = model_config.num_layers, model_config.memory.length, model_config.model_dim
  passing = config.rsp_probability > 0 and F > 0
  return TrainState(
      step=jnp.int32(0),
      params=params,
      frozen={} if frozen is None else frozen,
      opt_state=optimizer.init(params),
      rng=jax.random.key_data(jax.random.key(config.seed)),
      carry=empty_state(model_config, batch_size) if config.follow_rows else None,
      kept_fam=jnp.zeros((L, F, D), model_config.compute_dtype) if passing else None,
      kept_updates=jnp.int32(0) if passing else None,
  )
