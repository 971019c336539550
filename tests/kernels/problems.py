"""Random problems for the attention kernels, and plain attention's answers beside theirs."""

import dataclasses

from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np

from famjax.model import blocks
from famjax.model.attention import KeySet
from famjax.model.config import MemoryConfig, ModelConfig
from famjax.model.state import empty_state


def problem(config, B, T, start, seed=0, dtype=jnp.float32):
  """Random arguments of `blocks.attend`, of rows that have read `start` blocks before."""
  N, F, K, d = config.memory.block_size, config.memory.length, config.kv_heads, config.head_width
  keys = iter(jax.random.split(jax.random.key(seed), 8))
  draw = lambda *shape: jax.random.normal(next(keys), shape, dtype)
  P = 0 if start is None else config.memory.memory_segments + 1
  state = empty_state(config, B, past=False).replace(
      position=jnp.zeros(B, jnp.int32) if start is None else jnp.asarray(start, jnp.int32) * N
  )
  layout = blocks.make_layout(state, T * N, None, aligned=True, within=False, N=N)
  queries = draw(B, T, config.num_heads, N, d) * d**-0.5
  past = blocks.Past(draw(B, P, K, N, d), draw(B, P, K, N, d))
  own = blocks.Past(draw(B, T, K, N, d), draw(B, T, K, N, d))
  fam = KeySet(draw(B, T, K, F, d), draw(B, T, K, F, d)) if F else None
  return (queries, past, own, fam), layout


def both(config, arrays, layout, by: str):
  """Results and gradients by plain attention and by the kernel, all of them float32."""
  towards = jax.random.normal(jax.random.key(9), arrays[0].shape)

  def of(kernel):
    here = dataclasses.replace(config, attention_kernel=kernel)
    out = lambda arrays: blocks.attend(*arrays, layout, here).astype(jnp.float32)
    gradients = jax.grad(lambda arrays: (out(arrays) * towards).sum())(arrays)
    return out(arrays), jax.tree.map(lambda x: x.astype(jnp.float32), gradients)

  return jax.jit(lambda: (of("none"), of(by)))()


def agree(plain, kernel, forward, backward):
  """Largest differences, beside values of size 1 and gradients of up to 10."""
  np.testing.assert_allclose(kernel[0], plain[0], rtol=forward, atol=forward)
  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=backward, atol=backward)
  jax.tree.map(close, kernel[1], plain[1])


@st.composite
def configs(draw, sizes: tuple[int, ...]):
  """Blocks of one of the sizes."""
  K, M = draw(st.sampled_from([1, 2])), draw(st.integers(0, 3))
  N = draw(st.sampled_from(sizes))
  window = draw(st.sampled_from([None, 1, N, N + N // 2]))
  if window is not None and window >= (M + 1) * N:
    window = None
  return ModelConfig(
      num_heads=K * draw(st.integers(1, 3)), num_kv_heads=K, head_dim=4,
      attention_cap=draw(st.sampled_from([None, 2.0])),
      memory=MemoryConfig(
          block_size=N, memory_segments=M, fam_length=draw(st.integers(0, 3)), window=window,
          stop_gradient=draw(st.booleans()),
      ),
  )  # fmt: skip
