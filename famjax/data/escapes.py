r"""Escapes in fields of TSV files: `\t` is a tab, `\n` a newline, `\\` a backslash, and no others.

TSV has no rule of its own for what a backslash means, so that the same two characters are an escape
in one file and the start of `\theta` or of `C:\new` in another. Three conventions:

  True: Every `\t`, `\n` and `\\` is an escape.
  False: None is. A field is as it stands in the file.
  None: Each is, but for words of TeX (`\theta`, `\nabla`, `\times`) and for paths of Windows
    (`C:\new\data`), which stay as they are. Where that cannot be known, as in `C:\new` alone or in
    `\nu` without other TeX around it, the record is refused.

Under all three a backslash before any other character stays as it is: `\frac`, `\d`, `\r`.
"""

import re

# Words of TeX that begin with n or t, whose rest is no word of a text.
_NAMES = """
  nabla narrower natural ncong nearrow neg negmedspace negthickspace negthinspace neq
  nequiv newcommand newcommandx newcounter newenvironment newfont newlength newline newpage
  newtheorem ngeq ngeqq ngeqslant ngtr nleftarrow nleftrightarrow nleq nleqq nleqslant
    nobreak nobreakspace nocite noindent nolimits nolinebreak nonfrenchspacing nonumber
  nopagebreak normalfont normalsize not notag notin npreceq nrightarrow nshortmid
  nshortparallel nsubseteq nsubseteqq nsucceq nsupset nsupseteq nsupseteqq
  ntriangleleft ntrianglelefteq ntriangleright ntrianglerighteq nvdash nwarrow nLeftarrow
  nLeftrightarrow nRightarrow nVDash nVdash nvDash tableofcontents tabularnewline tag tanh tau
  tbinom tensor text[a-z]+ text(?={) tfrac therefore theta thickapprox thicksim thickspace thinspace
  thispagestyle tikz tilde times tiny title titleformat today top toprule triangle triangledown
  triangleleft trianglelefteq triangleq triangleright trianglerighteq ttfamily twocolumn
  twoheadleftarrow twoheadrightarrow typeout
"""
_TEX = rf"\\(?:{'|'.join(_NAMES.split())})(?![A-Za-z])"
# Words of TeX that a text may have as well: "\nu = 3" begins a line with "u = 3".
_SHORT = r"\\(?:ne|nu|tan|to|tt)(?=[\s\d_^{}$\\=+<>|&-]|$)"
_SHORT_IN_TEX = (
    r"\\(?:napprox|ne|nexists|ni|nless|nmid|nparallel|nprec|nsim|nsubset|nsucc|nu|tan|text|thanks|to"
    r"|tr|tt)(?![A-Za-z])"
)
_OTHER_TEX = re.compile(rf"(?<!\\)(?:\\(?![nt])[A-Za-z]{{2,}}|{_TEX})")
_SEGMENT = r'[^\\\s/:*?"<>|]'  # characters of a file name on Windows, also without spaces
_DRIVE = r"(?<!\w)[A-Za-z]:"
# A path in which at least one name begins with another letter than n and t.
_PATH = rf"{_DRIVE}(?=(?:\\[nt][a-z]{_SEGMENT}*)*\\(?![nt\\]){_SEGMENT})(?:\\{_SEGMENT}+)+"
# Names that all begin with n and t; or lines after "C:". A, B and Q name questions and answers,
# not drives.
_MAYBE_PATH = rf"(?![ABQabq]){_DRIVE}(?:\\[nt][a-z]{_SEGMENT}*+)++(?!\\)"


def _pieces(short: str) -> re.Pattern[str]:
  """Returns what takes a text apart; the group of a match says what to do with it."""
  kinds = {
      "kept": f"{_PATH}|{_TEX}" if short == _SHORT else f"{_PATH}|{_TEX}|{short}",
      "unsure": f"{_MAYBE_PATH}|{short}" if short == _SHORT else _MAYBE_PATH,
      "escape": r"\\[\\nt]",
  }
  return re.compile("|".join(f"(?P<{name}>{kind})" for name, kind in kinds.items()))


_PIECES = {False: _pieces(_SHORT), True: _pieces(_SHORT_IN_TEX)}
_ESCAPE = re.compile(r"\\([\\nt])")
_MEANING = {"\\\\": "\\", "\\n": "\n", "\\t": "\t"}
_NAME = {"n": "a newline", "t": "a tab"}


def unescaped(text: str, escapes: bool | None = None) -> str:
  r"""Returns a field's text.

  Args:
    text: the field as it stands in the file.
    escapes: the convention, see the head of this file.

  Raises:
    ValueError: It cannot be known whether a `\t` or `\n` is an escape.
  """
  if "\\" not in text or escapes is False:
    return text
  if escapes:
    return _ESCAPE.sub(_meaning, text)
  return _PIECES[bool(_OTHER_TEX.search(text))].sub(_decided, text)


def _meaning(match: re.Match[str]) -> str:
  return _MEANING[match[0]]


def _decided(match: re.Match[str]) -> str:
  if match["escape"]:
    return _MEANING[match[0]]
  if match["unsure"]:
    place = match[0].index("\\")
    raise ValueError(
        f"{match[0]!r:.40} may hold {_NAME[match[0][place + 1]]} or a backslash: say which by"
        " escapes=True or escapes=False, or write the backslash twice"
    )
  return match[0]
