"""Long text: which files make a corpus, and that their text comes back."""

import sysconfig

import numpy as np
import pytest

from famjax.data.long_text import find_files
from famjax.data.long_text import LongText
from famjax.data.vocabularies import ByteVocabulary, load_vocabulary
from famjax.errors import UserError
from famjax.inference.commands import text_of


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


WRONG = {
    "latin": ("caf\u00e9".encode("latin-1"), "is not UTF-8: byte 0xe9 at 3"),
    "utf-16": ("caf\u00e9".encode("utf-16"), "is UTF-16: convert it, as with iconv -f UTF-16"),
    "utf-32": ("caf\u00e9".encode("utf-32"), "is UTF-32"),
    "utf-16 without a mark": ("cafe".encode("utf-16-le"), "has a NUL byte at 1"),
    "a surrogate": (b"a\xed\xa0\x80", "is not UTF-8: byte 0xed at 1"),
    "gzip": (b"\x1f\x8b\x08\0", "is compressed: unpack it first, with gunzip"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_file_that_is_no_text_is_refused_or_left_out(what, tmp_path, capsys):
  data, message = WRONG[what]
  (tmp_path / "a.txt").write_text("fine")
  (tmp_path / "b.txt").write_bytes(data)
  vocabulary = load_vocabulary("bytes")
  with pytest.raises(UserError, match=f"b.txt {message}.*LongText.skip_bad=True") as error:
    LongText(vocabulary, tmp_path)
  assert "\n" not in str(error.value)
  source = LongText(vocabulary, tmp_path, skip_bad=True)
  assert source.skipped == 1 and [path.name for path in source.files] == ["a.txt"]
  assert capsys.readouterr().err.startswith("famjax: note: 1 files are left out")
  (tmp_path / "a.txt").unlink()
  with pytest.raises(UserError, match=f"no file of the corpus can be used; the first: .*{message}"):
    LongText(vocabulary, tmp_path, skip_bad=True)


@pytest.mark.parametrize("text", ["a\r\nb\r\n", "a\rb", "a\n\u2028\x85b", "", "\ufeff", "a\n"])
def test_line_ends_and_a_byte_order_mark_are_as_score_has_them(text, tmp_path):
  path = tmp_path / "a.txt"
  path.write_bytes(b"\xef\xbb\xbf" + text.encode())
  vocabulary = load_vocabulary("bytes")
  tokens, _ = LongText(vocabulary, tmp_path).example(0, 0, 0)
  assert vocabulary.decode(tokens.tolist()) == text
  assert text_of(None, str(path), needed=True) == text


def test_a_file_that_changes_does_not_end_a_run(corpus, capsys):
  source = LongText(load_vocabulary("bytes"), corpus, cache_tokens=1)
  source.files[3].unlink()
  source.files[5].write_bytes(b"\xff")
  texts = [source.vocabulary.decode(source.example(0, i, 0)[0].tolist()) for i in range(40)]
  assert len(set(texts)) == 38
  said = capsys.readouterr().err
  assert said.count("left out, the next one is read") == 2 and str(source.files[3]) in said


def test_a_file_with_a_token_that_the_model_lacks(tmp_path):
  class Lacking(ByteVocabulary):
    outside = {"<tool>": 300}

    def encode(self, text):
      if "<tool>" in text:
        raise UserError("the model lacks the token '<tool>' (id 300)")
      return super().encode(text)

  (tmp_path / "a.txt").write_text("fine")
  (tmp_path / "b.txt").write_text("a <tool> b")
  with pytest.raises(UserError, match="b.txt: the model lacks the token '<tool>'"):
    LongText(Lacking(), tmp_path)
  assert LongText(Lacking(), tmp_path, skip_bad=True).skipped == 1


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
