"""The benchmarks run."""

import argparse
import importlib.util
import json
import pathlib
import subprocess
import sys

import gin
import pytest

from famjax import configuration

BENCHMARKS = pathlib.Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.mark.slow
def test_streaming_measures_and_draws(tmp_path):
  tiny = "--layers=1 --width=64 --ff=64 --vocab=300 --block=16 --segments=1 --fam=2".split()
  command = [sys.executable, BENCHMARKS / "streaming.py", *tiny, f"--out={tmp_path}"]
  subprocess.run([*command, "--longest=1024"], check=True, cwd=tmp_path)
  report = json.loads((tmp_path / "report.json").read_text())
  (only,) = report["lengths"]
  assert only["tokens"] == 1024 and only["read_ms_per_token"] > 0 < only["write_ms_per_token"]
  ring, fam, numbers = 2 * 2 * 16 * 64, 3 * 2 * 64, 3  # of 4 bytes
  assert only["state_bytes"] == 4 * (ring + fam + numbers) and only["peak_memory_mb"] > 100
  assert len(report["reading_tokens_per_second"]) == 3
  assert (tmp_path / "streaming.png").stat().st_size > 10_000


def test_the_gpu_benchmark_measures_what_is_there(tmp_path):
  """Of a few tokens, and without a GPU its kernel is interpreted and no share of a peak is known."""
  command = [sys.executable, BENCHMARKS / "gpu.py", "--fast", "--repeats=1", f"--out={tmp_path}"]
  done = subprocess.run(
      [*command, "--profile", "kernel", "train_8k"], check=True, capture_output=True, text=True
  )
  lines = json.loads((tmp_path / "report.json").read_text())["lines"]
  assert [one.get("attention") for one in lines[:4]] == ["plain", "plain", "kernel", "kernel"]
  assert [one.get("memory") for one in lines[4:]] == ["fam", "bswa"]
  assert all(one["ms"] > 0 for one in lines) and "train_8k" in done.stdout
  wrong = subprocess.run([*command, "train_9k"], check=False, capture_output=True, text=True)
  assert wrong.returncode == 2 and "train_9k: choose of kernel, train_8k" in wrong.stderr


@pytest.fixture(name="load")
def _load(monkeypatch):
  monkeypatch.syspath_prepend(BENCHMARKS)  # as it is when they are run
  return load


def load(name):
  found = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
  module = importlib.util.module_from_spec(found)
  found.loader.exec_module(module)
  return module


@pytest.mark.parametrize("name", sorted(path.stem for path in BENCHMARKS.glob("*.py") if path.stem != "common"))
def test_every_benchmark_says_what_it_does(load, monkeypatch, capsys, name):
  monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
  with pytest.raises(SystemExit) as ended:
    load(name).main()
  assert ended.value.code == 0 and "--out" in capsys.readouterr().out


def test_accuracies_of_fine_tuning_are_put_together_by_book(load):
  finetune = load("finetune")
  ends = [(0, 256), (256, 512), (512, 1024), (1024, 2048)]

  def text(*accuracies):
    bins = [dict(first=a, last=b, tokens=b - a, accuracy=x) for (a, b), x in zip(ends, accuracies)]
    return bins[: len(accuracies)]

  better = [text(0.5, 0.5, 0.3, 0.6), text(0.1, 0.1, 0.3, 0.3)]
  worse = [text(0.9, 0.9, 0.0, 0.3), text(0.9, 0.9, 0.2, 0.2)]
  better.append(text(0.5, 0.5))  # too short to say anything
  worse.append(text(0.5, 0.5))
  mean, error = finetune._gain(better, worse, [3, 5, 5])  # pylint: disable=protected-access
  assert mean == pytest.approx(0.2) and error == pytest.approx(0.1)  # of 0.3 and 0.1
  mean, error = finetune._gain(better, worse, [3, 3, 5])  # pylint: disable=protected-access
  assert mean == pytest.approx(0.2) and error != error  # one book says nothing of others
  (half,) = finetune._accuracy([text(0.2, 0.4)], last=512)  # pylint: disable=protected-access
  assert half == pytest.approx(0.3)
  table = " ".join(finetune._places_table({"one": better}).split())  # pylint: disable=protected-access
  assert "| one | 0.3667 | 0.3667 | 0.3000 | 0.4500 |" in table


def test_what_does_not_fit_is_a_row_too(load):
  compile_ = load("tpu_compile")
  case = {
      "topology": "v5e:4x8", "slices": 1, "mesh": {"data": 1, "fsdp": 32, "tensor": 1}, "accumulate": 4,
      "memory_bytes": 16 << 30, "fits": False, "model": {"num_layers": 18},
  }  # fmt: skip
  fits = case | {
      "fits": True, "seconds_to_compile": 61.2,
      "bytes_per_chip": {"argument": 1 << 30, "temp": 3 << 29, "used": 5 << 29},
      "flops_per_chip": {"formula": 2e14, "products of the program": 3e14},
      "estimated_cycles_per_chip": 9_400_000_000,
      "collectives": [
          dict(kind="all-gather", loops=[4, 18], count=28, total_bytes=2 << 30),
          dict(kind="all-gather", loops=[4], count=1, total_bytes=1 << 30),
      ],
  }  # fmt: skip
  found = {
      "1B FAM, v5e": fits, "1B BSWA, v5e": fits | {"estimated_cycles_per_chip": 8_000_000_000},
      "8B FAM, v5e": fits | {"slices": 2}, "8B BSWA, v5e": case,
  }  # fmt: skip
  rows = compile_.table(found).splitlines()[2:]
  wanted = "| 1B FAM, v5e | v5e:4x8 | 1 x 32 x 1 | 4 | 1.00 | 1.50 | 2.50 | 16 | 2e+14 | 3e+14 | 9.4e+09"
  assert rows[0] == wanted + " | 28 (0) | 3.0 | 61 |"
  assert "| 2 x v5e:4x8 |" in rows[2] and "does not fit" in rows[3]
  assert rows[-1] == "| 1B v5e | 1.000 | 1.000 | 1.000 | 1.175 |"


def test_of_decoding_a_block_is_compared_in_which_the_feedback_loop_turns_once(load):
  compile_ = load("tpu_compile")
  parts = [((1, 16, 18), 300), ((1, 16), 20), ((1, 18), 70), ((), 5)]  # tokens, the FAM, what a call does
  case = {
      "step": "decode", "model": {"num_layers": 18, "memory": {"block_size": 1024}},
      "estimated_cycles_in_loops": [dict(loops=list(loops), cycles=n) for loops, n in parts],
  }  # fmt: skip
  cycles = compile_._cycles  # pylint: disable=protected-access
  assert cycles(case) == 64 * 325 + 70
  assert cycles({"step": "prefill", "model": case["model"], "estimated_cycles_per_chip": 9}) == 9


def test_a_directory_of_other_arguments_is_not_gone_on_with(load, tmp_path):
  common = load("common")
  keep = lambda **values: common.keep_arguments(tmp_path, argparse.Namespace(**values), ("out",))
  keep(steps=3, out="a")
  keep(steps=3, out="b")
  with pytest.raises(SystemExit, match="begun with --steps=3, not 4: name another --out"):
    keep(steps=4, out="a")


def test_every_row_of_the_paper_is_a_study_that_can_be_run(load, tmp_path):
  paper = load("paper")
  for name, row in paper.ROWS.items():
    file = f"gin/paper/{name}.gin"
    configuration.configure([file], ["RUN_DIR=none"])
    models = gin.get_configurable("Study")().models
    assert {x for claim in row.claims for x in (claim.one, claim.other)} <= set(models)
    for model, arguments in models.items():
      files = [a for a in arguments if a.endswith(".gin")]
      bindings = [a for a in arguments if not a.endswith(".gin")]
      configuration.plan([file, *files], [*bindings, f"RUN_DIR={tmp_path / name / model}"])


@pytest.mark.slow
def test_rows_of_the_paper_run(load, tmp_path):
  """A few steps of one layer, for a row of each task and Tables 13 and 14; nothing is made twice."""
  rows = ("table6", "table8")
  paper = load("paper")
  assert {paper.ROWS[row].base for row in rows} == {row.base for row in paper.ROWS.values()}
  command = [sys.executable, BENCHMARKS / "paper.py", "--fast", f"--out={tmp_path}"]
  command += [f"--row={row}" for row in (*rows, paper.COST)]
  subprocess.run(command, check=True, cwd=BENCHMARKS.parent, stdout=subprocess.DEVNULL)
  report = json.loads((tmp_path / "report.json").read_text())
  assert list(report["claims"]) == list(rows)
  tables = (tmp_path / "tables.md").read_text()
  assert all(f"## {paper.ROWS[row].name}\n" in tables for row in rows)
  assert "## Tables 13 and 14" in tables and (tmp_path / "paper.png").stat().st_size > 20_000
  trained = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/*.seconds")}
  models = {x for row in rows for c in paper.ROWS[row].claims for x in (c.one, c.other)}
  assert len(trained) >= len(models)
  subprocess.run(command, check=True, cwd=BENCHMARKS.parent, stdout=subprocess.DEVNULL)
  assert trained == {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/*.seconds")}


def test_a_peer_that_is_not_there_is_named(load, tmp_path, capsys):
  peers = load("peers")
  worker = peers.Worker("titans-pytorch", "kept")
  assert "titans_pytorch" in worker.why and worker.time("train", 8) is None
  worker.close()
  there = argparse.Namespace(why=None, parameters=1000)
  workers = {"famjax, FAM": there, "recurrentgemma": there, "titans-pytorch": worker}
  laps = {name: {"train 1024": [s], "forward 4096": [s]} for name, s in
          (("famjax, FAM", 1.0), ("recurrentgemma", 1.5))}  # fmt: skip
  peers._write(tmp_path, workers, laps | {"titans-pytorch": {}})  # pylint: disable=protected-access
  out = capsys.readouterr().out
  assert "| 1.000 | 1.000 | | | 1.50 | 1.50 |" in " ".join(out.split())
  assert "left out: ModuleNotFoundError" in out


def test_a_claim_is_judged_by_differences_of_seeds(load):
  paper = load("paper")

  def judge(one, other, better=True):
    results = [
        dict(name=name, seed=seed, accuracy={"6": 9.0, "8": x, "12": x})
        for name, values in (("A", one), ("B", other))
        for seed, x in enumerate(values)
    ]
    found = paper._judge(paper.Claim("A", "B", "", better), results, past=6)
    return round(found["difference"], 6), found["verdict"]

  assert judge([0.5, 0.6, 0.7], [0.1, 0.2, 0.4]) == (0.366667, "agrees")
  assert judge([0.1, 0.2, 0.4], [0.5, 0.6, 0.7]) == (-0.366667, "disagrees")
  assert judge([0.5, 0.1, 0.6], [0.1, 0.2, 0.4]) == (0.166667, "cannot be told")
  assert judge([0.5], [0.1]) == (0.4, "cannot be told")
  assert judge([0.5, 0.1, 0.6], [0.1, 0.2, 0.4], better=False)[1] == "agrees"
  assert judge([0.5, 0.6, 0.7], [0.1, 0.2, 0.4], better=False)[1] == "disagrees"
