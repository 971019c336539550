"""Accuracy and nats by place equal what the model says of each document alone."""

import dataclasses

from flax import nnx
import numpy as np
import pytest

from famjax.errors import UserError
from famjax.evaluation.by_position import by_position
from famjax.inference.model import Model
from famjax.model.config import MemoryConfig
from famjax.model.decoder import Decoder
from tests.inference import tiny

EDGES = (2, 8, 9, 40, 60)


@pytest.fixture(scope="module", name="documents")
def _documents():
  draw = np.random.default_rng(0)
  return [draw.integers(3, 16, n).astype(np.int32) for n in (75, 30, 1, 9)]


@pytest.mark.parametrize("kind", ["fam", "bswa"])
def test_bins_equal_a_walk_through_each_document(kind, documents):
  model = tiny.model(kind)
  found = by_position(model, documents, EDGES, chunk_blocks=2)
  wanted = {bin: [] for bin in zip(EDGES, EDGES[1:])}
  for document in documents:
    if len(document) < 2:
      continue
    logits, _ = model(document[None, :-1], model.init_state(1))
    logits = np.asarray(logits[0], np.float64)
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    for place, target in enumerate(document[1:]):
      for (first, last), seen in wanted.items():
        if first <= place < last:
          seen.append((logits[place].argmax() == target, -log_probs[place, target]))
  for got, ((first, last), seen) in zip(found, wanted.items(), strict=True):
    assert (got.first, got.last, got.tokens) == (first, last, len(seen))
    accuracy, nats = np.mean(seen, axis=0)
    assert got.accuracy == pytest.approx(accuracy) and got.nats == pytest.approx(nats, rel=1e-5)


def test_an_ordinary_decoder_reads_as_far_as_its_context(documents):
  full = MemoryConfig("full", 4, 5)
  config = dataclasses.replace(tiny.CONFIG, memory=full)
  model = Model(Decoder(config, rngs=nnx.Rngs(0)), tiny.BYTES)
  assert by_position(model, documents, (0, 24))[0].tokens == 24 + 24 + 8
  with pytest.raises(UserError, match="25 tokens are more than the 24"):
    by_position(model, documents, (0, 25))


@pytest.mark.parametrize("edges", [(0,), (3, 3), (5, 2), (-1, 4)])
def test_edges_that_do_not_rise(edges, documents):
  with pytest.raises(UserError, match="give places that rise"):
    by_position(tiny.model("bswa"), documents, edges)
