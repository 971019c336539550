"""A run's parameters from another one's checkpoint: what is taken, merged, drawn anew."""

from collections.abc import Callable
import dataclasses

import jax
import numpy as np

from famjax.model import lora
from famjax.model.config import FAM_WEIGHTS, HOW_IT_RUNS, MEMORY_WEIGHTS, ModelConfig
from famjax.parallel.placement import Placement
from famjax.training import trainable
from famjax.training.checkpoint import Loaded, check_model, check_vocabulary
from famjax.training.checkpoint import load_params, read_model
from famjax.training.config import TrainConfig
from famjax.training.train_state import Params
from famjax.training.trainable import join

_OTHER_MEMORY = tuple(name for name in MEMORY_WEIGHTS if name not in FAM_WEIGHTS)
_LORA = ("lora_rank", "lora_alpha", "lora_targets")
# What a checkpoint's model may have otherwise when its parameters start another run.
MAY_DIFFER = ("memory", *HOW_IT_RUNS, "compute_dtype", "param_dtype", *_LORA)


def model_of(
    checkpoint: str, options: ModelConfig, *, param_dtype: str | None = None
) -> ModelConfig:
  """The configuration of a checkpoint's network, with what else `options` says.

  Args:
    checkpoint: as `TrainConfig.init_checkpoint`.
    options: memory, LoRA, dtype and how it runs are taken from it, and nothing else.
    param_dtype: of the new run; None: the checkpoint's.

  Raises:
    UserError: there is no checkpoint.
  """
  found = read_model(checkpoint)
  taken = {name: getattr(options, name) for name in MAY_DIFFER}
  return dataclasses.replace(found, **taken | {"param_dtype": param_dtype or found.param_dtype})


def from_checkpoint(
    config: TrainConfig,
    model: ModelConfig,
    vocabulary: str,
    fresh_params: Callable[[], Params],
    placement: Placement | None = None,
) -> tuple[Params, ModelConfig, list[str]]:
  """Another checkpoint's parameters as those of a model.

  Args:
    config: `init_checkpoint`, `seed`, `objective` and `trainable`.
    model: of the new run.
    vocabulary: its name.
    fresh_params: makes the new run's parameters at random.
    placement: where they lie, as far as they are the checkpoint's; None: on one device.

  Returns:
    The parameters, the configuration that the checkpoint records, and what there is to say.

  Raises:
    UserError: the checkpoint is of another model or vocabulary.
  """
  path = config.init_checkpoint
  loaded = load_params(path, placement)
  check_model(path, loaded.model, model, MAY_DIFFER)
  check_vocabulary(path, loaded.vocabulary, vocabulary)
  wanted = jax.eval_shape(fresh_params)
  # A teacher is what is frozen: factors that go on would be no part of it.
  anew = config.objective == "distill" and trainable.choose(config.trainable, model) == "lora"
  params, factors = _as_factors(loaded, model, fresh_params, anew)
  notes = [f"starting from the parameters of {path}, step {loaded.step}"]
  notes += [
      f"{name} {list(wanted[name].shape)} is not in it: drawn anew"
      for name in new_fam(wanted, loaded.params)
  ]
  notes += [f"{n}: not in it, drawn anew" for n in _new_memory(wanted, loaded.params)]
  return adopt(wanted, params, config.seed, factors, fresh_params), loaded.model, notes


def _as_factors(
    loaded: Loaded, model: ModelConfig, fresh_params: Callable[[], Params], anew: bool = False
) -> tuple[Params, Params]:
  """A checkpoint's parameters for a model, and the LoRA factors that these lack.

  A checkpoint with the same LoRA goes on with it; another one's, or any one if factors are made
  `anew`, is merged into its matrices.
  """
  theirs, ours = loaded.model.normalised(), model.normalised()
  if anew or any(getattr(theirs, name) != getattr(ours, name) for name in _LORA):
    params, _ = lora.merge(loaded.params, loaded.model)
    if model.lora_rank:
      factors = jax.jit(lambda: trainable.part(fresh_params(), "lora")[0])()
      return params, {name: tree for name, tree in factors.items() if name not in MEMORY_WEIGHTS}
    return params, {}
  return loaded.params, {}


def adopt(
    fresh: Params,
    loaded: Params,
    seed: int,
    lora: Params | None = None,
    fresh_params: Callable[[], Params] | None = None,
) -> Params:
  """Fresh parameters with the loaded ones of the same model in their places.

  A FAM that the checkpoint lacks, or has with another shape (`new_fam`), starts as in the paper
  (SPEC 2, B.1): from the embeddings, here the loaded ones, of tokens drawn at random.

  Args:
    fresh: of the new model.
    loaded: from `load_params`; the two models differ in their memory at most, see `check_model`.
    seed: of the draw.
    lora: LoRA's factors, which the checkpoint lacks.
    fresh_params: makes the new model's parameters at random; the weights of a memory of another kind
      are taken of these where the checkpoint lacks them.
  """
  embedding = loaded["embedder"]["embedding"]
  adopted = {name: value for name, value in loaded.items() if name not in MEMORY_WEIGHTS}
  new = _new_memory(fresh, loaded)
  adopted |= {n: loaded[n] for n in _OTHER_MEMORY if n in fresh and n not in new}
  if new:
    adopted |= jax.jit(lambda: {name: fresh_params()[name] for name in new})()
  for name in FAM_WEIGHTS:
    if name in fresh and name not in new_fam(fresh, loaded):
      adopted[name] = loaded[name]
    elif name in fresh:
      places = fresh[name].shape[:-1]
      drawn = jax.random.randint(jax.random.key(seed), places, 0, embedding.shape[0])
      adopted[name] = embedding[np.asarray(drawn)]  # of no device, so that it goes with any
  adopted = join(adopted, lora or {})
  return jax.tree.map(lambda new, value: value.astype(new.dtype), fresh, adopted)


def _new_memory(fresh: Params, loaded: Params) -> list[str]:
  """Names of a memory's weights, other than a FAM's, that loaded parameters lack or have otherwise."""
  shapes = lambda tree: jax.tree.map(lambda x: x.shape, tree)
  return [
      name
      for name in _OTHER_MEMORY
      if name in fresh and (name not in loaded or shapes(loaded[name]) != shapes(fresh[name]))
  ]


def new_fam(fresh: Params, loaded: Params) -> list[str]:
  """Names of a model's FAM weights that loaded parameters lack, or have with another shape."""
  return [
      name
      for name in FAM_WEIGHTS
      if name in fresh and (name not in loaded or loaded[name].shape != fresh[name].shape)
  ]
