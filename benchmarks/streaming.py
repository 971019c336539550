"""What reading without end costs: memory and time per token, at lengths from 1k to 1M tokens.

    python benchmarks/streaming.py
    python benchmarks/streaming.py --longest=102400

A random model reads random tokens through the streaming engine, on one core, a chunk at a time, as
text comes from a file. Memory: each length three times, in processes of their own that have one arena
of malloc, so that threads do not blur the peak; the median. Time: one process stands at all lengths at once, and reads
and writes some more from each in turn, again and again, so that a busy machine is busy for all of
them; medians. Writes `report.json` and `streaming.png` to runs/streaming.
"""

import argparse
import os
import pathlib
import statistics
import time

import common

LENGTHS = (1_024, 10_240, 102_400, 1_024_000)  # whole blocks, so that reading goes on from one
DEFAULTS = dict(layers=4, width=256, ff=704, vocab=8192)
REPEATS = 15  # of each time; of each peak there are 3
WRITTEN = 64  # tokens


def _reader(shape: common.Shape):
  """A model, and a function that reads so many random tokens."""
  import jax  # pylint: disable=import-outside-toplevel

  model = common.make_model(shape)

  def read(count, after=None, seed=0):
    return jax.block_until_ready(model.read(common.draw(shape["vocab"], count, seed), after))

  return model, read


def _chunk(shape: common.Shape) -> int:
  from famjax.inference.engine import CHUNK_BLOCKS  # pylint: disable=import-outside-toplevel

  return CHUNK_BLOCKS * shape["block"]


def memory(length: int, shape: common.Shape) -> dict[str, float]:
  """What stands in memory when `length` tokens have been read."""
  from famjax.model.state import num_bytes  # pylint: disable=import-outside-toplevel

  model, read = _reader(shape)
  chunk = _chunk(shape)
  for rest in sorted({n % chunk for n in LENGTHS}):  # compiles, the same in every process
    read(rest + chunk)
  reading = read(length % chunk) if length % chunk else model.start()
  for i in range(length // chunk):
    reading = read(chunk, reading, seed=i)
  return {
      "state_bytes": num_bytes(reading.state),
      "peak_memory_mb": common.peak_memory_mb(),
  }


def times(lengths: list[int], shape: common.Shape) -> list[dict[str, float]]:
  """Milliseconds per token of the next tokens, after each of `lengths`, in rising order."""
  model, read = _reader(shape)
  chunk = _chunk(shape)
  readings, reading, before = [], None, 0
  for length in lengths:
    rest, chunks = (length - before) % chunk, (length - before) // chunk
    for i, count in enumerate([rest] * (rest > 0) + [chunk] * chunks):
      reading = read(count, reading, seed=i)
    readings.append(reading)
    before = length

  def write(after):
    stream = model.generate(state=after, max_new_tokens=WRITTEN, temperature=1.0)
    list(stream)
    if len(stream.tokens) != WRITTEN:
      raise AssertionError(f"the text ended after {len(stream.tokens)} of {WRITTEN} tokens")

  def lap(function):
    began = time.perf_counter()
    function()
    return time.perf_counter() - began

  laps = [([], []) for _ in readings]
  for repeat in range(REPEATS + 1):
    for (reads, writes), after in zip(laps, readings):
      new = lap(lambda after=after: read(chunk, after)), lap(lambda after=after: write(after))
      if repeat:  # the first compiles
        reads.append(new[0] / chunk * 1e3)
        writes.append(new[1] / WRITTEN * 1e3)
  median = statistics.median
  return [{"read_ms_per_token": median(r), "write_ms_per_token": median(w)} for r, w in laps]


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


def measure_part(part: common.Part, shape: common.Shape):
  if "reading" not in part:
    common.use_cores(1)
  if "length" in part:
    return memory(part["length"], shape)
  return times(part["lengths"], shape) if "lengths" in part else reading_rates(shape)


def measure_all(alone, shape: common.Shape, arguments: argparse.Namespace) -> dict:
  """All lengths that were asked for, and the ways to read."""
  del shape
  lengths = [n for n in LENGTHS if n <= arguments.longest]
  results = []
  for length, laps in zip(lengths, alone({"lengths": lengths})):
    runs = sorted((alone({"length": length}) for _ in range(3)), key=lambda run: run["peak_memory_mb"])
    results.append({"tokens": length} | runs[1] | laps)
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
  os.environ.setdefault("MALLOC_ARENA_MAX", "1")  # of the processes that measure
  os.environ["GLIBC_TUNABLES"] = ""  # a peak is that of small pages
  parser = common.make_parser(__doc__, "runs/streaming", **DEFAULTS)
  parser.add_argument("--longest", type=int, default=LENGTHS[-1], help="tokens")
  common.run(parser.parse_args(), measure_part, measure_all, plot)


if __name__ == "__main__":
  main()
