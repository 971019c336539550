"""What is timed does what it says, and its floor is below what its program does."""

import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from famjax.bench import cases
from famjax.bench.cases import Case
from famjax.errors import UserError
from famjax.inference import engine
from famjax.inference.model import Model
from famjax.training.flops import products
from famjax.training.optimizer import OptimizerConfig
from tests.inference import tiny
from tests.training import toy

ADAM = OptimizerConfig("adamw")
MODEL = dataclasses.replace(
    tiny.CONFIG, memory=dataclasses.replace(tiny.CONFIG.memory, block_size=16, fam_length=4)
)
N = 16


def test_a_training_step_learns():
  made = cases.make(MODEL, ADAM, Case("train", "fam", 2 * N, 2))
  losses = [float(made.call(made.prepare())["loss"]) for _ in range(2)]
  assert losses[1] < losses[0] and made.memory_bytes > 3 * 4 * 10_000
  assert cases.cost_of(MODEL, ADAM, Case("train", "fam", 2 * N, 2)).tokens == 4 * N


@pytest.mark.parametrize("memory", cases.MEMORIES)
def test_a_prefill_reads_all_of_it(memory):
  case = Case("prefill", memory, 16 * N, 1)
  made = cases.make(MODEL, ADAM, case)
  model = Model(decoder_of(case), tiny.BYTES)
  tokens = cases._tokens(MODEL, 1, 16 * N)[0]  # pylint: disable=protected-access
  found = made.call(made.prepare())
  np.testing.assert_allclose(found.logits, model.read(tokens).logits, atol=1e-5)
  again = made.call(made.prepare())
  np.testing.assert_array_equal(found.logits, again.logits)


def decoder_of(case):
  one = cases._engine(cases.model_of(MODEL, case))  # pylint: disable=protected-access
  return nnx.merge(one.graphdef, one.params)


@pytest.mark.parametrize("memory", ["fam", "full"])
def test_decoding_writes_a_block(memory):
  case = Case("decode", memory, 4 * N, 2)
  made = cases.make(MODEL, ADAM, case)
  _, reading = made.call(made.prepare())
  assert reading.state.position.tolist() == [5 * N] * 2
  assert cases.cost_of(MODEL, ADAM, case).tokens == 2 * N
  if memory == "fam":
    assert reading.state.fam_updates.tolist() == [5, 5]


@pytest.mark.parametrize("memory", cases.MEMORIES)
@pytest.mark.parametrize("step", ["train", "prefill"])
def test_the_formula_is_the_least_of_the_programs_products(step, memory):
  """The program works on whole blocks, of which half is masked: more, but not twice as much."""
  case = Case(step, memory, 8 * N, 1)
  config = cases.model_of(MODEL, case)
  cost = cases.cost_of(MODEL, ADAM, case)
  if step == "train":
    done = products(jax.make_jaxpr(lambda: traced_step(config))().jaxpr)
  else:
    one = cases._engine(config)  # pylint: disable=protected-access
    tokens, counts = jnp.zeros((1, 8 * N), jnp.int32), jnp.full(1, 8 * N)
    done = products(
        jax.make_jaxpr(
            lambda r: engine._read(one.graphdef, one.params, tokens, counts, r, within=False)  # pylint: disable=protected-access
        )(one.start(1)).jaxpr
    )
  assert cost.flops <= done <= 2 * cost.flops


def traced_step(config):
  state, step = toy.setting(config, batch_size=1)
  batch = {
      "tokens": jnp.zeros((1, 8 * N), jnp.int32), "targets": jnp.zeros((1, 8 * N), jnp.int32),
      "weights": jnp.ones((1, 8 * N)), "start_of_sequence": jnp.ones(1, bool),
      "lengths": jnp.full(1, 8 * N),
  }  # fmt: skip
  return step(state, batch)


def test_bytes_of_the_floor():
  """The parameters once for each token that is written, and a ring that grows with full attention."""
  found = {
      memory: cases.cost_of(MODEL, ADAM, Case("decode", memory, 64 * N, 1)).bytes / N
      for memory in cases.MEMORIES
  }
  key_and_value = 2 * MODEL.num_layers * MODEL.kv_heads * MODEL.head_width * 4
  assert found["full"] - found["bswa"] == pytest.approx((65 - 2) * N * key_and_value, abs=16)
  fam = MODEL.num_layers * 4 * (MODEL.model_dim * 4 + 2 * MODEL.kv_heads * MODEL.head_width * 4)
  assert found["fam"] - found["bswa"] == pytest.approx(fam + 4 * 4 * MODEL.model_dim, abs=16)


def test_lengths_that_do_not_come_out():
  with pytest.raises(UserError, match="17 tokens is no multiple of block_size 16"):
    cases.model_of(MODEL, Case("train", "fam", 17, 1))
  with pytest.raises(UserError, match="no multiple of its chunks of 128"):
    cases.model_of(MODEL, Case("prefill", "fam", 9 * N, 1))
