"""The benchmarks run."""

import importlib.util
import json
import pathlib
import subprocess
import sys

import pytest

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


def test_every_benchmark_says_what_it_does():
  for name in ("streaming.py", "against_transformers.py", "finetune.py", "tpu_compile.py"):
    command = [sys.executable, BENCHMARKS / name, "--help"]
    shown = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert "--out" in shown


def load(name):
  found = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
  module = importlib.util.module_from_spec(found)
  found.loader.exec_module(module)
  return module


def test_accuracies_of_fine_tuning_are_put_together_by_text():
  finetune = load("finetune")
  ends = [(0, 256), (256, 512), (512, 1024), (1024, 2048)]

  def text(*accuracies):
    bins = [dict(first=a, last=b, tokens=b - a, accuracy=x) for (a, b), x in zip(ends, accuracies)]
    return bins[: len(accuracies)]

  better = [text(0.5, 0.5, 0.3, 0.6), text(0.1, 0.1, 0.3, 0.3)]
  worse = [text(0.9, 0.9, 0.0, 0.3), text(0.9, 0.9, 0.2, 0.2)]
  mean, error = finetune._gain(better, worse)  # pylint: disable=protected-access
  assert mean == pytest.approx(0.2) and error == pytest.approx(0.1)  # of 0.3 and 0.1
  (half,) = finetune._accuracy([text(0.2, 0.4)], last=512)  # pylint: disable=protected-access
  assert half == pytest.approx(0.3)
  table = finetune._places_table({"one": better})  # pylint: disable=protected-access
  assert "| one | 0.3000 | 0.3000 | 0.3000 | 0.4500 |" in table


def test_what_does_not_fit_is_a_row_too():
  compile_ = load("tpu_compile")
  case = {
      "topology": "v5e:4x8", "mesh": {"data": 1, "fsdp": 32, "tensor": 1}, "accumulate": 4,
      "memory_bytes": 16 << 30, "fits": False, "model": {"num_layers": 18},
  }  # fmt: skip
  fits = case | {
      "fits": True, "seconds_to_compile": 61.2,
      "bytes_per_chip": {"argument": 1 << 30, "temp": 3 << 29, "used": 5 << 29},
      "collectives": [
          dict(kind="all-gather", loops=[4, 18], count=28, total_bytes=2 << 30),
          dict(kind="all-gather", loops=[4], count=1, total_bytes=1 << 30),
      ],
  }  # fmt: skip
  rows = compile_.table({"small": fits, "large": case}).splitlines()[2:]
  wanted = "| small | v5e:4x8 | 1 x 32 x 1 | 4 | 1.00 | 1.50 | 2.50 | 16"
  assert rows[0] == wanted + " | 28 (in loops over blocks: 0) | 3.0 | 61 |"
  assert "does not fit" in rows[1]
