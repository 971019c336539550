"""Reads the safetensors files of a Hugging Face directory, and refuses what does not fit together.

No tensor is passed over unread: names that transformers takes for the same weight must hold the
same values, and every tensor of every file stands in the index, if there is one.
"""

from collections.abc import Iterator
import contextlib
import pathlib
import re
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import safetensors

from famjax.convert import schemas
from famjax.errors import one_line, UserError
from famjax.formats import inside, read_json, shown

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float32"}  # stored, and as it is read
# Names that transformers finds with the prefix `model.`, without it, and with several.
_ROOTS = ("embed_tokens", "layers", "norm", "rotary_emb")
_CHUNK = 2**20  # numbers that are looked at together, so that they stay in the processor's cache
_OTHER_FORMATS = {
    ".gguf": "GGUF of llama.cpp: fetch the original model of the Hugging Face hub, in safetensors",
    ".bin": "PyTorch's own: load it with transformers and save it with save_pretrained, which"
    " writes safetensors",
    ".h5": "TensorFlow's: load it with transformers and save it as PyTorch's, in safetensors",
    ".msgpack": "Flax's: load it with transformers and save it as PyTorch's, in safetensors",
}
_NONFINITE = "fetch it again, or import it with famjax convert --from=hf --allow_nonfinite"
_OTHER_FORMATS |= dict.fromkeys((".pt", ".pth", ".ckpt"), _OTHER_FORMATS[".bin"])


class _Stored(NamedTuple):
  """Where a tensor is, under which name, and what its file's header says."""

  file: str
  name: str
  dtype: str
  shape: tuple[int, ...]


class Tensors:
  """The tensors of a directory, in one file or in several.

  A file is opened for each tensor anew: it is mapped into memory as far as it was read, and would
  stand there beside the model.

  Attributes:
    path: the directory.
    names: of all tensors, with the prefix `model.` where transformers adds it.
  """

  def __init__(self, path: pathlib.Path):
    """Reads the headers.

    Args:
      path: a directory.

    Raises:
      UserError: There are no weights, files and index contradict each other, or a file cannot be
        read.
    """
    self.path = path
    self._stored: dict[str, _Stored] = {}
    index = _read_index(path)
    for file in sorted(set(index.values())) if index else [SINGLE]:
      with _opened(inside(path, file)) as opened:
        names = list(opened.keys())
        if index is not None:
          _check_index(path, index, file, names)
        for name in names:
          part = opened.get_slice(name)
          self._add(_Stored(file, name, part.get_dtype(), tuple(part.get_shape())))
    self.names = list(self._stored)

  def __contains__(self, name: str) -> bool:
    return name in self._stored

  def dtype(self, name: str) -> str:
    """Returns "float32" or "bfloat16"; raises UserError for what famjax does not read."""
    stored = self._find(name).dtype
    if stored not in DTYPES:
      raise UserError(f"{self.path} stores {name} as {stored}; there is {', '.join(DTYPES)}")
    return DTYPES[stored]

  def shape(self, name: str) -> tuple[int, ...]:
    """Returns the shape; raises UserError if there is no such tensor."""
    return self._find(name).shape

  def read(self, name: str) -> np.ndarray:
    """Returns a tensor as it is stored; raises UserError as `dtype` does."""
    self.dtype(name)
    return self._read(self._find(name))

  def equal(self, name: str, other: str) -> bool:
    """Returns whether two tensors have the same shape and values."""
    return self._equal(self._find(name), self._find(other))

  def zero(self, name: str) -> bool:
    """Returns whether all values of a tensor are 0."""
    return not self.read(name).any()

  def rename(self, name: str, other: str) -> None:
    """Gives a tensor another name."""
    self._stored[other] = self._stored.pop(name)
    self.names = list(self._stored)

  def _add(self, stored: _Stored) -> None:
    name = _full_name(stored.name)
    other = self._stored.setdefault(name, stored)
    if other is not stored and not self._equal(other, stored):
      raise UserError(
          f"{self.path} has {other.name} and {stored.name} with other values, and transformers"
          " takes both for the same weight: leave the right one"
      )

  def _find(self, name: str) -> _Stored:
    if name not in self._stored:
      raise UserError(f"{self.path} lacks the tensor {name}")
    return self._stored[name]

  def _read(self, stored: _Stored) -> np.ndarray:
    with _opened(inside(self.path, stored.file)) as file:
      return file.get_tensor(stored.name)

  def _equal(self, one: _Stored, other: _Stored) -> bool:
    """Compares row after row of large ones, to have no whole tensor twice in memory."""
    if one.shape != other.shape:
      return False
    pairs = zip(self._chunks(one), self._chunks(other), strict=True)
    return all(np.array_equal(a, b) for a, b in pairs)

  def _chunks(self, stored: _Stored) -> Iterator[np.ndarray]:
    rows = stored.shape[0] if stored.shape else 1
    step = max(1, _CHUNK * rows // max(1, int(np.prod(stored.shape, dtype=np.float64))))
    with _opened(inside(self.path, stored.file)) as file:
      if not stored.shape or stored.dtype not in DTYPES:
        yield file.get_tensor(stored.name)
        return
      part = file.get_slice(stored.name)
      for start in range(0, rows, step):
        yield part[start : min(rows, start + step)]


def load(path: pathlib.Path) -> dict[str, np.ndarray]:
  """Returns the tensors of one file.

  Raises:
    UserError: It cannot be read, or a tensor is of another dtype than those in `DTYPES`.
  """
  with _opened(path) as file:
    for name in file.keys():
      stored = file.get_slice(name).get_dtype()
      if stored not in DTYPES:
        raise UserError(f"{path} stores {shown(name)} as {stored}; there is {', '.join(DTYPES)}")
    return {name: file.get_tensor(name) for name in file.keys()}


def check_finite(
    values: np.ndarray, name: str, where: pathlib.Path, way_out: str = _NONFINITE
) -> None:
  """Raises UserError if some values of a tensor are NaN or infinite.

  Args:
    values: contiguous array, float32, bfloat16 or float16.
    name: of the tensor.
    where: file or directory, for the message.
    way_out: end of the message.
  """
  bad = sum(_nonfinite(chunk) for chunk in _flat_chunks(values))
  if bad:
    raise UserError(
        f"{where}: {bad} of {values.size} values of {shown(name)} are NaN or infinite: {way_out}"
    )


def _flat_chunks(values: np.ndarray) -> Iterator[np.ndarray]:
  flat = values.reshape(-1)
  for start in range(0, flat.size, _CHUNK):
    yield flat[start : start + _CHUNK]


def _nonfinite(values: np.ndarray) -> int:
  """Returns how many values are NaN or infinite; of 16 bits by their exponent, which is quicker."""
  if values.dtype.itemsize != 2:
    finite = np.isfinite(values)
  else:
    exponent = np.uint16(0x7F80 if values.dtype == jnp.bfloat16 else 0x7C00)
    finite = (values.view(np.uint16) & exponent) != exponent
  return 0 if finite.all() else int((~finite).sum())


def _full_name(name: str) -> str:
  """Returns a name with one prefix `model.`, as transformers takes it."""
  base = name
  while base.startswith("model."):
    base = base.removeprefix("model.")
  return f"model.{base}" if base.partition(".")[0] in _ROOTS else name


def _read_index(path: pathlib.Path) -> dict[str, str] | None:
  """Returns the file of each tensor by the index; None: there is one file, and no index."""
  single, index = inside(path, SINGLE), inside(path, INDEX)
  if not index.is_file():
    if not single.is_file():
      _refuse_without_weights(path)
    return None
  file_of = schemas.checked(read_json(index), schemas.Index, str(index))["weight_map"]
  if not file_of:
    raise UserError(f"{index} has no weight_map: fetch it again")
  files = sorted(set(file_of.values()))
  for file in files:
    if not inside(path, file).is_file():
      raise UserError(f"{path} lacks {shown(file)}, which its index names: fetch it again")
  if single.is_file() and SINGLE not in files:
    raise UserError(
        f"{path} holds {SINGLE} and {INDEX}, which names other files ({files[0]}, ...): move away"
        " the one that is out of date"
    )
  return file_of


def _check_index(path: pathlib.Path, index: dict[str, str], file: str, names: list[str]) -> None:
  """Raises UserError if an index and one of its files do not name the same tensors."""
  named = {name for name, place in index.items() if place == file}
  for name in sorted(named - set(names)):
    raise UserError(
        f"{path}: {file} lacks {shown(name)}, which the index says it has: fetch it again"
    )
  for name in sorted(set(names) - named):
    raise UserError(
        f"{path}: {file} holds {shown(name)}, which {INDEX} does not say: fetch both again, or"
        " delete the index if there is only one file"
    )


def _refuse_without_weights(path: pathlib.Path) -> None:
  """Raises UserError that says what is there instead of weights in safetensors."""
  files = sorted(file.name for file in path.iterdir() if file.is_file())
  for file in files:
    suffix = pathlib.PurePath(file).suffix
    if suffix in _OTHER_FORMATS and file != "training_args.bin":
      raise UserError(
          f"{path} has no {SINGLE}, and famjax reads no {shown(file)}, which is"
          f" {_OTHER_FORMATS[suffix]}"
      )
  shards = [file for file in files if re.fullmatch(r"model-.*\.safetensors", file)]
  if shards:
    raise UserError(
        f"{path} has {shards[0]} without {INDEX}, which says what it holds: fetch that too"
    )
  raise UserError(f"{path} has no {SINGLE}: fetch the weights of the model, in safetensors")


@contextlib.contextmanager
def _opened(path: pathlib.Path):
  """Opens a file of tensors; turns whatever the reader raises into a UserError."""
  try:
    with safetensors.safe_open(path, framework="numpy") as file:
      yield file
  except (UserError, KeyboardInterrupt, SystemExit, GeneratorExit):
    raise
  except BaseException as error:  # a cut file; a panic of the reader, which is no Exception
    reason = one_line(error)
    raise UserError(f"{path} cannot be read ({reason}): fetch it again") from None
