"""What reading without end costs: memory and time per token, at lengths from 1k to 1M tokens.

    python benchmarks/streaming.py
    python benchmarks/streaming.py --longest=102400

A random model reads random tokens through the streaming engine, each length in a process of its
own. After them it reads some more and writes some, several times from the same place. Writes
`report.json` and `streaming.png` to runs/streaming.
"""

import argparse
import json
import pathlib
import resource
import sys

import common

LENGTHS = (1_024, 10_240, 102_400, 1_024_000)  # whole blocks, so that reading goes on from one
DEFAULTS = dict(layers=4, width=256, ff=704, vocab=8192)
REPEATS = 15
WRITTEN = 64  # tokens


def measure(length: int, shape: dict[str, int]) -> dict[str, float]:
  """Reads `length` tokens, and says what has come of it and what the next ones cost."""
  import jax  # pylint: disable=import-outside-toplevel

  from famjax.inference.engine import CHUNK_BLOCKS  # pylint: disable=import-outside-toplevel
  from famjax.model.state import num_bytes  # pylint: disable=import-outside-toplevel

  model = common.make_model(shape)
  chunk = CHUNK_BLOCKS * shape["block"]
  tokens = lambda n, seed: common.draw(shape["vocab"], n, seed)

  def read(count, after=None, seed=0):
    return jax.block_until_ready(model.read(tokens(count, seed), after))

  def write(after):
    stream = model.generate(state=after, max_new_tokens=WRITTEN, temperature=1.0)
    list(stream)
    if len(stream.tokens) != WRITTEN:
      raise AssertionError(f"the text came to its end after {len(stream.tokens)} of {WRITTEN} tokens")

  for n in LENGTHS:  # compiles, the same in every process
    read(n % chunk + chunk)
  reading = read(length % chunk) if length % chunk else model.start()
  write(read(1))
  for i in range(length // chunk):
    reading = read(chunk, reading, seed=i)
  read_s = common.median(lambda: read(chunk, reading), REPEATS)
  write_s = common.median(lambda: write(reading), REPEATS)
  return {
      "tokens": length,
      "state_bytes": num_bytes(reading.state),
      "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
      "read_ms_per_token": read_s / chunk * 1e3,
      "write_ms_per_token": write_s / WRITTEN * 1e3,
  }


def reading_rates(shape: dict[str, int]) -> dict[str, float]:
  """Tokens per second of three ways to read the same text."""
  import jax  # pylint: disable=import-outside-toplevel

  model = common.make_model(shape)
  N = shape["block"]
  rates = {}
  for way, size, count in (
      ("in chunks of 8 blocks", 8 * N, 64 * N), ("block by block", N, 64 * N),
      ("token by token", 1, 2 * N),
  ):  # fmt: skip
    text = common.draw(shape["vocab"], count)

    def read(text=text, size=size):
      reading = model.start()
      for first in range(0, len(text), size):
        reading = model.read(text[first : first + size], reading)
      jax.block_until_ready(reading)

    read(text[: 2 * size])  # compiles
    rates[way] = count / common.median(read, 3)
  return rates


def plot(results: list[dict[str, float]], path: pathlib.Path, title: str) -> None:
  """Draws memory and time per token against what was read before."""
  import matplotlib  # pylint: disable=import-outside-toplevel

  matplotlib.use("Agg")
  import matplotlib.pyplot as plt  # pylint: disable=import-outside-toplevel

  figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), dpi=150, layout="constrained")
  read = [r["tokens"] for r in results]
  left.plot(read, [r["peak_memory_mb"] for r in results], marker="o", label="process, peak")
  left.plot(read, [r["state_bytes"] / 2**20 for r in results], marker="o", label="state")
  left.set_ylabel("MiB")
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
  parser.add_argument("--part", type=json.loads, help=argparse.SUPPRESS)  # in this process
  common.add_shape(parser, **DEFAULTS)
  arguments = parser.parse_args()
  shape = common.shape_of(arguments)
  if arguments.part:
    length = arguments.part.get("length")
    print(json.dumps(measure(length, shape) if length else reading_rates(shape)))
    return
  out = pathlib.Path(arguments.out)
  out.mkdir(parents=True, exist_ok=True)
  options = [f"--{name}={value}" for name, value in shape.items()]
  results = []
  for length in (n for n in LENGTHS if n <= arguments.longest):
    results.append(common.alone(__file__, {"length": length}, options))
    print("  ".join(f"{name} {value:,.3f}" for name, value in results[-1].items()), flush=True)
  rates = common.alone(__file__, {"reading": True}, options)
  for way, rate in rates.items():
    print(f"{way}: {rate:,.0f} tokens/s", flush=True)
  from famjax.evaluation import report  # pylint: disable=import-outside-toplevel

  report.write_json(out / "report.json", {
      "command": ["python", *sys.argv], "shape": shape, "machine": report.machine(),
      "lengths": results, "reading_tokens_per_second": rates,
  })  # fmt: skip
  plot(results, out / "streaming.png", common.describe(shape))
  print(f"report: {out / 'report.json'}   plot: {out / 'streaming.png'}")


if __name__ == "__main__":
  main()
