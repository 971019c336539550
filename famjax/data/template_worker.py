"""Renders chat templates in a process of its own: `python -I template_worker.py SECONDS BYTES FOLDERS`.

A chat template is a stranger's program. Limits inside one process leave holes, so this process has
limits of memory and processor time, and the process that asks for it ends it if it takes too long.
It reads JSON lines from standard input and answers each with one on standard output: `{"ready": true}`
at first, then `{"text": ...}`, `{"error": ...}`, or `{"limit": ...}` for each request
`{"source": ..., "names": ...}`; without names, the source is compiled alone.
"""

import contextlib
import datetime
import functools
import json
import signal
import sys

TEXT_BYTES = 2**24  # of a rendered text
_ERROR = 300  # characters of an error


def main(seconds: int, memory: int, folders: list[str]) -> None:
  """Answers requests until standard input ends."""
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is for the process that asks
  sys.path += [folder for folder in folders if folder not in sys.path]
  requests, answers = sys.stdin.buffer, sys.stdout.buffer
  environment()  # imports jinja2, whose memory does not count
  _limit_memory(memory)
  _answer(answers, {"ready": True})
  for line in requests:
    _limit_seconds(seconds)
    _answer(answers, answer(line))


def answer(line: bytes) -> dict[str, str]:
  """Returns the answer to a request."""
  try:
    request = json.loads(line)
    template = _template(request["source"])
    names = request["names"]
    return {"text": ""} if names is None else _rendered(template, names)
  except MemoryError:
    return {"limit": "memory"}
  except Exception as error:  # a template can raise anything
    try:
      text = " ".join(str(error)[: 8 * _ERROR].split())[:_ERROR]
    except Exception:
      text = ""
    return {"error": text or type(error).__name__}


def _rendered(template, names) -> dict[str, str]:
  pieces, size = [], 0
  for piece in template.generate(**names):
    size += len(piece) if piece.isascii() else len(piece.encode("utf-8", "surrogatepass"))
    if size > TEXT_BYTES:
      return {"limit": "text"}
    pieces.append(piece)
  return {"text": "".join(pieces)}


def _answer(answers, what: dict) -> None:
  try:
    data = json.dumps(what, ensure_ascii=False).encode("utf-8", "surrogatepass")
  except MemoryError:
    data = b'{"limit": "memory"}'
  answers.write(data + b"\n")
  answers.flush()


@functools.lru_cache(maxsize=16)
def _template(source: str):
  return environment().from_string(source)


@functools.cache
def environment():
  """Jinja as transformers sets it up."""
  import jinja2  # pylint: disable=g-import-not-at-top  (found by way of `folders`)
  from jinja2 import ext, nodes, sandbox  # pylint: disable=g-import-not-at-top

  class Generation(ext.Extension):
    """Lets `{% generation %}` pass, which marks answers for training."""

    tags = {"generation"}

    def parse(self, parser):
      line = next(parser.stream).lineno
      body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
      return nodes.Scope(body).set_lineno(line)

  def refuse(message):
    raise jinja2.TemplateError(message)

  def to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    # Jinja's own escapes what HTML would read as its own.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )

  def now(form):
    return datetime.datetime.now().strftime(form)

  made = sandbox.ImmutableSandboxedEnvironment(
      trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols]
  )
  made.filters["tojson"] = to_json
  made.globals |= {"raise_exception": refuse, "strftime_now": now}
  made.from_string("{{ messages | tojson }}").render(messages=[])  # imports what rendering needs
  return made


def _limit_memory(size: int) -> None:
  with contextlib.suppress(ImportError, ValueError, OSError):  # systems differ
    import resource  # pylint: disable=g-import-not-at-top

    resource.setrlimit(resource.RLIMIT_AS, (size, size))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _limit_seconds(seconds: int) -> None:
  """Ends this process when it has used so much more processor time."""
  with contextlib.suppress(ImportError, ValueError, OSError):
    import resource  # pylint: disable=g-import-not-at-top

    used = resource.getrusage(resource.RUSAGE_SELF)
    limit = int(used.ru_utime + used.ru_stime) + 1 + seconds
    resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.getrlimit(resource.RLIMIT_CPU)[1]))


if __name__ == "__main__":
  main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
