"""An ordinary decoder gets a working memory: from texts and instructions to numbers, in one command.

    python benchmarks/finetune.py --train=books/train --valid=books/valid --pairs="flan_cot/*.tsv"

It needs the extra `hf` (WORKSPACE.md, "Setting up"). Without --train and --valid the texts are the
Python library's own sources.

A small Llama-shaped decoder with full attention is trained on short excerpts of the texts, in tokens
of a byte-level BPE that is made from them, and saved in Hugging Face's format, which transformers
loads. From that directory each student starts: LoRA with a window alone (BSWA) and with a FAM, by
self-distillation, by long texts that rows follow, by instructions, and by pass keys; and all
parameters by instructions. Each goes back into Hugging Face's format, and is asked

  - for the next tokens of texts that were not trained on, by the place in the text;
  - for the same at the beginning of the texts, read from that format as the plain decoder that it
    was before, with full attention: what fine-tuning has cost it;
  - for pass keys, if those were trained.

What is there already is not made again. Writes `report.json`, `tables.md` and `finetune.png` to
runs/finetune.
"""

import argparse
import collections
from collections.abc import Iterable
import concurrent.futures
import json
import os
import pathlib
import statistics
import subprocess
import sys

import common

SIZE = {
    "num_layers": 4, "model_dim": 192, "num_heads": 3, "ff_dim": 512, "compute_dtype": "float32",
}  # fmt: skip
STUDENT = ["BLOCK_SIZE=64", "MEMORY_SEGMENTS=1", "FAM_LENGTH=16", "LORA_RANK=32"]
CONTEXT = 256  # tokens that the decoder is trained on, and its teacher sees
EDGES = (0, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
WAYS = {  # of training a student: run file, and what is set in it
    "distilled": ("retrofit", [f"LENGTH={CONTEXT}", "BATCH_SIZE=16"]),
    "long texts": (
        "long_text", [f"LENGTH={CONTEXT}", "BATCH_SIZE=16", "OptimizerConfig.weight_decay=0.0"],
    ),
    "instructions": ("finetune_flan", ["LENGTH=1024", "BATCH_SIZE=4"]),
    "pass keys": (
        "passkey_base",
        ["LENGTH=512", "BATCH_SIZE=8", "Lengths.low=2", "LEARNING_RATE=2e-3",
         "LONGEST_BLOCKS=((0, 4), (100, 8), (200, 16), (300, 32))",
         "EVAL_BLOCKS=(2, 4, 8, 16, 32, 64, 128)"],
    ),
}  # fmt: skip
FIELDS = ("question", "answer", "why")
TEMPLATES = (("Q: {question}\nA:", " {why} So the answer is {answer}."), ("{question}\n", "{answer}"))


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--out", type=pathlib.Path, default="runs/finetune")
  parser.add_argument("--train", help="directory of texts to train on")
  parser.add_argument("--valid", help="directory of texts to ask about")
  parser.add_argument("--pairs", help="TSV files of question, answer and reasons; none: left out")
  parser.add_argument("--base_steps", type=int, default=1500)
  parser.add_argument("--steps", type=int, default=300, help="of each student; of pass keys twice")
  parser.add_argument("--vocab", type=int, default=2048, help="entries of the BPE")
  parser.add_argument("--texts", type=int, default=32, help="excerpts to ask about")
  parser.add_argument("--parallel", type=int, default=len(os.sched_getaffinity(0)))
  arguments = parser.parse_args()
  if bool(arguments.train) != bool(arguments.valid):
    parser.error("give both --train and --valid, or neither")
  out = arguments.out.absolute()
  common.keep_arguments(out, arguments, free=("out", "parallel"))
  hub = _base(out, arguments)
  students = {
      f"{memory}, {way}": (way, memory, "lora")
      for way in WAYS
      for memory in ("BSWA", "FAM")
      if arguments.pairs or way != "instructions"
  }
  if arguments.pairs:
    students["FAM, instructions, all parameters"] = ("instructions", "FAM", "full")
  with concurrent.futures.ThreadPoolExecutor(arguments.parallel) as pool:
    list(pool.map(lambda s: _student(out, hub, arguments, s), students.items()))
  _report(out, hub, arguments, students)


def _base(out: pathlib.Path, arguments) -> pathlib.Path:
  """The directory of the decoder with full attention, in Hugging Face's format."""
  tokenizer = out / "tokenizer"
  if not (tokenizer / "tokenizer.json").is_file():
    _make_tokenizer(tokenizer, arguments)
  size = [f"ModelConfig.{name}={value}" for name, value in SIZE.items()]
  _famjax(
      out / "base.log", "train", "--gin_file=gin/runs/excerpts.gin",
      "--gin_file=gin/options/adamw.gin", "--gin_file=gin/memory/full.gin",
      *_set(
          [f"RUN_DIR={out / 'base'}", f"TRAIN_STEPS={arguments.base_steps}"],
          [f"VOCABULARY={tokenizer}"], size, _corpus(arguments),
          [f"LENGTH={CONTEXT}", f"BLOCK_SIZE={CONTEXT}", "MEMORY_SEGMENTS=0"],
          ["LEARNING_RATE=2e-3", "BATCH_SIZE=16", "TrainConfig.rsp_probability=0.0"],
          ["TrainConfig.random_offset=False", "OptimizerConfig.schedule=cosine"],
          ["OptimizerConfig.warmup_steps=100"],
      ),
  )  # fmt: skip
  hub = out / "hub"
  if not hub.exists():
    _famjax(out / "base.log", "convert", "--to=hf", f"--src={out / 'base'}", f"--dst={hub}")
  return hub


def _make_tokenizer(directory: pathlib.Path, arguments) -> None:
  import tokenizers  # pylint: disable=import-outside-toplevel
  from tokenizers import decoders, models, pre_tokenizers, trainers  # pylint: disable=import-outside-toplevel

  from famjax.data.long_text import find_files  # pylint: disable=import-outside-toplevel

  files = find_files(arguments.train, split="all" if arguments.train else "train")
  tokenizer = tokenizers.Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.Sequence([  # Digits are tokens, as Llama's are.
      pre_tokenizers.Digits(individual_digits=True),
      pre_tokenizers.ByteLevel(add_prefix_space=False),
  ])
  tokenizer.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
      vocab_size=arguments.vocab, special_tokens=["<pad>", "</s>"],
      initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
  )  # fmt: skip
  tokenizer.train([str(file) for file in files], trainer)
  directory.mkdir(parents=True, exist_ok=True)
  ids = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
  (directory / "config.json").write_text(json.dumps(ids))
  tokenizer.save(str(directory / "tokenizer.json"))


def _student(out, hub, arguments, student) -> None:
  """Trains one, and takes it back into Hugging Face's format."""
  name, (way, memory, trainable) = student
  run = out / _slug(name)
  run_file, settings = WAYS[way]
  log = run.with_suffix(".log")
  steps = arguments.steps * (2 if way == "pass keys" else 1)
  more = []
  if way == "instructions":
    more = [f"DATA={arguments.pairs}", f"COLUMNS={FIELDS!r}", f"TEMPLATES={TEMPLATES!r}",
            "PackedReader.repeat_length=128"]  # fmt: skip
  elif way != "pass keys":
    more = _corpus(arguments)
  if trainable == "full":
    more += ["LORA_RANK=0", "LEARNING_RATE=3e-4"]
  files = ["gin/options/lora.gin", "gin/options/adamw.gin", "gin/options/model_of_checkpoint.gin"]
  files += [f"gin/memory/{memory.lower()}.gin"]
  described = [
      f"--gin_file=gin/runs/{run_file}.gin", *(f"--gin_file={file}" for file in files),
      *_set(
          STUDENT, ["LEARNING_RATE=1e-3", f"TRAIN_STEPS={steps}"], settings, more,
          [f"RUN_DIR={run}", f"VOCABULARY={hub}"],
          [f"INITIAL_CHECKPOINT={hub}", f"TrainConfig.init_checkpoint={hub}"],
      ),
  ]  # fmt: skip
  _famjax(log, "train", *described)
  if way == "pass keys":
    _famjax(log, "eval", *described)
  if not _exported(run).exists():
    _famjax(log, "convert", "--to=hf", f"--src={run}", f"--dst={_exported(run)}")


def _report(out, hub, arguments, students) -> None:
  """Asks every model, and writes what it found."""
  import famjax  # pylint: disable=import-outside-toplevel
  from famjax.data.vocabularies import load_vocabulary  # pylint: disable=import-outside-toplevel
  from famjax.evaluation import report  # pylint: disable=import-outside-toplevel

  window = famjax.MemoryConfig("bswa", 64, 1)
  original = famjax.MemoryConfig("full", CONTEXT, 0)
  books, texts = _texts(load_vocabulary(str(hub)), arguments)
  ask = lambda name, place, memory: _asked(out / f"{_slug(name)}.json", place, memory, texts)
  places = {
      "full attention": ask("full", hub, original),
      "BSWA, not trained": ask("window", hub, window),
  }
  beginnings = {"before": places["full attention"]}
  keys = {}
  for name, (way, *_) in students.items():
    run = out / _slug(name)
    places[name] = ask(f"{name} by place", run, None)
    beginnings[name] = ask(f"{name} as it was", _exported(run), original)
    if way == "pass keys":
      keys[name] = json.loads((run / report.PASSKEY).read_text())["accuracy"]
  gains = {
      way: _gain(places[f"FAM, {way}"], places[f"BSWA, {way}"], books)
      for way in WAYS
      if f"FAM, {way}" in places
  }
  tables = "\n".join([
      _places_table(places), _gains_table(gains), _beginnings_table(beginnings), _keys_table(keys),
  ])  # fmt: skip
  about = {"command": ["python", *sys.argv], "machine": report.machine()}
  found = {"by_place": places, "as_plain_decoder": beginnings, "pass_keys": keys}
  report.write_json(out / "report.json", about | found)
  (out / "tables.md").write_text(tables)
  _plot(places, keys, out / "finetune.png")
  print(tables)


def _asked(file: pathlib.Path, place: pathlib.Path, memory, texts) -> list[list[dict]]:
  """Of every text the bins of `by_position`; from the file, if they are there."""
  import famjax  # pylint: disable=import-outside-toplevel
  from famjax.evaluation import report  # pylint: disable=import-outside-toplevel
  from famjax.evaluation.by_position import by_position  # pylint: disable=import-outside-toplevel

  if not file.exists():
    model = famjax.load(str(place), memory)
    reach = model.config.memory.context or EDGES[-1]
    edges = [edge for edge in EDGES if edge <= reach]
    bins = [[bin._asdict() for bin in by_position(model, [text], edges)] for text in texts]
    report.write_json(file, bins)
    print(f"{file.stem}: asked", flush=True)
  return json.loads(file.read_text())


def _texts(vocabulary, arguments):
  """Excerpts of the texts that were not trained on, as long as are asked for; and which text's."""
  import numpy as np  # pylint: disable=import-outside-toplevel

  from famjax.data import LongText  # pylint: disable=import-outside-toplevel
  from famjax.data.examples import shuffled  # pylint: disable=import-outside-toplevel

  split = "all" if arguments.valid else "validation"
  source = LongText(vocabulary, arguments.valid, split=split, excerpt_tokens=EDGES[-1] + 1)
  found = [
      (shuffled(0, i, len(source.files)), np.asarray(source.example(0, i, 0)[0], np.int32))
      for i in range(4 * arguments.texts)
  ]
  longest = sorted(found, key=lambda one: len(one[1]), reverse=True)[: arguments.texts]
  return zip(*longest)


def _accuracy(texts: list[list[dict]], first: int = 0, last: int = EDGES[-1]) -> list[float | None]:
  """Of every text the accuracy between two places; None where it has nothing there."""
  accuracies = []
  for bins in texts:
    inside = [b for b in bins if first <= b["first"] and b["last"] <= last and b["tokens"]]
    right = sum(b["accuracy"] * b["tokens"] for b in inside)
    tokens = sum(b["tokens"] for b in inside)
    accuracies.append(right / tokens if tokens else None)
  return accuracies


def _mean(values: Iterable[float | None]) -> float:
  return statistics.mean(value for value in values if value is not None)


def _gain(more: list[list[dict]], less: list[list[dict]], books) -> tuple[float, float]:
  """Mean difference in accuracy past the window's reach, and its standard error over books.

  Excerpts of one book are much alike, so that each book counts once.
  """
  differences = collections.defaultdict(list)
  for book, a, b in zip(books, _accuracy(more, first=512), _accuracy(less, first=512)):
    if a is not None:
      differences[book].append(a - b)
  means = [statistics.mean(values) for values in differences.values()]
  error = statistics.stdev(means) / len(means) ** 0.5 if len(means) > 1 else float("nan")
  return statistics.mean(means), error


def _table(head: list[str], rows: list[list[str]]) -> str:
  from famjax.evaluation import report  # pylint: disable=import-outside-toplevel

  return report.markdown([head, *rows]) + "\n"


def _by_place(texts: list[list[dict]]) -> list[float]:
  """The accuracy of every bin, over all texts."""
  return [_mean(_accuracy(texts, b["first"], b["last"])) for b in texts[0]]


def _places_table(places) -> str:
  rows = []
  for name, texts in places.items():
    cells = [f"{accuracy:.4f}" for accuracy in _by_place(texts)]
    rows.append([name, *cells, *[""] * (len(EDGES) - 1 - len(cells))])
  return _table(["next-token accuracy up to token", *(f"{edge:,}" for edge in EDGES[1:])], rows)


def _gains_table(gains) -> str:
  rows = [[way, f"{100 * mean:+.2f} ± {100 * error:.2f}"] for way, (mean, error) in gains.items()]
  return _table(["way of training", "FAM over BSWA past token 512, points of accuracy"], rows)


def _beginnings_table(beginnings) -> str:
  before = _mean(_accuracy(beginnings["before"], last=CONTEXT))
  rows = []
  for name, texts in beginnings.items():
    accuracy = _mean(_accuracy(texts, last=CONTEXT))
    rows.append([name, f"{accuracy:.4f}", f"{100 * (accuracy - before):+.2f}"])
  head = [f"as a plain decoder of {CONTEXT} tokens", "next-token accuracy", "points lost or won"]
  return _table(head, rows)


def _keys_table(keys) -> str:
  blocks = list(next(iter(keys.values()), ()))
  rows = [[name] + [f"{accuracy:.2f}" for accuracy in row.values()] for name, row in keys.items()]
  return _table(["pass keys given back after blocks of 64", *blocks], rows)


def _plot(places, keys, path: pathlib.Path) -> None:
  import matplotlib  # pylint: disable=import-outside-toplevel

  matplotlib.use("Agg")
  import matplotlib.pyplot as plt  # pylint: disable=import-outside-toplevel

  figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5), dpi=150, layout="constrained")
  colours = {}
  for name, texts in places.items():
    memory, _, way = name.partition(", ")
    colour = colours.setdefault(way, f"C{len(colours)}")
    style = dict(linestyle="--" if memory == "BSWA" else "-", color=colour, marker="o", ms=4)
    left.plot([b["last"] for b in texts[0]], _by_place(texts), label=name, **style)
  for name, row in keys.items():
    style = "--" if name.startswith("BSWA") else "-"
    lengths = [int(blocks) * 64 for blocks in row]
    right.plot(lengths, list(row.values()), style, marker="o", label=name)
  left.set(xlabel="place in the text, tokens", ylabel="next-token accuracy, texts not trained on")
  right.set(xlabel="length of the document, tokens", ylabel="pass keys given back")
  for axes in (left, right):
    axes.set_xscale("log", base=2)
    axes.grid(alpha=0.25)
  left.legend(frameon=False, fontsize="small", ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.12))
  right.legend(frameon=False, fontsize="small")
  figure.savefig(path)
  plt.close(figure)


def _corpus(arguments) -> list[str]:
  if not arguments.train:
    return []
  return [f"CORPUS={arguments.train}", "LongText.split=all",
          f"eval/LongText.directory={arguments.valid}", "eval/LongText.split=all"]  # fmt: skip


def _set(*bindings: list[str]) -> list[str]:
  return [f"--gin.{binding}" for group in bindings for binding in group]


def _exported(run: pathlib.Path) -> pathlib.Path:
  return run.with_name(run.name + "-hub")


def _slug(name: str) -> str:
  return name.lower().replace(",", "").replace(" ", "-")


def _famjax(log: pathlib.Path, *arguments: str) -> None:
  """Runs a command of famjax, which goes on where it was; its output goes to a log."""
  log.parent.mkdir(parents=True, exist_ok=True)
  print(f"famjax {arguments[0]}: {log}", flush=True)
  with open(log, "a", encoding="utf-8") as file:
    command = [sys.executable, "-m", "famjax.cli", *arguments]
    if subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False).returncode:
      sys.exit(f"{' '.join(command)} failed; the end of {log} says why")


if __name__ == "__main__":
  main()
