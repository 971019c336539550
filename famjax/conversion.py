"""`famjax convert`: checkpoints of ours from Hugging Face models and PEFT adapters, and back."""

import argparse
import json
import pathlib
import re
import shutil

from flax import traverse_util

from famjax import locks
from famjax.convert import directories, hf, peft
from famjax.data import tokenizers, vocabularies
from famjax.errors import UserError
from famjax.formats import inside, read_json
from famjax.model import lora
from famjax.model.config import MEMORY_WEIGHTS, ModelConfig
from famjax.training import adoption, checkpoint, parameters

_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


def convert(arguments: argparse.Namespace) -> int:
  """Makes a famjax checkpoint of a Hugging Face model or a PEFT adapter, or the other way round."""
  way = _WAYS.get((arguments.source, arguments.target))
  if way is None:
    raise UserError(
        "convert goes from or to Hugging Face: --from=hf or --to=hf; LoRA alone: --from=peft or"
        " --to=peft"
    )
  if arguments.base and "peft" not in (arguments.source, arguments.target):
    raise UserError("--base is what LoRA alone is added to: it goes with --from=peft or --to=peft")
  if arguments.resize_vocabulary and arguments.source != "hf":
    raise UserError("--resize_vocabulary goes with --from=hf")
  if arguments.allow_nonfinite and "hf" not in (arguments.source, arguments.target):
    raise UserError("--allow_nonfinite goes with --from=hf or --to=hf")
  src, dst = pathlib.Path(arguments.src).absolute(), pathlib.Path(arguments.dst).absolute()
  if dst.exists() and not dst.is_dir():
    raise UserError(f"{dst} is a file: name a new directory, or an empty one")
  with locks.held(dst, "directory"):
    if not all(locks.is_lock(path.name) for path in dst.iterdir()):
      raise UserError(f"{dst} is there already: name a new directory, or an empty one")
    count, dtype = way(src, dst, arguments)
  print(f"{count:,} parameters of {dtype} written to {dst}")
  return 0


def _from_hf(
    src: pathlib.Path, dst: pathlib.Path, arguments: argparse.Namespace
) -> tuple[int, str]:
  if not hf.is_hf(src):
    directories.refuse(src)
    raise UserError(f"{src} has no config.json of a Hugging Face model")
  params, model = hf.read(
      src,
      allow_nonfinite=arguments.allow_nonfinite,
      resize_vocabulary=arguments.resize_vocabulary,
  )
  result = _save(dst, params, model, str(src) if tokenizers.is_in(src) else "bytes", src)
  rows = read_json(inside(src, "config.json"))["vocab_size"]
  if model.vocab_size != rows:
    _write_vocabulary_size(dst, model.vocab_size)
    print(
        f"famjax: note: the vocabulary grew from {rows} to {model.vocab_size} ids: each new row is"
        " the mean of the old ones"
    )
  return result


def _write_vocabulary_size(dst: pathlib.Path, size: int) -> None:
  """Sets the vocabulary's size in the config.json that stands beside a copied tokenizer."""
  config = dst / checkpoint.OWN_TOKENIZER / "config.json"
  if config.is_file():
    config.write_text(json.dumps(read_json(config) | {"vocab_size": size}, indent=2) + "\n")


def _to_hf(
    src: pathlib.Path, dst: pathlib.Path, arguments: argparse.Namespace
) -> tuple[int, str]:
  loaded = checkpoint.load_params(src, allow_nonfinite=arguments.allow_nonfinite)
  origin = _tokenizer(loaded.vocabulary, src)
  config = inside(origin, "config.json") if origin and origin.is_dir() else None
  like = read_json(config) if config and config.is_file() else None
  hf.write(dst, *lora.merge(loaded.params, loaded.model), like)
  if origin:
    _copy_tokenizer(origin, dst)
  else:
    _say_no_tokenizer(src, loaded.vocabulary)
  return parameters.count(loaded.params), loaded.model.param_dtype


def _from_peft(
    src: pathlib.Path, dst: pathlib.Path, arguments: argparse.Namespace
) -> tuple[int, str]:
  base = arguments.base
  if not base:
    raise UserError("--from=peft needs --base, the model that the adapter was made for")
  loaded = checkpoint.load_params(base)
  params, model = peft.read(src, loaded.params, loaded.model)
  return _save(dst, params, model, loaded.vocabulary, pathlib.Path(base))


def _to_peft(
    src: pathlib.Path, dst: pathlib.Path, arguments: argparse.Namespace
) -> tuple[int, str]:
  base = arguments.base
  loaded = checkpoint.load_params(src)
  if base and pathlib.Path(base).exists():
    _check_base(loaded, src, pathlib.Path(base))
  elif base and not _HUB_NAME.fullmatch(base):
    raise UserError(f"{base} is not there, and no name on the hub: --base=OWNER/NAME is one")
  count = peft.write(dst, loaded.params, loaded.model, base)
  if not base:
    print("famjax: note: the adapter does not name the model it is added to: --base=MODEL does")
  return count, "float32"


_WAYS = {  # by --from and --to
    ("hf", None): _from_hf, (None, "hf"): _to_hf,
    ("peft", None): _from_peft, (None, "peft"): _to_peft,
}  # fmt: skip


def _check_base(loaded: checkpoint.Loaded, src: pathlib.Path, base: pathlib.Path) -> None:
  """Raises UserError if a run's LoRA is not all that it has beside a Hugging Face model."""
  if not hf.is_hf(base):
    raise UserError(f"{base} is no Hugging Face directory: make one of it first, with --to=hf")
  theirs = checkpoint.load_params(base)
  checkpoint.check_model(base, theirs.model, loaded.model, adoption.MAY_DIFFER)
  ours = traverse_util.flatten_dict(loaded.params, sep="/")
  for name, leaf in traverse_util.flatten_dict(theirs.params, sep="/").items():
    if name.partition("/")[0] not in MEMORY_WEIGHTS and not (leaf.astype(ours[name].dtype) == ours[name]).all():
      raise UserError(
          f"{src} has another {name} than {base}, so that its LoRA alone is not its model: name the"
          " base that it was trained on, or export it whole with --to=hf"
      )


def _save(
    dst: pathlib.Path, params: hf.Params, model: ModelConfig, vocabulary: str, src: pathlib.Path
) -> tuple[int, str]:
  """Leaves a model as a checkpoint of ours, with its tokenizer if that is of a directory."""
  origin = _tokenizer(vocabulary, src)
  if origin and origin.is_dir():
    if _copy_tokenizer(origin, dst / checkpoint.OWN_TOKENIZER, also=("config.json",)):
      vocabulary = checkpoint.OWN_TOKENIZER
  checkpoint.save_params(dst, params, checkpoint.About(model, vocabulary))
  if origin is None:
    _say_no_tokenizer(src, vocabulary)
  return parameters.count(params), model.param_dtype


def _tokenizer(vocabulary: str, src: pathlib.Path) -> pathlib.Path | None:
  """Where a model's tokenizer is; None: it has none."""
  if vocabulary in vocabularies.BUILT_IN:
    return None
  origin = pathlib.Path(vocabulary)
  if not origin.exists():
    raise UserError(
        f"{src} was trained with the vocabulary {origin}, which is not there: put it back"
    )
  own = origin / checkpoint.OWN_TOKENIZER  # a run of ours that was converted
  return own if own.is_dir() else origin


def _say_no_tokenizer(src: pathlib.Path, vocabulary: str) -> None:
  print(f"famjax: note: {src} has no tokenizer: its texts are read as {vocabulary}")


def _copy_tokenizer(src: pathlib.Path, dst: pathlib.Path, also: tuple[str, ...] = ()) -> list[str]:
  """Copies a tokenizer's files; returns which there were, none if there is no tokenizer."""
  if src.is_file():  # a SentencePiece model
    shutil.copyfile(src, dst / "tokenizer.model")
    return [src.name]
  if not tokenizers.is_in(src):
    return []
  files = [name for name in tokenizers.FILES if inside(src, name).is_file()]
  dst.mkdir(parents=True, exist_ok=True)
  for name in (*files, *(name for name in also if inside(src, name).is_file())):
    shutil.copyfile(inside(src, name), dst / name)
  return files
