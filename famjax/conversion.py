"""`famjax convert`: checkpoints of ours from Hugging Face directories, and back."""

import argparse
import pathlib
import shutil

from famjax.convert import hf
from famjax.data import tokenizers, vocabularies
from famjax.errors import UserError
from famjax.model import lora
from famjax.training import checkpoint, parameters


def convert(arguments: argparse.Namespace) -> int:
  """Makes a famjax checkpoint of a Hugging Face directory, or the other way round."""
  if (arguments.source, arguments.target) not in (("hf", None), (None, "hf")):
    raise UserError("convert goes from or to Hugging Face: --from=hf or --to=hf")
  src, dst = pathlib.Path(arguments.src).absolute(), pathlib.Path(arguments.dst).absolute()
  if dst.exists() and (not dst.is_dir() or any(dst.iterdir())):
    raise UserError(f"{dst} is there already: name a new directory, or an empty one")
  if arguments.source:
    if not hf.is_hf(src):
      raise UserError(f"{src} has no config.json of a Hugging Face model")
    loaded = checkpoint.load_params(src)
    own = checkpoint.OWN_TOKENIZER
    files = _copy_tokenizer(src, dst / own, also=("config.json",))
    vocabulary = own if files else loaded.vocabulary
    checkpoint.save_params(dst, loaded.params, checkpoint.About(loaded.model, vocabulary))
  else:
    loaded = checkpoint.load_params(src)
    files = loaded.vocabulary not in vocabularies.BUILT_IN
    origin = pathlib.Path(loaded.vocabulary)
    if files and not origin.exists():
      raise UserError(f"{src} was trained with the vocabulary {origin}, which is not there: put it back")
    config = origin / "config.json"
    like = tokenizers.read_json(config) if config.is_file() else None
    hf.write(dst, *lora.merge(loaded.params, loaded.model), like)
    _copy_tokenizer(origin, dst)
  if not files:
    print(f"famjax: note: {src} has no tokenizer: its texts are read as {loaded.vocabulary}")
  count = parameters.count(loaded.params)
  print(f"{count:,} parameters of {loaded.model.param_dtype} written to {dst}")
  return 0


def _copy_tokenizer(src: pathlib.Path, dst: pathlib.Path, also: tuple[str, ...] = ()) -> list[str]:
  """Copies a tokenizer's files; returns which there were, none if there is no tokenizer."""
  if src.is_file():  # a SentencePiece model
    shutil.copyfile(src, dst / "tokenizer.model")
    return [src.name]
  files = [name for name in tokenizers.FILES if (src / name).is_file()]
  if not tokenizers.is_in(src):
    return []
  dst.mkdir(parents=True, exist_ok=True)
  for name in (*files, *also):
    shutil.copyfile(src / name, dst / name)
  return files
