"""The seqio tasks `passkey` and `long_text`: importing this module registers both.

They let seqio's own machinery (mixtures, caching, evaluators) see the two; the readers read the
same data without TensorFlow.
"""

import contextlib
import sys
from typing import Any, Sequence

import numpy as np
import seqio
import tensorflow as tf

from famjax.data.examples import generator
from famjax.data.long_text import find_files
from famjax.data.passkey import Lengths
from famjax.data.passkey import PassKeyFormat
from famjax.data.text_files import read_text
from famjax.data.vocabularies import as_seqio
from famjax.data.vocabularies import begin_ids
from famjax.data.vocabularies import load_vocabulary
from famjax.data.vocabularies import Vocabulary
from famjax.errors import UserError

# TensorFlow only feeds: the accelerators are JAX's. (It refuses once it has taken hold of them.)
with contextlib.suppress(RuntimeError):
  tf.config.set_visible_devices([], "GPU")

# Examples of a split, and the seed that sets the splits apart.
_PASSKEY_SPLITS = {"train": (100_000, 0), "validation": (100, 1)}


def register_passkey(
    vocabulary: str | Vocabulary = "bytes",
    filler: Lengths = Lengths(2_000, 18_000),
    key_digits: int = 5,
) -> seqio.Task:
  """Registers the task `passkey`, in place of the one that had the name.

  Features: `inputs`, the text up to the final answer, and `targets`, the answer, both int32[n], and
  their texts as `inputs_pretokenized` and `targets_pretokenized`. Splits: train (100,000 examples)
  and validation (100).

  Args:
    vocabulary: or the name of one (`load_vocabulary`).
    filler: tokens of filler; the default is the paper's range.
    key_digits: digits of a key.
  """
  vocabulary = load_vocabulary(vocabulary) if isinstance(vocabulary, str) else vocabulary
  layout = PassKeyFormat(vocabulary, key_digits)
  begin = len(begin_ids(vocabulary))

  def examples(split: str, seed: int | None):
    size, stream = _PASSKEY_SPLITS[split]
    for index in range(size):
      rng = generator(seed or 0, 2 * index + stream)
      tokens, weights = layout.write(rng, filler.draw(rng, 0))
      tokens, weights = tokens[begin:], weights[begin:]  # a task's texts begin without a symbol
      cut = int(np.argmax(weights > 0))
      yield {
          "inputs": tokens[:cut],
          "targets": tokens[cut:],
          "inputs_pretokenized": vocabulary.decode(tokens[:cut].tolist()),
          "targets_pretokenized": vocabulary.decode(tokens[cut:].tolist()),
      }

  sizes = {split: size for split, (size, _) in _PASSKEY_SPLITS.items()}
  return _register("passkey", vocabulary, examples, ("inputs", "targets"), sizes)


def register_long_text(
    vocabulary: str | Vocabulary = "bytes",
    directory: str | None = None,
    patterns: str | Sequence[str] | None = None,
) -> seqio.Task:
  """Registers the task `long_text`, in place of the one that had the name.

  Features: `targets`, int32[n], a whole file and its end, and its text as `targets_pretokenized`.
  Splits: train and validation, as `find_files` has them; the directory is looked at when a split is
  read. A file that is not UTF-8 is left out, with a line on standard error.

  Args:
    vocabulary: or the name of one (`load_vocabulary`).
    directory: of the files; None: the Python standard library.
    patterns: of file names.
  """
  vocabulary = load_vocabulary(vocabulary) if isinstance(vocabulary, str) else vocabulary

  def examples(split: str, seed: int | None):
    del seed  # seqio shuffles.
    for path in find_files(directory, patterns, split):
      try:
        text = read_text(path)
      except (UserError, OSError) as error:  # raised in a generator it would end the pipeline
        print(f"famjax: note: long_text: left out: {error}", file=sys.stderr, flush=True)
        continue
      tokens = np.asarray([*vocabulary.encode(text), vocabulary.eos_id], np.int32)
      yield {"targets": tokens, "targets_pretokenized": text}

  splits = {"train": None, "validation": None}
  return _register("long_text", vocabulary, examples, ("targets",), splits)


def _register(
    name: str,
    vocabulary: Vocabulary,
    examples: Any,
    features: Sequence[str],
    splits: dict[str, int | None],
) -> seqio.Task:
  """Registers a task whose examples come, with their tokens, from a Python generator."""
  signature = {feature: tf.TensorSpec([None], tf.int32) for feature in features}
  signature |= {f"{feature}_pretokenized": tf.TensorSpec([], tf.string) for feature in features}

  def dataset(split: str, shuffle_files: bool = False, seed: int | None = None) -> tf.data.Dataset:
    del shuffle_files  # The generators have one order; seqio's buffer shuffles it.
    return tf.data.Dataset.from_generator(
        lambda: examples(split, seed), output_signature=signature
    )

  if name in seqio.TaskRegistry.names():
    seqio.TaskRegistry.remove(name)
  return seqio.TaskRegistry.add(
      name,
      source=seqio.FunctionDataSource(
          dataset_fn=dataset,
          splits=list(splits),
          num_input_examples={k: v for k, v in splits.items() if v} or None,
      ),
      preprocessors=[],
      output_features={
          feature: seqio.Feature(as_seqio(vocabulary), add_eos=False) for feature in features
      },
      metric_fns=[],
  )


register_passkey()
register_long_text()
