"""Long text: the files of a directory, each of them one document.

The default corpus is the Python standard library's own sources, which every machine has: real,
long, and no download.
"""

import collections
import fnmatch
import hashlib
import os
import pathlib
import sys
import sysconfig
from typing import Sequence

import numpy as np

from famjax.data.examples import generator
from famjax.data.examples import shuffled
from famjax.data.outside import check_inside
from famjax.data.text_files import read_text
from famjax.data.vocabularies import begin_ids, begun, Vocabulary
from famjax.errors import UserError

PATTERNS = ("*.txt", "*.md", "*.rst", "*.py")
# Not the library itself: its tests, and what has been installed beside it.
_NOT_LIBRARY = ("test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__")
VALIDATION_EVERY = 20


def find_files(
    directory: str | os.PathLike[str] | None = None,
    patterns: str | Sequence[str] | None = None,
    split: str = "all",
) -> list[pathlib.Path]:
  """Returns the files of a corpus that are not empty, in the order of their relative paths.

  Args:
    directory: searched with its subdirectories, hidden ones left out; None: the standard library.
    patterns: of file names; None: `PATTERNS`, and "*.py" for the standard library.
    split: "all"; "validation", every 20th file; or "train", the others.

  Raises:
    UserError: no such directory, no file with text in it, or no such split.
  """
  skipped = ()
  if directory is None:
    directory, skipped = sysconfig.get_paths()["stdlib"], _NOT_LIBRARY
    patterns = patterns or ("*.py",)
  patterns = (patterns,) if isinstance(patterns, str) else tuple(patterns or PATTERNS)
  root = pathlib.Path(directory)
  if not root.is_dir():
    raise UserError(f"corpus {root}: no such directory; name one that holds text files")
  if split not in ("all", "train", "validation"):
    raise UserError(f"corpus split {split!r}: use all, train or validation")
  files = []
  for folder, folders, names in os.walk(root):
    folders[:] = [name for name in folders if name not in skipped and not name.startswith(".")]
    paths = [pathlib.Path(folder, name) for name in names]
    files += [path for path in paths if any(fnmatch.fnmatch(path.name, p) for p in patterns)]
  files = sorted(
      (path for path in files if path.is_file() and path.stat().st_size),
      key=lambda path: path.relative_to(root).as_posix(),
  )
  if not files:
    raise UserError(
        f"corpus {root}: no file {' or '.join(patterns)} with text in it; name another directory or"
        " other patterns"
    )
  held_out = files[VALIDATION_EVERY - 1 :: VALIDATION_EVERY]
  if split == "validation" and not held_out:
    raise UserError(
        f"corpus {root}: {len(files)} files are too few to hold one in {VALIDATION_EVERY} out for"
        " validation; name another directory for validation, with split all"
    )
  if split == "train":
    return [path for i, path in enumerate(files, 1) if i % VALIDATION_EVERY]
  return held_out if split == "validation" else files


class LongText:
  """A `Source` of files: every token has weight 1, and a file ends with `eos_id`.

  What the vocabulary puts before a text stands before a file and before an excerpt, with weight 0.
  Files are UTF-8, and line ends stay as they are, as `famjax score` has it: see
  `famjax.data.text_files`.

  Attributes:
    vocabulary: encodes a file when it is read.
    files: of the corpus.
    skipped: number of files that were left out.
    fingerprint: their number, and a hash of their order, names and sizes: what a position in the
      data counts on.
  """

  def __init__(
      self,
      vocabulary: Vocabulary,
      directory: str | os.PathLike[str] | None = None,
      patterns: str | Sequence[str] | None = None,
      split: str = "all",
      *,
      excerpt_tokens: int | None = None,
      skip_bad: bool = False,
      shuffle: bool = True,
      cache_tokens: int = 2**26,
  ):
    """Finds the files, and looks each of them through: after that none can end a run.

    Args:
      vocabulary: any.
      directory: of the corpus; None: the Python standard library.
      patterns: of file names.
      split: "all", "train" or "validation".
      excerpt_tokens: an example is this many tokens from a random place of a file, or the whole
        file where that is shorter; None: whole files.
      skip_bad: leaves out files that would be refused, and says on standard error how many.
      shuffle: every epoch has an order of its own, by the reader's seed; else the order of paths.
      cache_tokens: files that were read last stay in memory up to so many tokens, of two bytes each
        for a vocabulary of up to 65,536, else of four. Excerpts of a corpus that is larger come from
        files that are read and encoded again.

    Raises:
      UserError: See `find_files`; or a file is not UTF-8, or holds a token that the model lacks.
    """
    least = 2 + len(begin_ids(vocabulary))
    if excerpt_tokens is not None and excerpt_tokens < least:
      raise UserError(
          f"excerpt_tokens {excerpt_tokens}: use at least {least}, or none for whole files"
      )
    self.vocabulary = vocabulary
    found = find_files(directory, patterns, split)
    self.files = _look_through(found, vocabulary, skip_bad)
    self.skipped = len(found) - len(self.files)
    self._lost = 0  # files that could not be read any more
    self.fingerprint = fingerprint(self.files)
    self._begin = begin_ids(vocabulary)
    self._excerpt = excerpt_tokens
    self._shuffle = shuffle
    self._capacity = cache_tokens
    self._dtype = np.uint16 if vocabulary.vocab_size <= 2**16 else np.int32
    self._cache: collections.OrderedDict[int, np.ndarray] = collections.OrderedDict()

  def example(self, seed: int, index: int, step: int) -> tuple[np.ndarray, np.ndarray]:
    """See `Source`. In place of a file that has gone, or is no text now, comes the next one."""
    del step  # The files are the same throughout.
    size = len(self.files)
    tokens = self._readable_tokens(shuffled(seed, index, size) if self._shuffle else index % size)
    size = self._excerpt and self._excerpt - len(self._begin)
    if size and len(tokens) > size:
      start = int(generator(seed, index).integers(len(tokens) - size, endpoint=True))
      tokens = tokens[start : start + size]
    tokens = tokens.astype(np.int32)
    if self._begin:
      tokens = np.asarray(begun(self.vocabulary, tokens.tolist()), np.int32)
      return tokens, np.asarray(np.arange(len(tokens)) >= len(self._begin), np.float32)
    return tokens, np.broadcast_to(np.float32(1), tokens.shape)

  def _readable_tokens(self, number: int) -> np.ndarray:
    """Returns the tokens of a file, or of the next one that can be read."""
    for other in range(number, number + len(self.files)):
      try:
        return self._tokens(other % len(self.files))
      except (UserError, OSError) as error:
        self._lost += 1
        if self._lost <= 5:  # whoever looks at the log knows by then
          note = f"famjax: note: left out, the next one is read: {error}"
          print(note, file=sys.stderr, flush=True)
    raise UserError(f"{self.files[0].parent}: no file can be read any more: put the files back")

  def _tokens(self, number: int) -> np.ndarray:
    """Returns the tokens of a file, `[n]`, and keeps those of the files that were read last."""
    cache = self._cache
    tokens = cache.pop(number, None)
    if tokens is None:
      text = read_text(self.files[number])
      tokens = np.asarray([*self.vocabulary.encode(text), self.vocabulary.eos_id], self._dtype)
      while cache and len(tokens) + sum(map(len, cache.values())) > self._capacity:
        cache.popitem(last=False)
    cache[number] = tokens
    return tokens


def _look_through(
    files: list[pathlib.Path], vocabulary: Vocabulary, skip_bad: bool
) -> list[pathlib.Path]:
  """Returns the files that can be trained on. Raises UserError for one that cannot, or for all."""
  good, worst = [], None
  for path in files:
    try:
      check_inside(vocabulary, read_text(path), str(path))
      good.append(path)
    except (UserError, PermissionError, FileNotFoundError) as error:
      worst = worst or error
      if not skip_bad:
        raise UserError(f"{error} (to leave such files out: LongText.skip_bad=True)") from None
  if not good:
    raise UserError(f"no file of the corpus can be used; the first: {worst}")
  if worst:
    print(
        f"famjax: note: {len(files) - len(good):,} files are left out, as skip_bad says; the first:"
        f" {worst}",
        file=sys.stderr, flush=True,
    )  # fmt: skip
  return good


def fingerprint(files: Sequence[pathlib.Path]) -> str:
  """How many files there are, and a hash of their order, names and sizes."""
  files = [path.absolute() for path in files]
  root = os.path.commonpath([path.parent for path in files])
  listing = [(os.path.relpath(path, root), path.stat().st_size) for path in files]
  return f"{len(files)} files, {hashlib.sha256(repr(listing).encode()).hexdigest()[:8]}"
