"""Pairs of text from files: JSON lines, TSV and TFRecord, through templates.

All files are looked through when a source is made, and each record is tried with each template.
After that no record can end a run: it was refused before, or left out.
"""

from collections.abc import Iterator, Sequence
import glob
import pathlib
import string
import sys

import numpy as np
from tqdm import tqdm

from famjax.data.examples import TEMPLATE, generator, join_texts, shuffled
from famjax.data.long_text import VALIDATION_EVERY, fingerprint
from famjax.data.outside import check_inside
from famjax.data.records import KINDS, Record, kind_of, open_records
from famjax.data.text_files import check_text
from famjax.data.vocabularies import Vocabulary
from famjax.errors import UserError

QUIET_SECONDS = 10  # before a progress bar appears
_PACKED = (".gz", ".bz2", ".xz", ".zst", ".zip")


class PairFiles:
  r"""A `Source` of instructions (weight 0) and answers (weight 1) that end with `eos_id`.

  Files, by the end of their names:

    .jsonl            An object on each line. Its fields are its strings and numbers (as they are
                      written), and true and false; not null, NaN, lists or objects.
    .tsv              Tabs between fields. `\t` is a tab, `\n` a newline, `\\` a backslash, but not
                      in words of TeX (`\theta`) and paths of Windows: see `famjax.data.escapes`.
                      There is no quoting: `"` stands for itself. The names of the fields are the
                      first line, or `columns`.
    .tfrecord, .tfrecord-00000-of-00008, ...   `tf.train.Example`s, not compressed. Their fields are
                      single strings and numbers. Checksums are checked (imports TensorFlow).

  Text is UTF-8 with LF or CRLF at line ends, with or without a byte order mark.

  Attributes:
    vocabulary: encodes a pair when it is read.
    fingerprint: number of files, and a hash of their order, names and sizes; and how many records
      were left out, if any.
    skipped: number of records that were left out.
  """

  def __init__(
      self,
      vocabulary: Vocabulary,
      files: str | Sequence[str],
      templates: Sequence[tuple[str, str]] = (("{inputs}", "{targets}"),),
      *,
      columns: Sequence[str] | None = None,
      escapes: bool | None = None,
      skip_bad: bool = False,
      split: str = "all",
      shuffle: bool = True,
  ):
    r"""Finds the files and where their records begin, and tries every template on every record.

    Args:
      vocabulary: any.
      files: paths, patterns as `data/*.tsv`, or directories, whose files of these kinds are taken.
      templates: (instruction, answer) in the manner of `str.format`, as
        ("Q: {question}\\nA:", " {answer}"); of several one is drawn for every example. A field is a
        plain name, without `.` and `[`.
      columns: names of the fields of a TSV file without such a line.
      escapes: convention of TSV files. True: every `\t`, `\n` and `\\` is an escape; False: none
        is; None: see `famjax.data.escapes`.
      skip_bad: leaves out records that would be refused, and says on standard error how many.
      split: "all"; "validation", every 20th record; or "train", the others.
      shuffle: every epoch has an order of its own, by the reader's seed; else that of the files.

    Raises:
      UserError: There is no such file, it is of another kind, compressed, damaged, or without
        records; or a record cannot be read, lacks a field, has an empty answer, holds half of a
        surrogate pair, or a token that the model lacks.
    """
    if split not in ("all", "train", "validation"):
      raise UserError(f"split {split!r}: use all, train or validation")
    self.vocabulary = vocabulary
    self._templates = [tuple(template) for template in templates]
    used = _check_templates(templates)
    paths = find_pair_files(files)
    self.fingerprint = fingerprint(paths)
    self._files = [open_records(path, columns, escapes, used) for path in paths]
    self._split, self._shuffle = split, shuffle
    self._count_records()
    self.skipped = self._look_through(skip_bad)
    if self.skipped:
      self._count_records()
      self.fingerprint += f", {self.skipped} records left out"
    self._lost = 0  # records that could not be read any more

  def __len__(self) -> int:
    return self._size

  def pair(self, index: int, template: int = 0) -> tuple[str, str]:
    """Returns the instruction and the answer of a record, in the order of the files.

    Raises:
      UserError: The record is no longer what it was when it was looked through.
      OSError: Its file cannot be read any more.
    """
    number = self._number(index)
    which = int(np.searchsorted(self._ends, number, side="right"))
    file = self._files[which]
    number -= int(self._ends[which]) - len(file)
    return _filled(self._templates[template], file.read(number), file.name(number))

  def example(self, seed: int, index: int, step: int) -> tuple[np.ndarray, np.ndarray]:
    """See `Source`. In place of a record whose file has changed or gone comes the next one."""
    del step  # the pairs are the same throughout
    number = shuffled(seed, index, self._size) if self._shuffle else index % self._size
    template = int(generator(seed, index, TEMPLATE).integers(len(self._templates)))
    for other in range(number, number + self._size):
      try:
        pair = self.pair(other % self._size, template)
      except (UserError, OSError) as error:
        self._lost += 1
        if self._lost <= 5:  # whoever looks at the log knows by then
          note = f"famjax: note: left out, the next one is read: {error}"
          print(note, file=sys.stderr, flush=True)
      else:
        return join_texts(self.vocabulary, *pair)
    raise UserError(f"{self._files[0].path}: no record can be read any more: put the files back")

  def _count_records(self) -> None:
    """Counts the records of the files and of the split. Raises UserError if the split has none."""
    self._ends = np.cumsum([len(file) for file in self._files])
    every, size = VALIDATION_EVERY, int(self._ends[-1])
    held_out = size // every
    sizes = {"all": size, "validation": held_out, "train": size - held_out}
    self._size = sizes[self._split]
    if not self._size:
      few = f"{self._files[0].path}: {size} records are too few to hold one in {every} out"
      raise UserError(f"{few}: split='all'")

  def _number(self, index: int) -> int:
    """Returns the number among all records of one in the split."""
    every = VALIDATION_EVERY
    if self._split == "all":
      return index
    if self._split == "validation":
      return index * every + every - 1
    return index + index // (every - 1)

  def _look_through(self, skip_bad: bool) -> int:
    """Tries every template on every record, and returns the number of records that it left out."""
    skipped, worst = 0, None
    total = sum(map(len, self._files))
    with tqdm(
        total=total, desc="checking pairs", unit=" records", leave=False, delay=QUIET_SECONDS,
        mininterval=1,
    ) as progress:  # fmt: skip
      for file in self._files:
        good = np.ones(len(file), bool)
        for index, error in enumerate(self._errors(file)):
          if error is not None and not skip_bad:
            raise UserError(f"{error} (to leave such records out: PairFiles.skip_bad=True)")
          good[index] = error is None
          worst = worst or error
          progress.update()
        skipped += len(file) - int(good.sum())
        file.keep(good)
    if not any(map(len, self._files)):
      raise UserError(f"no record can be used; the first: {worst}")
    if skipped:
      print(
          f"famjax: note: {skipped:,} records are left out, as skip_bad says; the first: {worst}",
          file=sys.stderr, flush=True,
      )  # fmt: skip
    return skipped

  def _errors(self, file) -> Iterator[UserError | None]:
    """Yields what is wrong with each record of a file; None: nothing."""
    for index, record in enumerate(file.read_all()):
      try:
        if isinstance(record, UserError):
          raise record
        where = file.name(index)
        for template in self._templates:
          for text in _filled(template, record, where):
            check_inside(self.vocabulary, text, where)
        yield None
      except UserError as error:
        yield error


def _check_templates(templates: Sequence[tuple[str, str]]) -> frozenset[str]:
  """Returns the names of the fields in templates. Raises UserError for what is no template."""
  if not templates or not all(
      len(t) == 2 and all(isinstance(s, str) for s in t) for t in templates
  ):
    raise UserError(f'templates {templates!r}: give pairs, as (("{{inputs}}", "{{targets}}"),)')
  names = set()
  for template in templates:
    try:
      parts = [part for text in template for part in string.Formatter().parse(text)]
    except ValueError as error:
      raise UserError(f"the template {template} cannot be filled ({error})") from None
    for _, name, spec, _ in parts:
      if name is None:  # text alone
        continue
      if not name or name.isdigit() or set(name) & set(".[]") or "{" in spec:
        raise UserError(
            f"the template {template} cannot be filled: {{{name}}} is no field; a field is a plain"
            " name, as {question}"
        )
      names.add(name)
  return frozenset(names)


def _filled(template: tuple[str, str], record: Record, where: str) -> tuple[str, str]:
  """Returns a template with the fields of a record. Raises UserError if they do not fit."""
  try:
    inputs, targets = (text.format_map(record) for text in template)
  except KeyError as error:
    have = ", ".join(n if n.isprintable() else repr(n) for n in record) or "none"
    raise UserError(f"{where} lacks the field {error}; its fields: {have:.500}") from None
  except ValueError as error:  # of a format, as {answer:d}
    raise UserError(f"{where}: the template {template} cannot be filled ({error})") from None
  if not targets.strip():
    raise UserError(f"{where} has an empty answer by the template {template[1]!r}")
  check_text(inputs + "\n" + targets, f"{where}: its text")
  return inputs, targets


def find_pair_files(files: str | Sequence[str]) -> list[pathlib.Path]:
  """Returns the files of paths, patterns and directories, sorted within each of them.

  Raises:
    UserError: there is none, or one that is of no kind that is known.
  """
  found = []
  for name in (files,) if isinstance(files, str) else files:
    path = pathlib.Path(name)
    if path.is_dir():
      paths = sorted(p for p in path.iterdir() if p.is_file() and kind_of(p))
    else:
      paths = [path] if path.is_file() else sorted(map(pathlib.Path, glob.glob(name)))
    if not paths:
      raise UserError(f"{name}: no such file, or none of {', '.join(KINDS)} in it")
    found += paths
  for path in found:
    if path.suffix in _PACKED and kind_of(path.with_suffix("")):
      raise UserError(f"{path} is compressed: unpack it first, as with gunzip")
    if not kind_of(path):
      raise UserError(f"{path} is of no kind that is read; there is {', '.join(KINDS)}")
  if not found:
    raise UserError("no files of pairs were named: name at least one")
  return found
