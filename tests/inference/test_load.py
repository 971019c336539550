"""Loading: the same weights from any directory of a run, and under another memory."""

from flax import nnx
import numpy as np
import pytest

import famjax
from famjax.errors import UserError
from famjax.model.config import MemoryConfig
from tests.inference import tiny
from tests.training import toy

FAM, BSWA = tiny.config("fam").memory, tiny.config("bswa").memory


def weights(model):
  return nnx.to_pure_dict(nnx.state(model.decoder))


@pytest.fixture(scope="module", name="fam")
def _fam(tmp_path_factory):
  run_dir = tmp_path_factory.mktemp("fam")
  return str(run_dir), tiny.save(run_dir, tiny.config("fam"))


@pytest.fixture(scope="module", name="bswa")
def _bswa(tmp_path_factory):
  run_dir = tmp_path_factory.mktemp("bswa")
  return str(run_dir), tiny.save(run_dir, tiny.config("bswa"))


@pytest.mark.parametrize("place", ["", "/checkpoints", "/checkpoints/1"])
def test_a_run_comes_back_from_each_of_its_directories(fam, place):
  run_dir, params = fam
  model = famjax.load(run_dir + place)
  assert isinstance(model, famjax.Model)
  assert model.config == tiny.config("fam") and model.vocabulary is tiny.BYTES
  toy.assert_equal(weights(model), params)
  np.testing.assert_array_equal(model.fam_prompt, params["fam_prompt"])


def test_a_fam_model_as_bswa_and_with_more_segments(fam):
  run_dir, params = fam
  model = famjax.load(run_dir, BSWA)
  assert model.config == tiny.config("bswa") and model.fam_prompt is None
  toy.assert_equal(weights(model), {k: v for k, v in params.items() if k != "fam_prompt"})
  wide = tiny.config("fam", memory_segments=5, block_size=8)
  model = famjax.load(run_dir, memory=wide.memory)
  assert model.config == wide
  toy.assert_equal(weights(model), params)


@pytest.mark.parametrize("init, name", [("prompt", "fam_prompt"), ("prefix", "fam_prefix")])
def test_a_bswa_model_as_fam_draws_its_fam_from_the_checkpoint_s_embedding(bswa, init, name):
  run_dir, params = bswa
  memory = MemoryConfig("fam", block_size=4, memory_segments=1, fam_length=3, fam_init=init)
  model = famjax.load(run_dir, memory)
  values = weights(model)
  rows = np.asarray(values.pop(name)).reshape(-1, 16)
  toy.assert_equal(values, params)
  assert len(rows) == (3 if init == "prompt" else 6) and len(np.unique(rows, axis=0)) > 1
  embedding = np.asarray(params["embedder"]["embedding"])
  assert all((embedding == row).all(axis=1).any() for row in rows)
  toy.assert_equal(weights(famjax.load(run_dir, memory)), weights(model))  # the same draw again


def test_a_prompt_of_one_s_own(fam, bswa):
  prompt = np.arange(32, dtype=np.float64).reshape(2, 16)
  for run_dir, memory in ((fam[0], None), (bswa[0], FAM)):
    model = famjax.load(run_dir, memory, fam_prompt=prompt)
    assert model.fam_prompt.dtype == "float32"
    np.testing.assert_array_equal(model.fam_prompt, prompt)


def test_a_prompt_that_does_not_fit(fam, bswa):
  with pytest.raises(UserError, match=r"fam_prompt has shape \(3, 16\).* takes \(2, 16\)"):
    famjax.load(fam[0], fam_prompt=np.zeros((3, 16)))
  with pytest.raises(UserError, match=r"fam_prompt has shape \(2, 16\).* takes \(3, 16\)"):
    famjax.load(fam[0], MemoryConfig("fam", block_size=4, memory_segments=1, fam_length=3))
  with pytest.raises(UserError, match="no such weight"):
    famjax.load(bswa[0], fam_prompt=np.zeros((2, 16)))


def test_what_cannot_be_loaded(fam, tmp_path):
  with pytest.raises(UserError, match="no famjax checkpoint can be read at .*nothing"):
    famjax.load(str(tmp_path / "nothing"))
  with pytest.raises(UserError, match="fam_length 5 is longer than a block of 4"):
    famjax.load(fam[0], MemoryConfig("fam", block_size=4, memory_segments=1, fam_length=5))


def test_a_t5x_checkpoint_is_refused_with_what_there_is(tmp_path):
  """As T5X leaves Flan-T5: a msgpack file named checkpoint, a zarr directory for each large array."""
  (tmp_path / "checkpoint").write_bytes(b"\x82")
  (tmp_path / "target.encoder.layers_0.attention.query.kernel").mkdir()
  with pytest.raises(UserError, match="Flan-T5 are encoder-decoders, and famjax supports decoders: .*gemma"):
    famjax.load(str(tmp_path))
