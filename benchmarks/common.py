"""What the benchmarks share: a random model, tokens, cores, and processes of their own."""

import argparse
from collections.abc import Callable
import json
import os
import statistics
import subprocess
import sys
import time

import numpy as np

SHAPE = dict(layers=8, width=512, ff=1408, vocab=8192, block=256, segments=1, fam=16)


def add_shape(parser: argparse.ArgumentParser, **defaults: int) -> None:
  """Adds an option for every number of `SHAPE`."""
  for name, value in (SHAPE | defaults).items():
    parser.add_argument(f"--{name}", type=int, default=value)


def shape_of(arguments: argparse.Namespace) -> dict[str, int]:
  return {name: getattr(arguments, name) for name in SHAPE}


def describe(shape: dict[str, int]) -> str:
  return (
      f"{shape['layers']} layers of {shape['width']}, N {shape['block']}, M {shape['segments']}, F"
      f" {shape['fam']}"
  )


def make_model(shape: dict[str, int], **memory: object):
  """A random Llama-shaped `Model` of float32 weights; `memory` changes its `MemoryConfig`."""
  from flax import nnx  # pylint: disable=import-outside-toplevel

  import famjax  # pylint: disable=import-outside-toplevel
  from famjax.data import load_vocabulary  # pylint: disable=import-outside-toplevel
  from famjax.inference.model import Model  # pylint: disable=import-outside-toplevel

  options = dict(
      kind="fam" if shape["fam"] else "bswa", block_size=shape["block"],
      memory_segments=shape["segments"], fam_length=shape["fam"],
  )  # fmt: skip
  config = famjax.ModelConfig(
      vocab_size=shape["vocab"], num_layers=shape["layers"], model_dim=shape["width"],
      num_heads=shape["width"] // 64, ff_dim=shape["ff"],
      memory=famjax.MemoryConfig(**(options | memory)),
  )  # fmt: skip
  return Model(famjax.Decoder(config, rngs=nnx.Rngs(0)), load_vocabulary("bytes"))


def draw(vocab: int, count: int, seed: int = 0) -> np.ndarray:
  """Tokens that are no end symbol."""
  return np.random.default_rng(seed).integers(3, vocab, count)


def median(function: Callable[[], object], repeats: int) -> float:
  """Median of the seconds that a call takes; it has to wait for its own result."""
  laps = []
  for _ in range(repeats):
    began = time.perf_counter()
    function()
    laps.append(time.perf_counter() - began)
  return statistics.median(laps)


def alone(script: str, part: dict[str, object], options: list[str]) -> dict[str, object]:
  """Runs one part of a benchmark in a process of its own; its last line is JSON."""
  command = [sys.executable, script, f"--part={json.dumps(part)}", *options]
  done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
  return json.loads(done.stdout.splitlines()[-1])


def use_cores(count: int) -> None:
  """Confines this process to some of the cores; call it before jax or torch is imported."""
  os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:count])
  os.environ["OMP_NUM_THREADS"] = str(count)
