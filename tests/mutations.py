"""Wrong values for JSON files: what fuzz tests of file formats feed to a reader.

    for broken in mutations(document, 1000):
      survives(lambda: read(broken))
"""

from collections.abc import Callable, Iterator
import copy
import json
import random
import resource
import sys
import time
from typing import Any

from famjax.errors import UserError

_VALUES = (
    None, True, False, 0, -1, 1, 2, 7, 10**9, 10**19, -(10**9), 2**63, 10**400, 0.0, 0.5, -0.0, 1e9,
    1e308, float("nan"), float("inf"), float("-inf"), "", "0", "16", "1e9", "nan", "a" * 1000, "\ud800",
    "\x00", "../..", "/etc/passwd", "evil:X", [], [0], ["a"], [[]], [None], {}, {"a": 1}, {"": {}},
    [1] * 1000, {"a": {"a": {"a": {}}}},
)  # fmt: skip
_SECONDS = 10.0
_BYTES = 2**30


def mutations(document: Any, count: int, seed: int = 0) -> Iterator[Any]:
  """Yields copies of a JSON document, each with one to three wrong values.

  A value is replaced by one of another type or size, a key is removed or renamed, a list is cut or
  made longer, or a value is nested 2,000 levels deep.
  """
  rng = random.Random(seed)
  for _ in range(count):
    broken = copy.deepcopy(document)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
      places = list(_places(broken))
      if not places:
        break
      _change(rng, *rng.choice(places))
    places = list(_places(broken))
    if places and rng.random() < 0.03:
      container, key = rng.choice(places)
      for _ in range(2000):
        container[key] = [container[key]]
    yield broken


def text(document: Any) -> str:
  """Returns a document as JSON, however deeply it is nested."""
  limit = sys.getrecursionlimit()
  sys.setrecursionlimit(20_000)
  try:
    return json.dumps(document)
  finally:
    sys.setrecursionlimit(limit)


def survives(act: Callable[[], Any], describe: Any = None) -> bool:
  """Runs a function that may refuse its input, and checks how it ends.

  Returns:
    True if it succeeded, False if it raised a `UserError` of one line.

  Raises:
    AssertionError: It raised something else, took more than 10 s, or 1 GB of memory.
  """
  before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
  try:
    act()
    fine = True
  except UserError as error:
    assert len(str(error).splitlines()) == 1, (describe, str(error))
    assert len(str(error)) < 1500, (describe, str(error))
    fine = False
  except BaseException as error:
    raise AssertionError(f"{type(error).__name__}: {error} of {describe!r:.500}") from error
  assert time.monotonic() - started < _SECONDS, describe
  grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
  assert grown < _BYTES, (describe, grown)
  return fine


def _places(document: Any) -> Iterator[tuple[Any, Any]]:
  """Yields every container in a document with each of its keys."""
  keys = document if isinstance(document, dict) else range(len(document)) if isinstance(document, list) else ()
  for key in list(keys):
    yield document, key
    if isinstance(document[key], (dict, list)):
      yield from _places(document[key])


def _change(rng: random.Random, container: Any, key: Any) -> None:
  kind = rng.random()
  if kind < 0.7:
    container[key] = copy.deepcopy(rng.choice(_VALUES))
  elif kind < 0.8:
    del container[key]
  elif kind < 0.9 and isinstance(container, dict):
    container[rng.choice(("", "x", "vocab_size", "kind"))] = container.pop(key)
  else:
    container[key] = [copy.deepcopy(container[key])] * 3
