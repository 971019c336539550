"""seqio tasks of the paper's evaluations, with the metrics of t5: `register` makes them.

Names and prompts need no TensorFlow; `register` and what it returns do. The examples of a ranked
task are those of t5's `rank_classification`: one for each option, with `idx` (question, option),
`inputs`, `targets` and `is_correct`. Those of a generated one have `inputs`, `targets` (the first
answer, after a space) and `answers`. All have their texts as `inputs_pretokenized` and
`targets_pretokenized`.
"""

from collections.abc import Sequence
import difflib
import functools
import json
import operator
from typing import Any

import numpy as np

from famjax.data import gpt3_tasks, long_context_tasks
from famjax.data.prompts import Files, Generated, Ranked, Spec, plain
from famjax.data.vocabularies import as_seqio, encode_after, load_vocabulary, Vocabulary
from famjax.errors import UserError

GPT3 = tuple(gpt3_tasks.TASKS)
LONG_CONTEXT = tuple(long_context_tasks.TASKS)
TASKS: dict[str, Spec] = long_context_tasks.TASKS | gpt3_tasks.TASKS


def spec_of(name: str) -> Spec:
  """A task by name. Raises UserError for one that there is not."""
  if name not in TASKS:
    near = difflib.get_close_matches(name, TASKS) or TASKS
    raise UserError(f"task {name!r} is unknown; there is {', '.join(near)}")
  return TASKS[name]


def register(
    names: Sequence[str] = tuple(TASKS),
    vocabulary: str | Vocabulary = "bytes",
    directory: str | None = None,
    per_token: bool = False,
) -> list[Any]:
  """Registers tasks, in place of those that had their names.

  Args:
    names: of `TASKS`.
    vocabulary: or the name of one (`load_vocabulary`).
    directory: of all data: TFDS's and the files of `long_context_tasks`. None: TFDS's own.
    per_token: ranks options by their mean log-probability per token, not by the sum.

  Returns:
    The `seqio.Task` of each name. It reads what is there; `prepare` fetches what TFDS can fetch.

  Raises:
    UserError: a name is unknown.
  """
  import seqio  # pylint: disable=g-import-not-at-top

  # It leaves the accelerators to JAX.
  from famjax.data import tasks as _  # pylint: disable=g-import-not-at-top

  specs = [spec_of(name) for name in names]
  vocabulary = load_vocabulary(vocabulary) if isinstance(vocabulary, str) else vocabulary
  feature = seqio.Feature(as_seqio(vocabulary), add_eos=False)
  tasks = []
  for name, spec in zip(names, specs):
    ranked = isinstance(spec, Ranked)
    ask, metrics, postprocess = (_ranked if ranked else _generated)(spec, per_token)
    if name in seqio.TaskRegistry.names():
      seqio.TaskRegistry.remove(name)
    task = seqio.TaskRegistry.add(
        name,
        source=_source(spec.source, directory),
        preprocessors=[*ask, seqio.preprocessors.tokenize, *_options(vocabulary, ranked)],
        output_features={"inputs": feature, "targets": feature},
        postprocess_fn=postprocess,
        metric_fns=metrics,
    )
    tasks.append(task)
  return tasks


def _options(vocabulary: Vocabulary, ranked: bool) -> list[Any]:
  """Returns a preprocessor, or none: options get the ids that they have after their inputs.

  An option of no tokens would always be the likeliest. It becomes the end of the text.
  """
  import tensorflow as tf  # pylint: disable=g-import-not-at-top

  def tokens(text: bytes, inputs: bytes) -> np.ndarray:
    ids = encode_after(vocabulary, text.decode(), inputs.decode())
    return np.asarray(ids or [vocabulary.eos_id], np.int32)

  def settle(x):
    texts = [x["targets_pretokenized"], x.get("inputs_pretokenized", "")]
    targets = tf.numpy_function(tokens, texts, tf.int32)
    return x | {"targets": tf.ensure_shape(targets, [None])}

  return [lambda dataset: dataset.map(settle)] if ranked else []


def prepare(task: Any, split: str) -> None:
  """Has TFDS fetch what a task needs, if it is not there yet, and looks for its split.

  Raises:
    UserError: it cannot be fetched, files are missing, or there is no such split.
  """
  source, spec = task.source, spec_of(task.name)
  if not isinstance(spec.source, Files):
    builder = source.tfds_dataset.builder
    try:
      builder.download_and_prepare()
    except Exception as error:  # whatever a network, a disk, or a manual download makes it raise
      what = f"{builder.info.full_name} is not in {builder.data_dir}, and TFDS cannot fetch it"
      lines = str(error).split("\n")
      raise UserError(f"task {task.name!r}: {what}: {next(filter(None, lines), '')}") from error
  if split not in source.splits:
    splits = ", ".join(sorted(source.splits))
    raise UserError(f"task {task.name!r} has no split {split!r}; use one of: {splits}")
  if isinstance(spec.source, Files):
    source.get_dataset(split, shuffle=False)


def _source(source: str | Files, directory: str | None) -> Any:
  """A `seqio.DataSource`; examples of files are JSON, whose features `Spec.ask` alone knows."""
  import seqio  # pylint: disable=g-import-not-at-top
  import tensorflow as tf  # pylint: disable=g-import-not-at-top

  if isinstance(source, str):
    return seqio.TfdsDataSource(source, tfds_data_dir=directory, read_only=True)

  def dataset(split: str, shuffle_files: bool = False, seed: int | None = None) -> tf.data.Dataset:
    del shuffle_files, seed  # questions about a document stay together
    path = source.find(directory, split)
    examples = lambda: map(json.dumps, source.read(path, source.splits[split]))
    return tf.data.Dataset.from_generator(examples, output_signature=tf.TensorSpec([], tf.string))

  return seqio.FunctionDataSource(dataset, splits=list(source.splits))


def _asked(dataset: Any, spec: Spec, signature: dict[str, Any]) -> Any:
  """Puts the examples of a source into words; `signature` names the fields of what is asked."""
  import tensorflow as tf  # pylint: disable=g-import-not-at-top

  of_files = isinstance(spec.source, Files)

  def examples():
    for example in dataset.as_numpy_iterator():
      for asked in spec.ask(json.loads(example) if of_files else plain(example)):
        yield dict(zip(signature, asked))

  return tf.data.Dataset.from_generator(examples, output_signature=signature)


def _ranked(spec: Ranked, per_token: bool) -> tuple[list[Any], list[Any], Any]:
  """Preprocessors, metrics and the postprocessor."""
  from t5.data import postprocessors, preprocessors  # pylint: disable=g-import-not-at-top
  from t5.evaluation import metrics  # pylint: disable=g-import-not-at-top
  import tensorflow as tf  # pylint: disable=g-import-not-at-top

  texts, flags = tf.TensorSpec([None], tf.string), tf.TensorSpec([None], tf.bool)
  signature = {"inputs": texts, "targets": texts, "is_correct": flags}
  ask = functools.partial(_asked, spec=spec, signature=signature)
  rank = functools.partial(
      preprocessors.rank_classification,
      **{f"{name}_fn": operator.itemgetter(name) for name in signature},
  )
  metric = functools.partial(
      metrics.rank_classification, num_classes=spec.classes, normalize_by_target_length=per_token
  )
  return [ask, rank], [metric], postprocessors.rank_classification


def _generated(spec: Generated, per_token: bool) -> tuple[list[Any], list[Any], Any]:
  """Preprocessors, metrics and the postprocessor."""
  from t5.data import postprocessors  # pylint: disable=g-import-not-at-top
  from t5.evaluation import metrics  # pylint: disable=g-import-not-at-top
  import tensorflow as tf  # pylint: disable=g-import-not-at-top

  del per_token  # nothing is ranked
  signature = {"inputs": tf.TensorSpec([], tf.string), "answers": tf.TensorSpec([None], tf.string)}
  ask = functools.partial(_asked, spec=spec, signature=signature)
  first = lambda dataset: dataset.map(lambda x: x | {"targets": " " + x["answers"][0]})
  known = {"trivia_qa": metrics.trivia_qa, "squad": metrics.squad, "rouge": rouge}

  def postprocess(said: str, example: Any = None, is_target: bool = False):
    return postprocessors.qa(said if is_target else spec.taken(said), example, is_target)

  return [ask, first], [known[name] for name in spec.metrics], postprocess


def rouge(targets: Sequence[Sequence[str]], predictions: Sequence[str]) -> dict[str, float]:
  """t5's ROUGE of each prediction with that of its references which it is nearest to by ROUGE-L.

  Args:
    targets: references of each prediction.
    predictions: as many.

  Returns:
    "rouge1", "rouge2" and "rougeL", F-measures in percent, as t5 has them: medians of a bootstrap
    that draws from NumPy's own random numbers.
  """
  from rouge_score import rouge_scorer  # pylint: disable=g-import-not-at-top
  from t5.evaluation import metrics  # pylint: disable=g-import-not-at-top

  scorer = rouge_scorer.RougeScorer(["rougeL"])
  near = lambda said, one: scorer.score(target=one, prediction=said)["rougeL"].fmeasure
  best = [
      max(several, key=functools.partial(near, said)) for several, said in zip(targets, predictions)
  ]
  return metrics.rouge(best, predictions, score_keys=("rouge1", "rouge2", "rougeL"))
