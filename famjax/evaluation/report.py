"""What a study leaves for people: a table, a plot, and `report.json` beside them."""

from collections.abc import Sequence
import json
import os
import pathlib
import platform
import statistics

import numpy as np

from famjax.training.metrics import write_text

# What an evaluation leaves in a run's directory.
PASSKEY, MEASURED = "passkey.json", "measured.json"

# One model of one seed: "name", "seed", "parameters", "longest_trained_blocks",
# "backpropagated_blocks", "train_seconds", "accuracy" {length: share}, see `unit`, and so on.
Result = dict


def unit(result: Result) -> str:
  """Of the lengths of "accuracy": "blocks" for pass keys, or "tokens"."""
  return result.get("unit", "blocks")


def by_model(results: Sequence[Result]) -> dict[str, list[Result]]:
  """The seeds of each model, in the order of the models."""
  found = {}
  for r in results:
    found.setdefault(r["name"], []).append(r)
  return found


def lengths_of(results: Sequence[Result]) -> list[int]:
  """Every length that one of them was asked at."""
  return sorted({int(n) for r in results for n in r["accuracy"]})


def digits(result: Result) -> int:
  """Of its shares in a table: next tokens differ by little."""
  return {"blocks": 2, "tokens": 4}[unit(result)]


def machine() -> dict[str, object]:
  """What the numbers of a report were measured on."""
  import jax  # pylint: disable=g-import-not-at-top

  return {
      "processor": platform.processor() or platform.machine(),
      "cpu_cores": os.cpu_count(),
      "devices": sorted({d.device_kind for d in jax.devices()}),
      "python": platform.python_version(),
      "jax": jax.__version__,
  }


def write_json(path: pathlib.Path, value: object) -> None:
  """Writes JSON so that a reader finds the old file or the new one, never a part."""
  path.parent.mkdir(parents=True, exist_ok=True)
  write_text(path, json.dumps(value, indent=2) + "\n")


def table(results: Sequence[Result]) -> str:
  """A Markdown table: a row for every model and seed, a column for every length."""
  lengths = lengths_of(results)
  head = ["model", "seed", "parameters", "trained on, blocks", *map(str, lengths), "train, s"]
  rows = [head]
  for r in results:
    marks = [_mark(r["accuracy"].get(str(n)), digits(r)) for n in lengths]
    rows.append([
        r["name"], str(r["seed"]), f"{r['parameters']:,}", str(r["longest_trained_blocks"]),
        *marks, f"{r['train_seconds']:.0f}",
    ])  # fmt: skip
  return markdown(rows)


def markdown(rows: Sequence[Sequence[str]]) -> str:
  """A table of cells in Markdown: the first row is the head, the first column stands to the left."""
  widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
  rule = ["-" * widths[0], *("-" * (w - 1) + ":" for w in widths[1:])]
  line = lambda row: "| " + " | ".join(
      c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths))
  ) + " |"
  return "\n".join(map(line, [rows[0], rule, *rows[1:]]))


def plot(results: Sequence[Result], path: pathlib.Path, title: str) -> None:
  """Leaves what `draw` draws in a file.

  Args:
    results: models and seeds.
    path: of the PNG to write.
    title: over the plot.
  """
  import matplotlib  # pylint: disable=g-import-not-at-top

  matplotlib.use("Agg")
  import matplotlib.pyplot as plt  # pylint: disable=g-import-not-at-top

  figure, axes = plt.subplots(figsize=(8, 4.5), dpi=150, layout="constrained")
  draw(axes, results)
  axes.set_xticks(lengths_of(results), labels=map(str, lengths_of(results)))
  axes.set_xticks([], minor=True)
  axes.set_title(title)
  axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
  path.parent.mkdir(parents=True, exist_ok=True)
  figure.savefig(path)
  plt.close(figure)


def draw(axes, results: Sequence[Result]) -> None:
  """Draws accuracy by length into axes: a line for every model, a band over its seeds."""
  measure = unit(results[0])
  for i, (name, mine) in enumerate(by_model(results).items()):
    lengths = lengths_of(mine)
    marks = [[r["accuracy"].get(str(n), np.nan) for n in lengths] for r in mine]
    values = np.array(marks)  # [seeds, lengths]; a seed may have been asked at fewer lengths
    color = f"C{i}"
    style = dict(marker="o", markersize=4, linewidth=2 if name.startswith("FAM") else 1.4)
    band = dict(color=color, alpha=0.15)
    label = name if len(mine) == 1 else f"{name} (median of {len(mine)} seeds)"
    axes.plot(lengths, np.nanmedian(values, axis=0), color=color, label=label, **style)
    if len(mine) > 1:
      axes.fill_between(lengths, np.nanmin(values, axis=0), np.nanmax(values, axis=0), **band)
    trained = statistics.median(r["longest_trained_blocks"] for r in mine)
    trained *= 1 if measure == "blocks" else mine[0]["block_size"]
    axes.axvline(trained, color=color, linestyle=":", linewidth=1)
  axes.set_xscale("log", base=2)
  if measure == "blocks":
    axes.set_ylim(-0.03, 1.03)
  axes.set_xlabel(f"length in {measure} (dotted: the longest that was trained on)")
  axes.set_ylabel({"blocks": "pass keys retrieved whole", "tokens": "right answers"}[measure])
  axes.grid(alpha=0.25)


def _mark(value: float | None, places: int) -> str:
  return "" if value is None else f"{value:.{places}f}"
