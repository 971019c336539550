"""PassKey evaluation: it finds out what a model knows, however the document is cut up."""

import dataclasses
import json
import types

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from famjax import cli
from famjax.data.examples import generator
from famjax.data.passkey import PassKeyFormat
from famjax.data.vocabularies import load_vocabulary
from famjax.errors import UserError
from famjax.evaluation import passkey
from famjax.evaluation.passkey import PassKeyEval
from famjax.inference.model import Model
from famjax.model.config import MemoryConfig, ModelConfig
from famjax.model.decoder import Decoder
from tests.inference import tiny

WORDS = load_vocabulary("passkey_words")
CONFIG = ModelConfig(
    vocab_size=WORDS.vocab_size, num_layers=1, model_dim=16, num_heads=2, ff_dim=16,
    tie_embeddings=False,
    memory=MemoryConfig("fam", block_size=16, memory_segments=1, fam_length=2),
)  # fmt: skip
ASK = PassKeyEval(blocks=(4, 6), examples=20, key_digits=1, chunk_blocks=4)
DIGITS = jnp.array(WORDS.encode("0123456789"))


class Rememberer(nnx.Module):
  """Answers with the first digit of a document plus `off`; all that it keeps is that digit.

  `parts` are the lengths that it was called with, `tokens` what it was called with.
  """

  config = CONFIG

  def __init__(self, off=0):
    self.off = off

  def __call__(self, tokens, state, *, start_of_sequence, lengths, aligned):
    assert aligned
    real = jnp.arange(tokens.shape[1]) < lengths[:, None]
    is_digit = real & (tokens >= DIGITS[0]) & (tokens <= DIGITS[-1])
    here = jnp.take_along_axis(tokens, is_digit.argmax(1)[:, None], 1)[:, 0]
    known = jnp.where(start_of_sequence, 0, state.fam_updates)
    known = jnp.where(known > 0, known, jnp.where(is_digit.any(1), here, 0))
    answer = DIGITS[0] + (known - DIGITS[0] + self.off) % 10
    logits = jnp.broadcast_to(jax.nn.one_hot(answer, 56)[:, None], (*tokens.shape, 56))
    return logits, state.replace(fam_updates=known)


def documents(blocks, ask=ASK):
  """What `ask` asks, tokens and weights."""
  text = PassKeyFormat(WORDS, ask.key_digits)
  seeds = [generator((1 << 40) + ask.seed, i) for i in range(ask.examples)]
  return map(np.stack, zip(*(text.write(s, total_tokens=blocks * 16 + 1) for s in seeds)))


def test_a_model_that_remembers_and_one_that_is_always_wrong():
  assert passkey.accuracy_by_blocks(Model(Rememberer(), WORDS), ASK) == {4: 1.0, 6: 1.0}
  assert passkey.accuracy_by_blocks(Model(Rememberer(off=1), WORDS), ASK) == {4: 0.0, 6: 0.0}


def test_a_key_counts_only_whole():
  """Of keys of two digits, the first digit alone is known: those of two equal digits are right."""
  ask = PassKeyEval(blocks=(5,), examples=40, key_digits=2, chunk_blocks=2)
  tokens, weights = documents(5, ask)
  keys = tokens[weights > 0].reshape(40, 2)
  right = passkey.key_correct(Model(Rememberer(), WORDS), 5, ask)
  np.testing.assert_array_equal(right, keys[:, 0] == keys[:, 1])
  assert 0 < right.sum() < 40


def test_every_model_is_asked_the_same_documents_of_the_exact_length(monkeypatch):
  seen = []
  monkeypatch.setattr(
      passkey, "_predict", lambda model, tokens, chunk: seen.append(tokens) or np.zeros_like(tokens)
  )
  for ask in (ASK, ASK, PassKeyEval(blocks=(4,), examples=20, key_digits=1, seed=1)):
    passkey.key_correct(Model(Rememberer(), WORDS), 4, ask)
  np.testing.assert_array_equal(seen[0], seen[1])
  np.testing.assert_array_equal(seen[0], next(documents(4))[:, :-1])
  assert seen[0].shape == (20, 4 * 16) and (seen[0] != seen[2]).any()


@pytest.fixture(scope="module", name="guesser")
def _guesser():
  """A random model whose likeliest token is always a digit: some of its guesses are right."""
  decoder = Decoder(CONFIG, rngs=nnx.Rngs(0))
  kernel = jax.random.normal(jax.random.key(1), (16, 56))
  decoder.head.kernel[...] = jnp.zeros((16, 56)).at[:, DIGITS].set(kernel[:, DIGITS])
  return Model(decoder, WORDS)


def test_chunks_change_nothing_and_one_call_of_the_decoder_agrees(guesser):
  """6 blocks as 4 and a padded rest, and whole."""
  cut = passkey.key_correct(guesser, 6, ASK)
  whole = passkey.key_correct(guesser, 6, PassKeyEval(examples=20, key_digits=1, chunk_blocks=6))
  np.testing.assert_array_equal(cut, whole)
  tokens, weights = documents(6)
  graphdef, params = nnx.split(guesser.decoder)
  logits, _ = jax.jit(lambda p, x: nnx.merge(graphdef, p)(x))(params, tokens[:, :-1])
  best = np.asarray(logits.argmax(-1))
  expected = [(best[i] == tokens[i, 1:])[weights[i, 1:] > 0].all() for i in range(20)]
  np.testing.assert_array_equal(cut, expected)
  assert 0 < cut.sum() < 20
  read = passkey._predict  # pylint: disable=protected-access
  np.testing.assert_array_equal(read(guesser, tokens[:, :-1], 64), best)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(blocks=()), "PassKeyEval.blocks"),
        (dict(blocks=(4, 0)), "PassKeyEval.blocks"),
        (dict(blocks=64), "PassKeyEval.blocks is 64: give lengths"),
        (dict(examples=0), "PassKeyEval.examples"),
        (dict(chunk_blocks=0), "chunk_blocks"),
        (dict(key_digits=0), "key_digits 0"),
        (dict(blocks=(1,)), "too short"),
    ],
)
def test_questions_that_make_no_sense(change, message):
  with pytest.raises(UserError, match=message):
    passkey.accuracy_by_blocks(Model(Rememberer(), WORDS), PassKeyEval(**change))


def test_a_run_gets_a_file_of_what_its_newest_checkpoint_knows(tmp_path):
  params = tiny.save(tmp_path / "run", CONFIG, "passkey_words")
  by_step = {0: 130}.get  # the checkpoint is of step 1, and documents were drawn up to step 0
  reader = types.SimpleNamespace(length=64, source=types.SimpleNamespace(longest_by=by_step))
  result = passkey.evaluate_run(tmp_path / "run", ASK, reader)
  assert json.loads((tmp_path / "run" / "passkey.json").read_text()) == result
  assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["checkpoints", "passkey.json"]
  assert result.pop("eval_seconds") > 0
  assert set(result.pop("accuracy")) == {"4", "6"}
  assert result == {
      "parameters": sum(x.size for x in jax.tree.leaves(params)), "steps": 1,
      "longest_trained_blocks": 9, "backpropagated_blocks": 4,
      "block_size": 16, "asked": dataclasses.asdict(ASK) | {"blocks": [4, 6]},
  }  # fmt: skip


def test_eval_of_a_run_without_a_checkpoint(tmp_path, capsys):
  arguments = ["eval", "--gin_file=gin/runs/quickstart.gin", f"--gin.RUN_DIR={tmp_path / 'none'}"]
  assert cli.main(arguments) == 2
  shown = capsys.readouterr()
  assert shown.err.startswith("famjax: error: no famjax checkpoint can be read at ")
  assert shown.err.count("\n") == 1 and not shown.out
  assert cli.main(["eval"]) == 2 and "--gin_file" in capsys.readouterr().err
  assert not list(tmp_path.iterdir())
