"""generate, score and chat, as a user meets them."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest

import famjax
from famjax import cli
from famjax.inference import commands, session
from tests.inference import tiny

PROMPT = "To read is to forget"


@pytest.fixture(scope="module", name="run_dir")
def _run_dir(tmp_path_factory):
  directory = tmp_path_factory.mktemp("run")
  tiny.save(directory, tiny.CONFIG)
  return str(directory)


@pytest.fixture(scope="module", name="model")
def _model(run_dir):
  return famjax.load(run_dir)


@pytest.fixture(autouse=True)
def _load_once(model, monkeypatch):
  """Every command loads its model; what that compiles is compiled once here."""
  load = commands.load
  monkeypatch.setattr(commands, "load", lambda path: model if os.path.exists(path) else load(path))


def stdin(monkeypatch, data: bytes):
  monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), "utf-8"))


def text_after(model, prompt, count=100, **options):
  return "".join(model.generate(prompt, max_new_tokens=count, **options))


def test_generate_from_a_prompt_a_file_and_standard_input(
    run_dir, model, tmp_path, monkeypatch, capsys
):
  expected = text_after(model, PROMPT, 12) + "\n"
  (tmp_path / "p.txt").write_text(PROMPT)
  stdin(monkeypatch, PROMPT.encode())
  for source in (f"--prompt={PROMPT}", f"--file={tmp_path / 'p.txt'}", "--file=-"):
    assert cli.main(["generate", run_dir, source, "--max_new_tokens=12"]) == 0
    shown = capsys.readouterr()
    assert shown.out == expected and not shown.err
  drawn = dict(temperature=0.9, top_k=40, top_p=0.9, min_p=0.01, repetition_penalty=1.2, seed=5)
  options = [f"--{name}={value}" for name, value in drawn.items()]
  stop = text_after(model, PROMPT, 40, **drawn)[8:10]
  assert cli.main(["generate", run_dir, f"--prompt={PROMPT}", *options, "--stop", stop]) == 0
  assert capsys.readouterr().out == text_after(model, PROMPT, stop=[stop], **drawn) + "\n"


def test_a_session_goes_on_where_it_ended(run_dir, model, tmp_path, capsys):
  place = str(tmp_path / "s")
  at_once = text_after(model, PROMPT, 20)
  arguments = ["generate", run_dir, f"--session={place}", "--max_new_tokens=10"]
  assert cli.main([*arguments, f"--prompt={PROMPT}"]) == 0
  assert cli.main(arguments) == 0
  assert capsys.readouterr().out.replace("\n", "") == at_once.replace("\n", "")
  assert session.load(place, model).state.position.tolist() == [len(PROMPT) + 20]


def test_a_line_for_every_request(run_dir, model, tmp_path, capsys):
  requests = [
      {"prompt": "a"},
      {"prompt": PROMPT, "temperature": 1.0, "seed": 4, "max_new_tokens": 7},
      {"prompt": "What was it?\u2028", "stop": "e", "stop_tokens": [70]},
  ]
  path = tmp_path / "r.jsonl"
  path.write_text("\n\n".join(json.dumps(r, ensure_ascii=False) for r in requests) + "\n")
  arguments = ["generate", run_dir, f"--jsonl={path}", "--max_new_tokens=9", "--batch_size=2"]
  assert cli.main(arguments) == 0
  lines = [json.loads(line) for line in capsys.readouterr().out.strip().split("\n")]
  assert [line["prompt"] for line in lines] == [r["prompt"] for r in requests]
  for line, request in zip(lines, requests):
    options = {"count": 9} | {k: v for k, v in request.items() if k != "prompt"}
    options["count"] = options.pop("max_new_tokens", options["count"])
    assert line["text"] == text_after(model, request["prompt"], **options)
    assert line["tokens"] <= options["count"] and line["reason"] in ("length", "stop")


def test_score(run_dir, model, tmp_path, capsys):
  score = model.score(PROMPT)
  assert cli.main(["score", run_dir, f"--text={PROMPT}", "--tokens"]) == 0
  lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
  assert [line["token"] for line in lines] == score.tokens.tolist()
  assert "".join(line["text"] for line in lines) == PROMPT and lines[0]["log_prob"] is None
  given = [line["log_prob"] for line in lines[1:]]
  np.testing.assert_allclose(given, score.log_probs[1:], atol=1e-5)
  (tmp_path / "t.txt").write_text(PROMPT)
  assert cli.main(["score", run_dir, f"--file={tmp_path / 't.txt'}"]) == 0
  out = capsys.readouterr().out
  mean = -score.log_probs[1:].astype(np.float64).mean()
  assert f"tokens             {len(PROMPT)} ({len(PROMPT) - 1} of them predicted)" in out
  assert f"nats per token     {mean:.4f}" in out and f"perplexity         {np.exp(mean):.4f}" in out
  assert f"bits per byte      {mean / np.log(2):.4f}" in out  # every token is a byte


def talk(run_dir, lines, monkeypatch, *options):
  given = iter(lines)

  def answer(prompt):
    del prompt
    line = next(given, EOFError)
    if isinstance(line, type):
      raise line()
    return line

  monkeypatch.setattr("builtins.input", answer)
  return cli.main(["chat", run_dir, "--max_new_tokens=6", *options])


def test_a_chat_remembers_all_of_it(run_dir, model, monkeypatch, capsys):
  options = ["--turn", r"U: {}\nM:", "--stop", "\nU:"]
  typed = ["One.", KeyboardInterrupt, "no \udcff character", "Two."]
  assert talk(run_dir, typed, monkeypatch, *options) == 0
  first = model.generate("U: One.\nM:", max_new_tokens=6, stop=["\nU:"])
  text = "".join(first)
  second = text_after(model, "U: Two.\nM:", 6, state=first.reading, stop=["\nU:"])
  shown = capsys.readouterr()
  assert shown.out == f"/help lists the commands\n{text}\n\n{second}\n\n"
  assert shown.err == "famjax: error: the line is not UTF-8 at character 6; convert it\n"


def test_the_commands_of_a_chat(run_dir, model, tmp_path, monkeypatch, capsys):
  place = tmp_path / "s"
  lines = [
      "/help", "/memory", "/save", "One.", f"/save {place}", "/memory", "/reset",
      f"/load {place}", f"/load {tmp_path / 'none'}", "/nonsense", "", "/quit", "never read",
  ]  # fmt: skip
  assert talk(run_dir, lines, monkeypatch) == 0
  shown = capsys.readouterr()
  size = famjax.inference.commands.num_bytes(model.init_state())
  for expected in (
      "/reset      forget everything", "tokens read     0\n", f"state           {size:,} bytes",
      f"saved in {place}", "nothing is remembered\n", "window          up to 8 tokens: 1 segments",
      "tokens read     11\n", "FAM             2 layers x 2 vectors of 16, written 2 times",
      "11 tokens were read before",
  ):  # fmt: skip
    assert expected in shown.out
  errors = [line.removeprefix("famjax: error: ") for line in shown.err.splitlines()]
  assert errors == [
      "/save needs a directory: /save DIR",
      f"there is no session in {tmp_path / 'none'}",
      "/nonsense is unknown; /help lists the commands",
  ]


def test_a_chat_that_breaks_off_is_put_aside(run_dir, model, tmp_path, monkeypatch):
  status = talk(run_dir, ["One.", ZeroDivisionError], monkeypatch, f"--session={tmp_path / 's'}")
  assert status == 70
  assert session.load(tmp_path / "s", model).state.position.tolist() == [11]


def test_a_reader_that_goes_away_does_not_take_the_session_along(
    run_dir, model, tmp_path, monkeypatch, capsys
):
  def gone(*args, **options):
    raise BrokenPipeError(32, "Broken pipe")

  monkeypatch.setattr("builtins.print", gone)
  arguments = ["generate", run_dir, f"--prompt={PROMPT}", f"--session={tmp_path / 's'}"]
  with pytest.raises(BrokenPipeError):
    commands.generate(cli._parser().parse_args(arguments))  # pylint: disable=protected-access
  assert session.load(tmp_path / "s", model).state.position.tolist() == [len(PROMPT) + 1]


def test_a_chat_can_be_taken_up_again(run_dir, model, tmp_path, monkeypatch, capsys):
  options = [f"--session={tmp_path / 's'}"]
  assert talk(run_dir, ["One."], monkeypatch, *options) == 0
  first = model.generate("One.\n", max_new_tokens=6)
  list(first)
  capsys.readouterr()
  assert talk(run_dir, ["Two."], monkeypatch, *options) == 0
  assert text_after(model, "Two.\n", 6, state=first.reading) in capsys.readouterr().out


def test_long_texts_show_how_fast_they_are_read(run_dir, tmp_path, capsys):
  (tmp_path / "long.txt").write_text("word " * 5000)
  arguments = ["generate", run_dir, f"--file={tmp_path / 'long.txt'}", "--max_new_tokens=1"]
  assert cli.main(arguments) == 0
  assert capsys.readouterr().err.startswith("read 25,000 tokens, ")


WRONG = {
    "no text": (["generate"], "no text was given: name one, or a file: --file=FILE"),
    "an empty prompt": (["generate", "--prompt="], "the prompt is empty"),
    "an empty file": (["score", "--file=empty"], "is empty"),
    "two texts": (["score", "--text=a", "--file=empty"], "leave one of them out"),
    "no such file": (["score", "--file=none.txt"], "none.txt cannot be read: No such file"),
    "no UTF-8": (["generate", "--file=broken"], "broken is not UTF-8: byte 0xff at 2;"),
    "no character": (["generate", "--prompt=a\udcff"], "the text is not UTF-8 at character 1"),
    "half a pair": (["generate", "--jsonl=half"], "line 1: the prompt is not UTF-8 at character 1"),
    "half a pair to stop at": (["generate", "--jsonl=half_stop"], "line 1: the line is not UTF-8 at"),
    "another encoding": (["score", "--file=utf16"], "utf16 is UTF-16: convert it, as with iconv -f UTF-16"),
    "a binary file": (["score", "--file=binary"], "binary has a NUL byte at 1"),
    "deep JSON": (["generate", "--jsonl=deep"], "line 1 is no JSON (maximum recursion depth"),
    "a stop token": (["generate", "--prompt=a", "--stop_token=300"], "stop token 300 is outside"),
    "a turn without a place": (["chat", "--turn=User:"], "--turn='User:' has no {}"),
    "a setting": (["generate", "--prompt=a", "--top_p=2"], "top_p is 2.0"),
    "a batch": (["generate", "--jsonl=good", "--batch_size=0"], "--batch_size is 0"),
    "a session for many": (["generate", "--jsonl=good", "--session=s"], "leave out the session"),
    "no JSON": (["generate", "--jsonl=broken.jsonl"], "broken.jsonl, line 2 is no JSON"),
    "no prompt": (["generate", "--jsonl=no_prompt"], "line 1: give an object with a prompt"),
    "an empty one": (["generate", "--jsonl=empty_prompt"], "line 1: the prompt is empty"),
    "an unknown name": (["generate", "--jsonl=name"], "line 1: 'heat' is unknown; there is temp"),
    "a wrong value": (["generate", "--jsonl=value"], "line 1: top_k is -1"),
    "a wrong type": (["generate", "--jsonl=type"], "line 1: "),
    "gin": (["generate", "--prompt=a", "--gin.A=1"], "--gin.A=1: generate is not configured by gin"),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_input_is_one_line_and_nothing_is_written(
    run_dir, what, tmp_path, monkeypatch, capfd
):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "empty").write_text("")
  (tmp_path / "broken").write_bytes(b"ab\xff")
  (tmp_path / "good").write_text('{"prompt": "a"}')
  (tmp_path / "broken.jsonl").write_text('{"prompt": "a"}\n{"prompt"')
  (tmp_path / "no_prompt").write_text('{"text": "a"}')
  (tmp_path / "empty_prompt").write_text('{"prompt": ""}')
  (tmp_path / "name").write_text('{"prompt": "a", "heat": 1}')
  (tmp_path / "value").write_text('{"prompt": "a", "top_k": -1}')
  (tmp_path / "half").write_text('{"prompt": "a\\ud800"}')
  (tmp_path / "half_stop").write_text('{"prompt": "a", "stop": ["\\ud800"]}')
  (tmp_path / "utf16").write_bytes("abc".encode("utf-16"))
  (tmp_path / "binary").write_bytes(b"a\0b")
  (tmp_path / "deep").write_text('{"prompt": ' + "[" * 100_000)
  (tmp_path / "type").write_text('{"prompt": "a", "top_k": "many"}')
  before = sorted(tmp_path.iterdir())
  arguments, message = WRONG[what]
  assert cli.main([arguments[0], run_dir, *arguments[1:]]) == 2
  shown = capfd.readouterr()
  assert shown.err.startswith("famjax: error: ") and message in shown.err
  assert shown.err.count("\n") == 1 and not shown.out
  assert sorted(tmp_path.iterdir()) == before


def test_a_model_that_is_not_there(capsys):
  assert cli.main(["generate", "/nowhere", "--prompt=a"]) == 2
  assert "no famjax checkpoint can be read at /nowhere" in capsys.readouterr().err


def test_an_interrupt_prints_what_there_is_and_saves_the_session(run_dir, model, tmp_path):
  """In a process of its own, in the middle of a long text."""
  place = tmp_path / "s"
  process = subprocess.Popen(
      [
          sys.executable, "-m", "famjax.cli", "generate", run_dir, f"--prompt={PROMPT}",
          "--max_new_tokens=1000000", f"--session={place}",
      ],
      stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "JAX_PLATFORMS": "cpu"},
      bufsize=0,  # what a buffer holds is lost to `communicate`
  )  # fmt: skip
  out = b"".join(process.stdout.read(1) for _ in range(40))
  process.send_signal(signal.SIGINT)
  rest, err = process.communicate(timeout=300)
  assert process.returncode == 130 and not err
  text = (out + rest).decode()
  assert text.endswith("\n")
  written = int(session.load(place, model).state.position[0]) - len(PROMPT)
  assert 16 < written < 1_000_000
  # What was shown is what was read: a last unfinished character is not shown.
  again = model.generate(PROMPT, max_new_tokens=written)
  assert "".join(again).startswith(text[:-1]) and written - len(text.encode()) < 200


def interrupt_after(pieces, monkeypatch):
  """Ctrl-C, when so many pieces of a prompt have been read."""
  told = []

  @contextlib.contextmanager
  def progress(characters):
    del characters

    def show(tokens):
      told.append(tokens)
      if len(told) == pieces:
        signal.raise_signal(signal.SIGINT)

    yield show

  monkeypatch.setattr(commands, "_progress", progress)


def test_an_interrupt_while_a_prompt_is_read_keeps_what_was_read(
    run_dir, model, tmp_path, monkeypatch, capsys
):
  text = "word " * 50
  before = signal.getsignal(signal.SIGINT)
  interrupt_after(3, monkeypatch)
  arguments = ["generate", run_dir, f"--prompt={text}", f"--session={tmp_path / 's'}"]
  assert cli.main(arguments) == 130
  kept = session.load(tmp_path / "s", model)
  read = int(kept.state.position[0])
  assert 0 < read < len(text)
  shown = capsys.readouterr()
  assert shown.out == "\n"
  assert shown.err == f"interrupted after {read:,} tokens, before the end of the prompt\n"
  assert signal.getsignal(signal.SIGINT) is before
  np.testing.assert_allclose(
      model.read(text[read:], kept).logits, model.read(text).logits, atol=2e-5
  )


def test_an_interrupt_while_a_line_of_a_chat_is_read(run_dir, model, tmp_path, monkeypatch, capsys):
  interrupt_after(3, monkeypatch)
  options = [f"--session={tmp_path / 's'}"]
  assert talk(run_dir, ["word " * 50, "/memory"], monkeypatch, *options) == 0
  read = int(session.load(tmp_path / "s", model).state.position[0])
  assert 0 < read < 250 and f"tokens read     {read}\n" in capsys.readouterr().out
