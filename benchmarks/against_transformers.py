"""Reading a prompt and writing 128 tokens: famjax beside Hugging Face transformers, same weights.

    python benchmarks/against_transformers.py
    python benchmarks/against_transformers.py --contexts=1024,8192 --batches=1

It needs the extra `hf` (WORKSPACE.md, "Setting up").

A random Llama of some 30M parameters, float32, greedy. transformers has full attention (torch's
own, "sdpa", and a growing cache of keys); famjax has the window and the FAM of `--segments` and
`--fam`. First both are asked for logits with a window that covers the text: they are the same
network. Each side of each case runs in a process of its own, on one core and on all of them. famjax
compiles in a first job of a shorter context, torch warms up on 256 tokens. Writes `report.json` and
`against_transformers.png` to runs/against_transformers.
"""

import argparse
import itertools
import os
import pathlib
import sys
import tempfile
import time

import common
import numpy as np

NEW = 128  # tokens that are written
REPEATS = {1024: 3}  # of the whole job, by context; 1 for the others
MOST_CACHE = 9e9  # bytes of keys and values; torch copies them once more when they grow


def to_llama(model):
  """The same network in transformers: full attention over the same weights."""
  import transformers  # pylint: disable=import-outside-toplevel

  from famjax.convert import hf  # pylint: disable=import-outside-toplevel
  from famjax.training.train_state import split  # pylint: disable=import-outside-toplevel

  with tempfile.TemporaryDirectory() as directory:
    hf.write(pathlib.Path(directory), split(model.decoder)[1], model.config)
    return transformers.LlamaForCausalLM.from_pretrained(
        directory, max_position_embeddings=1 << 20, attn_implementation="sdpa"
    ).eval()


def check(shape: common.Shape) -> dict[str, float | str]:
  """Largest difference of logits over a text that the window covers, and whose logits they are."""
  import torch  # pylint: disable=import-outside-toplevel
  import transformers  # pylint: disable=import-outside-toplevel

  model = common.make_model(shape | {"fam": 0, "segments": 1}, kind="bswa")
  text = common.draw(shape["vocab"], shape["block"] + shape["block"] // 2)[None]
  with torch.inference_mode():
    theirs = to_llama(model)(torch.tensor(text)).logits.numpy()
  ours = np.asarray(model(text, model.init_state(1))[0])
  return {
      "largest_difference_of_logits": float(np.abs(ours - theirs).max()),
      "torch": torch.__version__,
      "transformers": transformers.__version__,
  }


def ours(shape: common.Shape, context: int, batch: int) -> dict[str, float]:
  """Seconds to read, and to write `NEW` tokens."""
  import jax  # pylint: disable=import-outside-toplevel

  from famjax.inference.engine import CHUNK_BLOCKS  # pylint: disable=import-outside-toplevel
  from famjax.inference.generation import Generation, Request  # pylint: disable=import-outside-toplevel

  model = common.make_model(shape)
  engine = model._engine  # pylint: disable=protected-access
  whole = [common.draw(shape["vocab"], context, seed) for seed in range(batch)]

  def job(prompts=whole):
    began = time.perf_counter()
    reading = jax.block_until_ready(engine.read(prompts, engine.start(batch)))
    read = time.perf_counter()
    generation = Generation(engine, model.vocabulary, [Request(NEW)] * batch, reading, prompts)
    while not generation.done:
      generation.round()
    return read - began, time.perf_counter() - read, min(map(len, generation.tokens))

  chunk = CHUNK_BLOCKS * shape["block"]
  job([prompt[: 2 * chunk + context % chunk] for prompt in whole])  # compiles
  return _best(job, context)


def theirs(shape: common.Shape, context: int, batch: int, cores: int) -> dict[str, float]:
  """As `ours`, in transformers."""
  import torch  # pylint: disable=import-outside-toplevel

  torch.set_num_threads(cores)
  llama = to_llama(common.make_model(shape | {"fam": 0}, kind="bswa"))
  text = torch.tensor(np.stack([
      common.draw(shape["vocab"], context, seed) for seed in range(batch)
  ]))  # fmt: skip

  @torch.inference_mode()
  def job(text=text):
    began = time.perf_counter()
    out = llama(text, use_cache=True, logits_to_keep=1)
    read = time.perf_counter()
    for _ in range(NEW):
      token = out.logits[:, -1:].argmax(-1)
      out = llama(token, past_key_values=out.past_key_values, use_cache=True, logits_to_keep=1)
    return read - began, time.perf_counter() - read, NEW

  job(text[:, :256])
  return _best(job, context)


def _best(job, context):
  """The median run by total time."""
  runs = sorted((job() for _ in range(REPEATS.get(context, 1))), key=lambda run: run[0] + run[1])
  read, write, count = runs[len(runs) // 2]
  if count != NEW:
    raise AssertionError(f"a row came to its end after {count} of {NEW} tokens")
  return {"read_s": read, "write_s": write, "written": count}


def measure_part(part: common.Part, shape: common.Shape):
  if "check" in part:
    return check(shape)
  common.use_cores(part["cores"])
  if part["side"] == "famjax":
    return ours(shape, part["context"], part["batch"])
  return theirs(shape, part["context"], part["batch"], part["cores"])


def measure_all(alone, shape: common.Shape, arguments: argparse.Namespace) -> dict:
  """Every context and batch, on one core and on all, on both sides."""
  checked = alone({"check": True})
  apart = checked["largest_difference_of_logits"]
  print(f"largest difference of logits: {apart:.1e}", flush=True)
  if not apart < 1e-3:
    sys.exit("the two networks are not the same")
  cases = []
  sides = ("famjax", "transformers")
  all_cores = sorted({1, len(os.sched_getaffinity(0))})
  for context, batch in itertools.product(arguments.contexts, arguments.batches):
    cache = 8 * shape["layers"] * shape["width"] * context * batch
    if cache > MOST_CACHE:
      print(f"{context:,} x {batch}: left out, transformers' {cache / 1e9:.0f} GB of keys")
      continue
    for cores, side in itertools.product(all_cores, sides):
      part = {"side": side, "context": context, "batch": batch, "cores": cores}
      cases.append(part | alone(part))
      print(_line(cases[-1]), flush=True)
  return checked | {"new_tokens": NEW, "cases": cases}


def plot(found: dict, shape: common.Shape, path: pathlib.Path) -> None:
  """Draws, on all cores, seconds of the whole job and milliseconds per written token of a row."""
  most_cores = max(c["cores"] for c in found["cases"])
  cases = [c for c in found["cases"] if c["cores"] == most_cores]
  batches = sorted({c["batch"] for c in cases})
  with common.two_panels(path, shape, "tokens of context", base=2) as (left, right):
    for side, batch in itertools.product(("famjax", "transformers"), batches):
      mine = [c for c in cases if (c["side"], c["batch"]) == (side, batch)]
      x = [c["context"] for c in mine]
      style = dict(
          color="C0" if side == "famjax" else "C1", marker="o",
          linestyle="-" if batch == batches[0] else "--",
          label=f"{side}, {batch} row{'s' if batch > 1 else ''}",
      )  # fmt: skip
      left.plot(x, [c["read_s"] + c["write_s"] for c in mine], **style)
      right.plot(x, [c["write_s"] / c["written"] * 1e3 for c in mine], **style)
    left.set_ylabel(f"seconds: read, and write {NEW} tokens")
    right.set_ylabel("milliseconds per written token of a row")


def _line(case):
  total, batch = case["read_s"] + case["write_s"], case["batch"]
  return (
      f"{case['side']:12}  {case['context']:6,} x {batch:2}  {case['cores']} cores"
      f"  read {case['context'] * batch / case['read_s']:8,.0f} tokens/s"
      f"  write {case['written'] * batch / case['write_s']:7,.1f} tokens/s  whole job {total:8.2f} s"
  )


def main() -> None:
  parser = common.make_parser(__doc__, "runs/against_transformers")
  numbers = lambda text: [int(n) for n in text.split(",")]
  parser.add_argument(
      "--contexts", type=numbers, default="1024,8192,32768", help="tokens, with commas"
  )
  parser.add_argument("--batches", type=numbers, default="1,16", help="rows, with commas")
  common.run(parser.parse_args(), measure_part, measure_all, plot)


if __name__ == "__main__":
  main()
