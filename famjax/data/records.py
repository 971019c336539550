"""Records of files of pairs: JSON lines, TSV and TFRecord.

A file is looked through once for where its records begin; a record is read when it is asked for.
Two numbers for each record stay in memory.
"""

import codecs
from collections.abc import Callable, Iterator, Sequence
import functools
import itertools
import json
import math
import os
import pathlib
import re
import struct

import numpy as np

from famjax.data import crc32c
from famjax.data.escapes import unescaped
from famjax.data.text_files import check_start
from famjax.errors import one_line, UserError

Record = dict[str, str]
KINDS = (".jsonl", ".tsv", ".tfrecord")


class Records:
  """The records of one file.

  Attributes:
    path: of the file.
  """

  def __init__(self, path: pathlib.Path, spans: np.ndarray, parse: Callable[[bytes], Record]):
    """Takes where the records are.

    Args:
      path: of the file.
      spans: int64 `[n, 2]`, the places of the first byte of each record and of the one after it.
      parse: makes the fields of a record's bytes. Raises ValueError if they are no record.
    """
    self.path = path
    self._spans = spans
    self._numbers = np.arange(1, len(spans) + 1)
    self._parse = parse

  def __len__(self) -> int:
    return len(self._spans)

  def keep(self, chosen: np.ndarray) -> None:
    """Leaves out all records but those that bool `[n]` chooses."""
    self._spans, self._numbers = self._spans[chosen], self._numbers[chosen]

  def name(self, index: int) -> str:
    """Returns the file and the number of a record in it, counted from one."""
    return f"{self.path}, record {self._numbers[index]}"

  def read(self, index: int) -> Record:
    """Returns the fields of a record. Raises UserError if it has none."""
    with open(self.path, "rb") as file:
      return self._read(file, index)

  def read_all(self) -> Iterator[Record | UserError]:
    """Yields the fields of every record, or what is wrong with it."""
    with open(self.path, "rb") as file:
      for index in range(len(self)):
        try:
          yield self._read(file, index)
        except UserError as error:
          yield error

  def _read(self, file, index: int) -> Record:
    start, end = self._spans[index].tolist()
    file.seek(start)
    data = file.read(end - start)
    try:
      if len(data) < end - start:
        raise ValueError("the file has become shorter")
      return self._parse(data)
    except ValueError as error:
      raise UserError(f"{self.name(index)} cannot be read: {one_line(error, 300)}") from None
    except RecursionError:
      raise UserError(f"{self.name(index)} cannot be read: it is nested too deeply") from None


def kind_of(path: pathlib.Path) -> str | None:
  """Returns the kind of a file by its name, such as ".tfrecord" for "x.tfrecord-00000-of-00008"."""
  found = re.fullmatch(r"(\.\w+?)(-\d+-of-\d+)?", path.suffix)
  return found[1] if found and found[1] in KINDS else None


def open_records(
    path: pathlib.Path,
    columns: Sequence[str] | None = None,
    escapes: bool | None = None,
    used: frozenset[str] = frozenset(),
) -> Records:
  """Looks a file through.

  Args:
    path: of the file; its name says its kind.
    columns: names of a TSV file's fields; None: its first line has them.
    escapes: convention of a TSV file, see `famjax.data.escapes`.
    used: names of fields that must be text.

  Raises:
    UserError: The file has no records, is cut, compressed or damaged, or is no UTF-8.
  """
  try:
    with open(path, "rb") as file:
      start = file.read(16)
  except PermissionError:
    raise UserError(f"{path} cannot be read: this user has no permission") from None
  kind = kind_of(path)
  if kind == ".tfrecord":
    spans, parse = _spans(_tfrecords(path, start)), functools.partial(_parse_tfrecord, used=used)
  else:
    check_start(start, str(path))
    first = len(codecs.BOM_UTF8) if start.startswith(codecs.BOM_UTF8) else 0
    blank = b"\r\n" if kind == ".tsv" else None
    spans, parse = _spans(_lines(path, first, blank)), _parse_json
    if kind == ".tsv":
      if columns is None and len(spans):
        columns, spans = _header(path, spans), spans[1:]
      parse = functools.partial(_parse_tsv, columns=tuple(columns or ()), escapes=escapes)
  if not len(spans):
    raise UserError(f"{path} has no records: leave it out")
  return Records(path, spans, parse)


def _spans(pairs: Iterator[tuple[int, int]]) -> np.ndarray:
  return np.fromiter(itertools.chain.from_iterable(pairs), np.int64).reshape(-1, 2)


def _lines(path: pathlib.Path, first: int, blank: bytes | None) -> Iterator[tuple[int, int]]:
  """Yields where lines start and end; not of those that hold `blank` alone, None: white space."""
  start = first
  with open(path, "rb") as file:
    file.seek(first)
    for line in file:
      if line.strip(blank):
        yield start, start + len(line)
      start += len(line)


def _header(path: pathlib.Path, spans: np.ndarray) -> list[str]:
  """Returns the names in the first line of a TSV file."""

  def parse(data: bytes) -> Record:
    return {"": _utf8(data).rstrip("\r\n")}

  names = Records(path, spans, parse).read(0)[""].split("\t")
  if twice := sorted({name for name in names if names.count(name) > 1}):
    raise UserError(f"{path}: two columns are called {twice[0]!r}: rename one, or give columns")
  return names


def _utf8(data: bytes) -> str:
  """Returns the text of a line. Raises ValueError if it is none."""
  if b"\0" in data:
    raise ValueError("it has a NUL byte: the file is no text, or not UTF-8; convert it, with iconv")
  return data.decode("utf-8")


class _Object(list):
  """A JSON object as its (key, value) pairs."""


def _parse_json(data: bytes) -> Record:
  """Returns the strings, numbers, true and false of a JSON object; numbers as they are written."""
  found = json.loads(
      _utf8(data).removeprefix("\ufeff"),  # of a file that was put behind another
      object_pairs_hook=_Object, parse_int=str, parse_float=str, parse_constant=lambda name: None,
  )  # fmt: skip
  if not isinstance(found, _Object):
    raise ValueError("it is no JSON object")
  record = dict(found)
  if len(record) < len(found):
    names = [name for name, _ in found]
    raise ValueError(f"it has {next(n for n in names if names.count(n) > 1)!r} twice")
  return {name: str(value) for name, value in record.items() if isinstance(value, (str, bool))}


def _parse_tsv(data: bytes, columns: Sequence[str], escapes: bool | None) -> Record:
  fields = _utf8(data).rstrip("\r\n").split("\t")
  if len(fields) != len(columns):
    sizes = f"{len(fields)} fields, and there are {len(columns)} columns"
    raise ValueError(f"it has {sizes}: {columns}")
  return {name: unescaped(field, escapes) for name, field in zip(columns, fields, strict=True)}


def _tfrecords(path: pathlib.Path, start: bytes) -> Iterator[tuple[int, int]]:
  """Yields where records and their checksums start and end.

  A record is 8 bytes of length, 4 of the length's checksum, the data, and 4 of its checksum.

  Args:
    path: of the file.
    start: first 16 bytes of the file.
  """
  if len(start) >= 12 and not crc32c.matches(start[:8], start[8:12]):
    _check_packed(path, start)
  size, place = os.path.getsize(path), 0
  with open(path, "rb") as file:
    for number in itertools.count(1):
      if place == size:
        return
      file.seek(place)
      head = file.read(12)
      length = struct.unpack("<Q", head[:8])[0] if len(head) == 12 else size
      if place + 16 + length > size:
        raise UserError(f"{path} is cut, or no TFRecord file: fetch it again")
      if not crc32c.matches(head[:8], head[8:]):
        raise UserError(
            f"{path}, record {number}: its length has a wrong checksum: the file is damaged, or no"
            " TFRecord file; fetch it again"
        )
      yield place + 12, place + 16 + length
      place += 16 + length


def _check_packed(path: pathlib.Path, start: bytes) -> None:
  """Raises UserError if a file without a TFRecord's start is a compressed one."""
  check_start(start, str(path))
  if start[0] == 0x78 and (start[0] * 256 + start[1]) % 31 == 0:  # the head of zlib's format
    raise UserError(
        f"{path} is compressed (ZLIB): write it anew without compression, or unpack it, as with"
        " Python's zlib.decompress"
    )


def _parse_tfrecord(data: bytes, used: frozenset[str]) -> Record:
  """Returns the texts and numbers of a `tf.train.Example`; data ends with its checksum."""
  import tensorflow as tf  # pylint: disable=g-import-not-at-top

  data, checksum = data[:-4], data[-4:]
  if not crc32c.matches(data, checksum):
    raise ValueError("its data has a wrong checksum: the file is damaged, fetch it again")
  try:
    features = tf.train.Example.FromString(data).features.feature
  except Exception as error:  # of the protobuf library, whichever that is
    raise ValueError(f"it is no tf.train.Example ({error})") from None
  record = {}
  for name, feature in features.items():
    values = getattr(feature, feature.WhichOneof("kind") or "bytes_list").value
    if len(values) != 1:
      continue
    value = values[0]
    if isinstance(value, bytes):  # of fields that are not used, such as pictures, no text is asked
      record[name] = value.decode("utf-8", "strict" if name in used else "replace")
    elif isinstance(value, int):
      record[name] = str(value)
    elif math.isfinite(value):
      record[name] = str(np.float32(value))
  return record
