"""Memories of other kinds than BSWA and FAM: what one is, and how it is found.

A `Strategy` says what a layer does with one block of tokens and what it remembers afterwards;
`recurrent.hidden` takes it from block to block. The rivals are in `famjax.model.memories`; one from
elsewhere plugs in by `@register("name")` and an import, or without either by the kind
"module:Class".
"""

from collections.abc import Callable
import dataclasses
import functools
import importlib
from typing import Any, NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from famjax import trust
from famjax.errors import UserError
from famjax.model import rope
from famjax.model.attention import KeySet, attend
from famjax.model.config import BUILT_IN, MemoryConfig, ModelConfig
from famjax.model.layers import Layer

Memory = Any  # a pytree of arrays, of one layer or of the whole model


@dataclasses.dataclass(frozen=True)
class Block:
  """What a strategy is told of the block that it is given.

  Attributes:
    config: of the model; N, M and F are in `config.memory`.
    index: int32 `[B]`, the block's number in its row.
    offset: int32 `[B]`, the row's random position offset (B.2.2).
    before: vectors that stand before the block's tokens, and
    after: behind them, where the strategy has put some.
    past: the keys of the layer's M memory segments, as the block's queries see them.
  """

  config: ModelConfig
  index: jax.Array
  offset: jax.Array
  before: int
  after: int
  past: tuple[KeySet, ...] = ()

  def turn(self, place: np.typing.ArrayLike) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine `[B, n, d/2]` at places `[n]` counted from the block's first token.

    Args:
      place: a list or of NumPy: the program is made for them. An array of JAX is an error.
    """
    start = self.index * self.config.memory.block_size + self.offset
    return rope.rotation(start, place, rope.frequencies(self.config))

  @property
  def places(self) -> np.ndarray:
    """Places `[n]` of all vectors: those before the tokens are negative."""
    return np.arange(-self.before, self.config.memory.block_size + self.after)

  def tokens_of(self, x: jax.Array, axis: int) -> jax.Array:
    """The part of `n` vectors that the block's tokens are."""
    N = self.config.memory.block_size
    return jax.lax.slice_in_dim(x, self.before, self.before + N, axis=axis)


class Output(NamedTuple):
  """What a layer makes of a block.

  Attributes:
    x: `[B, n, D]`, its output.
    memory: after the block, if it is full.
    keys: `[B, K, n, d]`, rotated, and
    values: of all vectors, for the memory segments; None where M is 0 anyway.
    penalty: float32 `[B]`, added to the loss of a full block; None: none.
  """

  x: jax.Array
  memory: Memory
  keys: jax.Array | None = None
  values: jax.Array | None = None
  penalty: jax.Array | None = None


class Strategy:
  """The memory of a decoder; a subclass is a frozen dataclass whose fields are its options.

  What is not overridden is BSWA: Algorithm 1 of the paper, block after block.

  Attributes:
    truncate: blocks of a call after which the memory is cut off from the gradient, again and again;
      0: never.
  """

  truncate: int = 0

  def validate(self, config: MemoryConfig) -> None:
    """Raises UserError for options that make no sense."""

  def extra(self, config: MemoryConfig) -> tuple[int, int]:
    """Vectors that `inputs` puts before a block's tokens, and behind them."""
    return 0, 0

  def weights(self, config: ModelConfig, rngs: nnx.Rngs) -> nnx.Module | None:
    """Parameters that the memory adds to the model; see `param`."""

  def layer_weights(self, config: ModelConfig, rngs: nnx.Rngs) -> nnx.Module | None:
    """Parameters that it adds to each layer."""

  def start(self, weights: nnx.Module | None, config: ModelConfig) -> Memory:
    """What a row that has read nothing remembers beside its layers, without an axis of rows."""
    return ()

  def climb(self, weights: nnx.Module | None, config: ModelConfig) -> Memory:
    """What `layer_start` of the first layer is given."""
    return ()

  def layer_start(
      self, own: nnx.Module | None, layer: Layer, climbing: Memory, config: ModelConfig
  ) -> tuple[Memory, Memory]:
    """What a layer remembers of nothing, and what the next layer's `layer_start` is given."""
    return (), climbing

  def inputs(
      self, weights: nnx.Module | None, x: jax.Array, memory: Memory, block: Block
  ) -> jax.Array:
    """The first layer's input `[B, before + N + after, D]` of embedded tokens `[B, N, D]`."""
    return x

  def layer(
      self, own: nnx.Module | None, layer: Layer, x: jax.Array, memory: Memory, block: Block
  ) -> Output:
    """One layer over one block.

    Args:
      own: its `layer_weights`.
      layer: its other weights.
      x: `[B, n, D]`.
      memory: the layer's, with an axis of rows.
      block: where it stands.
    """
    queries, keys, values = project(layer, x, block)
    attended = attend_causally(layer, queries, keys, values, block.past)
    return Output(layer.close(attended, x), memory, keys, values)

  def outputs(
      self, weights: nnx.Module | None, x: jax.Array, memory: Memory,
      norm: Callable[[jax.Array], jax.Array], block: Block,
  ) -> Memory:  # fmt: skip
    """What the row remembers of a full block beside its layers.

    Args:
      weights: of the memory.
      x: `[B, n, D]`, the last layer's output, of all vectors.
      memory: of before.
      norm: the norm before the logits.
      block: where it stands.
    """
    return memory


def need_vectors(config: MemoryConfig) -> None:
  """Raises UserError where a memory of F vectors is given none."""
  if config.fam_length < 1:
    raise UserError(
        f"fam_length is {config.fam_length}: the memory {config.kind!r} is made of so many vectors;"
        " use at least 1"
    )


def param(value: jax.Array) -> nnx.Param:
  """A parameter that every device has all of."""
  return nnx.Param(value, axes=(None,) * value.ndim)


def project(layer: Layer, x: jax.Array, block: Block):
  """Queries `[B, H, n, d]`, keys and values `[B, K, n, d]` of a block's vectors at their places."""
  turn = block.turn(block.places)
  return layer.project(x, turn, turn)


def attend_causally(
    layer: Layer, queries: jax.Array, keys: jax.Array, values: jax.Array,
    others: tuple[KeySet, ...] = (),
) -> jax.Array:  # fmt: skip
  """Attention `[B, H, n, d]` of a block to other keys, all visible, and to its own up to each."""
  n = queries.shape[2]
  own = KeySet(keys[:, None], values[:, None], jnp.tril(jnp.ones((n, n), bool)))
  return attend(queries[:, None], [*others, own], layer.cap)[:, 0]


_KINDS: dict[str, type[Strategy]] = {}
_IMPORTED: set[str] = set()  # kinds "module:Class" that the user's configuration has named


def register(kind: str):
  """Decorates a `Strategy`: `MemoryConfig.kind` may have this name from now on."""

  def add(cls):
    if kind in BUILT_IN or _KINDS.get(kind, cls).__qualname__ != cls.__qualname__:
      raise ValueError(f"there is a memory kind {kind!r} already")
    _KINDS[kind] = cls
    return cls

  return add


def check_saved(memory: MemoryConfig, where: str) -> None:
  """Refuses a memory that was read from a directory and would have to import code.

  Args:
    memory: configuration that the directory holds.
    where: name of the directory, for the error message.

  Raises:
    UserError: The kind is neither built in nor registered, the user's own configuration has not
      named it, and the user does not trust the directory (`famjax.trust`).
  """
  importlib.import_module("famjax.model.memories")
  kind = memory.kind
  trust.check_kind(kind, kind in BUILT_IN or kind in _KINDS or kind in _IMPORTED, where)


def _imported(kind: str) -> type[Strategy]:
  """Imports the `Strategy` that a kind "module:Class" names."""
  module, _, name = kind.partition(":")
  if not name:
    raise UserError(
        f"memory kind {kind!r} is unknown; choose one of {', '.join((*BUILT_IN, *_KINDS))}, or"
        " import the module that registers it"
    )
  try:
    cls = getattr(importlib.import_module(module), name)
  except (ImportError, AttributeError, TypeError, ValueError) as e:
    raise UserError(f"memory kind {kind!r} cannot be imported: {e}") from e
  if not (isinstance(cls, type) and issubclass(cls, Strategy)):
    raise UserError(f"memory kind {kind!r} names no subclass of famjax.model.strategy.Strategy")
  _IMPORTED.add(kind)
  return cls


@functools.lru_cache(maxsize=None)
def _make(kind: str, options: tuple[tuple[str, Any], ...]) -> Strategy:
  importlib.import_module("famjax.model.memories")
  cls = _KINDS.get(kind) or _imported(kind)
  fields = [field.name for field in dataclasses.fields(cls)]
  for option, _ in options:
    if option not in fields:
      raise UserError(
          f"memory option {option!r} is unknown to {kind!r}; it has {', '.join(fields) or 'none'}"
      )
  try:
    return cls(**dict(options))
  except (TypeError, ValueError) as e:
    raise UserError(f"memory kind {kind!r}: {e}") from e


def _check_option(name: str, value: Any, default: Any) -> None:
  """Raises UserError for a value of another type than the default's, or a number below 0."""
  if default is dataclasses.MISSING:
    return
  allowed = (int, float) if type(default) is float else (type(default),)
  if type(value) not in allowed:
    raise UserError(f"memory option {name} is {value!r}: it must be {type(default).__name__}")
  if type(value) in (int, float) and value < 0:
    raise UserError(f"memory option {name} is {value}: it must not be negative")


def of(memory: MemoryConfig) -> Strategy | None:
  """The strategy of a configuration; None: BSWA, FAM or full attention, which the decoder has.

  Raises:
    UserError: the kind or an option is unknown.
  """
  if memory.kind in BUILT_IN:
    return None
  found = _make(memory.kind, memory.options)
  defaults = {field.name: field.default for field in dataclasses.fields(found)}
  for option, value in memory.options:  # for the cache 2, 2.0 and True are one
    _check_option(option, value, defaults[option])
  return found
