"""Tests that a directory which somebody else made imports no code, unless the user says so."""

import dataclasses
import json
import pathlib
import sys

from flax import nnx
import pytest

import famjax
from famjax import cli
from famjax.convert import hf
from famjax.errors import UserError
from famjax.inference import session
from famjax.model import strategy
from famjax.training.checkpoint import load_params
from famjax.training.train_state import split
from tests.inference import tiny

EVIL = """
import dataclasses, pathlib
from famjax.model import strategy
pathlib.Path(__file__).with_suffix(".ran").touch()

@dataclasses.dataclass(frozen=True)
class Plain(strategy.Strategy):
  pass

class NoMemory:
  def __init__(self, **_): raise SystemExit("made")

def function(): raise SystemExit("called")
"""
KINDS = ["evil:Plain", "evil:NoMemory", "evil:function", "evil", "os:system", "evil:Plain:x"]


@pytest.fixture(name="evil")
def _evil(tmp_path, monkeypatch):
  """A module in the current folder, as in a notebook; returns the file that its import leaves."""
  (tmp_path / "evil.py").write_text(EVIL)
  monkeypatch.chdir(tmp_path)
  monkeypatch.syspath_prepend(str(tmp_path))
  monkeypatch.delitem(sys.modules, "evil", raising=False)
  monkeypatch.setattr(strategy, "_IMPORTED", set())
  strategy._make.cache_clear()  # pylint: disable=protected-access
  return tmp_path / "evil.ran"


def hf_directory(place: pathlib.Path, kind: str) -> pathlib.Path:
  """Returns a Hugging Face directory whose `famjax.json` names a kind of memory."""
  config = tiny.config("full")
  hf.write(place, split(famjax.Decoder(config, rngs=nnx.Rngs(0)))[1], config)
  memory = dataclasses.asdict(tiny.config("bswa").memory)
  (place / "famjax.json").write_text(json.dumps(memory | {"kind": kind}))
  return place


def checkpoint(place: pathlib.Path, kind: str) -> pathlib.Path:
  """Returns a run's directory whose checkpoint names a kind of memory."""
  tiny.save(place, tiny.config("bswa"))
  (metadata,) = [
      path for path in place.rglob("*") if path.is_file() and b'"bswa"' in path.read_bytes()
  ]
  metadata.write_text(metadata.read_text().replace('"bswa"', json.dumps(kind)))
  return place


@pytest.mark.parametrize("make", [hf_directory, checkpoint])
@pytest.mark.parametrize("kind", KINDS)
def test_a_directory_imports_nothing(make, kind, evil, tmp_path, capsys):
  place = make(tmp_path / "model", kind)
  for act in (famjax.load, load_params):
    with pytest.raises(UserError, match="--trust_code") as refused:
      act(str(place))
    assert kind in str(refused.value) and len(str(refused.value).splitlines()) == 1
  assert cli.main(["score", str(place), "--text=To read"]) == 2
  assert "--trust_code" in capsys.readouterr().err
  assert not evil.exists() and "evil" not in sys.modules


@pytest.mark.parametrize("make", [hf_directory, checkpoint])
def test_a_directory_that_is_trusted_makes_a_memory_alone(make, evil, tmp_path, capsys):
  place = make(tmp_path / "model", "evil:Plain")
  model = famjax.load(str(place), trust_code=True)
  assert evil.exists() and model.config.memory.kind == "evil:Plain"
  assert cli.main(["score", str(place), "--text=To read", "--trust_code"]) == 0
  capsys.readouterr()
  for kind, message in (
      ("evil:NoMemory", "names no subclass"), ("evil:function", "names no subclass"),
      ("os:system", "names no subclass"), ("evil:Missing", "cannot be imported"),
      ("nowhere:X", "cannot be imported"), ("evil", "is unknown"), (":X", "cannot be imported"),
  ):  # fmt: skip
    other = make(tmp_path / kind.replace(":", "-"), kind)
    with pytest.raises(UserError, match=message):
      famjax.load(str(other), trust_code=True)


def test_trust_ends_with_the_call(evil, tmp_path):
  famjax.load(str(hf_directory(tmp_path / "one", "evil:Plain")), trust_code=True)
  strategy._IMPORTED.clear()  # pylint: disable=protected-access
  with pytest.raises(UserError, match="--trust_code"):
    famjax.load(str(hf_directory(tmp_path / "two", "evil:Plain")))
  assert evil.exists()


def test_a_kind_that_the_user_has_named_needs_no_trust(evil, tmp_path):
  """A run goes on, and is loaded, in a process whose own configuration names its memory."""
  strategy.of(famjax.MemoryConfig("evil:Plain"))
  model = famjax.load(str(checkpoint(tmp_path / "model", "evil:Plain")))
  assert evil.exists() and model.config.memory.kind == "evil:Plain"


def test_a_session_imports_nothing(evil, tmp_path):
  """A session's memory is compared with the model's, and never made."""
  model = tiny.model("bswa")
  session.save(tmp_path / "session", model.read("To read is to forget"), model)
  (metadata,) = [
      path for path in (tmp_path / "session").rglob("*")
      if path.is_file() and b'"bswa"' in path.read_bytes()
  ]  # fmt: skip
  metadata.write_text(metadata.read_text().replace('"bswa"', '"evil:Plain"'))
  with pytest.raises(UserError, match="made by another model: memory.kind is evil:Plain"):
    session.load(tmp_path / "session", model)
  assert not evil.exists()
