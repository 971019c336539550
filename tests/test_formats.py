"""Tests of JSON files that are checked against a schema."""

import json
import math
import os

import msgspec
import pytest

from famjax import formats
from famjax.errors import UserError
from tests import mutations


class Schema(msgspec.Struct):
  """Holds one key of each kind."""

  layers: formats.Layers
  scale: formats.Positive = 1.0
  names: list[str] = []
  rope: dict[str, float] = {}


@pytest.mark.parametrize("found, message", [
    ({}, "Object missing required field layers"),
    ([], "Expected object, got array"),
    ({"layers": "2"}, 'layers is "2": Expected int, got str'),
    ({"layers": True}, "layers is true: Expected int, got bool"),
    ({"layers": 10**9}, "layers is 1000000000: Expected int <= 4096"),
    ({"layers": 10**400}, "Expected int <= 4096"),
    ({"layers": 2, "scale": math.nan}, "scale is NaN: Expected float > 0.0"),
    ({"layers": 2, "scale": math.inf}, "scale is Infinity: Expected float <= 1e+30"),
    ({"layers": 2, "names": ["a", 1]}, "names[1] is 1: Expected str, got int"),
    ({"layers": 2, "rope": {"a": "b"}}, "Expected float, got str"),
])  # fmt: skip
def test_a_wrong_value_is_one_line(found, message):
  with pytest.raises(UserError) as refused:
    formats.check(found, Schema, "config.json")
  assert message in str(refused.value)
  assert str(refused.value).startswith("config.json: ")
  assert len(str(refused.value).splitlines()) == 1


def test_right_values_and_unknown_keys_pass():
  found = formats.check({"layers": 2, "scale": 3, "mine": [1]}, Schema, "config.json")
  assert found == Schema(layers=2, scale=3.0)


@pytest.mark.parametrize("text, message", [
    (b"", "cannot be read"),
    (b"{", "cannot be read"),
    (b"[1]", "must be a JSON object"),
    (b'{"a": "\xff"}', "cannot be read"),
    (b"[" * 100_000, "cannot be read"),
    (b'{"layers": ' + b"9" * 5000 + b"}", "cannot be read"),
])  # fmt: skip
def test_a_broken_file_is_one_line(tmp_path, text, message):
  path = tmp_path / "config.json"
  path.write_bytes(text)
  with pytest.raises(UserError, match=message) as refused:
    formats.read(path, Schema)
  assert str(path) in str(refused.value) and len(str(refused.value).splitlines()) == 1


def test_a_byte_order_mark_is_passed_over(tmp_path):
  path = tmp_path / "config.json"
  path.write_bytes(b"\xef\xbb\xbf" + json.dumps({"layers": 3}).encode())
  assert formats.read(path, Schema) == Schema(layers=3)


def test_a_file_that_is_too_large_is_not_read(tmp_path):
  path = tmp_path / "config.json"
  with path.open("wb") as file:
    file.truncate(2**26 + 1)
  with pytest.raises(UserError, match="larger than"):
    formats.read_json(path)


def test_a_file_inside_of_a_directory(tmp_path):
  directory = tmp_path / "model"
  directory.mkdir()
  assert formats.inside(directory, "config.json") == directory / "config.json"
  (directory / "b.json").symlink_to("config.json")  # to nothing, and not out
  assert formats.inside(directory, "b.json") == directory / "b.json"
  bucket = type("Bucket", (), {"__fspath__": lambda self: "gs://b/m", "__truediv__": lambda self, n: n})()
  assert formats.inside(bucket, "config.json") == "config.json"
  os.mkfifo(directory / "pipe")
  with pytest.raises(UserError, match="pipe is a pipe or a device"):
    formats.inside(directory, "pipe")
  (directory / "up").symlink_to("..")
  (directory / "near").symlink_to(tmp_path / "model-of-someone")
  for name in ("up", "near"):
    with pytest.raises(UserError, match="which is outside of"):
      formats.inside(directory, name)


@pytest.mark.parametrize("name", [
    "", ".", "..", "a/b", "/etc/passwd", "a\\b", "a\x00", "\ud800", "a" * 256, "a\n", 3, None,
])  # fmt: skip
def test_a_name_that_is_no_plain_name_of_a_file(tmp_path, name):
  with pytest.raises(UserError, match="which is no plain name of a file in it") as refused:
    formats.inside(tmp_path, name)
  assert len(str(refused.value).splitlines()) == 1


def test_a_name_that_is_not_utf_8(tmp_path):
  formats.check_name("gs://bucket/\u00fc", "run directory")
  with pytest.raises(UserError, match=r"^run directory '/r/a\\udcff': its name is not UTF-8"):
    formats.check_name(os.fsdecode(b"/r/a\xff"), "run directory")


def test_mutations_of_a_document_are_refused_or_fit():
  document = {"layers": 2, "scale": 0.5, "names": ["a"], "rope": {"theta": 1e4}, "more": {"a": [1]}}
  fine = [
      mutations.survives(lambda broken=broken: formats.check(broken, Schema, "f"), broken)
      for broken in mutations.mutations(document, 1000)
  ]
  assert 50 < sum(fine) < 950
