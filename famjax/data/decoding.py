"""Decoders of token streams: text piece by piece, equal to decoding all ids at once.

    decoder = vocabulary.decoder()
    text = "".join(map(decoder.push, ids)) + decoder.end()  # vocabulary.decode(ids)

A decoder gives out text as soon as no later token can change it. Every push costs constant time.
"""

from collections.abc import Callable, Iterable
import codecs
import copy
from typing import Any, Protocol

from famjax.errors import UserError

BROKEN = "\ufffd"  # stands for bytes that are no character
LONGEST_RUN = 1024  # byte tokens that one run holds back at most, see `ByteRuns`


class Decoder(Protocol):
  """Turns tokens into text, one by one."""

  def push(self, token: int) -> str:
    """Takes one more token, and returns the text that no later token can change."""

  def pending(self) -> str:
    """Returns the text that `end` would add now, without an unfinished character."""

  def end(self) -> str:
    """Returns the rest of the text. No more tokens may follow."""


class Whole:
  """A decoder for functions that need the whole text at once: gives it at the end."""

  def __init__(self, decode: Callable[[list[int]], str]):
    self._decode, self._tokens = decode, []

  def push(self, token: int) -> str:
    """See `Decoder`."""
    self._tokens.append(token)
    return ""

  def pending(self) -> str:
    """See `Decoder`. Nothing of a long text, where every look would cost its whole length."""
    if len(self._tokens) > LONGEST_RUN:
      return ""
    return self._decode(self._tokens).rstrip(BROKEN)

  def end(self) -> str:
    """See `Decoder`."""
    return self._decode(self._tokens)


class Chain:
  """A decoder of steps: each takes the strings of the one before and passes strings on."""

  def __init__(self, piece: Callable[[int], str | None], steps: Iterable["Step"]):
    """Makes a decoder.

    Args:
      piece: string of a token; None if it has no text at all.
      steps: in their order. A decoder changes them, so it needs fresh ones.
    """
    self._piece, self._steps = piece, list(steps)

  def push(self, token: int) -> str:
    """See `Decoder`."""
    piece = self._piece(token)
    return "" if piece is None else _run(self._steps, [piece])

  def pending(self) -> str:
    """See `Decoder`."""
    return _end([copy.copy(step) for step in self._steps], finished=False)

  def end(self) -> str:
    """See `Decoder`."""
    return _end(self._steps, finished=True)


class Step:
  """A step of a `Chain`. Subclasses keep immutable values alone, so that a shallow copy is one."""

  def push(self, piece: str) -> list[str]:
    """Returns the strings that are certain after one more string."""
    raise NotImplementedError

  def end(self, finished: bool) -> list[str]:
    """Returns the strings that are left.

    Args:
      finished: The text ends here. If not, an unfinished character is left out.
    """
    del finished
    return []


class Each(Step):
  """A function of every string alone; the first one may have another function."""

  def __init__(self, function: Callable[[str], str], first: Callable[[str], str] | None = None):
    self._function, self._next = function, first or function

  def push(self, piece):
    function, self._next = self._next, self._function
    return [function(piece)]


class Utf8(Step):
  """Decodes bytes; bytes that are no character become U+FFFD, as Unicode recommends."""

  def __init__(self, to_bytes: Callable[[str], bytes]):
    self._to_bytes, self._unfinished = to_bytes, b""

  def push(self, piece):
    data = self._unfinished + self._to_bytes(piece)
    text, used = codecs.utf_8_decode(data, "replace", False)
    self._unfinished = data[used:]
    return [text]

  def end(self, finished):
    return [self._unfinished.decode("utf-8", "replace")] if finished else []


class ByteRuns(Step):
  """Strings `<0xE6>` become bytes; a run of them that is no UTF-8 becomes U+FFFD for every byte.

  A byte that comes later can break a whole run. So a run is held back until it ends, or is broken,
  or has `LONGEST_RUN` bytes. After these, its characters come out one by one.
  """

  _run, _broken, _released = b"", False, False

  def push(self, piece):
    byte = byte_of(piece)
    if byte is None:
      out = [*self.end(True), piece]
      self._run, self._broken, self._released = b"", False, False
      return out
    if self._broken:
      return [BROKEN]
    self._run += bytes([byte])
    if self._released:
      return [self._characters("replace")]
    try:
      _, used = codecs.utf_8_decode(self._run, "strict", False)
    except UnicodeDecodeError:
      out, self._run, self._broken = [BROKEN] * len(self._run), b"", True
      return out
    if len(self._run) > LONGEST_RUN:
      self._released = True
      return [self._characters("strict")]
    return []

  def end(self, finished):
    if not finished:
      return [codecs.utf_8_decode(self._run, "strict", False)[0]]
    if self._released:
      return [self._run.decode("utf-8", "replace")]
    try:
      return [self._run.decode("utf-8")] if self._run else []
    except UnicodeDecodeError:
      return [BROKEN] * len(self._run)

  def _characters(self, errors: str) -> str:
    text, used = codecs.utf_8_decode(self._run, errors, False)
    self._run = self._run[used:]
    return text


class Strip(Step):
  """Drops up to `start` and `stop` of a character at the ends of the whole text."""

  def __init__(self, character: str, start: int, stop: int):
    self._character, self._start, self._stop = character, start, stop
    self._held = 0  # of the character, at the end of the text so far

  def push(self, piece):
    while self._start and piece.startswith(self._character):
      piece, self._start = piece[1:], self._start - 1
    if not piece:
      return []
    self._start = 0
    text = self._character * self._held + piece
    least = max(len(text) - self._stop, 0)
    end = len(text)
    while end > least and text[end - 1] == self._character:
      end -= 1
    self._held = len(text) - end
    return [text[:end]]


class Substitute(Step):
  """Replaces a string wherever it stands in the whole text."""

  def __init__(self, old: str, new: str):
    self._old, self._new, self._held = old, new, ""

  def push(self, piece):
    *parts, last = (self._held + piece).split(self._old)
    held = overlap(last, self._old)
    last, self._held = last[: len(last) - held], last[len(last) - held :]
    return [self._new.join([*parts, last])]

  def end(self, finished):
    return [self._held]


class HoldLast(Step):
  """A function of every string alone; the last one of a text has another function."""

  def __init__(self, function: Callable[[str], str], last: Callable[[str], str]):
    self._function, self._last_function, self._held = function, last, None

  def push(self, piece):
    held, self._held = self._held, piece
    return [] if held is None else [self._function(held)]

  def end(self, finished):
    return [] if self._held is None else [self._last_function(self._held)]


class Deduplicate(Step):
  """Drops a string that repeats the one before, and strings that a function leaves empty."""

  def __init__(self, function: Callable[[str], str]):
    self._function, self._before = function, None

  def push(self, piece):
    if piece == self._before:
      return []
    self._before = piece
    return list(filter(None, [self._function(piece)]))


def byte_of(piece: str) -> int | None:
  """Returns the byte that a string such as `<0xE6>` stands for; None if it is another string."""
  if len(piece) != 6 or piece[:3] != "<0x" or piece[5] != ">" or not piece.isascii():
    return None
  digits = piece[3:5].removeprefix("+")
  return int(digits, 16) if digits.isalnum() and all(c in _HEX for c in digits) else None


def is_panic(error: BaseException) -> bool:
  """Whether an error is a panic of the tokenizers library, which is no `Exception`."""
  return (type(error).__module__, type(error).__name__) == ("pyo3_runtime", "PanicException")


def overlap(text: str, other: str) -> int:
  """Returns the length of the longest end of `text` that is a proper beginning of `other`."""
  most = min(len(text), len(other) - 1)
  return next((n for n in range(most, 0, -1) if text.endswith(other[:n])), 0)


_HEX = frozenset("0123456789abcdefABCDEF")


def _run(steps: list[Step], pieces: list[str]) -> str:
  for step in steps:
    pieces = [out for piece in pieces for out in step.push(piece)]
  return "".join(pieces)


def _end(steps: list[Step], finished: bool) -> str:
  pieces: list[str] = []
  for step in steps:
    pieces = [out for piece in pieces for out in step.push(piece)] + step.end(finished)
  return "".join(pieces)


def steps_of(spec: Any) -> list[Step] | None:
  """Returns the steps of a `decoder` of tokenizer.json.

  Args:
    spec: JSON object; None: pieces are joined by spaces.

  Returns:
    None if a part of the decoder needs the whole text at once, or is written in another way than
    the library writes it.
  """
  if spec is None:
    return [Each(" {}".format, str)]
  steps, fused = [], False
  try:
    for part in _flat(spec):
      kind = part["type"]
      step = (_fused_step if fused else _step)(kind, part)
      if step is None:
        return None
      steps += step
      fused = fused or kind in ("Fuse", "ByteLevel")
  except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
    return None
  return steps


def _flat(spec: dict[str, Any]) -> list[dict[str, Any]]:
  if spec["type"] != "Sequence":
    return [spec]
  return [part for inner in spec["decoders"] for part in _flat(inner)]


def _step(kind: str, part: dict[str, Any]) -> list[Step] | None:
  """Steps of a part whose strings are tokens; the library does what concerns one token alone."""
  from tokenizers import decoders  # pylint: disable=g-import-not-at-top  (only these models need it)

  one = lambda decoder: lambda piece: _decoded(decoder, [piece])
  later = lambda decoder: lambda piece: _decoded(decoder, ["", piece])
  match kind:
    case "Fuse":
      return []
    case "ByteFallback":
      return [ByteRuns()]
    case "ByteLevel":
      return [Utf8(_byte_level)]
    case "Replace":
      return [Each(one(_replace(part)))]
    case "Strip":
      return [Each(one(decoders.Strip(part["content"], part["start"], part["stop"])))]
    case "Metaspace":
      scheme = part.get("prepend_scheme", "always")
      decoder = decoders.Metaspace(part["replacement"], scheme, part.get("split", True))
      return [Each(later(decoder), one(decoder))]
    case "WordPiece":
      decoder = decoders.WordPiece(part["prefix"], part["cleanup"])
      return [Each(later(decoder), one(decoder))]
    case "BPEDecoder":
      decoder = decoders.BPEDecoder(part["suffix"])
      return [HoldLast(lambda piece: _decoded(decoder, [piece, ""]), one(decoder))]
    case "CTC":
      names = ("pad_token", "word_delimiter_token", "cleanup")
      return [Deduplicate(one(decoders.CTC(*(part[name] for name in names))))]
  return None


def _fused_step(kind: str, part: dict[str, Any]) -> list[Step] | None:
  """Steps of a part whose one string is the whole text, and comes in pieces."""
  pattern = part.get("pattern", {}).get("String")
  match kind:
    case "Fuse":
      return []
    case "Strip":
      return [Strip(part["content"], part["start"], part["stop"])]
    case "Replace" if pattern:
      return [Substitute(pattern, part["content"])]
  return None


def _decoded(decoder: Any, pieces: list[str]) -> str:
  try:
    return decoder.decode(pieces)
  except BaseException as error:
    if not is_panic(error):
      raise
    raise UserError(f"the tokenizers library cannot decode {pieces[-1][:60]!r} ({error})") from None


def _replace(part: dict[str, Any]) -> Any:
  from tokenizers import decoders, Regex  # pylint: disable=g-import-not-at-top

  ((kind, pattern),) = part["pattern"].items()
  return decoders.Replace(Regex(pattern) if kind == "Regex" else pattern, part["content"])


def _byte_level_table() -> dict[str, int]:
  """The bytes that the characters of byte-level BPE stand for (GPT-2)."""
  shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
  hidden = [byte for byte in range(256) if byte not in shown]
  return {chr(b): b for b in shown} | {chr(256 + n): b for n, b in enumerate(hidden)}


_BYTES = _byte_level_table()


def _byte_level(piece: str) -> bytes:
  try:
    return bytes([_BYTES[character] for character in piece])
  except KeyError:
    return piece.encode("utf-8")
