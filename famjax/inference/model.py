"""A trained model with its vocabulary: read, continue, stream.

    model = famjax.load("runs/quickstart/fam-0")
    state = model.init_state(batch_size=1)
    logits, state = model(tokens, state)
    for piece in model.generate("The pass key is", max_new_tokens=20):
      print(piece, end="")
    reading = model.read(book)
    answer = model.generate(question, state=reading)
"""

from collections.abc import Iterator, Sequence
import dataclasses
import functools
from typing import NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from famjax import trust
from famjax.data.vocabularies import check_fits, encode_after, encode_text
from famjax.data.vocabularies import load_vocabulary, Vocabulary
from famjax.errors import UserError
from famjax.inference import continuations
from famjax.inference.engine import Engine, Progress, Reading, Scores
from famjax.inference.generation import Generation, Request, Stream
from famjax.inference.sampling import Sampling
from famjax.model import lora
from famjax.model.config import MemoryConfig, ModelConfig
from famjax.model.decoder import Decoder
from famjax.model.state import State, empty_state
from famjax.training import parameters
from famjax.training.adoption import adopt, new_fam
from famjax.training.checkpoint import Loaded, load_params
from famjax.training.train_state import abstract, split


class Score(NamedTuple):
  """What `Model.score` says of a text.

  Attributes:
    tokens: int32 `[n]`.
    log_probs: float32 `[n]`, natural logarithm of each token's probability; nan for a first token
      that nothing was read before.
    reading: where the row stands after the text.
  """

  tokens: np.ndarray
  log_probs: np.ndarray
  reading: Reading


class Completion(NamedTuple):
  """What was written after one prompt; see `Generation`."""

  text: str
  tokens: list[int]
  reason: str


class Model:
  """A decoder, its vocabulary, and compiled functions of both.

  Attributes:
    decoder: weights and configuration.
    vocabulary: of the text it was trained on.
  """

  def __init__(self, decoder: Decoder, vocabulary: Vocabulary):
    """Takes a decoder and its vocabulary.

    Raises:
      UserError: a symbol that begins or ends a text has an id that the decoder lacks.
    """
    check_fits(vocabulary, decoder.config.vocab_size, padding=False)
    self.decoder = decoder
    self.vocabulary = vocabulary
    self._engine = Engine(decoder)

  @property
  def config(self):
    """The decoder's `ModelConfig`."""
    return self.decoder.config

  @property
  def fam_prompt(self) -> jax.Array | None:
    """`[F, D]`, the FAM prompt; None for a model without one."""
    return self.decoder.fam_prompt[...] if hasattr(self.decoder, "fam_prompt") else None

  @functools.cached_property
  def fingerprint(self) -> str:
    """16 hex digits that stand for the values of all weights."""
    return parameters.fingerprint(self._engine.params)

  def start(self, batch_size: int = 1) -> Reading:
    """Rows that have read nothing; what comes next is not known."""
    return self._engine.start(batch_size)

  def init_state(self, batch_size: int = 1) -> State:
    """The state of rows that have read nothing."""
    return self.start(batch_size).state

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
    self._check_tokens(tokens)
    self._check_context(state, tokens.shape[1])
    at_boundary = not np.any(np.asarray(state.position) % self.config.memory.block_size)
    aligned = at_boundary and tokens.shape[1] > 1  # a single token is decoded wherever it stands
    return self._read(self._engine.params, jnp.asarray(tokens, jnp.int32), state, aligned)

  def read(
      self,
      text: str | Sequence[int],
      state: State | Reading | None = None,
      *,
      progress: Progress | None = None,
  ) -> Reading:
    """Reads one row of text, or of tokens, in constant memory.

    Args:
      text: of any length, at least one token.
      state: of one row; None: a fresh one. It can be used again.
      progress: is told after every piece how many tokens it had; if it returns True, no more is
        read.

    Returns:
      `(logits, state)`: float32 logits `[1, V]` of what comes next, and the state.

    Raises:
      UserError: the text is empty, or the tokens or the state are not this model's.
    """
    after = self._reading(state, 1)
    tokens = self._tokens(text, after.state)
    if not tokens.size:
      raise UserError("the text to read is empty: give at least one token of it")
    self._check_context(after.state, tokens.size)
    return self._engine.read([tokens], after, progress=progress)

  def score(
      self,
      text: str | Sequence[int],
      state: State | Reading | None = None,
      *,
      progress: Progress | None = None,
  ) -> Score:
    """Says how probable every token of a text was, in constant memory.

    Args are those of `read`.

    Returns:
      The tokens, their log-probabilities, and where the row stands after them.

    Raises:
      UserError: as `read`.
    """
    after = self._reading(state, 1)
    tokens = self._tokens(text, after.state)
    if not tokens.size:
      raise UserError("the text to score is empty: give at least one token of it")
    self._check_context(after.state, tokens.size)
    ((log_probs, _),), reading = self._engine.score([tokens], after, progress=progress)
    if not isinstance(state, Reading):  # a state alone does not say what would have come next
      log_probs[0] = np.nan
    return Score(tokens[: len(log_probs)], log_probs, reading)

  def generate(
      self,
      prompt: str | Sequence[int] = "",
      *,
      max_new_tokens: int = 100,
      temperature: float = 0.0,
      top_k: int = 0,
      top_p: float = 1.0,
      min_p: float = 0.0,
      repetition_penalty: float = 1.0,
      seed: int = 0,
      stop: str | Sequence[str] = (),
      stop_tokens: int | Sequence[int] = (),
      state: State | Reading | None = None,
      progress: Progress | None = None,
  ) -> Stream:
    """Streams what comes after a prompt, until the vocabulary's end symbol.

    Args:
      prompt: text or tokens to read first; may be empty after a `Reading`.
      max_new_tokens: at most so many tokens.
      temperature, top_k, top_p, min_p, repetition_penalty, seed: see `sampling.Sampling`.
      stop: strings that end the text; they are not part of it.
      stop_tokens: more tokens that end it, like the end symbol.
      state: what was read before; None: nothing. It can be used again.
      progress: is told, while the prompt is read, how many tokens each piece had; if it returns
        True, no more is read and nothing is written.

    Returns:
      An iterator of pieces of text, whole characters each. Its `reading` is where the row stands,
      to go on from.

    Raises:
      UserError: nothing has been read, or a setting makes no sense.
    """
    settings = Sampling(temperature, top_k, top_p, min_p, repetition_penalty, seed)
    request = Request(max_new_tokens, settings, stop, stop_tokens)
    return Stream(self._generation([prompt], [request], state, progress))

  def complete(
      self,
      prompts: Sequence[str | Sequence[int]],
      requests: Request | Sequence[Request] = Request(),
      after: Reading | None = None,
  ) -> list[Completion]:
    """Completes several prompts side by side; each gets what it would get alone.

    Args:
      prompts: texts or tokens.
      requests: one for all prompts, or one for each.
      after: of one row, which all prompts go on from. It can be used again.

    Raises:
      UserError: as `generate`.
    """
    if isinstance(requests, Request):
      requests = [requests] * len(prompts)
    if len(requests) != len(prompts):
      raise UserError(f"{len(prompts)} prompts and {len(requests)} requests: give one for each")
    if not prompts:
      return []
    start = after and after.take([0] * len(prompts))
    generation = self._generation(prompts, requests, start, None)
    while not generation.done:
      generation.round()
    return [
        Completion(*row) for row in zip(generation.texts, generation.tokens, generation.reasons)
    ]

  def scores_after(
      self,
      pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
      batch_size: int = 8,
      after: Reading | None = None,
  ) -> Iterator[tuple[int, Scores]]:
    """Says how probable texts are after contexts. A context that several have is read once.

    Args:
      pairs: tokens of a context, and of the text after it.
      batch_size: of contexts, and of texts, side by side.
      after: of one row, which all contexts go on from. It can be used again.

    Yields:
      The number of a pair, and the scores of its text; the longest contexts first.

    Raises:
      UserError: nothing stands before a text, tokens are not this model's, or the context of an
        ordinary decoder is shorter.
    """
    start = self._reading(after, 1).state
    rows = [tuple(self._tokens(tokens, start) for tokens in pair) for pair in pairs]
    for context, text in rows:
      if after is None and not context.size:
        raise UserError("nothing stands before a text: give at least one token of its context")
      self._check_context(start, context.size + text.size)
    return continuations.scores_after(self._engine, rows, batch_size, after)

  def _generation(self, prompts, requests, state, progress) -> Generation:
    for request in requests:
      request.validate(self.config.vocab_size)
    reading = self._reading(state, len(prompts))
    rows = [self._tokens(prompt, reading.state) for prompt in prompts]
    heard = isinstance(state, Reading) and int(state.state.position.min()) > 0
    if not heard and not all(row.size for row in rows):
      raise UserError("the prompt is empty: give at least one token of text")
    for row, request in zip(rows, requests):
      self._check_context(reading.state, row.size + request.max_new_tokens)
    end = np.asarray(reading.state.position) + [row.size for row in rows]
    if any(row.size for row in rows):
      reading = self._engine.read(rows, reading, progress=progress)
    whole = np.array_equal(reading.state.position, end)
    return Generation(self._engine, self.vocabulary, requests, reading, rows, whole)

  def _tokens(self, text: str | Sequence[int], after: State) -> np.ndarray:
    """int32 `[n]`, checked; a text that begins has what its tokenizer puts there."""
    if isinstance(text, str):
      begins = text and not np.any(after.position)
      text = (encode_text if begins else encode_after)(self.vocabulary, text)
    tokens = np.asarray(text)
    if tokens.ndim != 1:
      raise UserError(f"tokens have shape {tokens.shape}: give a text, or tokens [n]")
    if tokens.size:
      self._check_tokens(tokens)
    return tokens.astype(np.int32)

  def _reading(self, state: State | Reading | None, batch_size: int) -> Reading:
    if state is None:
      return self.start(batch_size)
    reading = state if isinstance(state, Reading) else None
    state = state.state if reading else state
    self._check_state(state)
    if reading and reading.logits.shape[1] != self.config.vocab_size:
      raise UserError(
          f"the reading is of another model: a vocabulary of {reading.logits.shape[1]}, and this"
          f" model's is {self.config.vocab_size}"
      )
    if state.position.shape[0] != batch_size:
      raise UserError(
          f"the state has {state.position.shape[0]} rows and the text {batch_size}: give one row of"
          " text for each"
      )
    return reading or self.start(batch_size).replace(state=state)

  def _check_context(self, state: State, tokens: int) -> None:
    """Raises UserError if an ordinary decoder has no room for so many tokens more."""
    if self.config.memory.context is not None:
      self.config.memory.check_context(int(np.max(state.position)) + tokens)

  def _check_tokens(self, tokens: np.ndarray) -> None:
    if not np.issubdtype(tokens.dtype, np.integer):
      raise UserError(f"tokens are {tokens.dtype}: give integers, as the vocabulary encodes them")
    if not 0 <= tokens.min() <= tokens.max() < self.config.vocab_size:
      raise UserError(
          f"token {int(tokens.min() if tokens.min() < 0 else tokens.max())} is outside the"
          f" vocabulary of {self.config.vocab_size}"
      )

  def _check_state(self, state: State) -> None:
    """Raises UserError for a state of another configuration."""
    expected = _state_shapes(self.config, state.position.shape[0])
    if state.recent is not None:
      raise UserError("the state has tokens that are not in its ring yet: write_fam and settle it first")
    ours, theirs = _described(expected), _described(state)
    for name in ours | theirs:
      if ours.get(name) != theirs.get(name):
        raise UserError(
            f"the state is of another model: its {name} is {theirs.get(name, 'missing')}, and this"
            f" model's {ours.get(name, 'missing')}; begin with init_state of this model"
        )

  @functools.cached_property
  def _read(self):
    def read(params, tokens, state, aligned):
      return nnx.merge(self._engine.graphdef, params)(tokens, state, aligned=aligned)

    return jax.jit(read, static_argnums=3)


def _described(state: State) -> dict[str, str]:
  """Dtype and shape of every array by its name, `float32[2, 1]` of `memory.layers.0`."""
  leaves = jax.tree_util.tree_leaves_with_path(state)
  name = lambda path: jax.tree_util.keystr(path, simple=True, separator=".")
  return {name(path): f"{x.dtype}{list(x.shape)}" for path, x in leaves}


@functools.lru_cache(16)
def _state_shapes(config: ModelConfig, batch_size: int) -> State:
  return jax.eval_shape(lambda: empty_state(config, batch_size))


def load(
    path: str,
    memory: MemoryConfig | None = None,
    *,
    fam_prompt: jax.Array | None = None,
    trust_code: bool = False,
    allow_nonfinite: bool = False,
) -> Model:
  """Loads a model from a directory of ours or of the Hugging Face hub.

  Args:
    path: the directory of a run, of its checkpoints or of one of them; or one with `config.json` and
      safetensors, which is an ordinary decoder if no memory is given.
    memory: another memory than it was trained with; no weight but the FAM's own depends on it.
    fam_prompt: `[F, D]`, a FAM prompt to start from. Where a FAM is asked for that the checkpoint
      does not hold, and none is given, it is drawn from the embedding.
    trust_code: Whether the directory may name a Python class ("module:Class") as its memory, which
      is then imported and run. Set it only for directories whose authors you trust.
    allow_nonfinite: Whether weights may be NaN or infinite.

  Raises:
    UserError: There is no checkpoint, a weight is NaN or infinite, or a prompt has another shape.
  """
  with trust.code(trust_code):
    loaded = load_params(path, allow_nonfinite=allow_nonfinite)
    return assemble(loaded, memory, fam_prompt=fam_prompt)


def assemble(
    loaded: Loaded, memory: MemoryConfig | None = None, *, fam_prompt: jax.Array | None = None
) -> Model:
  """Makes a model of what was loaded; args and errors are those of `load`."""
  params, config = lora.merge(loaded.params, loaded.model)
  if memory is not None:
    # A kernel that was forced for the other memory may not be for this one.
    kernel = "none" if config.attention_kernel == "none" else "auto"
    config = dataclasses.replace(config, memory=memory, attention_kernel=kernel)
  graphdef, fresh = abstract(config)
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
  fresh_params = lambda: split(Decoder(config, rngs=nnx.Rngs(0)))[1]
  decoder = nnx.merge(graphdef, adopt(fresh, params, 0, fresh_params=fresh_params))
  return Model(decoder, load_vocabulary(loaded.vocabulary))
