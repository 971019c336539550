"""What a study leaves: the table, the plot and a file that is never half-written."""

import json
import os
import pathlib

import matplotlib.image
import matplotlib.pyplot as plt
import pytest

from famjax.evaluation import report


def result(name, seed, *accuracy, lengths=(8, 32)):
  return {
      "name": name, "seed": seed, "parameters": 12345, "longest_trained_blocks": 8,
      "train_seconds": 12.6, "accuracy": dict(zip(map(str, lengths), accuracy)),
  }  # fmt: skip


RESULTS = [
    result("FAM", 0, 1.0, 0.5), result("FAM", 1, 1.0, 0.75), result("FAM", 2, 0.25, 1.0),
    result("BSWA M1", 0, 0.5, 0.0),
]  # fmt: skip


def test_the_table():
  assert report.table([*RESULTS[1:2], result("BSWA M1", 0, 0.126, lengths=(128,))]) == (
      "| model   | seed | parameters | trained on, blocks |    8 |   32 |  128 | train, s |\n"
      "| ------- | ---: | ---------: | -----------------: | ---: | ---: | ---: | -------: |\n"
      "| FAM     |    1 |     12,345 |                  8 | 1.00 | 0.75 |      |       13 |\n"
      "| BSWA M1 |    0 |     12,345 |                  8 |      |      | 0.13 |       13 |"
  )


@pytest.fixture(name="axes")
def _axes(monkeypatch):
  """The axes that are drawn, which closing would throw away."""
  drawn = []
  monkeypatch.setattr(plt, "close", lambda figure: drawn.extend(figure.axes))
  return drawn


def test_the_plot_is_a_png_with_a_median_for_every_model(tmp_path, axes):
  path = tmp_path / "new" / "plot.png"
  report.plot(RESULTS, path, "A title")
  assert path.read_bytes().startswith(b"\x89PNG") and 10_000 < path.stat().st_size < 500_000
  image = matplotlib.image.imread(path)
  assert image.shape[:2] == (675, 1200) and image[..., :3].std() > 0.05
  lines = {line.get_label(): line for line in axes[0].lines}
  assert axes[0].get_title() == "A title"
  assert lines["FAM (median of 3 seeds)"].get_xydata().tolist() == [[8, 1.0], [32, 0.75]]
  assert lines["BSWA M1"].get_xydata().tolist() == [[8, 0.5], [32, 0.0]]
  (band,) = axes[0].collections  # A single seed has none.
  assert band.get_paths()[0].get_extents().extents.tolist() == [8, 0.25, 32, 1.0]


def test_seeds_that_were_asked_at_different_lengths_share_a_plot(tmp_path, axes):
  more = result("FAM", 1, 0.5, 0.5, 0.25, lengths=(8, 32, 64))
  report.plot([RESULTS[0], more], tmp_path / "plot.png", "")
  assert axes[0].lines[0].get_xydata().tolist() == [[8, 0.75], [32, 0.5], [64, 0.25]]


def test_a_file_is_the_old_one_or_the_new_one(tmp_path, monkeypatch):
  path = tmp_path / "new" / "report.json"
  report.write_json(path, {"a": [1, 0.5]})
  assert json.loads(path.read_text()) == {"a": [1, 0.5]} and path.read_text().endswith("}\n")
  assert [p.name for p in path.parent.iterdir()] == ["report.json"]

  def fail(*_, **__):
    raise OSError("no space")

  for owner, broken in ((pathlib.Path, "write_text"), (os, "replace")):
    with monkeypatch.context() as patch, pytest.raises(OSError):
      patch.setattr(owner, broken, fail)
      report.write_json(path, {"b": 2})
    assert json.loads(path.read_text()) == {"a": [1, 0.5]}
  with pytest.raises(TypeError):
    report.write_json(path, {"b": object()})
  assert json.loads(path.read_text()) == {"a": [1, 0.5]}
  report.write_json(path, {"b": 2})
  assert json.loads(path.read_text()) == {"b": 2}


def test_the_machine_is_named():
  machine = report.machine()
  assert machine["cpu_cores"] >= 1 and machine["devices"] and machine["jax"]
  json.dumps(machine)
