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


def test_a_temperature_below_zero():
  with pytest.raises(UserError, match="temperature is -0.5: use 0"):
    next(model().generate("text", temperature=-0.5))


def test_a_state_of_another_number_of_rows():
  with pytest.raises(UserError, match="the state 2 rows"):
    model()([[3]], model().init_state(2))
  with pytest.raises(UserError, match="the state 2 rows"):
    model().read("text", model().init_state(2))


@KINDS
def test_chunks_from_within_a_block_equal_one_call(kind):
  """9 tokens, then 3 to the boundary, 8 blocks in a call, and 9; then 3 to the boundary again."""
  first, text = TEXT[:9], TEXT[9:53]
  assert len(text) == 3 + 8 * N + 9
  _, state = model(kind).read(first)
  logits, state = model(kind).read(text, state)
  close(logits, last_logits(kind, tiny.BYTES.encode(first + text)))
  assert state.position.tolist() == [53]
  logits, ended = model(kind).read("!!!", state)
  close(logits, last_logits(kind, tiny.BYTES.encode(first + text + "!!!")))
  _, at_once = whole(kind, tiny.BYTES.encode(first + text + "!!!"))
  assert_same_memory(ended, at_once)


@KINDS
def test_greedy_text_is_that_of_reading_all_of_it_anew_for_every_token(kind):
  prompt, steps = TEXT[:9], 3 * N + 2  # From within block 2 to within block 5.
  picked = []

  class Watched(Model):
    """Notes the tokens that it reads."""

    def __call__(self, tokens, state):
      picked.extend(np.asarray(tokens)[0].tolist())
      return super().__call__(tokens, state)

  watched = Watched(model(kind).decoder, tiny.BYTES)
  for _ in watched.generate(prompt, max_new_tokens=steps + 1):
    pass
  tokens = tiny.BYTES.encode(prompt)
  assert picked[: len(tokens)] == tokens and len(picked) == len(tokens) + steps
  for _ in range(steps):
    tokens.append(int(last_logits(kind, tokens).argmax()))
  assert picked == tokens and len(set(tokens[9:])) > 2


def test_a_seed_gives_its_text_again_and_another_seed_another():
  text = lambda seed, heat=1.0: "".join(
      model().generate(TEXT[:9], max_new_tokens=12, temperature=heat, seed=seed)
  )
  assert text(3) == text(3) != text(4)
  assert text(3, 0.0) == text(4, 0.0)


def test_generation_goes_on_from_a_state():
  pieces = lambda *arguments, **options: list(
      model().generate(*arguments, max_new_tokens=9, **options)
  )
  _, state = model().read(TEXT[:9])
  assert pieces(TEXT[9:21], state=state) == pieces(TEXT[:21])
  assert pieces(TEXT[9:21], state=state) == pieces(TEXT[:21])  # nothing of the state was used up


class Scripted(Model):
  """Writes one text, whatever it reads, and notes how much it has read."""

  def __init__(self, ids, prompt):
    super().__init__(model().decoder, tiny.BYTES)
    self.ids, self.prompt = ids, prompt

  def __call__(self, tokens, state):
    state = state.replace(position=state.position + tokens.shape[1])
    self.read_tokens = int(state.position[0])
    at = max(0, self.read_tokens - len(self.prompt))
    return jnp.zeros((1, tokens.shape[1], 259)).at[:, :, self.ids[at]].set(9.0), state


def test_pieces_are_whole_characters_until_the_end_symbol():
  text = "a\u00e9 \u20ac\U0001f600!"
  scripted = Scripted([*tiny.BYTES.encode(text), tiny.BYTES.eos_id, *tiny.BYTES.encode("no")], "P")
  assert list(scripted.generate("P")) == list(text)
  # Cut within the third character of more than one byte, it is left out.
  for limit, written in enumerate(["", "a", "a", "a\u00e9", *[text[:3]] * 3, text[:4]]):
    assert "".join(scripted.generate("P", max_new_tokens=limit)) == written
    assert scripted.read_tokens == max(limit, 1)  # The last token is not read in vain.


def test_padding_gives_no_piece_and_bytes_that_are_no_character_are_replaced():
  ids = [tiny.BYTES.pad_id, 3 + 0xFF, *tiny.BYTES.encode("b"), tiny.BYTES.eos_id]
  assert list(Scripted(ids, "P").generate("P")) == ["\ufffdb"]


@pytest.mark.parametrize("start", [lambda: model().read(""), lambda: next(model().generate(""))])
def test_an_empty_prompt(start):
  with pytest.raises(UserError, match="the prompt is empty"):
    start()
