"""Tests of sessions and checkpoints with wrong values: one line, never a traceback."""

import json
import random
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import famjax
from famjax import cli
from famjax.errors import UserError
from famjax.inference import session
from famjax.training import checkpoint
from tests import mutations
from tests.inference import tiny
from tests.training import toy

TEXT = "To read is to forget"


@pytest.fixture(scope="module", name="model")
def _model():
  return tiny.model()


@pytest.fixture(name="saved")
def _saved(model, tmp_path):
  session.save(tmp_path / "s", model.read(TEXT), model)
  return tmp_path / "s"


def metadata_of(directory):
  """Returns the file with the metadata of a save, and what it holds."""
  path = next(directory.rglob("_CHECKPOINT_METADATA"))
  return path, json.loads(path.read_text())


def test_mutated_metadata_of_a_session(model, saved, tmp_path):
  _, document = metadata_of(saved)
  document = document["custom_metadata"]
  check = session._check  # pylint: disable=protected-access
  for broken in mutations.mutations(document, 1000):
    if isinstance(broken, dict) and "format" in broken:  # else it is no session
      mutations.survives(lambda broken=broken: check(tmp_path, broken, model), broken)


def test_mutated_metadata_of_a_checkpoint(tmp_path):
  tiny.save(tmp_path, tiny.CONFIG)
  _, document = metadata_of(tmp_path)
  document = document["custom_metadata"]
  path = tmp_path / "checkpoints" / "1"
  for broken in mutations.mutations(document, 1000):
    mutations.survives(lambda broken=broken: checkpoint.about_of(broken, path), broken)


def write(path, document):
  """Writes JSON; one that is nested too deeply for Python's encoder is written by hand."""
  try:
    path.write_text(json.dumps(document))
  except RecursionError:
    path.write_text('{"custom_metadata": ' + "[" * 2000 + "]" * 2000 + "}")


def test_mutated_files_of_a_session(model, saved):
  """The whole way, through Orbax."""
  path, document = metadata_of(saved)
  for broken in mutations.mutations(document, 60, seed=1):
    write(path, broken)
    mutations.survives(lambda: session.load(saved, model), broken)


def test_mutated_files_of_a_checkpoint(tmp_path):
  tiny.save(tmp_path, tiny.CONFIG)
  path, document = metadata_of(tmp_path)
  for broken in mutations.mutations(document, 60, seed=1):
    write(path, broken)
    mutations.survives(lambda: checkpoint.load_params(tmp_path), broken)


@pytest.mark.slow
def test_flipped_and_cut_bytes(model, saved, tmp_path):
  """Bytes of every file of a session: one line, or the session as it was."""
  rng = random.Random(0)
  files = [path for path in saved.rglob("*") if path.is_file()]
  for number in range(80):
    place = tmp_path / str(number)
    shutil.copytree(saved, place)
    path = place / rng.choice(files).relative_to(saved)
    data = bytearray(path.read_bytes())
    if rng.random() < 0.5 and data:
      data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    else:
      data = data[: rng.randrange(len(data) + 1)]
    path.write_bytes(data)
    mutations.survives(lambda place=place: session.load(place, model), path)
    shutil.rmtree(place)


@pytest.mark.parametrize("changes, message", [
    ({"rows": 10**9}, "rows is 1000000000: Expected int <= 65536"),
    ({"rows": "1"}, 'rows is "1": Expected int, got str'),
    ({"rows": 3}, "cannot be read"),
    ({"model": []}, "model is .*: Expected object"),
    ({"model": {"memory": 3}}, "made by another model"),
    ({"weights": None}, "weights is null"),
    ({"format": "three"}, "another version of famjax"),
])  # fmt: skip
def test_wrong_values_of_a_session(model, saved, changes, message):
  path, document = metadata_of(saved)
  document["custom_metadata"] |= changes
  write(path, document)
  with pytest.raises(UserError, match=message) as refused:
    session.load(saved, model)
  assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize("pattern", ["((.*)*)*x", ".*.*.*.*.*x", "(", "a" * 300, "(a|b){9}"])
def test_a_pattern_that_would_search_for_hours_is_refused(tmp_path, pattern):
  tiny.save(tmp_path, tiny.CONFIG)
  path, document = metadata_of(tmp_path)
  document["custom_metadata"]["model"] |= {"lora_rank": 2, "lora_targets": [pattern]}
  write(path, document)
  with pytest.raises(UserError, match="lora_targets"):
    checkpoint.load_params(tmp_path)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_refused(tmp_path, value):
  state, _ = toy.setting(tiny.CONFIG)
  params = jax.tree.map(np.asarray, state.params)
  scale = params["layers"]["attention_norm"]["scale"].copy()
  scale[0, 3] = value
  params["layers"]["attention_norm"]["scale"] = scale
  about = checkpoint.About(tiny.CONFIG, "bytes")
  checkpoint.save_params(tmp_path, jax.tree.map(jnp.asarray, params), about)
  for load in (famjax.load, checkpoint.load_params):
    with pytest.raises(UserError, match="1 values of layers.attention_norm.scale are NaN or inf"):
      load(str(tmp_path))
  assert cli.main(["score", str(tmp_path), "--text=To read"]) == 2
  assert famjax.load(str(tmp_path), allow_nonfinite=True).config == tiny.CONFIG


@pytest.mark.parametrize("changes", [
    {"num_layers": 10**9, "layer_kinds": ["global", "local"]}, {"num_layers": 10**9},
])  # fmt: skip
def test_layers_that_no_machine_has_are_refused_at_once(tmp_path, changes):
  tiny.save(tmp_path, tiny.CONFIG)
  path, document = metadata_of(tmp_path)
  document["custom_metadata"]["model"] |= changes
  write(path, document)
  with pytest.raises(UserError, match="num_layers is 1000000000; it must be at most 4096"):
    checkpoint.load_params(tmp_path)
