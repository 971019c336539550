"""Tokenizers of directories: ids, symbols, and files that strangers wrote."""

import json
import subprocess
import sys
import threading

import numpy as np
import pytest

from famjax.data import tokenizer_files
from famjax.data.tokenizers import TokenizerVocabulary
from famjax.data.vocabularies import encode_text, load_vocabulary
from famjax.errors import UserError
from tests.data import vocabulary_kinds as kinds
from tests.mutations import mutations, survives

pytest.importorskip("tokenizers", reason="the core runs without it")
MESSAGES = [{"role": "user", "content": "x"}]


def processor(*names, before=1):
  """A post-processor that puts symbols around a text."""
  ids = {"<s>": 1, "</s>": 2, "<tool>": 5}
  single = [{"SpecialToken": {"id": name, "type_id": 0}} for name in names]
  single.insert(before, {"Sequence": {"id": "A", "type_id": 0}})
  special = {name: {"id": name, "ids": [ids[name]], "tokens": [name]} for name in names}
  return kinds._TEMPLATE | {"single": single, "special_tokens": special}


def save(path, tokenizer=None, **config):
  return kinds.save(path, tokenizer or kinds.document(kinds.DECODERS["gemma"]), **config)


@pytest.mark.parametrize(
    "names, before, begin",
    [
        (["</s>"], 1, [2]),  # begins with the symbol that ends a text, as GPT-2's and OPT's do
        (["<s>", "</s>"], 1, [1]),
        (["</s>", "</s>"], 1, [2]),
        (["</s>"], 0, []),
        (["<s>", "</s>", "</s>"], 2, [1, 2]),
    ],
)
def test_the_symbols_before_a_text(tmp_path, names, before, begin):
  transformers = pytest.importorskip("transformers", reason="the extra hf brings it")
  document = kinds.document(kinds.DECODERS["gemma"], post_processor=processor(*names, before=before))
  vocabulary = TokenizerVocabulary(save(tmp_path, document))
  assert vocabulary.begin_ids == begin
  theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
  ids, after = theirs("is x")["input_ids"], len(names) - before
  assert encode_text(vocabulary, "is x") == ids[: len(ids) - after]


def test_ids_with_holes(tmp_path):
  """The size is the largest id and one more, of the model's own tokens and of added ones."""
  document = kinds.document(kinds.DECODERS["gemma"])
  size = TokenizerVocabulary(save(tmp_path / "a", document)).vocab_size
  document["model"]["vocab"]["zz"] = 399 + size
  document["added_tokens"].append(document["added_tokens"][-1] | {"id": 400 + size, "content": "<far>"})
  vocabulary = TokenizerVocabulary(save(tmp_path / "b", document))
  ids = vocabulary._tokenizer.get_vocab()
  assert vocabulary.vocab_size == max(ids.values()) + 1 >= 400 + size > len(ids)
  assert vocabulary.decode([399 + size]) == "zz"
  text = "<far>"
  assert vocabulary.decode(vocabulary.encode(text)) == text
  assert max(vocabulary.encode(text)) < vocabulary.vocab_size


def test_tokens_that_the_model_has_not(tmp_path):
  """Gemma 3's text models have one fewer than their tokenizers."""
  document = kinds.document(kinds.DECODERS["gemma"])
  image = document["added_tokens"][3]["id"]
  document["added_tokens"][3]["content"] = "<image>"
  document["model"]["vocab"] = {k: v for k, v in document["model"]["vocab"].items() if v < image}
  document["model"]["merges"] = []
  document["added_tokens"].pop()
  vocabulary = TokenizerVocabulary(save(tmp_path, document, vocab_size=image))
  assert (vocabulary.outside, vocabulary.vocab_size) == ({"<image>": image}, image)
  assert vocabulary.decode(vocabulary.encode("the sky")) == "the sky"
  message = f"the token {image} .'<image>'., and the model's ids end at {image - 1}: .*--resize_vocabulary"
  with pytest.raises(UserError, match=message):
    vocabulary.encode("an <image>")
  nested = save(tmp_path / "nested", document, text_config={"vocab_size": image})
  assert TokenizerVocabulary(nested).outside == {"<image>": image}


def test_ids_in_several_files(tmp_path):
  path = tmp_path / "a"
  save(path, eos_token_id=2, pad_token_id=0)
  (path / "generation_config.json").write_text('{"eos_token_id": [3, 2], "pad_token_id": null}')
  vocabulary = TokenizerVocabulary(str(path))
  assert (vocabulary.stop_ids, vocabulary.eos_id, vocabulary.pad_id) == ((3, 2), 3, 0)
  (path / "generation_config.json").unlink()
  (path / "config.json").write_text("{}")
  (path / "tokenizer_config.json").write_text('{"eos_token": {"content": "</s>"}}')
  assert TokenizerVocabulary(str(path)).stop_ids == (2,)


def replace(old, new, kind="String"):
  return dict(type="Replace", pattern={kind: old}, content=new)


def chain(*normalizers):
  return dict(type="Sequence", normalizers=list(normalizers))


@pytest.mark.parametrize(
    "part, value, message",
    [
        ("normalizer", chain(*[replace("a", "aa")] * 40), "makes a text up to 1.1e.12 times as long"),
        ("normalizer", chain(*[replace("(?=a)", "a", "Regex")] * 40), "its normalizer makes a text"),
        ("normalizer", chain(chain(*[replace("", "ab")] * 9)), "its normalizer makes a text"),
        ("normalizer", dict(type="Prepend", prepend="a" * 2**20), "a string of 1,048,576 characters"),
        ("normalizer", chain(*[dict(type="NFC")] * 300), "more than 256 parts"),
        ("normalizer", chain(*[dict(type="ByteLevel")] * 20), "makes a text up to"),
        ("decoder", dict(type="Sequence", decoders=[replace("a", "a" * 9)] * 9), "its decoder makes"),
        ("post_processor", processor("<s>", *["<tool>"] * 99), "writes 1 texts and 100 symbols"),
        (
            "post_processor",
            kinds._TEMPLATE | {"single": [{"Sequence": {"id": "A", "type_id": 0}}] * 2},
            "writes 2 texts",
        ),
        (
            "pre_tokenizer",
            dict(type="Split", pattern={"Regex": "(" * 3 + "a" + "{1,999})" * 3}, behavior="Isolated", invert=False),
            "the regular expression",
        ),
        ("model", {"type": "WordPiece", "max_input_chars_per_word": 10**9}, "max_input_chars_per_word"),
        ("added_tokens", [{"id": 10**9, "content": "a"}], "added_tokens.0..id is 1000000000"),
        ("added_tokens", [{"id": -1, "content": "a"}], "added_tokens"),
    ],
)
def test_tokenizers_that_multiply_texts_are_refused(tmp_path, part, value, message):
  document = kinds.document(kinds.DECODERS["gemma"])
  document[part] = document[part] | value if part == "model" else value
  with pytest.raises(UserError, match=message) as error:
    TokenizerVocabulary(save(tmp_path, document))
  assert "tokenizer.json" in str(error.value) and "\n" not in str(error.value)


def test_normalizers_of_published_tokenizers_are_taken():
  """ALBERT's and XLM-RoBERTa's parts, and chains that do not multiply."""
  quotes = [replace("``", '"'), replace("''", '"'), replace(" {2,}", " ", "Regex")]
  parts = [*quotes, dict(type="NFKD"), dict(type="StripAccents"), dict(type="Lowercase"), replace(" ", kinds.SPACE)]
  assert tokenizer_files._growth(parts) <= 3
  assert tokenizer_files._growth([dict(type="Prepend", prepend=kinds.SPACE), replace(" ", kinds.SPACE)]) <= 3


def test_a_regular_expression_that_gives_up_is_one_line(tmp_path):
  """The library panics there, which `except Exception` does not catch."""
  document = kinds.document(kinds.DECODERS["gemma"])
  document["pre_tokenizer"] = dict(
      type="Split", pattern={"Regex": "(a+)+$"}, behavior="Isolated", invert=False
  )
  vocabulary = TokenizerVocabulary(save(tmp_path / "a", document))
  assert vocabulary.decode(vocabulary.encode("the a")) == "the a"
  assert survives(lambda: vocabulary.encode("a" * 60 + "b")) is False
  document = kinds.document(
      kinds._sequence(replace("(a+)+$", "-", "Regex"), dict(type="Fuse"))
  )
  document["model"]["vocab"]["a" * 60 + "b"] = 900
  vocabulary = TokenizerVocabulary(save(tmp_path / "b", document))
  assert survives(lambda: vocabulary.decode([900])) is False
  decoder = vocabulary.decoder()
  assert survives(lambda: decoder.push(900)) is False


def test_what_takes_too_long_ends(monkeypatch):
  monkeypatch.setattr(tokenizer_files, "_SECONDS", 0.05)
  stop = threading.Event()
  with pytest.raises(UserError, match="^here: the tokenizer takes more than 0 s"):
    tokenizer_files.watched(stop.wait, "here")
  stop.set()
  assert tokenizer_files.watched(lambda: 3, "here") == 3
  with pytest.raises(KeyError):
    tokenizer_files.watched(lambda: {}["a"], "here")


FILES = {
    "tokenizer_config": {
        "bos_token": {"content": "<s>"}, "eos_token": "</s>", "pad_token": None,
        "added_tokens_decoder": {"1": {"content": "<s>", "special": True}},
        "chat_template": [{"name": "default", "template": "{{ bos_token }}{{ messages[0].content }}"}],
    },
    "special_tokens_map": {"bos_token": "<s>", "eos_token": {"content": "</s>"}},
    "generation_config": {"eos_token_id": [2, 3], "pad_token_id": 0, "bos_token_id": 1},
    "config": {"vocab_size": 340, "eos_token_id": 2, "pad_token_id": 0, "text_config": {"vocab_size": 9}},
}  # fmt: skip


def dumped(document):
  """JSON of values that are nested deeply, too."""
  limit = sys.getrecursionlimit()
  sys.setrecursionlimit(50_000)
  try:
    return json.dumps(document)
  finally:
    sys.setrecursionlimit(limit)


@pytest.mark.parametrize("name", FILES)
def test_wrong_values_beside_a_tokenizer(name, tmp_path):
  path, fine = tmp_path / "a", 0
  save(path)
  for known, document in FILES.items():
    (path / f"{known}.json").write_text(json.dumps(document))

  def act():
    vocabulary = TokenizerVocabulary(str(path))
    vocabulary.encode("the sky")
    if vocabulary.chat_template:
      vocabulary.render(MESSAGES)

  for broken in mutations(FILES[name], 250, seed=len(name)):
    (path / f"{name}.json").write_text(dumped(broken))
    fine += survives(act, broken)
  assert 0 < fine < 250 or name == "special_tokens_map"


def test_wrong_values_in_a_tokenizer(tmp_path):
  """Parts of every kind, one after another, with few pieces."""
  documents = [
      kinds.document(kinds.DECODERS[decoder], normalizer, pre, ["a", "b", kinds.SPACE], processor("<s>"))
      for decoder, normalizer, pre in (
          ("llama", kinds._LLAMA, None),
          ("metaspace", chain(replace("a", "b", "Regex"), dict(type="NFKC"), dict(type="Strip", strip_left=True, strip_right=True)), kinds._metaspace("first")),
          ("byte level", None, kinds.DECODERS["byte level"]),
          ("wordpiece", dict(type="BertNormalizer", clean_text=True, handle_chinese_chars=True, strip_accents=None, lowercase=True), dict(type="BertPreTokenizer")),
      )
  ]  # fmt: skip
  fine = 0
  for number, document in enumerate(documents):
    vocab = document["model"]["vocab"]  # few pieces, so that the other parts are hit
    document["model"]["vocab"] = {k: v for k, v in vocab.items() if not k.startswith("<0x")}
    document["model"]["merges"] = []
    for broken in mutations(document, 250, seed=number):
      (tmp_path / "tokenizer.json").write_text(dumped(broken))
      (tmp_path / "config.json").write_text('{"eos_token_id": 2}')

      def act():
        vocabulary = TokenizerVocabulary(str(tmp_path))
        ids = encode_text(vocabulary, "the a  b\u65e5" * 9)
        assert vocabulary.decode([*ids, 10**6, -1]) == _joined(vocabulary, ids)

      fine += survives(act, broken)
  assert 0 < fine < 1000


def _joined(vocabulary, ids):
  decoder = vocabulary.decoder()
  return "".join(map(decoder.push, ids)) + decoder.end()


def test_panics_do_not_end_a_process(tmp_path):
  """Not even in a thread: the line is the last one on standard error."""
  document = kinds.document(kinds.DECODERS["gemma"])
  document["pre_tokenizer"] = dict(
      type="Split", pattern={"Regex": "(a+)+$"}, behavior="Isolated", invert=False
  )
  code = (
      "import sys; from famjax.data.tokenizers import TokenizerVocabulary as V\n"
      "try: V(sys.argv[1]).encode('a' * 60 + 'b')\n"
      "except ValueError as error: print(error)"
  )
  command = [sys.executable, "-c", code, save(tmp_path, document)]
  result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
  assert "the tokenizers library gives up" in result.stdout


def test_numbers_of_numpy_are_tokens(tmp_path):
  vocabulary = TokenizerVocabulary(save(tmp_path))
  ids = vocabulary.encode("the sky")
  assert vocabulary.decode(np.asarray(ids, np.int32)) == "the sky"
  assert _joined(vocabulary, np.asarray(ids, np.int32)) == "the sky"


@pytest.mark.parametrize("name", [
    "tokenizer.json", "config.json", "generation_config.json", "tokenizer_config.json",
    "chat_template.jinja", "special_tokens_map.json",
])  # fmt: skip
def test_a_link_out_of_the_directory_is_refused(tmp_path, name):
  """Somebody else's directory cannot name files of this machine."""
  place, secret = tmp_path / "model", tmp_path / "secret"
  save(place)
  secret.mkdir()
  target = secret / name
  target.write_text((place / name).read_text() if (place / name).exists() else "{}")
  (place / name).unlink(missing_ok=True)
  (place / name).symlink_to(target)
  with pytest.raises(UserError, match="is a link to .*, which is outside of") as refused:
    load_vocabulary.__wrapped__(str(place)).chat_template  # pylint: disable=expression-not-assigned
  assert len(str(refused.value).splitlines()) == 1
