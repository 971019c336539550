"""What several data tests share: a tiny SentencePiece model, and a source of made-up examples."""

import pathlib

import numpy as np
import sentencepiece

from famjax.data import passkey
from famjax.data.examples import generator
from famjax.data.vocabularies import load_vocabulary


def sentencepiece_model(folder: pathlib.Path, adds_space=True, trims=True) -> str:
  """Trains a model on the PassKey text and returns its path.

  Args:
    folder: to write it to.
    adds_space: the model puts a space before a text (T5 and Llama do, Gemma does not).
    trims: the model drops spaces at the ends and doubled ones (T5 does).
  """
  folder.mkdir(exist_ok=True)
  keys = generator(0, 0).integers(0, 10**5, 50)
  sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=(text.format(key=key) for key in keys for text in passkey.TEMPLATES),
      model_prefix=str(folder / "tiny"),
      vocab_size=110,
      pad_id=0,
      eos_id=1,
      unk_id=2,
      bos_id=-1,
      add_dummy_prefix=adds_space,
      remove_extra_whitespaces=trims,
      minloglevel=2,
  )
  return str(folder / "tiny.model")


class NumberedSource:
  """Examples of a drawn length whose tokens tell their index and place, with drawn weights."""

  vocabulary = load_vocabulary("bytes")

  def __init__(self, low: int = 2, high: int = 30):
    self.low, self.high = low, high
    self.calls = []

  def example(self, seed, index, step):
    self.calls.append(index)
    rng = generator(seed, index)
    size = int(rng.integers(self.low, self.high, endpoint=True))
    tokens = (np.arange(size) + 1000 * (index + 1)).astype(np.int32)
    return tokens, rng.random(size).astype(np.float32)
