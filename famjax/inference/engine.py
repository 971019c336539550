"""The streaming engine: reading in chunks of blocks, writing several tokens per call of the device.

Reading cuts what each row has to read into pieces of few shapes, so that every shape is compiled
once: up to the next block boundary within the block, then whole blocks, `CHUNK_BLOCKS` of them at a
time, then the rest within a block. Rows have their own lengths and places; a row that has nothing
to read in a piece is left as it is.

Writing is a loop on the device, `STEPS` tokens at most between two looks of the host.
"""

from collections.abc import Callable, Iterator, Sequence
import functools
from typing import NamedTuple

from flax import nnx, struct
import jax
import jax.numpy as jnp
import numpy as np

from famjax.inference import sampling
from famjax.model import strategy
from famjax.model.decoder import Decoder
from famjax.model.state import State, is_unstacked, settle, stack, take, unstack, with_recent
from famjax.training.loss import log_probs_and_best

Progress = Callable[[int], bool | None]  # is told of every piece that was read; True ends reading

CHUNK_BLOCKS = 8  # blocks that are read in one call
STEPS = 16  # tokens that are written in one call
TAIL = 8  # tokens
_SHORTEST = 16  # tokens of the shortest piece within a block; a shorter one is padded


@struct.dataclass
class Reading:
  """Where rows stand: what they remember, and what each would say next.

  Attributes:
    logits: float32 `[B, V]` of the next token. Zeros for a row that has read nothing.
    state: of the rows.
    tail: int32 `[B, TAIL]`, the last tokens that were read, which the next character may depend on;
      -1 where there are none.
  """

  logits: jax.Array
  state: State
  tail: jax.Array

  def __iter__(self):
    return iter((self.logits, self.state))

  def take(self, rows: Sequence[int]) -> "Reading":
    """Where the rows `rows` stand, in that order; one may be there several times."""
    return _take(self, np.asarray(rows, np.int32))


class Written(NamedTuple):
  """What one call of `Engine.write` wrote.

  Attributes:
    tokens: int32 `[B, STEPS]`; of row b the first `count[b]` are real.
    count: int32 `[B]`.
    stopped: bool `[B]`, the row came to a stop token, which is neither written nor read.
  """

  tokens: jax.Array
  count: jax.Array
  stopped: jax.Array


class Scores(NamedTuple):
  """How well the tokens of a row that were read had been foreseen.

  Attributes:
    log_probs: float32 `[n]`, natural logarithms of their probabilities.
    likeliest: bool `[n]`, the token was the likeliest.
  """

  log_probs: np.ndarray
  likeliest: np.ndarray

  @property
  def log_prob(self) -> float:
    """Of all of them together."""
    return float(self.log_probs.sum(dtype=np.float64))


class Piece(NamedTuple):
  """A part of what rows have to read: of row b the next `counts[b]` tokens, at most `size`."""

  size: int
  counts: np.ndarray
  within: bool


def pieces(positions: np.ndarray, lengths: np.ndarray, N: int) -> Iterator[Piece]:
  """Cuts what rows have to read into pieces of few shapes.

  Args:
    positions: int `[B]`, tokens that each row has read before.
    lengths: int `[B]`, tokens that it has to read now.
    N: block size.

  Yields:
    Pieces; a piece that is not `within` a block starts at a block boundary in all rows that read.
  """
  slot, left = positions % N, lengths.copy()
  while left.any():
    begun = (slot > 0) & (left > 0)
    blocks = int(left.max()) // N
    if begun.any():
      counts = np.where(begun, np.minimum(left, N - slot), 0)
    elif blocks == 0:
      counts = left
    if begun.any() or blocks == 0:
      size = min(max(_SHORTEST, _power_of_two(int(counts.max()))), N)
      yield Piece(size, counts, within=True)
    else:
      size = min(1 << (blocks.bit_length() - 1), CHUNK_BLOCKS) * N
      counts = np.minimum(left, size)
      yield Piece(size, counts, within=False)
    left = left - counts
    slot = (slot + counts) % N


class Engine:
  """Compiled functions of one decoder; each is compiled once per shape."""

  def __init__(self, decoder: Decoder):
    self.config = decoder.config
    self.graphdef, self.params = nnx.split(decoder)
    self._writes_apart = jax.default_backend() != "tpu" and strategy.of(self.config.memory) is None

  @functools.cached_property
  def _writer(self):
    """Graph and parameters that `write` uses."""
    if not self._writes_apart:
      return self.graphdef, self.params
    return nnx.split(nnx.merge(self.graphdef, self.params).unstacked())

  @functools.cached_property
  def _initial(self):
    return jax.jit(
        lambda params, B: nnx.merge(self.graphdef, params).init_state(B), static_argnums=1
    )

  def start(self, batch_size: int) -> Reading:
    """Rows that have read nothing."""
    state = self._initial(self.params, batch_size)
    logits = jnp.zeros((batch_size, self.config.vocab_size), jnp.float32)
    return Reading(logits, state, jnp.full((batch_size, TAIL), -1, jnp.int32))

  def read(
      self,
      rows: Sequence[np.ndarray],
      after: Reading,
      *,
      progress: Progress | None = None,
  ) -> Reading:
    """Reads on.

    Args:
      rows: int tokens of each row, of any length, none at all included.
      after: where the rows stand; it can be used again.
      progress: is told of each piece, once it has been read, how many tokens it had. If it returns
        True, no more is read.

    Returns:
      Where the rows stand then.
    """
    reading = copied(after)  # the copy is given away, piece by piece
    for piece, tokens in self._cut(rows, after):
      reading = _read(
          self.graphdef, self.params, tokens, piece.counts, reading, within=piece.within
      )
      if progress is not None:
        jax.block_until_ready(reading)
        if progress(int(piece.counts.sum())):
          break
    return reading

  def score(
      self,
      rows: Sequence[np.ndarray],
      after: Reading,
      *,
      progress: Progress | None = None,
  ) -> tuple[list[Scores], Reading]:
    """Reads on, and says how probable each token was.

    Args are those of `read`.

    Returns:
      The scores of every token that was read, for each row, and where the rows stand then. Nothing
      is said about the first token of a row that had read nothing: it is nan, and not the likeliest.
    """
    reading = copied(after)
    said = [[] for _ in rows]
    for piece, tokens in self._cut(rows, after):
      scores, reading = _score(
          self.graphdef, self.params, tokens, piece.counts, reading, within=piece.within
      )
      log_probs, likeliest = jax.device_get(scores)
      for row, count in enumerate(piece.counts):
        said[row].append((log_probs[row, :count], likeliest[row, :count]))
      if progress is not None and progress(int(piece.counts.sum())):
        break
    nothing = np.zeros(0, np.float32), np.zeros(0, bool)
    said = [Scores(*map(np.concatenate, zip(nothing, *parts))) for parts in said]
    for row in np.flatnonzero(np.asarray(after.state.position) == 0):
      said[row].log_probs[:1], said[row].likeliest[:1] = np.nan, False
    return said, reading

  def write(
      self,
      after: Reading,
      seen: jax.Array,
      samplers: sampling.Samplers,
      limit: np.ndarray,
      stop: jax.Array,
  ) -> tuple[Written, Reading, jax.Array]:
    """Writes at most `STEPS` tokens in every row, and reads each of them.

    Args:
      after: where the rows stand. It is given away, as `seen` is: copy what is needed again. If layers have
        yet to be taken apart for it, a copy is.
      seen: bool `[B, V]`, tokens that the repetition penalty is for.
      samplers: how each row picks.
      limit: int `[B]`, tokens that each row may write now, at most.
      stop: bool `[B, V]`, tokens that end a row; it ends before them.

    Returns:
      What was written, where the rows stand then, and what they have seen. The device may still be
      at work on all of it. For the next call alone layers may stand apart; `whole` joins them.
    """
    limit = np.asarray(limit, np.int32)
    after = self.apart(after)
    *new, reading, seen = _write(*self._writer, after, seen, samplers, limit, stop)
    return Written(*new), reading, seen

  def apart(self, reading: Reading) -> Reading:
    """A copy with each layer's memory by itself, where `write` has its layers so; else what was given.

    Taken out of arrays of all layers and put back in every call, the whole ring would be copied twice.
    """
    stays = is_unstacked(reading.state) or not self._writes_apart
    return reading if stays else _apart(reading)

  def whole(self, reading: Reading) -> Reading:
    """Undoes `apart`: a copy as all other functions take it; what was given, if it is one."""
    return _whole(reading) if is_unstacked(reading.state) else reading

  def _cut(self, rows, after):
    """Pieces of what rows have to read, with their tokens `[B, size]`."""
    lengths = np.array([len(row) for row in rows])
    done = np.zeros_like(lengths)
    positions = np.asarray(after.state.position)
    for piece in pieces(positions, lengths, self.config.memory.block_size):
      tokens = np.zeros((len(rows), piece.size), np.int32)
      for b, row in enumerate(rows):
        tokens[b, : piece.counts[b]] = row[done[b] : done[b] + piece.counts[b]]
      yield piece, tokens
      done += piece.counts


def _hidden(model, tokens, counts, state, within):
  return model.hidden(tokens, state, lengths=counts, aligned=not within, within_block=within)


def _last(model, hidden, counts, before):
  """Logits `[B, V]` after each row's last real token; a row without one keeps what it had."""
  place = jnp.maximum(counts - 1, 0)[:, None, None]
  logits = model.logits(jnp.take_along_axis(hidden, place, axis=1))[:, 0]
  return jnp.where((counts > 0)[:, None], logits, before)


def _tail(tail, tokens, counts):
  """The last tokens of each row after `counts` more."""
  both = jnp.concatenate([tail, tokens], axis=1)
  return jax.vmap(lambda row, at: jax.lax.dynamic_slice(row, (at,), (TAIL,)))(both, counts)


@functools.partial(jax.jit, static_argnames=("graphdef", "within"), donate_argnames="reading")
def _read(graphdef, params, tokens, counts, reading, *, within):
  model = nnx.merge(graphdef, params)
  hidden, state = _hidden(model, tokens, counts, reading.state, within)
  logits = _last(model, hidden, counts, reading.logits)
  return Reading(logits, state, _tail(reading.tail, tokens, counts))


@functools.partial(jax.jit, static_argnames=("graphdef", "within"), donate_argnames="reading")
def _score(graphdef, params, tokens, counts, reading, *, within):
  model = nnx.merge(graphdef, params)
  hidden, state = _hidden(model, tokens, counts, reading.state, within)
  following = jnp.pad(tokens[:, 1:], ((0, 0), (0, 1)))
  inner, best = log_probs_and_best(model.logits, hidden, following)
  first = jnp.take_along_axis(jax.nn.log_softmax(reading.logits), tokens[:, :1], axis=-1)
  best = jnp.concatenate([reading.logits.argmax(-1)[:, None], best[:, :-1]], axis=1)
  scores = jnp.concatenate([first, inner[:, :-1]], axis=1), best == tokens
  logits = _last(model, hidden, counts, reading.logits)
  return scores, Reading(logits, state, _tail(reading.tail, tokens, counts))


@functools.partial(jax.jit, static_argnums=0, donate_argnames=("reading", "seen"))
def _write(graphdef, params, reading, seen, samplers, limit, stop):
  model = nnx.merge(graphdef, params)
  B = limit.shape[0]
  rows = jnp.arange(B)
  reading = reading.replace(state=with_recent(reading.state, STEPS))

  def active(count, stopped):
    return ~stopped & (count < limit)

  def more(carry):
    i, _, count, stopped, _, _ = carry
    return (i < STEPS) & active(count, stopped).any()

  def due(reading):
    recent = reading.state.recent
    return jnp.array(False) if recent is None else recent.due.any()

  def step(carry):
    i, tokens, count, stopped, reading, seen = carry
    token = sampling.pick(reading.logits, seen, samplers, reading.state.position)  # [B]
    writes = active(count, stopped)
    stopped |= writes & stop[rows, token]
    writes &= ~stopped
    tokens = tokens.at[:, i].set(jnp.where(writes, token, 0))
    seen = seen.at[rows, token].max(writes)
    one = writes.astype(jnp.int32)
    hidden, state = model.hidden(token[:, None], reading.state, lengths=one)
    logits = _last(model, hidden, one, reading.logits)
    reading = Reading(logits, state, _tail(reading.tail, token[:, None], one))
    return i + 1, tokens, count + one, stopped, reading, seen

  def block(outer):
    """Tokens until some row's block is full, then its FAM; the inner loop only reads FAM and ring."""
    _, carry = outer
    carry = jax.lax.while_loop(lambda c: more(c) & ~due(c[-2]), step, carry)
    *rest, reading, seen = carry
    reading = reading.replace(state=model.write_fam(reading.state))
    carry = *rest, reading, seen
    return more(carry), carry

  nothing = jnp.zeros((B, STEPS), jnp.int32), jnp.zeros(B, jnp.int32), jnp.zeros(B, bool)
  begin = jnp.int32(0), *nothing, reading, seen
  _, (_, tokens, count, stopped, reading, seen) = jax.lax.while_loop(
      lambda outer: outer[0], block, (more(begin), begin)
  )
  return tokens, count, stopped, reading.replace(state=settle(reading.state)), seen


@jax.jit
def _apart(reading):
  return reading.replace(state=unstack(reading.state))


@jax.jit
def copied(tree):
  """A copy of all arrays, in one call: layers apart have many."""
  return jax.tree.map(jnp.copy, tree)


@jax.jit
def _whole(reading):
  return reading.replace(state=stack(reading.state))


@jax.jit
def _take(reading, rows):
  logits, tail = reading.logits[rows], reading.tail[rows]
  return Reading(logits, take(reading.state, rows), tail)


def _power_of_two(n: int) -> int:
  """The smallest power of two that is at least n."""
  return 1 << (n - 1).bit_length()
