"""Texts of a whole model: what is read after what, and ids that it has not."""

import dataclasses
import json

from flax import nnx
import numpy as np
import pytest

from famjax.data.vocabularies import encode_after, encode_text
from famjax.errors import UserError
from famjax.inference.generation import _context, Request
from famjax.inference.model import Model
from famjax.model.decoder import Decoder
from tests.data import vocabulary_kinds as kinds
from tests.data.test_decoding import byte_tokens
from tests.inference import tiny

pytest.importorskip("tokenizers", reason="the core runs without it")


def model_of(vocabulary, vocab_size=None):
  config = dataclasses.replace(tiny.CONFIG, vocab_size=vocab_size or vocabulary.vocab_size)
  return Model(Decoder(config, rngs=nnx.Rngs(0)), vocabulary)


@pytest.fixture(scope="module", name="models")
def _models():
  names = ("prepend", "metaspace always", "metaspace first")
  return {name: model_of(kinds.encoding_kind(name)) for name in names}


@pytest.mark.parametrize("name", ["prepend", "metaspace always", "metaspace first"])
def test_a_text_that_is_read_in_parts_is_read_as_one(models, name):
  model = models[name]
  whole, first, rest = "def f(x):\n    return x", "def f(x):\n", "    return x"
  assert model.score(whole).tokens.tolist() == encode_text(model.vocabulary, whole)
  reading = model.read(first)
  assert model.score(rest, reading).tokens.tolist() == encode_after(model.vocabulary, rest, first)
  np.testing.assert_allclose(model.read(rest, reading).logits, model.read(whole).logits, atol=1e-5)
  assert model.score("<s>x").tokens.tolist().count(1) == 1  # begun once


@pytest.mark.parametrize("name", ["prepend", "metaspace first"])
def test_what_is_written_is_what_its_tokens_add(models, name):
  model = models[name]
  for prompt in ("the sky", "\u65e5\u672c", " x"):
    stream = model.generate(prompt, max_new_tokens=60, temperature=3.0, seed=3)
    pieces = list(stream)
    ids = encode_text(model.vocabulary, prompt)
    whole = model.vocabulary.decode([*ids, *stream.tokens])
    assert "".join(pieces) == stream.text == whole[len(model.vocabulary.decode(ids)) :]
    (done,) = model.complete([prompt], Request(60, stream._generation._requests[0].sampling))
    assert done.text == stream.text


def test_a_prompt_that_was_read_before_may_end_in_a_run_of_bytes(models):
  vocabulary = models["prepend"].vocabulary
  read = np.asarray(byte_tokens(vocabulary, "\u65e5\u672c\u8a9e\u65e5".encode()))
  empty = read[:0]
  for cut in range(8, 13):
    assert _context(vocabulary, empty, read[cut - 8 : cut]) == read[-(-(cut - 8) // 3) * 3 : cut].tolist()
  assert _context(vocabulary, read, read[-8:]) == read.tolist()
  assert _context(vocabulary, empty, read[1:3]) == read[1:3].tolist()  # all that there are


def test_half_of_a_surrogate_pair_is_one_line(models):
  for model in (models["prepend"], tiny.model()):
    for act in (model.read, model.score, model.generate, lambda text: model.complete([text])):
      with pytest.raises(UserError, match="the text is not UTF-8 at character 1; convert it"):
        act("x\ud800")


def test_symbols_that_the_model_has_not(tmp_path):
  """An added token, and an embedding that was not resized."""
  document = kinds.document()
  V = document["added_tokens"][3]["id"]  # of <tool>
  path = kinds.save(tmp_path / "a", document, eos_token_id=V, vocab_size=V)
  from famjax.data.vocabularies import load_vocabulary  # pylint: disable=g-import-not-at-top

  with pytest.raises(UserError, match=f"eos_token_id is {V} .'<tool>'., .*end at {V - 1}: .*--resize_voc"):
    model_of(load_vocabulary(path), V)
  path = kinds.save(tmp_path / "b", document, pad_token_id=999, vocab_size=V)
  model = model_of(load_vocabulary(path), V)  # no padding is read here
  assert len(model.complete(["is"], Request(2))[0].tokens) <= 2
  with pytest.raises(UserError, match=f"the text has the token {V} .'<tool>'., and the model's ids end at {V - 1}"):
    model.generate("is <tool>")
  assert json.loads((tmp_path / "b" / "config.json").read_text())["pad_token_id"] == 999
