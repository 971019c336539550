"""What a FAM does in a text: how it is written and read, layer by layer (Fig. 11, appendix F).

For each layer, over the blocks of a text after the first:

    write     exp of the entropy of a FAM vector's attention: over so many keys, of the F + N that
              it sees, it would be spread evenly
    read      the share of the tokens' attention that goes to the FAM
    slots     exp of the entropy of that share's parts: so many of the F vectors are read
    energy    -log sum_j exp(q . k_j) over the FAM's keys, averaged over the tokens' queries: low
              where queries find something in it (the associative-memory view of attention)
    distance  of the nearest two FAM vectors, over their size: near 0 where they have become one
"""

import argparse
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from famjax.data.vocabularies import begin_ids
from famjax.errors import UserError
from famjax.evaluation import report
from famjax.inference.commands import text_of
from famjax.inference.model import load
from famjax.model import blocks, memory
from famjax.model.attention import KeySet, probabilities
from famjax.model.decoder import Decoder, apply_layer, turns_of
from famjax.model.state import empty_state, layer_memories


class Look(NamedTuple):
  """What was seen in one layer.

  Attributes:
    write: float32 `[T, H, F, F + N]`, attention of the FAM that each block writes, to the FAM
      before it and to the block.
    read: float32 `[T, H, N, F]`, attention of each block's tokens to the FAM.
    own: float32 `[T, H, N, N]`, to their own block.
    energy: float32 `[T, H, N]`.
    fam: `[T, F, D]`, after each block.
  """

  write: np.ndarray
  read: np.ndarray
  own: np.ndarray
  energy: np.ndarray
  fam: np.ndarray


def look(decoder: Decoder, tokens: np.ndarray) -> list[Look]:
  """Reads whole blocks of one text, and keeps what attention did in every layer.

  Args:
    decoder: with a FAM.
    tokens: int32 `[S]`; what is left behind the last whole block is not read.

  Raises:
    UserError: there is no FAM, or not a whole block.
  """
  config = decoder.config
  N = config.memory.block_size
  T = len(tokens) // N
  if not config.memory.length:
    raise UserError(f"the memory is {config.memory.kind!r}, which has no FAM to look at")
  if config.memory.window is not None or "local" in config.kinds():
    raise UserError("layers with a window are not drawn yet: look at a model without one")
  if not T:
    raise UserError(f"{len(tokens)} tokens are less than a block of {N}: give a longer text")
  state = empty_state(config, 1, past=False)
  layout = blocks.make_layout(state, T * N, None, aligned=True, within=False, N=N)
  # As `Decoder.hidden` does it, a layer at a time.
  x = decoder.embed(layout.place(jnp.asarray(tokens[None, : T * N], jnp.int32), N))
  prefix = decoder.fam_prefix[...] if hasattr(decoder, "fam_prefix") else None
  initial = None if prefix is not None else decoder.scaled(decoder.fam_prompt[...])
  kinds = config.layer_kinds or ("global",) * config.num_layers
  mine = jax.tree.map(lambda x: x[0], layer_memories(state))
  found = []
  for l, layer in enumerate((decoder if decoder.is_unstacked else decoder.unstacked()).layers):
    here = config.of_kind(kinds[l])
    turns = turns_of(layout, state.offset, here)
    fam = prefix[l].astype(x.dtype) if prefix is not None else initial
    found.append(_look_at(layer, x, fam[None], layout, turns, here))
    if initial is not None:
      initial = memory.climb(layer, initial, turns.prompt)
    first = jnp.ones(1, bool)
    x, _ = apply_layer(layer, x, mine._replace(fam=fam[None]), layout, turns, first, here)
  return found


def _look_at(layer, x, fam, layout, turns, config) -> Look:
  """One layer: block after block, each query's attention written out."""
  M, parts = config.memory.memory_segments, []
  queries, keys, values = layer.project(x, turns.token, turns.token)  # [1, T, H, N, d]
  n = queries.shape[3]
  causal = jnp.tril(jnp.ones((n, n), bool))
  at = lambda y, t: y[:, t : t + 1]
  for t in range(x.shape[1]):
    write, read = memory.at_block(turns.write, t), memory.at_block(turns.read, t)
    asking, _, _ = layer.project(fam, write, read)
    first = jnp.full(1, t == 0)
    new, fam_keys, fam_values = memory.update(
        layer, fam, at(keys, t), at(values, t), write, read, first
    )
    of_fam = KeySet(fam_keys[:, None], fam_values[:, None])
    own = KeySet(at(keys, t), at(values, t))
    past = [KeySet(at(keys, s), at(values, s)) for s in range(max(t - M, 0), t)]
    masked = own._replace(mask=causal)
    *_, to_fam, to_own = probabilities(at(queries, t), [*past, of_fam, masked], layer.cap)
    written = jnp.concatenate(probabilities(asking[:, None], [of_fam, own], layer.cap), axis=-1)
    grouped = queries[0, t].reshape(keys.shape[2], -1, *queries.shape[3:])  # [K, G, n, d]
    scores = jnp.einsum("KGnd,KFd->KGnF", grouped, fam_keys[0], preferred_element_type=jnp.float32)
    energy = -jax.nn.logsumexp(scores, axis=-1).reshape(-1, n)
    fam = new
    parts.append((written[0, 0], to_fam[0, 0], to_own[0, 0], energy, fam[0].astype(jnp.float32)))
  return Look(*(np.stack(part) for part in zip(*parts)))


def measures(found: list[Look]) -> list[dict[str, float]]:
  """The numbers of each layer; of the first block alone, if there is no other."""
  rows = []
  for one in found:
    part = slice(1, None) if len(one.read) > 1 else slice(None)
    write, read, fam = one.write[part], one.read[part], one.fam[part]
    entropy = lambda p: -(p * np.log(np.maximum(p, 1e-12))).sum(-1)
    slots = read.sum((1, 2))  # [T, F]
    apart = np.linalg.norm(fam[:, :, None] - fam[:, None], axis=-1)  # [T, F, F]
    apart += np.where(np.eye(fam.shape[1], dtype=bool), np.inf, 0)
    nearest = apart.min((1, 2)) / np.sqrt(np.square(fam).sum(-1).mean(-1))
    rows.append({
        "write": float(np.exp(entropy(write)).mean()),
        "read": float(read.sum(-1).mean()),
        "slots": float(np.exp(entropy(slots / slots.sum(-1, keepdims=True))).mean()),
        "energy": float(one.energy[part].mean()),
        "distance": float(nearest.mean()) if fam.shape[1] > 1 else 0.0,
    })
  return rows


def write_report(found: list[Look], out: pathlib.Path, about: dict) -> list[dict[str, float]]:
  """Leaves `fam.json`, the measures of each layer, and `fam.png`; returns the measures."""
  rows = measures(found)
  report.write_json(out / "fam.json", {"layers": rows, "of": about})
  _plot(found, rows, out / "fam.png")
  return rows


def command(arguments: argparse.Namespace) -> int:
  """`famjax look`: draws how a FAM is written and read in a text."""
  if arguments.blocks < 1:
    raise UserError(f"--blocks={arguments.blocks}: use at least 1")
  model = load(arguments.model)
  text = text_of(arguments.text, arguments.file, needed=True)
  tokens = [*begin_ids(model.vocabulary), *model.vocabulary.encode(text)]
  tokens = tokens[: arguments.blocks * model.config.memory.block_size]
  found = look(model.decoder, np.asarray(tokens, np.int32))
  out = pathlib.Path(arguments.out)
  rows = write_report(found, out, {"model": str(arguments.model), "blocks": len(found[0].fam)})
  print("layer  " + "".join(f"{name:>10}" for name in rows[0]))
  for l, row in enumerate(rows):
    print(f"{l:>5}  " + "".join(f"{value:>10.3f}" for value in row.values()))
  print(f"picture: {out / 'fam.png'}")
  return 0


def _plot(found, rows, path: pathlib.Path) -> None:
  import matplotlib  # pylint: disable=import-outside-toplevel

  matplotlib.use("Agg")
  import matplotlib.pyplot as plt  # pylint: disable=import-outside-toplevel

  L, F = len(found), found[0].fam.shape[1]
  shown = sorted({0, L // 3, 2 * L // 3, L - 1})
  figure = plt.figure(figsize=(3.2 * len(shown), 6.2), dpi=150, layout="constrained")
  above, below = figure.subfigures(2, 1, height_ratios=(3, 2))
  for axes, l in zip(np.atleast_1d(above.subplots(1, len(shown))), shown):
    one = found[l]
    tokens = np.concatenate([one.read[-1], one.own[-1]], axis=-1).mean(0)  # [N, F + N]
    whole = np.concatenate([one.write[-1].mean(0), tokens])  # the FAM's queries come first
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
