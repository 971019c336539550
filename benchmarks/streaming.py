"""What reading without end costs: memory and time per token, at lengths from 1k to 1M tokens.

    python benchmarks/streaming.py
    python benchmarks/streaming.py --longest=102400

A random model reads random tokens through the streaming engine, each length in a process of its
own. After them it reads some more and writes some, several times from the same place. Writes
`report.json` and `streaming.png` to runs/streaming.
"""

import argparse
import pathlib
import resource

import common

LENGTHS = (1_024, 10_240, 102_400, 1_024_000)  # whole blocks, so that reading goes on from one
DEFAULTS = dict(layers=4, width=256, ff=704, vocab=8192)
REPEATS = 15
WRITTEN = 64  # tokens


def measure(length: int, shape: common.Shape) -> dict[str, float]:
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
      raise AssertionError(f"the text ended after {len(stream.tokens)} of {WRITTEN} tokens")

  for rest in sorted({n % chunk for n in LENGTHS}):  # compiles, the same in every process
    read(rest + chunk)
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


def reading_rates(shape: common.Shape) -> dict[str, float]:
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


def measure_part(part: common.Part, shape: common.Shape) -> dict[str, float]:
  return measure(part["length"], shape) if "length" in part else reading_rates(shape)


def measure_all(alone, shape: common.Shape, arguments: argparse.Namespace) -> dict:
  """All lengths that were asked for, and the ways to read."""
  del shape
  results = []
  for length in (n for n in LENGTHS if n <= arguments.longest):
    results.append(alone({"length": length}))
    print("  ".join(f"{name} {value:,.3f}" for name, value in results[-1].items()), flush=True)
  rates = alone({"reading": True})
  for way, rate in rates.items():
    print(f"{way}: {rate:,.0f} tokens/s", flush=True)
  return {"lengths": results, "reading_tokens_per_second": rates}


def plot(found: dict, shape: common.Shape, path: pathlib.Path) -> None:
  """Draws memory and time per token against what was read before."""
  results = found["lengths"]
  read = [r["tokens"] for r in results]
  with common.two_panels(path, shape, "tokens read before", base=10) as (left, right):
    left.plot(read, [r["peak_memory_mb"] for r in results], marker="o", label="process, peak")
    left.plot(read, [r["state_bytes"] / 2**20 for r in results], marker="o", label="state")
    left.set_ylabel("MiB")
    right.plot(read, [r["read_ms_per_token"] for r in results], marker="o", label="reading")
    right.plot(read, [r["write_ms_per_token"] for r in results], marker="o", label="writing")
    right.set_ylabel("milliseconds per token, median")


def main() -> None:
  parser = common.make_parser(__doc__, "runs/streaming", **DEFAULTS)
  parser.add_argument("--longest", type=int, default=LENGTHS[-1], help="tokens")
  common.run(parser.parse_args(), measure_part, measure_all, plot)


if __name__ == "__main__":
  main()
