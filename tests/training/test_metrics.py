"""Metrics reach the file, TensorBoard and the terminal; what is missing is said."""

import json
import sys
import time

import jax.numpy as jnp
import numpy as np
import pytest

from famjax.training import metrics, parameters
from famjax.training.flops import FlopsPerToken


def test_a_line_per_write_and_null_for_what_is_not_finite(tmp_path):
  writer = metrics.MetricsWriter(tmp_path, tensorboard=False)
  writer.write(3, "train", {"loss": 1.5, "mfu": None, "grad_norm": float("nan")})
  writer.close()
  line = json.loads((tmp_path / "metrics.jsonl").read_text())
  assert abs(time.time() - line.pop("time")) < 100
  assert line == {"step": 3, "split": "train", "loss": 1.5, "mfu": None, "grad_norm": None}


def test_without_tensorboard_the_run_goes_on_and_says_so(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "clu", None)
  writer = metrics.MetricsWriter(tmp_path)
  writer.write(1, "train", {"loss": 1.0})
  writer.close()
  assert "no TensorBoard event files" in writer.note and "pip install" in writer.note
  assert (tmp_path / "metrics.jsonl").read_text()


def test_event_files(tmp_path):
  pytest.importorskip("tensorboard", reason="the core runs without it")
  writer = metrics.MetricsWriter(tmp_path)
  writer.write(1, "train", {"loss": 1.0, "mfu": None})
  writer.close()
  assert writer.note is None and list(tmp_path.glob("events.out.tfevents.*"))


def test_a_bar_on_a_terminal_and_lines_elsewhere(monkeypatch, capsys):
  values = {"loss": 1.0, "accuracy": 0.5, "tokens_per_second": 1234.0, "mfu": 0.25}
  progress = metrics.Progress(20)
  progress.advance(10, values)
  progress.close()
  shown = capsys.readouterr()
  assert shown.out == "step 10/20  loss 1.0000  accuracy 0.5000  1,234 tokens/s  MFU 25.0%\n"
  assert not shown.err
  monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
  progress = metrics.Progress(20, done=5)
  progress.advance(10, values)
  progress.say("a line")
  progress.close()
  shown = capsys.readouterr()
  assert "10/20" in shown.err and "loss 1.0000" in shown.err and shown.out == "a line\n"


def test_speed():
  values = metrics.speed(FlopsPerToken(6e9, 3e9, 1e9), 100, 2.0, "TPU v5 lite", 2)
  assert values["tokens_per_second"] == 50 and values["model_tflops_per_second"] == 0.5
  assert values["fam_share_of_flops"] == 0.1
  assert values["mfu"] == pytest.approx(0.5e12 / (2 * 197e12))


def test_the_table_of_parameters_is_aligned():
  params = {"a": {"kernel": jnp.zeros((300, 7)), "scale": jnp.zeros(5, jnp.bfloat16)}}
  lines = parameters.table(params).splitlines()
  assert len({len(line) for line in lines}) == 1
  assert lines[2].split() == ["a.kernel", "[300,", "7]", "float32", "2,100"]
  assert lines[-1].split() == ["total", "2,105"]
  assert parameters.count(params) == 2105
  assert list(parameters.names(params)) == ["a.kernel", "a.scale"]


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
  path = tmp_path / "x"
  metrics.write_text(path, "old")
  with pytest.raises(UnicodeEncodeError):
    metrics.write_text(path, "\ud800")
  assert path.read_text() == "old"


def test_the_clock_pauses(monkeypatch):
  now = [0.0]
  monkeypatch.setattr(metrics.time, "perf_counter", lambda: now[0])
  clock = metrics.Clock()
  now[0] = 2.0
  with clock.paused():
    now[0] = 50.0
  now[0] = 51.0
  np.testing.assert_allclose(clock.lap(), 3.0)
