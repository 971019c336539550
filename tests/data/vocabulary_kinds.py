"""Small vocabularies of every kind that the project reads, for laws that hold for all of them."""

import functools
import json
import pathlib
import tempfile

import sentencepiece

from famjax.data.vocabularies import load_vocabulary, Vocabulary

SPACE = "\u2581"
_WORDS = ("the", "sky", "is", "blue", "x", "re", "turn", "##ing", "ing</w>", "a</w>", ".", "n't", "'")
_PIECES = [
    *"abcdefghijklmnopqrstuvwxyz.()':\n\u00e9", SPACE, *(SPACE * n for n in (2, 3, 4)),
    *(SPACE + word for word in ("the", "is", "in", "x")), *_WORDS, "<pad>", "|", "\u0120", "\u65e5",
]  # fmt: skip
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
SPECIAL = ["<unk>", "<s>", "</s>"]
TOOL = "<tool>"  # an added token that is special, and <note> one that is not

_REPLACE = dict(type="Replace", pattern={"String": SPACE}, content=" ")
_STRIP = dict(type="Strip", content=" ", start=1, stop=0)
_FUSE, _FALLBACK = dict(type="Fuse"), dict(type="ByteFallback")
_PREPEND = dict(type="Prepend", prepend=SPACE)


def _sequence(*parts):
  return dict(type="Sequence", decoders=list(parts))


def _metaspace(scheme):
  return dict(type="Metaspace", replacement=SPACE, prepend_scheme=scheme, split=False)


_LLAMA = dict(type="Sequence", normalizers=[_PREPEND, _REPLACE | dict(pattern={"String": " "}, content=SPACE)])
_GEMMA = dict(type="Replace", pattern={"String": " "}, content=SPACE)
DECODERS = {
    "llama": _sequence(_REPLACE, _FALLBACK, _FUSE, _STRIP),
    "gemma": _sequence(_REPLACE, _FALLBACK, _FUSE),
    "both ends": _sequence(_REPLACE, _FALLBACK, _FUSE, dict(type="Strip", content=" ", start=0, stop=2)),
    "fused first": _sequence(_FALLBACK, _FUSE, _REPLACE, _STRIP),
    "two letters": _sequence(_FUSE, dict(type="Replace", pattern={"String": "aab"}, content="!")),
    "regex": _sequence(dict(type="Replace", pattern={"Regex": "[ab]+"}, content="-"), _FALLBACK, _FUSE),
    "metaspace": _metaspace("always"),
    "first": _metaspace("first"),
    "never": _metaspace("never"),
    "metaspace and bytes": _sequence(_FALLBACK, _metaspace("always")),
    "byte level": dict(type="ByteLevel", add_prefix_space=True, trim_offsets=True, use_regex=True),
    "wordpiece": dict(type="WordPiece", prefix="##", cleanup=True),
    "wordpiece as it is": dict(type="WordPiece", prefix="##", cleanup=False),
    "bpe": dict(type="BPEDecoder", suffix="</w>"),
    "ctc": dict(type="CTC", pad_token="<pad>", word_delimiter_token="|", cleanup=True),
    "none": None,
    # Needs the whole text at once.
    "whole": _sequence(_FUSE, dict(type="Replace", pattern={"Regex": "^.*$"}, content="?")),
}


def document(decoder=None, normalizer=None, pre_tokenizer=None, pieces=None, post_processor=None):
  """Returns a tokenizer.json as Python values: a Unigram-free BPE with one piece a character."""
  vocabulary = [*SPECIAL, *_BYTES, *(pieces or dict.fromkeys(_PIECES))]
  vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(vocabulary))}
  size = len(vocabulary)
  merges = [SPACE + " " + SPACE, SPACE * 2 + " " + SPACE * 2, "i s", SPACE + " x"]
  vocabulary |= {m.replace(" ", ""): size + 2 + n for n, m in enumerate(merges) if m.replace(" ", "") not in vocabulary}
  flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False)
  added = [(name, vocabulary[name], True) for name in SPECIAL] + [(TOOL, size, True), ("<note>", size + 1, False)]
  return dict(
      version="1.0", truncation=None, padding=None, normalizer=normalizer,
      added_tokens=[dict(id=i, content=name, special=special, **flags) for name, i, special in added],
      pre_tokenizer=pre_tokenizer, post_processor=post_processor, decoder=decoder,
      model=dict(
          type="BPE", dropout=None, unk_token="<unk>", continuing_subword_prefix=None,
          end_of_word_suffix=None, fuse_unk=True, byte_fallback=True, ignore_merges=False,
          vocab=vocabulary, merges=merges,
      ),
  )  # fmt: skip


def save(directory: pathlib.Path, tokenizer, **config) -> str:
  """Writes a directory of the hub with a tokenizer alone, and returns its path."""
  directory.mkdir(parents=True, exist_ok=True)
  (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
  (directory / "config.json").write_text(json.dumps({"eos_token_id": 2} | config))
  return str(directory)


@functools.cache
def _folder() -> pathlib.Path:
  folder = tempfile.TemporaryDirectory()
  _folders.append(folder)  # goes away with the process
  return pathlib.Path(folder.name)


_folders = []


@functools.cache
def decoding_kind(name: str) -> Vocabulary:
  """Returns a tokenizer with one of `DECODERS`."""
  return load_vocabulary(save(_folder() / name.replace(" ", "_"), document(DECODERS[name])))


# Tokenizers that put a space before a text, or do not, by every means.
_TEMPLATE = dict(
    type="TemplateProcessing", single=[{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    pair=[{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    special_tokens={"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
)  # fmt: skip
ENCODERS = {
    "prepend": dict(normalizer=_LLAMA, decoder=DECODERS["llama"]),
    "gemma": dict(normalizer=_GEMMA, decoder=DECODERS["gemma"]),
    "metaspace first": dict(pre_tokenizer=_metaspace("first"), decoder=DECODERS["llama"]),
    "metaspace always": dict(pre_tokenizer=_metaspace("always"), decoder=DECODERS["llama"]),
    "metaspace never": dict(pre_tokenizer=_metaspace("never"), decoder=DECODERS["gemma"]),
    "metaspace decoder": dict(
        pre_tokenizer=_metaspace("first"), decoder=_sequence(_FALLBACK, _metaspace("first"))
    ),
}


@functools.cache
def encoding_kind(name: str, begins: bool = True) -> Vocabulary:
  """Returns a tokenizer with one of `ENCODERS`; `<s>` begins its texts."""
  template = _TEMPLATE if begins else None
  return load_vocabulary(
      save(_folder() / f"{name}-{begins}".replace(" ", "_"), document(post_processor=template, **ENCODERS[name]))
  )


@functools.cache
def byte_level(adds_space: bool) -> Vocabulary:
  """Returns a byte-level BPE tokenizer."""
  from tests.convert import tiny  # pylint: disable=g-import-not-at-top

  path = _folder() / f"byte-level-{adds_space}"
  tiny.save_tokenizer(path, "The sky is blue. def f(x):\n    return x", adds_space)
  return load_vocabulary(str(path))


@functools.cache
def unigram(split_words: bool = True) -> Vocabulary:
  """Returns a Unigram tokenizer as T5 has it: spaces at the ends go away, words get theirs."""
  spaces = [dict(type="WhitespaceSplit")] if split_words else []
  tokenizer = document(_metaspace("always"), pre_tokenizer=dict(
      type="Sequence", pretokenizers=[*spaces, _metaspace("always")]
  ))  # fmt: skip
  pieces = [*SPECIAL, *(p for p in _PIECES if p not in SPECIAL and len(p) == 1), SPACE + "the", SPACE + "is"]
  tokenizer["model"] = dict(
      type="Unigram", unk_id=0, byte_fallback=False,
      vocab=[[piece, -2.0 - (len(piece) == 1)] for piece in dict.fromkeys(pieces)],
  )  # fmt: skip
  tokenizer["added_tokens"] = tokenizer["added_tokens"][:3]
  return load_vocabulary(save(_folder() / f"unigram-{split_words}", tokenizer))


@functools.cache
def pieces(**options) -> Vocabulary:
  """Returns a SentencePiece model with byte tokens."""
  name = "-".join(f"{k}-{v}" for k, v in options.items()) or "plain"
  sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter(["the sky is blue, and x is y.", "def f(x):", "return x"] * 20),
      model_prefix=str(_folder() / name), vocab_size=310, byte_fallback=True, minloglevel=2,
      hard_vocab_limit=False, user_defined_symbols=[TOOL], **options,
  )  # fmt: skip
  return load_vocabulary(str(_folder() / f"{name}.model"))


KINDS = {
    "bytes": lambda: load_vocabulary("bytes"),
    "words": lambda: load_vocabulary("passkey_words"),
    "pieces": pieces,
    "pieces, no prefix": lambda: pieces(add_dummy_prefix=False),
    "pieces, all spaces": lambda: pieces(remove_extra_whitespaces=False),
    "pieces, as they are": lambda: pieces(add_dummy_prefix=False, remove_extra_whitespaces=False),
    "trained byte level": lambda: byte_level(True),
    "unigram": unigram,
} | {name: functools.partial(decoding_kind, name) for name in DECODERS}
