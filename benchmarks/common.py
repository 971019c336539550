"""What the benchmarks share: a random model, tokens, cores, and processes of their own."""

import argparse
from collections.abc import Callable
import contextlib
import json
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import time

import numpy as np

SHAPE = dict(layers=8, width=512, ff=1408, vocab=8192, block=256, segments=1, fam=16)


Shape = dict[str, int]
Part = dict[str, object]


def make_parser(doc: str, out: str, **defaults: int) -> argparse.ArgumentParser:
  """Options that every benchmark has: where the report goes, and each number of `SHAPE`."""
  parser = argparse.ArgumentParser(description=doc.splitlines()[0])
  parser.add_argument("--out", type=pathlib.Path, default=out, help="directory of the report")
  parser.add_argument("--part", type=json.loads, help=argparse.SUPPRESS)  # see `run`
  for name, value in (SHAPE | defaults).items():
    parser.add_argument(f"--{name}", type=int, default=value)
  return parser


def run(
    arguments: argparse.Namespace,
    measure_part: Callable[[Part, Shape], object],
    measure_all: Callable[[Callable[[Part], object], Shape, argparse.Namespace], dict],
    plot: Callable[[dict, Shape, pathlib.Path], None],
) -> None:
  """Measures, each part in a process of its own, and leaves `report.json` and a plot.

  Args:
    arguments: from `make_parser`. With a `part` this process measures it, and prints it.
    measure_part: of a part, and the shape.
    measure_all: of a function that measures a part elsewhere, the shape, and `arguments`; returns
      what the report holds.
    plot: draws that into a PNG.
  """
  shape = {name: getattr(arguments, name) for name in SHAPE}
  script = pathlib.Path(sys.argv[0])
  if arguments.part:
    print(json.dumps(measure_part(arguments.part, shape)))
    return
  arguments.out.mkdir(parents=True, exist_ok=True)

  def alone(part):
    options = [f"--{name}={value}" for name, value in shape.items()]
    return printed_by(script, f"--part={json.dumps(part)}", *options)

  found = measure_all(alone, shape, arguments)
  from famjax.evaluation import report  # pylint: disable=import-outside-toplevel

  about = {"command": ["python", *sys.argv], "shape": shape, "machine": report.machine()}
  report.write_json(arguments.out / "report.json", about | found)
  picture = arguments.out / f"{script.stem}.png"
  plot(found, shape, picture)
  print(f"report: {arguments.out / 'report.json'}   plot: {picture}")


def printed_by(script: str | pathlib.Path, *arguments: str) -> object:
  """The JSON that a Python script prints last, in a process of its own."""
  command = [sys.executable, script, *arguments]
  done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
  return json.loads(done.stdout.splitlines()[-1])


def peak_memory_mb() -> float:
  """The most memory that this process has had, MiB."""
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def keep_arguments(out: pathlib.Path, arguments: argparse.Namespace, free: tuple[str, ...]) -> None:
  """Ends the program if a directory was begun with other arguments, which what is there depends on.

  Args:
    out: the directory.
    arguments: of this run.
    free: names of those that may be others.
  """
  file = out / "arguments.json"
  ours = {name: str(value) for name, value in vars(arguments).items() if name not in free}
  theirs = json.loads(file.read_text()) if file.exists() else ours
  for name, value in ours.items():
    if theirs.get(name) != value:
      sys.exit(f"{out} was begun with --{name}={theirs.get(name)}, not {value}: name another --out")
  out.mkdir(parents=True, exist_ok=True)
  file.write_text(json.dumps(ours, indent=2) + "\n")


@contextlib.contextmanager
def two_panels(path: pathlib.Path, shape: Shape, xlabel: str, base: int):
  """Two axes to draw into, logarithmic both ways, which become a PNG afterwards."""
  import matplotlib  # pylint: disable=import-outside-toplevel

  matplotlib.use("Agg")
  import matplotlib.pyplot as plt  # pylint: disable=import-outside-toplevel

  figure, panels = plt.subplots(1, 2, figsize=(10, 4), dpi=150, layout="constrained")
  yield panels
  for axes in panels:
    axes.set_xscale("log", base=base)
    axes.set_yscale("log")
    axes.set_xlabel(xlabel)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0))
  figure.suptitle(_describe(shape))
  figure.savefig(path)
  plt.close(figure)


def _describe(shape: Shape) -> str:
  return (
      f"{shape['layers']} layers of {shape['width']}, N {shape['block']}, M {shape['segments']}, F"
      f" {shape['fam']}"
  )


def make_model(shape: Shape, **memory: object):
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


def use_cores(count: int) -> None:
  """Confines this process to some of the cores; call it before jax or torch is imported."""
  os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:count])
  os.environ["OMP_NUM_THREADS"] = str(count)
