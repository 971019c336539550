"""Sessions: what is put aside comes back, and nothing else is taken for it."""

import dataclasses
import json
import os
import resource
import signal
import subprocess
import sys
import time

from flax import nnx
import jax
import numpy as np
import pytest

from famjax.errors import UserError
from famjax.inference import engine, session
from famjax.inference.model import Model
from famjax.model.decoder import Decoder
from tests.inference import tiny

TEXT = "To read is to forget, unless a few vectors carry on what the window lost."


def equal(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("kind", ["fam", "bswa"])
def test_a_reading_comes_back_bit_for_bit(tmp_path, kind):
  model = tiny.model(kind)
  assert session.load(tmp_path / "s", model) is None and not (tmp_path / "s").exists()
  first, second = model.read(TEXT[:30]), model.read(TEXT)
  session.save(tmp_path / "s", first, model)
  equal(session.load(tmp_path / "s", tiny.model(kind)), first)
  session.save(tmp_path / "s", second, model)
  equal(session.load(tmp_path / "s", model), second)
  assert len(list((tmp_path / "s").iterdir())) == 1  # the newest alone
  session.save(tmp_path / "s", first, model)  # one of fewer tokens is newer all the same
  equal(session.load(tmp_path / "s", model), first)


def test_bfloat16_and_several_rows(tmp_path):
  config = dataclasses.replace(tiny.CONFIG, compute_dtype="bfloat16")
  model = Model(Decoder(config, rngs=nnx.Rngs(0)), tiny.BYTES)
  reading = model.start(3)
  session.save(tmp_path, reading, model)
  loaded = session.load(tmp_path, model)
  equal(loaded, reading)
  assert loaded.state.fam.dtype == "bfloat16" and loaded.state.position.shape == (3,)


def test_reading_in_sittings_equals_reading_at_once(tmp_path):
  """Cut within a block, at a boundary, and by a save and a load in between."""
  model, rng = tiny.model(), np.random.default_rng(0)
  tokens = rng.integers(3, 259, 401)
  whole = model.read(tokens)
  for part in np.split(tokens, [101, 240]):
    after = session.load(tmp_path / "s", model)
    session.save(tmp_path / "s", model.read(part, after), model)
  parts = session.load(tmp_path / "s", model)
  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5)
  jax.tree.map(close, parts, whole)


@pytest.mark.slow
def test_a_million_tokens_in_three_sittings_equal_a_million_at_once(tmp_path, monkeypatch):
  monkeypatch.setattr(engine, "CHUNK_BLOCKS", tiny.CHUNK_BLOCKS)
  config = tiny.config(block_size=128, fam_length=8)
  model = Model(Decoder(config, rngs=nnx.Rngs(0)), tiny.BYTES)
  tokens = np.random.default_rng(0).integers(3, 259, 1_000_000)
  for part in np.split(tokens, [333_333, 700_001]):
    session.save(tmp_path / "s", model.read(part, session.load(tmp_path / "s", model)), model)
  in_sittings, at_once = session.load(tmp_path / "s", model), model.read(tokens)
  assert in_sittings.state.position[0] == len(tokens)
  assert in_sittings.state.fam_updates[0] == len(tokens) // 128

  def close(a, b):
    """The random FAM's residual grows without end, to 15,000, and its rounding with it."""
    np.testing.assert_allclose(a, b, atol=1e-5 * max(np.abs(b).max(), 1))

  jax.tree.map(close, in_sittings, at_once)


def test_a_session_of_another_model_is_refused_and_the_field_is_named(tmp_path):
  model = tiny.model()
  session.save(tmp_path, model.read(TEXT), model)
  kept = sorted(tmp_path.rglob("*"))
  others = {
      "weights is [0-9a-f]{16} there and": tiny.model(seed=1),
      "memory.kind is fam there and bswa here": tiny.model("bswa"),
      "num_heads is 2 there and 4 here": Model(
          Decoder(dataclasses.replace(tiny.CONFIG, num_heads=4), rngs=nnx.Rngs(0)), tiny.BYTES
      ),
  }
  for message, other in others.items():
    with pytest.raises(UserError, match=f"made by another model: {message}"):
      session.load(tmp_path, other)
  assert sorted(tmp_path.rglob("*")) == kept


def test_a_session_of_another_format_is_refused(tmp_path, monkeypatch):
  model = tiny.model()
  session.save(tmp_path, model.read(TEXT), model)
  monkeypatch.setattr(session, "FORMAT", session.FORMAT + 1)
  with pytest.raises(UserError, match=f"its format is {session.FORMAT - 1} and this version's"):
    session.load(tmp_path, model)


def test_directories_of_something_else(tmp_path):
  model = tiny.model()
  (tmp_path / "file").write_text("")
  (tmp_path / "full").mkdir()
  (tmp_path / "full" / "letter.txt").write_text("")
  tiny.save(tmp_path / "run", tiny.CONFIG)
  (tmp_path / "years" / "2023").mkdir(parents=True)
  (tmp_path / "years" / "2023" / "photo").write_text("")
  before = sorted(tmp_path.rglob("*"))
  for name, message in (
      ("file", "is a file"), ("full", r"is a directory of something else \(letter.txt\)"),
      ("run", "something else"), ("run/checkpoints", "something else"), ("years", "something else"),
  ):  # fmt: skip
    with pytest.raises(UserError, match=message):
      session.load(tmp_path / name, model)
    with pytest.raises(UserError, match=message):  # and nothing of it is overwritten
      session.save(tmp_path / name, model.read(TEXT), model)
  assert sorted(tmp_path.rglob("*")) == before


def test_what_a_first_save_that_was_killed_leaves_is_no_hindrance(tmp_path):
  model = tiny.model()
  session.save(tmp_path / "s", model.read(TEXT), model)
  (tmp_path / "s" / "1").rename(tmp_path / "s" / "1.orbax-checkpoint-tmp")
  assert session.load(tmp_path / "s", model) is None
  session.save(tmp_path / "s", model.read(TEXT[:5]), model)
  equal(session.load(tmp_path / "s", model), model.read(TEXT[:5]))


def test_a_session_of_a_model_with_more_options(tmp_path):
  model = tiny.model()
  session.save(tmp_path, model.read(TEXT), model)
  path = tmp_path / "1" / "_CHECKPOINT_METADATA"
  metadata = json.loads(path.read_text())
  metadata["custom_metadata"]["model"]["memory"]["sinks"] = 4
  path.write_text(json.dumps(metadata))
  with pytest.raises(UserError, match="memory.sinks is 4 there and None here"):
    session.load(tmp_path, model)


def test_a_cut_session_is_one_line(tmp_path, capfd):
  model = tiny.model()
  session.save(tmp_path, model.read(TEXT), model)
  largest = max((p for p in tmp_path.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
  largest.write_bytes(largest.read_bytes()[:100])
  with pytest.raises(UserError, match="cannot be read .*: delete it to begin anew") as error:
    session.load(tmp_path, model)
  assert "\n" not in str(error.value) and not capfd.readouterr().err


def test_a_full_disk_leaves_what_was_saved_before(tmp_path):
  """No file may grow past 2 kB, in a process of its own."""
  model = tiny.model()
  session.save(tmp_path, model.read(TEXT[:9]), model)
  before = session.load(tmp_path, model)
  code = f"""
import resource, signal
from famjax.errors import UserError
from famjax.inference import session
from tests.inference import tiny
model = tiny.model()
reading = model.read({TEXT!r})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
try:
  session.save({str(tmp_path)!r}, reading, model)
except UserError as error:
  print(error)
"""
  out = subprocess.run(
      [sys.executable, "-c", code], capture_output=True, text=True, check=True,
      env={**os.environ, "JAX_PLATFORMS": "cpu"},
  ).stdout.splitlines()  # fmt: skip
  assert len(out) == 1 and "cannot be saved" in out[0] and "is still there" in out[0]
  equal(session.load(tmp_path, model), before)
  assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


@pytest.mark.slow
def test_a_process_that_is_killed_while_it_saves_leaves_a_whole_session(tmp_path):
  """Killed at four moments of a loop of saves: what is there is one of them."""
  model = tiny.model()
  code = f"""
from famjax.inference import session
from tests.inference import tiny
model = tiny.model()
readings = [model.read("a" * n) for n in (1, 2, 3)]
print("saving", flush=True)
while True:
  for reading in readings:
    session.save({str(tmp_path / "s")!r}, reading, model)
    print("saved", flush=True)
"""
  wholes = [model.read("a" * n) for n in (1, 2, 3)]
  for pause in (0.0, 0.03, 0.11, 0.2):
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    for _ in range(3):
      assert process.stdout.readline()
    time.sleep(pause)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    loaded = session.load(tmp_path / "s", model)
    equal(loaded, wholes[int(loaded.state.position[0]) - 1])


def test_a_session_of_before_an_option_was_added(tmp_path):
  model = tiny.model()
  session.save(tmp_path, model.read(TEXT), model)
  path = tmp_path / "1" / "_CHECKPOINT_METADATA"
  metadata = json.loads(path.read_text())
  for name in ("local_rope_factor", "local_rope_stretch"):
    del metadata["custom_metadata"]["model"][name]
  path.write_text(json.dumps(metadata))
  equal(session.load(tmp_path, model), model.read(TEXT))
