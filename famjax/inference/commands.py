"""What `famjax generate`, `score` and `chat` do with their arguments; cli.py says what these are."""

import argparse
from collections.abc import Iterator
import contextlib
import json
import math
import pathlib
import signal
import sys
import time
from typing import NamedTuple

import numpy as np

from famjax.data import chat_templates
from famjax.data.text_files import check_text, decode
from famjax.data.vocabularies import encode_after
from famjax.errors import UserError
from famjax.inference import session
from famjax.inference.engine import Reading
from famjax.inference.generation import Request, Stream
from famjax.inference.model import Model, load
from famjax.inference.sampling import Sampling
from famjax.model.state import num_bytes

_LIMITS = ("max_new_tokens", "stop", "stop_tokens")
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
_TURN = r"{}\n"  # what is read for a line, without a chat template
_QUIET_BELOW = 20_000  # tokens; what is read sooner than anybody looks shows no progress


def generate(arguments: argparse.Namespace) -> int:
  """Writes what comes after a prompt, or after each of many."""
  if arguments.jsonl:
    return _generate_many(arguments)
  model = load(arguments.model)
  with _session(arguments.session):
    after = session.load(arguments.session, model) if arguments.session else None
    prompt = text_of(arguments.prompt, arguments.file, needed=after is None)
    with _interrupts() as asked:
      stream = _read_prompt(model, prompt, after, arguments, asked)
      try:
        _show(stream, asked)
      finally:  # also if nobody takes the text any more
        if arguments.session:
          session.save(arguments.session, stream.reading, model, locked=True)
  return 130 if asked else 0


def _session(directory: str | None) -> contextlib.AbstractContextManager:
  """Returns a context in which no other process uses a session, if one is named."""
  return session.held(directory) if directory else contextlib.nullcontext()


def _read_prompt(
    model: Model,
    prompt: str | list[int],
    after: Reading | None,
    arguments: argparse.Namespace,
    asked: list[bool],
) -> Stream:
  """Reads a prompt, or as much of it as there is time for until Ctrl-C."""
  with _progress(len(prompt)) as show:

    def progress(tokens):
      show(tokens)
      return bool(asked)

    stream = model.generate(prompt, state=after, progress=progress, **_settings(arguments))
  if stream.reason == "unread":
    read = int(stream.state.position[0])
    print(f"interrupted after {read:,} tokens, before the end of the prompt", file=sys.stderr)
  return stream


def _show(stream: Stream, asked: list[bool]) -> None:
  """Prints a text while it is written, until its end or Ctrl-C."""
  while stream.reason is None and not asked:
    print(stream.round(), end="", flush=True)
  print(stream.end(), flush=True)


def _generate_many(arguments: argparse.Namespace) -> int:
  """Reads a request from every line of a file, and writes a line for each, in the same order."""
  if arguments.session or arguments.prompt is not None or arguments.file:
    raise UserError("--jsonl has its prompts in a file: leave out the session, prompt and file")
  if arguments.batch_size < 1:
    raise UserError(f"--batch_size is {arguments.batch_size}; it must be at least 1")
  lines = list(_requests(arguments.jsonl, _settings(arguments)))
  model = load(arguments.model)
  prompts = [_prompt(line, model, arguments.model) for line in lines]
  for first in range(0, len(lines), arguments.batch_size):
    some = slice(first, first + arguments.batch_size)
    done = model.complete(prompts[some], [line.request for line in lines[some]])
    for line, row in zip(lines[some], done):
      written = {"text": row.text, "tokens": len(row.tokens), "reason": row.reason}
      print(json.dumps(line.given | written, ensure_ascii=False), flush=True)
  return 0


class _Line(NamedTuple):
  """A line of a file of JSON lines: where it stands, its prompt or messages, and the rest."""

  where: str
  given: dict[str, object]
  request: Request


def _prompt(line: _Line, model: Model, name: str) -> str | list[int]:
  """What a model reads for a line: its prompt, or the ids of its messages."""
  if "prompt" in line.given:
    return line.given["prompt"]
  template = _template(model)
  if template is None:
    raise UserError(
        f"{line.where}: messages need a chat template, and {name} has none: give a prompt"
    )
  try:
    text = check_text(template.render(line.given["messages"]), "the text of the messages")
  except UserError as error:
    raise UserError(f"{line.where}: {error}") from None
  return model.vocabulary.encode(text)  # as ids: the template has begun the text


def _template(model: Model) -> chat_templates.ChatTemplate | None:
  """The chat template of a model; only the vocabularies of Hugging Face directories have one."""
  return getattr(model.vocabulary, "chat_template", None)


def _requests(path: str, defaults: dict) -> Iterator[_Line]:
  """The lines of a file of JSON lines, each checked before anything is written."""
  for number, line in enumerate(text_of(None, path, needed=True).split("\n"), 1):
    where = f"{path}, line {number}"
    if not line.strip():
      continue
    try:
      given = json.loads(line)
    except (ValueError, RecursionError) as error:
      raise UserError(f"{where} is no JSON ({error}): one object a line") from None
    kind = "messages" if isinstance(given, dict) and "messages" in given else "prompt"
    if kind == "prompt" and not (isinstance(given, dict) and isinstance(given.get(kind), str)):
      raise UserError(
          f'{where}: give an object with a prompt, as {{"prompt": "Once upon"}}, or with messages'
      )
    if kind == "messages" and "prompt" in given:
      raise UserError(f"{where}: a prompt and messages were given: leave one of them out")
    unknown = sorted(set(given) - {kind, *defaults})
    if unknown:
      raise UserError(f"{where}: {unknown[0]!r} is unknown; there is {', '.join(defaults)}")
    if kind == "prompt" and not check_text(given["prompt"], f"{where}: the prompt"):
      raise UserError(f"{where}: the prompt is empty")
    values = defaults | {name: value for name, value in given.items() if name != kind}
    try:
      what = "the text of the messages" if kind == "messages" else "the line"
      check_text(json.dumps(given, ensure_ascii=False), what)  # stop strings too
      if kind == "messages":
        chat_templates.check(given["messages"])
      settings = Sampling(**{name: values[name] for name in _SAMPLING})
      request = Request(
          values["max_new_tokens"], settings, values["stop"], values["stop_tokens"]
      )
      request.validate(sys.maxsize)
    except (UserError, TypeError, RecursionError) as error:
      raise UserError(f"{where}: {error}") from None
    yield _Line(where, {kind: given[kind]}, request)


def score(arguments: argparse.Namespace) -> int:
  """Says how probable a text is."""
  model = load(arguments.model)
  text = text_of(arguments.text, arguments.file, needed=True)
  with _progress(len(text)) as progress:
    result = model.score(text, progress=progress)
  known = result.log_probs[~np.isnan(result.log_probs)].astype(np.float64)
  if arguments.tokens:
    for token, value in zip(result.tokens.tolist(), result.log_probs.tolist()):
      line = {
          "token": token,
          "text": model.vocabulary.decode([token]),
          "log_prob": None if math.isnan(value) else round(value, 6),
      }
      print(json.dumps(line, ensure_ascii=False))
    return 0
  unknown = model.vocabulary.decode(result.tokens[: len(result.tokens) - len(known)].tolist())
  size = len(text.encode()) - len(unknown.encode())  # bytes of the tokens that were predicted
  bits = -known.sum() / math.log(2) / size if size else math.nan
  per_token = -known.mean() if known.size else math.nan
  print(f"tokens             {len(result.tokens):,} ({known.size:,} of them predicted)")
  print(f"nats per token     {per_token:.4f}")
  print(f"perplexity         {math.exp(min(per_token, 700)):.4f}")
  print(f"bits per byte      {bits:.4f}")
  return 0


_HELP = """\
/save DIR   put what was read aside        /load DIR   take it up again
/reset      forget everything              /memory     size and age of what is remembered
/help       this                           /quit       end (also Ctrl-D)"""


def chat(arguments: argparse.Namespace) -> int:
  """Talks, and puts what was said aside, whatever has ended it."""
  with contextlib.suppress(ImportError):  # gives input() a history and an editor
    import readline  # noqa: F401  # pylint: disable=unused-import,import-outside-toplevel
  if arguments.turn is not None and "{}" not in arguments.turn:
    raise UserError(f"--turn={arguments.turn!r} has no {{}}, the place of the line that is typed")
  model = load(arguments.model)
  with _session(arguments.session):
    before = session.load(arguments.session, model) if arguments.session else None
    talk = Chat(model, before or model.start(), arguments)
    try:
      talk.run()
    finally:
      if arguments.session and talk.reading is not before:
        session.save(arguments.session, talk.reading, model, locked=True)
  return 0


class Chat:
  """A talk: every line that is typed is read after all that was read and written before.

  A line is a user's turn by the model's chat template. `--turn` goes before the template.

  Attributes:
    reading: where it stands.
  """

  def __init__(self, model: Model, reading: Reading, arguments: argparse.Namespace):
    self.reading = reading
    self._model, self._arguments = model, arguments
    self._talk = self._new_talk()

  def run(self) -> None:
    """Talks until the end of the input. Wrong input and Ctrl-C end a line, not the talk."""
    print("/help lists the commands")
    while True:
      try:
        line = input("> ")
        if line == "/quit":
          return
        self.answer(line)
      except EOFError:
        print()
        return
      except KeyboardInterrupt:
        print()
      except (UserError, UnicodeDecodeError) as error:
        print(f"famjax: error: {error}", file=sys.stderr)

  def answer(self, line: str) -> None:
    """Obeys a command, or reads a line and writes what comes next."""
    if line.startswith("/"):
      name, _, place = line[1:].partition(" ")
      self._obey(name, place.strip())
      return
    prompt = self._prompt(line)
    if not prompt:
      return
    with _interrupts() as asked:
      stream = _read_prompt(self._model, prompt, self.reading, self._arguments, asked)
      try:
        _show(stream, asked)
      finally:
        self.reading = stream.reading
        if stream.reason == "unread":  # nobody knows how much of the line
          self._talk = self._new_talk()
        elif self._talk:
          self._talk.add(line, stream.text)

  def _holds(self, place: str) -> bool:
    """Returns whether a directory is the session that this talk has locked."""
    own = self._arguments.session
    return own is not None and pathlib.Path(own).resolve() == pathlib.Path(place).resolve()

  def _prompt(self, line: str) -> str | list[int]:
    """What is read for a line; nothing for an empty turn."""
    vocabulary = self._model.vocabulary
    if self._talk:  # ids: the template has begun the text
      text = self._talk.turn(check_text(line, "the line")) if line else ""
      begins = not self.reading.state.position[0]
      return vocabulary.encode(text) if begins else encode_after(vocabulary, text)
    turn = _TURN if self._arguments.turn is None else self._arguments.turn
    prompt = check_text(turn.replace("\\n", "\n").replace("{}", line), "the line")
    return prompt if vocabulary.encode(prompt) else ""

  def _new_talk(self) -> chat_templates.Talk | None:
    """A talk by the model's chat template, of which nothing that was read before is known."""
    template = _template(self._model) if self._arguments.turn is None else None
    begun = bool(self.reading.state.position[0])
    return chat_templates.Talk(template, begun) if template else None

  def _obey(self, name: str, place: str) -> None:
    if name in ("save", "load") and not place:
      raise UserError(f"/{name} needs a directory: /{name} DIR")
    if name == "save":
      session.save(place, self.reading, self._model, locked=self._holds(place))
      print(f"saved in {place}")
    elif name == "load":
      loaded = session.load(place, self._model)
      if loaded is None:
        raise UserError(f"there is no session in {place}")
      self.reading = loaded
      self._talk = self._new_talk()
      print(f"{int(loaded.state.position[0]):,} tokens were read before")
    elif name == "reset":
      self.reading = self._model.start()
      self._talk = self._new_talk()
      print("nothing is remembered")
    elif name == "memory":
      print(describe(self.reading, self._model))
    elif name == "help":
      print(_HELP)
    else:
      raise UserError(f"/{name} is unknown; /help lists the commands")


def describe(reading: Reading, model: Model) -> str:
  """Size and age of what one row remembers, in a few lines."""
  memory = model.config.memory
  state = reading.state
  window = (memory.memory_segments + 1) * memory.block_size
  lines = [
      f"tokens read     {int(state.position[0]):,}",
      f"state           {num_bytes(state):,} bytes, whatever was read",
      f"window          up to {window:,} tokens: {memory.memory_segments} segments and a block of"
      f" {memory.block_size:,}",
  ]
  if memory.length:
    layers, _, length, width = state.fam.shape
    lines.append(
        f"FAM             {layers} layers x {length} vectors of {width}, written"
        f" {int(state.fam_updates[0]):,} times"
    )
  return "\n".join(lines)


def _settings(arguments: argparse.Namespace) -> dict[str, object]:
  """How a text is written, by the names of `Model.generate`."""
  return {name: getattr(arguments, name) for name in (*_SAMPLING, *_LIMITS)}


def text_of(text: str | None, path: str | None, *, needed: bool) -> str:
  """Returns a text: as it is given, from a file, or from standard input ("-").

  Raises:
    UserError: There is none, or two; or it is not UTF-8: see `famjax.data.text_files`.
  """
  if text is not None and path is not None:
    raise UserError("a text and a file were given: leave one of them out")
  if text is not None:
    return check_text(text, "the text")
  if path is None:
    if needed:
      raise UserError("no text was given: name one, or a file: --file=FILE (- is standard input)")
    return ""
  try:
    data = sys.stdin.buffer.read() if path == "-" else pathlib.Path(path).read_bytes()
  except OSError as error:
    raise UserError(f"{path} cannot be read: {error.strerror}") from None
  return decode(data, "standard input" if path == "-" else path)


@contextlib.contextmanager
def _progress(characters: int):
  """A function to tell of tokens that were read: a bar with tokens per second, on long texts."""
  if characters < _QUIET_BELOW:
    yield lambda tokens: None
    return
  if sys.stderr.isatty():
    import tqdm  # pylint: disable=import-outside-toplevel

    with tqdm.tqdm(desc="reading", unit=" tokens", unit_scale=True, dynamic_ncols=True) as bar:
      yield bar.update
    return
  started, read = time.time(), []
  yield read.append
  seconds = max(time.time() - started, 1e-6)
  total = sum(read)
  print(f"read {total:,} tokens, {total / seconds:,.0f} tokens/s", file=sys.stderr)


@contextlib.contextmanager
def _interrupts():
  """A list that is empty until Ctrl-C. A second one ends the process as it always does."""
  asked = []

  def note(signum, frame):
    del signum, frame
    asked.append(True)
    signal.signal(signal.SIGINT, before)

  before = signal.signal(signal.SIGINT, note)
  try:
    yield asked
  finally:
    signal.signal(signal.SIGINT, before)
