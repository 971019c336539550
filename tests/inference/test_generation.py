"""Writing: streams, stop strings, going on, several prompts side by side."""

import functools

import numpy as np
import pytest

from famjax.errors import UserError
from famjax.inference.engine import STEPS
from famjax.inference.generation import Request
from famjax.inference.model import Model
from famjax.inference.sampling import Sampling
from tests.inference import tiny
from tests.inference.test_engine import assert_same_row

N = tiny.CONFIG.memory.block_size
PROMPT = "To read is to forget"
DRAWN = dict(temperature=0.8, top_k=30, seed=3)


@functools.cache
def model(kind="fam") -> Model:
  return tiny.model(kind)


def read_anew(prompt, tokens, kind="fam"):
  return model(kind).read([*tiny.BYTES.encode(prompt), *tokens])


@pytest.mark.parametrize("kind", ["fam", "bswa"])
@pytest.mark.parametrize("options", [{}, DRAWN], ids=["greedy", "drawn"])
def test_a_stream_goes_on_from_where_another_ended(kind, options):
  whole = model(kind).generate(PROMPT, max_new_tokens=37, **options)
  text = "".join(whole)
  assert text == whole.text and whole.reason == "length" and len(whole.tokens) == 37
  decoded = tiny.BYTES.decode(whole.tokens)
  assert decoded.startswith(text) and set(decoded[len(text) :]) <= {"\ufffd"}
  assert_same_row(whole.reading, 0, read_anew(PROMPT, whole.tokens, kind), 0)
  first = model(kind).generate(PROMPT, max_new_tokens=9, **options)
  assert "".join(first) == first.text
  rest = model(kind).generate(state=first.reading, max_new_tokens=28, **options)
  assert "".join(rest) and first.tokens + rest.tokens == whole.tokens
  assert_same_row(rest.reading, 0, whole.reading, 0)


@pytest.mark.parametrize("stop", [(), ("never comes",)])
def test_where_a_stream_stands_can_be_used_while_it_goes_on(stop):
  stream = model().generate(PROMPT, max_new_tokens=40, stop=stop)
  snapshots = [(stream.reading, 0)]
  for _ in stream:
    snapshots.append((stream.reading, len(stream.tokens)))
  for reading, count in snapshots:
    rest = model().generate(state=reading, max_new_tokens=40 - count)
    list(rest)
    assert stream.tokens[:count] + rest.tokens == stream.tokens


def test_an_interrupt_finds_the_row_where_the_device_left_it(monkeypatch):
  stream = model().generate(PROMPT, max_new_tokens=40)
  next(stream)

  def interrupt(x):
    raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr("famjax.inference.generation.jax.device_get", interrupt)
    with pytest.raises(KeyboardInterrupt):
      stream.round()
  whole = model().generate(PROMPT, max_new_tokens=3)  # a round of 1, and one of 2
  list(whole)
  assert_same_row(stream.reading, 0, whole.reading, 0)


def test_two_sittings_with_one_seed_draw_anew():
  first = model().generate(PROMPT, max_new_tokens=120, temperature=1.0)
  list(first)
  second = model().generate(PROMPT, state=first.reading, max_new_tokens=120, temperature=1.0)
  list(second)
  same = np.mean([a == b for a, b in zip(first.tokens, second.tokens)])
  assert same < 0.1  # it was half when draws began anew with every call


def test_a_seed_gives_its_text_again_and_another_seed_another():
  text = lambda seed, heat=1.0: "".join(
      model().generate(PROMPT, max_new_tokens=20, temperature=heat, seed=seed)
  )
  assert text(3) == text(3) != text(4)
  assert text(3, 0.0) == text(4, 0.0)


def test_the_first_piece_does_not_wait_for_the_others(monkeypatch):
  asked = []
  inner = model()._engine.write  # pylint: disable=protected-access
  monkeypatch.setattr(
      model()._engine, "write",  # pylint: disable=protected-access
      lambda *a, **k: asked.append(int(a[3][0])) or inner(*a, **k),
  )  # fmt: skip
  list(model().generate(PROMPT, max_new_tokens=40))
  assert asked == [1, 2, 4, 8, STEPS, 9]


@pytest.mark.parametrize("options", [{}, DRAWN], ids=["greedy", "drawn"])
def test_a_stop_string_ends_text_and_reading_where_it_is_whole(options):
  free = model().generate(PROMPT, max_new_tokens=40, **options)
  text = "".join(free)
  # Of whole characters, so that it is heard with its last byte.
  place = next(i for i in range(9, len(text) - 2) if text[i - 1 : i + 2].isascii())
  stop = text[place : place + 2]
  first = text.find(stop)
  stream = model().generate(PROMPT, max_new_tokens=40, stop=[stop, "never \n comes"], **options)
  assert "".join(stream) == stream.text == text[:first]
  assert stream.reason == "stop"
  heard = stream.tokens
  assert heard == free.tokens[: len(heard)] and tiny.BYTES.decode(heard) == text[: first + 2]
  assert_same_row(stream.reading, 0, read_anew(PROMPT, heard), 0)


def test_no_token_is_asked_for():
  stream = model().generate(PROMPT, max_new_tokens=0)
  assert list(stream) == [] and stream.reason == "length"
  assert_same_row(stream.reading, 0, read_anew(PROMPT, []), 0)


def test_prompts_side_by_side_get_what_each_gets_alone():
  """Each with its own settings, lengths and stops."""
  prompts = ["a", PROMPT, [70, 71, 72], "What was it that I had to keep in mind?"]
  free = "".join(model().generate(PROMPT, max_new_tokens=30))
  requests = [
      Request(5),
      Request(30, stop=(free[7:9],)),
      Request(3 * N, Sampling(temperature=1.0, top_p=0.9, seed=1)),
      Request(0),
  ]
  done = model().complete(prompts, requests)
  for prompt, request, row in zip(prompts, requests, done):
    (alone,) = model().complete([prompt], request)
    assert row == alone
  assert [row.reason for row in done] == ["length", "stop", "length", "length"]
  assert done[1].text == free[: free.find(free[7:9])]
  assert len(done[0].tokens) == 5 and done[3].tokens == []
  assert model().complete([]) == []


def test_other_tokens_can_end_a_text_too():
  free = model().generate(PROMPT, max_new_tokens=30)
  list(free)
  token = next(t for i, t in enumerate(free.tokens) if i > 4 and t not in free.tokens[:i])
  stream = model().generate(PROMPT, max_new_tokens=30, stop_tokens=token)
  list(stream)
  assert stream.tokens == free.tokens[: free.tokens.index(token)] and stream.reason == "stop"


def test_the_vocabulary_s_end_symbol_ends_a_text():
  eager = tiny.model()
  kernel = np.array(eager.decoder.head.kernel[...])
  kernel[:, tiny.BYTES.eos_id] = 50 * np.abs(kernel).max() * np.sign(kernel[:, 99])
  eager.decoder.head.kernel[...] = kernel
  eager = Model(eager.decoder, tiny.BYTES)
  stream = eager.generate(PROMPT, max_new_tokens=200)
  list(stream)
  assert stream.reason == "stop" and len(stream.tokens) < 200
  assert tiny.BYTES.eos_id not in stream.tokens


def test_repetition_is_punished():
  free = model().generate(PROMPT, max_new_tokens=40)
  list(free)
  assert len(set(free.tokens)) < 40
  harsh = model().generate(PROMPT, max_new_tokens=40, repetition_penalty=1e6)
  list(harsh)
  assert len({*tiny.BYTES.encode(PROMPT), *harsh.tokens}) == 40 + len(set(PROMPT))


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(temperature=-1), "temperature is -1: use 0"),
        (dict(max_new_tokens=-1), "max_new_tokens is -1"),
        (dict(max_new_tokens=2.5), "max_new_tokens is 2.5: use a whole number"),
        (dict(top_k=1.5), "top_k is 1.5: use a whole number"),
        (dict(temperature="hot"), "temperature is 'hot': use a number"),
        (dict(stop_tokens=300), "stop token 300 is outside"),
        (dict(stop_tokens=["a"]), "stop token 'a' is outside"),
        (dict(stop=[""]), r"stop is \[''\]: give a list of strings, none of them empty"),
        (dict(stop=[3]), "give a list of strings"),
        (dict(stop_tokens=[259]), "stop token 259 is outside the vocabulary of 259"),
        (dict(prompt=""), "the prompt is empty"),
        (dict(prompt=[]), "the prompt is empty"),
        (dict(prompt=[259]), "token 259 is outside"),
        (dict(prompt=[[3]]), r"tokens have shape \(1, 1\)"),
    ],
)
def test_what_cannot_be_written(options, message):
  with pytest.raises(UserError, match=message):
    model().generate(**{"prompt": "text"} | options)


def test_an_empty_prompt_after_a_state_alone():
  """It does not say what comes next; a reading does."""
  reading = model().read(PROMPT)
  with pytest.raises(UserError, match="the prompt is empty"):
    model().generate(state=reading.state)
  assert "".join(model().generate(state=reading, max_new_tokens=3))


def test_a_reading_of_another_vocabulary():
  reading = model().read(PROMPT)
  reading = reading.replace(logits=reading.logits[:, :200])
  with pytest.raises(UserError, match="of another model: a vocabulary of 200, and this model's is"):
    model().generate(state=reading)


def test_prompts_and_requests_that_do_not_pair():
  with pytest.raises(UserError, match="2 prompts and 1 requests"):
    model().complete(["a", "b"], [Request()])
