"""An ordinary decoder gets a working memory: from texts and instructions to numbers, in one command.

    python benchmarks/finetune.py --train=books/train --valid=books/valid --pairs="flan_cot/*.tsv"

It needs the extra `hf` (WORKSPACE.md, "Setting up"). Without --train and --valid the texts are the
Python library's own sources.

A small Llama-shaped decoder with full attention is trained on short excerpts of the texts, in tokens
of a byte-level BPE that is made from them, and saved in Hugging Face's format, which transformers
loads. From that directory each student starts: LoRA with a window alone (BSWA) and with a FAM, by
self-distillation, by long texts that rows follow, and by instructions; and all parameters by
instructions. Each is asked for the next tokens of texts that were not trained on, by the place in the
text, and goes back into Hugging Face's format. What is there already is not made again. Writes
`report.json`, `table.md` and `finetune.png` to runs/finetune.
"""

import argparse
import concurrent.futures
import json
import os
import pathlib
import subprocess
import sys

SIZE = {
    "num_layers": 4, "model_dim": 192, "num_heads": 3, "ff_dim": 512, "compute_dtype": "float32",
}  # fmt: skip
STUDENT = ["BLOCK_SIZE=64", "MEMORY_SEGMENTS=1", "FAM_LENGTH=16", "LORA_RANK=32"]
CONTEXT = 512  # tokens that the decoder is trained on, and its teacher sees
EDGES = (0, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
WAYS = {  # of training a student: run file, and what is set in it
    "distilled": ("retrofit", [f"LENGTH={CONTEXT}", "BATCH_SIZE=16"]),
    "long texts": (
        "long_text", [f"LENGTH={CONTEXT}", "BATCH_SIZE=16", "OptimizerConfig.weight_decay=0.0"],
    ),
    "instructions": ("finetune_flan", ["LENGTH=1024", "BATCH_SIZE=8"]),
}  # fmt: skip
FIELDS = ("question", "answer", "why")
TEMPLATES = (("Q: {question}\nA:", " {why} So the answer is {answer}."), ("{question}\n", "{answer}"))


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--out", type=pathlib.Path, default="runs/finetune")
  parser.add_argument("--train", help="directory of texts to train on")
  parser.add_argument("--valid", help="directory of texts to ask about")
  parser.add_argument("--pairs", help="TSV files of question, answer and reasons; none: left out")
  parser.add_argument("--base_steps", type=int, default=3000)
  parser.add_argument("--steps", type=int, default=600, help="of each student")
  parser.add_argument("--vocab", type=int, default=4096, help="entries of the BPE")
  parser.add_argument("--texts", type=int, default=32, help="excerpts to ask about")
  parser.add_argument("--parallel", type=int, default=len(os.sched_getaffinity(0)))
  arguments = parser.parse_args()
  if bool(arguments.train) != bool(arguments.valid):
    parser.error("give both --train and --valid, or neither")
  out = arguments.out.absolute()
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
          [f"RUN_DIR={out / 'base'}", f"VOCABULARY={tokenizer}", f"TRAIN_STEPS={arguments.base_steps}"],
          size, _corpus(arguments),
          [f"LENGTH={CONTEXT}", "BLOCK_SIZE=64", f"MEMORY_SEGMENTS={CONTEXT // 64 - 1}"],
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
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
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
  more = _corpus(arguments) if way != "instructions" else [
      f"DATA={arguments.pairs}", f"COLUMNS={FIELDS!r}", f"TEMPLATES={TEMPLATES!r}",
      "PackedReader.repeat_length=128",
  ]  # fmt: skip
  if trainable == "full":
    more += ["LORA_RANK=0", "LEARNING_RATE=3e-4"]
  files = ["gin/options/lora.gin", "gin/options/adamw.gin", "gin/options/model_of_checkpoint.gin"]
  files += [f"gin/memory/{memory.lower()}.gin"]
  _famjax(
      run.with_suffix(".log"), "train", f"--gin_file=gin/runs/{run_file}.gin",
      *(f"--gin_file={file}" for file in files),
      *_set(
          STUDENT, ["LEARNING_RATE=1e-3"], settings, more,
          [f"RUN_DIR={run}", f"TRAIN_STEPS={arguments.steps}", f"VOCABULARY={hub}"],
          [f"INITIAL_CHECKPOINT={hub}", f"TrainConfig.init_checkpoint={hub}"],
      ),
  )  # fmt: skip
  back = run.with_name(run.name + "-hub")
  if not back.exists():
    _famjax(run.with_suffix(".log"), "convert", "--to=hf", f"--src={run}", f"--dst={back}")


def _report(out, hub, arguments, students) -> None:
  """Asks every model, and writes what it found."""
  import famjax  # pylint: disable=import-outside-toplevel
  from famjax.evaluation import report  # pylint: disable=import-outside-toplevel
  from famjax.evaluation.by_position import by_position  # pylint: disable=import-outside-toplevel

  window = famjax.MemoryConfig("bswa", 64, 1)
  models = {
      "full attention, as it was trained": (hub, famjax.MemoryConfig("full", 64, CONTEXT // 64 - 1)),
      "BSWA, not trained": (hub, window),
  } | {name: (out / _slug(name), None) for name in students}
  texts, found = None, {}
  for name, (place, memory) in models.items():
    model = famjax.load(str(place), memory)
    texts = texts or _texts(model.vocabulary, arguments)
    reach = model.config.memory.context or EDGES[-1]
    bins = by_position(model, texts, [edge for edge in EDGES if edge <= reach])
    found[name] = [bin._asdict() for bin in bins]
    print(f"{name}: {' '.join(f'{bin.accuracy:.4f}' for bin in bins)}", flush=True)
  about = {"command": ["python", *sys.argv], "machine": report.machine()}
  report.write_json(out / "report.json", about | {"by_position": found})
  (out / "table.md").write_text(_table(found))
  _plot(found, out / "finetune.png")
  print(_table(found))


def _texts(vocabulary, arguments):
  """Excerpts of the texts that were not trained on, each of as many tokens as are asked for."""
  import numpy as np  # pylint: disable=import-outside-toplevel

  from famjax.data import LongText  # pylint: disable=import-outside-toplevel

  split = "all" if arguments.valid else "validation"
  source = LongText(vocabulary, arguments.valid, split=split, excerpt_tokens=EDGES[-1] + 1)
  texts = [source.example(0, i, 0)[0] for i in range(4 * arguments.texts)]
  longest = sorted(texts, key=len, reverse=True)[: arguments.texts]
  return [np.asarray(text, np.int32) for text in longest]


def _table(found) -> str:
  edges = [bin["last"] for bin in max(found.values(), key=len)]
  lines = ["| next-token accuracy up to token | " + " | ".join(f"{e:,}" for e in edges) + " |"]
  lines += ["| --- |" + " ---: |" * len(edges)]
  for name, bins in found.items():
    cells = [f"{bin['accuracy']:.4f}" for bin in bins] + [""] * (len(edges) - len(bins))
    lines.append(f"| {name} | {' | '.join(cells)} |")
  return "\n".join(lines) + "\n"


def _plot(found, path: pathlib.Path) -> None:
  import matplotlib  # pylint: disable=import-outside-toplevel

  matplotlib.use("Agg")
  import matplotlib.pyplot as plt  # pylint: disable=import-outside-toplevel

  figure, axes = plt.subplots(figsize=(8, 5), dpi=150, layout="constrained")
  for name, bins in found.items():
    style = "--" if "BSWA" in name else "-"
    axes.plot([b["last"] for b in bins], [b["accuracy"] for b in bins], style, marker="o", label=name)
  axes.set_xscale("log", base=2)
  axes.set_xlabel("place in the text, tokens")
  axes.set_ylabel("next-token accuracy")
  axes.grid(alpha=0.25)
  axes.legend(frameon=False, fontsize="small")
  figure.savefig(path)
  plt.close(figure)


def _corpus(arguments) -> list[str]:
  if not arguments.train:
    return []
  return [f"CORPUS={arguments.train}", "LongText.split=all", f"eval/LongText.directory={arguments.valid}",
          "eval/LongText.split=all"]  # fmt: skip


def _set(*bindings: list[str]) -> list[str]:
  return [f"--gin.{binding}" for group in bindings for binding in group]


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
