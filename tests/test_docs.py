"""The documents name things that are there.

`docs/paper.md` points at lines: a path with a line number, and beside it the name that stands on
that line. When code has moved, `python tests/test_docs.py` writes the new line numbers.
"""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAPER = ROOT / "docs" / "paper.md"
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])

_REFERENCE = re.compile(r"`([\w./-]+\.\w+):(\d+)` `([\w.]+)`")
_ANY_LINE = re.compile(r"`[\w./-]+\.\w+:\d+`")
_LINK = re.compile(r"\]\((?!https?:)([^)#\s]+)[^)]*\)")
_GIN_FILE = re.compile(r"--gin_file=([\w./-]+\.gin)|`(gin/[\w./-]+\.gin)`")
_PYTHON = re.compile(r"```python\n(.*?)```", re.S)


def _names(symbol: str) -> re.Pattern:
  return re.compile(rf"(?<!\w){re.escape(symbol.split('.')[-1])}(?!\w)")


def _lines(path: str) -> list[str]:
  return (ROOT / path).read_text().splitlines()


def _is_there(path: str, number: str, symbol: str) -> bool:
  lines = _lines(path) if (ROOT / path).is_file() else []
  return int(number) <= len(lines) and bool(_names(symbol).search(lines[int(number) - 1]))


def _found(reference: re.Match) -> str:
  """A reference with the line, nearest to where it was, that defines (or else holds) its name."""
  path, number, symbol = reference.groups()
  name = re.escape(symbol.split(".")[-1])
  defines = re.compile(rf"^\s*(?:def |class |self\.|[A-Z]\w*\.)?{name}\s*(?:[(:=]|$)")
  lines = _lines(path)
  places = [i for i, line in enumerate(lines, 1) if defines.search(line)] or [
      i for i, line in enumerate(lines, 1) if _names(symbol).search(line)
  ]
  if not places:
    raise SystemExit(f"{path} does not hold {symbol}; correct docs/paper.md by hand")
  nearest = min(places, key=lambda place: abs(place - int(number)))
  return f"`{path}:{nearest}` `{symbol}`"


def test_every_line_of_the_paper_holds_its_name():
  text = PAPER.read_text()
  references = _REFERENCE.findall(text)
  wrong = [f"{path}:{line} {name}" for path, line, name in references
           if not _is_there(path, line, name)]  # fmt: skip
  assert not wrong, f"code has moved; run python tests/test_docs.py: {wrong}"
  assert len(references) == len(_ANY_LINE.findall(text)), "a line number without a name beside it"
  assert len(references) > 80


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_relative_link_resolves(document):
  missing = [link for link in _LINK.findall(document.read_text())
             if not (document.parent / link).exists()]  # fmt: skip
  assert not missing


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_gin_file_exists(document):
  text = document.read_text()
  named = {a or b for a, b in _GIN_FILE.findall(text)}
  shown = set(re.findall(r"`([\w.]+)`:\n\n```", text))  # what the document itself has in full
  assert not [path for path in named - shown if not (ROOT / path).is_file()]


def test_python_examples_use_public_names():
  """Public names are listed in famjax/__init__.py, which imports none of them."""
  import famjax  # pylint: disable=import-outside-toplevel

  examples = _PYTHON.findall((ROOT / "README.md").read_text())
  assert examples
  for example in examples:
    compile(example, "README.md", "exec")
    assert set(re.findall(r"\bfamjax\.(\w+)", example)) <= set(famjax.__all__)


if __name__ == "__main__":
  PAPER.write_text(_REFERENCE.sub(_found, PAPER.read_text()))
