"""Rotary position embedding (RoPE), exact far out, and the positions of a FAM (B.2.1)."""

import math

import jax
import jax.numpy as jnp
import numpy as np

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
    positions: jax.Array, frequency: np.ndarray, fraction: jax.Array | float = 0.0
) -> tuple[jax.Array, jax.Array]:
  """Cosine and sine of every position's angles.

  Args:
    positions: `[...]` int32 positions.
    frequency: `[d / 2]`, from `frequencies`.
    fraction: added to the positions, and broadcastable to them; apart from them, as float32 has no
      fractions left at position 1,000,000.

  Returns:
    Two float32 arrays `[..., d / 2]`.
  """
  coarse_turn = np.remainder(_STRIDE * frequency, 2 * np.pi).astype(np.float32)
  # Towards 0, so that the positions just before 0, the initial FAM's, are exact as well.
  coarse = jnp.sign(positions) * jnp.floor_divide(jnp.abs(positions), _STRIDE)
  fine = (positions - coarse * _STRIDE).astype(jnp.float32) + fraction
  angle = (
      coarse.astype(jnp.float32)[..., None] * coarse_turn
      + fine[..., None] * frequency.astype(np.float32)
  )
  return jnp.cos(angle), jnp.sin(angle)


def rotate(x: jax.Array, turn: tuple[jax.Array, jax.Array]) -> jax.Array:
  """Turns the pairs (x[i], x[i + d/2]) of `x` `[..., heads, n, d]` by `turn` `[..., n, d / 2]`."""
  cos, sin = (t[..., None, :, :] for t in turn)
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate(
      [first * cos - second * sin, second * cos + first * sin], axis=-1
  ).astype(x.dtype)


def fam_positions(
    block: jax.Array, offset: jax.Array, memory: MemoryConfig
) -> tuple[jax.Array, jax.Array | float]:
  """Where the FAM written by block `block` stands (B.2.1).

  Args:
    block: `[...]` int32 block index in its row; -1 is the initial FAM's.
    offset: broadcastable to `block`, the row's random position offset (B.2.2).
    memory: gives N, F and the rule: "last", "float" or "zero".

  Returns:
    int32 `[..., F]` positions, and float32 `[F]` fractions to add to them ("float"; else 0).
  """
  slot = jnp.arange(memory.length)
  end = ((block + 1) * memory.block_size + offset)[..., None]  # first position of the next block
  if memory.fam_position == "zero":
    return jnp.zeros_like(end + slot), 0.0
  if memory.fam_position == "last":
    return end - memory.length + slot, 0.0
  return end - 1 + 0 * slot, (slot + 1) / (memory.length + 1)
