"""A step of a model, ready to be called, with the least that it costs by formula.

    train     one optimizer step on B rows of S tokens
    prefill   reading S tokens, a chunk of blocks at a time, into an empty state
    decode    writing one block of N tokens, greedily, where S tokens have been read

Weights and tokens are random, and the state before decoding is empty but for its position: what a
program does depends on shapes alone.

The floor of a call is the longer of two times: its FLOPs (`famjax.training.flops`) over the rate
of matrix products, and the bytes that it cannot help to move over the rate of copying. Those are

    train     parameters, gradients and optimizer state, read and written once
    prefill   the parameters, once for each chunk
    decode    the parameters and the state, once for each token
"""

from collections.abc import Callable
import dataclasses
import time
from typing import Any, NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from famjax.errors import UserError
from famjax.inference import engine, sampling
from famjax.model.config import MemoryConfig, ModelConfig
from famjax.model.decoder import Decoder
from famjax.model.state import num_bytes
from famjax.parallel import hlo
from famjax.training.config import TrainConfig
from famjax.training.flops import flops_per_token, reading_flops_per_token
from famjax.training.optimizer import OptimizerConfig, make_optimizer, make_schedule
from famjax.training.step import make_train_step
from famjax.training.train_state import abstract, init_train_state, split

STEPS = ("train", "prefill", "decode")
MEMORIES = ("fam", "bswa", "full")


class Case(NamedTuple):
  """What is measured.

  Attributes:
    step: one of STEPS.
    memory: "fam": the model's own; "bswa": the same blocks and segments without it; "full": an
      ordinary decoder that sees everything.
    length: S, tokens of a row.
    batch_size: B.
  """

  step: str
  memory: str
  length: int
  batch_size: int


class Cost(NamedTuple):
  """Of one call, by formula.

  Attributes:
    tokens: of all rows that it trains on, reads or writes.
    flops: of matrix products.
    bytes: that have to be moved.
  """

  tokens: int
  flops: float
  bytes: float


class Ready(NamedTuple):
  """A compiled case.

  Attributes:
    prepare: makes what `call` uses up; its time is not measured.
    call: runs once and waits for the device.
    memory_bytes: arguments, results and temporaries of the program, as its compiler counts them.
    compile_seconds: tracing included.
  """

  prepare: Callable[[], Any]
  call: Callable[[Any], Any]
  memory_bytes: int
  compile_seconds: float


def model_of(model: ModelConfig, case: Case) -> ModelConfig:
  """The model with the memory of a case. Raises UserError if its blocks do not fit the length."""
  memory, S = model.memory, case.length
  N = memory.block_size
  if S % N:
    raise UserError(f"a length of {S} tokens is no multiple of block_size {N}: change one of them")
  chunk = _chunk(memory, S)
  if case.step == "prefill" and S % chunk:
    raise UserError(f"a prefill of {S} tokens is no multiple of its chunks of {chunk}: change it")
  if case.memory == "bswa":
    memory = dataclasses.replace(memory, kind="bswa")
  elif case.memory == "full":
    blocks = S // N + (case.step == "decode")
    memory = MemoryConfig("full", N, memory_segments=blocks - 1)
  return dataclasses.replace(model, memory=memory)


def cost_of(model: ModelConfig, optimizer: OptimizerConfig, case: Case) -> Cost:
  """What a call costs by formula; see above."""
  B, S, N = case.batch_size, case.length, model.memory.block_size
  model = model_of(model, case)
  params = abstract(model)[1]
  size = num_bytes(params)
  if case.step == "train":
    kept = num_bytes(jax.eval_shape(make_optimizer(optimizer, 1).init, params))
    return Cost(B * S, flops_per_token(model, S).total * B * S, 2.0 * (2 * size + kept))
  size = size * np.dtype(model.compute_dtype).itemsize // np.dtype(model.param_dtype).itemsize
  logits = 2.0 * model.model_dim * model.vocab_size
  if case.step == "prefill":  # logits are made of the last token of each chunk
    chunks = S // _chunk(model.memory, S)
    inside = (reading_flops_per_token(model, S) - logits) * B * S
    return Cost(B * S, inside + logits * B * chunks, float(size * chunks))
  flops = reading_flops_per_token(model, N, followed=True) * B * N
  state = jax.eval_shape(lambda: Decoder(model, rngs=nnx.Rngs(0)).init_state(B))
  return Cost(B * N, flops, float(N * (size + num_bytes(state))))


def make(
    model: ModelConfig, optimizer: OptimizerConfig, case: Case, loss_chunk: int = TrainConfig.loss_chunk
) -> Ready:
  """Compiles a case, in training with that `TrainConfig.loss_chunk`. Raises UserError if it cannot be."""
  config = model_of(model, case)
  config.validate()
  begun = time.perf_counter()
  if case.step == "train":
    program, prepare, call = _train(config, optimizer, case, loss_chunk)
  else:
    program, prepare, call = {"prefill": _prefill, "decode": _decode}[case.step](config, case)
  seconds = time.perf_counter() - begun
  return Ready(prepare, call, hlo.memory_of(program)["used"], seconds)


def _train(config, optimizer, case, loss_chunk):
  train = TrainConfig(train_steps=1, loss_chunk=loss_chunk)
  graphdef, params = split(Decoder(config, rngs=nnx.Rngs(0)))
  transformation = make_optimizer(optimizer, 1)
  schedule = make_schedule(optimizer, 1)
  state = init_train_state(params, transformation, config, train, case.batch_size)
  step = make_train_step(graphdef, config, train, transformation, schedule)
  B, S = case.batch_size, case.length
  tokens = _tokens(config, B, S + 1)
  batch = {
      "tokens": tokens[:, :-1], "targets": tokens[:, 1:], "weights": np.ones((B, S), np.float32),
      "start_of_sequence": np.ones(B, bool), "lengths": np.full(B, S, np.int32),
  }  # fmt: skip
  batch = jax.device_put(batch)
  program = step.lower(state, batch).compile()
  held = [state]

  def call(_):
    held[0], metrics = program(held[0], batch)  # the step takes over its state's memory
    return jax.block_until_ready((held[0], metrics))[1]

  return program, lambda: None, call


def _prefill(config, case):
  one = _engine(config)
  B, S = case.batch_size, case.length
  size = _chunk(config.memory, S)
  chunks = jax.device_put(np.split(_tokens(config, B, S), S // size, axis=1))
  start, counts = one.start(B), jax.device_put(np.full(B, size, np.int32))
  program = engine._read.lower(  # pylint: disable=protected-access
      one.graphdef, one.params, chunks[0], counts, start, within=False
  ).compile()

  def call(reading):
    for tokens in chunks:
      reading = program(one.params, tokens, counts, reading)
    return jax.block_until_ready(reading)

  return program, lambda: _copied(start), call


def _decode(config, case):
  one = _engine(config)
  B, V, N = case.batch_size, config.vocab_size, config.memory.block_size
  start = one.start(B)
  position = jnp.full(B, case.length, jnp.int32)
  updates = jnp.full_like(start.state.fam_updates, case.length // N)
  start = one.apart(start.replace(state=start.state.replace(position=position, fam_updates=updates)))
  samplers = sampling.stack([sampling.Sampling()] * B)
  stop, limit = jnp.zeros((B, V), bool), jnp.full(B, engine.STEPS, jnp.int32)
  graphdef, params = one._writer  # pylint: disable=protected-access
  program = engine._write.lower(  # pylint: disable=protected-access
      graphdef, params, start, stop, samplers, limit, stop
  ).compile()

  def call(reading):
    seen = jnp.zeros((B, V), bool)
    for _ in range(-(-N // engine.STEPS)):
      tokens, _, _, reading, seen = program(params, reading, seen, samplers, limit, stop)
    return jax.block_until_ready((tokens, reading))

  return program, lambda: _copied(start), call


def _chunk(memory: MemoryConfig, length: int) -> int:
  """Tokens that a prefill reads in one call."""
  return min(length, engine.CHUNK_BLOCKS * memory.block_size)


def _engine(config: ModelConfig) -> engine.Engine:
  """Of random weights in the dtype of products."""
  config = dataclasses.replace(config, lora_rank=0, param_dtype=config.compute_dtype)
  return engine.Engine(Decoder(config, rngs=nnx.Rngs(0)))


def _copied(reading: engine.Reading) -> engine.Reading:
  return jax.block_until_ready(engine.copied(reading))


def _tokens(config: ModelConfig, B: int, S: int) -> np.ndarray:
  return np.random.default_rng(0).integers(0, config.vocab_size, (B, S)).astype(np.int32)
