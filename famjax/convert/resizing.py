"""Grows a vocabulary to all ids of its tokenizer.

Fine-tunes add tokens to a tokenizer and now and then forget the model's embedding. In transformers
`resize_token_embeddings` draws new rows around the mean of the old ones; here they are the mean.
"""

import pathlib

import numpy as np

from famjax.data import tokenizers, vocabularies
from famjax.errors import UserError

# Axis of the vocabulary in each parameter that has one.
AXES = {"embedder/embedding": 0, "head/kernel": 1}


def tokenizer_size(path: pathlib.Path, rows: int) -> int:
  """Returns the largest id of a directory's tokenizer, plus 1; 0: it has no tokenizer.

  Args:
    path: directory of the model.
    rows: entries of the model's vocabulary.

  Raises:
    UserError: The tokenizer cannot be read, or its largest id is far beyond its number of entries.
  """
  if not tokenizers.is_in(path):
    return 0
  size, entries = vocabularies.load_vocabulary(str(path)).all_ids
  if size > rows + entries:
    raise UserError(
        f"{path}: the largest id of its tokenizer is {size - 1:,}, and it has {entries:,} entries"
        f" for a model of {rows:,}: give its added tokens the ids that come next"
    )
  return size


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
