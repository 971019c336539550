"""Tests of what must hold however long a model is used: any cut is one reading, and nothing grows."""

import gc
import os
import pathlib

import numpy as np
import pytest

import famjax
from tests.inference import tiny

CALLS, GENERATIONS = 1000, 200
SIZES, ROWS = (1, 3, 8), (1, 3)


@pytest.mark.slow
def test_random_cuts_batches_and_reused_states_equal_one_reading():
  """Each call goes on from any state seen so far, which stays as it was."""
  model = tiny.model()
  rng = np.random.default_rng(0)
  texts = rng.integers(3, tiny.CONFIG.vocab_size, (max(ROWS), 64)).astype(np.int32)
  whole = {}
  for rows in ROWS:
    logits, _ = model(texts[:rows], model.init_state(rows))
    whole[rows] = np.asarray(logits)
  seen = [(rows, 0, model.init_state(rows)) for rows in ROWS]
  for _ in range(CALLS):
    rows, place, state = seen[rng.integers(len(seen))]
    size = int(rng.choice(SIZES))
    if place + size > texts.shape[1]:
      continue
    logits, after = model(texts[:rows, place : place + size], state)
    # Float32 sums in another order: 2e-5 is ten times what was seen.
    np.testing.assert_allclose(logits, whole[rows][:, place : place + size], atol=2e-5, rtol=1e-4)
    assert np.asarray(state.position).tolist() == [place] * rows
    seen.append((rows, place + size, after))
    if len(seen) > 40:
      seen.pop(int(rng.integers(len(ROWS), len(seen))))  # the fresh states stay


def resident():
  """Returns bytes of memory that the process has."""
  pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
  return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
@pytest.mark.skipif(not pathlib.Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
def test_generations_leave_no_memory_and_no_files_behind():
  model = tiny.model()
  requests = famjax.Request(max_new_tokens=8, sampling=famjax.Sampling(temperature=0.7), stop=["q"])

  def generate(number):
    prompt = "To read is to forget"[: 1 + number % 18]
    model.complete([prompt, prompt + " it"], requests)
    list(model.generate(prompt, max_new_tokens=4))

  for number in range(36):  # every shape is compiled
    generate(number)
  gc.collect()
  files, memory = len(os.listdir("/proc/self/fd")), resident()
  for number in range(GENERATIONS):
    generate(number)
  gc.collect()
  assert len(os.listdir("/proc/self/fd")) <= files
  # One state of two rows has 3 kB; glibc's arenas move by a few MB.
  assert resident() - memory < 2**24
