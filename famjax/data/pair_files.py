"""Pairs of text from files: JSON lines, TSV and TFRecord, through templates.

A file is looked through once, for where its records begin and whether the templates fit each of them;
a record is read when it is asked for. Of the data two numbers a record stay in memory.
"""

from collections.abc import Callable, Iterator, Sequence
import functools
import glob
import itertools
import json
import os
import pathlib
import re
import struct

import numpy as np

from famjax.data.examples import TEMPLATE, generator, join_texts, shuffled
from famjax.data.long_text import VALIDATION_EVERY, fingerprint
from famjax.data.vocabularies import Vocabulary
from famjax.errors import UserError

Record = dict[str, str]


class PairFiles:
  r"""A `Source` of instructions (weight 0) and answers (weight 1) that end with `eos_id`.

  Files, by the end of their names:

    .jsonl            an object a line; its strings and numbers are the fields
    .tsv              tabs between fields; `\\\\n`, `\\\\t` and `\\\\\\\\` stand for what they stand for elsewhere;
                      the names of the fields are the first line, or `columns`
    .tfrecord, .tfrecord-00000-of-00008, ...   `tf.train.Example`s; their strings and numbers are the
                      fields (imports TensorFlow)

  Attributes:
    vocabulary: encodes a pair when it is read.
    fingerprint: number of files, and a hash of their order, names and sizes.
  """

  def __init__(
      self,
      vocabulary: Vocabulary,
      files: str | Sequence[str],
      templates: Sequence[tuple[str, str]] = (("{inputs}", "{targets}"),),
      *,
      columns: Sequence[str] | None = None,
      split: str = "all",
      shuffle: bool = True,
  ):
    r"""Finds the files and where their records begin, and tries every template on every record.

    Args:
      vocabulary: any.
      files: paths, patterns as `data/*.tsv`, or directories, whose files of these kinds are taken.
      templates: (instruction, answer) in the manner of `str.format`, as
        ("Q: {question}\\\\nA:", " {answer}"); of several one is drawn for every example.
      columns: names of the fields of a TSV file without such a line.
      split: "all"; "validation", every 20th record; or "train", the others.
      shuffle: every epoch has an order of its own, by the reader's seed; else that of the files.

    Raises:
      UserError: no such file, one of another kind, one without records, or a record that cannot be
        read, lacks a field, or has an empty answer.
    """
    if split not in ("all", "train", "validation"):
      raise UserError(f"split {split!r}: use all, train or validation")
    if not templates or not all(len(t) == 2 and all(isinstance(s, str) for s in t) for t in templates):
      raise UserError(f'templates {templates!r}: give pairs, as (("{{inputs}}", "{{targets}}"),)')
    self.vocabulary = vocabulary
    self._templates = [tuple(template) for template in templates]
    paths = find_pair_files(files)
    self.fingerprint = fingerprint(paths)
    self._files = [open_records(path, columns) for path in paths]
    self._ends = np.cumsum([len(file) for file in self._files])
    every, size = VALIDATION_EVERY, int(self._ends[-1])
    held_out = size // every
    self._size = {"all": size, "validation": held_out, "train": size - held_out}[split]
    if not self._size:
      raise UserError(f"{paths[0]}: {size} records are too few to hold one in {every} out: split='all'")
    self._number = {
        "all": lambda i: i,
        "validation": lambda i: i * every + every - 1,
        "train": lambda i: i + i // (every - 1),
    }[split]
    self._shuffle = shuffle
    for file in self._files:
      for n, record in enumerate(file.read_all(), 1):
        for template in self._templates:
          _filled(template, record, f"{file.path}, record {n}")

  def __len__(self) -> int:
    return self._size

  def pair(self, index: int, template: int = 0) -> tuple[str, str]:
    """Returns the instruction and the answer of a record, in the order of the files."""
    number = self._number(index)
    which = int(np.searchsorted(self._ends, number, side="right"))
    file = self._files[which]
    number -= int(self._ends[which]) - len(file)
    where = f"{file.path}, record {number + 1}"
    return _filled(self._templates[template], file.read(number), where)

  def example(self, seed: int, index: int, step: int) -> tuple[np.ndarray, np.ndarray]:
    """See `Source`."""
    del step  # the pairs are the same throughout
    number = shuffled(seed, index, self._size) if self._shuffle else index % self._size
    template = int(generator(seed, index, TEMPLATE).integers(len(self._templates)))
    return join_texts(self.vocabulary, *self.pair(number, template))


def _filled(template: tuple[str, str], record: Record, where: str) -> tuple[str, str]:
  """A template with the fields of a record. Raises UserError if they do not fit."""
  try:
    inputs, targets = (text.format_map(record) for text in template)
  except KeyError as error:
    have = ", ".join(record) or "none"
    raise UserError(f"{where} has not the field {error}; its fields: {have}") from None
  except (ValueError, IndexError, AttributeError, TypeError) as error:
    raise UserError(f"{where}: the template {template} cannot be filled ({error})") from None
  if not targets.strip():
    raise UserError(f"{where} has an empty answer by the template {template[1]!r}")
  return inputs, targets


def find_pair_files(files: str | Sequence[str]) -> list[pathlib.Path]:
  """The files of paths, patterns and directories, sorted within each of them.

  Raises:
    UserError: there is none, or one that is of no kind that is known.
  """
  found = []
  for name in (files,) if isinstance(files, str) else files:
    path = pathlib.Path(name)
    if path.is_dir():
      paths = sorted(p for p in path.iterdir() if p.is_file() and _kind(p))
    else:
      paths = [path] if path.is_file() else sorted(map(pathlib.Path, glob.glob(name)))
    if not paths:
      raise UserError(f"{name}: no such file, or none of {', '.join(_KINDS)} in it")
    found += paths
  for path in found:
    if not _kind(path):
      raise UserError(f"{path} is of no kind that is read; there is {', '.join(_KINDS)}")
  if not found:
    raise UserError("no files of pairs were named: name at least one")
  return found


class Records:
  """The records of one file.

  Attributes:
    path: of the file.
  """

  def __init__(self, path: pathlib.Path, starts: np.ndarray, parse: Callable[[bytes], Record]):
    """Takes where each record starts and ends, int64 `[n, 2]`, and what makes fields of its bytes."""
    self.path = path
    self._starts = starts
    self._parse = parse

  def __len__(self) -> int:
    return len(self._starts)

  def read(self, number: int) -> Record:
    """Returns the fields of a record. Raises UserError if it has none."""
    with open(self.path, "rb") as file:
      return self._read(file, number)

  def read_all(self) -> Iterator[Record]:
    """Gives the fields of every record. Raises UserError as `read`."""
    with open(self.path, "rb") as file:
      for number in range(len(self)):
        yield self._read(file, number)

  def _read(self, file, number: int) -> Record:
    start, end = self._starts[number].tolist()
    file.seek(start)
    data = file.read(end - start)
    try:
      return self._parse(data)
    except ValueError as error:
      raise UserError(f"{self.path}, record {number + 1} cannot be read: {error}") from None


def open_records(path: pathlib.Path, columns: Sequence[str] | None = None) -> Records:
  """Looks a file through. Raises UserError if it has no records, or is cut."""
  kind = _kind(path)
  ends = itertools.chain.from_iterable((_tfrecords if kind == ".tfrecord" else _lines)(path))
  spans = np.fromiter(ends, np.int64).reshape(-1, 2)
  parse = {".tfrecord": _parse_tfrecord, ".tsv": None}.get(kind, _parse_json)
  if kind == ".tsv":
    if columns is None and len(spans):
      head = Records(path, spans, lambda data: {"": data.decode("utf-8")}).read(0)[""]
      columns, spans = head.rstrip("\r\n").split("\t"), spans[1:]
    parse = functools.partial(_parse_tsv, columns=tuple(columns or ()))
  if not len(spans):
    raise UserError(f"{path} has no records: leave it out")
  return Records(path, spans, parse)


_KINDS = (".jsonl", ".tsv", ".tfrecord")


def _kind(path: pathlib.Path) -> str | None:
  """The end of a name that says what a file is; "x.tfrecord-00000-of-00008" is a TFRecord file."""
  found = re.fullmatch(r"(\.\w+?)(-\d+-of-\d+)?", path.suffix)
  return found[1] if found and found[1] in _KINDS else None


def _lines(path: pathlib.Path) -> Iterator[tuple[int, int]]:
  """Where the lines that are not empty start and end."""
  start = 0
  with open(path, "rb") as file:
    for line in file:
      if line.strip():
        yield start, start + len(line)
      start += len(line)


def _tfrecords(path: pathlib.Path) -> Iterator[tuple[int, int]]:
  """Where the records of a TFRecord file start and end: 8 bytes of length, 4, the record, 4."""
  size, start = os.path.getsize(path), 0
  with open(path, "rb") as file:
    while start < size:
      file.seek(start)
      head = file.read(8)
      length = struct.unpack("<Q", head)[0] if len(head) == 8 else size
      if start + 16 + length > size:
        raise UserError(f"{path} is cut, or no TFRecord file: fetch it again")
      yield start + 12, start + 12 + length
      start += 16 + length


def _parse_json(data: bytes) -> Record:
  found = json.loads(data)
  if not isinstance(found, dict):
    raise ValueError("it is no JSON object")
  plain = {name: value for name, value in found.items() if isinstance(value, (str, int, float))}
  return {name: str(value) for name, value in plain.items()}


_ESCAPED = {"\\n": "\n", "\\t": "\t", "\\r": "\r", "\\\\": "\\"}


def _parse_tsv(data: bytes, columns: Sequence[str]) -> Record:
  fields = data.decode("utf-8").rstrip("\r\n").split("\t")
  if len(fields) != len(columns):
    raise ValueError(f"it has {len(fields)} fields, and there are {len(columns)} columns: {columns}")
  return {name: _unescaped(field) for name, field in zip(columns, fields)}


def _unescaped(text: str) -> str:
  pieces, place = [], 0
  while (found := text.find("\\", place)) >= 0:
    pair = text[found : found + 2]
    pieces += [text[place:found], _ESCAPED.get(pair, pair)]
    place = found + len(pair)
  return "".join([*pieces, text[place:]])


def _parse_tfrecord(data: bytes) -> Record:
  import tensorflow as tf  # pylint: disable=g-import-not-at-top

  try:
    features = tf.train.Example.FromString(data).features.feature
  except Exception as error:  # of the protobuf library, whichever that is
    raise ValueError(f"it is no tf.train.Example ({error})") from None
  record = {}
  for name, feature in features.items():
    values = getattr(feature, feature.WhichOneof("kind") or "bytes_list").value
    if len(values) == 1:
      value = values[0]
      record[name] = value.decode("utf-8") if isinstance(value, bytes) else str(value)
  return record
