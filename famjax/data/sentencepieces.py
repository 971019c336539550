"""SentencePiece models as vocabularies."""

import codecs
from collections.abc import Iterable, Iterator
import contextlib
import pathlib
from typing import Any

from famjax.data import decoding, tokenizer_files
from famjax.data.text_files import check_text
from famjax.errors import one_line, UserError


class SentencePieceVocabulary:
  """A SentencePiece model from a file.

  Attributes:
    vocab_size: Number of pieces.
    all_ids: The same number twice; see `TokenizerVocabulary`.
    eos_id: The first of `stop_ids`.
    stop_ids: Every id that ends a text.
    begin_ids: Ids before a text that begins.
    pad_id: Padding.
    unk_id: A character that the model does not hold.
  """

  def __init__(self, path: str, directory: pathlib.Path | None = None):
    """Reads a model.

    Args:
      path: The `.model` file.
      directory: Hugging Face directory of the file. Its `config.json`, `generation_config.json` and
        `tokenizer_config.json` name the symbols. None: The model names them itself.

    Raises:
      UserError: The file is missing or is no model, no end symbol is named, or the directory adds
        tokens that the model does not hold.
    """
    if not pathlib.Path(path).is_file():
      raise UserError(
          f"vocabulary {path!r}: no such file; use bytes, passkey_words or the path of a"
          " SentencePiece .model file"
      )
    self.path = str(path)
    try:
      import sentencepiece  # pylint: disable=g-import-not-at-top  (only these models need it)
    except ModuleNotFoundError as error:
      raise UserError(f"vocabulary {path}: needs the package sentencepiece; install it") from error
    with self._readable():
      self._model = sentencepiece.SentencePieceProcessor(model_file=self.path)
      self._model.decode(self._model.encode("a"))
    self.vocab_size = self._model.get_piece_size()
    self.all_ids = self.vocab_size, self.vocab_size
    self.unk_id = self._model.unk_id()
    self.stop_ids: tuple[int, ...] = (self._model.eos_id(),) if self._model.eos_id() >= 0 else ()
    self.pad_id = max(self._model.pad_id(), 0)
    self.begin_ids: list[int] = []
    if directory is not None:
      self._read_directory(directory)
    if not self.stop_ids:
      raise UserError(f"vocabulary {path}: has no end symbol; train it with eos_id set")
    self.eos_id = self.stop_ids[0]
    self._texts: dict[int, str] = {}

  def encode(self, text: str) -> list[int]:
    """Returns the ids of the text's pieces. Names of symbols in it, such as `</s>`, are plain text.

    Raises:
      UserError: The text holds half of a surrogate pair.
    """
    with self._readable():
      return self._model.encode(check_text(text))

  def decode(self, ids: Iterable[int]) -> str:
    """Returns the text of the pieces; ids that the model does not hold are left out."""
    with self._readable():
      return self._model.decode([int(i) for i in ids if 0 <= i < self.vocab_size])

  def decoder(self) -> decoding.Decoder:
    """Returns a decoder of tokens that come one by one."""
    if not self.decode([self.unk_id]):  # no token gives text for sure
      return decoding.Whole(self.decode)
    return _PieceDecoder(self._model, self._texts)

  def _read_directory(self, directory: pathlib.Path) -> None:
    """Takes the symbols that a directory names, and checks that it adds no tokens."""
    ids = {self._model.id_to_piece(i): i for i in range(self.vocab_size)}
    symbols = tokenizer_files.read_symbols(directory, ids.get)
    for token, i in tokenizer_files.added_tokens(directory).items():
      if ids.get(token) != i:
        raise UserError(
            f"vocabulary {directory}: adds the token {token[:60]!r} ({i}), which its tokenizer.model"
            " does not hold; write its tokenizer.json with transformers:"
            " AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
        )
    self.stop_ids = symbols.stop_ids or self.stop_ids
    self.pad_id = self.pad_id if symbols.pad_id is None else symbols.pad_id
    begin = self._model.bos_id()
    self.begin_ids = [begin] if symbols.begins and begin >= 0 else []

  @contextlib.contextmanager
  def _readable(self) -> Iterator[None]:
    """Makes one line of what the library raises about a file that is broken."""
    try:
      yield
    except UserError:
      raise
    except (OSError, RuntimeError, ValueError, IndexError) as error:
      raise UserError(
          f"vocabulary {self.path}: not a SentencePiece model"
          f" ({one_line(error)}); name a .model file"
      ) from error


class _PieceDecoder:
  """SentencePiece's own decoding, token by token."""

  def __init__(self, model: Any, texts: dict[int, str]):
    """Begins.

    Args:
      model: `SentencePieceProcessor`.
      texts: text of a token that stands behind others; is filled up here.
    """
    self._model, self._texts = model, texts
    self._before: list[int] = []  # tokens that have given no text: a model may drop first spaces
    self._start, self._bytes = True, b""

  def push(self, token: int) -> str:
    """See `decoding.Decoder`."""
    if not 0 <= token < self._model.get_piece_size():
      return ""
    if self._model.is_byte(token):
      return self._push_byte(decoding.byte_of(self._model.id_to_piece(token)))
    text = self.end()
    self._start = self._start and not text
    if not self._start:
      return text + self._behind(token)
    text = self._model.decode([*self._before, token])
    self._start = not text
    if not text and token not in self._before:
      self._before.append(token)
    return text

  def pending(self) -> str:
    """See `decoding.Decoder`."""
    return ""

  def end(self) -> str:
    """See `decoding.Decoder`."""
    text, self._bytes = decoding.BROKEN * len(self._bytes), b""
    return text

  def _push_byte(self, byte: int) -> str:
    """A byte that begins no character becomes U+FFFD, and so does each byte of an unfinished one."""
    text, self._bytes = "", self._bytes + bytes([byte])
    while self._bytes:
      try:
        new, used = codecs.utf_8_decode(self._bytes, "strict", False)
        text, self._bytes = text + new, self._bytes[used:]
        break
      except UnicodeDecodeError:
        text, self._bytes = text + decoding.BROKEN, self._bytes[1:]
    self._start = self._start and not text
    return text

  def _behind(self, token: int) -> str:
    if token not in self._texts:
      unknown = self._model.unk_id()
      surface = self._model.decode([unknown])
      self._texts[token] = self._model.decode([unknown, token])[len(surface) :]
    return self._texts[token]
