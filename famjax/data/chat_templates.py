"""Chat templates of Hugging Face directories: from messages to the text that a model reads.

A template is a Jinja program that comes with a model. It is rendered as transformers does it, in
Jinja's sandbox, and in a process of its own with limits of time and memory (`templates`). The text
holds special tokens by their names, the one that begins a text among them.
"""

from collections.abc import Sequence
import pathlib
from typing import Any

from famjax.data import templates
from famjax.data.tokenizer_files import optional, SpecialTokens, TokenizerConfig
from famjax.data.text_files import check_text
from famjax.errors import UserError
from famjax.formats import check as check_json, inside

Message = dict[str, Any]  # "role" and "content", and whatever else the template knows

_NAMES = tuple(f"{kind}_token" for kind in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
_LONGEST = 2**22  # bytes of a template; the longest published ones have 20 kB
_MARK = "\ue000"  # a private character, which no template writes or strips


class ChatTemplate:
  """A template with the names of its special tokens.

  Attributes:
    source: in Jinja.
    bos_token: the text that stands for the start of a text; may be empty.
  """

  def __init__(self, source: str, special_tokens: dict[str, str], origin: str):
    """Compiles a template.

    Args:
      source: in Jinja.
      special_tokens: "bos_token", "eos_token" and so on, as the template names them.
      origin: where it comes from, for errors.

    Raises:
      UserError: it is no Jinja template.
    """
    self.source, self.bos_token = source, special_tokens.get("bos_token", "")
    self._special_tokens, self._origin = special_tokens, origin
    if len(source) > _LONGEST:
      raise UserError(f"{origin}: its chat template has {len(source):,} characters: use another one")
    try:
      templates.render(source, None)
    except templates.Refused as error:
      raise UserError(
          f"{origin}: its chat template cannot be compiled ({error}); fetch it again"
      ) from None
    except UserError as error:
      raise UserError(f"{origin}: {error}") from None

  def render(
      self, messages: Sequence[Message], add_generation_prompt: bool = True, **variables: Any
  ) -> str:
    """Returns the text of a talk.

    Args:
      messages: of the talk, at least one.
      add_generation_prompt: with what the template puts before the answer that comes next.
      **variables: what else the template knows, such as `tools` or `enable_thinking`.

    Raises:
      UserError: these are no messages, the template refuses them or goes beyond a limit of
        `templates`, or its text holds half of a surrogate pair.
    """
    check(messages)
    given = [{k: v for k, v in message.items() if v is not None} for message in messages]
    names = {"tools": None, "documents": None} | self._special_tokens | variables
    names |= {"messages": given, "add_generation_prompt": add_generation_prompt}
    try:
      text = templates.render(self.source, names)
    except templates.Refused as error:
      raise UserError(
          f"{self._origin}: its chat template refuses the messages ({error}); give others"
      ) from None
    except UserError as error:
      raise UserError(f"{self._origin}: {error}") from None
    return check_text(text, "the text of the messages")


class Talk:
  """A talk whose earlier turns were read: says what text each turn adds to them.

  The text that a turn adds is what the rendering of the whole talk has beyond the one before and
  the answer to it. It begins with the end of that answer, which the model did not read. Some
  templates render old answers otherwise than they were written, without their thinking for
  example. Then the turn is rendered after a stand-in for what was said before, so that it has no
  symbol that begins a text. The messages are kept here, as text; the model keeps its state alone.
  """

  def __init__(self, template: ChatTemplate, begun: bool = False):
    """Begins.

    Args:
      template: of the model.
      begun: the model has read something that is not known here. The first turn is rendered on its
        own, and without the symbol that begins a text.
    """
    self._template, self._begun = template, begun
    self._messages: list[Message] = []
    self._rendered = ""  # of all messages but the last one, an answer

  def turn(self, line: str) -> str:
    """Returns the text to read for what a user says, up to where the answer begins."""
    whole = self._render(line)
    if not self._messages:
      return whole.removeprefix(self._template.bos_token) if self._begun else whole
    new = rest(whole, self._rendered, self._messages[-1]["content"])
    return self._after_stand_in(line) if new is None else new

  def add(self, line: str, answer: str) -> None:
    """Notes that a turn was read, and what was written after it."""
    self._rendered = self._render(line)
    self._messages += [_message("user", line), _message("assistant", answer)]

  def _render(self, line: str) -> str:
    return self._template.render([*self._messages, _message("user", line)])

  def _after_stand_in(self, line: str) -> str:
    before = [_message("user", "."), _message("assistant", _MARK)]
    _, mark, new = self._template.render([*before, _message("user", line)]).partition(_MARK)
    if mark:
      return new
    return self._template.render([_message("user", line)]).removeprefix(self._template.bos_token)


def rest(whole: str, before: str, answer: str) -> str | None:
  """What a talk's text has after an earlier text of it and the answer to that.

  Args:
    whole: the talk.
    before: its text up to an answer.
    answer: as it was written. Many templates strip the white space around it.

  Returns:
    None if the talk does not go on from there.
  """
  if whole.startswith(before + answer):
    return whole[len(before) + len(answer) :]
  new, answer = whole[len(before) :].lstrip(), answer.strip()
  if whole.startswith(before) and new.startswith(answer):
    return new[len(answer) :]
  return None


def check(messages: object) -> None:
  """Raises UserError for what no messages are."""
  example = '[{"role": "user", "content": "..."}]'
  if not isinstance(messages, (list, tuple)) or not messages:
    raise UserError(f"messages are {messages!r:.40}: give a list of them, as {example}")
  for message in messages:
    content = message.get("content") if isinstance(message, dict) else 0
    if not isinstance(content, (str, list, type(None))) or not isinstance(message.get("role"), str):
      raise UserError(f"{message!r:.40} is no message: give a role and a content, as {example}")


def find(directory: pathlib.Path) -> ChatTemplate | None:
  """Returns a directory's template.

  Args:
    directory: may have `chat_template.jinja`, which wins over the template in
      `tokenizer_config.json`, and `special_tokens_map.json`.

  Returns:
    None if it has none.

  Raises:
    UserError: it cannot be read.
  """
  path, source = inside(directory, "chat_template.jinja"), None
  config, symbols = (
      optional(directory / f"{name}.json") for name in ("tokenizer_config", "special_tokens_map")
  )
  about = check_json(config, TokenizerConfig, str(directory / "tokenizer_config.json"))
  if path.is_file():
    try:
      data = path.read_bytes()
      source = data.decode("utf-8") if len(data) <= _LONGEST else None
    except (OSError, ValueError) as error:
      raise UserError(f"{path} cannot be read ({error}): fetch it again") from error
    if source is None:
      raise UserError(f"{path} is larger than {_LONGEST:,} bytes: it is no chat template")
  elif isinstance(about.chat_template, list):
    source = {one.name: one.template for one in about.chat_template}.get("default")
  else:
    source = about.chat_template
  if source is None:
    return None
  # As transformers has it: newer directories name their special tokens in the configuration alone.
  given = config if about.added_tokens_decoder is not None else config | symbols
  tokens = check_json(given, SpecialTokens, f"{directory}: its special tokens").names()
  return ChatTemplate(source, tokens, str(directory))


def _message(role: str, content: str) -> Message:
  return {"role": role, "content": content}

