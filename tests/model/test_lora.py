"""LoRA: products beside a model's matrices, in them, and out of them again."""

import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from famjax.errors import UserError
from famjax.model import lora
from famjax.model.config import PROJECTIONS
from famjax.model.decoder import Decoder
from famjax.model.layers import Projection, together
from tests.model import cases

FAM = cases.FAM[1]  # grouped queries, LayerNorm, a head of its own
TOKENS = cases.draw_tokens(np.random.default_rng(0), cases.BATCH, cases.width(FAM))


def with_lora(config, **options):
  return dataclasses.replace(config, **{"lora_rank": 3, "lora_alpha": 6.0, **options})


@jax.jit
def _forward(graphdef, params):
  return nnx.merge(graphdef, params)(TOKENS)[0]


def logits(config, params):
  return _forward(cases.abstract(config)[0], params)


def pure(params):
  return nnx.to_pure_dict(params)


def random_factors(config, seed=0):
  """Parameters, both factors of every product drawn."""
  params = pure(cases.random_params(config, seed))
  draw = np.random.default_rng(seed)

  def change(path, leaf):
    scale = 0.3 if path[-1].key in lora.NAMES else 0
    return leaf + scale * jnp.asarray(draw.standard_normal(leaf.shape), leaf.dtype)

  return jax.tree_util.tree_map_with_path(change, params)


def test_a_new_pair_changes_nothing_and_a_drawn_one_does():
  config = with_lora(FAM)
  made = pure(nnx.split(Decoder(config, rngs=nnx.Rngs(0)))[1])
  plain, _ = lora.merge(made, config)
  np.testing.assert_allclose(logits(FAM, plain), logits(config, made), atol=1e-6)
  drawn = random_factors(config)
  plain = pure(cases.random_params(FAM, 0))
  assert np.abs(logits(config, drawn) - logits(FAM, plain)).max() > 0.1


@pytest.mark.parametrize("targets", [("attention", "feedforward"), ("query|value",), ("down",)])
def test_merged_products_do_what_they_do_apart(targets):
  """Tokens and FAM alike; float32 sums in another order."""
  config = with_lora(FAM, lora_targets=targets)
  params = random_factors(config)
  merged, plain_config = lora.merge(params, config)
  assert plain_config == FAM.normalised()  # alpha and targets are gone with the rank
  np.testing.assert_allclose(
      logits(plain_config, merged), logits(config, params), **cases.TOLERANCE
  )
  again = lora.unmerge(merged, params, config)
  close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6)
  jax.tree.map(close, again, params)
  assert lora.merge(merged, plain_config) == (merged, plain_config)


def test_what_is_added_where():
  config = with_lora(FAM, lora_targets=("attention/(query|out)",), param_dtype="bfloat16")
  params = pure(nnx.split(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))[1])
  layers, (L, D, H, d) = params["layers"], (3, 16, 4, 4)
  found = {
      name for name in PROJECTIONS if "lora_a" in layers[name.split("/")[0]][name.split("/")[1]]
  }
  assert found == {"attention/query", "attention/out"}
  query, out = layers["attention"]["query"], layers["attention"]["out"]
  assert query["lora_a"].shape == (L, D, 3) and query["lora_b"].shape == (L, 3, H, d)
  assert out["lora_a"].shape == (L, H, d, 3) and out["lora_b"].shape == (L, 3, D)
  assert query["kernel"].dtype == "bfloat16"
  assert query["lora_a"].dtype == params["fam_prompt"].dtype == "float32"


def test_several_ways_to_say_the_same_lora():
  """An adapter of PEFT names its targets one by one, and has an alpha in any case."""
  one_by_one = with_lora(FAM, lora_targets=("attention/query", "attention/value"))
  assert with_lora(FAM, lora_targets=("query|value",)).normalised() == one_by_one.normalised()
  everywhere = with_lora(FAM, lora_targets=PROJECTIONS, lora_alpha=3.0)
  assert everywhere.normalised() == with_lora(FAM, lora_alpha=None).normalised()
  assert one_by_one.normalised() != everywhere.normalised() != with_lora(FAM).normalised()


def test_a_pattern_that_is_in_no_name():
  with pytest.raises(UserError, match="lora_targets: 'q_proj' is in no name.*attention/query"):
    with_lora(FAM, lora_targets=("attention", "q_proj")).validate()


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize(
    "equation, inputs, outputs",
    [
        ("...D,DHd->...Hd", (16,), (4, 8)), ("...D,DHd->...Hd", (64,), (2, 8)),
        ("...Hd,HdD->...D", (4, 8), (16,)), ("...D,Df->...f", (16,), (64,)),
        ("...f,fD->...D", (64,), (16,)),
    ],
)  # fmt: skip
def test_a_joined_product_and_its_gradients_are_those_of_two_products(equation, inputs, outputs, split):
  draw = np.random.default_rng(0)
  shapes = (2, 5, *inputs), (*inputs, *outputs), (*inputs, 3), (3, *outputs), (2, 5, *outputs)
  *given, of_y = (jnp.asarray(draw.standard_normal(shape), jnp.float32) for shape in shapes)

  def two(x, kernel, a, b):
    return lora.product(equation, x, lora.lows(equation, x, [a])[0], kernel, b)

  def one(x, kernel, a, b):
    if lora.narrows(equation):
      return lora.joined_narrowing(equation, x, kernel, a, b)
    return lora.joined_widening(equation, split, x, lora.lows(equation, x, [a])[0], kernel, b)

  (joined, back), (plain, plain_back) = (jax.vjp(function, *given) for function in (one, two))
  for one, other in zip((joined, *back(of_y)), (plain, *plain_back(of_y)), strict=True):
    np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-4)  # sums in another order


def test_matrices_that_read_the_same_vectors_share_lora_s_first_product():
  """One of six columns for three of rank 2; one matrix of three has none."""
  draw = np.random.default_rng(0)
  x = jnp.asarray(draw.standard_normal((3, 5, 16)), jnp.float32)
  make = lambda rank: Projection(
      "...D,Df->...f", (16, 8), ("embed", "mlp"), fan_in=16, param_dtype="float32",
      rngs=nnx.Rngs(rank), lora_rank=rank, lora_scale=0.5,
  )  # fmt: skip
  many = [make(2), make(0), make(4)]
  for one in many:
    if hasattr(one, "lora_b"):
      one.lora_b[...] = jnp.asarray(draw.standard_normal(one.lora_b.shape), jnp.float32)
  program = jax.make_jaxpr(lambda x: together(many, x))(x)
  columns = [eqn.outvars[0].aval.shape[-1] for eqn in program.eqns if eqn.primitive.name == "dot_general"]
  assert columns == [6, 8, 8, 8, 8, 8]  # first factors; a kernel and, where it is, a second factor
  for y, one in zip(together(many, x), many, strict=True):
    np.testing.assert_allclose(y, one(x), rtol=1e-5, atol=1e-5)  # sums in another order
