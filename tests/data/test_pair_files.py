"""Files of pairs: every kind gives the same records, and what is wrong with one is said in a line."""

import json
import struct

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from famjax.data import PackedReader, PairFiles, load_vocabulary
from famjax.data import pair_files
from famjax.errors import UserError

BYTES = load_vocabulary("bytes")
PAIRS = [{"inputs": f"What is {i} + {i}?\nSay\tit.", "targets": f"{2 * i}"} for i in range(45)]


def write_jsonl(path, records=PAIRS):
  path.write_text("\n\n".join(json.dumps(r, ensure_ascii=False) for r in records) + "\n")
  return path


def escaped(text):
  return text.replace("\\", "\\\\").replace("\n", "\\n").replace("\t", "\\t").replace("\r", "\\r")


def write_tsv(path, records=PAIRS, head=True):
  lines = [*records[0]] if head else []
  rows = (["\t".join(lines)] if head else []) + [
      "\t".join(map(escaped, r.values())) for r in records
  ]
  path.write_bytes(("\r\n".join(rows)).encode())
  return path


def write_tfrecord(path, records=PAIRS):
  import tensorflow as tf  # pylint: disable=import-outside-toplevel

  feature = lambda text: tf.train.Feature(bytes_list=tf.train.BytesList(value=[text.encode()]))
  with tf.io.TFRecordWriter(str(path)) as writer:
    for record in records:
      features = tf.train.Features(feature={name: feature(text) for name, text in record.items()})
      writer.write(tf.train.Example(features=features).SerializeToString())
  return path


def read_all(source):
  return [source.pair(i) for i in range(len(source))]


@pytest.mark.parametrize(
    "write, name",
    [(write_jsonl, "a.jsonl"), (write_tsv, "a.tsv"), (write_tfrecord, "a.tfrecord-00000-of-00001")],
)
def test_every_kind_gives_the_same_pairs(write, name, tmp_path):
  write(tmp_path / name)
  assert read_all(PairFiles(BYTES, str(tmp_path))) == [tuple(r.values()) for r in PAIRS]


@hypothesis.given(st.text(alphabet=st.characters(exclude_categories=["Cs"])))
def test_any_text_comes_through_a_tsv_file(text):
  assert pair_files._unescaped(escaped(text)) == text


def test_several_files_in_their_order_and_split(tmp_path):
  write_jsonl(tmp_path / "b.jsonl", PAIRS[:20])
  write_tsv(tmp_path / "a.tsv", PAIRS[20:])
  files = [str(tmp_path / "b.jsonl"), str(tmp_path / "*.tsv")]
  whole = [r["targets"] for r in PAIRS]
  targets = lambda split: [t for _, t in read_all(PairFiles(BYTES, files, split=split))]
  assert targets("all") == whole
  assert targets("validation") == [whole[19], whole[39]]
  assert targets("train") == [t for i, t in enumerate(whole) if i % 20 != 19]
  assert PairFiles(BYTES, files).fingerprint.startswith("2 files, ")


def test_examples_depend_on_seed_and_index_alone(tmp_path):
  write_jsonl(tmp_path / "a.jsonl")
  templates = (("Q: {inputs}\nA:", " {targets}"), ("{inputs}", "It is {targets}."))
  source = PairFiles(BYTES, str(tmp_path / "a.jsonl"), templates)
  read = lambda seed, index: BYTES.decode(source.example(seed, index, 0)[0])
  first = [read(3, i) for i in range(45)]
  assert first == [read(3, i) for i in range(45)] != [read(4, i) for i in range(45)]
  assert sorted(t.count("\nA: ") for t in first) != [0] * 45 != sorted(t.count("It is") for t in first)
  assert len(set(first)) == 45  # an epoch has each record once
  tokens, weights = source.example(3, 0, 0)
  text = BYTES.decode(tokens[weights > 0])
  assert tokens[-1] == BYTES.eos_id and weights[-1] == 1
  assert text.removesuffix(".").split()[-1].isdigit() and "?" not in text
  batch, _ = PackedReader(source, 2, 128, repeat_length=16).read(np.zeros(1, np.int64), 0)
  assert batch["tokens"].shape == (2, 128) and set(batch["weights"].ravel()) == {
      np.float32(w) for w in (0, 0.1, 1)
  }


def test_columns_name_the_fields_of_a_file_without_a_first_line(tmp_path):
  write_tsv(tmp_path / "a.tsv", head=False)
  source = PairFiles(BYTES, str(tmp_path), (("{q}", "{a}"),), columns=("q", "a"))
  assert read_all(source) == [tuple(r.values()) for r in PAIRS]


def test_numbers_are_fields_and_lists_are_none(tmp_path):
  write_jsonl(tmp_path / "a.jsonl", [{"inputs": "one", "targets": 1, "more": [1, 2]}])
  assert PairFiles(BYTES, str(tmp_path)).pair(0) == ("one", "1")
  with pytest.raises(UserError, match="record 1 has not the field 'more'; its fields: inputs, targets"):
    PairFiles(BYTES, str(tmp_path), (("{more}", "{targets}"),))


@pytest.mark.parametrize(
    "name, content, options, message",
    [
        ("a.csv", b"x", {}, "a.csv is of no kind that is read; there is .jsonl, .tsv, .tfrecord"),
        ("a.jsonl", b"", {}, "a.jsonl has no records: leave it out"),
        ("a.jsonl", b"{", {}, "a.jsonl, record 1 cannot be read"),
        ("a.jsonl", b"[1]", {}, "record 1 cannot be read: it is no JSON object"),
        ("a.jsonl", b'{"inputs": "a", "targets": " "}', {}, "record 1 has an empty answer"),
        ("a.jsonl", b'{"inputs": "\xff"}', {}, "record 1 cannot be read"),
        ("a.tsv", b"inputs\ttargets\na\n", {}, "it has 1 fields, and there are 2 columns"),
        ("a.tsv", b"inputs\ttargets\n", {}, "a.tsv has no records"),
        ("a.tfrecord", struct.pack("<Q", 99) + b"x" * 20, {}, "is cut, or no TFRecord file"),
        ("a.tfrecord", b"xy", {}, "is cut, or no TFRecord file"),
        ("a.tfrecord", struct.pack("<Q", 3) + b"x" * 11, {}, "it is no tf.train.Example"),
        ("a.jsonl", b'{"inputs": 1}', {"split": "test"}, "use all, train or validation"),
        ("a.jsonl", b'{"inputs": 1}', {"split": "validation"}, "1 records are too few to hold one"),
        ("a.jsonl", b'{"inputs": 1}', {"templates": ()}, "give pairs"),
        ("a.jsonl", b'{"inputs": 1}', {"templates": (("{inputs", "x"),)}, "cannot be filled"),
        ("a.jsonl", b'{"inputs": "1"}', {"templates": (("{inputs[x]}", "x"),)}, "cannot be filled"),
        ("a.jsonl", b'{"inputs": 1, "targets": 2}\n{"inputs": 1}', {}, "record 2 has not the field"),
        ("a.tsv-old", b"x", {}, "a.tsv-old is of no kind that is read"),
    ],
)
def test_wrong_files_are_one_line(name, content, options, message, tmp_path):
  (tmp_path / name).write_bytes(content)
  with pytest.raises(UserError, match=message) as error:
    PairFiles(BYTES, str(tmp_path / name), **options)
  assert "\n" not in str(error.value)


def test_paths_of_both_kinds(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  write_jsonl(tmp_path / "a.jsonl", PAIRS[:2])
  write_jsonl(tmp_path / "b.jsonl", PAIRS[2:3])
  assert len(PairFiles(BYTES, ("a.jsonl", str(tmp_path / "b.jsonl")))) == 3


def test_files_that_are_not_there(tmp_path):
  for files in (str(tmp_path), str(tmp_path / "*.tsv"), str(tmp_path / "a.tsv")):
    with pytest.raises(UserError, match="no such file, or none of .jsonl, .tsv, .tfrecord in it"):
      PairFiles(BYTES, files)
  with pytest.raises(UserError, match="no files of pairs were named"):
    PairFiles(BYTES, ())
