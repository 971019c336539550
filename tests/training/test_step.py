"""The training step: what it draws, what it carries, what it keeps, and that it compiles once."""

import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from famjax.errors import UserError
from famjax.model.decoder import Decoder
from famjax.model.state import empty_state
from famjax.training.step import block_noise, join_rows, make_eval_step, split_rows, starting_memory
from famjax.training.train_state import split
from tests.training import toy

change = dataclasses.replace
EVERYTHING = change(toy.TRAIN, follow_rows=True, rsp_probability=0.8, random_offset=True)


@pytest.mark.parametrize(
    "model, follow_rows", [(toy.MODEL, False), (toy.MODEL, True), (toy.BSWA, True)]
)
def test_accumulation_equals_the_full_batch(model, follow_rows):
  config = change(EVERYTHING, follow_rows=follow_rows)
  whole, _, whole_metrics = toy.run(*toy.setting(model, config), toy.ToyReader(), 3)
  config = change(config, accumulate=4)
  parts, _, parts_metrics = toy.run(*toy.setting(model, config), toy.ToyReader(), 3)
  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5)
  jax.tree.map(close, whole_metrics, parts_metrics)
  jax.tree.map(close, (whole.carry, whole.kept_fam), (parts.carry, parts.kept_fam))
  # Adam turns rounding noise into steps where a gradient is nearly 0, so parameters are compared
  # against the size of the steps taken, 3 times 1e-2.
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-3), whole.params, parts.params)


@pytest.mark.parametrize("model, follow_rows", [(toy.MODEL, True), (toy.BSWA, False)])
def test_compiles_once_and_learns(model, follow_rows):
  state, step = toy.setting(model, change(EVERYTHING, follow_rows=follow_rows))
  _, _, metrics = toy.run(state, step, toy.ToyReader(), 40)
  assert step._cache_size() == 1
  losses = [m["loss"] for m in metrics]
  assert np.mean(losses[-5:]) < 0.9 * np.mean(losses[:5])


def test_rows_go_on_where_they_stopped():
  """Two steps of followed rows read what one call over both batches reads."""
  still = change(toy.OPTIMIZER, learning_rate=1e-30)
  state, step = toy.setting(train=change(toy.TRAIN, follow_rows=True), optimizer=still)
  reader = toy.ToyReader(document=100)
  after, _, _ = toy.run(state, step, reader, 2)
  first, position = reader.read(reader.start(), 0)
  second, _ = reader.read(position, 1)
  second_goes_on = ~second["start_of_sequence"]
  model = nnx.merge(*split(Decoder(toy.MODEL, rngs=nnx.Rngs(0))))
  first["lengths"][:] = second["lengths"][:] = reader.length
  _, at_once = model(jnp.concatenate([first["tokens"], second["tokens"]], axis=1))
  full = jax.device_get(after.carry)
  rows = second_goes_on & (full.position == 2 * reader.length)
  assert rows.any()
  np.testing.assert_allclose(full.fam[:, rows], at_once.fam[:, rows], rtol=1e-4, atol=1e-5)


def test_row_0s_fam_is_kept_and_passed():
  config = change(toy.TRAIN, rsp_probability=0.5)
  state, step = toy.setting(train=config, batch_size=64)
  reader = toy.ToyReader(batch_size=64)
  start = np.ones(64, bool)
  _, starts = starting_memory(state, start, toy.MODEL, config)
  assert starts.all()  # nothing is kept before the first step
  batch, _ = reader.read(reader.start(), 0)
  batch["lengths"][:] = 9  # two full blocks of 4
  params = jax.device_get(state.params)
  state, _ = step(state, batch)
  model = nnx.merge(split(Decoder(toy.MODEL, rngs=nnx.Rngs(0)))[0], params)
  _, after = model(batch["tokens"][:1, :9])
  np.testing.assert_allclose(state.kept_fam, after.fam[:, 0], rtol=1e-4, atol=1e-5)
  assert state.kept_updates == 2
  memory, starts = starting_memory(state, start, toy.MODEL, config)
  assert 16 < starts.sum() < 48
  assert (memory.fam_updates == np.where(starts, 0, 2)).all()
  np.testing.assert_array_equal(memory.fam[:, ~starts][:, 0], state.kept_fam)
  for first, passed in ((1, True), (2, False)):  # one step is done: the next one is number 1
    _, starts = starting_memory(state, start, toy.MODEL, change(config, rsp_from=first))
    assert starts.all() != passed
  kept = np.asarray(state.kept_fam)
  batch["lengths"][:] = 3  # no full block: what was kept stays
  state, _ = step(state, batch)
  assert state.kept_updates == 2
  np.testing.assert_array_equal(state.kept_fam, kept)


def test_only_starting_rows_are_passed_a_fam_or_draw_an_offset():
  state, _ = toy.setting(train=EVERYTHING, batch_size=64)
  carry = state.carry.replace(position=jnp.full(64, 8), offset=jnp.full(64, 7))
  state = state.replace(kept_updates=jnp.int32(3), carry=carry)
  start = np.arange(64) % 2 == 0
  memory, starts = starting_memory(state, start, toy.MODEL, change(EVERYTHING, rsp_probability=1.0))
  assert not starts.any()
  np.testing.assert_array_equal(memory.position, np.where(start, 0, 8))
  assert (memory.offset[~start] == 7).all() and not (memory.offset[start] == 7).any()


def test_random_offset_is_uniform_below_the_wavelength_or_zero():
  config = change(toy.TRAIN, random_offset=True, offset_cap=1000)
  state, _ = toy.setting(train=config)
  start = np.ones(4000, bool)
  offsets = np.asarray(starting_memory(state, start, toy.MODEL, config)[0].offset)
  assert 0.45 < (offsets == 0).mean() < 0.55
  drawn = offsets[offsets > 0]
  assert drawn.max() < 1000 and abs(drawn.mean() - 500) < 30
  theta = change(toy.MODEL, rope_theta=10.0)  # a wavelength of 62.8
  assert 55 < starting_memory(state, start, theta, config)[0].offset.max() < 63
  other = starting_memory(state.replace(step=jnp.int32(1)), start, toy.MODEL, config)[0].offset
  assert (other != offsets).any()


def test_a_batch_of_padding_moves_nothing():
  state, step = toy.setting(model=toy.BSWA)
  before = jax.device_get(state.params)
  batch, _ = toy.ToyReader().read(toy.ToyReader().start(), 0)
  state, metrics = step(state, {**batch, "weights": np.zeros_like(batch["weights"])})
  assert metrics["loss"] == 0 and metrics["grad_norm"] == 0
  toy.assert_equal(jax.device_get(state.params), before)


@pytest.mark.parametrize("parts", [1, 2, 6])
def test_rows_are_split_and_joined(parts):
  tree = (empty_state(toy.MODEL, 6), {"tokens": jnp.arange(24).reshape(6, 4), "n": jnp.arange(6)})
  tree = jax.tree.map(lambda x: jnp.arange(x.size).reshape(x.shape), tree)
  cut = split_rows(tree, parts)
  assert cut[0].keys.shape[:3] == (parts, 2, 6 // parts)
  toy.assert_equal(join_rows(cut), tree)


@pytest.mark.parametrize("kind", ["rmt", "infini"])
def test_microbatches_of_followed_rows_with_another_memory(kind):
  """Rows lie on the first axis of some leaves of such a state and on the second of others."""
  memory = dataclasses.replace(toy.MODEL.memory, kind=kind)
  model = dataclasses.replace(toy.MODEL, memory=memory)
  found = []
  for parts in (1, 2):
    config = dataclasses.replace(toy.TRAIN, accumulate=parts, follow_rows=True)
    state, step = toy.setting(model, config)
    state, _, metrics = toy.run(state, step, toy.ToyReader(), 3)
    found.append((state.carry, [m["loss"] for m in metrics]))
  # Float32 sums in another order.
  same = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
  jax.tree.map(same, *found)


def test_evaluation_follows_rows():
  config = change(toy.TRAIN, follow_rows=True)
  graphdef, params = split(Decoder(toy.MODEL, rngs=nnx.Rngs(0)))
  evaluate = make_eval_step(graphdef, toy.MODEL, config)
  batch, _ = toy.ToyReader().read(toy.ToyReader().start(), 0)
  sums, carry = evaluate(params, empty_state(toy.MODEL, 4), batch)
  assert sums.weight == pytest.approx(batch["weights"].sum()) and carry.position.max() == 12
  batch["start_of_sequence"][:] = False
  again, carry = evaluate(params, carry, batch)
  assert carry.position.max() == 24 and again.loss != sums.loss
  alone, nothing = make_eval_step(graphdef, toy.MODEL, toy.TRAIN)(params, None, batch)
  assert nothing is None and alone.loss == pytest.approx(float(sums.loss), rel=1e-5)


def test_noise_of_a_block_is_drawn_per_row_and_step():
  config = change(toy.TRAIN, fam_block_noise=0.5)
  state, _ = toy.setting(toy.MODEL)
  draw = lambda state, config, rows=64: block_noise(state, (rows, 12), toy.MODEL, config)
  noise = draw(state, config)
  F, D, N = toy.MODEL.memory.length, toy.MODEL.model_dim, toy.MODEL.memory.block_size
  assert noise.shape == (64, 12 // N, F, D)
  sizes = np.asarray(noise).std(axis=(1, 2, 3))
  assert sizes.max() < 0.6 and sizes.min() < 0.1 and abs(sizes.mean() - 0.25) < 0.06
  assert not np.array_equal(noise, draw(state.replace(step=state.step + 1), config))
  np.testing.assert_array_equal(noise, draw(state, config))
  assert draw(state, toy.TRAIN) is None
  assert block_noise(state, (2, 12), toy.BSWA, config) is None


def test_noise_of_a_block_changes_at_a_step():
  state, _ = toy.setting(toy.MODEL)
  at = lambda step, noise: np.asarray(block_noise(
      state.replace(step=jnp.int32(step)), (2, 12), toy.MODEL, change(toy.TRAIN, fam_block_noise=noise)
  ))  # fmt: skip
  for step, noise in ((0, 0.5), (2, 0.5), (3, 0.25), (5, 0.25), (6, 0.0), (99, 0.0)):
    stages = ((0, 0.5), (3, 0.25), (6, 0.0))
    np.testing.assert_array_equal(at(step, stages), noise * at(step, 1.0))


@pytest.mark.parametrize("noise", [
    -0.1, float("nan"), float("inf"), "a lot", (), ((1, 0.5),), ((0, 0.5), (0, 0.2)), ((0, -1),),
    (0, 0.5), ((0, 0.5), (9, 0.2), (4, 0.1)), ((0, 0.5, 1),), ((0, 0.5), (9.5, 0.2)),
], ids=str)  # fmt: skip
def test_noise_that_makes_no_sense_is_refused(noise):
  with pytest.raises(UserError, match="fam_block_noise is .*: use a number of at least 0, or pairs"):
    change(toy.TRAIN, fam_block_noise=noise).validate()
