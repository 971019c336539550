"""Decides whether a model's directory may name Python code that loading it imports.

A memory of the kind "module:Class" is code. A gin file or Python that the user wrote may name it. A
directory that somebody else made may not, unless the user says so: `--trust_code` on the command
line, `famjax.load(..., trust_code=True)` in Python.
"""

from collections.abc import Iterator
import contextlib
import contextvars

from famjax.errors import UserError

_trusted = contextvars.ContextVar("trust_code", default=False)


@contextlib.contextmanager
def code(trusted: bool) -> Iterator[None]:
  """Lets directories that are read in this context name code, if `trusted` or if they may already."""
  token = _trusted.set(trusted or _trusted.get())
  try:
    yield
  finally:
    _trusted.reset(token)


def trusts_code() -> bool:
  """Returns whether directories may name code now."""
  return _trusted.get()


def check_kind(kind: str, known: bool, where: str) -> None:
  """Refuses a kind of memory that a directory names and that famjax would have to import.

  Args:
    kind: name of the memory, as `MemoryConfig.kind`.
    known: whether the kind is built in, or registered by code that the user has imported.
    where: name of the directory, for the error message.

  Raises:
    UserError: The kind names code, and the user does not trust the directory.
  """
  if not known and not trusts_code():
    raise UserError(
        f"{where} has a memory of the kind {kind!r}, which is not part of famjax: import the module"
        " that defines it first. If you trust its authors, --trust_code (trust_code=True in Python)"
        " lets the directory import it"
    )
