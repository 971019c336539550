"""The process that renders chat templates: limits, and a life of its own."""

import concurrent.futures
import os
import signal
import subprocess
import sys
import time

import pytest

from famjax.data import templates
from famjax.data.chat_templates import ChatTemplate
from famjax.errors import UserError
from tests.mutations import survives

MESSAGES = [{"role": "user", "content": "x"}]


def render(source, **variables):
  return ChatTemplate(source, {"bos_token": "<s>"}, "here").render(MESSAGES, **variables)


_LOOPS = "".join(f"{{% for {name} in range(9999) %}}" for name in "abc") + "{% endfor %}" * 3


@pytest.mark.parametrize(
    "source",
    [
        _LOOPS,
        _LOOPS.replace("%}{% endfor", "%}x{% endfor", 1),
        "{% for i in range(99999) %}{{ 'x' * 9999 }}{% endfor %}",
        "{{ 'a' * 5000000000 }}",
        "{{ messages[0].content * 5000000000 }}",
        "{{ 2 ** (2 ** 40) }}",
        "{% set n = 2 %}{{ n ** (n ** 40) }}",
        "{{ '%1000000000d' % 1 }}",
        "{{ '{:>1000000000}'.format(1) }}",
        "{{ 'x'.center(10000000000) }}",
        "{{ 'x' | center(10000000000) }}",
        "{{ 'x'.ljust(9999999999) | length }}",
        "{{ range(999999999) | list }}",
        "{{ [1] * 9999999999 }}",
        "{{ [1] | batch(9999999999, 0) | list }}",
        "{{ messages | tojson(indent=9999999999) }}",
        "{{ lipsum(n=999999999) }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% set x = namespace(a='a') %}{% for i in range(99) %}{% set x.a = x.a + x.a %}{% endfor %}",
        "{{ 'a' | replace('a', 'a' * 99999) | replace('a', 'a' * 99999) | replace('a', 'a' * 99999) }}",
        "(" * 99999 + "{{ " + "(" * 9999 + "1" + ")" * 9999 + " }}",
        "{% if true %}" * 9999 + "{% endif %}" * 9999,
        "{{ strftime_now('%Y' * 99999999) }}",
        "{{ raise_exception('x' * 99999999) }}",
        "{{ " + "-" * 99999 + "1 }}",
    ],
)
def test_what_a_hostile_template_asks_for_is_refused(source):
  """Or its text is short; and the next template is rendered as ever."""
  survives(lambda: render(source), source[:80])
  assert render("{{ bos_token }}{{ messages[0].content }}") == "<s>x"


@pytest.mark.parametrize(
    "source, message",
    [
        ("{{ 'a' * 20000000 }}", "^here: the chat template needs a text of more than 16 MB: use another"),
        ("{{ ('a' * 999999999) | length }}", "needs more than 512 MB of memory"),
        (_LOOPS, "needs more than 4 s"),
    ],
)
def test_a_limit_is_named(source, message):
  with pytest.raises(UserError, match=message):
    render(source)


def test_a_text_up_to_the_limit_is_rendered():
  assert render("{{ '\u65e5' * 5000000 }}") == "\u65e5" * 5_000_000


def test_values_pass_as_they_are():
  assert render("{{ a }}{{ b[0] }}{{ c is none }}{{ d | tojson }}", a="\u00e9\u2028", b=[1.5], c=None, d={"a": True}) == (
      '\u00e9\u20281.5True{"a": true}'
  )  # fmt: skip
  with pytest.raises(UserError, match="here: a chat template takes JSON values alone"):
    render("{{ a }}", a=object())
  with pytest.raises(UserError, match="the text of the messages is not UTF-8 at character 1"):
    render("x{{ a }}", a="\udcff")
  assert len(render("{{ strftime_now('%Y') }}")) == 4


def test_rendering_costs_a_millisecond():
  render("a")
  started = time.monotonic()
  for number in range(50):
    assert render("{{ n }}", n=number) == str(number)
  assert time.monotonic() - started < 2.5


def test_threads_share_the_process():
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    done = list(pool.map(lambda n: render("{{ n }}" * 999, n=n), range(80)))
  assert done == [str(n) * 999 for n in range(80)]


def test_the_process_is_started_anew():
  render("a")
  process = templates._worker_now.process
  process.kill()
  process.wait()
  assert render("b") == "b" and templates._worker_now.process.pid != process.pid


def test_an_interrupt_leaves_no_answer_behind(monkeypatch):
  def interrupted(self, seconds):
    del self, seconds
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(9)

  render("a")
  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(templates._Worker, "_line", interrupted)
    render("b")
  assert render("c") == "c"


_CODE = """
import os, sys, time
import warnings
from famjax.data import templates
warnings.simplefilter("ignore")  # that jax has threads
templates.render("a", {})
print(templates._worker_now.process.pid, flush=True)
"""


_FORK = """
if not os.fork():
  os._exit(0 if templates.render("b", {}) == "b" else 1)
assert os.waitstatus_to_exitcode(os.wait()[1]) == 0 and templates.render("c", {}) == "c"
"""


@pytest.mark.parametrize("end", ["pass", "os._exit(0)", "os.kill(os.getpid(), 9)", _FORK])
def test_the_process_ends_with_its_parent(end):
  """And holds none of its pipes; a process that was forked has its own."""
  result = subprocess.run(
      [sys.executable, "-c", _CODE + end], capture_output=True, text=True, timeout=60, check=False
  )
  worker = int(result.stdout)
  assert not result.stderr
  for _ in range(100):
    if not os.path.exists(f"/proc/{worker}"):
      break
    time.sleep(0.05)
  assert not os.path.exists(f"/proc/{worker}")


def test_the_process_sees_little_of_ours(monkeypatch):
  monkeypatch.setenv("SECRET_TOKEN", "x")
  templates._stop()
  render("a")
  pid = templates._worker_now.process.pid
  with open(f"/proc/{pid}/environ", "rb") as file:
    assert b"SECRET" not in file.read()
  links = [os.readlink(f"/proc/{pid}/fd/{name}") for name in os.listdir(f"/proc/{pid}/fd")]
  assert len(links) == 3  # standard input, output and error
