"""Rotary position embedding (RoPE), exact far out, and the positions of a FAM (B.2.1)."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from famjax.model import axes
from famjax.model.config import MemoryConfig, ModelConfig

# Positions are split into coarse * _STRIDE + fine. A float32 angle of position 1,000,000 is off by
# 0.03 rad; the sum of a coarse angle, reduced to one turn beforehand, and a fine one by 0.0005.
_STRIDE = 1024


def wavelength(theta: float) -> float:
  """The longest wavelength of RoPE in tokens, `2 pi theta` (B.2.2)."""
  return 2 * np.pi * theta


def frequencies(config: ModelConfig) -> np.ndarray:
  """float64 `[d / 2]`: the angle by which each pair turns per position, `theta ** (-2 i / d)`.

  Scaled by `rope_factor` and `rope_stretch`, if they are given. Zeros for `theta` infinite: no RoPE.
  """
  width, theta = config.head_width, config.rope_theta
  if math.isinf(theta):
    return np.zeros(width // 2)
  plain = theta ** (-np.arange(0, width, 2, dtype=np.float64) / width)
  if config.rope_stretch is None:
    return plain / config.rope_factor
  low, high, context = config.rope_stretch
  times = context * plain / (2 * np.pi)  # that a wave fits into the context
  kept = np.clip((times - low) / (high - low), 0, 1)
  return kept * plain + (1 - kept) * plain / config.rope_factor


def rotation(
    start: jax.Array, steps: np.ndarray, frequency: np.ndarray, which: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
  """Cosine and sine of every position's angles: those of `start` turned on by each of the steps.

  Those of the steps are part of the program, made in float64: all error within a block is its start's.

  Args:
    start: `[...]` int32 positions.
    steps: `[n]`, what is added to each of them; they may be fractions, of which float32 positions
      have none left at 1,000,000.
    frequency: `[d / 2]`, from `frequencies`.
    which: int `[..., k]`, places among the steps, of which alone there shall be angles; None: all.
      Places past the last, of slots without a token, get the last one's.

  Returns:
    Two float32 arrays `[..., n or k, d / 2]`.
  """
  coarse_turn = np.remainder(_STRIDE * frequency, 2 * np.pi).astype(np.float32)
  # Towards 0, so that the positions just before 0, the initial FAM's, are exact as well.
  coarse = jnp.sign(start) * jnp.floor_divide(jnp.abs(start), _STRIDE)
  fine = (start - coarse * _STRIDE).astype(jnp.float32)
  angle = (
      coarse.astype(jnp.float32)[..., None] * coarse_turn
      + fine[..., None] * frequency.astype(np.float32)
  )[..., None, :]
  cos, sin = jnp.cos(angle), jnp.sin(angle)
  on = np.asarray(steps, np.float64)[:, None] * frequency
  cos_on, sin_on = (jnp.asarray(f(on), jnp.float32) for f in (np.cos, np.sin))  # [n, d / 2]
  if which is not None:
    cos_on, sin_on = (jnp.take(x, which, axis=0, mode="clip") for x in (cos_on, sin_on))
  cos, sin = cos * cos_on - sin * sin_on, sin * cos_on + cos * sin_on
  if axes.platform() == "cpu":
    # XLA makes a sum, and no product, anew in everything that reads it: cosines in each layer of a
    # written-out model took a seventh of its forward pass.
    one = np.eye(frequency.size, dtype=np.float32)
    cos, sin = cos @ one, sin @ one
  return cos, sin


def rotate(x: jax.Array, turn: tuple[jax.Array, jax.Array]) -> jax.Array:
  """Turns the pairs (x[i], x[i + d/2]) of `x` `[..., heads, n, d]` by `turn` `[..., n, d / 2]`."""
  cos, sin = (t[..., None, :, :] for t in turn)
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate(
      [first * cos - second * sin, second * cos + first * sin], axis=-1
  ).astype(x.dtype)


def fam_positions(
    block: jax.Array, offset: jax.Array, memory: MemoryConfig
) -> tuple[jax.Array, np.ndarray]:
  """Where the FAM written by block `block` stands (B.2.1).

  Args:
    block: `[...]` int32 block index in its row; -1 is the initial FAM's.
    offset: broadcastable to `block`, the row's random position offset (B.2.2).
    memory: gives N, F and the rule: "last", "float" or "zero".

  Returns:
    int32 `[...]` positions, and the steps `[F]` from there, for `rotation`.
  """
  slot = np.arange(memory.length)
  end = (block + 1) * memory.block_size + offset  # first position of the next block
  if memory.fam_position == "zero":
    return jnp.zeros_like(end), 0 * slot
  if memory.fam_position == "last":
    return end, slot - memory.length
  return end - 1, (slot + 1) / (memory.length + 1)
