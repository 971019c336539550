"""What is not trained stays as it is, costs no gradient, and stands in a run's directory once."""

import dataclasses
import json

from flax import nnx
import jax
import numpy as np
import pytest

from famjax.errors import UserError
from famjax.model import lora
from famjax.model.decoder import Decoder
from famjax.training import adoption, loop, parameters, trainable
from famjax.training.checkpoint import Loaded, load_params, save_base
from famjax.training.storage import list_steps
from famjax.training.train_state import split
from tests.training import toy

change = dataclasses.replace
LORA = change(toy.MODEL, lora_rank=2, lora_alpha=4.0, param_dtype="bfloat16")


def train(run_dir, model, **options):
  config = change(toy.TRAIN, **options)
  return loop.train(
      run_dir, model, toy.ToyReader(), toy.OPTIMIZER, config, vocabulary="toy"
  )  # fmt: skip


@pytest.fixture(scope="module", name="base")
def _base(tmp_path_factory):
  """A trained model without LoRA, in float32, to start from."""
  directory = tmp_path_factory.mktemp("base")
  train(directory, toy.MODEL, train_steps=2)
  return directory


def test_parts_are_joined_again():
  _, params = split(nnx.eval_shape(lambda: Decoder(LORA, rngs=nnx.Rngs(0))))
  for chosen, ends in (("lora", ("lora_a", "lora_b", "fam_prompt")), ("fam", ("fam_prompt",))):
    trained, frozen = trainable.part(params, chosen)
    names = parameters.names(trained)
    assert names and all(name.endswith(ends) for name in names)
    assert not any(name.endswith(ends) for name in parameters.names(frozen))
    assert jax.tree.structure(trainable.join(trained, frozen)) == jax.tree.structure(params)
  assert trainable.part(params, "full") == (params, {})


def test_lora_on_a_frozen_model(base, tmp_path, capsys):
  """From a checkpoint without it: the base stays, in bfloat16; a restart is bitwise."""
  options = dict(init_checkpoint=str(base), random_offset=True, rsp_probability=0.5)
  whole = train(tmp_path / "whole", LORA, train_steps=5, **options)
  out = capsys.readouterr().out
  count = parameters.count(whole.state.params)
  assert f"trained: {count:,} parameters (lora); " in out
  L, D, ff, H, K, d, r, F = 2, 16, 32, 2, 1, 8, 2, 2
  inner = 3 * (D + ff) + 2 * (D + H * d) + 2 * (D + K * d)  # of the seven matrices
  assert count == L * r * inner + F * D
  frozen, before = jax.device_get(whole.state.frozen), load_params(base).params
  kernel = before["layers"]["attention"]["query"]["kernel"]
  np.testing.assert_array_equal(
      frozen["layers"]["attention"]["query"]["kernel"], kernel.astype("bfloat16")
  )
  moved = parameters.names(whole.state.params)
  assert all(np.abs(x).max() > 0 and x.dtype == "float32" for x in moved.values())
  optimizer = jax.tree.leaves(whole.state.opt_state)
  assert sum(x.size for x in optimizer) < 2.1 * count
  train(tmp_path / "parts", LORA, train_steps=2, **options)
  parts = train(tmp_path / "parts", LORA, train_steps=5, **options)
  toy.assert_equal(jax.device_get(parts.state), jax.device_get(whole.state))


def test_a_checkpoint_holds_what_is_trained_and_the_base_stands_beside_it_once(base, tmp_path):
  result = train(
      tmp_path, LORA, train_steps=2, checkpoint_every=1, init_checkpoint=str(base)
  )  # fmt: skip
  assert list_steps(tmp_path / "checkpoints") == [1, 2] and list_steps(tmp_path / "base") == [0]
  tree = json.loads((tmp_path / "checkpoints" / "2" / "params" / "_METADATA").read_text())
  assert "kernel" not in json.dumps(tree) and "lora_a" in json.dumps(tree)
  loaded = load_params(tmp_path)
  toy.assert_equal(
      jax.device_get(loaded.params),
      jax.device_get(trainable.join(result.state.params, result.state.frozen)),
  )
  merged, config = lora.merge(loaded.params, loaded.model)
  assert config.lora_rank == 0 and "lora_a" not in merged["layers"]["attention"]["query"]
  (tmp_path / "base").rename(tmp_path / "elsewhere")
  with pytest.raises(UserError, match="base.0 cannot be read .* put it back"):
    load_params(tmp_path)


def test_the_fam_prompt_alone(base, tmp_path):
  """A memory for a frozen model."""
  result = train(
      tmp_path, toy.MODEL, train_steps=3, trainable="fam", init_checkpoint=str(base)
  )  # fmt: skip
  before = load_params(base).params
  after = load_params(tmp_path).params
  assert list(result.state.params) == ["fam_prompt"]
  assert np.abs(after["fam_prompt"] - before["fam_prompt"]).max() > 1e-3
  after["fam_prompt"] = before["fam_prompt"]
  toy.assert_equal(jax.device_get(after), jax.device_get(before))


def test_a_run_can_start_from_one_with_other_lora():
  """The same goes on; another starts from the matrices with the first one's products in them."""
  fresh = lambda config: lambda: split(Decoder(config, rngs=nnx.Rngs(1)))[1]
  loaded = Loaded(jax.jit(fresh(LORA))(), LORA, "toy", 1)
  start = lambda config: adoption._as_factors(loaded, config, fresh(config))
  for said in (LORA, change(LORA, lora_targets=("query|key|value|out", "gate|up|down"))):
    same, nothing = start(said)
    assert same is loaded.params and nothing == {}
  merged, _ = lora.merge(loaded.params, LORA)
  params, factors = start(change(LORA, lora_rank=3))
  toy.assert_equal(params, merged)
  names = parameters.names(factors)
  assert len(names) == 14 and all(name.split(".")[-1] in lora.NAMES for name in names)
  query = factors["layers"]["attention"]["query"]
  assert query["lora_a"].shape == (2, 16, 3) and np.abs(query["lora_a"]).min() > 0
  assert not np.any(query["lora_b"])
  params, factors = start(change(LORA, lora_rank=0))
  toy.assert_equal(params, merged)
  assert factors == {}


@pytest.mark.parametrize(
    "model, chosen, message",
    [
        (toy.MODEL, "lora", "trainable is 'lora', and the model has none: set ModelConfig.lora_rank"),
        (toy.BSWA, "fam", "trainable is 'fam', and the model has no FAM"),
        (toy.MODEL, "some", "trainable 'some' is unknown; choose one of full, lora, fam"),
    ],
)
def test_sets_that_a_model_has_not(model, chosen, message, tmp_path):
  with pytest.raises(UserError, match=message):
    train(tmp_path / "run", model, trainable=chosen)
  assert not (tmp_path / "run").exists()


def test_a_base_of_a_run_that_never_had_a_checkpoint_is_replaced(base, tmp_path):
  """Its start has moved on meanwhile; and its writing may have been cut off."""
  save_base(tmp_path, {"kernel": np.ones(3, np.float32)})
  whole = train(tmp_path, LORA, train_steps=1, init_checkpoint=str(base))
  loaded = load_params(tmp_path)
  toy.assert_equal(
      jax.device_get(loaded.params),
      jax.device_get(trainable.join(whole.state.params, whole.state.frozen)),
  )
  cut = tmp_path / "cut"
  save_base(cut, {"kernel": np.ones(3, np.float32)})
  (cut / "base" / "0" / "commit_success.txt").unlink()
  assert save_base(cut, {"kernel": np.zeros(3, np.float32)}) == save_base(
      cut, {"kernel": np.zeros(3, np.float32)}
  )


def test_factors_are_not_put_on_another_base(base, tmp_path):
  result = train(tmp_path, LORA, train_steps=1, init_checkpoint=str(base))
  save_base(tmp_path, jax.tree.map(lambda x: x + 1, result.state.frozen))
  for again in (
      lambda: load_params(tmp_path),
      lambda: train(tmp_path, LORA, train_steps=2, init_checkpoint=str(base)),
  ):
    with pytest.raises(UserError, match="base/0 holds other parameters .* put the right ones back"):
      again()


def test_a_fingerprint_sees_signs_and_places():
  x = np.arange(1, 13, dtype=np.float32).reshape(3, 4)
  swapped = x[::-1].copy()
  found = {parameters.fingerprint({"x": value}) for value in (x, -x, swapped, x.reshape(4, 3))}
  assert len(found) == 4 and parameters.fingerprint({"x": x}) in found
