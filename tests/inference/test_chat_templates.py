"""Chats and requests by the chat template of a model, as a user meets them."""

import dataclasses
import json
import types

from flax import nnx
import jax.numpy as jnp
import pytest

from famjax import cli
from famjax.data.tokenizers import TokenizerVocabulary
from famjax.inference import commands, session
from famjax.inference.model import Model
from famjax.model.decoder import Decoder
from tests.convert import tiny as hub
from tests.data import chats
from tests.inference import tiny
from tests.inference.test_commands import interrupt_after, talk

pytest.importorskip("tokenizers", reason="the core runs without it")
# Begins with a symbol and ends a turn with one that ends a text as well.
TEMPLATE = """\
{{ bos_token }}{% for message in messages %}{% if message.role == 'system' %}\
{{ raise_exception('no system\nhere') }}{% endif %}\
{{ message.role + ':\n' + message.content | trim + '<|turn|>\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ 'assistant:\n' }}{% endif %}"""
ANSWER = " The sky is blue."


@pytest.fixture(scope="module", name="place")
def _place(tmp_path_factory):
  directory = tmp_path_factory.mktemp("hub")
  hub.save_tokenizer(directory, ANSWER)
  chats.save(directory, TEMPLATE)
  return str(directory)


@pytest.fixture(scope="module", name="model")
def _model(place):
  """A model that answers every turn with `ANSWER` and the symbol that ends a turn."""
  vocabulary = TokenizerVocabulary(place)
  config = dataclasses.replace(tiny.config(block_size=64), vocab_size=vocabulary.vocab_size)
  config = dataclasses.replace(config, num_layers=1, model_dim=64)
  decoder = Decoder(config, rngs=nnx.Rngs(0))
  layers = decoder.layers
  for kernel in (layers.attention.out.kernel, layers.feedforward.down.kernel):
    kernel[...] = jnp.zeros_like(kernel[...])  # the next token depends on the last one alone
  written = [vocabulary.encode("\n")[-1], *vocabulary.encode(ANSWER + "<|turn|>")]
  assert len(set(written)) == len(written) > 3
  embedding, kernel = decoder.embedder.embedding[...], jnp.zeros_like(decoder.head.kernel[...])
  for last, token in zip(written, written[1:]):
    kernel = kernel.at[:, token].set(embedding[last] / jnp.linalg.norm(embedding[last]))
  decoder.head.kernel[...] = kernel
  return Model(decoder, vocabulary)


@pytest.fixture(autouse=True)
def _load_once(model, monkeypatch):
  monkeypatch.setattr(commands, "load", lambda path: model)


@pytest.fixture(name="heard")
def _heard(model, monkeypatch):
  """What is read and written, a list of texts or ids and what came after each."""
  heard, generate = [], model.generate

  def listen(prompt, **options):
    stream = generate(prompt, **options)
    heard.append((prompt, stream))
    return stream

  monkeypatch.setattr(model, "generate", listen)
  return heard


def tokens(heard):
  return [token for prompt, stream in heard for token in [*prompt, *stream.tokens]]


def history(*lines):
  messages = []
  for line in lines:
    messages += [dict(role="user", content=line), dict(role="assistant", content=ANSWER)]
  return messages[:-1]


LIMIT = "--max_new_tokens=30"  # wins over that of `talk`


def test_a_chat_reads_the_whole_talk_once(place, model, heard, monkeypatch, capsys):
  lines = ["What is it?", "", "no \udcff character", "And now?"]
  assert talk(place, lines, monkeypatch, LIMIT) == 0
  shown = capsys.readouterr()
  assert shown.out == f"/help lists the commands\n{ANSWER}\n{ANSWER}\n\n"
  assert shown.err == "famjax: error: the line is not UTF-8 at character 3; convert it\n"
  encode, render = model.vocabulary.encode, model.vocabulary.render
  # The template strips the space that the model has written before its answer.
  whole = render(history("What is it?", "And now?")).replace(ANSWER.strip(), ANSWER)
  assert tokens(heard) == encode(whole + ANSWER) and tokens(heard).count(1) == 1
  assert heard[-1][1].reason == "stop"
  assert int(heard[-1][1].state.position[0]) == len(encode(whole + ANSWER))


def test_an_answer_that_was_cut_is_ended(place, model, heard, monkeypatch):
  assert talk(place, ["One.", "Two."], monkeypatch, "--max_new_tokens=1") == 0
  cut = model.vocabulary.decode(heard[0][1].tokens)
  first, second = (model.vocabulary.decode(prompt) for prompt, _ in heard)
  assert heard[0][1].reason == "length" and ANSWER.startswith(cut) and cut != ANSWER
  assert (first, second) == ("user:\nOne.\nassistant:\n", "\nuser:\nTwo.\nassistant:\n")
  assert heard[1][0][0] == model.vocabulary.encode("<|turn|>")[0]


def test_chats_that_go_on_from_what_is_not_known(place, model, heard, tmp_path, monkeypatch):
  saved = tmp_path / "s"
  assert talk(place, ["One."], monkeypatch, LIMIT, f"--session={saved}") == 0
  lines = ["Two.", "/reset", "Three.", f"/load {saved}", "Four."]
  assert talk(place, lines, monkeypatch, LIMIT, f"--session={saved}") == 0
  encode, render = model.vocabulary.encode, model.vocabulary.render
  alone = [encode(render(history(line))) for line in ("One.", "Two.", "Three.", "Four.")]
  assert [prompt for prompt, _ in heard] == [alone[0], alone[1][1:], alone[2], alone[3][1:]]
  assert session.load(saved, model) is not None


def test_a_turn_that_is_given_wins(place, heard, monkeypatch):
  assert talk(place, ["One."], monkeypatch, LIMIT, r"--turn=U: {}\nM:\n") == 0
  assert [prompt for prompt, _ in heard] == ["U: One.\nM:\n"]


def test_a_line_that_was_read_in_part(place, model, heard, monkeypatch):
  """The next one is a turn on its own."""
  interrupt_after(1, monkeypatch)
  assert talk(place, ["word " * 50, "Two."], monkeypatch, LIMIT) == 0
  assert heard[0][1].reason == "unread"
  alone = model.vocabulary.encode(model.vocabulary.render(history("Two.")))
  assert heard[1][0] == alone[1:]


def test_messages_in_json_lines(place, model, tmp_path, capsys):
  requests = [{"messages": history("One.", "Two.")}, {"prompt": "One.\n"}]
  requests[0]["max_new_tokens"] = 3
  path = tmp_path / "r.jsonl"
  path.write_text("\n".join(map(json.dumps, requests)))
  assert cli.main(["generate", place, f"--jsonl={path}", LIMIT, "--batch_size=1"]) == 0
  lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
  ids = model.vocabulary.encode(model.vocabulary.render(requests[0]["messages"]))
  assert ids.count(1) == 1  # what begins a text is there once
  text = "".join(model.generate(ids, max_new_tokens=3))
  first = {"messages": history("One.", "Two."), "text": text, "tokens": 3, "reason": "length"}
  assert lines[0] == first and ANSWER.startswith(text)
  assert lines[1]["prompt"] == "One.\n" and lines[1]["text"] == ANSWER


@pytest.mark.parametrize(
    "line, message",
    [
        ({"messages": "Hello"}, "line 2: messages are 'Hello': give a list of them"),
        ({"messages": []}, "line 2: messages are []: give a list"),
        ({"messages": [dict(role="user", content=3)]}, "line 2: {'role': 'user', 'content': 3} is"),
        ({"messages": history("a"), "prompt": "b"}, "line 2: a prompt and messages were given"),
        ({"messages": history("a"), "heat": 1}, "line 2: 'heat' is unknown; there is temp"),
        ({"messages": history("\ud800")}, "line 2: the text of the messages is not UTF-8"),
        ({"messages": [dict(role="system", content="a")]}, "refuses the messages (no system here)"),
    ],
)
def test_wrong_lines_are_one_line_and_nothing_is_written(place, line, message, tmp_path, capsys):
  (tmp_path / "r").write_text(json.dumps({"prompt": "a"}) + "\n" + json.dumps(line))
  assert cli.main(["generate", place, f"--jsonl={tmp_path / 'r'}"]) == 2
  shown = capsys.readouterr()
  assert shown.err.startswith("famjax: error: ") and message in shown.err
  assert shown.err.count("\n") == 1 and not shown.out


def test_messages_need_a_template(place, monkeypatch, tmp_path, capsys):
  monkeypatch.setattr(commands, "load", lambda path: types.SimpleNamespace(vocabulary=tiny.BYTES))
  (tmp_path / "r").write_text(json.dumps({"messages": history("a")}))
  assert cli.main(["generate", place, f"--jsonl={tmp_path / 'r'}"]) == 2
  expected = f"line 1: messages need a chat template, and {place} has none: give a prompt\n"
  assert capsys.readouterr().err.endswith(expected)
