"""Next-token cross-entropy that never holds the logits of a whole batch.

With a vocabulary of 256k and rows of 8.5k tokens, the logits of one row alone are 8.7 GB. They are
needed a chunk of tokens at a time only, forward and backward.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class LossSums(NamedTuple):
  """Sums over tokens; a mean is a sum divided by `weight`.

  Attributes:
    loss: float32 scalar, weighted cross-entropy in nats.
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

  The sequence is cut, not the batch, so a batch that is sharded by rows stays so. Each chunk's
  logits are made again in the backward pass: the price is one more product with the embedding.

  Args:
    logits_fn: hidden `[B, c, D]` to logits `[B, c, V]`, such as `Decoder.logits`. It may close
      over parameters; their gradients are summed over the chunks.
    hidden: the last layer's output.
    targets: int32, the token that follows each.
    weights: float32 loss weights; 0 leaves a token out.
    chunk_tokens: tokens whose logits stand in memory at once, at least one per row.

  Returns:
    Sums over all tokens.
  """
  B, S, _ = hidden.shape
  chunks = -(-S // max(1, chunk_tokens // B))
  length = -(-S // chunks)

  @jax.checkpoint
  def add_chunk(sums, chunk):
    hidden, targets, weights = chunk
    logits = logits_fn(hidden).astype(jnp.float32)  # [B, c, V]
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]  # [B, c]
    loss = jax.nn.logsumexp(logits, axis=-1) - chosen
    correct = jnp.argmax(logits, axis=-1) == targets
    new = LossSums((loss * weights).sum(), weights.sum(), (correct * weights).sum())
    return jax.tree.map(jnp.add, sums, new), None

  def cut(x):  # [B, S, ...] -> [chunks, B, length, ...]; padding has weight 0
    x = jnp.pad(x, [(0, 0), (0, chunks * length - S)] + [(0, 0)] * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(B, chunks, length, *x.shape[2:]), 1, 0)

  zero = LossSums(*(jnp.zeros((), jnp.float32),) * 3)
  weights = weights.astype(jnp.float32)
  sums, _ = jax.lax.scan(add_chunk, zero, (cut(hidden), cut(targets), cut(weights)))
  return sums
