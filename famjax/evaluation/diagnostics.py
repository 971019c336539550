"""`famjax look`: what a FAM does in a text, in a picture and a table (`famjax.model.diagnostics`)."""

import argparse
import pathlib

from flax import nnx
import jax
import numpy as np

from famjax.data.vocabularies import encode_text
from famjax.errors import UserError
from famjax.evaluation import report
from famjax.inference.commands import text_of
from famjax.inference.model import load
from famjax.model.diagnostics import look, Look, measures


def write_report(found: Look, out: pathlib.Path, about: dict) -> list[dict[str, float]]:
  """Leaves `fam.json`, the measures of each layer, and `fam.png`; returns the measures."""
  found, columns = jax.device_get((found, measures(found)))
  rows = [dict(zip(columns, map(float, row))) for row in zip(*columns.values())]
  report.write_json(out / "fam.json", {"layers": rows, "of": about})
  _plot(found, rows, out / "fam.png")
  return rows


def command(arguments: argparse.Namespace) -> int:
  """`famjax look`: draws how a FAM is written and read in a text."""
  if arguments.blocks < 1:
    raise UserError(f"--blocks={arguments.blocks}: use at least 1")
  model = load(arguments.model)
  text = text_of(arguments.text, arguments.file, needed=True)
  tokens = encode_text(model.vocabulary, text)
  tokens = tokens[: arguments.blocks * model.config.memory.block_size]
  graphdef, params = nnx.split(model.decoder)
  # One program compiles in less time than each of its operations.
  seen = jax.jit(lambda params, tokens: look(nnx.merge(graphdef, params), tokens))
  found = seen(params, np.asarray(tokens, np.int32))
  out = pathlib.Path(arguments.out)
  rows = write_report(found, out, {"model": str(arguments.model), "blocks": found.fam.shape[1]})
  print("layer  " + "".join(f"{name:>10}" for name in rows[0]))
  for l, row in enumerate(rows):
    print(f"{l:>5}  " + "".join(f"{value:>10.3f}" for value in row.values()))
  print(f"picture: {out / 'fam.png'}")
  return 0


def _plot(found, rows, path: pathlib.Path) -> None:
  import matplotlib  # pylint: disable=import-outside-toplevel

  matplotlib.use("Agg")
  import matplotlib.pyplot as plt  # pylint: disable=import-outside-toplevel

  L, _, F, _ = found.fam.shape
  shown = sorted({0, L // 3, 2 * L // 3, L - 1})
  figure = plt.figure(figsize=(3.2 * len(shown), 6.2), dpi=150, layout="constrained")
  above, below = figure.subfigures(2, 1, height_ratios=(3, 2))
  for axes, l in zip(np.atleast_1d(above.subplots(1, len(shown))), shown):
    tokens = np.concatenate([found.read[l, -1], found.own[l, -1]], axis=-1).mean(0)  # [N, F + N]
    whole = np.concatenate([found.write[l, -1].mean(0), tokens])  # the FAM's queries come first
    axes.imshow(np.log10(np.maximum(whole, 1e-5)), cmap="magma", vmin=-4, vmax=0, origin="lower")
    axes.axhline(F - 0.5, color="w", lw=0.5)
    axes.axvline(F - 0.5, color="w", lw=0.5)
    axes.set(title=f"layer {l}", xlabel="keys: FAM, block", ylabel="queries: FAM, block")
  names = list(rows[0])
  for axes, name in zip(below.subplots(1, len(names)), names):
    axes.plot(range(L), [row[name] for row in rows], marker="o", ms=3)
    axes.set(title=name, xlabel="layer")
    axes.grid(alpha=0.25)
  title = "attention in the last block, mean over heads, log10 from -4 to 0"
  above.suptitle(title, fontsize="small")
  figure.savefig(path)
  plt.close(figure)
