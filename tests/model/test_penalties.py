"""The auxiliary losses of C.4 and C.5, written out in NumPy for one layer and one block."""

import dataclasses

import numpy as np
import pytest

from famjax.model.config import MemoryConfig, ModelConfig
from tests.model import cases, reference
from tests.model.cases import VOCAB, Stream
from tests.training import toy

N, F, H = 4, 2, 4
MODEL = ModelConfig(
    vocab_size=VOCAB, num_layers=1, model_dim=16, num_heads=H, num_kv_heads=2, ff_dim=12,
    memory=MemoryConfig("feedback", block_size=N, memory_segments=0, fam_length=F),
)  # fmt: skip
TOKENS = np.array([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])


def with_options(**options):
  return dataclasses.replace(MODEL, memory=dataclasses.replace(MODEL.memory, options=options))


def attention(vector, pairs, position, layer):
  """Probabilities `[H, keys]` of a vector's query, and what it reads `[H, d]`."""
  as_fam = dataclasses.replace(MODEL, memory=dataclasses.replace(MODEL.memory, kind="fam"))
  normed = reference._norm(vector, layer["attention_norm"], as_fam)
  query = reference._rotate(
      reference._project(normed, layer["attention"]["query"]), position, layer
  )
  shared = [head // 2 for head in range(H)]
  scores = np.array([
      [query[head] @ key[shared[head]] / 2 for key, _ in pairs] for head in range(H)
  ])  # d is 4
  p = np.exp(scores - scores.max(1, keepdims=True))
  p /= p.sum(1, keepdims=True)
  return p, np.array([sum(a * v[shared[h]] for a, (_, v) in zip(p[h], pairs)) for h in range(H)])


def expected(params, tokens):
  """Minus the entropy of C.4, and the error of C.5, of the first block of one row."""
  config = dataclasses.replace(MODEL, memory=dataclasses.replace(MODEL.memory, kind="fam"))
  layer = reference._layer(params["layers"], 0, config)
  fam = list(params["memory"]["fam_prompt"])
  x = [params["embedder"]["embedding"][t] for t in tokens[:N]]
  seen = reference._fam_pairs(fam, layer, config, -1, 0)
  own = [reference._key_and_value(vector, layer, i, config) for i, vector in enumerate(x)]
  total = np.zeros(F + N)
  for i, vector in enumerate(x):
    p, _ = attention(vector, seen + own[: i + 1], i, layer)
    total[: F + i + 1] += p.sum(0)
  places = [N - F + j for j in range(F)]
  for vector, place in zip(fam, places):
    total += attention(vector, seen + own, place, layer)[0].sum(0)
  mean = total / (H * (N + F))
  new = [
      reference._layer_output(vector, np.zeros(16), seen + own, place, layer, config)
      for vector, place in zip(fam, places)
  ]
  written = reference._fam_pairs(new, layer, config, 0, 0)
  error = [
      np.square(attention(v, written, i, layer)[1] - attention(v, own[: i + 1], i, layer)[1])
      for i, v in enumerate(x)
  ]
  return (mean * np.log(mean)).sum(), np.mean(error)


@pytest.mark.parametrize("options", [
    {"diversity": 0.5}, {"reconstruct": 3.0}, {"diversity": 2.0, "reconstruct": 1.0},
])  # fmt: skip
def test_penalties_are_those_written_out(options):
  config = with_options(**options)
  params = cases.random_params(config, seed=3)
  stream = Stream(config, params)
  stream.feed(TOKENS, aligned=True)
  for row, tokens in enumerate(TOKENS):
    entropy, error = expected(reference.to_numpy(params), tokens)
    wanted = options.get("diversity", 0) * entropy + options.get("reconstruct", 0) * error
    np.testing.assert_allclose(stream.state.penalty[row], wanted, rtol=1e-4)


def test_a_penalty_is_in_the_gradient_and_not_in_the_loss_that_is_shown():
  found = []
  for options in ({}, {"reconstruct": 1.0}):
    memory = dataclasses.replace(toy.MODEL.memory, kind="feedback", options=options)
    state, step = toy.setting(dataclasses.replace(toy.MODEL, memory=memory))
    reader = toy.ToyReader()
    batch, _ = reader.read(reader.start(), 0)
    _, metrics = step(state, batch)
    found.append(metrics)
  assert found[0]["loss"] == found[1]["loss"]
  assert abs(found[0]["grad_norm"] - found[1]["grad_norm"]) > 1e-3
