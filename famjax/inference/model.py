"""A trained model with its vocabulary: read, continue, stream.

    model = famjax.load("runs/quickstart/fam-0")
    state = model.init_state(batch_size=1)
    logits, state = model(tokens, state)
    for piece in model.generate("The pass key is", max_new_tokens=20):
      print(piece, end="")
"""

from collections.abc import Iterator
import dataclasses
import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from famjax.data.vocabularies import Vocabulary, load_vocabulary
from famjax.errors import UserError
from famjax.model.config import MemoryConfig, ModelConfig
from famjax.model.decoder import Decoder
from famjax.model.state import State, empty_state
from famjax.training.checkpoint import Loaded, adopt, load_params, new_fam
from famjax.training.train_state import split

_PREFILL_BLOCKS = 8  # blocks read in one call; one shape is compiled for all full calls


class Model:
  """A decoder, its vocabulary, and compiled functions of both.

  Attributes:
    decoder: weights and configuration.
    vocabulary: of the text it was trained on.
  """

  def __init__(self, decoder: Decoder, vocabulary: Vocabulary):
    self.decoder = decoder
    self.vocabulary = vocabulary
    self._graphdef, self._params = nnx.split(decoder)

  @property
  def config(self):
    """The decoder's `ModelConfig`."""
    return self.decoder.config

  @property
  def fam_prompt(self) -> jax.Array | None:
    """`[F, D]`, the FAM prompt; None for a model without one."""
    return self.decoder.fam_prompt[...] if hasattr(self.decoder, "fam_prompt") else None

  def init_state(self, batch_size: int = 1) -> State:
    """The state of rows that have read nothing."""
    return self._init_state(self._params, batch_size)

  def __call__(self, tokens: jax.Array, state: State) -> tuple[jax.Array, State]:
    """Reads `tokens` int32 `[B, S]`, S of any length, after what `state` remembers.

    Compiled once for each S, and for S > 1 whether all rows stand at a block boundary.

    Returns:
      float32 logits `[B, S, V]` and the state after the tokens.

    Raises:
      UserError: no token, one that is no integer or outside the vocabulary, or a state of another
        batch or model.
    """
    self._check_state(state)
    try:
      tokens = np.asarray(tokens)
    except ValueError:
      raise UserError("tokens are lists of unequal length: call with each row on its own") from None
    if tokens.ndim != 2 or tokens.shape[0] != state.position.shape[0]:
      raise UserError(
          f"tokens have shape {tokens.shape} and the state {state.position.shape[0]} rows: give"
          " int tokens [B, S] with as many rows as the state has"
      )
    if not tokens.size:
      raise UserError(f"tokens have shape {tokens.shape}: give at least one")
    if not np.issubdtype(tokens.dtype, np.integer):
      raise UserError(f"tokens are {tokens.dtype}: give integers, as the vocabulary encodes them")
    if not 0 <= tokens.min() <= tokens.max() < self.config.vocab_size:
      raise UserError(
          f"token {int(tokens.min() if tokens.min() < 0 else tokens.max())} is outside the"
          f" vocabulary of {self.config.vocab_size}"
      )
    at_boundary = not np.any(np.asarray(state.position) % self.config.memory.block_size)
    aligned = at_boundary and tokens.shape[1] > 1  # a single token is decoded wherever it stands
    return self._read(self._params, jnp.asarray(tokens, jnp.int32), state, aligned)

  def read(self, text: str, state: State | None = None) -> tuple[jax.Array, State]:
    """Reads one row of text in constant memory.

    Args:
      text: at least one token long.
      state: of one row; None: a fresh one.

    Returns:
      float32 logits `[V]` of what comes next, and the state.

    Raises:
      UserError: the text is empty.
    """
    tokens = np.asarray(self.vocabulary.encode(text), np.int32)
    if not tokens.size:
      raise UserError("the prompt is empty: give at least one token of text")
    state = self.init_state() if state is None else state
    N = self.config.memory.block_size
    chunk = N * _PREFILL_BLOCKS
    to_boundary = -int(state.position[0]) % N
    cuts = list(range(min(to_boundary, len(tokens)), len(tokens), chunk))
    for piece in np.split(tokens, [c for c in cuts if c]):
      logits, state = self(piece[None], state)
    return logits[0, -1], state

  def generate(
      self,
      prompt: str,
      *,
      max_new_tokens: int = 100,
      temperature: float = 0.0,
      seed: int = 0,
      state: State | None = None,
  ) -> Iterator[str]:
    """Streams what comes after a prompt, until the vocabulary's end symbol.

    Args:
      prompt: text to read first.
      max_new_tokens: at most so many tokens.
      temperature: 0 takes the likeliest token, else the logits are divided by it and drawn from.
      seed: of the draws; the same seed gives the same text.
      state: what was read before; None: nothing.

    Yields:
      Pieces of text, whole characters each.

    Raises:
      UserError: the prompt is empty, or the temperature is negative.
    """
    if temperature < 0:
      raise UserError(f"temperature is {temperature}: use 0 for the likeliest token, or more")
    logits, state = self.read(prompt, state)
    ids, written = [], ""
    for i in range(max_new_tokens):
      key = jax.random.fold_in(jax.random.key(seed), i)
      token = int(_pick(logits, key, temperature))
      if token == self.vocabulary.eos_id:
        return
      ids.append(token)
      text = self.vocabulary.decode(ids)
      if not text.endswith("\ufffd"):  # else the token ends in the middle of a character
        if text != written:  # else the token has no text: padding
          yield text[len(written) :]
        written = text
      if i + 1 < max_new_tokens:
        logits, state = self(np.full((1, 1), token), state)
        logits = logits[0, -1]

  def _check_state(self, state: State) -> None:
    """Raises UserError for a state of another configuration."""
    expected = _state_shapes(self.config, state.position.shape[0])
    for field in dataclasses.fields(State):
      ours, theirs = getattr(expected, field.name), getattr(state, field.name)
      if theirs is None or (theirs.shape, theirs.dtype) != (ours.shape, ours.dtype):
        have = "missing" if theirs is None else f"{theirs.dtype}{list(theirs.shape)}"
        raise UserError(
            f"the state is of another model: its {field.name} is {have}, and this model's"
            f" {ours.dtype}{list(ours.shape)}; begin with init_state of this model"
        )

  @functools.cached_property
  def _read(self):
    def read(params, tokens, state, aligned):
      return nnx.merge(self._graphdef, params)(tokens, state, aligned=aligned)

    return jax.jit(read, static_argnums=3)

  @functools.cached_property
  def _init_state(self):
    def init_state(params, batch_size):
      return nnx.merge(self._graphdef, params).init_state(batch_size)

    return jax.jit(init_state, static_argnums=1)


@functools.lru_cache(16)
def _state_shapes(config: ModelConfig, batch_size: int) -> State:
  return jax.eval_shape(lambda: empty_state(config, batch_size))


@functools.partial(jax.jit, static_argnums=2)
def _pick(logits: jax.Array, key: jax.Array, temperature: float) -> jax.Array:
  """The next token of float32 logits `[V]`."""
  if temperature == 0:
    return logits.argmax()
  return jax.random.categorical(key, logits / temperature)


def load(
    path: str, memory: MemoryConfig | None = None, *, fam_prompt: jax.Array | None = None
) -> Model:
  """Loads a model from a run or checkpoint directory.

  Args:
    path: the directory of a run, of its checkpoints or of one of them.
    memory: another memory than it was trained with; no weight but the FAM's own depends on it.
    fam_prompt: `[F, D]`, a FAM prompt to start from. Where a FAM is asked for that the checkpoint
      does not hold, and none is given, it is drawn from the embedding.

  Raises:
    UserError: no checkpoint there, or a prompt of another shape.
  """
  return assemble(load_params(path), memory, fam_prompt=fam_prompt)


def assemble(
    loaded: Loaded, memory: MemoryConfig | None = None, *, fam_prompt: jax.Array | None = None
) -> Model:
  """Makes a model of what was loaded; args and errors are those of `load`."""
  params, config = loaded.params, loaded.model
  if memory is not None:
    config = dataclasses.replace(config, memory=memory)
  graphdef, fresh = split(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))
  if fam_prompt is not None:
    params = params | {"fam_prompt": jnp.asarray(fam_prompt)}
    if "fam_prompt" not in fresh:
      raise UserError("a fam_prompt was given, and this memory has no such weight: leave it out")
  for name in new_fam(fresh, params):
    if name in params:  # a trained one is not thrown away without a word
      raise UserError(
          f"{name} has shape {params[name].shape}, and this memory takes {fresh[name].shape}: choose"
          " its fam_length, or give a fam_prompt that fits"
      )
  decoder = nnx.merge(graphdef, adopt(fresh, params, seed=0))
  return Model(decoder, load_vocabulary(loaded.vocabulary))
