"""Decoding loops: tokens that wait beside the ring, and layers that stand apart."""

import functools

from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
import jax
from jax.extend import core
import jax.numpy as jnp
import numpy as np
import pytest

from famjax.model import attention, axes
from famjax.model.attention import KeySet
from famjax.model.config import MemoryConfig, ModelConfig
from famjax.model.state import empty_state, settle, stack, unstack, with_recent
from famjax.parallel import hlo, topology
from famjax.parallel.mesh import MeshConfig, make_mesh
from famjax.parallel.placement import AxisRules, Placement
from famjax.training.train_state import abstract
from tests.model import cases
from tests.model.cases import BATCH, Stream

ROOM = 9  # tokens of a loop: more than the ring of the smallest blocks holds


@functools.partial(jax.jit, static_argnames=("config", "end"), compiler_options=cases.QUICK)
def step(config, params, tokens, state, lengths, end):
  """One token of each row, in a loop that leaves the ring as it is."""
  model = cases.model(config, params)
  logits, state = model(tokens, state, lengths=lengths)
  state = model.write_fam(state)
  return logits, settle(state) if end else state


@settings(max_examples=15)
@given(
    config=st.sampled_from([cases.FAM[2], cases.FAM[5], cases.BSWA[0]]),
    seed=cases.seeds, platform=st.sampled_from(["cpu", "gpu"]), data=st.data(),
)  # fmt: skip
def test_tokens_beside_the_ring_count_like_tokens_in_it(config, seed, platform, data):
  """Over several block boundaries, in rows that stand elsewhere and wait at times; a FAM before them, and apart."""
  rng = np.random.default_rng(seed)
  params = cases.random_params(config, seed)
  plain = Stream(config, params)
  before = [data.draw(st.integers(0, cases.piece(config))) for _ in range(BATCH)]
  plain.feed(cases.draw_tokens(rng, BATCH, cases.piece(config)), lengths=before)
  with axes.placed_by(cases.On(platform)):
    state = with_recent(plain.state, ROOM)
  assert state.recent.head == (config.memory.length if platform == "gpu" else 0)
  for i in range(ROOM):
    tokens = jnp.asarray(cases.draw_tokens(rng, BATCH, 1), jnp.int32)
    lengths = jnp.asarray(data.draw(st.lists(st.integers(0, 1), min_size=BATCH, max_size=BATCH)))
    logits, state = step(config, params, tokens, state, lengths, end=i == ROOM - 1)
    expected = plain.feed(tokens, lengths=lengths)
    for row in np.flatnonzero(np.asarray(lengths)):
      np.testing.assert_allclose(logits[row], expected[row], **cases.TOLERANCE)
  for row in range(BATCH):
    cases.assert_same_row(config, state, row, plain.state, row)


def conditions(jaxpr: core.Jaxpr) -> int:
  """How often a program asks before it goes on, in each turn of its loops."""
  asked = 0
  for eqn in jaxpr.eqns:
    inside = sum(map(conditions, core.jaxprs_in_params(eqn.params)))
    asked += inside * eqn.params.get("length", 1) + (eqn.primitive.name == "cond")
  return asked


@pytest.mark.parametrize("apart", [False, True])
def test_a_token_of_a_loop_asks_for_nothing_and_a_full_block_once_for_all_layers(apart):
  """What a condition takes and gives would be copied for each token, or in each layer."""
  config = cases.FAM[0]
  params = cases.random_params(config, 0)
  model, state = cases.model(config, params), cases.init_state(config, params)
  if apart:
    model, state = model.unstacked(), unstack(state)
  tokens, loop = jnp.zeros((BATCH, 1), jnp.int32), with_recent(state, ROOM)
  asked = lambda function, *given: conditions(jax.make_jaxpr(function)(*given).jaxpr)
  assert config.num_layers > 1
  assert asked(lambda tokens: model(tokens, loop), tokens) == 0
  assert asked(model.write_fam, loop) == asked(lambda tokens: model(tokens, state), tokens) == 1


@functools.partial(jax.jit, static_argnames=("graphdef", "how"), compiler_options=cases.QUICK)
def call(graphdef, params, tokens, state, how):
  options = dict(aligned=how == "aligned", within_block=how == "within")
  if how == "aligned":
    options["start_of_sequence"] = jnp.array([True, False])
  return nnx.merge(graphdef, params)(tokens, state, **options)


@pytest.mark.parametrize(
    "config, how",
    [
        (cases.FAM[1], "aligned"), (cases.FAM[1], "anywhere"), (cases.FAM[1], "within"),
        (cases.FAM[7], "aligned"), (cases.BSWA[0], "within"),
    ],
)  # fmt: skip
def test_layers_that_stand_apart_are_the_same_layers(config, how):
  rng = np.random.default_rng(0)
  params = cases.random_params(config, 0)
  model = cases.model(config, params)
  size = config.memory.block_size
  stream = Stream(config, params)
  stream.feed(cases.draw_tokens(rng, BATCH, 2 * size), aligned=True)
  state = stream.state
  tokens = cases.draw_tokens(rng, BATCH, size if how == "within" else size + 1)
  expected, after = call(*nnx.split(model), tokens, state, how)
  logits, mine = call(*nnx.split(model.unstacked()), tokens, unstack(state), how)
  same, _ = call(*nnx.split(model.unstacked()), tokens, state, how)
  np.testing.assert_array_equal(same, logits)
  np.testing.assert_allclose(logits, expected, **cases.TOLERANCE)
  for row in range(BATCH):
    cases.assert_same_row(config, stack(mine), row, after, row)


def test_layers_that_stand_apart_are_views_on_a_cpu():
  config = cases.bswa(4, 1, 0, 2, (2, 2), dim=64)
  model = cases.model(config, cases.random_params(config, 0))
  whole = model.layers.feedforward.gate.kernel[...]
  part = model.unstacked().layers[1].feedforward.gate.kernel[...]
  assert part.unsafe_buffer_pointer() == whole.unsafe_buffer_pointer() + part.nbytes


def test_a_waiting_state_reads_on_within_a_block_alone():
  config = cases.FAM[0]
  params = cases.random_params(config, 0)
  model = cases.model(config, params)
  state = with_recent(cases.init_state(config, params), ROOM)
  with pytest.raises(ValueError, match="write_fam and settle it first"):
    model(jnp.zeros((BATCH, 3), jnp.int32), state)


@pytest.mark.slow
@pytest.mark.parametrize("kv_heads", [4, 1])
def test_a_step_on_a_tpu_goes_through_the_ring_without_a_copy(kv_heads):
  """What a layer's step keeps beside its state is nothing to the ring, whether heads share keys or not."""
  mesh = make_mesh(MeshConfig(data=1), topology.devices_of("v5e:2x2")[:1])
  placement = Placement(mesh, AxisRules())
  config = ModelConfig(
      vocab_size=256, num_layers=1, model_dim=512, num_heads=4, num_kv_heads=kv_heads, ff_dim=512,
      compute_dtype="bfloat16", param_dtype="bfloat16",
      memory=MemoryConfig("bswa", block_size=1024, memory_segments=3),
  )  # fmt: skip
  graphdef, params = abstract(config)
  on = lambda tree: jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placement.whole), tree
  )
  state = jax.eval_shape(lambda: with_recent(empty_state(config, 16), 16))
  tokens = jax.ShapeDtypeStruct((16, 1), jnp.int32)
  one = jax.jit(lambda p, t, s: nnx.merge(graphdef, p)(t, s), donate_argnums=2)
  with axes.placed_by(placement):
    program = one.lower(*on((params, tokens, state))).compile()
  assert hlo.memory_of(program)["temp"] < state.keys.size * 2 / 10


@pytest.mark.parametrize("platform", ["tpu", "gpu"])
def test_a_second_query_of_zeros_changes_nothing(monkeypatch, platform):
  """What accelerators are given for one query a head: masks, caps and sets as they are."""
  draw = lambda key, *shape: jax.random.normal(jax.random.key(key), shape)
  mask = jnp.array([[True, False, True], [True, True, False]])[:, None, None, None, None]
  sets = [
      KeySet(draw(0, 2, 1, 4, 3, 8), draw(1, 2, 1, 4, 3, 8), mask),
      KeySet(draw(2, 2, 1, 4, 5, 8), draw(3, 2, 1, 4, 5, 8)),
  ]
  queries = draw(4, 2, 1, 4, 1, 8)
  plain = attention.attend(queries, sets, 2.0)
  monkeypatch.setattr(axes, "platform", lambda: platform)
  np.testing.assert_allclose(attention.attend(queries, sets, 2.0), plain, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("config", [cases.FAM[0], cases.FAM[5]], ids=["plain", "window"])
def test_a_loop_as_a_gpu_has_it(config):
  """Layers apart, and the FAM before the recent tokens: over a block's end, in rows that stand elsewhere."""
  rng, tokens = np.random.default_rng(0), config.memory.block_size + 2
  params = cases.random_params(config, 0)
  model, plain = cases.model(config, params), Stream(config, params)
  plain.feed(cases.draw_tokens(rng, BATCH, 3), lengths=[3, 1])
  with axes.placed_by(cases.On("gpu")):
    there = with_recent(unstack(plain.state), tokens)
  assert there.recent.head == config.memory.length
  graphdef, weights = nnx.split(model.unstacked())

  @jax.jit
  def step(weights, token, state):
    model = nnx.merge(graphdef, weights)
    logits, state = model(token, state)
    return logits, model.write_fam(state)

  for _ in range(tokens):
    token = jnp.asarray(cases.draw_tokens(rng, BATCH, 1), jnp.int32)
    logits, there = step(weights, token, there)
    np.testing.assert_allclose(logits, plain.feed(token, lengths=[1, 1]), **cases.TOLERANCE)
  for row in range(BATCH):
    cases.assert_same_row(config, stack(settle(there)), row, plain.state, row)


@pytest.mark.parametrize("apart", [False, True])
def test_a_row_that_waits_is_due_until_its_fam_is_written(apart):
  config = cases.FAM[0]
  params, size = cases.random_params(config, 0), cases.FAM[0].memory.block_size
  model, state = cases.model(config, params), with_recent(cases.init_state(config, params), ROOM)
  model = model.unstacked() if apart else model
  for i in range(size + 1):
    lengths = jnp.array([1, 0] if i < size else [0, 1])
    _, state = model(jnp.full((BATCH, 1), 3, jnp.int32), state, lengths=lengths)
  np.testing.assert_array_equal(state.recent.due, [True, False])
  state = model.write_fam(state)
  np.testing.assert_array_equal(state.fam_updates, [1, 0])
  assert not state.recent.due.any()
