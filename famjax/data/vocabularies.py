"""Vocabularies: bytes, the closed words of the PassKey text, and those that are read from files.

All of them have the part of `seqio.Vocabulary` that the project uses, and none of them needs
TensorFlow; `as_seqio` wraps one for a seqio task.
"""

import functools
import pathlib
import re
from typing import Any, Iterable, Protocol, Sequence

import numpy as np

from famjax.data import decoding, sentencepieces
from famjax.data.text_files import check_text
from famjax.errors import UserError
from famjax.formats import inside


BUILT_IN = ("bytes", "passkey_words")
_CONTEXT = 256  # characters before a text that its encoding may depend on
_CONTEXTS = ("x", ".", "\n", "0", ",", "\u4e00")  # texts that stand for one that is unknown


class Vocabulary(Protocol):
  """What the project asks of a vocabulary; a `seqio.Vocabulary` has it too."""

  @property
  def vocab_size(self) -> int:
    """Number of ids; every id is in [0, vocab_size)."""

  @property
  def pad_id(self) -> int:
    """Id of padding, which carries no text."""

  @property
  def eos_id(self) -> int:
    """Id of the end of a text."""

  def encode(self, text: str) -> list[int]:
    """Returns the ids of a text, without an end symbol."""

  def decode(self, ids: Iterable[int]) -> str:
    """Returns the text of ids; padding and end symbols give nothing."""


class ByteVocabulary:
  """UTF-8 bytes, numbered as in ByT5.

  0 is padding, 1 the end of a text, 2 unknown (never made), and byte b is 3 + b. Encoding and
  decoding are lossless for every text. Ids that end in the middle of a character decode to U+FFFD
  there.
  """

  pad_id = 0
  eos_id = 1
  unk_id = 2
  vocab_size = 259
  _FIRST_BYTE = 3

  def encode(self, text: str) -> list[int]:
    """Returns one id per UTF-8 byte of the text. Raises UserError for half a surrogate pair."""
    data = np.frombuffer(check_text(text).encode("utf-8"), np.uint8)
    return (data.astype(np.int32) + self._FIRST_BYTE).tolist()

  def decode(self, ids: Iterable[int]) -> str:
    """Returns the text of the ids that stand for a byte; the others are left out."""
    first = self._FIRST_BYTE
    return bytes(i - first for i in ids if first <= i < self.vocab_size).decode("utf-8", "replace")

  def decoder(self) -> decoding.Decoder:
    """Returns a decoder of tokens that come one by one."""
    byte = lambda i: chr(i - self._FIRST_BYTE) if self._FIRST_BYTE <= i < self.vocab_size else None
    return decoding.Chain(byte, [decoding.Utf8(lambda piece: piece.encode("latin-1"))])


class WordVocabulary:
  """A closed vocabulary: whole words, single digits and single punctuation marks.

  0 is padding, 1 the end of a text, 2 any word that the vocabulary does not hold. Spaces are not
  symbols: decoding puts one space between symbols, but none before punctuation and none between
  digits, so a text written that way (as the PassKey text is) comes back as it was.
  """

  pad_id = 0
  eos_id = 1
  unk_id = 2
  _SYMBOL = re.compile(r"[^\W\d_]+|\d|[^\w\s]|_")
  _NO_SPACE_BEFORE = frozenset(".,;:?!")

  def __init__(self, symbols: Iterable[str]):
    self._symbols = ["", "", "<unk>", *dict.fromkeys(symbols)]
    self._ids = {symbol: i for i, symbol in enumerate(self._symbols) if i > self.unk_id}

  @classmethod
  def from_texts(cls, texts: Iterable[str]) -> "WordVocabulary":
    """Returns the vocabulary of the ten digits and of every symbol of the texts, sorted."""
    symbols = {symbol for text in texts for symbol in cls._SYMBOL.findall(text)}
    return cls([*"0123456789", *sorted(symbols - set("0123456789"))])

  @property
  def vocab_size(self) -> int:
    return len(self._symbols)

  def encode(self, text: str) -> list[int]:
    """Returns one id per word, digit or punctuation mark; unknown ones become `unk_id`."""
    return [self._ids.get(symbol, self.unk_id) for symbol in self._SYMBOL.findall(check_text(text))]

  def decode(self, ids: Iterable[int]) -> str:
    """Returns the text of the ids that stand for a symbol; the others are left out."""
    decoder = self.decoder()
    return "".join(map(decoder.push, ids))

  def decoder(self) -> decoding.Decoder:
    """Returns a decoder of tokens that come one by one."""
    symbol = lambda i: (self._symbols[i] or None) if 0 <= i < len(self._symbols) else None
    return decoding.Chain(symbol, [_Spaces(self._NO_SPACE_BEFORE)])


class _Spaces(decoding.Step):
  """Puts one space between symbols, but none before some of them and none between digits."""

  def __init__(self, tight: frozenset[str]):
    self._tight, self._previous = tight, ""

  def push(self, piece):
    tight = piece in self._tight or (piece.isdigit() and self._previous.isdigit())
    space = "" if tight or not self._previous else " "
    self._previous = piece
    return [space + piece]


@functools.lru_cache(maxsize=None)
def load_vocabulary(name: str) -> Vocabulary:
  """Returns the vocabulary of a name; the same name gives the same object.

  Args:
    name: "bytes"; "passkey_words", the closed vocabulary of the PassKey text; the path of a
      SentencePiece model; or a Hugging Face directory, or a run converted from one, whose tokenizer it
      is.

  Raises:
    UserError: The name is none of these. Or the file is missing, or is not such a model.
  """
  if name == "bytes":
    return ByteVocabulary()
  if name == "passkey_words":
    from famjax.data import passkey  # pylint: disable=g-import-not-at-top  (passkey imports this)

    return WordVocabulary.from_texts(t.format(key="") for t in passkey.TEMPLATES)
  path = _file(name)
  if path is not None and path.name == "tokenizer.json":
    from famjax.data import tokenizers  # pylint: disable=g-import-not-at-top

    return tokenizers.TokenizerVocabulary(str(path.parent))
  directory = path.parent if path is not None and pathlib.Path(name).is_dir() else None
  return sentencepieces.SentencePieceVocabulary(name if path is None else str(path), directory)


def begin_ids(vocabulary: Vocabulary) -> list[int]:
  """Returns the ids that the vocabulary puts before a text that begins; most put none there."""
  return list(getattr(vocabulary, "begin_ids", ()))


def begun(vocabulary: Vocabulary, ids: Sequence[int]) -> list[int]:
  """Returns the ids of a text with `begin_ids` before them, once.

  This is the one rule for prompts, pairs, files and the harness: a text that starts with the name
  of its begin symbol, as the texts of most chat templates do, does not get the symbol again.
  """
  begin, ids = begin_ids(vocabulary), list(ids)
  return ids if ids[: len(begin)] == begin else [*begin, *ids]


def encode_text(vocabulary: Vocabulary, text: str) -> list[int]:
  """Returns the ids of a text that begins: see `begun`."""
  return begun(vocabulary, vocabulary.encode(text))


def encode_after(vocabulary: Vocabulary, text: str, before: str = "") -> list[int]:
  """Returns the ids of a text that goes on from another one.

  Many tokenizers put a space before a text that begins, or drop its first spaces. Here the text is
  encoded together with what stands before it. The ids of both join to the text of both, and equal
  the encoding of the joined text wherever no token reaches across.

  Args:
    vocabulary: of both.
    text: that goes on.
    before: text that it goes on from, or the end of it; "": unknown.

  Raises:
    UserError: the text holds half of a surrogate pair.
  """
  check_text(text)  # An error gives the place in this text, not in both.
  if isinstance(vocabulary, (ByteVocabulary, WordVocabulary)) or not text:
    return vocabulary.encode(text)  # These encode a text alike wherever it stands.
  for context in (before[-_CONTEXT:], *_CONTEXTS):
    head = vocabulary.encode(context) if context else []
    whole = vocabulary.encode(context + text) if head else []
    if len(whole) > len(head) > 0 and whole[: len(head)] == head:
      return whole[len(head) :]
  return vocabulary.encode(text)


def encode_pair(vocabulary: Vocabulary, inputs: str, targets: str) -> tuple[list[int], list[int]]:
  """Returns the ids of a text that begins, and of one that goes on from it."""
  return encode_text(vocabulary, inputs), encode_after(vocabulary, targets, inputs)


def decoder_of(vocabulary: Vocabulary) -> decoding.Decoder:
  """Returns a decoder of tokens that come one by one; see `decoding`."""
  if hasattr(vocabulary, "decoder"):
    return vocabulary.decoder()
  return decoding.Whole(vocabulary.decode)


def check_fits(vocabulary: Vocabulary, vocab_size: int, *, padding: bool = True) -> None:
  """Raises UserError if a symbol of a vocabulary has an id that the model lacks.

  Args:
    vocabulary: any.
    vocab_size: V of the model; its ids are 0 to V - 1.
    padding: whether padding is used, as training does. Models of the hub often name an id of
      padding that they lack, and reading and writing texts does not need it.
  """
  ends = getattr(vocabulary, "stop_ids", None) or (getattr(vocabulary, "eos_id", None),)
  symbols = [("eos_token_id", i) for i in ends]
  symbols += [("the symbol that begins a text", i) for i in begin_ids(vocabulary)]
  symbols += [("pad_token_id", getattr(vocabulary, "pad_id", None))] if padding else []
  for name, i in symbols:
    if i is not None and not 0 <= i < vocab_size:
      raise UserError(f"vocabulary {_shown(vocabulary)}: {name} is {outside(vocabulary, i, vocab_size)}")


def outside(vocabulary: Vocabulary, i: int, vocab_size: int) -> str:
  """Returns what is wrong with an id that a model lacks, and the way out."""
  names = {i: name for name, i in getattr(vocabulary, "outside", {}).items()}
  name = f" ({names[i][:60]!r})" if i in names else ""
  return (
      f"{i}{name}, and the model's ids end at {vocab_size - 1}: import the model with"
      " `famjax convert --from=hf --resize_vocabulary`, or correct the id in config.json and"
      " generation_config.json"
  )


def _shown(vocabulary: Vocabulary) -> str:
  return getattr(vocabulary, "path", type(vocabulary).__name__)


def absolute(name: str) -> str:
  """A vocabulary's name that means the same in any folder."""
  return str(pathlib.Path(name).absolute()) if _file(name) else name


def same_vocabulary(a: str, b: str) -> bool:
  """Whether two names are of one vocabulary: the same name, or files of the same bytes."""
  files = [_file(name) for name in (a, b)]
  return a == b or (None not in files and files[0].read_bytes() == files[1].read_bytes())


def _file(name: str) -> pathlib.Path | None:
  """The file that a vocabulary comes from, if it is there."""
  path = pathlib.Path(name)
  if not path.is_dir():
    return path if path.is_file() else None
  folders = [folder for folder in (path, inside(path, "tokenizer")) if folder.is_dir()]
  files = ("tokenizer.json", "tokenizer.model")
  places = [inside(folder, file) for folder in folders for file in files]
  return next((place for place in places if place.is_file()), None)


@functools.lru_cache(maxsize=None)
def as_seqio(vocabulary: Vocabulary) -> Any:
  """Returns a `seqio.Vocabulary` that gives the same ids. Imports seqio, and with it TensorFlow.

  One vocabulary has one adapter, so that seqio finds the features of several tasks alike.
  """
  import seqio  # pylint: disable=g-import-not-at-top
  import tensorflow as tf  # pylint: disable=g-import-not-at-top

  class Adapter(seqio.Vocabulary):
    """Calls the wrapped vocabulary, also from inside a tf.data pipeline."""

    eos_id = vocabulary.eos_id
    pad_id = vocabulary.pad_id
    unk_id = getattr(vocabulary, "unk_id", None)
    begin_ids = begin_ids(vocabulary)
    _base_vocab_size = vocabulary.vocab_size

    def _encode(self, s):
      return vocabulary.encode(s)

    def _decode(self, ids):
      return vocabulary.decode(ids)

    def _encode_tf(self, s):
      """int32 `[n]` of a text; of several `[m]`, as few-shot pipelines have them, `[m, (n)]` ragged."""

      def encode(texts):
        rows = [vocabulary.encode(t.decode("utf-8", "replace")) for t in np.ravel(texts).tolist()]
        lengths = np.asarray([len(row) for row in rows], np.int32)
        return np.asarray([i for row in rows for i in row], np.int32), lengths

      s = tf.convert_to_tensor(s)
      ids, lengths = tf.numpy_function(encode, [s], (tf.int32, tf.int32), stateful=False)
      ids.set_shape([None])
      lengths.set_shape([None])
      return tf.RaggedTensor.from_row_lengths(ids, lengths) if s.shape.rank else ids

    def _decode_tf(self, ids):
      def decode(table):
        rows = table.reshape(-1, table.shape[-1])
        texts = [vocabulary.decode(row).encode() for row in rows]
        return np.asarray(texts, object).reshape(table.shape[:-1])

      return tf.numpy_function(decode, [ids], tf.string, stateful=False)

  return Adapter()
