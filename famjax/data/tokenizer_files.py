"""Schemas and limits of a tokenizer's files, which strangers wrote.

A tokenizer.json is a program: it may multiply a text, or hold a regular expression that never ends.
The limits here leave room for every published tokenizer.
"""

import base64
import binascii
from collections.abc import Callable, Iterator
import pathlib
import re
import threading
from typing import Annotated, Any, NamedTuple, TypeVar

import msgspec

from famjax.data.decoding import is_panic
from famjax.errors import one_line, UserError
from famjax.formats import check, Count, inside, Json, read_json, TokenId

T = TypeVar("T")

MOST_IDS = 2**24  # the largest vocabularies have a million
_GROWTH = 256.0  # characters that a normalizer or decoder makes of one, at most
_STRING = 1024  # characters of a string in a tokenizer.json, but for its tokens
_REGEX = 8192
_PARTS = 256  # of one normalizer, pre-tokenizer, post-processor or decoder
_SYMBOLS = 64  # that a post-processor adds
_SECONDS = 8.0  # for a text, and
_CHARACTERS_PER_SECOND = 50_000  # more for a long one

_Id = Annotated[int, msgspec.Meta(ge=-(2**31), le=2**31 - 1)]
_Ids = _Id | Annotated[list[_Id], msgspec.Meta(max_length=1000)] | None
_Short = Annotated[str, msgspec.Meta(max_length=64)] | None
_Digits = Annotated[str, msgspec.Meta(pattern=r"^[0-9]{1,9}$")]


class _TextConfig(msgspec.Struct):
  vocab_size: Count | None = None


class Config(msgspec.Struct):
  """Keys of config.json and generation_config.json that a vocabulary reads."""

  vocab_size: Count | None = None
  text_config: _TextConfig | None = None
  eos_token_id: _Ids = None
  pad_token_id: _Id | None = None


class _Named(msgspec.Struct):
  content: str = ""


class SpecialTokens(msgspec.Struct):
  """Keys of tokenizer_config.json and special_tokens_map.json that name special tokens."""

  bos_token: str | _Named | None = None
  eos_token: str | _Named | None = None
  unk_token: str | _Named | None = None
  sep_token: str | _Named | None = None
  pad_token: str | _Named | None = None
  cls_token: str | _Named | None = None
  mask_token: str | _Named | None = None

  def names(self) -> dict[str, str]:
    """Returns the texts of those that are named."""
    found = {name: getattr(self, name) for name in self.__struct_fields__}
    return {
        name: token if isinstance(token, str) else token.content
        for name, token in found.items()
        if token is not None
    }


class _Template(msgspec.Struct):
  name: str
  template: str


class TokenizerConfig(msgspec.Struct):
  """Keys of tokenizer_config.json beside its special tokens."""

  chat_template: str | list[_Template] | None = None
  added_tokens_decoder: dict[str, Any] | None = None
  add_bos_token: bool | None = None


class _Added(msgspec.Struct):
  id: Annotated[int, msgspec.Meta(ge=0, lt=MOST_IDS)]
  content: str


class _Model(msgspec.Struct):
  continuing_subword_prefix: _Short = None
  end_of_word_suffix: _Short = None
  max_input_chars_per_word: Annotated[int, msgspec.Meta(ge=0, le=1000)] | None = None


class Tokenizer(msgspec.Struct):
  """Keys of tokenizer.json that are checked before the library reads it."""

  model: _Model
  added_tokens: list[_Added] = []
  normalizer: dict[str, Any] | None = None
  pre_tokenizer: dict[str, Any] | None = None
  post_processor: dict[str, Any] | None = None
  decoder: dict[str, Any] | None = None

  def has_regex(self) -> bool:
    """Whether a text meets a regular expression that the file holds."""
    parts = [*_parts(self.normalizer), *_parts(self.pre_tokenizer), *_parts(self.decoder)]
    return any(_regex(part) is not None for part in parts)


class Symbols(NamedTuple):
  """Symbols that a tokenizer's directory names.

  Attributes:
    config: What `config.json` says.
    stop_ids: Ids that end a text; empty: none is named.
    pad_id: Id of padding; None: none is named.
    begins: Whether `tokenizer_config.json` asks for a begin symbol.
  """

  config: Config
  stop_ids: tuple[int, ...]
  pad_id: int | None
  begins: bool


def read_symbols(directory: pathlib.Path, id_of: Callable[[str], int | None]) -> Symbols:
  """Reads the symbols that a directory names.

  `generation_config.json` wins over `config.json`, and both win over `tokenizer_config.json`.

  Args:
    directory: The tokenizer's directory. Each of its files may be missing.
    id_of: Returns the id of a token; None if the tokenizer does not hold it.

  Raises:
    UserError: A file holds a wrong value.
  """
  config, generation = (
      check(optional(directory / name), Config, str(directory / name))
      for name in ("config.json", "generation_config.json")
  )
  path = directory / "tokenizer_config.json"
  about = optional(path)
  named = check(about, SpecialTokens, str(path)).names().get("eos_token")
  ends = [_several(found.eos_token_id) for found in (generation, config)]
  ends.append(_several(id_of(named) if named else None))
  pads = (generation.pad_token_id, config.pad_token_id)
  pad = next((pad for pad in pads if pad is not None), -1)
  begins = bool(check(about, TokenizerConfig, str(path)).add_bos_token)
  return Symbols(config, next(filter(None, ends), ()), None if pad == -1 else pad, begins)


def added_tokens(directory: pathlib.Path) -> dict[str, int]:
  """Returns the tokens that a directory's files beside the tokenizer add, with their ids.

  Raises:
    UserError: A file holds a wrong value.
  """
  path = directory / "tokenizer_config.json"
  decoder = check(optional(path), TokenizerConfig, str(path)).added_tokens_decoder or {}
  decoder = check(decoder, dict[_Digits, _Named], f"{path}: added_tokens_decoder")
  path = directory / "added_tokens.json"
  added = check(optional(path), dict[str, TokenId], str(path))
  return {token.content: int(i) for i, token in decoder.items()} | added


def _several(ids: int | list[int] | None) -> tuple[int, ...]:
  """Returns ids that are one, several or none. -1 stands for none."""
  ids = [ids] if isinstance(ids, int) else ids or []
  return tuple(i for i in ids if i != -1)


def optional(path: pathlib.Path) -> Json:
  """Returns a file's JSON object; {} if it is not there."""
  path = inside(path.parent, path.name)
  return read_json(path) if path.is_file() else {}


def read_tokenizer(path: pathlib.Path) -> Tokenizer:
  """Returns the parts of a tokenizer.json that matter here, all of them within limits.

  Raises:
    UserError: the file cannot be read, or a part of it is beyond a limit.
  """
  found = check(read_json(inside(path.parent, path.name)), Tokenizer, str(path))
  for name in ("normalizer", "decoder"):
    growth = _growth(list(_checked(path, name, getattr(found, name))))
    if growth > _GROWTH:
      raise _refused(path, f"its {name} makes a text up to {growth:.3g} times as long")
  for _ in _checked(path, "pre_tokenizer", found.pre_tokenizer):
    pass
  for part in _checked(path, "post_processor", found.post_processor):
    _check_post_processor(path, part)
  return found


def watched(function: Callable[[], T], what: str, characters: int = 0) -> T:
  """Returns what a function of the tokenizers library returns, if it ends in time.

  The function runs in a thread of its own, which nothing can stop: it may run on for a while.

  Args:
    function: takes nothing, and lets other threads run.
    what: it works at, for errors.
    characters: of the text.

  Raises:
    UserError: it takes too long, or the library gives up.
  """
  results, errors = [], []

  def work():
    try:
      results.append(function())
    except BaseException as error:  # handed on below
      errors.append(error)

  limit = _SECONDS + characters / _CHARACTERS_PER_SECOND
  thread = threading.Thread(target=work, daemon=True)
  thread.start()
  thread.join(limit)
  if not results and not errors:
    raise UserError(
        f"{what}: the tokenizer takes more than {limit:.0f} s, likely by a regular expression of"
        " its tokenizer.json; use another tokenizer"
    )
  if errors:
    return unpanicked(_raiser(errors[0]), what)
  return results[0]


def unpanicked(function: Callable[[], T], what: str) -> T:
  """Returns what a function of the tokenizers library returns; makes its panic a UserError."""
  try:
    return function()
  except BaseException as error:
    if not is_panic(error):
      raise
    raise UserError(
        f"{what}: the tokenizers library gives up ({one_line(error)}); use"
        " another tokenizer"
    ) from None


def _raiser(error: BaseException) -> Callable[[], Any]:
  def act():
    raise error

  return act


def _parts(spec: Any) -> Iterator[Json]:
  """Yields the parts of a normalizer, pre-tokenizer, post-processor or decoder, in their order."""
  stack = [spec]
  while stack:
    part = stack.pop()
    if not isinstance(part, dict):
      continue
    inner = [value for value in part.values() if isinstance(value, list)]
    if part.get("type") == "Sequence":
      stack += [one for values in inner for one in values][::-1]
    else:
      yield part


def _checked(path: pathlib.Path, name: str, spec: Any) -> Iterator[Json]:
  """Yields parts, each with strings within limits."""
  for count, part in enumerate(_parts(spec)):
    if count == _PARTS:
      raise _refused(path, f"its {name} has more than {_PARTS} parts")
    pattern = _regex(part)
    if pattern is not None and (len(pattern) > _REGEX or _repeats(pattern) > 100_000):
      raise _refused(path, f"its {name} has the regular expression {pattern[:40]!r}...")
    for key, value in part.items():
      if isinstance(value, str) and len(value) > _STRING and key != "precompiled_charsmap":
        what = f"its {name} has a string of {len(value):,} characters as {key[:40]!r}"
        raise _refused(path, what)
    yield part


def _growth(parts: list[Json]) -> float:
  """Returns how many characters parts may make of one, at most."""
  growth = 1.0
  for part in parts:
    match part.get("type"):
      case "Replace":
        growth *= _replace_growth(part)
      case "ByteLevel":
        growth *= 2
      case "Precompiled":
        growth *= _charsmap_growth(part.get("precompiled_charsmap"))
      case "Prepend":
        length = len(str(part.get("prepend", "")))
        growth *= 1 if length == 1 else 1 + length
  return growth


def _replace_growth(part: Json) -> float:
  content, pattern = str(part.get("content", "")), part.get("pattern")
  pattern = pattern if isinstance(pattern, dict) else {}
  if "String" in pattern:
    new, old = (len(s.encode("utf-8", "replace")) for s in (content, str(pattern["String"])))
    return max(1.0, new / max(old, 1))
  try:
    shortest = _shortest(str(pattern.get("Regex")))
  except (re.error, RecursionError, OverflowError, MemoryError):
    shortest = 0  # written for another library
  return max(1.0, float(len(content))) if shortest else 1.0 + len(content)


def _shortest(pattern: str) -> int:
  """Returns the length of the shortest match; 0 if a match can be empty."""
  import re._parser as parser  # pylint: disable=g-import-not-at-top

  return parser.parse(pattern).getwidth()[0]


def _charsmap_growth(charsmap: Any) -> float:
  """Returns the longest text that SentencePiece's table puts in a character's place."""
  try:
    data = base64.b64decode(charsmap or "", validate=True)
  except (binascii.Error, TypeError, ValueError):
    return 1.0  # the library refuses it
  size = int.from_bytes(data[:4], "little")
  return max(1.0, max(map(len, data[4 + size :].split(b"\0"))) / 3)


def _check_post_processor(path: pathlib.Path, part: Json) -> None:
  single = part.get("single")
  single = [piece for piece in single if isinstance(piece, dict)] if isinstance(single, list) else []
  texts = sum("Sequence" in piece for piece in single)
  symbols = sum(_symbols(part, piece["SpecialToken"]) for piece in single if "SpecialToken" in piece)
  if texts > 1 or symbols > _SYMBOLS:
    what = f"its post_processor writes {texts} texts and {symbols} symbols for one text"
    raise _refused(path, what)


def _symbols(part: Json, named: Any) -> int:
  """Returns how many ids a special token of a template stands for."""
  special, name = part.get("special_tokens"), named.get("id") if isinstance(named, dict) else None
  entry = special.get(name) if isinstance(special, dict) and isinstance(name, str) else None
  ids = entry.get("ids") if isinstance(entry, dict) else None
  return len(ids) if isinstance(ids, list) else 1


def _regex(part: Json) -> str | None:
  pattern = part.get("pattern")
  pattern = pattern.get("Regex") if isinstance(pattern, dict) else None
  return pattern if isinstance(pattern, str) else None


def _repeats(pattern: str) -> float:
  """Returns the product of the counts in a regular expression, `{1,3}` and so on."""
  product = 1.0
  for first, last in re.findall(r"\{(\d*),?(\d*)\}", pattern):
    product *= max(float(first or 1), float(last or 1), 1.0)
  return product


def _refused(path: pathlib.Path, what: str) -> UserError:
  return UserError(f"{path}: {what}, which no tokenizer needs; use another tokenizer")
