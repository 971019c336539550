"""Every gin file parses, every run of them resolves, and the command line's names are checked."""

import pathlib

import gin
import numpy as np
import pytest

from famjax import cli, configuration
from famjax.configuration import CONFIGURABLE, configure, operative_settings, quoted
from famjax.errors import UserError
from famjax.model.config import ModelConfig
from famjax.training.checkpoint import About, save_params

GIN = pathlib.Path(configuration.__file__).parent.parent / "gin"
RUN = "gin/runs/long_text.gin"
# What a run file leaves to be set, beside RUN_DIR.
REQUIRED = {
    "packed_task": ["TASK=passkey", "VOCABULARY=bytes"],
    "passkey_base": ["TRAIN_STEPS=10", "LONGEST_BLOCKS=8"],
    "retrofit": ["INITIAL_CHECKPOINT=runs/base", "VOCABULARY=bytes"],
    "finetune_flan": ["INITIAL_CHECKPOINT=runs/base", "VOCABULARY=bytes", "DATA=pairs.jsonl"],
}
# Files that stack on another run than RUN.
RUN_OF = {
    **dict.fromkeys(["passkey_examples", "passkey_short"], "gin/runs/passkey.gin"),
    "questions": "gin/runs/excerpts.gin",
    **dict.fromkeys(["seqio_task", "model_of_checkpoint"], "gin/runs/finetune_flan.gin"),
}


def files(folder):
  return sorted(path.relative_to(GIN.parent).as_posix() for path in (GIN / folder).glob("*.gin"))


def resolve(gin_files, bindings):
  """The arguments of `train`, with every object made."""
  configure(gin_files, ["RUN_DIR=runs/test", *bindings])
  arguments = gin.get_configurable("train")()
  for name in ("model", "optimizer", "config"):
    arguments[name].validate()
  return arguments


@pytest.fixture(name="pairs")
def _pairs(tmp_path, monkeypatch):
  """A working directory with a file of pairs, and a checkpoint's model."""
  monkeypatch.chdir(tmp_path)
  (tmp_path / "pairs.jsonl").write_text('{"inputs": "Say it.", "targets": "It."}\n')
  about = About(ModelConfig(vocab_size=320, num_layers=1), "bytes")
  save_params(tmp_path / "runs" / "base", {"x": np.zeros(1)}, about)


@pytest.mark.parametrize("path", files("runs"))
@pytest.mark.usefixtures("pairs")
def test_every_run_resolves(path):
  name = pathlib.Path(path).stem
  with pytest.raises(UserError, match="RUN_DIR"):
    configure([path], [])
  if name == "train_base":  # the others include it, and bring the readers
    return
  arguments = resolve([path], REQUIRED.get(name, []))
  reader, model = arguments["train_reader"], arguments["model"]
  assert reader.length % model.memory.block_size == 0
  assert reader.vocabulary.vocab_size <= model.vocab_size
  header = (GIN.parent / path).read_text().split("\n\n")[0]
  for word in ("To be set", "RUN_DIR", "Commonly overridden"):
    assert word in header  # a run file says what it needs
  settings = operative_settings()
  assert settings["train.run_dir"] == "'runs/test'" and not any("%" in v for v in settings.values())


@pytest.mark.parametrize("path", files("models") + files("memory") + files("options"))
@pytest.mark.usefixtures("pairs")
def test_every_other_file_stacks_on_a_run(path):
  name = pathlib.Path(path).stem
  run = RUN_OF.get(name, RUN)
  bindings = [*REQUIRED.get(pathlib.Path(run).stem, []), "BATCH_SIZE=4"]
  if name == "seqio_task":
    bindings = [b for b in bindings if not b.startswith("DATA")] + ["TASK=passkey"]
  resolve([run, path], bindings)
  text = (GIN.parent / path).read_text()
  assert text.startswith("# ")  # the first line says what it is


def test_no_gin_file_is_left_out():
  found = {path.relative_to(GIN.parent).as_posix() for path in GIN.rglob("*.gin")}
  folders = ("runs", "families", "models", "memory", "options", "slices", "eval", "paper", "bench")
  # Of families: tests/test_models.py; of slices, which need their chips: parallel/test_snapshots.py;
  # of eval: tests/evaluation/test_record.py; of paper: tests/test_benchmarks.py; of bench:
  # tests/bench/test_measure.py.
  assert found == {path for folder in folders for path in files(folder)}


def test_the_command_line_wins_and_reaches_the_objects():
  arguments = resolve(
      [RUN, "gin/models/tiny.gin", "gin/memory/bswa.gin"],
      [
          "BATCH_SIZE=3", "CORPUS=" + str(pathlib.Path(__file__).parent), "LEARNING_RATE=1e-4",
          "ModelConfig.num_layers=7", "MemoryConfig.fam_position=zero",
          "eval/FollowingReader.length=%BLOCK_SIZE",
      ],
  )  # fmt: skip
  model = arguments["model"]
  assert (model.num_layers, model.model_dim, model.vocab_size) == (7, 128, 259)
  assert (model.memory.kind, model.memory.fam_position) == ("bswa", "zero")
  assert arguments["optimizer"].learning_rate == 1e-4
  assert arguments["train_reader"].batch_size == 3
  assert arguments["eval_reader"].length == 128 != arguments["train_reader"].length
  assert all("tests" in str(f) for f in arguments["train_reader"].source.files)


@pytest.mark.parametrize(
    "value, text",
    [
        ("/data/books", "'/data/books'"), ("fam", "'fam'"), ("a b", "'a b'"), ("", "''"),
        ("it's", '"it\'s"'), ("2024-01-01", "'2024-01-01'"), ("3 foo", "'3 foo'"), ("@", "'@'"),
        ("/data/%20x", "'/data/%20x'"), ("user@host", "'user@host'"), ("100%", "'100%'"),
        ("8", "8"), ("-1e-3", "-0.001"), ("True", "True"), ("None", "None"), ("'q'", "'q'"),
        ("(1, 2)", "(1, 2)"), ("((0, 1), (9, 2))", "((0, 1), (9, 2))"), ("{'a': 1}", "{'a': 1}"),
        ("%NAME", "%NAME"), ("@eval/Reader()", "@eval/Reader()"), ("(@a, %B)", "(@a, %B)"),
    ],
)  # fmt: skip
def test_a_plain_string_needs_no_quotes(value, text):
  assert quoted(value) == text


WRONG = {
    "BATCH_SIZ=8": "'BATCH_SIZ'; there is BATCH_SIZE",
    "BATCH_SIZE": "--gin.BATCH_SIZE=VALUE",
    "TrainConfg.seed=1": "'TrainConfg'.*there is TrainConfig",
    "TrainConfig.sed=1": "named 'sed'.*there is seed",
    "FollowingReader.bach_size=1": "named 'bach_size'.*there is batch_size",
    "train.train_reader=@FolowingReader()": "@FolowingReader.*there is FollowingReader",
    "BATCH_SIZE=%ROWS": "ROWS must be set: add --gin.ROWS=...",
    "a/b c=1": "gin: ",
}


@pytest.mark.parametrize("binding", WRONG)
def test_an_unknown_name_is_one_line(binding, capfd):
  with pytest.raises(UserError, match=WRONG[binding]) as error:
    configure([RUN], ["RUN_DIR=x", binding])
  assert "\n" not in str(error.value)
  assert not capfd.readouterr().err


@pytest.mark.parametrize(
    "binding, message",
    [
        ("BATCH_SIZE=many", "FollowingReader.batch_size is 'many': it must be int"),
        ("TrainConfig.seed=1.5", "TrainConfig.seed is 1.5: it must be int"),
        ("TrainConfig.follow_rows=yes", "follow_rows is 'yes': it must be bool"),
        ("LEARNING_RATE=fast", "learning_rate is 'fast': it must be float"),
        ("MemoryConfig.window=wide", "window is 'wide': it must be int or None"),
        ("RUN_DIR=7", "run_dir is 7: it must be str"),
        ("LENGTH=True", "FollowingReader.length is True: it must be int"),
        ("train.optimizer=adamw", "optimizer is 'adamw': it must be an object, as @OptimizerConfig"),
        ("ModelConfig.memory=fam", "memory is 'fam': it must be an object, as @MemoryConfig()"),
        ("FollowingReader.source=books", "source is 'books': it must be an object, as @Source()"),
        ("FollowingReader.rows=(0.5,)", r"rows is \(0.5,\): it must be several int, as .*or None"),
        ("FollowingReader.rows=(0, 1)", r"rows \(0, 1\) of 16: one process reads them all"),
        ("ModelConfig.head_dim=0", "head_width is 0"),
        ("ModelConfig.rope_theta=-5.0", "rope_theta is -5.0"),
        ("ModelConfig.norm_eps=-1.0", "norm_eps is -1.0"),
        ("MemoryConfig.window=1000", "window 1000 hides nothing of the 384 tokens"),
        ("TrainConfig.follow_rows=False", "follow_rows is off"),
        ("TrainConfig.rsp_from=-1", "rsp_from is -1"),
        ("BATCH_SIZE=0", "batch_size 0"),
        ("CORPUS=/nowhere", "corpus /nowhere"),
        ("VOCABULARY=/nowhere.model", "/nowhere.model"),
    ],
)
def test_a_value_that_makes_no_sense_is_one_line(binding, message):
  configure([RUN], ["RUN_DIR=x", binding])
  with pytest.raises(UserError, match=message) as error:
    configuration.train_from_gin()
  assert "\n" not in str(error.value)
  assert not pathlib.Path("x").exists()


@pytest.mark.parametrize(
    "binding, message",
    [
        ("LONGEST_BLOCKS=(0, 8)", r"high is \(0, 8\): it must be int or several \(int, int\), as "),
        ("LONGEST_BLOCKS=8.5", "high is 8.5: it must be int or several"),
        ("EVAL_BLOCKS=('a',)", r"blocks is \('a',\): it must be several int, as \(a, b\)"),
        ("EVAL_BLOCKS=(8.5,)", r"blocks is \(8.5,\)"),
        ("TrainConfig.follow_rows=False", "FollowingReader goes on in a document"),
        ("TrainConfig.eval_every=5", "eval_every is 5, and there is no eval_reader"),
        ("ModelConfig.vocab_size=40", "56 entries"),
        ("train.vocabulary=bytes", "train.vocabulary is 'bytes', and the data is made of other to"),
    ],
)
def test_a_passkey_run_that_makes_no_sense_is_one_line(binding, message):
  with pytest.raises(UserError, match=message) as error:
    configuration.plan(["gin/runs/quickstart.gin"], ["RUN_DIR=x", binding])
  assert "\n" not in str(error.value)


def test_a_path_may_look_like_a_macro(tmp_path):
  corpus = tmp_path / "100 %of 'it'"
  corpus.mkdir()
  (corpus / "a.txt").write_text("text " * 99)
  arguments = resolve([RUN], [f"CORPUS={corpus}", "LongText.split=all", "eval/LongText.split=all"])
  assert arguments["train_reader"].source.files == [corpus / "a.txt"]
  assert operative_settings()["LongText.directory"] == repr(str(corpus))


def test_what_nothing_uses_gets_a_line(tmp_path, capfd):
  bindings = ["RUN_DIR=" + str(tmp_path / "x"), "evel/LongText.split=all", "PackedReader.seed=3"]
  configure([RUN], [*bindings, "TrainConfig.seed=4", "CORPUS=/nowhere", "PassKeyEval.examples=3"])
  with pytest.raises(UserError, match="/nowhere"):
    configuration.train_from_gin(bindings)
  configure([RUN], [*bindings, "TrainConfig.seed=4", "TrainConfig.init_checkpoint=/nowhere"])
  with pytest.raises(UserError, match="/nowhere"):
    configuration.train_from_gin([*bindings, "TrainConfig.seed=4", "PassKeyEval.examples=3"])
  assert capfd.readouterr().err == (
      "famjax: note: --gin.evel/LongText.split: nothing in this run uses it\n"
      "famjax: note: --gin.PackedReader.seed: nothing in this run uses it\n"
  )


def test_missing_files_and_names(tmp_path, capfd):
  with pytest.raises(UserError, match="gin file 'gin/runs/nothing.gin' not found"):
    configure(["gin/runs/nothing.gin"], [])
  path = tmp_path / "a.gin"
  path.write_text('include "gin/nothing.gin"\n')
  with pytest.raises(UserError, match="gin/nothing.gin"):
    configure([str(path)], [])
  path.write_text("NOTHING_USES_IT = 1\n")
  with pytest.raises(UserError, match="NOTHING_USES_IT is set .* nothing in this run uses it"):
    configure([RUN, str(path)], ["RUN_DIR=x"])
  path.write_text("TrainConfig.seed = (1,\n")
  with pytest.raises(UserError, match="gin: "):
    configure([str(path)], [])
  path.write_text("train.config = @TrainConfig()\n")
  configure([str(path)], [])
  with pytest.raises(UserError, match="run_dir"):
    configuration.train_from_gin()
  assert not capfd.readouterr().err


@pytest.mark.parametrize(
    "files, message",
    [
        ({"a.gin": b'include "a.gin"\n'}, "a file includes itself: .*a.gin includes .*a.gin; leave"),
        (
            {"a.gin": b'include "b.gin"\n', "b.gin": b"include 'c.gin'", "c.gin": b'include "b.gin"'},
            "a file includes itself: .*b.gin includes .*c.gin includes .*b.gin; leave",
        ),
        ({"a.gin": "A = 1".encode("utf-16")}, "a.gin is UTF-16: convert it"),
        ({"a.gin": b"A = '\xe9'"}, "a.gin is not UTF-8: byte 0xe9 at 5"),
        ({"a.gin": b"\0\1\2"}, "a.gin has a NUL byte at 0"),
        ({"a.gin": b"\x1f\x8b\x08"}, "a.gin is compressed"),
        ({"a.gin/b": b""}, "gin file 'a.gin' is a directory: name a file in a.gin"),
        ({"a.gin": b'include "b.gin"'}, "gin file 'b.gin', which .*a.gin includes, not found; looked in"),
        ({"a.gin": b"A = \n"}, r"gin: Unable to parse value. \(a.gin, line 1\)"),
    ],
)
def test_a_gin_file_that_cannot_be_read_is_one_line(files, message, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  for name, content in files.items():
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(content)
  with pytest.raises(UserError, match=message) as error:
    configure(["a.gin"], [])
  assert "\n" not in str(error.value)


def test_a_byte_order_mark_and_a_file_twice(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "a.gin").write_bytes(b'\xef\xbb\xbfinclude "b.gin"\r\nTrainConfig.seed = 7\r\n')
  (tmp_path / "b.gin").write_bytes(b"\xef\xbb\xbfBATCH_SIZE = 3\n")
  configure([RUN, "a.gin", "b.gin", "a.gin"], ["RUN_DIR=x"])
  assert gin.query_parameter("TrainConfig.seed") == 7
  assert gin.query_parameter("BATCH_SIZE/gin.macro.value") == 3


def test_a_bad_record_is_refused_before_training(tmp_path, capfd):
  (tmp_path / "a.jsonl").write_text('{"inputs": "a", "targets": "b"}\n{"inputs": "\\ud800", "targets": "b"}\n')
  arguments = [
      "train", "--gin_file=gin/runs/finetune_flan.gin", f"--gin.RUN_DIR={tmp_path / 'run'}",
      "--gin.INITIAL_CHECKPOINT=none", "--gin.VOCABULARY=bytes", f"--gin.DATA={tmp_path / 'a.jsonl'}",
  ]  # fmt: skip
  assert cli.main(arguments) == 2
  said = capfd.readouterr().err
  assert said.count("\n") == 1 and "a.jsonl, record 2: its text is not UTF-8" in said
  assert cli.main([*arguments, "--gin.SKIP_BAD=True"]) == 2  # for the checkpoint that is not there
  assert "1 records are left out, as skip_bad says" in capfd.readouterr().err
  assert not (tmp_path / "run").exists()


def test_a_file_is_found_from_anywhere(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  configure([RUN], ["RUN_DIR=x"])
  (tmp_path / "gin/runs").mkdir(parents=True)
  (tmp_path / RUN).write_text("TrainConfig.seed = 5\n")  # the working directory comes first
  configure([RUN], [])
  assert gin.query_parameter("TrainConfig.seed") == 5


def test_the_names_are_those_that_the_documents_use():
  names = {"train", "ModelConfig", "MemoryConfig", "OptimizerConfig", "TrainConfig"}
  assert names <= set(CONFIGURABLE)


@pytest.mark.usefixtures("pairs")
def test_the_model_of_a_checkpoint_takes_the_options_of_the_run():
  files = [f"gin/options/{name}.gin" for name in ("remat", "model_of_checkpoint", "bfloat16")]
  bindings = [*REQUIRED["retrofit"], "LORA_RANK=5", "BLOCK_SIZE=64"]
  model = resolve(["gin/runs/retrofit.gin", *files], bindings)["model"]
  assert (model.num_layers, model.vocab_size, model.param_dtype) == (1, 320, "float32")
  assert model.remat != "none" and model.compute_dtype == "bfloat16"
  assert model.lora_rank == 5 and model.memory.block_size == 64 and model.memory.kind == "fam"
