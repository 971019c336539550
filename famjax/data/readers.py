"""Readers: a batch per step, read by position, so that a restart goes on with the very same data.

A batch is a dict of arrays of B rows and S tokens:
  tokens int32[B, S]: inputs; padding after a row's length.
  targets int32[B, S]: the next token of each.
  weights float32[B, S]: loss weight of each target, 0 on padding.
  start_of_sequence bool[B]: the row begins something new in this step.
  lengths int32[B]: tokens of the row that are real.

An example of n tokens fills n - 1 places: its last token is only a target. A position is a small
int64 array that goes into the checkpoint. `rows=(2, 3, 6)` makes a reader give these rows of the
batch only, with the content that they have in the whole batch, so that every process of a pod reads
its own.
"""

import itertools
from typing import Protocol, Sequence

import numpy as np

from famjax.data.examples import generator
from famjax.data.examples import REPEAT
from famjax.data.examples import Source
from famjax.data.packing import pack
from famjax.data.packing import repeat_segment
from famjax.data.packing import REPEAT_PROMPT
from famjax.data.vocabularies import encode_after, Vocabulary
from famjax.errors import UserError

Batch = dict[str, np.ndarray]
_Piece = tuple[np.ndarray, np.ndarray]  # tokens int32[n], weights float32[n]


class Reader(Protocol):
  """Gives batches of `batch_size` rows (or of `rows` of them) and `length` tokens."""

  batch_size: int
  length: int
  rows: tuple[int, ...]
  vocabulary: Vocabulary

  def start(self) -> np.ndarray:
    """Returns the position of a fresh reader, int64."""

  def read(self, position: np.ndarray, step: int) -> tuple[Batch, np.ndarray]:
    """Returns the batch at a position, and the position after it.

    Same seed, position and step, same batch; nothing that was read before matters.
    """


class _SourceReader:
  """What the readers share: a source, a shape and a seed."""

  def __init__(
      self,
      source: Source,
      batch_size: int,
      length: int,
      *,
      seed: int = 0,
      rows: Sequence[int] | None = None,
  ):
    """Takes what to read and how much of it.

    Args:
      source: of the examples.
      batch_size: B, rows of the whole batch.
      length: S, tokens of a row in a step.
      seed: of every draw, not negative.
      rows: numbers of the rows to give, rising; None: all.

    Raises:
      UserError: a value makes no sense.
    """
    if batch_size < 1 or length < 1 or seed < 0:
      raise UserError(
          f"reader: batch_size {batch_size}, length {length}, seed {seed}: use at least 1, 1 and 0"
      )
    rows = tuple(range(batch_size) if rows is None else rows)
    if not rows or list(rows) != sorted(set(rows)) or rows[0] < 0 or rows[-1] >= batch_size:
      raise UserError(f"reader: rows {rows} are not rising numbers of rows of a batch of {batch_size}")
    self.source = source
    self.batch_size = batch_size
    self.length = length
    self.seed = seed
    self.rows = rows
    self.vocabulary = source.vocabulary

  def _batch(self, pieces: Sequence[_Piece], starts: np.ndarray | None = None) -> Batch:
    """Returns a batch of one piece per row, each of at most S + 1 tokens."""
    shape = (len(pieces), self.length)
    tokens = np.full(shape, self.vocabulary.pad_id, np.int32)
    targets = np.full(shape, self.vocabulary.pad_id, np.int32)
    weights = np.zeros(shape, np.float32)
    lengths = np.zeros(len(pieces), np.int32)
    for row, (piece, piece_weights) in enumerate(pieces):
      n = max(len(piece) - 1, 0)
      tokens[row, :n] = piece[:-1]
      targets[row, :n] = piece[1:]
      weights[row, :n] = piece_weights[1:]
      lengths[row] = n
    return dict(
        tokens=tokens,
        targets=targets,
        weights=weights,
        start_of_sequence=np.ones(len(pieces), bool) if starts is None else starts,
        lengths=lengths,
    )


class ExampleReader(_SourceReader):
  """Independent examples, one a row, padded to the length or cut to it.

  Its position is int64[1]: the number of the next example.
  """

  def __init__(self, source: Source, batch_size: int, length: int, **kwargs):
    """Takes what every reader takes.

    Raises:
      UserError: a value makes no sense, or the source has documents that must not be cut (it says
        how long they are) and are longer than the length.
    """
    super().__init__(source, batch_size, length, **kwargs)
    longest = getattr(source, "longest", 0)
    if longest > length:
      raise UserError(
          f"reader: documents of up to {longest} tokens do not fit a length of {length}, and their"
          " ends hold what is to be learned; raise the length or shorten the documents"
      )

  def start(self) -> np.ndarray:
    """See `Reader`."""
    return np.zeros(1, np.int64)

  def read(self, position: np.ndarray, step: int) -> tuple[Batch, np.ndarray]:
    """See `Reader`."""
    pieces = []
    for row in self.rows:
      tokens, weights = self.source.example(self.seed, int(position[0]) + row, step)
      pieces.append((tokens[: self.length + 1], weights[: self.length + 1]))
    return self._batch(pieces), position + self.batch_size


class PackedReader(_SourceReader):
  """Rows packed with examples (SPEC section 5), with the repeated random segment at their end.

  The rows of a batch take the examples one after another, so every process packs the whole batch
  and gives its rows. Its position is int64[1]: the number of the next example.
  """

  def __init__(
      self,
      source: Source,
      batch_size: int,
      length: int,
      *,
      repeat_length: int = 256,
      repeat_weight: float = 0.1,
      seed: int = 0,
      rows: Sequence[int] | None = None,
  ):
    """Takes the source and shape of every reader, and the repeated segment.

    Args:
      source: of the examples.
      batch_size: B, rows of the whole batch.
      length: S, tokens of a row, all of them real.
      repeat_length: tokens of the repeated segment; 0: no segment.
      repeat_weight: loss weight of each of its tokens.
      seed: of every draw.
      rows: numbers of the rows to give, rising; None: all.

    Raises:
      UserError: a value makes no sense, or the length cannot hold the segment twice and its prompt.
    """
    super().__init__(source, batch_size, length, seed=seed, rows=rows)
    if repeat_length < 0 or repeat_weight < 0:
      raise UserError(
          f"repeat_length {repeat_length}, repeat_weight {repeat_weight}: use 0 or more"
      )
    self._prompt = encode_after(self.vocabulary, REPEAT_PROMPT) if repeat_length else []
    self._repeat = (repeat_length, repeat_weight)
    self._body = length + 1 - len(self._prompt) - repeat_length  # Tokens of the examples in a row.
    if self._body < max(repeat_length, 1):
      raise UserError(
          f"packing: a length of {length} tokens cannot hold a segment of {repeat_length}, its"
          f" prompt of {len(self._prompt)} and the segment again; raise the length or lower"
          " repeat_length"
      )

  def start(self) -> np.ndarray:
    """See `Reader`."""
    return np.zeros(1, np.int64)

  def read(self, position: np.ndarray, step: int) -> tuple[Batch, np.ndarray]:
    """See `Reader`."""
    index = int(position[0])
    pieces = []
    for row in range(self.batch_size):
      examples = (self.source.example(self.seed, i, step) for i in itertools.count(index))
      tokens, weights, used = pack(examples, self._body)
      if self._repeat[0] and row in self.rows:
        rng = generator(self.seed, index, REPEAT)
        tokens, weights = repeat_segment(rng, tokens, weights, self._prompt, *self._repeat)
      pieces.append((tokens, weights))
      index += used
    return self._batch([pieces[row] for row in self.rows]), np.array([index], np.int64)


class FollowingReader(_SourceReader):
  """Every row follows documents of its own from step to step, one after another.

  A document begins at the start of a step, where `start_of_sequence` is True; in its last step the
  row is padded. Row r reads the documents number r, r + B, r + 2B, ... of the source. The state of
  the model goes on with the row (what the paper's authors wanted: "the curse of IID").

  Its position is int64[rows, 3]: for each row that it gives, how many documents the row has
  finished, the offset in the present one in tokens, and the training step at which that one began.
  Processes that give some of the rows have these rows of the position.
  """

  position_by_row = True

  def __init__(self, *args, **kwargs):
    super().__init__(*args, **kwargs)
    self._open: dict[int, tuple[tuple[int, int], _Piece]] = {}  # By row.

  def start(self) -> np.ndarray:
    """See `Reader`."""
    return np.zeros((len(self.rows), 3), np.int64)

  def read(self, position: np.ndarray, step: int) -> tuple[Batch, np.ndarray]:
    """See `Reader`."""
    pieces, after = [], []
    for row, (ordinal, offset, began) in zip(self.rows, position.tolist(), strict=True):
      if offset == 0:
        began = step
      tokens, weights = self._document(row, ordinal, began)
      end = offset + self.length
      pieces.append((tokens[offset : end + 1], weights[offset : end + 1]))
      after.append((ordinal, end, began) if end < len(tokens) - 1 else (ordinal + 1, 0, 0))
    return self._batch(pieces, position[:, 1] == 0), np.array(after, np.int64)

  def _document(self, row: int, ordinal: int, began: int) -> _Piece:
    """Returns a row's document; the one that the row is in stays at hand."""
    key, document = self._open.get(row, (None, None))
    if key != (ordinal, began):
      index = ordinal * self.batch_size + row
      document = self.source.example(self.seed, index, began)
      self._open[row] = ((ordinal, began), document)
    return document
