"""Refuses, before training begins, texts with tokens that a tokenizer has and its model lacks.

A vocabulary may have an attribute `outside`, a dict of the content of such tokens to their ids. Its
`encode` raises UserError for a text that holds one. Most vocabularies have none, and looking for
them costs nothing then.
"""

from collections.abc import Iterable
import re

from famjax.data.vocabularies import Vocabulary
from famjax.errors import UserError

_SYMBOL = re.compile(r"[<\[{|].*[>\]}|]", re.S)  # as "<tool>", "[PAD]"; pieces of words are not
_MANY = 64
# As SentencePiece and byte-level BPE write spaces, newlines and tabs.
_SPACES = str.maketrans("\u2581\u0120\u010a\u0109", "  \n\t")


def check_inside(vocabulary: Vocabulary, text: str, where: str) -> None:
  """Raises UserError if a text holds a token that the model lacks.

  Args:
    vocabulary: any.
    text: to be trained on.
    where: the file and the record, for the error message.
  """
  outside = getattr(vocabulary, "outside", None)
  if not outside or not _may_hold(text, outside):
    return
  try:
    vocabulary.encode(text)
  except UserError as error:
    raise UserError(f"{where}: {error}") from None


def check_made(vocabulary: Vocabulary, texts: Iterable[str], what: str) -> None:
  """Raises UserError if texts that are made on the fly could hold a token that the model lacks.

  Args:
    vocabulary: any.
    texts: enough of them to have every character that such a text can have.
    what: makes the texts, for the error message.
  """
  outside = getattr(vocabulary, "outside", None)
  if not outside:
    return
  characters = {c for text in texts for c in text.casefold()}
  for name, token in outside.items():
    if characters.issuperset(name.translate(_SPACES).casefold()):
      raise UserError(
          f"{what}: a text may hold the token {name!r} (id {token}), which the model lacks; give it"
          " rows for it: famjax convert --from=hf --resize_vocabulary"
      )


def _may_hold(text: str, outside: dict[str, int]) -> bool:
  """Whether a text could hold one of the tokens: only then does it have to be encoded to know."""
  if len(outside) > _MANY or not all(map(_SYMBOL.fullmatch, outside)):
    return True
  folded = text.casefold()  # some tokenizers fold the case of a text first
  return any(name.strip().casefold() in folded for name in outside)
