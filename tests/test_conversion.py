"""`famjax convert`, and Hugging Face directories in place of checkpoints, as a user meets them."""

import dataclasses

import jax
import numpy as np
import pytest

import famjax
from famjax import cli
from famjax.data.vocabularies import load_vocabulary
from famjax.errors import UserError
from tests.convert import tiny

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
    message = "its tokenizer.json cannot be read"
  with pytest.raises(UserError, match=message):
    load_vocabulary(str(tmp_path))
