"""What a FAM does in a text: how it is written and read, layer by layer (Fig. 11, appendix F).

For each layer, over the blocks of a text after the first:

    write     exp of the entropy of a FAM vector's attention: over so many keys, of the F + N that
              it sees, it would be spread evenly
    read      the share of the tokens' attention that goes to the FAM
    slots     exp of the entropy of that share's parts: so many of the F vectors are read
    energy    -log sum_j exp(q . k_j) over the FAM's keys, averaged over the tokens' queries: low
              where queries find something in it (the associative-memory view of attention)
    distance  of the nearest two FAM vectors, over their size: near 0 where they have become one

All of it can be jitted: training measures the FAM by it (`TrainConfig.look_every`), and
`famjax look` draws it (`famjax.evaluation.diagnostics`).
"""

from typing import NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp

from famjax.errors import UserError
from famjax.model import blocks, memory
from famjax.model.attention import KeySet, probabilities
from famjax.model.config import ModelConfig
from famjax.model.decoder import Decoder, turns_of
from famjax.model.grid import apply_layer
from famjax.model.layers import Layer
from famjax.model.state import empty_state, layer_memories


class Look(NamedTuple):
  """What was seen, of L layers in T blocks.

  Attributes:
    write: float32 `[L, T, H, F, F + N]`, attention of the FAM that each block writes, to the FAM
      before it and to the block.
    read: float32 `[L, T, H, N, F]`, attention of each block's tokens to the FAM.
    own: float32 `[L, T, H, N, N]`, to their own block.
    energy: float32 `[L, T, H, N]`.
    fam: float32 `[L, T, F, D]`, after each block.
  """

  write: jax.Array
  read: jax.Array
  own: jax.Array
  energy: jax.Array
  fam: jax.Array


def check(config: ModelConfig) -> None:
  """Raises UserError for a model that has no FAM."""
  if not config.memory.length:
    raise UserError(f"the memory is {config.memory.kind!r}, which has no FAM to look at")


def look(decoder: Decoder, tokens: jax.Array) -> Look:
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
  check(config)
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
  for l in range(config.num_layers):
    layer, here = _layer(decoder, l), config.of_kind(kinds[l])
    turns = turns_of(layout, state.offset, here)
    fam = prefix[l].astype(x.dtype) if prefix is not None else initial
    found.append(_look_at(layer, x, fam[None], layout, turns, here))
    if initial is not None:
      initial = memory.climb(layer, initial, turns.prompt)
    first = jnp.ones(1, bool)
    x, _ = apply_layer(layer, x, mine._replace(fam=fam[None]), layout, turns, first, here)
  return Look(*(jnp.stack(part) for part in zip(*found)))


def _layer(decoder: Decoder, l: int) -> Layer:
  if decoder.is_unstacked:
    return decoder.layers[l]
  graphdef, weights = nnx.split(decoder.layers)
  return nnx.merge(graphdef, jax.tree.map(lambda x: x[l], weights))


def _look_at(layer: Layer, x, fam, layout, turns, config: ModelConfig) -> Look:
  """One layer: each query's attention written out."""
  queries, keys, values = layer.project(x, turns.token, turns.token)  # [1, T, K, N, d]

  def write(fam, block):
    t, keys, values, write, read = block
    asking, _, _ = layer.project(fam, write, read)
    new, fam_keys, fam_values = memory.update(
        layer, fam, keys, values, write, read, jnp.full(1, t == 0)
    )
    seen = [KeySet(fam_keys[:, None], fam_values[:, None]), KeySet(keys, values)]
    written = jnp.concatenate(probabilities(asking[:, None], seen, layer.cap), axis=-1)
    return new, (fam_keys, fam_values, written[:, 0], new.astype(jnp.float32))

  per_block = lambda x: jnp.moveaxis(x, 1, 0)
  grid = (per_block(keys)[:, :, None], per_block(values)[:, :, None])
  turned = jax.tree.map(per_block, (turns.write, turns.read))
  _, found = jax.lax.scan(write, fam, (jnp.arange(x.shape[1]), *grid, *turned))
  fam_keys, fam_values, written, fams = jax.tree.map(per_block, found)
  past = blocks.no_past(1, config)
  key_sets = blocks.token_key_sets(past, blocks.Past(keys, values), layout, config.memory)
  key_sets.insert(-1, KeySet(fam_keys, fam_values))
  *_, to_fam, to_own = probabilities(queries, key_sets, layer.cap)
  grouped = queries.reshape(*keys.shape[:3], -1, *keys.shape[3:])  # [1, T, K, G, N, d]
  scores = jnp.einsum(
      "BTKGnd,BTKFd->BTKGnF", grouped, fam_keys, preferred_element_type=jnp.float32
  )
  energy = -jax.nn.logsumexp(scores, axis=-1).reshape(queries.shape[:-1])
  return Look(*(part[0] for part in (written, to_fam, to_own, energy, fams)))


def measures(found: Look) -> dict[str, jax.Array]:
  """The numbers of each layer, `[L]` each; of the first block alone, if there is no other."""
  write, read, _, energy, fam = (
      part[:, 1:] if found.read.shape[1] > 1 else part for part in found
  )
  entropy = lambda p: -(p * jnp.log(jnp.maximum(p, 1e-12))).sum(-1)
  mean = lambda x: x.reshape(x.shape[0], -1).mean(-1)
  slots = read.sum((2, 3))  # [L, T, F]
  apart = jnp.linalg.norm(fam[..., :, None, :] - fam[..., None, :, :], axis=-1)  # [L, T, F, F]
  F = fam.shape[2]
  apart += jnp.where(jnp.eye(F, dtype=bool), jnp.inf if F > 1 else 0, 0)
  nearest = apart.min((-2, -1)) / jnp.sqrt(jnp.square(fam).sum(-1).mean(-1))
  return {
      "write": mean(jnp.exp(entropy(write))),
      "read": mean(read.sum(-1)),
      "slots": mean(jnp.exp(entropy(slots / slots.sum(-1, keepdims=True)))),
      "energy": mean(energy),
      "distance": mean(nearest),
  }
