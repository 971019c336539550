"""Texts after contexts: each as probable as in a text read from its start, for every memory."""

import numpy as np
import pytest

from famjax.errors import UserError
from famjax.inference.engine import Engine
from famjax.inference.generation import Request
from tests.inference import tiny

CONTEXTS = ["The sea", "A", "Red boats"]
PAIRS = [(0, " is"), (1, " b"), (0, " 7"), (2, " are"), (0, " a"), (2, " x")]


def encoded(before=""):
  encode = tiny.BYTES.encode
  return [(encode(before + CONTEXTS[i]), encode(text)) for i, text in PAIRS]


@pytest.mark.parametrize("kind", ["fam", "rmt"])
def test_texts_as_if_read_alone(kind):
  """Rows of unequal length stand within a block while others read whole ones."""
  model = tiny.model(kind)
  before = "Ida had a boat. "
  for after, text in ((None, ""), (model.read(before), before)):
    found = dict(model.scores_after(encoded(), 3, after))
    assert sorted(found) == list(range(len(PAIRS)))
    direct = tiny.log_likelihoods(model, encoded(text))
    np.testing.assert_allclose([found[i].log_prob for i in sorted(found)], direct, rtol=1e-4)


def test_a_context_is_read_once(monkeypatch):
  model, read = tiny.model(), []
  real = Engine.read
  monkeypatch.setattr(
      Engine, "read",
      lambda self, rows, after: (read.extend(map(len, rows)), real(self, rows, after))[1],
  )  # fmt: skip
  list(model.scores_after(encoded(), 3))
  assert sorted(read) == sorted(map(len, CONTEXTS))


@pytest.mark.parametrize("kind", ["fam", "rmt"])
def test_prompts_go_on_from_what_was_read(kind):
  model = tiny.model(kind)
  start, request = model.read("Ida had a boat. "), Request(max_new_tokens=6)
  found = model.complete(CONTEXTS, request, start)
  alone = ["".join(model.generate(c, max_new_tokens=6, state=start)) for c in CONTEXTS]
  assert [completion.text for completion in found] == alone
  assert alone != [completion.text for completion in model.complete(CONTEXTS, request)]


def test_nothing_to_compare():
  model = tiny.model()
  assert not list(model.scores_after([]))
  with pytest.raises(UserError, match="nothing stands before a text"):
    model.scores_after([([], [65])])
  with pytest.raises(UserError, match="outside the vocabulary"):
    model.scores_after([([65], [999])])
  ((_, scores),) = model.scores_after([([], [65])], after=model.read("a"))
  assert scores.log_prob < 0
