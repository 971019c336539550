"""How well long documents are foreseen, by the place in the document, in constant memory."""

from collections.abc import Sequence
import functools
import math
from typing import NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from famjax.errors import UserError
from famjax.inference.model import Model
from famjax.model.state import empty_state
from famjax.training.loss import log_probs_and_best


class Bin(NamedTuple):
  """What was foreseen between two places of the documents.

  Attributes:
    first: of the places, in tokens that were read before the one that is predicted.
    last: of the places, not itself one of them.
    tokens: how many were predicted there, over all documents.
    accuracy: share of them that were the model's likeliest next token.
    nats: mean of the negative natural logarithm of their probability.
  """

  first: int
  last: int
  tokens: int
  accuracy: float
  nats: float


def by_position(
    model: Model, documents: Sequence[np.ndarray], edges: Sequence[int], chunk_blocks: int = 8
) -> list[Bin]:
  """Reads documents side by side, and counts by place what the model had foreseen.

  Args:
    model: any. An ordinary decoder reads as far as its context.
    documents: int32 tokens of each; read up to the last of `edges`.
    edges: rising places in tokens, `(0, 256, 1024)`: two bins.
    chunk_blocks: blocks read in one call, which bounds memory.

  Raises:
    UserError: there is no document, the edges do not rise, or the context is shorter.
  """
  edges = np.asarray(edges)
  if not documents or len(edges) < 2 or edges[0] < 0 or np.any(np.diff(edges) < 1):
    raise UserError(f"edges {edges.tolist()}: give places that rise, and at least one document")
  model.config.memory.check_context(int(edges[-1]))
  B, S = len(documents), int(edges[-1])
  chunk = chunk_blocks * model.config.memory.block_size
  if model.config.memory.context is not None:
    chunk = min(chunk, model.config.memory.context)
  text = np.full((B, S + 1), 0, np.int32)  # the last is only predicted
  lengths = np.array([max(min(len(d), S + 1) - 1, 0) for d in documents])
  for row, document in zip(text, documents):
    row[: min(len(document), S + 1)] = document[: S + 1]
  graphdef, params = nnx.split(model.decoder)
  state, start = empty_state(model.config, B), jnp.ones(B, bool)
  sums = np.zeros((3, len(edges) - 1))  # tokens, right ones, nats
  for first in range(0, int(lengths.max()), chunk):
    here = np.clip(lengths - first, 0, chunk)
    piece = np.zeros((B, chunk + 1), np.int32)
    width = min(chunk + 1, S + 1 - first)
    piece[:, :width] = text[:, first : first + width]
    right, log_probs, state = _read(graphdef, params, piece, state, start, here)
    start = jnp.zeros(B, bool)
    places = first + np.arange(chunk)
    real = np.arange(chunk) < here[:, None]  # [B, chunk]
    bins = np.searchsorted(edges, places, side="right") - 1
    inside = real & (bins >= 0) & (bins < len(edges) - 1)
    for total, values in zip(sums, (np.ones_like(log_probs), right, -log_probs)):
      np.add.at(total, np.broadcast_to(bins, inside.shape)[inside], np.asarray(values)[inside])
  mean = lambda total, count: float(total / count) if count else math.nan
  return [
      Bin(int(a), int(b), int(n), mean(right, n), mean(nats, n))
      for a, b, n, right, nats in zip(edges, edges[1:], *sums)
  ]


@functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
def _read(graphdef, params, text, state, start, lengths):
  decoder = nnx.merge(graphdef, params)
  hidden, state = decoder.hidden(
      text[:, :-1], state, start_of_sequence=start, lengths=lengths, aligned=True
  )
  log_probs, best = log_probs_and_best(decoder.logits, hidden, text[:, 1:])
  return best == text[:, 1:], log_probs, state
