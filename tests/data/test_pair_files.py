"""Files of pairs: every kind gives the same records, and what is wrong with one is said in a line."""

import csv
import gzip
import json
import random
import struct
import zlib

import numpy as np
import pytest

from famjax.data import ExampleReader, PackedReader, PairFiles, load_vocabulary
from famjax.data import crc32c, pair_files
from famjax.errors import UserError
from tests.mutations import mutations, survives

BYTES = load_vocabulary("bytes")
PAIRS = [{"inputs": f"What is {i} + {i}?\nSay\tit.", "targets": f"{2 * i}"} for i in range(45)]


def write_jsonl(path, records=PAIRS):
  path.write_text("\n\n".join(json.dumps(r, ensure_ascii=False) for r in records) + "\n")
  return path


def escaped(text):
  return text.replace("\\", "\\\\").replace("\n", "\\n").replace("\t", "\\t")


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
  with pytest.raises(UserError, match="record 1 lacks the field 'more'; its fields: inputs, targets"):
    PairFiles(BYTES, str(tmp_path), (("{more}", "{targets}"),))


def framed(data):
  """A record of a TFRecord file."""
  length = struct.pack("<Q", len(data))
  parts = length, struct.pack("<I", crc32c.masked(length)), data, struct.pack("<I", crc32c.masked(data))
  return b"".join(parts)


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
        ("a.tfrecord", struct.pack("<Q", 3) + b"x" * 11, {}, "record 1: its length has a wrong checksum"),
        ("a.tfrecord", framed(b"xxx"), {}, "it is no tf.train.Example"),
        ("a.tfrecord", framed(b"xxx")[:-1] + b"!", {}, "record 1 cannot be read: its data has a wrong"),
        ("a.tfrecord", gzip.compress(framed(b"xxx"), mtime=0), {}, "is compressed: unpack it first, with gunzip"),
        ("a.tfrecord", zlib.compress(framed(b"xxx")), {}, "is compressed .ZLIB.: write it anew without"),
        ("a.jsonl.gz", gzip.compress(b"{}", mtime=0), {}, "a.jsonl.gz is compressed"),
        ("a.jsonl", gzip.compress(b"{}", mtime=0), {}, "is compressed: unpack it first, with gunzip"),
        ("a.jsonl", '{"inputs": "a"}'.encode("utf-16"), {}, "is UTF-16: convert it"),
        ("a.tsv", "inputs\ttargets\na\tb".encode("utf-16-le"), {}, "it has a NUL byte"),
        ("a.tsv", b"inputs\ttargets\n\xe9\tb", {}, "record 1 cannot be read: 'utf-8' codec"),
        ("a.tsv", b"inputs\tinputs\na\tb", {}, "two columns are called 'inputs'"),
        ("a.tsv", b"inputs\ttargets\n\t\n", {}, "record 1 has an empty answer"),
        ("a.tsv", b"inputs\ttargets\nC:\\new\tb", {}, r"'C:.*new' may hold a newline .* escapes=True"),
        ("a.jsonl", b'{"inputs": "\\ud800", "targets": "b"}', {}, "record 1: its text is not UTF-8"),
        ("a.jsonl", b'{"inputs": "a", "inputs": "b"}', {}, "cannot be read: it has 'inputs' twice"),
        ("a.jsonl", b'{"inputs": "a", "targets": NaN}', {}, "record 1 lacks the field 'targets'"),
        ("a.jsonl", b'{"inputs": "a", "targets": null}', {}, "record 1 lacks the field 'targets'"),
        ("a.jsonl", b'{"inputs": ' + b"[" * 10**5, {}, "record 1 cannot be read"),
        ("a.jsonl", b'{"inputs": 1}', {"templates": (("{inputs.__class__}", "x"),)}, "is no field"),
        ("a.jsonl", b'{"inputs": 1}', {"templates": (("{0}", "x"),)}, "is no field"),
        ("a.jsonl", b'{"inputs": 1}', {"templates": (("{}", "x"),)}, "is no field"),
        ("a.jsonl", b'{"inputs": 1}', {"templates": (("{inputs:d}", "x"),)}, "cannot be filled"),
        ("a.jsonl", b'{"inputs": 1}', {"split": "test"}, "use all, train or validation"),
        ("a.jsonl", b'{"inputs": 1}', {"split": "validation"}, "1 records are too few to hold one"),
        ("a.jsonl", b'{"inputs": 1}', {"templates": ()}, "give pairs"),
        ("a.jsonl", b'{"inputs": 1}', {"templates": (("{inputs", "x"),)}, "cannot be filled"),
        ("a.jsonl", b'{"inputs": "1"}', {"templates": (("{inputs[x]}", "x"),)}, "cannot be filled"),
        ("a.jsonl", b'{"inputs": 1, "targets": 2}\n{"inputs": 1}', {}, "record 2 lacks the field"),
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


def test_a_byte_order_mark_is_no_part_of_the_data(tmp_path):
  mark = b"\xef\xbb\xbf"
  (tmp_path / "a.tsv").write_bytes(mark + b"inputs\ttargets\r\na\tb\r\n")
  lines = b'{"inputs": "c", "targets": "d"}\n'
  (tmp_path / "b.jsonl").write_bytes(mark + lines + mark + lines)  # two such files, one behind the other
  pairs = read_all(PairFiles(BYTES, str(tmp_path)))
  assert pairs == [("a", "b"), ("c", "d"), ("c", "d")]


def test_values_of_json_stay_as_they_are_written(tmp_path):
  record = b'{"inputs": 1.10, "targets": 12345678901234567890123, "a": true, "b": 1e400, "c": "\xe2\x80\xa8"}'
  (tmp_path / "a.jsonl").write_bytes(record)
  templates = (("{inputs} {a} {b}", "{targets}{c}"),)
  pair = PairFiles(BYTES, str(tmp_path), templates).pair(0)
  assert pair == ("1.10 True 1e400", "12345678901234567890123\u2028")


def test_a_tsv_file_is_read_as_csv_reads_it(tmp_path):
  """Quotes stand for themselves, and a line separator of Unicode ends no line."""
  content = 'inputs\ttargets\r\n"a ""b"\t"c\r\n\u2028\td\x0b\x85\r\n\t\u00a0e\r\n'
  (tmp_path / "a.tsv").write_bytes(content.encode())
  with open(tmp_path / "a.tsv", encoding="utf-8", newline="\r\n") as file:
    _, *rows = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
  assert [list(pair) for pair in read_all(PairFiles(BYTES, str(tmp_path)))] == rows


def test_fields_of_tfrecords(tmp_path):
  import tensorflow as tf  # pylint: disable=import-outside-toplevel

  features = {
      "inputs": tf.train.Feature(float_list=tf.train.FloatList(value=[0.1])),
      "targets": tf.train.Feature(int64_list=tf.train.Int64List(value=[-7])),
      "picture": tf.train.Feature(bytes_list=tf.train.BytesList(value=[b"\xff\xd8"])),
      "many": tf.train.Feature(int64_list=tf.train.Int64List(value=[1, 2])),
      "nan": tf.train.Feature(float_list=tf.train.FloatList(value=[float("nan")])),
  }
  example = tf.train.Example(features=tf.train.Features(feature=features)).SerializeToString()
  (tmp_path / "a.tfrecord").write_bytes(framed(example))
  assert next(tf.data.TFRecordDataset(str(tmp_path / "a.tfrecord")).as_numpy_iterator()) == example
  assert PairFiles(BYTES, str(tmp_path)).pair(0) == ("0.1", "-7")
  for name, message in (("picture", "cannot be read"), ("many", "lacks"), ("nan", "lacks")):
    with pytest.raises(UserError, match=message):
      PairFiles(BYTES, str(tmp_path), (("{%s}" % name, "{targets}"),))


def test_bad_records_can_be_left_out(tmp_path, capsys):
  lines = [json.dumps(record) for record in PAIRS]
  lines[3:3] = ['{"inputs": "\\ud800", "targets": "b"}', "{", '{"inputs": "a"}', "[]", '{"inputs": 1, "targets": ""}']
  (tmp_path / "a.jsonl").write_text("\n".join(lines))
  with pytest.raises(UserError, match=r"record 4: its text is not UTF-8.*PairFiles.skip_bad=True"):
    PairFiles(BYTES, str(tmp_path))
  source = PairFiles(BYTES, str(tmp_path), skip_bad=True)
  assert source.skipped == 5 and read_all(source) == [tuple(record.values()) for record in PAIRS]
  assert source.fingerprint.endswith(", 5 records left out")
  said = capsys.readouterr().err
  assert said.startswith("famjax: note: 5 records are left out") and "record 4: its text" in said
  with pytest.raises(UserError, match="no record can be used; the first: .*record 1 lacks the field 'q'"):
    PairFiles(BYTES, str(tmp_path), (("{q}", "{inputs}"),), skip_bad=True)


def test_a_damaged_record_can_be_left_out(tmp_path):
  path = write_tfrecord(tmp_path / "a.tfrecord")
  data = bytearray(path.read_bytes())
  data[40] ^= 1
  path.write_bytes(data)
  with pytest.raises(UserError, match="record 1 cannot be read: its data has a wrong checksum"):
    PairFiles(BYTES, str(path))
  source = PairFiles(BYTES, str(path), skip_bad=True)
  assert read_all(source) == [tuple(r.values()) for r in PAIRS[1:]] and source.skipped == 1


@pytest.mark.parametrize("change", ["vanishes", "is cut", "is another"])
def test_a_file_that_changes_does_not_end_a_run(change, tmp_path, capsys):
  write_jsonl(tmp_path / "a.jsonl", PAIRS[:20])
  write_jsonl(tmp_path / "b.jsonl", PAIRS[20:])
  source = PairFiles(BYTES, str(tmp_path))
  before = [source.example(0, i, 0)[0].tolist() for i in range(45)]
  if change == "vanishes":
    (tmp_path / "a.jsonl").unlink()
  else:
    (tmp_path / "a.jsonl").write_text("" if change == "is cut" else "\ud800" * 9999, errors="surrogatepass")
  after = [source.example(0, i, 0)[0].tolist() for i in range(45)]
  assert set(map(tuple, after)) == set(map(tuple, (x for x in before if x in after)))
  assert len(set(map(tuple, after))) == 25
  assert capsys.readouterr().err.count("left out, the next one is read") == 5
  (tmp_path / "b.jsonl").unlink()
  with pytest.raises(UserError, match="no record can be read any more"):
    source.example(0, 0, 0)


class Lacking:
  """Bytes, of a model that lacks two tokens."""

  def __init__(self, outside):
    self.outside = outside
    self.vocab_size, self.pad_id, self.eos_id = 259, 0, 1

  def encode(self, text):
    for name, token in self.outside.items():
      if name in text:
        raise UserError(f"the model lacks the token {name!r} (id {token})")
    return BYTES.encode(text)


def test_a_record_with_a_token_that_the_model_lacks(tmp_path):
  records = [*PAIRS[:3], {"inputs": "a <tool> b", "targets": "c"}]
  write_jsonl(tmp_path / "a.jsonl", records)
  for outside in ({"<tool>": 300, "[PAD]": 301}, {"tool": 300}):
    with pytest.raises(UserError, match=r"a.jsonl, record 4: the model lacks the token '<?tool>?' \(id 300\)"):
      PairFiles(Lacking(outside), str(tmp_path))
    assert len(PairFiles(Lacking(outside), str(tmp_path), skip_bad=True)) == 3
  assert len(PairFiles(Lacking({"<other>": 300, "toot": 301}), str(tmp_path))) == 4


TEMPLATES = (("{inputs}", "{targets}"), ("Q: {inputs}\nA:", " {targets}"), ("{targets}", "{inputs}!"))


def _mutated_bytes(data, count, seed=0):
  """Copies of bytes with some of them changed, removed, doubled, or put in."""
  rng = random.Random(seed)
  odd = [b"\0", b"\xff", b"\r", b"\n", b"\t", b"\\", b"\xef\xbb\xbf", b'"', b"\\ud800", b"NaN", b"{", b"\xe2\x80\xa8"]
  for _ in range(count):
    broken = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5))):
      place = rng.randrange(len(broken) + 1)
      end = min(len(broken), place + rng.choice((0, 1, 1, 4, 50)))
      broken[place:end] = rng.choice((b"", rng.randbytes(1), rng.choice(odd), bytes(broken[place:end]) * 2))
    yield bytes(broken)


def _every_example_can_be_read(path, skip_bad):
  """The law: what was not refused at once gives every example, by all templates."""
  source = PairFiles(BYTES, str(path), TEMPLATES, skip_bad=skip_bad)
  for index in range(len(source)):
    for template in range(len(TEMPLATES)):
      inputs, targets = source.pair(index, template)
      assert (inputs + targets).encode() and targets.strip()
  assert source._lost == 0
  reader = ExampleReader(source, 4, 64)
  position = reader.start()
  while position[0] < len(source):
    batch, position = reader.read(position, 0)
    assert batch["tokens"].max() < BYTES.vocab_size
  assert source._lost == 0


def _json(value):
  try:
    return json.dumps(value)
  except RecursionError:  # reading it has to cope all the same
    return '{"inputs": "a", "targets": ' + "[" * 2000 + "]" * 2000 + "}"


@pytest.mark.parametrize("kind", ["values.jsonl", "bytes.jsonl", "bytes.tsv", "bytes.tfrecord"])
def test_a_record_can_never_end_a_run(kind, tmp_path):
  records = [{"inputs": f"What is\t{i}\n?", "targets": f"\u00e9 {i} \\n", "n": i} for i in range(1, 6)]
  path = tmp_path / kind
  if kind == "values.jsonl":
    lines = ["\n".join(map(_json, broken)).encode() for broken in mutations(records, 1000)]
  else:
    texts = [{name: str(value) for name, value in record.items()} for record in records]
    {"jsonl": write_jsonl, "tsv": write_tsv, "tfrecord": write_tfrecord}[kind[6:]](path, texts)
    lines = list(_mutated_bytes(path.read_bytes(), 1000))
  fine = {False: 0, True: 0}
  for number, data in enumerate(lines):
    path.write_bytes(data)
    for skip_bad in (False, True):
      fine[skip_bad] += survives(lambda: _every_example_can_be_read(path, skip_bad), (number, data))
  assert 5 < fine[False] < fine[True]


def test_long_files_show_progress(tmp_path, capsys, monkeypatch):
  """A file of gigabytes takes minutes to check."""
  path = tmp_path / "a.jsonl"
  path.write_text('{"inputs": "a", "targets": "b"}\n' * 50, encoding="utf-8")
  monkeypatch.setattr(pair_files, "QUIET_SECONDS", 0)
  PairFiles(BYTES, str(path))
  assert "checking pairs" in capsys.readouterr().err
  monkeypatch.setattr(pair_files, "QUIET_SECONDS", 60)
  PairFiles(BYTES, str(path))
  assert not capsys.readouterr().err
