"""seqio: the tasks iterate, and any task feeds the readers, by index and again after a restart."""

import numpy as np
import pytest

seqio = pytest.importorskip("seqio", reason="the core runs without it")
tf = pytest.importorskip("tensorflow", reason="the core runs without it")

from famjax.data import tasks  # pylint: disable=wrong-import-position
from famjax.data.examples import TaskExamples
from famjax.data.packing import REPEAT_PROMPT
from famjax.data.passkey import Lengths
from famjax.data.readers import ExampleReader
from famjax.data.readers import PackedReader
from famjax.data.vocabularies import as_seqio
from famjax.data.vocabularies import load_vocabulary
from famjax.errors import UserError


@pytest.fixture
def small_tasks(tmp_path):
  for i in range(25):
    (tmp_path / f"{i:02d}.txt").write_text(f"file {i} " * 9)
  yield (
      tasks.register_passkey("passkey_words", Lengths(10, 40), key_digits=3),
      tasks.register_long_text("bytes", str(tmp_path)),
  )
  tasks.register_passkey()
  tasks.register_long_text()


@pytest.fixture
def sums_task():
  """A task made as seqio's users make them: text, tokenised by seqio, with an end symbol."""
  vocabulary = as_seqio(load_vocabulary("bytes"))

  def dataset(split, shuffle_files=False, seed=None):
    numbers = range(50) if split == "train" else range(50, 55)
    return tf.data.Dataset.from_tensor_slices(
        {"inputs": [f"{i} + 1 =" for i in numbers], "targets": [f" {i + 1}" for i in numbers]}
    )

  seqio.TaskRegistry.add(
      "famjax_sums",
      source=seqio.FunctionDataSource(dataset_fn=dataset, splits=["train", "validation"]),
      preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos],
      output_features={
          "inputs": seqio.Feature(vocabulary, add_eos=False),
          "targets": seqio.Feature(vocabulary, add_eos=True),
      },
  )
  yield "famjax_sums"
  seqio.TaskRegistry.remove("famjax_sums")


def test_the_passkey_task_iterates(small_tasks):
  task, _ = small_tasks
  vocabulary = task.output_features["targets"].vocabulary
  dataset = task.get_dataset(None, "validation", shuffle=False)
  examples = list(dataset.as_numpy_iterator())
  assert len(examples) == 100
  for example in examples:
    assert example["inputs"].dtype == np.int32 and len(example["targets"]) == 3
    text = example["inputs_pretokenized"].decode() + " " + example["targets_pretokenized"].decode()
    assert text.startswith("There is an important info") and text.count(text[-3:]) >= 3
    ids = [*example["inputs"].tolist(), *example["targets"].tolist()]
    assert vocabulary.decode(ids) == text
    assert vocabulary.encode_tf(tf.constant(text)).numpy().tolist() == ids
  assert vocabulary.decode_tf(tf.constant([ids, ids])).numpy().tolist() == [text.encode()] * 2
  train = next(task.get_dataset(None, "train", shuffle=False).as_numpy_iterator())
  assert train["inputs_pretokenized"] != examples[0]["inputs_pretokenized"]


def test_the_long_text_task_iterates(small_tasks):
  _, task = small_tasks
  vocabulary = task.output_features["targets"].vocabulary
  for split, count in (("train", 24), ("validation", 1)):
    examples = list(task.get_dataset(None, split, shuffle=False).as_numpy_iterator())
    assert len(examples) == count
    for example in examples:
      assert example["targets"][-1] == vocabulary.eos_id
      assert vocabulary.decode(example["targets"].tolist()) == example[
          "targets_pretokenized"
      ].decode()


def test_both_are_registered_and_mix(small_tasks):
  assert {"passkey", "long_text"} <= set(seqio.TaskRegistry.names())
  seqio.MixtureRegistry.add("famjax_mix", ["passkey"], default_rate=1)
  try:
    source = TaskExamples("famjax_mix", "validation")
    assert source.example(0, 0, 0)[1].sum() == 3
  finally:
    seqio.MixtureRegistry.remove("famjax_mix")


@pytest.mark.parametrize("mixed", [False, True], ids=["task", "mixture"])
def test_a_task_becomes_the_tokens_of_another_vocabulary(sums_task, mixed):
  """As for FLAN's mixtures, whose own vocabulary is T5's."""
  words = load_vocabulary("passkey_words")
  name = sums_task
  if mixed:
    name = "famjax_mix"
    seqio.MixtureRegistry.add(name, [(sums_task, 2.0)])
  try:
    source = TaskExamples(name, "validation", vocabulary=words, shuffle=False)
    own = TaskExamples(name, "validation", shuffle=False)
  finally:
    if mixed:
      seqio.MixtureRegistry.remove(name)
  assert source.vocabulary is words
  tokens, weights = source.example(0, 1, 0)
  texts = " 51 + 1 =", " 52"
  assert tokens.tolist() == [*words.encode(texts[0]), *words.encode(texts[1]), words.eos_id]
  assert weights.sum() == len(words.encode(texts[1])) + 1
  assert own.example(0, 1, 0)[0].tolist() != tokens.tolist()  # the task itself stays as it is


def test_several_texts_at_once_are_a_ragged_tensor():
  vocabulary = load_vocabulary("bytes")
  rows = as_seqio(vocabulary).encode_tf(tf.constant(["ab", "", "xyz"]))
  assert rows.to_list() == [vocabulary.encode(text) for text in ("ab", "", "xyz")]


@pytest.mark.parametrize("shuffle", [True, False])
def test_a_task_is_read_by_index_through_its_epochs(sums_task, shuffle):
  source = TaskExamples(sums_task, shuffle=shuffle)
  decode = lambda tokens: source.vocabulary.decode(tokens.tolist())
  read = [source.example(4, index, 0) for index in range(110)]
  texts = [decode(tokens) for tokens, _ in read]
  in_order = [f"{i} + 1 = {i + 1}" for i in range(50)]
  assert set(texts) <= set(in_order)
  assert (texts[:100] == in_order * 2) != shuffle
  for index in (57, 3, 4, 109, 57):
    tokens, weights = source.example(4, index, 0)
    np.testing.assert_array_equal(tokens, read[index][0])
    np.testing.assert_array_equal(weights, read[index][1])
  fresh = TaskExamples(sums_task, shuffle=shuffle).example(4, 57, 0)[0]
  np.testing.assert_array_equal(fresh, read[57][0])
  for tokens, weights in read:
    assert decode(tokens[weights == 0]).endswith("=") and tokens[-1] == source.vocabulary.eos_id
  if shuffle:
    assert [decode(source.example(5, i, 0)[0]) for i in range(10)] != texts[:10]


def test_a_task_feeds_the_readers(sums_task):
  source = TaskExamples(sums_task)
  reader = PackedReader(source, 2, 100, repeat_length=20, seed=1)
  position = reader.start()
  batches = []
  for step in range(4):
    batch, position = reader.read(position, step)
    batches.append((batch, position))
    text = source.vocabulary.decode([i for i in batch["tokens"][0].tolist() if i > 2])
    assert REPEAT_PROMPT in text and (batch["lengths"] == 100).all()
  fresh = PackedReader(TaskExamples(sums_task), 2, 100, repeat_length=20, seed=1)
  again, _ = fresh.read(batches[2][1], 3)
  np.testing.assert_array_equal(again["tokens"], batches[3][0]["tokens"])
  reader = ExampleReader(TaskExamples(sums_task, "validation", shuffle=False), 2, 30, rows=(1,))
  batch, position = reader.read(reader.start(), 0)
  assert source.vocabulary.decode(batch["tokens"][0].tolist()).startswith("51 + 1 = 52")
  batch, _ = reader.read(position, 1)
  assert source.vocabulary.decode(batch["tokens"][0].tolist()).startswith("53 + 1 = 54")


def test_one_vocabulary_has_one_adapter():
  vocabulary = load_vocabulary("bytes")
  adapter = as_seqio(vocabulary)
  assert adapter is as_seqio(load_vocabulary("bytes"))
  assert (adapter.vocab_size, adapter.eos_id, adapter.pad_id) == (259, 1, 0)
  assert adapter.decode(adapter.encode("naïve")) == "naïve"


def test_what_is_not_there_is_named():
  with pytest.raises(UserError, match="'paskey'.*near it: passkey"):
    TaskExamples("paskey")
  with pytest.raises(UserError, match="no split 'test'.*train, validation"):
    TaskExamples("passkey", "test")
  with pytest.raises(UserError, match="no_such_module"):
    TaskExamples("passkey", modules="no_such_module")


@pytest.fixture
def task_of():
  """Registers a task of numbers, by a function of a number to an example's features."""
  names = []

  def register(features, count=40):
    names.append(f"famjax_bad_{len(names)}")

    def dataset(split, shuffle_files=False, seed=None):
      return tf.data.Dataset.range(count).map(features)

    seqio.TaskRegistry.add(
        names[-1],
        source=seqio.FunctionDataSource(dataset_fn=dataset, splits=["train"]),
        preprocessors=[],
        output_features={"targets": seqio.Feature(as_seqio(load_vocabulary("bytes")), add_eos=False)},
    )
    return TaskExamples(names[-1], shuffle=False)

  yield register
  for name in names:
    seqio.TaskRegistry.remove(name)


def test_a_bad_example_of_a_task_is_left_out_and_counted(task_of, capsys):
  def features(i):
    with tf.control_dependencies([tf.debugging.assert_none_equal(i, tf.constant(5, tf.int64))]):
      i = tf.identity(i)
    targets = tf.where(i % 10 == 8, tf.stack([259]), tf.cast(i, tf.int32)[None])
    return {"targets": targets[: tf.where(i % 10 == 7, 0, 1)]}

  good = [i for i in range(40) if i != 5 and i % 10 not in (7, 8)]
  source = task_of(features)
  read = [source.example(0, i, 0)[0].tolist() for i in range(2 * len(good))]
  assert read == [[i] for i in good * 2] and source.skipped == 18
  assert source.example(0, 40, 0)[0].tolist() == read[40]  # as a restart does
  said = capsys.readouterr().err.splitlines()
  assert len(said) == 1 and "1 examples are left out; the last: " in said[0]


def test_a_task_whose_examples_are_all_bad_is_refused(task_of):
  for features, message in (
      (lambda i: {"targets": tf.zeros([0], tf.int32)}, "1000 examples one after another cannot be used: its"),
      (lambda i: {"targets": tf.fill([2], 300)}, "ids from 300 to 300, and the vocabulary 259"),
  ):
    with pytest.raises(UserError, match=message):
      task_of(features).example(0, 0, 0)


def test_a_text_that_is_no_utf8_does_not_end_a_task(small_tasks, tmp_path, capsys):
  (tmp_path / "00.txt").write_bytes(b"\xff")
  source = TaskExamples("long_text", shuffle=False)
  texts = [source.vocabulary.decode(source.example(0, i, 0)[0].tolist()) for i in range(46)]
  assert len(set(texts)) == 23 and texts[0].startswith("file 1 ")
  assert "00.txt is not UTF-8" in capsys.readouterr().err
