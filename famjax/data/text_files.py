"""The one rule for text in files, which training, evaluation and the commands share.

A text file is UTF-8, with or without a byte order mark, which is no part of the text. Everything
else stays as it is in the file: line ends too, LF, CRLF or CR. A file in another encoding, a
compressed file, and a file with a NUL byte are refused; nothing is replaced or left out.
"""

import codecs
import os
import pathlib
import re

from famjax.errors import UserError

_MARKS = {  # UTF-32 first: the mark of UTF-16 begins it
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
_ZSTD, _XZ = b"\x28\xb5\x2f\xfd", b"\xfd7zXZ"
_PACKED = {b"\x1f\x8b": "gunzip", _ZSTD: "unzstd", _XZ: "unxz"}
_BZIP2 = re.compile(rb"BZh[1-9]1AY&SY")  # text may begin with "BZh"


def decode(data: bytes, name: str) -> str:
  """Returns the text of a file's bytes.

  Args:
    data: all bytes of the file.
    name: of the file, for the error message.

  Raises:
    UserError: The bytes are no UTF-8, or hold a NUL.
  """
  check_start(data, name)
  data = data.removeprefix(codecs.BOM_UTF8)
  if b"\0" in data:
    raise UserError(
        f"{name} has a NUL byte at {data.index(0):,}: it is no text, or not UTF-8; convert it, as"
        " with iconv -f UTF-16LE -t UTF-8"
    )
  try:
    return data.decode("utf-8")
  except UnicodeDecodeError as error:
    raise UserError(
        f"{name} is not UTF-8: byte {data[error.start]:#04x} at {error.start:,}; convert it, as"
        " with iconv -f LATIN1 -t UTF-8"
    ) from None


def check_start(data: bytes, name: str) -> None:
  """Raises UserError if a file begins as one that is compressed, or in another encoding.

  Args:
    data: first bytes of the file, at least ten of them if there are as many.
    name: of the file, for the error message.
  """
  for mark, encoding in _MARKS.items():
    if data.startswith(mark):
      raise UserError(f"{name} is {encoding}: convert it, as with iconv -f {encoding} -t UTF-8")
  for mark, program in _PACKED.items():
    if data.startswith(mark):
      raise UserError(f"{name} is compressed: unpack it first, with {program}")
  if _BZIP2.match(data):
    raise UserError(f"{name} is compressed: unpack it first, with bunzip2")


def read_text(path: str | os.PathLike[str]) -> str:
  """Returns the text of a file by the rule above.

  Raises:
    UserError: See `decode`.
    OSError: The file cannot be read.
  """
  return decode(pathlib.Path(path).read_bytes(), str(path))


def check_text(text: str, name: str = "the text") -> str:
  """Returns a text, if UTF-8 can write all of it.

  Half of a surrogate pair is no character. JSON can name one (`"\\ud800"`), and Python has one for
  every byte of the command line that is no UTF-8.

  Raises:
    UserError: The text holds half of a surrogate pair.
  """
  try:
    text.encode("utf-8")
  except UnicodeEncodeError as error:
    raise UserError(f"{name} is not UTF-8 at character {error.start:,}; convert it") from None
  return text
