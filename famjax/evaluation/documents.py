"""How well the long documents of a directory are foreseen, by the place in them (PG-19, Isabelle).

A line of the record is a batch of documents: their names, the bins, and what was counted in each.
"""

import dataclasses
import math
import pathlib
import sys

import numpy as np

from famjax.data.long_text import find_files
from famjax.data.text_files import read_text
from famjax.data.vocabularies import encode_text
from famjax.errors import UserError
from famjax.evaluation.by_position import by_position
from famjax.evaluation.record import Measured, Record
from famjax.inference.model import Model


@dataclasses.dataclass(frozen=True)
class DocumentEval:
  """Which documents a model reads. The paper reads PG-19's 50 validation books up to 256k tokens.

  Attributes:
    directory: of the files; None: the Python standard library's sources.
    patterns: of file names; none: `famjax.data.long_text.PATTERNS`.
    split: "all", "train" or "validation", see `famjax.data.long_text.find_files`.
    edges: rising places in tokens; what is foreseen between two of them is a row of the table.
      Documents are read up to the last.
    documents: at most so many of the files.
    batch_size: of them side by side.
    chunk_blocks: blocks read in one call, which bounds memory.
    seed: draws the documents, if there are more.
  """

  directory: str | None = None
  patterns: str | tuple[str, ...] | None = None
  split: str = "all"
  edges: tuple[int, ...] = (0, 1024, 4096, 16384, 65536, 262144)
  documents: int = 50
  batch_size: int = 4
  chunk_blocks: int = 8
  seed: int = 0

  def validate(self) -> None:
    """Raises UserError for a value that makes no sense."""
    if len(self.edges) < 2 or self.edges[0] < 0 or np.any(np.diff(self.edges) < 1):
      raise UserError(f"DocumentEval.edges is {self.edges}: give places that rise, as (0, 1024)")
    if min(self.documents, self.batch_size, self.chunk_blocks) < 1:
      raise UserError("DocumentEval.documents, batch_size and chunk_blocks must be at least 1")
    find_files(self.directory, self.patterns, self.split)

  def run(self, model: Model, record: Record) -> Measured:
    """Reads all documents that were not read yet.

    Args:
      model: any.
      record: of what was foreseen.

    Returns:
      "bins", with first and last place, tokens, accuracy and perplexity; a row for each, and one for
      all of them. Perplexity is by tokens of the model's own vocabulary.

    Raises:
      UserError: the model's context is shorter than the last edge, or a document is not UTF-8.
    """
    files = find_files(self.directory, self.patterns, self.split)
    if len(files) > self.documents:
      drawn = np.random.default_rng(self.seed).permutation(len(files))[: self.documents]
      files = [files[i] for i in sorted(drawn)]
    done = [line for line in record.lines if line["edges"] == list(self.edges)]
    read = {name for line in done for name in line["documents"]}
    left = [path for path in files if str(path) not in read]
    for path in left:  # a file that cannot be read is refused before hours of work
      read_text(path)
    for first in range(0, len(left), self.batch_size):
      paths = left[first : first + self.batch_size]
      bins = by_position(model, [_tokens(model, p) for p in paths], self.edges, self.chunk_blocks)
      counted = [[b.tokens, b.accuracy, b.nats] for b in bins if b.tokens]
      line = {"documents": [str(p) for p in paths], "edges": self.edges, "counted": counted}
      record.add(line)
      done.append(line)
      tokens, accuracy, _ = _mean(counted)
      many = f"{first + len(paths)}/{len(left)} documents"
      print(f"{many}: {tokens:,} tokens, accuracy {accuracy:.4f}", file=sys.stderr, flush=True)
    names = {str(path) for path in files}
    lines = [line["counted"] for line in done if names.issuperset(line["documents"])]
    places = list(zip(self.edges, self.edges[1:]))
    found = [_mean([line[i] for line in lines if i < len(line)]) for i in range(len(places))]
    _plot(places, found, record.directory / "report.png")
    named = [f"{a:,} to {b:,}" for a, b in places] + ["all"]
    found.append(_mean(found))
    rows = [
        [name, f"{tokens:,}", f"{accuracy:.4f}", f"{math.exp(nats):.3f}"]
        for name, (tokens, accuracy, nats) in zip(named, found)
        if tokens
    ]
    bins = [
        {"place": name, "tokens": n, "accuracy": accuracy, "perplexity": math.exp(nats)}
        for name, (n, accuracy, nats) in zip(named, found)
        if n
    ]
    head = ["place, tokens", "tokens", "accuracy", "perplexity"]
    curve = {place[1]: row[1] for place, row in zip(places, found) if row[0]}
    return Measured({"bins": bins, "documents": sorted(names)}, [head, *rows], curve)


def _tokens(model: Model, path: pathlib.Path) -> np.ndarray:
  return np.asarray(encode_text(model.vocabulary, read_text(path)), np.int32)


def _mean(counted: list[list[float]]) -> tuple[int, float, float]:
  """Tokens, and their accuracy and nats, of several counts."""
  weights, *values = np.array([row for row in counted if row[0]]).reshape(-1, 3).T
  if not len(weights):
    return 0, math.nan, math.nan
  return int(weights.sum()), *(float(np.average(v, weights=weights)) for v in values)


def _plot(places: list[tuple[int, int]], found, path: pathlib.Path) -> None:
  import matplotlib  # pylint: disable=import-outside-toplevel

  matplotlib.use("Agg")
  import matplotlib.pyplot as plt  # pylint: disable=import-outside-toplevel

  figure, panels = plt.subplots(1, 2, figsize=(10, 4), dpi=150, layout="constrained")
  accuracy, perplexity = [row[1] for row in found], [math.exp(row[2]) for row in found]
  for axes, values, name in zip(panels, (accuracy, perplexity), ("accuracy", "perplexity")):
    axes.plot(range(len(places)), values, marker="o")
    axes.set_xticks(range(len(places)), labels=[f"{a:,}\nto {b:,}" for a, b in places])
    axes.set(xlabel="place in the document, tokens", ylabel=f"{name} of next tokens")
    axes.grid(alpha=0.25)
  figure.savefig(path)
  plt.close(figure)
