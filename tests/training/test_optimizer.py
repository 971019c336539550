"""Optimizers and schedules do what their config says."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from famjax.errors import UserError
from famjax.training.optimizer import OptimizerConfig, decayed, make_optimizer, make_schedule


def rates(steps=100, **options):
  schedule = make_schedule(OptimizerConfig(learning_rate=1.0, **options), steps)
  return np.array([float(schedule(s)) for s in range(steps)])


def test_schedules():
  np.testing.assert_allclose(rates(), 1)
  warm = rates(warmup_steps=10)
  np.testing.assert_allclose(warm[:10], np.arange(1, 11) / 10, rtol=1e-6)
  np.testing.assert_allclose(warm[10:], 1)
  for schedule in ("linear", "cosine"):
    r = rates(schedule=schedule, warmup_steps=10, decay_to=0.1)
    assert np.all(np.diff(r[10:]) <= 1e-7) and r[10] == 1 and 0.1 <= r[-1] < 0.13
    assert rates(schedule=schedule, decay_steps=50, decay_to=0.5)[50:].max() == 0.5
  r = rates(schedule="rsqrt", warmup_steps=25)
  np.testing.assert_allclose(r[99], 0.5, rtol=1e-6)
  assert r.argmax() == 24


@pytest.mark.parametrize("name", ["adafactor", "adamw"])
def test_a_bowl_is_descended(name):
  config = OptimizerConfig(name, learning_rate=0.1, schedule="cosine", weight_decay=1e-4)
  optimizer = make_optimizer(config, 200)
  params = {"kernel": jnp.full((130, 129), 2.0), "scale": jnp.ones(3)}
  state = optimizer.init(params)
  loss = lambda p: sum(jnp.square(x - 0.5).mean() for x in jax.tree.leaves(p))
  before = loss(params)

  @jax.jit
  def step(params, state):
    updates, state = optimizer.update(jax.grad(loss)(params), state, params)
    return optax.apply_updates(params, updates), state

  for _ in range(200):
    params, state = step(params, state)
  assert loss(params) < before * 0.01


def test_adafactor_keeps_a_factored_second_moment():
  params = {"kernel": jnp.ones((256, 512))}
  state = make_optimizer(OptimizerConfig(b1=0.0), 10).init(params)
  assert sum(x.size for x in jax.tree.leaves(state)) < 1000


def test_first_adafactor_step_has_unit_size():
  params = {"kernel": jnp.ones((4, 4))}
  config = OptimizerConfig(b1=0.0, clip_norm=0.0, learning_rate=0.5, parameter_scale=False)
  optimizer = make_optimizer(config, 10)
  updates, _ = optimizer.update({"kernel": jnp.full((4, 4), 7.0)}, optimizer.init(params), params)
  np.testing.assert_allclose(updates["kernel"], -0.5, rtol=1e-5)


def test_norms_biases_and_prompt_are_not_decayed():
  names = ("kernel", "embedding", "scale", "bias", "fam_prompt", "fam_prefix")
  mask = decayed({"layers": {n: jnp.ones(2) for n in names}})["layers"]
  assert [n for n in names if mask[n]] == ["kernel", "embedding"]


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_a_rate_of_its_own(name):
  """Gates that begin at 0 move ten times as far as others would, whatever their size, undecayed."""
  params = {"kernel": jnp.full((4, 4), 2.0), "memory_gate": jnp.zeros(4)}
  grads = jax.tree.map(jnp.ones_like, params)
  config = OptimizerConfig(
      name=name, b1=0.0, clip_norm=0.0, learning_rate=0.1, weight_decay=0.5,
      own_rates={"memory_gate": 10.0},
  )  # fmt: skip
  config.validate()
  optimizer = make_optimizer(config, 10)
  updates, _ = optimizer.update(grads, optimizer.init(params), params)
  np.testing.assert_allclose(updates["memory_gate"], -1.0, rtol=1e-5)
  plain = 2.0 if name == "adafactor" else 1.0  # its update is as large as the parameter
  np.testing.assert_allclose(updates["kernel"], -0.1 * (plain + 0.5 * 2), rtol=1e-5)
  with pytest.raises(UserError, match="memory_gate has 0.0"):
    OptimizerConfig(own_rates={"memory_gate": 0.0}).validate()


@pytest.mark.parametrize(
    "change",
    [
        dict(name="sgd"), dict(schedule="step"), dict(learning_rate=0.0), dict(b2=1.0),
        dict(clip_norm=-1.0), dict(warmup_steps=-1), dict(warmup_steps=9, decay_steps=9),
        dict(learning_rate=float("nan")),
    ],
)  # fmt: skip
def test_values_that_make_no_sense(change):
  with pytest.raises(UserError, match=next(iter(change))):
    dataclasses.replace(OptimizerConfig(), **change).validate()
