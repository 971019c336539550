"""Reads JSON files and checks them against a schema before anything uses a value.

A schema is a `msgspec.Struct` or a dataclass: its fields are the keys that famjax reads, and their
types say what each key may hold. Other keys are allowed, because other programs add their own.

    class Adapter(msgspec.Struct):
      r: Count
      lora_alpha: Positive = 8.0

    adapter = read(path / "adapter_config.json", Adapter)

A value of another type gives one line: the file, the key, the value, and what is allowed.

`inside` gives the path of a file in a model's directory, and refuses a name or a link that leads
out of it.
"""

import json
import os
import pathlib
import re
from typing import Annotated, Any, TypeVar

import msgspec

from famjax.errors import one_line, UserError

T = TypeVar("T")
Json = dict[str, Any]

# Upper bounds keep a hostile number from asking for more memory or time than any machine has.
Count = Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)]
Layers = Annotated[int, msgspec.Meta(ge=1, le=4096)]
TokenId = Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]
Positive = Annotated[float, msgspec.Meta(gt=0, le=1e30)]
Number = Annotated[float, msgspec.Meta(ge=-1e30, le=1e30)]

_MOST_BYTES = 2**26  # 64 MB, of one JSON file; the index of the largest models has a tenth of it
_SHOWN = 60  # characters of a value in an error message


def inside(directory: pathlib.Path, name: str) -> pathlib.Path:
  """Returns the path of a file in a directory that others made; the file need not exist.

  Links are followed as long as they stay below the directory, or below the folder of the model in
  the hub's cache: there `models--OWNER--NAME/snapshots/REVISION/x` links to `../../blobs/HASH`.

  Args:
    directory: of this machine or, as an `epath.Path`, of a bucket, which has no links.
    name: plain name of a file, from the code or from another file of the directory.

  Raises:
    UserError: The name is no plain file name, or it is a link that leads out of the directory, or
      a pipe or a device, which would be waited for.
  """
  plain = isinstance(name, str) and name.isprintable() and len(name.encode()) < 256
  if not plain or name in ("", ".", "..") or "/" in name or "\\" in name:
    raise UserError(
        f"{directory} names the file {shown(name)}, which is no plain name of a file in it"
    )
  path = directory / name
  if "://" in os.fspath(directory) or not os.path.lexists(path):
    return path
  target, root = pathlib.Path(os.path.realpath(path)), pathlib.Path(os.path.realpath(directory))
  if not any(target.is_relative_to(place) for place in (root, _cached_model(root) or root)):
    raise UserError(
        f"{path} is a link to {target}, which is outside of {directory}: copy the file there"
        " instead"
    )
  if target.exists() and not (target.is_file() or target.is_dir()):
    raise UserError(f"{path} is a pipe or a device: replace it by a file")
  return path


def check_name(path: str, what: str) -> None:
  """Raises UserError for the name of a file or directory that is not UTF-8.

  Orbax, TensorStore and JSON cannot write such a name. Without this check, a run would train to its
  first checkpoint and then fail.

  Args:
    path: The name. Python has half of a surrogate pair where a byte is not UTF-8.
    what: Noun for the error message, such as "run directory".
  """
  try:
    path.encode()
  except UnicodeEncodeError:
    raise UserError(f"{what} {path!a}: its name is not UTF-8; choose another name") from None


def _cached_model(directory: pathlib.Path) -> pathlib.Path | None:
  """Returns the folder of a model in the hub's cache that a snapshot belongs to, if it is one."""
  for folder in directory.parents:
    if folder.name.startswith("models--") and (folder / "blobs").is_dir():
      return folder if directory.is_relative_to(folder / "snapshots") else None
  return None


def read_json(path: pathlib.Path) -> Json:
  """Returns the JSON object in a file.

  Args:
    path: UTF-8 file, with or without a byte order mark.

  Raises:
    UserError: The file cannot be read, is larger than 64 MB, or holds no JSON object.
  """
  try:
    with path.open("rb") as file:  # of a bucket too, where `path` is an `epath.Path`
      data = file.read(_MOST_BYTES + 1)
    if len(data) > _MOST_BYTES:
      raise UserError(f"{path} is larger than {_MOST_BYTES:,} bytes: it is no configuration")
    found = json.loads(data.decode("utf-8-sig"))
  except UserError:
    raise
  except (OSError, ValueError, RecursionError) as error:
    raise UserError(f"{path} cannot be read ({one_line(error)}): fetch it again") from None
  if not isinstance(found, dict):
    raise UserError(f"{path} holds {shown(found)}, and it must be a JSON object: fetch it again")
  return found


def read(path: pathlib.Path, schema: type[T]) -> T:
  """Returns a file's JSON object as an instance of a schema.

  Args:
    path: UTF-8 file.
    schema: `msgspec.Struct` or dataclass.

  Raises:
    UserError: See `read_json` and `check`.
  """
  return check(read_json(path), schema, str(path))


def check(found: Any, schema: type[T], where: str) -> T:
  """Returns a JSON value as an instance of a schema.

  Args:
    found: value as `json.loads` returns it.
    schema: `msgspec.Struct`, dataclass, or any other type that `msgspec.convert` takes.
    where: name of the file, for the error message.

  Raises:
    UserError: A key is missing, or its value is not what the schema allows.
  """
  try:
    return msgspec.convert(found, schema)
  except msgspec.ValidationError as error:
    raise UserError(f"{where}: {_described(error, found)}") from None
  except UnicodeError:
    raise UserError(f"{where} holds half of a surrogate pair, which is no character") from None
  except RecursionError:
    raise UserError(f"{where}: its JSON is nested too deeply") from None


def shown(value: Any) -> str:
  """Returns a value as an error message shows it: one line of at most 60 characters."""
  try:
    text = json.dumps(value, ensure_ascii=True)
  except (TypeError, ValueError, RecursionError):
    text = type(value).__name__
  return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def plain(value: Any, most: int = 200) -> str:
  """Returns a value as one line: text without quotes, everything else as `shown` has it.

  Args:
    value: as JSON holds it.
    most: characters of a text.
  """
  if value is None or isinstance(value, (bool, int, float)):
    return str(value)
  return value[:most] if isinstance(value, str) and value.isprintable() else shown(value)


def _described(error: msgspec.ValidationError, found: Any) -> str:
  """Returns msgspec's message with the key in front and the value behind it."""
  message, _, path = str(error).partition(" - at `$")
  message = message.replace("`", "")
  keys = re.findall(r"\.([^.\[\]`]+)|\[(\d+)\]|(\[\.\.\.\])", path)
  value = found
  for key, index, _ in keys:
    try:
      value = value[key] if key else value[int(index)]
    except (KeyError, IndexError, TypeError, ValueError):
      return f"{path.strip('.`')}: {message}"
  name = path.strip(".`")
  return f"{name} is {shown(value)}: {message}" if name else message
