"""Says what a path holds in place of a model, and the way out."""

import os
import pathlib
import re

from famjax.convert.families import known
from famjax.errors import UserError

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_WEIGHTS = (".gguf", ".safetensors", ".bin")
_FETCH = "fetch it with: hf download {} --local-dir {}"


def refuse(path: pathlib.Path) -> None:
  """Raises UserError for a path that users often name in place of a model's directory.

  Args:
    path: that is no Hugging Face directory; absolute, or of a bucket.
  """
  if "://" not in os.fspath(path):
    path = pathlib.Path(path)  # links, which an `epath.Path` does not know
    _refuse_local(path)
  if (path / "checkpoint").is_file() and any(path.glob("target.*")):
    raise UserError(
        f"{path} is a checkpoint of T5X: T5 and Flan-T5 are encoder-decoders, and famjax supports"
        f" decoders: {known()}"
    )


def refuse_address(path: str | os.PathLike[str]) -> None:
  """Raises UserError for an address of the web; names the command that fetches a model."""
  address = os.fspath(path)
  if not address.startswith(("http://", "https://")):
    return
  name = "/".join(address.partition("//")[2].split("/")[1:3])
  how = _FETCH.format(name, name.rpartition("/")[2]) if _HUB_NAME.fullmatch(name) else "fetch it"
  raise UserError(f"{address} is an address, and famjax reads directories: {how}")


def _refuse_local(path: pathlib.Path) -> None:
  """Raises UserError for a path of this machine; see `refuse`."""
  if path.is_file():
    raise UserError(f"{path} is a file: name the directory that the model's files are in")
  if not path.is_dir():
    _refuse_hub_name(path)
    return
  if (path / "adapter_config.json").is_file():
    raise UserError(
        f"{path} is an adapter of PEFT, which is added to a model: import both with famjax convert"
        f" --from=peft --src={path} --base=MODEL --dst=NEW"
    )
  _refuse_cache(path)
  config = path / "config.json"
  if config.is_symlink() and not config.exists():
    raise UserError(
        f"{config} is a link to {config.readlink()}, which is gone: fetch the model again"
    )
  weights = [file.name for file in path.iterdir() if file.suffix in _WEIGHTS]
  if weights and not config.exists():
    raise UserError(
        f"{path} holds {min(weights)} and no config.json: fetch the whole model of the Hugging Face"
        " hub, in safetensors"
    )


def _refuse_hub_name(path: pathlib.Path) -> None:
  """Raises UserError for a name such as OWNER/NAME that is no directory here."""
  try:
    name = str(path.relative_to(pathlib.Path.cwd()))
  except (ValueError, OSError):  # elsewhere
    return
  if _HUB_NAME.fullmatch(name):
    raise UserError(
        f"there is no directory {path}. If {name} is a model of the Hugging Face hub,"
        f" {_FETCH.format(name, name.rpartition('/')[2])}"
    )


def _refuse_cache(path: pathlib.Path) -> None:
  """Raises UserError for a folder of the hub's cache that is above a model's files."""
  folder = path.parent if path.name in ("snapshots", "blobs", "refs") else path
  if path.parent.name == "snapshots" and not (path / "config.json").exists():
    folder = path.parent.parent
  if not folder.name.startswith("models--"):
    return
  name = folder.name.removeprefix("models--").replace("--", "/")
  snapshots = folder / "snapshots"
  held = sorted(one for one in snapshots.glob("*") if (one / "config.json").exists())
  if held:
    raise UserError(f"{path} is a folder of the hub's cache; {name} is in {held[-1]}: use that directory")
  raise UserError(
      f"{path} is a folder of the hub's cache without a snapshot of {name}:"
      f" {_FETCH.format(name, name.rpartition('/')[2])}"
  )
