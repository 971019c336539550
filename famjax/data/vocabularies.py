"""Vocabularies: bytes, the closed words of the PassKey text, and SentencePiece models.

All of them have the part of `seqio.Vocabulary` that the project uses, and none of them needs
TensorFlow; `as_seqio` wraps one for a seqio task.
"""

import functools
import pathlib
import re
from typing import Any, Iterable, Protocol

import numpy as np

from famjax.errors import UserError


BUILT_IN = ("bytes", "passkey_words")


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
    """Returns one id per UTF-8 byte of the text."""
    data = np.frombuffer(text.encode("utf-8", "replace"), np.uint8)
    return (data.astype(np.int32) + self._FIRST_BYTE).tolist()

  def decode(self, ids: Iterable[int]) -> str:
    """Returns the text of the ids that stand for a byte; the others are left out."""
    first = self._FIRST_BYTE
    return bytes(i - first for i in ids if first <= i < self.vocab_size).decode("utf-8", "replace")


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
    return [self._ids.get(symbol, self.unk_id) for symbol in self._SYMBOL.findall(text)]

  def decode(self, ids: Iterable[int]) -> str:
    """Returns the text of the ids that stand for a symbol; the others are left out."""
    pieces = []
    previous = ""
    for i in ids:
      symbol = self._symbols[i] if 0 <= i < len(self._symbols) else ""
      if not symbol:
        continue
      tight = symbol in self._NO_SPACE_BEFORE or (symbol.isdigit() and previous.isdigit())
      pieces.append(symbol if tight or not pieces else " " + symbol)
      previous = symbol
    return "".join(pieces)


class SentencePieceVocabulary:
  """A SentencePiece model from a file.

  Many models put a space before every text that they are given. A text that starts with a space
  loses it here under such a model, so that texts that are encoded apart (" What is ...") join as if
  they had been encoded as one.
  """

  def __init__(self, path: str):
    if not pathlib.Path(path).is_file():
      raise UserError(
          f"vocabulary {path!r}: no such file; use bytes, passkey_words or the path of a"
          " SentencePiece .model file"
      )
    self.path = str(path)
    try:
      import sentencepiece  # pylint: disable=g-import-not-at-top  (only these models need it)

      self._model = sentencepiece.SentencePieceProcessor(model_file=self.path)
    except ModuleNotFoundError as error:
      raise UserError(f"vocabulary {path}: needs the package sentencepiece; install it") from error
    except (OSError, RuntimeError) as error:
      raise UserError(
          f"vocabulary {path}: not a SentencePiece model; name a .model file"
      ) from error
    if self._model.eos_id() < 0:
      raise UserError(f"vocabulary {path}: has no end symbol; train it with eos_id set")
    self.vocab_size = self._model.get_piece_size()
    self.eos_id = self._model.eos_id()
    self.pad_id = max(self._model.pad_id(), 0)
    self.unk_id = self._model.unk_id()
    self._adds_space = self._model.encode("a", out_type=str)[0].startswith("\u2581")

  def encode(self, text: str) -> list[int]:
    """Returns the ids of the text's pieces."""
    return self._model.encode(text[1:] if self._adds_space and text.startswith(" ") else text)

  def decode(self, ids: Iterable[int]) -> str:
    """Returns the text of the pieces; ids that the model does not hold are left out."""
    return self._model.decode([int(i) for i in ids if 0 <= i < self.vocab_size])


@functools.lru_cache(maxsize=None)
def load_vocabulary(name: str) -> Vocabulary:
  """Returns the vocabulary of a name; the same name gives the same object.

  Args:
    name: "bytes"; "passkey_words", the closed vocabulary of the PassKey text; the path of a
      SentencePiece model; or a Hugging Face directory, or a run converted from one, whose tokenizer it
      is.

  Raises:
    UserError: the name is none of these, or the file is missing or is not such a model.
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
  return SentencePieceVocabulary(name if path is None else str(path))


def begin_ids(vocabulary: Vocabulary) -> list[int]:
  """Returns what the vocabulary puts before a text that begins; most put nothing there."""
  return list(getattr(vocabulary, "begin_ids", ()))


def check_fits(vocabulary: Vocabulary, vocab_size: int) -> None:
  """Raises UserError if a model lacks one of the ids that a vocabulary puts around texts.

  Args:
    vocabulary: any.
    vocab_size: of the model, V; it has the ids in `[0, V)`.
  """
  ids = {"padding": getattr(vocabulary, "pad_id", None), "the end": getattr(vocabulary, "eos_id", None)}
  ids |= {f"begin symbol {i}": id_ for i, id_ in enumerate(begin_ids(vocabulary))}
  ids |= {f"stop symbol {i}": id_ for i, id_ in enumerate(getattr(vocabulary, "stop_ids", ()))}
  for name, id_ in ids.items():
    if id_ is not None and not 0 <= id_ < vocab_size:
      raise UserError(
          f"the vocabulary's id of {name} is {id_}, and the model's vocab_size is {vocab_size:,}: give"
          " it a row: famjax convert --from=hf --resize_vocabulary"
      )


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
  folders = (path, path / "tokenizer")
  places = [folder / file for folder in folders for file in ("tokenizer.json", "tokenizer.model")]
  places = [*places, path]
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
