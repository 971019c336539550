"""The tokenizer of a Hugging Face directory as a vocabulary."""

from collections.abc import Iterable, Sequence
import functools
import pathlib
from typing import Any

from famjax.data import chat_templates
from famjax.errors import UserError
from famjax.formats import read_json

# Files that belong to a tokenizer, beside config.json, which names the symbols' ids.
FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
    "chat_template.jinja", "generation_config.json", "added_tokens.json",
)  # fmt: skip
_SPECIAL = ("tokenizer_config", "special_tokens_map")  # files that name special tokens
_SPACES = ("\u2581", "\u0120")  # a space, as SentencePiece and byte-level BPE write it


def is_in(directory: pathlib.Path) -> bool:
  """Whether a directory has a tokenizer."""
  return any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))


class TokenizerVocabulary:
  """What a directory's `tokenizer.json` makes of text; without the symbols that begin a text.

  Some tokenizers put a space before every text that they are given. A text that starts with a space
  loses it here under such a one, as in `vocabularies.SentencePieceVocabulary`.

  Attributes:
    vocab_size: ids of the tokenizer that the model has too; a model often has a few more, which mean
      nothing, and Gemma 3's text models have one fewer.
    eos_id: the first of `stop_ids`.
    stop_ids: every id that the directory says a text ends with.
    begin_ids: what the tokenizer puts before a text that begins.
    pad_id: of padding.
  """

  unk_id = None

  def __init__(self, directory: str):
    """Reads a tokenizer.

    Args:
      directory: with `tokenizer.json`, and `config.json` or `generation_config.json`.

    Raises:
      UserError: there is none, it cannot be read, or no end symbol is named.
    """
    self.path = str(directory)
    path = pathlib.Path(directory)
    try:
      import tokenizers  # pylint: disable=g-import-not-at-top  (only these models need it)

      self._tokenizer = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
      self._tokenizer.no_truncation()  # what was saved after fine-tuning may cut texts,
      self._tokenizer.no_padding()  # or fill them up
    except ModuleNotFoundError as error:
      raise UserError(f"vocabulary {directory}: needs the package tokenizers; install it") from error
    except Exception as error:  # tokenizers raises Exception itself
      raise UserError(
          f"vocabulary {directory}: its tokenizer.json cannot be read ({error}); name a directory of"
          " the Hugging Face hub, with its tokenizer"
      ) from error
    about = _given(path / "config.json") | _given(path / "generation_config.json")
    self.vocab_size = self._tokenizer.get_vocab_size()
    self.vocab_size = min(self.vocab_size, about.get("vocab_size", self.vocab_size))
    self.stop_ids = self._stop_ids(about, _given(path / "tokenizer_config.json"))
    if not self.stop_ids:
      raise UserError(f"vocabulary {directory}: no eos_token_id is named; add it to config.json")
    self.eos_id = self.stop_ids[0]
    pad = about.get("pad_token_id")
    self.pad_id = self.eos_id if pad is None else pad
    self.begin_ids = self._tokenizer.encode("", add_special_tokens=True).ids
    while self.begin_ids and self.begin_ids[-1] in self.stop_ids:  # what it puts after a text
      self.begin_ids = self.begin_ids[:-1]
    first = self._tokenizer.encode("a", add_special_tokens=False).tokens[:1]
    self._adds_space = bool(first) and first[0].startswith(_SPACES)

  def encode(self, text: str) -> list[int]:
    """Returns the ids of a text; names of special tokens in it become these."""
    text = text[1:] if self._adds_space and text.startswith(" ") else text
    return self._tokenizer.encode(text, add_special_tokens=False).ids

  def decode(self, ids: Iterable[int]) -> str:
    """Returns the text of ids; special tokens, and ids that the tokenizer has not, give nothing."""
    return self._tokenizer.decode([int(i) for i in ids if 0 <= i < self.vocab_size])

  @functools.cached_property
  def chat_template(self) -> chat_templates.ChatTemplate | None:
    """The directory's chat template; None if it has none."""
    path = pathlib.Path(self.path)
    config, symbols = (_given(path / f"{name}.json") for name in _SPECIAL)
    return chat_templates.find(path, config, symbols)

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

  def _stop_ids(self, about: dict[str, Any], tokenizer: dict[str, Any]) -> tuple[int, ...]:
    ids = about.get("eos_token_id")
    if ids is None:
      token = tokenizer.get("eos_token")
      token = token.get("content") if isinstance(token, dict) else token
      ids = self._tokenizer.token_to_id(token) if token else None
    return () if ids is None else (ids,) if isinstance(ids, int) else tuple(ids)


def _given(path: pathlib.Path) -> dict[str, Any]:
  """A file's JSON without what is null; {} if it is not there."""
  found = read_json(path) if path.is_file() else {}
  return {name: value for name, value in found.items() if value is not None}
