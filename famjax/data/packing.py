"""Packing examples into sequences of one length (SPEC section 5; paper, 3.1).

There is no mask between packed examples and positions go on through them: the model has to learn
what to forget. To reward memory, a random segment of the pack is asked for again at its end.
"""

from typing import Iterable, Sequence

import numpy as np

from famjax.errors import UserError

REPEAT_PROMPT = "[repeat random segment]:"


def pack(
    examples: Iterable[tuple[np.ndarray, np.ndarray]], length: int
) -> tuple[np.ndarray, np.ndarray, int]:
  """Joins examples until they fill a length; what the last one has beyond it is dropped.

  Args:
    examples: (tokens int32[n], weights float32[n]) of each; taken one by one, as many as are
      needed.
    length: of the pack, in tokens.

  Returns:
    tokens int32[length], weights float32[length] and the number of examples in it. Examples that
    end too early leave a shorter pack.
  """
  tokens, weights, used, filled = [], [], 0, 0
  examples = iter(examples)
  while filled < length:
    example = next(examples, None)
    if example is None:
      break
    tokens.append(example[0][: length - filled])
    weights.append(example[1][: length - filled])
    filled += len(tokens[-1])
    used += 1
  if not used:
    return np.zeros(0, np.int32), np.zeros(0, np.float32), 0
  return np.concatenate(tokens), np.concatenate(weights), used


def repeat_segment(
    rng: np.random.Generator,
    tokens: np.ndarray,
    weights: np.ndarray,
    prompt: Sequence[int],
    length: int = 256,
    weight: float = 0.1,
) -> tuple[np.ndarray, np.ndarray]:
  """Appends a prompt and then consecutive tokens from a random place of the pack.

  Args:
    rng: draws the place.
    tokens: int32[n], the pack.
    weights: float32[n].
    prompt: the tokens of `REPEAT_PROMPT`; they get weight 0.
    length: of the segment, in tokens.
    weight: of each token of the segment.

  Returns:
    tokens int32[n + len(prompt) + length] and weights float32 of the same length.

  Raises:
    UserError: the pack is shorter than the segment.
  """
  if length > len(tokens):
    raise UserError(
        f"a pack of {len(tokens)} tokens is shorter than the segment of {length} that it repeats;"
        " raise the sequence length or lower repeat_length"
    )
  start = int(rng.integers(len(tokens) - length, endpoint=True))
  end = [np.zeros(len(prompt), np.float32), np.full(length, weight, np.float32)]
  return (
      np.concatenate([tokens, np.asarray(prompt, np.int32), tokens[start : start + length]]),
      np.concatenate([weights, *end]),
  )
