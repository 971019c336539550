"""The kernel gives what plain attention over key sets gives, and its program keeps no scores."""

import dataclasses

from flax import nnx
from hypothesis import given, settings, strategies as st
import jax
from jax.sharding import SingleDeviceSharding
import jax.numpy as jnp
import numpy as np
import pytest

from famjax.errors import UserError
from famjax.kernels import block_attention, tiles
from famjax.model import axes, blocks
from famjax.model.config import MemoryConfig, ModelConfig
from famjax.model.decoder import Decoder
from famjax.model.state import empty_state
from famjax.parallel import hlo, topology
from famjax.parallel.mesh import MeshConfig, make_mesh
from famjax.parallel.placement import AxisRules, Placement
from famjax.training.flops import products
from tests.kernels.problems import agree, both, configs, problem


@settings(max_examples=5)
@given(config=configs((3, 8, 256)), T=st.integers(1, 3), begun=st.booleans(), seed=st.integers(0, 99))
def test_equals_plain_attention(config, T, begun, seed):
  """Sums in another order, in float32: 1e-5 of results, 1e-4 of gradients."""
  start = [seed % 3, config.memory.memory_segments + 1] if begun else None
  arrays, layout = problem(config, 2, T, start, seed)
  agree(*both(config, arrays, layout, "interpret"), forward=1e-5, backward=1e-4)


@pytest.mark.parametrize("tile", [128, 384])
def test_several_tiles_of_a_block(monkeypatch, tile):
  """Tiles before, on and behind the diagonal, of blocks of two tiles or of three."""
  monkeypatch.setattr(tiles, "TILE", tile)
  memory = MemoryConfig(block_size=768 if tile == 384 else 384, memory_segments=1, fam_length=2)
  memory = dataclasses.replace(memory, window=memory.block_size + 200)
  config = ModelConfig(num_heads=2, num_kv_heads=1, head_dim=4, memory=memory)
  arrays, layout = problem(config, 1, 2, [1])
  agree(*both(config, arrays, layout, "interpret"), forward=1e-5, backward=1e-4)


def test_in_bfloat16():
  """Each of the two rounds weights to 8 bits before it adds them up: 2 % of what there is."""
  config = ModelConfig(
      num_heads=4, num_kv_heads=2, head_dim=16, compute_dtype="bfloat16",
      memory=MemoryConfig(block_size=32, memory_segments=2, fam_length=8),
  )  # fmt: skip
  arrays, layout = problem(config, 2, 3, None, dtype=jnp.bfloat16)
  agree(*both(config, arrays, layout, "interpret"), forward=0.02, backward=0.05)


MODEL = ModelConfig(
    vocab_size=16, num_layers=2, model_dim=16, num_heads=4, num_kv_heads=2, ff_dim=16, remat="full",
    memory=MemoryConfig(block_size=8, memory_segments=2, fam_length=2),
)  # fmt: skip


@pytest.mark.parametrize("how", ["interpret", "interpret_gpu"])
def test_a_model_is_the_same(how):
  """Gradients of training, and logits and state of reading on from anywhere in a block."""
  tokens = jnp.asarray(np.random.default_rng(0).integers(0, 16, (2, 43)))

  def of(kernel):
    config = dataclasses.replace(MODEL, attention_kernel=kernel)
    graphdef, params = nnx.split(Decoder(config, rngs=nnx.Rngs(0)))
    loss = lambda params: jnp.square(nnx.merge(graphdef, params)(tokens)[0]).mean()
    gradients = nnx.to_pure_dict(jax.grad(loss)(params))
    model = nnx.merge(graphdef, params)
    start = jnp.ones(2, bool)
    lengths = jnp.array([21, 13])
    _, state = model(tokens[:, :21], empty_state(config, 2), start_of_sequence=start, lengths=lengths)
    logits, state = model(tokens[:, 21:], state)
    return gradients, logits, state

  plain, kernel = jax.jit(lambda: (of("none"), of(how)))()
  same = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
  jax.tree.map(same, kernel, plain)


def test_what_it_is_not_for_is_refused():
  with pytest.raises(UserError, match="memory kind 'rmt' has no kernel: attention_kernel must be"):
    memory = dataclasses.replace(MODEL.memory, kind="rmt", memory_segments=0)
    dataclasses.replace(MODEL, memory=memory, attention_kernel="pallas").validate()
  with pytest.raises(UserError, match="attention_kernel 'fast' is unknown; choose one of auto, none, pallas"):
    dataclasses.replace(MODEL, attention_kernel="fast").validate()
  mesh = make_mesh(MeshConfig(data=1), topology.devices_of("v5e:2x2")[:1])
  arrays, layout = problem(MODEL, 1, 2, None)
  with axes.placed_by(Placement(mesh, AxisRules())):
    with pytest.raises(UserError, match="needs a block_size that 128 divides, not 8: choose"):
      blocks.attend(*arrays, layout, dataclasses.replace(MODEL, attention_kernel="pallas"))
    memory = MemoryConfig(block_size=128, memory_segments=1, fam_length=1)
    config = dataclasses.replace(MODEL, memory=memory, attention_kernel="pallas")
    arrays, layout = problem(config, 1, 1, None)
    with pytest.raises(UserError, match="needs a fam_length of at least 2: choose one, or 'none'"):
      blocks.attend(*arrays, layout, config)


def test_elsewhere_than_on_a_tpu_it_is_plain_jax():
  """A checkpoint of a run on a TPU is read anywhere."""
  arrays, layout = problem(MODEL, 1, 2, None)
  of = lambda kernel: str(jax.make_jaxpr(
      lambda arrays: blocks.attend(
          *arrays, layout, dataclasses.replace(MODEL, attention_kernel=kernel)
      )
  )(arrays))  # fmt: skip
  assert of("pallas") == of("none") and "pallas_call" in of("interpret")


@pytest.mark.slow
@pytest.mark.parametrize("width, F, N, cap", [(128, 64, 512, None), (256, 3, 384, 50.0)])
def test_for_a_tpu_it_keeps_no_scores(width, F, N, cap):
  """Forward and backward compile for a chip; temporaries are none beside those of scores."""
  device = SingleDeviceSharding(topology.devices_of("v5e:2x2")[0])
  shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.bfloat16, sharding=device)
  B, T, K, G, P = 1, 4, 2, 2, 3
  keys, fam = shape(B, P + T, K, N, width), shape(B, T, K, F, width)
  before = jax.ShapeDtypeStruct((B,), jnp.int32, sharding=device)

  def loss(*arrays):
    out = block_attention.attend(*arrays, segments=2, cap=cap)
    return out.astype(jnp.float32).sum()

  arguments = shape(B, T, K, G, N, width), keys, keys, fam, fam, before
  program = jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3, 4))).lower(*arguments).compile()
  one_set_of_scores = T * K * G * N * N * 4
  assert hlo.memory_of(program)["temp"] < one_set_of_scores / 2
  assert program.as_text().count("tpu_custom_call") >= 3


def test_it_says_what_it_does():
  """FLOPs of tiles that meet, in blocks that are there."""
  N, T, F, d = 256, 3, 8, 4

  def flops(**options):
    shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.float32)
    keys, fam = shape(1, T, 1, N, d), shape(1, T, 1, F, d)
    before = jax.ShapeDtypeStruct((1,), jnp.int32)
    attend = lambda *arrays: block_attention.attend(*arrays, interpret=True, **options)
    traced = jax.jit(attend).trace(shape(1, T, 1, 2, N, d), keys, keys, fam, fam, before)
    return products(traced.jaxpr.jaxpr)

  whole = lambda own, before: 2 * 2 * d * 2 * (T * N * F + (own * T + before) * N * N)
  assert flops(segments=0) == whole(1, 0)
  assert flops(segments=1) == whole(1, 2)  # the first block has none before it
  assert flops(segments=9) == whole(1, 3)
  assert flops(segments=9, window=2) == whole(1, 2)
