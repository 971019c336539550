"""What reading without end costs: memory and time per token, at lengths from 1k to 1M tokens.

    python benchmarks/streaming.py                        # about ... minutes on two CPU cores
    python benchmarks/streaming.py --longest 100000

Reads random tokens with a random model through the streaming engine, each length in a process of
its own, and writes runs/streaming/report.json and runs/streaming/streaming.png.
"""

import argparse
import json
import pathlib
import resource
import statistics
import subprocess
import sys
import time

LENGTHS = (1_000, 10_000, 100_000, 1_000_000)
WAYS = ("chunks of blocks", "block by block", "token by token")


def make_model(layers: int, width: int, block: int, segments: int, fam: int):
  """A random Llama-shaped model with a FAM, over bytes."""
  # pylint: disable=import-outside-toplevel
  from flax import nnx

  import famjax
  from famjax.data import load_vocabulary
  from famjax.inference.model import Model

  memory = famjax.MemoryConfig(
      "fam", block_size=block, memory_segments=segments, fam_length=fam
  )
  config = famjax.ModelConfig(
      vocab_size=259, num_layers=layers, model_dim=width, num_heads=width // 64,
      ff_dim=width * 8 // 3 // 64 * 64, memory=memory,
  )  # fmt: skip
  return Model(famjax.Decoder(config, rngs=nnx.Rngs(0)), load_vocabulary("bytes"))


def measure(length: int, shape) -> dict[str, float]:
  """Reads `length` tokens after a warm-up that compiles, and says what it took."""
  import jax  # pylint: disable=import-outside-toplevel
  import numpy as np  # pylint: disable=import-outside-toplevel

  from famjax.inference.engine import CHUNK_BLOCKS  # pylint: disable=import-outside-toplevel
  from famjax.model.state import num_bytes  # pylint: disable=import-outside-toplevel

  model = make_model(*shape)
  chunk = CHUNK_BLOCKS * model.config.memory.block_size
  rng = np.random.default_rng(0)
  draw = lambda n: rng.integers(3, 259, n)
  reading = model.read(draw(max(length, chunk) % chunk + chunk))  # every shape that is needed below
  reading = model.start()
  laps, left = [], length
  while left:
    tokens = draw(min(left, chunk))
    began = time.perf_counter()
    reading = model.read(tokens, reading)
    jax.block_until_ready(reading)
    laps.append((time.perf_counter() - began) / len(tokens) * 1e3)
    left -= len(tokens)
  stream = model.generate(state=reading, max_new_tokens=17)  # compiles
  list(stream)
  began = time.perf_counter()
  stream = model.generate(state=stream.reading, max_new_tokens=129)
  list(stream)
  seconds = time.perf_counter() - began
  return {
      "tokens": length,
      "state_bytes": num_bytes(reading.state),
      "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
      "read_ms_per_token": statistics.median(laps),
      "write_ms_per_token": seconds / len(stream.tokens) * 1e3,
  }
