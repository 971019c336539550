"""Texts that follow contexts: how probable each is. What several of them follow is read once."""

from collections.abc import Iterator, Sequence

import numpy as np

from famjax.inference.engine import Engine, Reading, Scores


def scores_after(
    engine: Engine,
    pairs: Sequence[tuple[np.ndarray, np.ndarray]],
    batch_size: int,
    after: Reading | None = None,
) -> Iterator[tuple[int, Scores]]:
  """Scores texts that follow contexts. A context that several of them have is read once.

  Args:
    engine: of the model.
    pairs: int32 `[n]` tokens of a context, and of the text after it.
    batch_size: of contexts, and of texts, side by side.
    after: of one row, which all contexts go on from; None: each begins.

  Yields:
    The number of a pair, and the scores of its text; the longest contexts first.
  """
  if not pairs:
    return
  texts_of: dict[bytes, list[int]] = {}
  for i, (context, _) in enumerate(pairs):
    texts_of.setdefault(context.tobytes(), []).append(i)
  groups = sorted(texts_of.values(), key=lambda group: len(pairs[group[0]][0]), reverse=True)
  B = min(batch_size, len(pairs))  # of every call, so that its shapes are compiled once
  start = engine.start(B) if after is None else after.take([0] * B)
  for some in batches(groups, B):
    read = engine.read(_rows([pairs[group[0]][0] for group in some], B), start)
    texts = [(i, row) for row, group in enumerate(some) for i in group]
    texts.sort(key=lambda text: len(pairs[text[0]][1]), reverse=True)
    for few in batches(texts, B):
      numbers, rows = zip(*few)
      begun = read.take([*rows, *[0] * (B - len(rows))])
      scores, _ = engine.score(_rows([pairs[i][1] for i in numbers], B), begun)
      yield from zip(numbers, scores)


def batches(items: Sequence, size: int) -> Iterator[Sequence]:
  """So many of them at a time, the rest at last."""
  return (items[first : first + size] for first in range(0, len(items), size))


def _rows(texts: Sequence[np.ndarray], B: int) -> list[np.ndarray]:
  """B rows of tokens; those that are left have none."""
  return [*texts, *[np.zeros(0, np.int32)] * (B - len(texts))]
