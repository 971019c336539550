"""The tokenizer of a Hugging Face directory as a vocabulary."""

from collections.abc import Iterable, Sequence
import functools
import itertools
import pathlib
from typing import Any

from famjax.data import chat_templates, decoding, tokenizer_files
from famjax.data.tokenizer_files import Config, unpanicked, watched
from famjax.data.text_files import check_text
from famjax.data.vocabularies import outside
from famjax.errors import one_line, UserError
from famjax.formats import inside

# Files that belong to a tokenizer, beside config.json, which names the symbols' ids.
FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
    "chat_template.jinja", "generation_config.json", "added_tokens.json",
)  # fmt: skip


def is_in(directory: pathlib.Path) -> bool:
  """Whether a directory has a tokenizer."""
  return any(inside(directory, name).is_file() for name in ("tokenizer.json", "tokenizer.model"))


class TokenizerVocabulary:
  """A directory's `tokenizer.json`: text to ids, without the symbols that begin or end a text.

  Attributes:
    all_ids: one more than the tokenizer's largest id, and the number of its entries.
    vocab_size: one more than the largest id that both the tokenizer and the model have.
    outside: ids of tokens that the model has no row for, by their texts. Gemma 3's text models have
      one, of an image.
    eos_id: the first of `stop_ids`.
    stop_ids: every id that the directory says a text ends with.
    begin_ids: ids that the tokenizer puts before a text that begins.
    pad_id: of padding.
  """

  unk_id = None

  def __init__(self, directory: str):
    """Reads a tokenizer.

    Args:
      directory: with `tokenizer.json`, and `config.json` or `generation_config.json`.

    Raises:
      UserError: there is none, it cannot be read, it is beyond a limit of `tokenizer_files`, or no
        end symbol is named.
    """
    self.path = str(directory)
    path = pathlib.Path(directory)
    self._about = tokenizer_files.read_tokenizer(path / "tokenizer.json")
    self._watch = self._about.has_regex()
    self._tokenizer = self._read(path / "tokenizer.json")
    symbols = tokenizer_files.read_symbols(path, self._tokenizer.token_to_id)
    self._count_ids(symbols.config)
    self.stop_ids = symbols.stop_ids
    if not self.stop_ids:
      raise UserError(f"vocabulary {directory}: no eos_token_id is named; add it to config.json")
    self.eos_id = self.stop_ids[0]
    # Llama's first release names no padding, for example.
    self.pad_id = self.eos_id if symbols.pad_id is None else symbols.pad_id
    self.begin_ids = self._find_begin_ids()
    special = self._tokenizer.get_added_tokens_decoder().values()
    self._special = {token.content for token in special if token.special}

  def encode(self, text: str) -> list[int]:
    """Returns the ids of a text; names of special tokens in it become these.

    Raises:
      UserError: the text has half of a surrogate pair or a token that the model lacks, or the
        tokenizer gives up or takes too long.
    """
    ids = self._encoding(check_text(text), False).ids
    if self.outside and max(ids, default=0) >= self.vocab_size:
      wrong = next(i for i in ids if i >= self.vocab_size)
      raise UserError(f"the text has the token {outside(self, wrong, self._rows)}")
    return ids

  def decode(self, ids: Iterable[int]) -> str:
    """Returns the text of ids; special tokens, and ids that the tokenizer lacks, give nothing."""
    ids = [int(i) for i in ids if 0 <= i < self.vocab_size]
    steps = decoding.steps_of(self._about.decoder)
    try:
      if steps is None or self._longest_run(ids, steps) <= decoding.LONGEST_RUN:
        return self._decoded(ids)
    except UserError:  # of a text that is shorter than the ends that a decoder strips, say
      if steps is None:
        raise
    decoder = decoding.Chain(self._piece, steps)
    return "".join(map(decoder.push, ids)) + decoder.end()

  def decoder(self) -> decoding.Decoder:
    """Returns a decoder of tokens that come one by one."""
    steps = decoding.steps_of(self._about.decoder)
    return decoding.Whole(self.decode) if steps is None else decoding.Chain(self._piece, steps)

  @functools.cached_property
  def chat_template(self) -> chat_templates.ChatTemplate | None:
    """The directory's chat template; None if it has none."""
    return chat_templates.find(pathlib.Path(self.path))

  def render(
      self,
      messages: Sequence[chat_templates.Message],
      add_generation_prompt: bool = True,
      **variables: Any,
  ) -> str:
    """Returns the text of a talk, by the directory's chat template.

    The template has written what begins a text, so a model takes the text's ids:
    `model.generate(vocabulary.encode(vocabulary.render(messages)))`.

    Args:
      messages: `{"role": "user", "content": "..."}` and so on, at least one.
      add_generation_prompt: with what the template puts before the answer that comes next.
      **variables: what else the template knows, such as `tools` or `enable_thinking`.

    Raises:
      UserError: there is no template, or it refuses the messages.
    """
    if self.chat_template is None:
      raise UserError(f"{self.path} has no chat template: add its chat_template.jinja, or give text")
    return self.chat_template.render(messages, add_generation_prompt, **variables)

  def _read(self, path: pathlib.Path) -> Any:
    try:
      import tokenizers  # pylint: disable=g-import-not-at-top  (only these models need it)
    except ModuleNotFoundError as error:
      raise UserError(f"vocabulary {self.path}: needs the package tokenizers; install it") from error
    try:
      tokenizer = watched(lambda: tokenizers.Tokenizer.from_file(str(path)), self.path)
      tokenizer.no_truncation()  # what was saved after fine-tuning may cut texts,
      tokenizer.no_padding()  # or fill them up
    except UserError:
      raise
    except Exception as error:  # tokenizers raises Exception itself
      raise UserError(
          f"vocabulary {self.path}: its tokenizer.json cannot be read"
          f" ({one_line(error)}); name a directory of the Hugging Face hub, with"
          " its tokenizer"
      ) from error
    return tokenizer

  def _count_ids(self, config: Config) -> None:
    ids = self._tokenizer.get_vocab(with_added_tokens=True)
    size = max(ids.values(), default=-1) + 1
    if not 0 < size <= tokenizer_files.MOST_IDS:
      raise UserError(
          f"vocabulary {self.path}: its largest id is {size - 1:,}; use a tokenizer whose ids are 0 to"
          f" {tokenizer_files.MOST_IDS - 1:,}"
      )
    rows = config.vocab_size or (config.text_config and config.text_config.vocab_size) or size
    self._rows, self.vocab_size = rows, min(size, rows)
    self.all_ids = size, len(ids)
    self.outside = {name: i for name, i in ids.items() if i >= rows}

  def _find_begin_ids(self) -> list[int]:
    """Ids before a text that is not empty; those after it end it."""
    for text in ("a", "0", "."):
      encoding = self._encoding(text, True)
      # A symbol that the post-processor adds belongs to no text.
      if any(of is not None for of in encoding.sequence_ids):
        pairs = zip(encoding.ids, encoding.sequence_ids)
        return [i for i, of in itertools.takewhile(lambda pair: pair[1] is None, pairs)]
    return []

  def _encoding(self, text: str, add_special_tokens: bool) -> Any:
    def encode():  # a batch lets other threads run, and one text does not
      return self._tokenizer.encode_batch([text], add_special_tokens=add_special_tokens)[0]

    try:
      if self._watch:
        return watched(encode, f"vocabulary {self.path}", len(text))
      return unpanicked(
          lambda: self._tokenizer.encode(text, add_special_tokens=add_special_tokens),
          f"vocabulary {self.path}",
      )
    except UserError:
      raise
    except Exception as error:  # a WordLevel model without an unknown token, say
      line = one_line(error)
      raise UserError(f"vocabulary {self.path} cannot encode the text ({line})") from error

  def _decoded(self, ids: list[int]) -> str:
    what = f"vocabulary {self.path}"
    if self._watch:  # a batch lets other threads run
      return watched(lambda: self._tokenizer.decode_batch([ids])[0], what, len(ids))
    return unpanicked(lambda: self._tokenizer.decode(ids), what)

  def _piece(self, token: int) -> str | None:
    """String of a token; None if it has no text."""
    if not 0 <= token < self.vocab_size:
      return None
    piece = self._tokenizer.id_to_token(token)
    return None if piece in self._special else piece

  def _longest_run(self, ids: list[int], steps: list[decoding.Step]) -> int:
    """Byte tokens of the longest run, if it can be long and the decoder joins runs; else 0."""
    falls_back = any(isinstance(step, decoding.ByteRuns) for step in steps)
    if not falls_back or len(ids) <= decoding.LONGEST_RUN:
      return 0
    longest = run = 0
    for i in ids:
      if (piece := self._piece(i)) is not None:
        run = run + 1 if decoding.byte_of(piece) is not None else 0
        longest = max(longest, run)
    return longest
