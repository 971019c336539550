"""The weights of one decoder layer, and the path that tokens and FAM vectors both take through it."""

from collections.abc import Callable

from flax import nnx
import jax
import jax.numpy as jnp

from famjax.model import rope
from famjax.model.config import ModelConfig

Initializer = Callable[..., jax.Array]


class Norm(nnx.Module):
  """RMSNorm or LayerNorm over the last axis, computed in float32."""

  def __init__(self, config: ModelConfig):
    dtype = jnp.dtype(config.param_dtype)
    self.eps = config.norm_eps
    self.centred = config.norm == "layer"
    self.scale = nnx.Param(jnp.ones(config.model_dim, dtype), axes=("embed",))
    if self.centred:
      self.bias = nnx.Param(jnp.zeros(config.model_dim, dtype), axes=("embed",))

  def __call__(self, x: jax.Array) -> jax.Array:
    """`[..., D]` to `[..., D]`, in the dtype of `x`."""
    y = x.astype(jnp.float32)
    if self.centred:
      y = y - y.mean(-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.eps)
    y = y * self.scale[...].astype(jnp.float32)
    if self.centred:
      y = y + self.bias[...].astype(jnp.float32)
    return y.astype(x.dtype)


class Projection(nnx.Module):
  """A matrix product written as an einsum; the kernel is cast to the dtype of the input."""

  def __init__(
      self,
      equation: str,
      shape: tuple[int, ...],
      axes: tuple[str, ...],
      *,
      fan_in: int,
      param_dtype: str,
      rngs: nnx.Rngs,
  ):
    self.equation = equation
    kernel = jax.random.truncated_normal(rngs.params(), -2, 2, shape, jnp.float32)
    kernel = kernel * (fan_in**-0.5 / 0.87962566)  # the cut at 2 leaves a deviation of 0.88
    self.kernel = nnx.Param(kernel.astype(param_dtype), axes=axes)

  def __call__(self, x: jax.Array) -> jax.Array:
    return jnp.einsum(self.equation, x, self.kernel[...].astype(x.dtype))


class Attention(nnx.Module):
  """Query, key, value and output kernels of grouped-query attention."""

  def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
    D, H, K, d = config.model_dim, config.num_heads, config.kv_heads, config.head_width
    options = dict(param_dtype=config.param_dtype, rngs=rngs)
    self.query = Projection(
        "...D,DHd->...Hd", (D, H, d), ("embed", "heads", "head"), fan_in=D, **options
    )
    self.key = Projection(
        "...D,DKd->...Kd", (D, K, d), ("embed", "kv_heads", "head"), fan_in=D, **options
    )
    self.value = Projection(
        "...D,DKd->...Kd", (D, K, d), ("embed", "kv_heads", "head"), fan_in=D, **options
    )
    self.out = Projection(
        "...Hd,HdD->...D", (H, d, D), ("heads", "head", "embed"), fan_in=H * d, **options
    )


class FeedForward(nnx.Module):
  """SwiGLU: `down(silu(gate(x)) * up(x))`."""

  def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
    D, ff = config.model_dim, config.hidden_width
    options = dict(param_dtype=config.param_dtype, rngs=rngs)
    self.gate = Projection("...D,Df->...f", (D, ff), ("embed", "mlp"), fan_in=D, **options)
    self.up = Projection("...D,Df->...f", (D, ff), ("embed", "mlp"), fan_in=D, **options)
    self.down = Projection("...f,fD->...D", (ff, D), ("mlp", "embed"), fan_in=ff, **options)

  def __call__(self, x: jax.Array) -> jax.Array:
    return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class Layer(nnx.Module):
  """One pre-norm decoder layer. A FAM vector takes exactly the path that a token takes.

  Between `project` and `close` stands attention, which is where tokens and FAM differ: they see
  different keys (memory.py, decoder.py).
  """

  def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
    self.attention_norm = Norm(config)
    self.attention = Attention(config, rngs)
    self.feedforward_norm = Norm(config)
    self.feedforward = FeedForward(config, rngs)

  def project(self, x: jax.Array, query_turn, key_turn) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`qkv(norm(x))`, queries and keys rotated.

    Args:
      x: `[..., n, D]`.
      query_turn: cosine and sine `[..., n, d / 2]` at the positions of the queries.
      key_turn: the same at the positions of the keys; they differ for a FAM alone.

    Returns:
      queries `[..., H, n, d]`, keys and values `[..., K, n, d]`: a head's vectors stand side by
      side, as attention reads them.
    """
    h = self.attention_norm(x)
    queries = rope.rotate(_heads_first(self.attention.query(h)), query_turn)
    return queries, *self._keys_values(h, key_turn)

  def keys_values(self, x: jax.Array, turn) -> tuple[jax.Array, jax.Array]:
    """The keys and values alone of `project`."""
    return self._keys_values(self.attention_norm(x), turn)

  def _keys_values(self, h, turn):
    keys = rope.rotate(_heads_first(self.attention.key(h)), turn)
    return keys, _heads_first(self.attention.value(h))

  def close(self, attended: jax.Array, residual: jax.Array) -> jax.Array:
    """`a = attended @ Wo + residual`, then `a + ff(norm(a))`.

    Args:
      attended: `[..., H, n, d]`, the heads' attention results.
      residual: `[..., n, D]`.

    Returns:
      `[..., n, D]`.
    """
    a = self.attention.out(jnp.swapaxes(attended, -2, -3)) + residual
    return a + self.feedforward(self.feedforward_norm(a))


def _heads_first(x):
  """`[..., n, heads, d]` to `[..., heads, n, d]`; within the einsum it makes that ten times slower."""
  return jnp.swapaxes(x, -2, -3)
