"""Reading and streaming: chunks and single tokens give what one call over everything gives."""

import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from famjax.errors import UserError
from famjax.inference.model import Model
from tests.inference import tiny

N = tiny.CONFIG.memory.block_size
TEXT = "To read is to forget, unless a few vectors carry on what the window lost."
KINDS = pytest.mark.parametrize("kind", ["fam", "bswa"])


@functools.cache
def model(kind="fam") -> Model:
  return tiny.model(kind)


@functools.cache
def _whole(kind):
  graphdef, params = nnx.split(model(kind).decoder)
  read = jax.jit(lambda params, tokens, n: nnx.merge(graphdef, params)(tokens, lengths=n))
  return lambda tokens, n: read(params, tokens, n)


def last_logits(kind, tokens):
  """Logits `[V]` after a fresh reading of all of `tokens` in one call, padded to one shape."""
  return np.asarray(whole(kind, tokens)[0][len(tokens) - 1])


def whole(kind, tokens):
  """The decoder's logits `[56, V]` and state."""
  padded = np.zeros((1, 56), np.int32)
  padded[0, : len(tokens)] = tokens
  logits, state = _whole(kind)(padded, jnp.array([len(tokens)]))
  return logits[0], state


def close(a, b):
  np.testing.assert_allclose(a, b, atol=2e-5)


def assert_same_memory(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  jax.tree.map(close, a, b)


def test_a_call_is_the_decoder_s():
  tokens = np.random.default_rng(0).integers(3, 259, (2, 2 * N + 1))
  logits, state = model()(tokens, model().init_state(2))
  assert logits.dtype == jnp.float32 and logits.shape == (2, 2 * N + 1, 259)
  assert state.position.tolist() == [9, 9]
  for row in range(2):
    expected, after = whole("fam", tokens[row])
    close(logits[row], expected[: 2 * N + 1])
    close(state.fam[:, row], after.fam[:, 0])


@pytest.mark.parametrize(
    "tokens, message",
    [
        ([1, 2, 3], r"shape \(3,\)"),
        ([[[1]]], r"shape \(1, 1, 1\)"),
        ([[1], [2]], r"shape \(2, 1\) and the state 1 rows"),
        ([[3, 259]], "token 259 is outside the vocabulary of 259"),
        ([[-1, 3]], "token -1 is outside"),
        ([[0.5]], "float64"),
        ([[]], r"shape \(1, 0\): give at least one"),
        ([[1, 2], [3]], "lists of unequal length"),
    ],
)
def test_tokens_that_cannot_be_read(tokens, message):
  with pytest.raises(UserError, match=message):
    model()(tokens, model().init_state())


def test_a_state_of_another_model():
  state = model("bswa").init_state()
  with pytest.raises(UserError, match="state is of another model: its fam is .* init_state"):
    model("fam")([[3]], state)
  with pytest.raises(UserError, match="its keys is missing"):
    model("bswa")([[3]], state.replace(keys=None))


def test_a_state_of_another_number_of_rows():
  with pytest.raises(UserError, match="the state 2 rows"):
    model()([[3]], model().init_state(2))
  with pytest.raises(UserError, match="the state has 2 rows and the text 1"):
    model().read("text", model().init_state(2))
  with pytest.raises(UserError, match="the state has 2 rows"):
    model().generate("text", state=model().init_state(2))


@KINDS
def test_reading_text_on_and_on_equals_one_call(kind):
  """From within a block, over a chunk of eight blocks, and a rest."""
  first, text = TEXT[:9], TEXT[9:53]
  _, state = model(kind).read(first)
  logits, state = model(kind).read(text, state)
  assert logits.shape == (1, 259) and logits.dtype == jnp.float32
  close(logits[0], last_logits(kind, tiny.BYTES.encode(first + text)))
  assert state.position.tolist() == [53]
  reading = model(kind).read(tiny.BYTES.encode("!!!"), state)
  close(reading.logits[0], last_logits(kind, tiny.BYTES.encode(first + text + "!!!")))
  _, at_once = whole(kind, tiny.BYTES.encode(first + text + "!!!"))
  assert_same_memory(reading.state, at_once)


def test_a_text_is_scored_token_by_token():
  score = model().score(TEXT)
  logits, _ = whole("fam", tiny.BYTES.encode(TEXT)[:56])
  expected = jax.nn.log_softmax(logits)[np.arange(55), score.tokens[1:56]]
  close(score.log_probs[1:56], expected)
  assert score.tokens.tolist() == tiny.BYTES.encode(TEXT) and np.isnan(score.log_probs[0])
  assert_same_memory(score.reading, model().read(TEXT))
  # After a reading the first token is scored as well; a state alone does not say what comes next.
  reading = model().read(TEXT[:20])
  rest = model().score(TEXT[20:], reading)
  close(rest.log_probs, score.log_probs[20:])
  rest = model().score(TEXT[20:], reading.state)
  assert np.isnan(rest.log_probs[0])
  close(rest.log_probs[1:], score.log_probs[21:])


@pytest.mark.parametrize("call", ["read", "score"])
def test_texts_that_cannot_be_read(call):
  for text, message in (("", "is empty"), ([], "is empty"), ([300], "token 300 is outside")):
    with pytest.raises(UserError, match=message):
      getattr(model(), call)(text)


def test_reading_ends_where_progress_says_so():
  """What was read until then is whole: to go on from there is to read everything."""
  tokens = tiny.BYTES.encode(TEXT)

  def twice():
    left = [False, True]
    return lambda count: left.pop(0)

  part = model().read(TEXT, progress=twice())
  n = int(part.state.position[0])
  assert 0 < n < len(tokens)
  rest, whole_text = model().read(tokens[n:], part), model().read(TEXT)
  jax.tree.map(close, rest, whole_text)
  score = model().score(TEXT, progress=twice())
  assert score.tokens.tolist() == tokens[:n] and len(score.log_probs) == n
  stream = model().generate(TEXT, progress=twice())
  assert stream.reason == "unread" and "".join(stream) == "" and stream.tokens == []
  jax.tree.map(np.testing.assert_array_equal, stream.reading, part)
