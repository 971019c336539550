"""Next-token losses that never hold the logits of a whole batch.

With a vocabulary of 256k and rows of 8.5k tokens, the logits of one row alone are 8.7 GB. They are
needed a chunk of tokens at a time only, forward and backward.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


class LossSums(NamedTuple):
  """Sums over tokens; a mean is a sum divided by `weight`.

  Attributes:
    loss: float32 scalar, weighted cross-entropy, or divergence from a teacher, in nats.
    weight: float32 scalar, sum of the loss weights.
    correct: float32 scalar, sum of the weights of tokens that the largest logit predicts.
  """

  loss: jax.Array
  weight: jax.Array
  correct: jax.Array


def next_token_loss(
    logits_fn: Callable[[jax.Array], jax.Array],
    hidden: Float[Array, "B S D"],
    targets: Int[Array, "B S"],
    weights: Float[Array, "B S"],
    chunk_tokens: int = 1024,
) -> LossSums:
  """Weighted next-token loss, `chunk_tokens` tokens at a time.

  The sequence is cut, not the batch, so a batch that is sharded by rows stays so. Where a gradient
  is asked for, each chunk's is made while its logits are there, so that they are made once. `loss`
  alone has one, of `hidden` and of what `logits_fn` closes over (`weights` count as constants); it
  cannot be differentiated twice, nor forward (`jax.jvp`).

  Args:
    logits_fn: hidden `[B, c, D]` to logits `[B, c, V]`, such as `Decoder.logits`. It may close
      over parameters; their gradients are summed over the chunks.
    hidden: the last layer's output.
    targets: int32, the token that follows each.
    weights: float32 loss weights; 0 leaves a token out, as it does the padding of the last chunk.
    chunk_tokens: tokens whose logits stand in memory at once, at least one per row.

  Returns:
    Sums over all tokens.
  """

  def of_logits(logits, targets, taught):
    del taught
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]  # [B, c]
    return jax.nn.logsumexp(logits, axis=-1) - chosen

  return _in_chunks(of_logits, (logits_fn, hidden), None, targets, weights, chunk_tokens)


def distillation_loss(
    logits_fn: Callable[[jax.Array], jax.Array],
    hidden: Float[Array, "B S D"],
    teacher_logits_fn: Callable[[jax.Array], jax.Array],
    teacher_hidden: Float[Array, "B S D"],
    targets: Int[Array, "B S"],
    weights: Float[Array, "B S"],
    chunk_tokens: int = 1024,
) -> LossSums:
  """Weighted divergence KL(teacher || student) of next-token distributions, chunk by chunk.

  Args are those of `next_token_loss`; the teacher's have no gradient, and `targets` count for
  `correct` alone.
  """

  def of_logits(logits, targets, taught):
    del targets
    wanted = jax.nn.log_softmax(taught, axis=-1)
    apart = wanted - jax.nn.log_softmax(logits, axis=-1)
    return (jnp.exp(wanted) * apart).sum(-1)

  student, teacher = (logits_fn, hidden), (teacher_logits_fn, teacher_hidden)
  return _in_chunks(of_logits, student, teacher, targets, weights, chunk_tokens)


def _in_chunks(of_logits, student, teacher, targets, weights, chunk_tokens) -> LossSums:
  """Sums of `of_logits(logits, targets, taught)`, float32 logits `[B, c, V]` to losses `[B, c]`.

  Args:
    of_logits: as above; `taught` is the teacher's logits, or None.
    student: what makes logits of hidden vectors, and these.
    teacher: the same of a teacher, who gets no gradient; None: there is none.
    targets: of `next_token_loss`, as `weights` and `chunk_tokens`.
  """
  cut = _cutter(student[1], chunk_tokens)
  example = cut(student[1])[0]
  # What the functions close over becomes an argument, so that its gradient can be asked for.
  logits_of, params = jax.closure_convert(student[0], example)
  teach, frozen = (None, ()) if teacher is None else jax.closure_convert(
      teacher[0], cut(teacher[1])[0]
  )  # fmt: skip
  chunks = jax.tree.map(cut, (
      None if teacher is None else teacher[1], targets, weights.astype(jnp.float32)
  ))  # fmt: skip

  def sums_of(logits, frozen, chunk):
    shown, targets, weights = chunk
    logits = logits.astype(jnp.float32)
    taught = None if shown is None else teach(shown, *frozen).astype(jnp.float32)
    loss = of_logits(logits, targets, taught)
    correct = jnp.argmax(logits, axis=-1) == targets
    return LossSums((loss * weights).sum(), weights.sum(), (correct * weights).sum())

  zero = LossSums(*(jnp.zeros((), jnp.float32),) * 3)

  @jax.custom_vjp
  def total(params, hidden, frozen, chunks):
    def add_chunk(sums, inputs):
      hidden, chunk = inputs
      new = sums_of(logits_of(hidden, *params), frozen, chunk)
      return jax.tree.map(jnp.add, sums, new), None

    return jax.lax.scan(add_chunk, zero, (hidden, chunks))[0]

  def forward(params, hidden, frozen, chunks):
    def add_chunk(carry, inputs):
      hidden, chunk = inputs
      logits, back = jax.vjp(lambda params, hidden: logits_of(hidden, *params), params, hidden)

      def loss_of(logits):
        sums = sums_of(logits, frozen, chunk)
        return sums.loss, sums

      of_logits, sums = jax.grad(loss_of, has_aux=True)(logits)
      of_params, of_hidden = back(of_logits)
      return jax.tree.map(jnp.add, carry, (sums, of_params)), of_hidden

    begin = zero, jax.tree.map(jnp.zeros_like, params)
    (sums, of_params), of_hidden = jax.lax.scan(add_chunk, begin, (hidden, chunks))
    return sums, (of_params, of_hidden, frozen, chunks)

  def backward(kept, given):
    of_params, of_hidden, frozen, chunks = kept
    scaled = jax.tree.map(lambda x: (x * given.loss).astype(x.dtype), (of_params, of_hidden))
    nothing = lambda x: (
        jnp.zeros_like(x) if jnp.issubdtype(x.dtype, jnp.inexact)
        else np.zeros(x.shape, jax.dtypes.float0)
    )  # fmt: skip
    return *scaled, *jax.tree.map(nothing, (frozen, chunks))

  total.defvjp(forward, backward)
  return total(params, cut(student[1]), frozen, chunks)


def token_log_probs(
    logits_fn: Callable[[jax.Array], jax.Array],
    hidden: Float[Array, "B S D"],
    targets: Int[Array, "B S"],
    chunk_tokens: int = 1024,
) -> Float[Array, "B S"]:
  """Natural logarithms of the probabilities of next tokens, `chunk_tokens` tokens at a time.

  Args are those of `next_token_loss`.
  """
  return log_probs_and_best(logits_fn, hidden, targets, chunk_tokens)[0]


def log_probs_and_best(
    logits_fn: Callable[[jax.Array], jax.Array],
    hidden: Float[Array, "B S D"],
    targets: Int[Array, "B S"],
    chunk_tokens: int = 1024,
) -> tuple[Float[Array, "B S"], Int[Array, "B S"]]:
  """As `token_log_probs`, and beside them the likeliest next token of each."""
  B, S, _ = hidden.shape
  cut = _cutter(hidden, chunk_tokens)

  def of_chunk(chunk):
    hidden, targets = chunk
    log_probs = jax.nn.log_softmax(logits_fn(hidden).astype(jnp.float32), axis=-1)
    chosen = jnp.take_along_axis(log_probs, targets[..., None], axis=-1)[..., 0]
    return chosen, log_probs.argmax(-1)

  chunks = jax.lax.map(of_chunk, (cut(hidden), cut(targets)))  # [chunks, B, length] each
  return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(B, -1)[:, :S], chunks)


def _cutter(hidden: jax.Array, chunk_tokens: int) -> Callable[[jax.Array], jax.Array]:
  """A function that cuts `[B, S, ...]` into `[chunks, B, length, ...]`, padded with zeros."""
  B, S, _ = hidden.shape
  chunks = -(-S // max(1, chunk_tokens // B))
  length = -(-S // chunks)

  def cut(x):
    x = jnp.pad(x, [(0, 0), (0, chunks * length - S)] + [(0, 0)] * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(B, chunks, length, *x.shape[2:]), 1, 0)

  return cut
