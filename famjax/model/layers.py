"""The weights of one decoder layer, and the path that tokens and FAM vectors both take through it."""

from collections.abc import Callable, Sequence
import math

from flax import nnx
import jax
import jax.numpy as jnp

from famjax.model import axes as of_devices
from famjax.model import deferred, lora, rope
from famjax.model.config import ModelConfig

Initializer = Callable[..., jax.Array]
Taps = dict[tuple, deferred.Tap]  # by a projection's path
_MANY = 1024  # vectors, on all devices: moving them takes longer than moving a matrix does


class Norm(nnx.Module):
  """RMSNorm or LayerNorm over the last axes, computed in float32."""

  def __init__(
      self,
      config: ModelConfig,
      shape: tuple[int, ...] | None = None,
      axes: tuple[str, ...] = ("embed",),
  ):
    """Norms vectors of `shape`; None: of the model's width."""
    shape = (config.model_dim,) if shape is None else shape
    self.over = tuple(range(-len(shape), 0))
    self.eps = config.norm_eps
    self.centred = config.norm == "layer"
    self.plus_one = config.norm == "rms_plus_one"
    scale = (jnp.zeros if self.plus_one else jnp.ones)(shape, config.param_dtype)
    self.scale = nnx.Param(scale, axes=axes)
    if self.centred:
      self.bias = nnx.Param(jnp.zeros(shape, config.param_dtype), axes=axes)

  def __call__(self, x: jax.Array) -> jax.Array:
    """`[..., *shape]` to the same, in the dtype of `x`."""
    y = x.astype(jnp.float32)
    if self.centred:
      y = y - y.mean(self.over, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.square(y).mean(self.over, keepdims=True) + self.eps)
    y = y * (self.scale[...].astype(jnp.float32) + self.plus_one)
    if self.centred:
      y = y + self.bias[...].astype(jnp.float32)
    return y.astype(x.dtype)


class Projection(nnx.Module):
  """A matrix product written as an einsum; its weights are cast to the dtype of the input.

  Attributes:
    kernel: `[in..., out...]`.
    bias: `[out...]`, where there is one.
    lora_a, lora_b: float32 `[in..., r]` and `[r, out...]`, where LoRA adds their product, times
      `lora_scale`, to the kernel. The product of a new pair is 0.
    tap: None; where the layer is used once a block, what makes its gradient later (`deferred`).
  """

  def __init__(
      self,
      equation: str,
      shape: tuple[int, ...],
      axes: tuple[str, ...],
      *,
      fan_in: int,
      param_dtype: str,
      rngs: nnx.Rngs,
      bias: bool = False,
      lora_rank: int = 0,
      lora_scale: float = 1.0,
  ):
    """Makes a kernel of `shape`; a bias, if it has one, is of the axes after the first."""
    self.equation, self.tap = equation, None
    kernel = jax.random.truncated_normal(rngs.params(), -2, 2, shape, jnp.float32)
    kernel = kernel * (fan_in**-0.5 / 0.87962566)  # the cut at 2 leaves a deviation of 0.88
    self.kernel = nnx.Param(kernel.astype(param_dtype), axes=axes)
    if bias:
      self.bias = nnx.Param(jnp.zeros(shape[1:], param_dtype), axes=axes[1:])
    if lora_rank:
      self.lora_scale = lora_scale
      inputs = len(shape) - len(equation.rpartition("...")[2])  # axes that are summed over
      a = jax.random.normal(rngs.params(), (*shape[:inputs], lora_rank)) * fan_in**-0.5
      self.lora_a = nnx.Param(a, axes=(*axes[:inputs], "lora"))
      b = jnp.zeros((lora_rank, *shape[inputs:]), jnp.float32)
      self.lora_b = nnx.Param(b, axes=("lora", *axes[inputs:]))

  def __call__(self, x: jax.Array, low: jax.Array | None = None) -> jax.Array:
    """`low` is `x` times `lora_a`, where it has been made already (`together`)."""
    rows = x.shape[: x.ndim - len(self._inputs_shape)]
    y = self._product(x, low, joined=of_devices.platform() == "tpu" and math.prod(rows) >= _MANY)
    return y if self.tap is None else deferred.listen(y, x, self.tap)

  @property
  def _inputs_shape(self) -> tuple[int, ...]:
    """Axes of the kernel that are summed over: of "...Hd,HdD->...D" two."""
    return self.kernel.shape[: len(self.equation.partition(",")[0]) - 3]

  def taps(self, turns: int, rows: tuple[int, ...], dtype: jnp.dtype) -> deferred.Tap:
    """For `tap`, one in each of so many turns of a loop, on vectors of so many `rows`."""
    graphdef, weights = nnx.split(self)
    x = jax.ShapeDtypeStruct((*rows, *self._inputs_shape), dtype)
    return deferred.make_taps(lambda w, x: nnx.merge(graphdef, w)._product(x), weights, turns, x)  # pylint: disable=protected-access

  def _product(self, x, low=None, joined=False):
    rows = x.shape[: x.ndim - len(self._inputs_shape)]
    if len(rows) > 1 and of_devices.platform() == "cpu":  # XLA makes faster products there of one axis
      low = None if low is None else low.reshape(-1, low.shape[-1])
      y = self._product(x.reshape(-1, *self._inputs_shape), low)
      return y.reshape(*rows, *y.shape[1:])
    kernel, equation = self.kernel[...].astype(x.dtype), self.equation
    if not hasattr(self, "lora_a"):
      y = jnp.einsum(equation, x, kernel)
    elif joined and lora.narrows(equation):
      y = lora.joined_narrowing(equation, x, kernel, *self._factors(x.dtype))
    else:
      a, b = self._factors(x.dtype)
      low = lora.lows(equation, x, [a])[0] if low is None else low
      if joined:
        split = of_devices.is_split(self.kernel.get_metadata("axes")[1:], kernel.shape[1:])
        y = lora.joined_widening(equation, split, x, low, kernel, b)
      else:
        y = lora.product(equation, x, low, kernel, b)
    return y + self.bias[...].astype(x.dtype) if hasattr(self, "bias") else y

  def _factors(self, dtype):
    return self.lora_a[...].astype(dtype), (self.lora_b[...] * self.lora_scale).astype(dtype)


def together(many: Sequence[Projection], x: jax.Array) -> list[jax.Array]:
  """The products of matrices that read the same vectors `[..., D]`; LoRA's first ones are one product.

  It stands before all others: in the backward pass what they give back is added up first, so that where
  devices share a layer, they send the sum alone.
  """
  adapted = [one for one in many if hasattr(one, "lora_a")]
  low = {}
  if adapted:
    factors = [one.lora_a[...].astype(x.dtype) for one in adapted]
    low = dict(zip(map(id, adapted), lora.lows(adapted[0].equation, x, factors)))
  return [one(x, low.get(id(one))) for one in many]


def projections(module: nnx.Module) -> dict[tuple, Projection]:
  """All that a module has, by their paths."""
  return {path: one for path, one in nnx.iter_modules(module) if isinstance(one, Projection)}


def in_turns(
    module: nnx.Module,
    turns: int,
    rows: Callable[[tuple], tuple[int, ...]],
    dtype: jnp.dtype,
) -> tuple[Taps, Callable[[Taps], nnx.Module]]:
  """A module for a loop, every turn of which multiplies by the same matrices.

  What the matrices get of their gradients is made after the last turn, for all of them (`deferred`).

  Args:
    module: with projections.
    turns: T.
    rows: of the vectors that a turn gives to the projection at a path.
    dtype: of the vectors.

  Returns:
    Arrays `[T, *rows, ...]` for the loop to go over, and what makes of a turn's part of them the module in
    that turn; or in a part of a turn, from a part of its rows.
  """
  taps = {path: one.taps(turns, rows(path), dtype) for path, one in projections(module).items()}
  graphdef, matrices, others = nnx.split(module, lambda path, _: path[:-1] in taps, ...)
  matrices = jax.lax.stop_gradient(matrices)
  kernels, matrices = nnx.split_state(matrices, lambda path, _: path[-1] == "kernel", ...)
  kernels = jax.tree.map(lambda x: x.astype(dtype), kernels)  # not in each turn anew

  def in_turn(taps):
    here = nnx.merge(graphdef, kernels, matrices, others)
    for path, one in projections(here).items():
      one.tap = nnx.data(taps[path])
    return here

  return taps, in_turn


def _projections(config: ModelConfig, room: str, rngs: nnx.Rngs):
  """A function that makes the projection of a name in `room`."""

  def make(name, equation, shape, axes, fan_in, **options):
    return Projection(
        equation, shape, axes, fan_in=fan_in, param_dtype=config.param_dtype, rngs=rngs,
        lora_rank=config.lora_rank_of(f"{room}/{name}"), lora_scale=config.lora_scale, **options,
    )  # fmt: skip

  return make


class Attention(nnx.Module):
  """Query, key, value and output kernels of grouped-query attention."""

  def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
    D, H, K, d = config.model_dim, config.num_heads, config.kv_heads, config.head_width
    make, bias = _projections(config, "attention", rngs), config.qkv_bias
    kv = (D, K, d), ("embed", "kv_heads", "head"), D
    self.query = make(
        "query", "...D,DHd->...Hd", (D, H, d), ("embed", "heads", "head"), D, bias=bias
    )
    self.key = make("key", "...D,DKd->...Kd", *kv, bias=bias)
    self.value = make("value", "...D,DKd->...Kd", *kv, bias=bias)
    self.out = make("out", "...Hd,HdD->...D", (H, d, D), ("heads", "head", "embed"), H * d)
    if config.qk_norm == "head":
      self.query_norm = Norm(config, (d,), ("head",))
      self.key_norm = Norm(config, (d,), ("head",))
    elif config.qk_norm == "width":
      self.query_norm = Norm(config, (H, d), ("heads", "head"))
      self.key_norm = Norm(config, (K, d), ("kv_heads", "head"))

  def __call__(self, h: jax.Array, *names: str) -> list[jax.Array]:
    """Of `[..., n, D]` what is named, not yet rotated: a head's vectors stand side by side.

    Args:
      h: normed vectors.
      names: "query", which is `[..., H, n, d]`, "key", "value", `[..., K, n, d]`.
    """
    made = zip(names, together([getattr(self, name) for name in names], h))
    normed = lambda name, x: getattr(self, name)(x) if hasattr(self, name) else x
    return [_heads_first(normed(f"{name}_norm", x)) for name, x in made]


class FeedForward(nnx.Module):
  """SwiGLU: `down(silu(gate(x)) * up(x))`; GeGLU with another activation."""

  def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
    D, ff = config.model_dim, config.hidden_width
    self.activation = {"silu": jax.nn.silu, "gelu": jax.nn.gelu}[config.activation]
    make = _projections(config, "feedforward", rngs)
    self.gate = make("gate", "...D,Df->...f", (D, ff), ("embed", "mlp"), D)
    self.up = make("up", "...D,Df->...f", (D, ff), ("embed", "mlp"), D)
    self.down = make("down", "...f,fD->...D", (ff, D), ("mlp", "embed"), ff)

  def __call__(self, x: jax.Array) -> jax.Array:
    gate, up = together([self.gate, self.up], x)
    return self.down(self.activation(gate) * up)


class Layer(nnx.Module):
  """One decoder layer. A FAM vector takes exactly the path that a token takes.

  Between `project` and `close` stands attention, which is where tokens and FAM differ: they see
  different keys (memory.py, grid.py).

  Attributes:
    attention: its kernels; `attention_norm` before it, `attention_post_norm` after it.
    feedforward: likewise.
    cap: of attention's scores, see `attend`.
  """

  def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
    self.attention = Attention(config, rngs)
    self.feedforward = FeedForward(config, rngs)
    self.scale, self.cap = config.attention_scale, config.attention_cap
    if config.norm_place != "after":
      self.attention_norm = Norm(config)
      self.feedforward_norm = Norm(config)
    if config.norm_place != "before":
      self.attention_post_norm = Norm(config)
      self.feedforward_post_norm = Norm(config)

  def project(self, x: jax.Array, query_turn, key_turn) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`qkv(norm(x))`, queries scaled, queries and keys rotated.

    Args:
      x: `[..., n, D]`.
      query_turn: cosine and sine `[..., n, d / 2]` at the positions of the queries.
      key_turn: the same at the positions of the keys; they differ for a FAM alone.

    Returns:
      queries `[..., H, n, d]`, keys and values `[..., K, n, d]`: a head's vectors stand side by
      side, as attention reads them.
    """
    h = self._normed("attention_norm", x)
    queries, keys, values = self.attention(h, "query", "key", "value")
    return rope.rotate(queries, query_turn) * self.scale, rope.rotate(keys, key_turn), values

  def keys_values(self, x: jax.Array, turn) -> tuple[jax.Array, jax.Array]:
    """The keys and values alone of `project`."""
    keys, values = self.attention(self._normed("attention_norm", x), "key", "value")
    return rope.rotate(keys, turn), values

  def close(self, attended: jax.Array, residual: jax.Array) -> jax.Array:
    """`a = attended @ Wo + residual`, then `a + ff(norm(a))`.

    Args:
      attended: `[..., H, n, d]`, the heads' attention results.
      residual: `[..., n, D]`.

    Returns:
      `[..., n, D]`.
    """
    out = self.attention.out(jnp.swapaxes(attended, -2, -3))
    a = self._normed("attention_post_norm", out) + residual
    fed = self.feedforward(self._normed("feedforward_norm", a))
    return a + self._normed("feedforward_post_norm", fed)

  def _normed(self, name: str, x: jax.Array) -> jax.Array:
    return getattr(self, name)(x) if hasattr(self, name) else x


def _heads_first(x):
  """`[..., n, heads, d]` to `[..., heads, n, d]`; within the einsum it makes that ten times slower."""
  return jnp.swapaxes(x, -2, -3)
