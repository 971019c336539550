"""`famjax convert`, and Hugging Face directories in place of checkpoints, as a user meets them."""

import dataclasses
import json
import pathlib
import shutil

from flax import nnx
import jax
import numpy as np
import pytest

import famjax
from famjax import cli
from famjax.data import Lengths, LongText, PairExamples, PassKeyExamples, TaskExamples, tasks
from famjax.data.vocabularies import load_vocabulary, same_vocabulary
from famjax.errors import UserError
from famjax.model.decoder import Decoder
from famjax.training import trainable
from famjax.training.checkpoint import About, load_params, save_params
from famjax.training.train_state import split
from tests.convert import tiny
from tests.data import chats

torch = pytest.importorskip("torch", reason="the extra hf brings torch to Python 3.11 alone")
TEXT = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."


@pytest.fixture(scope="module", name="source")
def _source(tmp_path_factory):
  """A model of transformers with its tokenizer."""
  directory = tmp_path_factory.mktemp("hub") / "model"
  tiny.save("llama", directory, vocab_size=320)
  tiny.save_tokenizer(directory, TEXT)
  return directory


def test_text_is_read_as_transformers_reads_it(source):
  """With the tokenizer's symbol before it; and generated greedily, token for token."""
  import transformers  # pylint: disable=import-outside-toplevel

  tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(source / "tokenizer.json"))
  theirs, ours = tiny.load(source), famjax.load(str(source))
  ids = tokenizer(TEXT)["input_ids"]
  assert ids[0] == 1 and len(ids) < len(TEXT)
  assert ours.vocabulary.begin_ids == [1] and ours.vocabulary.encode(TEXT) == ids[1:]
  assert ours.vocabulary.decode(ids) == TEXT
  assert ours.vocabulary.stop_ids == (2, 3) and ours.vocabulary.eos_id == 2
  with torch.no_grad():
    expected = theirs(torch.tensor([ids])).logits[0, -1]
    written = theirs.generate(torch.tensor([ids]), max_new_tokens=20, do_sample=False)[0, len(ids) :]
  np.testing.assert_allclose(ours.read(TEXT).logits[0], expected, atol=1e-4)
  stream = ours.generate(TEXT, max_new_tokens=20)
  list(stream)
  assert [t for t in written.tolist() if t not in (2, 3)] == stream.tokens and stream.tokens
  more = ours.read(" Again.", ours.read(TEXT))  # nothing is put before a text that goes on
  assert int(more.state.position[0]) == len(ids) + len(ours.vocabulary.encode(" Again."))


def test_there_and_back_by_the_command(source, tmp_path, capsys):
  there, back = tmp_path / "run", tmp_path / "hub"
  assert cli.main(["convert", "--from=hf", f"--src={source}", f"--dst={there}"]) == 0
  assert cli.main(["convert", "--to=hf", f"--src={there}", f"--dst={back}"]) == 0
  count = sum(p.numel() for p in tiny.load(source).parameters())
  assert capsys.readouterr().out.splitlines() == [
      f"{count:,} parameters of float32 written to {place}" for place in (there, back)
  ]
  for name in ("model.safetensors", "tokenizer.json", "generation_config.json"):
    assert (source / name).read_bytes() == (back / name).read_bytes()
  ours = famjax.load(str(there))
  assert ours.vocabulary.path == str(there / "tokenizer")
  np.testing.assert_array_equal(ours.read(TEXT).logits, famjax.load(str(source)).read(TEXT).logits)
  assert tiny.load(back).config.eos_token_id == tiny.load(source).config.eos_token_id


def test_a_model_of_the_hub_gets_a_memory(source):
  """A FAM's prompt is drawn from the embedding, and text of any length can be read."""
  memory = famjax.MemoryConfig("fam", block_size=8, memory_segments=1, fam_length=2)
  model = famjax.load(str(source), memory)
  embedding = np.asarray(model.decoder.embedder.embedding[...])
  for vector in np.asarray(model.fam_prompt):
    assert (embedding == vector).all(axis=1).any()
  assert np.isfinite(model.read(TEXT * 20).logits).all()


def test_full_attention_has_room_for_so_many_tokens(source):
  model = famjax.load(str(source))
  assert model.config.memory.context == 512
  tokens = np.full(500, 7)
  reading = model.read(tokens)
  with pytest.raises(UserError, match="513 tokens are more than the 512 that full attention has"):
    model.generate([7] * 3, state=reading, max_new_tokens=10)
  for call in (model.read, model.score):
    with pytest.raises(UserError, match="600 tokens are more than the 512.*give the model a memory"):
      call(np.full(100, 7), reading)
  with pytest.raises(UserError, match="600 tokens are more"):
    model(np.full((1, 600), 7), model.init_state())
  with pytest.raises(UserError, match="600 tokens are more"):
    model.decoder(np.full((1, 600), 7))


def test_a_session_of_layers_of_several_kinds(tmp_path):
  """A configuration with tuples in it goes through JSON."""
  from famjax.inference import session  # pylint: disable=import-outside-toplevel

  tiny.save("gemma2", tmp_path / "hub", vocab_size=320)
  tiny.save_tokenizer(tmp_path / "hub", TEXT)
  model = famjax.load(str(tmp_path / "hub"))
  reading = model.read(TEXT)
  session.save(tmp_path / "s", reading, model)
  jax.tree.map(np.testing.assert_array_equal, session.load(tmp_path / "s", model), reading)
  cli.main(["convert", "--from=hf", f"--src={tmp_path / 'hub'}", f"--dst={tmp_path / 'run'}"])
  again = famjax.load(str(tmp_path / "run"))
  assert dataclasses.replace(again.config, memory=model.config.memory) == model.config


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--src=hub", "--dst=new"], "--from=hf or --to=hf"),
        (["--from=hf", "--to=hf", "--src=hub", "--dst=new"], "--from=hf or --to=hf"),
        (["--from=hf", "--src=nowhere", "--dst=new"], "nowhere has no config.json"),
        (["--from=hf", "--src=hub", "--dst=hub"], "hub is there already: name a new directory"),
        (["--to=hf", "--src=nowhere", "--dst=new"], "no famjax checkpoint can be read at"),
        (["--from=hf", "--src=hub", "--dst=new", "--gin.A=1"], "convert is not configured by gin"),
    ],
)
def test_wrong_input_is_one_line_and_nothing_is_written(
    source, arguments, message, tmp_path, monkeypatch, capsys
):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "hub").symlink_to(source)
  assert cli.main(["convert", *arguments]) == 2
  shown = capsys.readouterr()
  assert message in shown.err and shown.err.count("\n") == 1 and not shown.out
  assert [path.name for path in tmp_path.iterdir()] == ["hub"]


@pytest.mark.parametrize("what", ["no end", "no JSON"])
def test_tokenizers_that_cannot_be_used(what, tmp_path):
  tiny.save_tokenizer(tmp_path, TEXT)
  if what == "no end":
    (tmp_path / "generation_config.json").unlink()
    message = "no eos_token_id is named; add it to config.json"
  else:
    (tmp_path / "tokenizer.json").write_text("{")
    message = "tokenizer.json cannot be read"
  with pytest.raises(UserError, match=message):
    load_vocabulary(str(tmp_path))


def test_a_converted_model_can_be_moved(source, tmp_path):
  cli.main(["convert", "--from=hf", f"--src={source}", f"--dst={tmp_path / 'run'}"])
  (tmp_path / "run").rename(tmp_path / "moved")
  moved = famjax.load(str(tmp_path / "moved"))
  assert moved.vocabulary.path == str(tmp_path / "moved" / "tokenizer")
  assert famjax.load(str(tmp_path / "moved" / "checkpoints" / "0")).vocabulary is moved.vocabulary
  name = str(tmp_path / "moved" / "tokenizer")
  assert same_vocabulary(name, str(source)) and not same_vocabulary(name, "bytes")


def test_a_chat_template_goes_along(source, tmp_path, monkeypatch, capsys):
  """From the hub to a run, where a chat reads what it renders, and back."""
  hub, run, back = (str(tmp_path / name) for name in ("hub", "run", "back"))
  shutil.copytree(source, hub)
  chats.save(pathlib.Path(hub), chats.GEMMA)
  cli.main(["convert", "--from=hf", f"--src={hub}", f"--dst={run}"])
  cli.main(["convert", "--to=hf", f"--src={run}", f"--dst={back}"])
  text = load_vocabulary(hub).render([{"role": "user", "content": "Hello."}])
  assert text.startswith("<s><start_of_turn>user")
  assert load_vocabulary(back).render([{"role": "user", "content": "Hello."}]) == text
  typed = iter(["Hello.", "/memory", "/quit"])
  monkeypatch.setattr("builtins.input", lambda _: next(typed))
  assert cli.main(["chat", run, "--max_new_tokens=0"]) == 0
  read = len(load_vocabulary(hub).encode(text))
  assert f"tokens read     {read}\n" in capsys.readouterr().out


def test_a_model_without_a_tokenizer_reads_bytes_and_says_so(tmp_path, capsys):
  tiny.save("llama", tmp_path / "hub", vocab_size=300)
  cli.main(["convert", "--from=hf", f"--src={tmp_path / 'hub'}", f"--dst={tmp_path / 'run'}"])
  assert "hub has no tokenizer: its texts are read as bytes" in capsys.readouterr().out
  for place in ("hub", "run"):
    assert famjax.load(str(tmp_path / place)).vocabulary is load_vocabulary("bytes")


def test_an_export_needs_its_tokenizer(source, tmp_path, capsys):
  run = tmp_path / "run"
  cli.main(["convert", "--from=hf", f"--src={source}", f"--dst={run}"])
  (run / "tokenizer").rename(tmp_path / "elsewhere")
  assert cli.main(["convert", "--to=hf", f"--src={run}", f"--dst={tmp_path / 'hub'}"]) == 2
  assert "tokenizer, which is not there: put it back" in capsys.readouterr().err
  assert not (tmp_path / "hub").exists()


def test_lora_is_exported_merged(source, tmp_path):
  """With an alpha and targets of its own, which no family of transformers has."""
  cli.main(["convert", "--from=hf", f"--src={source}", f"--dst={tmp_path / 'run'}"])
  loaded = load_params(tmp_path / "run")
  config = dataclasses.replace(
      loaded.model, lora_rank=2, lora_alpha=6.0, lora_targets=("query", "down")
  )
  draw = np.random.default_rng(0)
  fresh = split(Decoder(config, rngs=nnx.Rngs(0)))[1]
  factors = jax.tree.map(
      lambda x: 0.1 * draw.standard_normal(x.shape).astype(np.float32),
      trainable.part(fresh, "lora")[0],
  )
  params = trainable.join(loaded.params, factors)
  about = About(config, loaded.vocabulary)
  save_params(tmp_path / "lora", params, about)
  assert cli.main(["convert", "--to=hf", f"--src={tmp_path / 'lora'}", f"--dst={tmp_path / 'out'}"]) == 0
  ours = famjax.load(str(tmp_path / "lora")).read(TEXT).logits
  plain = famjax.load(str(source)).read(TEXT).logits
  assert np.abs(ours - plain).max() > 0.1
  np.testing.assert_allclose(famjax.load(str(tmp_path / "out")).read(TEXT).logits, ours, atol=1e-4)


def test_texts_to_train_on_begin_as_texts_to_read_do(source, tmp_path):
  vocabulary = load_vocabulary(str(source))
  first = lambda given: (given.example(0, 0, 0)[0][:2].tolist(), given.example(0, 0, 0)[1][0])
  begin = lambda text: [1, vocabulary.encode(text)[0]]
  assert first(PairExamples([(TEXT, "Again.")], vocabulary)) == (begin(TEXT), 0)
  assert first(PassKeyExamples(vocabulary, Lengths(400, 400))) == (begin("There is"), 0)
  (tmp_path / "a.txt").write_text(TEXT * 9)
  assert first(LongText(vocabulary, tmp_path)) == (begin(TEXT), 0)
  tokens, weights = LongText(vocabulary, tmp_path, excerpt_tokens=20).example(0, 0, 0)
  assert tokens[0] == 1 and len(tokens) == len(weights) == 20 and weights.tolist() == [0] + [1] * 19
  (tmp_path / "a.txt").write_text("hello")
  for size in (100, None):  # a file that is shorter comes whole, with its end
    tokens, _ = LongText(vocabulary, tmp_path, excerpt_tokens=size).example(0, 0, 0)
    assert tokens.tolist() == [1, *vocabulary.encode("hello"), vocabulary.eos_id]
  tasks.register_passkey(vocabulary, Lengths(400, 400))
  try:
    tokens, weights = TaskExamples("passkey").example(0, 0, 0)
  finally:
    tasks.register_passkey()
  assert tokens.tolist()[:2] == begin("There is") and tokens.tolist().count(1) == 1
  assert weights[0] == 0


def test_a_tokenizer_that_puts_a_space_before_every_text(tmp_path):
  """Llama 2's: texts that are encoded apart join as if they were one."""
  tiny.save_tokenizer(tmp_path, TEXT, adds_space=True)
  vocabulary = load_vocabulary(str(tmp_path))
  whole = vocabulary.encode(TEXT + TEXT[:20])
  assert whole == [*vocabulary.encode(TEXT[:12]), *vocabulary.encode(TEXT[12:] + TEXT[:20])]
  assert TEXT[12] == " " and vocabulary.decode(whole).lstrip() == TEXT + TEXT[:20]


def test_a_tokenizer_with_more_ids_than_its_model(tmp_path):
  """Gemma 3's has an image's, which its text models have no row for."""
  tiny.save_tokenizer(tmp_path, TEXT)
  size = load_vocabulary(str(tmp_path)).vocab_size
  (tmp_path / "two").mkdir()
  tiny.save_tokenizer(tmp_path / "two", TEXT)
  (tmp_path / "two" / "config.json").write_text(json.dumps({"vocab_size": size - 1}))
  assert load_vocabulary(str(tmp_path / "two")).vocab_size == size - 1
