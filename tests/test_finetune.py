"""A model of the hub gets a memory, and goes back to the hub: the commands of the README."""

import json

import numpy as np
import pytest

import famjax
from famjax import cli
from tests.convert import tiny

torch = pytest.importorskip("torch", reason="the extra hf brings torch to Python 3.11 alone")
TEXT = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
SMALL = [
    "--gin.BATCH_SIZE=2", "--gin.LENGTH=64", "--gin.BLOCK_SIZE=16", "--gin.MEMORY_SEGMENTS=1",
    "--gin.FAM_LENGTH=2", "--gin.LORA_RANK=2", "--gin.TRAIN_STEPS=2", "--gin.LEARNING_RATE=0.05",
    "--gin.TrainConfig.tensorboard=False",
]  # fmt: skip


@pytest.fixture(scope="module", name="hub")
def _hub(tmp_path_factory):
  directory = tmp_path_factory.mktemp("hub") / "model"
  tiny.save("llama", directory, vocab_size=320)
  tiny.save_tokenizer(directory, TEXT)
  return directory


def train(run_file, hub, run_dir, *more):
  files = [f"--gin_file=gin/runs/{run_file}.gin", "--gin_file=gin/options/model_of_checkpoint.gin"]
  set_by_user = [f"--gin.RUN_DIR={run_dir}", f"--gin.INITIAL_CHECKPOINT={hub}"]
  return cli.main(["train", *files, *set_by_user, *SMALL, *more])


def test_by_instructions_and_back(hub, tmp_path):
  """Merged, it is the model that transformers loads; with its memory it goes on in famjax."""
  rows = [f"What is {i}\\nplus {i}?\t({2 * i})\tIt is twice {i}.\n" for i in range(60)]
  (tmp_path / "math.tsv").write_text("".join(rows))
  assert 0 == train(
      "finetune_flan", hub, tmp_path / "run", f"--gin.DATA={tmp_path / '*.tsv'}",
      "--gin.COLUMNS=('question', 'answer', 'why')",
      "--gin.TEMPLATES=(('Q: {question}\\nA:', ' {why} {answer}'), ('{question}', ' {answer}'))",
      "--gin.PackedReader.repeat_length=8",
  )  # fmt: skip
  assert 0 == cli.main(["convert", "--to=hf", f"--src={tmp_path / 'run'}", f"--dst={tmp_path / 'out'}"])
  ours = famjax.load(str(tmp_path / "run"))
  assert ours.config.memory == famjax.MemoryConfig("fam", 16, 1, 2)
  again = famjax.load(str(tmp_path / "out"))
  assert again.config.memory == ours.config.memory
  np.testing.assert_allclose(again.read(TEXT).logits, ours.read(TEXT).logits, atol=1e-4)
  ids = [*ours.vocabulary.begin_ids, *ours.vocabulary.encode(TEXT)]
  full = famjax.load(str(tmp_path / "run"), famjax.MemoryConfig("full", 64, 0))
  with torch.no_grad():
    theirs = tiny.load(tmp_path / "out")(torch.tensor([ids])).logits[0, -1].numpy()
    before = tiny.load(hub)(torch.tensor([ids])).logits[0, -1].numpy()
  np.testing.assert_allclose(full.read(TEXT).logits[0], theirs, atol=1e-4)
  assert np.abs(theirs - before).max() > 0.01


def test_by_self_distillation(hub, tmp_path):
  (tmp_path / "texts").mkdir()
  for i in range(20):
    (tmp_path / "texts" / f"{i:02}.txt").write_text(TEXT * 40 + str(i))
  run, base = tmp_path / "run", tmp_path / "base"
  cli.main(["convert", "--from=hf", f"--src={hub}", f"--dst={base}"])
  assert 0 == train("retrofit", base, run, f"--gin.CORPUS={tmp_path / 'texts'}")
  assert 0 == train("retrofit", base, run, f"--gin.CORPUS={tmp_path / 'texts'}", "--gin.TRAIN_STEPS=3")
  lines = list(map(json.loads, (run / "metrics.jsonl").read_text().splitlines()))
  assert lines[-1]["step"] == 3 and all(np.isfinite(line["loss"]) for line in lines)
  assert {line["split"] for line in lines} == {"train", "eval"}
  assert famjax.load(str(run)).config.lora_rank == 0  # merged
  assert 0 == cli.main(["convert", "--to=hf", f"--src={run}", f"--dst={tmp_path / 'out'}"])
  assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (hub / "tokenizer.json").read_bytes()


def test_another_model_than_the_checkpoint_is_refused(hub, tmp_path, capsys):
  (tmp_path / "a.jsonl").write_text('{"inputs": "Say it.", "targets": "It."}\n')
  arguments = [
      "train", "--gin_file=gin/runs/finetune_flan.gin", f"--gin.RUN_DIR={tmp_path / 'run'}",
      f"--gin.INITIAL_CHECKPOINT={hub}", f"--gin.DATA={tmp_path / 'a.jsonl'}",
      "--gin.PackedReader.repeat_length=8", *SMALL,
  ]  # fmt: skip
  assert cli.main(arguments) == 2
  assert "is of another model: " in capsys.readouterr().err
  assert not (tmp_path / "run").exists()
