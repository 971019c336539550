"""Finds and reads gin files, and the files that they include."""

from collections.abc import Sequence
import contextlib
import importlib.util  # noqa: F401  # gin 0.5 uses it without importing it
import io
import os
import pathlib

import gin

import famjax
from famjax.data import text_files
from famjax.errors import UserError

# Gin files, and what they include, are looked for from the working directory, inside the installed
# package (a wheel carries gin/ as famjax/gin/), and in the checkout.
_PACKAGE = pathlib.Path(famjax.__file__).resolve().parent
SEARCHED = (pathlib.Path(), _PACKAGE, _PACKAGE.parent)


def register() -> None:
  """Makes gin find and read files as `read_all` does; its own reader knows no byte order mark."""
  gin.config._FILE_READERS[:] = [(_open, os.path.isfile)]  # pylint: disable=protected-access
  for place in SEARCHED[1:]:
    gin.add_config_file_search_path(str(place))


def read_all(path: str, stack: tuple[pathlib.Path, ...] = ()) -> list[str]:
  """Returns the text of a gin file and of all that it includes.

  Args:
    path: of the file, as the command line or an include names it.
    stack: the files that include it, the outermost first.

  Raises:
    UserError: A file is missing, is no UTF-8, or includes itself.
  """
  place = _find(path, stack)
  if place in stack:
    cycle = " includes ".join(map(str, [*stack[stack.index(place) :], place]))
    raise UserError(f"gin: a file includes itself: {cycle}; leave one of these includes out")
  text, stack = _read(place), (*stack, place)
  return [text, *(inner for name in _included(text) for inner in read_all(name, stack))]


def _find(path: str, stack: Sequence[pathlib.Path]) -> pathlib.Path:
  """Returns the place of a gin file, where gin finds it too. Raises UserError if it is nowhere."""
  places = [base / path for base in SEARCHED]
  if found := next((place for place in places if place.is_file()), None):
    return found.resolve()
  name = f"gin file {path!r}" + (f", which {stack[-1]} includes," if stack else "")
  if folder := next((place for place in places if place.is_dir()), None):
    raise UserError(f"{name} is a directory: name a file in {folder}")
  searched = ", ".join(str(base.absolute()) for base in SEARCHED)
  raise UserError(f"{name} not found; looked in {searched}")


def _included(text: str) -> list[str]:
  """Returns the names of the files that a gin text includes, up to where it is no gin text."""
  names, delegate = [], gin.config.ParserDelegate(skip_unknown=True)
  with contextlib.suppress(Exception):  # gin itself says later what is wrong, and where
    for statement in gin.config_parser.ConfigParser(io.StringIO(text), delegate):
      if isinstance(statement, gin.config_parser.IncludeStatement):
        names.append(statement.filename)
  return names


def _open(path: str) -> io.StringIO:
  """Opens a file for gin, which takes the name of the file for its messages from `name`."""
  file = io.StringIO(_read(path))
  file.name = path
  return file


def _read(path: str | os.PathLike[str]) -> str:
  """Returns the text of a gin file. Raises UserError if it is none."""
  try:
    return text_files.read_text(path)
  except OSError as error:
    raise UserError(f"{path} cannot be read: {error.strerror}") from None
