"""The GPU's kernel gives what plain attention gives, and says to a GPU's compiler what it is."""

import dataclasses
import types

from hypothesis import given, settings, strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from famjax.errors import UserError
from famjax.kernels import block_attention_gpu, tiles_gpu
from famjax.kernels.tiles_gpu import Tiling, Tilings
from famjax.model import axes, blocks
from famjax.model.config import MemoryConfig, ModelConfig
from famjax.training.flops import products
from tests.kernels.problems import agree, both, configs, problem

MODEL = ModelConfig(
    num_heads=4, num_kv_heads=2, head_dim=16, compute_dtype="bfloat16",
    memory=MemoryConfig(block_size=32, memory_segments=2, fam_length=8),
)  # fmt: skip


@pytest.fixture(name="small_tiles")
def _small_tiles(monkeypatch):
  def use(held, passed):
    tiling = Tiling(held, passed, warps=4, stages=2)
    monkeypatch.setattr(block_attention_gpu, "tilings_of", lambda _: Tilings(tiling, tiling, tiling))
    monkeypatch.setattr(tiles_gpu, "FAM_TILE", 16)
    jax.clear_caches()  # kernels of other tiles

  yield use
  jax.clear_caches()


@settings(max_examples=5)
@given(config=configs((16, 32, 48)), T=st.integers(1, 3), begun=st.booleans(), seed=st.integers(0, 99))
def test_equals_plain_attention(config, T, begun, seed):
  """Sums in another order, in float32: 1e-5 of results, 1e-4 of gradients."""
  start = [seed % 3, config.memory.memory_segments + 1] if begun else None
  arrays, layout = problem(config, 2, T, start, seed)
  agree(*both(config, arrays, layout, "interpret_gpu"), forward=1e-5, backward=1e-4)


@pytest.mark.parametrize(
    "held, passed, window, F", [(32, 16, None, 40), (32, 16, 70, 3), (16, 32, 70, 32), (16, 32, None, 3)]
)
def test_several_tiles_of_a_block(small_tiles, held, passed, window, F):
  """Tiles before, on and behind the diagonal, the one that is held smaller or larger; of a FAM too."""
  small_tiles(held, passed)
  memory = MemoryConfig(block_size=64, memory_segments=2, fam_length=F, window=window)
  config = ModelConfig(num_heads=2, num_kv_heads=1, head_dim=4, attention_cap=2.0, memory=memory)
  arrays, layout = problem(config, 2, 3, [1, 4])
  agree(*both(config, arrays, layout, "interpret_gpu"), forward=1e-5, backward=1e-4)


def test_in_bfloat16():
  """Each of the two rounds weights to 8 bits before it adds them up: 2 % of what there is."""
  arrays, layout = problem(MODEL, 2, 3, None, dtype=jnp.bfloat16)
  agree(*both(MODEL, arrays, layout, "interpret_gpu"), forward=0.02, backward=0.05)


def jaxpr_of(config):
  arrays, layout = problem(config, 1, 2, None, dtype=jnp.dtype(config.compute_dtype))
  return str(jax.make_jaxpr(lambda arrays: blocks.attend(*arrays, layout, config))(arrays))


def test_it_is_chosen_where_it_is_faster(monkeypatch):
  """By default on GPUs that have room, of 16-bit numbers and blocks of whole tiles; by force of all."""
  with_memory = lambda **changes: dataclasses.replace(
      MODEL, memory=dataclasses.replace(MODEL.memory, **changes)
  )
  model = with_memory(block_size=64)
  assert "pallas_call" not in jaxpr_of(model)
  monkeypatch.setattr(axes, "platform", lambda: "gpu")
  assert "pallas_call" not in jaxpr_of(model)  # of a card that no one knows
  monkeypatch.setattr(tiles_gpu.jax, "devices", lambda: [types.SimpleNamespace(compute_capability="9.0")])
  assert "pallas_call" in jaxpr_of(model)
  assert "pallas_call" not in jaxpr_of(dataclasses.replace(model, head_dim=264))
  assert "pallas_call" not in jaxpr_of(MODEL)
  assert "pallas_call" not in jaxpr_of(dataclasses.replace(model, attention_kernel="none"))
  single = dataclasses.replace(model, compute_dtype="float32")
  assert "pallas_call" not in jaxpr_of(single)
  assert "pallas_call" in jaxpr_of(dataclasses.replace(single, attention_kernel="pallas"))
  assert "pallas_call" in jaxpr_of(dataclasses.replace(MODEL, attention_kernel="pallas"))
  assert "pallas_call" not in jaxpr_of(with_memory(block_size=24))
  with pytest.raises(UserError, match="on a GPU needs a block_size that 16 divides, not 24: choose"):
    jaxpr_of(dataclasses.replace(with_memory(block_size=24), attention_kernel="pallas"))
  monkeypatch.setattr(axes, "platform", lambda: "tpu")
  assert "pallas_call" not in jaxpr_of(with_memory(block_size=128))


def shapes(B, T, K, G, N, d, F, P, dtype):
  shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, dtype)
  keys, fam = shape(B, P + T, K, N, d), shape(B, T, K, F, d)
  before = jax.ShapeDtypeStruct((B,), jnp.int32)
  return shape(B, T, K, G, N, d), keys, keys, fam, fam, before


@pytest.mark.parametrize("options, F", [({}, 64), ({"window": 1500, "cap": 50.0}, 1000)])
def test_triton_takes_it(options, F):
  """Forward and backward are kernels of a GPU's program, which is made without a GPU."""
  arguments = shapes(1, 4, 2, 2, 1024, 128, F, 3, jnp.bfloat16)

  def loss(*arrays):
    return block_attention_gpu.attend(*arrays, segments=2, **options).astype(jnp.float32).sum()

  traced = jax.jit(jax.grad(loss, (0, 1, 2, 3, 4))).trace(*arguments)
  text = traced.lower(lowering_platforms=("cuda",)).as_text()
  assert text.count("triton") >= 4
  for name in ("forward", "backward_queries", "backward_keys", "backward_fam"):
    assert f"{name}_kernel" in text


def test_it_says_what_it_does():
  """FLOPs of blocks that are there, tiles on the diagonal counted whole."""
  N, T, F, tile = 256, 3, 8, 128

  def flops(**options):
    attend = lambda *arrays: block_attention_gpu.attend(*arrays, interpret=True, **options)
    traced = jax.jit(attend).trace(*shapes(1, T, 1, 2, N, 16, F, 0, jnp.float32))
    return products(traced.jaxpr.jaxpr)

  of = lambda before: 2 * 2 * 16 * 2 * (T * N * F + T * N * (N + tile) // 2 + before * N * N)
  np.testing.assert_allclose(flops(segments=0), of(0))
  np.testing.assert_allclose(flops(segments=1), of(2))  # the first block has none before it
  np.testing.assert_allclose(flops(segments=9), of(3))
