"""Sources: one example or document per index, as tokens and loss weights.

Every reader asks a source for `example(seed, index, step)`, and the answer depends on nothing else,
so that a restart, another process or another reader sees the same data.
"""

import dataclasses
import difflib
import functools
import importlib
import sys
from typing import Any, Protocol, Sequence

import numpy as np

from famjax.data.outside import check_inside
from famjax.data.text_files import check_text
from famjax.data.vocabularies import begun, encode_pair, Vocabulary
from famjax.errors import one_line, UserError

# Streams of random numbers that must not be the same numbers (see `generator`).
EXAMPLE, ORDER, REPEAT, TEMPLATE = range(4)


class Source(Protocol):
  """Gives example number `index`."""

  vocabulary: Vocabulary

  def example(self, seed: int, index: int, step: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns one example, the same one for the same arguments.

    Args:
      seed: of the reader.
      index: number of the example, from 0, without end; a finite source starts a new epoch.
      step: training step at which the example begins; a curriculum looks at it.

    Returns:
      tokens int32[n] and weights float32[n]: the loss weight of predicting that token.
    """


def generator(seed: int, index: int, stream: int = EXAMPLE) -> np.random.Generator:
  """Returns random numbers that depend on the arguments alone (Philox, keyed by seed and index)."""
  key = np.array([seed, index], np.uint64)
  return np.random.Generator(np.random.Philox(key=key, counter=stream << 192))


def join(inputs: Sequence[int], targets: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
  """Returns inputs (weight 0) and targets (weight 1) as one sequence (SPEC section 5)."""
  tokens = np.concatenate([np.asarray(inputs, np.int32), np.asarray(targets, np.int32)])
  weights = np.zeros(len(tokens), np.float32)
  weights[len(inputs) :] = 1
  return tokens, weights


def join_texts(
    vocabulary: Vocabulary, inputs: str, targets: str
) -> tuple[np.ndarray, np.ndarray]:
  """Returns the `join` of an instruction, which begins a text, and an answer, which ends it."""
  first, rest = encode_pair(vocabulary, inputs, targets)
  return join(first, [*rest, vocabulary.eos_id])


def shuffled(seed: int, index: int, size: int) -> int:
  """Returns what stands at a place of an endless row of epochs, each in an order of its own."""
  epoch, place = divmod(index, size)
  return int(_order(seed, epoch, size)[place])


@functools.lru_cache(maxsize=4)  # The rows of a batch are in one epoch or in two.
def _order(seed: int, epoch: int, size: int) -> np.ndarray:
  return generator(seed, epoch, ORDER).permutation(size)


class PairExamples:
  """Pairs of text: an instruction (weight 0) and its answer (weight 1), which ends with `eos_id`.

  Attributes:
    vocabulary: encodes both, when they are read.
  """

  def __init__(
      self, pairs: Sequence[tuple[str, str]], vocabulary: Vocabulary, *, shuffle: bool = True
  ):
    """Takes any list-like of (inputs, targets); `shuffle` draws another order for every epoch."""
    if not len(pairs):
      raise UserError("there are no (inputs, targets) pairs; give at least one")
    self.vocabulary = vocabulary
    self._pairs = pairs
    self._shuffle = shuffle

  def check(self) -> None:
    """Raises UserError if a pair is not two texts, or holds a token that the model lacks."""
    for number in range(len(self._pairs)):
      pair, where = self._pairs[number], f"pair {number}"
      if len(pair) != 2 or not all(isinstance(text, str) for text in pair):
        raise UserError(f"{where} is {pair!r:.80}: give an instruction and an answer, two strings")
      for text in pair:
        check_inside(self.vocabulary, check_text(text, where), where)

  def example(self, seed: int, index: int, step: int) -> tuple[np.ndarray, np.ndarray]:
    """See `Source`."""
    del step  # The pairs are the same throughout.
    size = len(self._pairs)
    inputs, targets = self._pairs[shuffled(seed, index, size) if self._shuffle else index % size]
    return join_texts(self.vocabulary, inputs, targets)


def _in_tokens_of(vocabulary: Vocabulary, task: Any) -> Any:
  """A seqio task or mixture whose texts become the tokens of a vocabulary."""
  import seqio  # pylint: disable=g-import-not-at-top

  from famjax.data.vocabularies import as_seqio  # pylint: disable=g-import-not-at-top

  if isinstance(task, seqio.Mixture):
    tasks = [(_in_tokens_of(vocabulary, one), task.get_rate(one)) for one in task.tasks]
    return seqio.Mixture(task.name, tasks, sample_fn=task._sample_fn)  # pylint: disable=protected-access
  features = {
      name: dataclasses.replace(feature, vocabulary=as_seqio(vocabulary))
      for name, feature in task.output_features.items()
  }
  return task.replace(output_features=features)


class TaskExamples:
  """Examples of a seqio task or mixture: weight 0 on its `inputs`, if any, and 1 on its `targets`.

  The examples come in the order of the task's own pipeline, repeated without end (seqio shuffles
  them within a buffer, which mixes the epochs of a small task). Asking for growing indices goes on
  reading; asking for an earlier one opens the pipeline again and skips to it, as a restart does,
  which costs the time of making the examples that are skipped. Not for two threads.

  A task cannot be looked through before training, because it may have no end. So an example that its
  pipeline cannot make, or that has no tokens or one outside of the vocabulary, is left out and
  counted, with a line on standard error for the first of them.

  Attributes:
    vocabulary: of its `targets`: the task's own (a `seqio.Vocabulary`), or the one that was given.
    skipped: number of examples that were left out so far.
  """

  _MOST_BAD = 1000  # examples one after another that are left out, before the task is given up

  def __init__(
      self,
      name: str,
      split: str = "train",
      *,
      modules: Sequence[str] = (),
      vocabulary: Vocabulary | None = None,
      shuffle: bool = True,
      use_cached: bool = False,
  ):
    """Finds the task.

    Args:
      name: of a task or mixture in seqio's registry; "passkey" and "long_text" are always there.
      split: of the task.
      modules: Python modules to import first, which register the task.
      vocabulary: makes the tokens, in place of the task's own; None: the task's own.
      shuffle: whether seqio shuffles, with the reader's seed.
      use_cached: read what `seqio_cache_tasks` has written.

    Raises:
      UserError: no such module, task or split.
    """
    import seqio  # pylint: disable=g-import-not-at-top

    for module in ("famjax.data.tasks", *([modules] if isinstance(modules, str) else modules)):
      try:
        importlib.import_module(module)
      except ModuleNotFoundError as error:
        raise UserError(
            f"module {module!r} cannot be imported ({error}); name an installed module that"
            f" registers the task {name!r}"
        ) from error
    try:
      self._task = seqio.get_mixture_or_task(name)
    except ValueError as error:
      known = [*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()]
      near = ", ".join(difflib.get_close_matches(name, known) or sorted(known)[:5])
      raise UserError(
          f"no seqio task or mixture is called {name!r} (near it: {near}); name one of those or the"
          " module that registers it"
      ) from error
    if split not in self._task.splits:
      splits = ", ".join(sorted(self._task.splits))
      raise UserError(f"task {name!r} has no split {split!r}; use one of: {splits}")
    if vocabulary is None:
      vocabulary = self._task.output_features["targets"].vocabulary
    elif use_cached:
      raise UserError(f"task {name!r}: what is cached has its own vocabulary: leave use_cached out")
    else:
      self._task = _in_tokens_of(vocabulary, self._task)
    self.vocabulary = vocabulary
    self._options = dict(split=split, shuffle=shuffle, use_cached=use_cached, num_epochs=None)
    self.skipped = 0
    self._stream: Any = iter(())
    self._next = (None, 0)  # Seed of the stream, and the index that it gives next.

  def example(self, seed: int, index: int, step: int) -> tuple[np.ndarray, np.ndarray]:
    """See `Source`."""
    del step  # The task knows of no training step.
    if self._next[0] != seed or index < self._next[1]:
      dataset = self._task.get_dataset(sequence_length=None, seed=seed, **self._options)
      self._stream = dataset.as_numpy_iterator()
      self._next = (seed, 0)
    for _ in range(index - self._next[1] + 1):
      example = self._good_example()
    self._next = (seed, index + 1)
    return example

  def _good_example(self) -> tuple[np.ndarray, np.ndarray]:
    """Returns the next example that can be trained on. Raises UserError if there is none."""
    import tensorflow as tf  # pylint: disable=g-import-not-at-top

    name, bad = f"task {self._task.name!r}", None
    for _ in range(self._MOST_BAD):
      try:
        example = next(self._stream, None)
        if example is None and bad:
          raise UserError(f"{name} ends after an example that cannot be made: {bad}")
        if example is None:
          raise UserError(f"{name} has no examples in {self._options['split']!r}")
        return self._joined(example)
      except (ValueError, tf.errors.OpError) as error:
        if isinstance(error, UserError):
          raise
        bad = one_line(error, 300)
        self.skipped += 1
        if self.skipped == 1 or self.skipped % 1000 == 0:
          print(
              f"famjax: note: {name}: {self.skipped:,} examples are left out; the last: {bad}",
              file=sys.stderr, flush=True,
          )  # fmt: skip
    raise UserError(f"{name}: {self._MOST_BAD} examples one after another cannot be used: {bad}")

  def _joined(self, example: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Returns inputs and targets as one sequence. Raises ValueError if they are wrong."""
    parts = [np.asarray(example.get(name, ())) for name in ("inputs", "targets")]
    size = self.vocabulary.vocab_size
    for part in parts:
      if part.ndim != 1 or (part.size and part.dtype.kind not in "iu"):
        what = f"{part.dtype}{list(part.shape)}"
        raise ValueError(f"it has an array {what}, and ids are a row of integers")
      if part.size and not 0 <= part.min() <= part.max() < size:
        ids = f"{part.min()} to {part.max()}"
        raise ValueError(f"it has ids from {ids}, and the vocabulary {size:,}")
    if not parts[1].size:
      raise ValueError("its targets have no tokens")
    return join(begun(self.vocabulary, parts[0].tolist()), parts[1])
