"""Grows a vocabulary to all ids of its tokenizer.

Fine-tunes add tokens to a tokenizer and now and then forget the model's embedding. In transformers
`resize_token_embeddings` draws new rows around the mean of the old ones; here they are the mean.
"""

import pathlib

import numpy as np

from famjax.errors import UserError
from famjax.formats import inside

# Axis of the vocabulary in each parameter that has one.
AXES = {"embedder/embedding": 0, "head/kernel": 1}


def tokenizer_size(path: pathlib.Path) -> int:
  """Returns the largest id of a directory's tokenizer, plus 1; 0: it has no tokenizer.

  Raises:
    UserError: The tokenizer cannot be read.
  """
  file, model = inside(path, "tokenizer.json"), inside(path, "tokenizer.model")
  try:
    if file.is_file():
      import tokenizers  # pylint: disable=import-outside-toplevel

      ids = tokenizers.Tokenizer.from_file(str(file)).get_vocab(with_added_tokens=True).values()
      return max(ids, default=-1) + 1
    if model.is_file():
      import sentencepiece  # pylint: disable=import-outside-toplevel

      return sentencepiece.SentencePieceProcessor(model_file=str(model)).get_piece_size()
  except (KeyboardInterrupt, SystemExit):
    raise
  except BaseException as error:  # tokenizers may panic, which is no Exception
    reason = " ".join(str(error).split())[:200]
    raise UserError(f"the tokenizer of {path} cannot be read ({reason}): fetch it again") from None
  return 0


def old_part(name: str, leaf: np.ndarray, rows: int) -> np.ndarray:
  """Returns the view of a parameter that the old vocabulary of `rows` entries fills."""
  if name not in AXES:
    return leaf
  return leaf[:rows] if AXES[name] == 0 else leaf[:, :rows]


def fill(name: str, leaf: np.ndarray, rows: int) -> None:
  """Sets the new rows of a parameter to the mean of the old ones.

  Args:
    name: of the parameter, in `AXES`.
    leaf: array whose first `rows` entries along the axis of the vocabulary are set; is changed.
    rows: how many entries the model has.
  """
  table = np.moveaxis(leaf, AXES[name], 0)  # [V, D], a view
  table[rows:] = table[:rows].mean(axis=0, dtype=np.float32)
