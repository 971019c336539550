"""What families of open decoders differ in: a token and a FAM vector go through all of it.

float32 against the float64 reference (reference.py), every logit and every field of the state.
"""

import dataclasses

from hypothesis import given, settings
import jax
import numpy as np
import pytest

from famjax.errors import UserError
from famjax.model.config import MemoryConfig, ModelConfig
from tests.model import cases
from tests.model.cases import BATCH, FAMILIES, Stream

# More norms and scales in a row than in the other cases: one logit in a draw of many was off by 3e-4.
_TOLERANCE = cases.TOLERANCE | dict(atol=6e-4)


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=2)
@given(seed=cases.seeds)
def test_a_family_equals_the_reference(family, seed):
  """In one call, and token by token."""
  config = FAMILIES[family]
  params = cases.random_params(config, seed)
  tokens = cases.draw_tokens(np.random.default_rng(seed), BATCH, cases.width(config))
  at_once, stream = Stream(config, params), Stream(config, params)
  at_once.feed(tokens, aligned=True)
  for place in range(tokens.shape[1]):
    stream.feed(tokens[:, place : place + 1])
  for row in range(BATCH):
    reading = cases.read(config, params, tokens[row])
    cases.assert_equals_reference(config, at_once, row, reading, _TOLERANCE)
    cases.assert_equals_reference(config, stream, row, reading, _TOLERANCE)


def test_layers_of_several_kinds_can_stand_apart():
  config = FAMILIES["Gemma 2"]
  params = cases.random_params(config, 0)
  tokens = cases.draw_tokens(np.random.default_rng(0), BATCH, cases.width(config))
  apart = cases.model(config, params).unstacked()
  logits, _ = jax.jit(lambda: apart(tokens), compiler_options=cases.QUICK)()
  expected = Stream(config, params).feed(tokens, aligned=True)
  np.testing.assert_allclose(logits, expected, **cases.TOLERANCE)


def test_gradients_go_through_layers_of_several_kinds():
  """Rematerialised, against the difference that a small step in their direction makes."""
  config = dataclasses.replace(FAMILIES["Gemma 2"], remat="full")
  params = cases.random_params(config, 0)
  tokens = cases.draw_tokens(np.random.default_rng(0), BATCH, cases.width(config))

  def loss(params):
    return (cases.model(config, params)(tokens)[0] ** 2).mean()

  value = jax.jit(jax.value_and_grad(loss), compiler_options=cases.QUICK)
  before, gradient = value(params)
  assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient))
  square = sum(float((leaf**2).sum()) for leaf in jax.tree.leaves(gradient))
  size = 1e-2 * float(before) / square  # the loss falls by 1 % as far as it is straight
  after, _ = value(jax.tree.map(lambda leaf, g: leaf - size * g, params, gradient))
  assert before - after == pytest.approx(1e-2 * float(before), rel=0.1)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(layer_kinds=("local",) * 4), "local_window is None; local layers need one"),
        (dict(layer_kinds=("global",) * 5), "layer_kinds names 5 layers, and num_layers is 4"),
        (dict(layer_kinds=()), "layer_kinds names 0 layers, and num_layers is 4"),
        (dict(layer_kinds=("nope", "near")), "layer kind 'near' is unknown"),
        (dict(layer_kinds=("near",) * 4), "layer kind 'near' is unknown"),
        (dict(norm_place="between"), "norm_place 'between' is unknown"),
        (dict(qk_norm="all"), "qk_norm 'all' is unknown; choose one of None, head, width"),
        (dict(activation="relu"), "activation 'relu' is unknown"),
        (dict(attention_cap=0.0), "attention_cap is 0.0; it must be above 0"),
        (dict(local_rope_stretch=(4, 1, 20)), "local_rope_stretch is .*; it must be .low, high"),
        (dict(local_rope_factor=0.0), "local_rope_factor is 0.0; it must be above 0"),
        (dict(rope_stretch=(4, 1, 20)), "rope_stretch is .*; it must be .low, high, context"),
    ],
)
def test_options_that_make_no_sense(options, message):
  with pytest.raises(UserError, match=message):
    ModelConfig(memory=MemoryConfig(block_size=64, fam_length=4), **options).validate()


def test_lists_are_as_good_as_tuples():
  """JSON gives lists, and a configuration must be hashable."""
  config = ModelConfig(num_layers=2, layer_kinds=["global", "nope"], rope_stretch=[1, 4, 8192])
  assert hash(config) == hash(ModelConfig(
      num_layers=2, layer_kinds=("global", "nope"), rope_stretch=(1, 4, 8192)
  ))  # fmt: skip


def test_fewer_kinds_than_layers_are_a_pattern():
  config = ModelConfig(num_layers=5, layer_kinds=("nope", "global"))
  assert config.layer_kinds == ("nope", "global", "nope", "global", "nope")
  config.validate()
  assert config == dataclasses.replace(config, layer_kinds=config.layer_kinds)
  assert ModelConfig(layer_kinds=("global",)).normalised() == ModelConfig().normalised()
