"""Checkpoints come back bit for bit, and a broken one is passed over for the newest whole one."""

import dataclasses
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from famjax.errors import UserError
from famjax.training.adoption import adopt
from famjax.training.checkpoint import About, Checkpoints, load_params
from famjax.training.storage import list_steps
from tests.training import toy

# Orbax leaves reads behind when a load fails, and pytest hears of them.
pytestmark = [
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore:coroutine:RuntimeWarning"),
]

change = dataclasses.replace
CONFIG = change(toy.TRAIN, follow_rows=True, rsp_probability=0.8)
ABOUT = About(toy.MODEL, "toy")


def filled(model=toy.MODEL, scale=1.0):
  """A train state with something in every place."""
  state, _ = toy.setting(model, CONFIG)
  rng = np.random.default_rng(0)
  fill = lambda x: jnp.asarray(rng.normal(size=x.shape) * 9 * scale, x.dtype)
  return jax.tree.map(fill, state)


def save(directory, *steps, model=toy.MODEL, keep=3):
  with Checkpoints(directory, keep) as checkpoints:
    for step in steps:
      position = np.array([step, 2**40], np.int64)
      checkpoints.save(filled(model, step), position, About(model, "toy"), step)


def restore(directory, model=toy.MODEL, vocabulary="toy"):
  template, _ = toy.setting(model, CONFIG)
  with Checkpoints(directory, 3) as checkpoints:
    return checkpoints.restore_newest(template, np.zeros(2, np.int64), About(model, vocabulary))


@pytest.mark.parametrize("model", [toy.MODEL, toy.BSWA], ids=["fam", "bswa"])
def test_everything_comes_back(tmp_path, model):
  assert restore(tmp_path, model) is None
  save(tmp_path, 1, 2, 3, model=model, keep=2)
  assert list_steps(tmp_path) == [2, 3]
  restored = restore(tmp_path, model)
  toy.assert_equal(restored.state, filled(model, 3))
  np.testing.assert_array_equal(restored.position, [3, 2**40])
  assert restored.position.dtype == np.int64 and not restored.skipped


def test_saving_goes_on_while_the_state_is_given_away(tmp_path):
  state, wanted = filled(), filled()
  add = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
  with Checkpoints(tmp_path, 3) as checkpoints:
    checkpoints.save(state, np.zeros(2, np.int64), ABOUT, 1)
    for _ in range(20):
      state = add(state)
  toy.assert_equal(restore(tmp_path).state, wanted)


def cut_largest(directory):
  path = max(directory.rglob("*"), key=lambda p: p.stat().st_size if p.is_file() else 0)
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


BREAK = {
    "truncated": lambda step: cut_largest(step / "params"),
    "truncated optimizer": lambda step: cut_largest(step / "training"),
    "uncommitted": lambda step: (step / "commit_success.txt").unlink(),
    "no parameters": lambda step: shutil.rmtree(step / "params"),
    "cut metadata": lambda step: (step / "_CHECKPOINT_METADATA").write_text('{"custom_'),
    "empty": lambda step: (shutil.rmtree(step), step.mkdir()),
}


@pytest.mark.parametrize("harm", BREAK)
def test_a_broken_checkpoint_is_passed_over(tmp_path, harm, capfd):
  save(tmp_path, 4, 8)
  BREAK[harm](tmp_path / "8")
  if harm != "truncated optimizer":
    np.testing.assert_array_equal(
        load_params(tmp_path)[0]["fam_prompt"], filled(scale=4).params["fam_prompt"]
    )
  restored = restore(tmp_path)
  toy.assert_equal(restored.state, filled(scale=4))
  assert len(restored.skipped) == 1 and str(tmp_path / "8") in restored.skipped[0]
  assert "\n" not in restored.skipped[0]
  assert list_steps(tmp_path) == [4]
  save(tmp_path, 8)  # and its place is free again
  toy.assert_equal(restore(tmp_path).state, filled(scale=8))
  assert not capfd.readouterr().err


def test_a_step_that_is_found_broken_again_is_set_aside_again(tmp_path):
  save(tmp_path, 4)
  for _ in range(3):
    save(tmp_path, 8)
    (tmp_path / "8" / "commit_success.txt").unlink()
    assert len(restore(tmp_path).skipped) == 1
  set_aside = {path.name for path in tmp_path.glob("8*")}
  assert set_aside == {"8.unreadable", "8.unreadable-2", "8.unreadable-3"}


@pytest.mark.parametrize("of", ["model", "memory"])
def test_a_checkpoint_of_a_version_with_more_options_is_whole(tmp_path, of):
  save(tmp_path, 4)
  path = tmp_path / "4" / "_CHECKPOINT_METADATA"
  metadata = json.loads(path.read_text())
  saved = metadata["custom_metadata"]["model"]
  (saved if of == "model" else saved["memory"])["newer"] = 1
  path.write_text(json.dumps(metadata))
  for read in (restore, load_params):
    with pytest.raises(UserError, match="another version of famjax: it has the option newer"):
      read(tmp_path)
  assert list_steps(tmp_path) == [4]


def test_a_save_that_was_killed_is_not_a_checkpoint(tmp_path):
  save(tmp_path, 4)
  shutil.copytree(tmp_path / "4", tmp_path / "8.orbax-checkpoint-tmp")
  assert not restore(tmp_path).skipped


def test_no_whole_checkpoint_is_an_error(tmp_path):
  save(tmp_path, 4)
  cut_largest(tmp_path / "4" / "params")
  with pytest.raises(UserError, match="delete"):
    restore(tmp_path)
  with pytest.raises(UserError, match="step 4 is not whole"):
    load_params(tmp_path)
  assert list_steps(tmp_path) == [4]


def test_another_model_or_vocabulary_is_named(tmp_path):
  save(tmp_path, 4)
  with pytest.raises(UserError, match="'toy', not 'bytes'"):
    restore(tmp_path, vocabulary="bytes")
  with pytest.raises(UserError, match="ff_dim is 32 there and 64 here"):
    restore(tmp_path, change(toy.MODEL, ff_dim=64))
  restore(tmp_path, change(toy.MODEL, remat="full"))


def test_load_params_takes_a_run_its_checkpoints_or_a_step(tmp_path):
  save(tmp_path / "checkpoints", 4, 8)
  for path, scale in (("", 8), ("checkpoints", 8), ("checkpoints/4", 4)):
    loaded = load_params(tmp_path / path)
    toy.assert_equal(loaded.params, filled(scale=scale).params)
    assert loaded[1:] == (toy.MODEL, "toy", scale)
  (tmp_path / "checkpoints").rename(tmp_path / "7")  # a run or a directory may have such a name
  assert load_params(tmp_path / "7").step == load_params(tmp_path / "7" / "8").step == 8
  (tmp_path / "9").mkdir()
  (tmp_path / "7").rename(tmp_path / "9" / "checkpoints")
  assert load_params(tmp_path / "9").step == 8
  for missing in ("nothing", "checkpoints/5"):
    with pytest.raises(UserError, match=missing):
      load_params(str(tmp_path / missing))
  assert not pathlib.Path(tmp_path / "nothing").exists()


def test_a_fam_is_added_to_a_model_without_one():
  bare, fam = filled(toy.BSWA).params, filled(scale=2.0).params
  adopted = adopt(fam, bare, seed=1)
  prompt = adopted.pop("fam_prompt")
  toy.assert_equal(adopted, bare)
  embedding = np.asarray(bare["embedder"]["embedding"])
  assert all((embedding == row).all(-1).any() for row in np.asarray(prompt))
  toy.assert_equal(adopt(bare, fam, seed=1), {k: v for k, v in fam.items() if k != "fam_prompt"})
  toy.assert_equal(adopt(fam, fam, seed=1), fam)


@pytest.mark.parametrize(
    "about, message",
    [
        (ABOUT._replace(version=1), "another version of famjax .its version is 1, this one's 4"),
        (ABOUT._replace(trainable="lora"), "of a run that trains 'lora', not 'full'"),
    ],
)
def test_a_run_that_cannot_be_gone_on_with_is_named_and_not_set_aside(about, message, tmp_path):
  with Checkpoints(tmp_path, 3) as checkpoints:
    checkpoints.save(filled(), np.zeros(2, np.int64), about, 1)
  with pytest.raises(UserError, match=message):
    restore(tmp_path)
  assert list_steps(tmp_path) == [1]


def test_one_model_said_in_two_ways_is_one_model(tmp_path):
  save(tmp_path, 1)
  said = change(
      toy.MODEL, num_kv_heads=toy.MODEL.kv_heads, head_dim=toy.MODEL.head_width,
      ff_dim=toy.MODEL.hidden_width, layer_kinds=("global",) * toy.MODEL.num_layers,
      lora_targets=("query",),
  )  # fmt: skip
  assert said != toy.MODEL and said.normalised() == toy.MODEL.normalised()
  assert restore(tmp_path, said) is not None
