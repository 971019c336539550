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


def reading_rates(shape, length: int) -> dict[str, float]:
  """Tokens per second of three ways to read the same text, after a warm-up."""
  import jax  # pylint: disable=import-outside-toplevel
  import numpy as np  # pylint: disable=import-outside-toplevel

  model = make_model(*shape)
  N = model.config.memory.block_size
  tokens = np.random.default_rng(0).integers(3, 259, length)
  cut = {WAYS[0]: length, WAYS[1]: N, WAYS[2]: 1}
  rates = {}
  for way, size in cut.items():
    count = min(length, 50 * N if size == N else 512 if size == 1 else length)

    def read(count, size):
      reading = model.start()
      for first in range(0, count, size):
        reading = model.read(tokens[first : first + size], reading)
      jax.block_until_ready(reading)

    read(min(count, 2 * size), size)
    began = time.perf_counter()
    read(count, size)
    rates[way] = count / (time.perf_counter() - began)
  return rates


def plot(results: list[dict[str, float]], path: pathlib.Path, title: str) -> None:
  """Draws memory and time per token against what was read."""
  import matplotlib  # pylint: disable=import-outside-toplevel

  matplotlib.use("Agg")
  import matplotlib.pyplot as plt  # pylint: disable=import-outside-toplevel

  figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), dpi=150, layout="constrained")
  read = [r["tokens"] for r in results]
  left.plot(read, [r["peak_memory_mb"] for r in results], marker="o", label="process, peak")
  left.plot(read, [r["state_bytes"] / 2**20 for r in results], marker="o", label="state")
  left.set_ylabel("MB")
  right.plot(read, [r["read_ms_per_token"] for r in results], marker="o", label="reading")
  right.plot(read, [r["write_ms_per_token"] for r in results], marker="o", label="writing")
  right.set_ylabel("milliseconds per token, median")
  for axes in (left, right):
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("tokens read before")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
  figure.suptitle(title)
  figure.savefig(path)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--out", default="runs/streaming", help="directory of the report")
  parser.add_argument("--longest", type=int, default=LENGTHS[-1], help="tokens")
  for name, value in dict(layers=4, width=256, block=256, segments=1, fam=16).items():
    parser.add_argument(f"--{name}", type=int, default=value)
  parser.add_argument("--only", type=int, help=argparse.SUPPRESS)  # one length, in this process
  arguments = parser.parse_args()
  names = ("layers", "width", "block", "segments", "fam")
  shape = [getattr(arguments, name) for name in names]
  if arguments.only:
    result = measure(arguments.only, shape) if arguments.only > 1 else reading_rates(shape, 50_000)
    print(json.dumps(result))
    return
  out = pathlib.Path(arguments.out)
  out.mkdir(parents=True, exist_ok=True)
  options = [f"--{name}={value}" for name, value in zip(names, shape)]

  def alone(length):
    command = [sys.executable, __file__, f"--only={length}", *options]
    return json.loads(subprocess.check_output(command, text=True).splitlines()[-1])

  results = []
  for length in (n for n in LENGTHS if n <= arguments.longest):
    results.append(alone(length))
    print("  ".join(f"{k} {v:,.3f}" for k, v in results[-1].items()), flush=True)
  rates = alone(1)
  print("  ".join(f"{way}: {rate:,.0f} tokens/s" for way, rate in rates.items()), flush=True)
  from famjax.evaluation import report  # pylint: disable=import-outside-toplevel

  title = f"{shape[0]} layers of {shape[1]}, N {shape[2]}, M {shape[3]}, F {shape[4]}"
  report.write_json(out / "report.json", {
      "command": ["python", "benchmarks/streaming.py", *options],
      "machine": report.machine(), "lengths": results, "reading": rates,
  })  # fmt: skip
  plot(results, out / "streaming.png", title)
  print(f"report: {out / 'report.json'}   plot: {out / 'streaming.png'}")


if __name__ == "__main__":
  main()
