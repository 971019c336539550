"""Long text: which files make a corpus, and that their text comes back."""

import sysconfig

import numpy as np
import pytest

from famjax.data.long_text import find_files
from famjax.data.long_text import LongText
from famjax.data.vocabularies import load_vocabulary
from famjax.errors import UserError


@pytest.fixture
def corpus(tmp_path):
  for i in range(40):
    folder = tmp_path / f"part{i % 3}"
    folder.mkdir(exist_ok=True)
    (folder / f"{i:02d}.txt").write_text(f"file {i} " * (i + 1), encoding="utf-8")
  (tmp_path / "empty.txt").touch()
  (tmp_path / "picture.png").write_bytes(b"\x89PNG")
  (tmp_path / ".hidden").mkdir()
  (tmp_path / ".hidden" / "secret.txt").write_text("no")
  return tmp_path


def test_files_are_sorted_and_the_splits_share_none(corpus):
  files = find_files(corpus)
  assert len(files) == 40
  assert files == sorted(files)
  train, validation = (find_files(corpus, split=split) for split in ("train", "validation"))
  assert len(validation) == 2 and not set(train) & set(validation)
  assert sorted(train + validation) == files
  assert [path.name for path in find_files(corpus, "*.png")] == ["picture.png"]


def test_the_default_corpus_is_the_standard_library():
  files = find_files()
  names = {path.relative_to(sysconfig.get_paths()["stdlib"]).as_posix() for path in files}
  assert {"argparse.py", "json/decoder.py"} <= names
  assert not any("site-packages" in name or name.startswith("test/") for name in names)
  assert all(name.endswith(".py") for name in names)
  assert sum(path.stat().st_size for path in files) > 4_000_000


def test_an_epoch_reads_every_file_once_in_an_order_of_its_own(corpus):
  vocabulary = load_vocabulary("bytes")
  source = LongText(vocabulary, corpus)
  epochs = []
  for epoch in range(2):
    texts = []
    for index in range(40 * epoch, 40 * (epoch + 1)):
      tokens, weights = source.example(7, index, 0)
      assert tokens[-1] == vocabulary.eos_id and tokens.dtype == np.int32
      assert weights.shape == tokens.shape and weights.dtype == np.float32 and (weights == 1).all()
      texts.append(vocabulary.decode(tokens.tolist()))
    assert sorted(texts) == sorted(path.read_text() for path in source.files)
    epochs.append(texts)
  assert epochs[0] != epochs[1]
  again = LongText(vocabulary, corpus).example(7, 50, 0)[0]
  assert vocabulary.decode(again.tolist()) == epochs[1][10]
  plain = LongText(vocabulary, corpus, shuffle=False)
  assert vocabulary.decode(plain.example(7, 42, 0)[0].tolist()) == plain.files[2].read_text()


def test_excerpts_are_stretches_of_a_file(corpus):
  vocabulary = load_vocabulary("bytes")
  source = LongText(vocabulary, corpus, excerpt_tokens=20, shuffle=False)
  starts = set()
  for epoch in range(20):
    text = vocabulary.decode(source.example(0, 40 * epoch + 13, 0)[0].tolist())
    assert text in source.files[13].read_text() and len(text) in (19, 20)
    starts.add(text)
  assert len(starts) > 5
  assert len(source.example(0, 0, 0)[0]) <= 20


def test_a_small_cache_changes_nothing(corpus):
  vocabulary = load_vocabulary("bytes")
  small, large = (LongText(vocabulary, corpus, cache_tokens=n) for n in (500, 10**6))
  for index in (0, 1, 0, 5, 1, 39, 0):
    np.testing.assert_array_equal(small.example(1, index, 0)[0], large.example(1, index, 0)[0])
  assert sum(map(len, small._cache.values())) <= 500 or len(small._cache) == 1


def test_text_that_is_not_utf8_is_read(tmp_path):
  (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
  vocabulary = load_vocabulary("bytes")
  tokens, _ = LongText(vocabulary, tmp_path).example(0, 0, 0)
  assert vocabulary.decode(tokens.tolist()) == "caf\ufffd"


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(directory="nowhere"), "nowhere: no such directory"),
        (dict(patterns="*.tex"), r"no file \*.tex with text"),
        (dict(split="test"), "split 'test'"),
        (dict(patterns="1*.txt", split="validation"), "10 files are too few"),
    ],
)
def test_what_makes_no_sense_is_named(corpus, options, message):
  with pytest.raises(UserError, match=message):
    find_files(**{"directory": corpus, **options})


def test_a_directory_without_text_is_named(tmp_path):
  (tmp_path / "empty.txt").touch()
  with pytest.raises(UserError, match=f"{tmp_path}: no file"):
    LongText(load_vocabulary("bytes"), tmp_path)
  with pytest.raises(UserError, match="excerpt_tokens 1"):
    LongText(load_vocabulary("bytes"), excerpt_tokens=1)
