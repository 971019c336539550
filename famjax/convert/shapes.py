"""Shapes of the parameters of a model, without making it."""

import functools

from flax import nnx, traverse_util
import jax

from famjax.model.config import MEMORY_WEIGHTS, ModelConfig
from famjax.model.decoder import Decoder


def shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
  """Returns the shapes of all parameters but the memory's, by path."""
  return {name: leaf.shape for name, leaf in all_leaves(config).items() if not of_memory(name)}


@functools.lru_cache(maxsize=64)
def all_leaves(config: ModelConfig) -> dict[str, jax.ShapeDtypeStruct]:
  """Returns the shapes and dtypes of all parameters, by path. Do not change the dict."""
  _, params = nnx.split(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))
  return traverse_util.flatten_dict(nnx.to_pure_dict(params), sep="/")


def of_memory(name: str) -> bool:
  """Returns whether a parameter belongs to the memory, by its path."""
  return name.partition("/")[0] in MEMORY_WEIGHTS
