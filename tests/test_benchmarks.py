"""The benchmarks run."""

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
  for name in ("streaming.py", "against_transformers.py"):
    command = [sys.executable, BENCHMARKS / name, "--help"]
    shown = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert "--segments" in shown and "--out" in shown
