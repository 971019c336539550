"""SentencePiece models beside the files of a Hugging Face directory, against transformers."""

import io
import json

import pytest
import sentencepiece
import transformers

from famjax.data.vocabularies import encode_text, load_vocabulary
from famjax.errors import UserError

TEXT = "the grass is green"
LLAMA = {"tokenizer_class": "LlamaTokenizer"}


@pytest.fixture(scope="module", name="model")
def _model() -> bytes:
  """A model of 330 pieces in Llama's layout: 0 unknown, 1 begins a text, 2 ends it."""
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter([TEXT, "the sky is blue", "hello world 1234"] * 20),
      model_writer=model, vocab_size=330, hard_vocab_limit=False, model_type="bpe",
      byte_fallback=True, unk_id=0, bos_id=1, eos_id=2, pad_id=-1, minloglevel=2,
      normalization_rule_name="identity", remove_extra_whitespaces=False,
  )  # fmt: skip
  return model.getvalue()


@pytest.fixture(name="directory")
def _directory(tmp_path, model):
  """Writes files beside a model. Returns the directory."""

  def write(**files):
    (tmp_path / "tokenizer.model").write_bytes(model)
    for name, value in files.items():
      (tmp_path / f"{name}.json").write_text(json.dumps(value), encoding="utf-8")
    return tmp_path

  return write


@pytest.mark.parametrize("begins", [True, False, None])
def test_ids_are_those_of_transformers(directory, begins):
  about = LLAMA | ({} if begins is None else {"add_bos_token": begins})
  path = directory(config={"model_type": "llama"}, tokenizer_config=about)
  theirs = transformers.AutoTokenizer.from_pretrained(path)
  ours = load_vocabulary(str(path))
  assert encode_text(ours, TEXT) == theirs(TEXT)["input_ids"]
  assert ours.begin_ids == ([1] if begins else [])


@pytest.mark.parametrize("files, stops, pad", [
    ({}, (2,), 0),
    ({"config": {"eos_token_id": 7, "pad_token_id": 9}}, (7,), 9),
    ({"config": {"eos_token_id": 7}, "generation_config": {"eos_token_id": [2, 7]}}, (2, 7), 0),
    ({"generation_config": {"eos_token_id": [2, 7], "pad_token_id": 3}}, (2, 7), 3),
    ({"config": {"eos_token_id": -1, "pad_token_id": -1}}, (2,), 0),
    ({"tokenizer_config": {"eos_token": "<s>"}}, (1,), 0),
    ({"tokenizer_config": {"eos_token": {"content": "<s>"}}}, (1,), 0),
    ({"tokenizer_config": {"eos_token": "<nowhere>"}}, (2,), 0),
])  # fmt: skip
def test_symbols_of_the_directory_win(directory, files, stops, pad):
  vocabulary = load_vocabulary(str(directory(**files)))
  assert (vocabulary.stop_ids, vocabulary.eos_id, vocabulary.pad_id) == (stops, stops[0], pad)


def test_a_file_without_its_directory_names_its_own_symbols(directory):
  path = directory(config={"eos_token_id": 7}, added_tokens={"<tool>": 400})
  vocabulary = load_vocabulary(str(path / "tokenizer.model"))
  assert vocabulary.stop_ids == (2,) and vocabulary.begin_ids == []


@pytest.mark.parametrize("files", [
    {"added_tokens": {"<tool>": 400}},
    {"added_tokens": {"<tool>": 5}},  # a piece of another name
    {"tokenizer_config": {"added_tokens_decoder": {"400": {"content": "<tool>", "special": True}}}},
])  # fmt: skip
def test_added_tokens_are_refused(directory, files):
  """The model spells them out, and a chat's turns would never end."""
  with pytest.raises(UserError, match="adds the token '<tool>'.*save_pretrained"):
    load_vocabulary(str(directory(**files)))


def test_the_way_out_works(directory):
  about = LLAMA | {"added_tokens_decoder": {"330": {"content": "<tool>", "special": True}}}
  path = directory(config={"model_type": "llama", "eos_token_id": 2}, tokenizer_config=about)
  transformers.AutoTokenizer.from_pretrained(path).save_pretrained(path)
  ids = load_vocabulary(str(path)).encode(f"{TEXT}<tool>")
  assert ids == transformers.AutoTokenizer.from_pretrained(path)(f"{TEXT}<tool>")["input_ids"]
  assert 330 in ids


def test_added_tokens_that_the_model_holds_are_taken(directory):
  decoder = {str(i): {"content": token} for i, token in enumerate(("<unk>", "<s>", "</s>"))}
  path = directory(tokenizer_config=LLAMA | {"added_tokens_decoder": decoder}, added_tokens={"<s>": 1})
  assert load_vocabulary(str(path)).encode(TEXT)


@pytest.mark.parametrize("files, message", [
    ({"added_tokens": {"<tool>": "many"}}, "added_tokens.json: .*Expected int"),
    ({"tokenizer_config": {"added_tokens_decoder": {"x": {"content": "y"}}}}, "added_tokens_decoder"),
    ({"tokenizer_config": {"added_tokens_decoder": {"1": 5}}}, "added_tokens_decoder"),
    ({"tokenizer_config": {"add_bos_token": "yes"}}, "add_bos_token is \"yes\""),
    ({"config": {"eos_token_id": "two"}}, "eos_token_id is \"two\""),
])  # fmt: skip
def test_wrong_values_are_one_line(directory, files, message):
  with pytest.raises(UserError, match=message) as caught:
    load_vocabulary(str(directory(**files)))
  assert "\n" not in str(caught.value)
