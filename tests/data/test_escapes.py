r"""Escapes of TSV files: text comes back, and neither TeX nor a path loses its backslashes."""

import re

import hypothesis
import hypothesis.strategies as st
import pytest

from famjax.data.escapes import unescaped

MEANING = {r"\\": "\\", r"\n": "\n", r"\t": "\t"}


def escaped(text):
  return text.replace("\\", r"\\").replace("\n", r"\n").replace("\t", r"\t")


texts = st.text(alphabet=st.characters(exclude_categories=["Cs"]))
backslashes = st.text(alphabet="\\\\\\nteuhaC: 1$\n\t")


@hypothesis.given(texts | backslashes)
def test_any_text_comes_back(text):
  assert unescaped(escaped(text), True) == text
  assert unescaped(text, False) == text


@hypothesis.given(texts | backslashes)
def test_a_pair_is_an_escape_or_stays_and_nothing_else_changes(text):
  try:
    found = unescaped(text)
  except ValueError:
    return
  pattern = []
  for piece in re.findall(r"\\[\\nt]|.", text, re.S):
    readings = {piece, MEANING.get(piece, piece)}
    pattern.append(f"(?:{'|'.join(map(re.escape, sorted(readings)))})")
  assert re.fullmatch("".join(pattern), found, re.S)


SAME = (
    r"\theta", r"$\theta_1 + \times$", r"\nabla f", r"\text{if }", r"\textbf{a}", r"x \neq y", r"\not\in",
    r"\tau", r"\frac{1}{2}", r"\alpha \nu x \to 0", r"\beta\ne 1", r"\rho \right", r"\d+\s*[\w.]", r"\x00",
    r"C:\new\data.txt", r"C:\Users\tom\new", r"see D:\temp\notes\Reports, page 2", r"c:\temp\~1", "\\",
    r"a\ b",
)  # fmt: skip
CHANGED = {
    r"a\tb": "a\tb",
    r"x\ty\nz\\w\rq": "x\ty\nz\\w\\rq",
    r"Say:\nOptions:\n(A) 1\n(B) 2": "Say:\nOptions:\n(A) 1\n(B) 2",
    r"one\nthe other\tnone": "one\nthe other\tnone",
    r"\\theta": r"\theta",
    r"\\n": r"\n",
    r"\\\n": "\\\n",
    r"C:\\new\\data": r"C:\new\data",
    r"d) 4\ne) 5": "d) 4\ne) 5",
    r"A:\nyes": "A:\nyes",
    r"Q:\nwhat?\nA:\nno": "Q:\nwhat?\nA:\nno",
    r"C:\nOptions": "C:\nOptions",
    r"C:\nyes\nNo": "C:\nyes\nNo",
    r"\textbf{a}\nThe end\n": "\\textbf{a}\nThe end\n",
    r"\d+\t\n": "\\d+\t\n",
    r"mean:\n\inline \therefore x": "mean:\n\\inline \\therefore x",
}
UNSURE = (r"C:\new", r"c:\temp\notes", r"\nu = 3", r"$x \to 0$", r"\tan x", r"a \ne b")


def test_words_of_tex_paths_and_other_pairs_stay():
  assert {text: unescaped(text) for text in SAME} == {text: text for text in SAME}


def test_escapes_are_what_they_stand_for():
  assert {text: unescaped(text) for text in CHANGED} == CHANGED


@pytest.mark.parametrize("text", UNSURE)
def test_what_cannot_be_known_is_refused(text):
  message = "may hold a (newline|tab) or a backslash: say which by escapes=True"
  with pytest.raises(ValueError, match=message):
    unescaped(text)
  assert unescaped(text, False) == text
  assert unescaped(text, True) == text.replace(r"\n", "\n").replace(r"\t", "\t")
  assert unescaped(escaped(text)) == text
  if ":" not in text:
    assert unescaped(text + r" \alpha") == text + r" \alpha"  # other TeX around it
