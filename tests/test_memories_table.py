"""The table of docs/memories.md holds what the strategies are; this file prints it anew.

    python tests/test_memories_table.py
"""

import dataclasses
import math
import pathlib

import jax
import pytest

from famjax.model import strategy
from famjax.model.config import MemoryConfig, ModelConfig
from famjax.model.state import empty_state
from famjax.training.train_state import abstract

ROOT = pathlib.Path(__file__).resolve().parent.parent
SHAPE = ModelConfig(
    vocab_size=256000, num_layers=18, model_dim=1536, num_heads=12, ff_dim=12288,
    compute_dtype="bfloat16", param_dtype="bfloat16",
)  # fmt: skip
MEMORIES = {  # as their gin files have them: kind, M, options
    "bswa": ("bswa", 3, {}),
    "fam": ("fam", 3, {}),
    "fam_previous": ("feedback", 3, {"previous": 2}),
    "fam_static": ("feedback", 3, {"static": True}),
    "feedback_segments": ("feedback_segments", 3, {}),
    "rmt": ("rmt", 0, {"truncate": 0}),
    "autocompressors": ("autocompressors", 0, {"most": 30}),
    "infini": ("infini", 0, {"update": "delta"}),
    "melodi": ("melodi", 0, {}),
    "armt": ("armt", 0, {"width": 64}),
}


def config(name: str) -> ModelConfig:
  kind, segments, options = MEMORIES[name]
  memory = MemoryConfig(kind, memory_segments=segments, options=options)
  return dataclasses.replace(SHAPE, memory=memory)


def sizes(name: str) -> tuple[int, int]:
  """Parameters that a memory adds, and bytes that a row's state has."""
  count = lambda model: sum(math.prod(x.shape) for x in jax.tree.leaves(abstract(model)[1]))
  state = jax.eval_shape(lambda: empty_state(config(name), 1))
  held = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(state))
  return count(config(name)) - count(config("bswa")), held


def row(name: str) -> str:
  added, held = sizes(name)
  file = f"[{name}](../gin/memory/{name}.gin)"
  return f"| {file} | {MEMORIES[name][1]} | {added:,} | {held / 2**20:,.2f} |"


@pytest.mark.parametrize("name", MEMORIES)
def test_the_table_says_what_is(name):
  assert row(name) in (ROOT / "docs" / "memories.md").read_text().splitlines()


def test_every_kind_is_in_the_table():
  strategy.of(MemoryConfig("rmt"))  # imports them
  shown = {kind for kind, *_ in MEMORIES.values()}
  assert {k for k in strategy._KINDS} - {"mean"} <= shown  # pylint: disable=protected-access


if __name__ == "__main__":
  print("| gin file | M | parameters added | state of a row, MiB |\n| --- | ---: | ---: | ---: |")
  print("\n".join(map(row, MEMORIES)))
