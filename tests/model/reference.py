"""TransformerFAM in NumPy float64, one row, token by token: what famjax/model must compute.

Written from SPEC sections 1 and 2 (Algorithms 1 and 2 of arXiv 2404.09173), never from
famjax/model: blocks outermost, layers inside, then tokens, then heads, all python loops.
`dense_logits` is a second formulation for models without a FAM: whole matrices under an explicit
mask. Both read the parameter names of `famjax.model.decoder.Decoder` and the fields of
`ModelConfig`, and nothing else.
"""

import dataclasses

from flax import nnx
import jax
import numpy as np

Params = dict[str, object]  # nested dicts of float64 arrays


@dataclasses.dataclass(frozen=True)
class Reading:
  """What one row holds after its tokens are read; float64.

  Attributes:
    logits: [S, V].
    keys: [L, S, K, d], every token's key, rotated.
    values: [L, S, K, d].
    fam: [L, F, D] after the last full block (the initial FAM when there is none).
    fam_keys: [L, F, K, d], keys of `fam`, rotated to the positions of the block that wrote it.
    fam_values: [L, F, K, d].
    fam_updates: how many times `fam` was written.
  """

  logits: np.ndarray
  keys: np.ndarray
  values: np.ndarray
  fam: np.ndarray
  fam_keys: np.ndarray
  fam_values: np.ndarray
  fam_updates: int


def to_numpy(params) -> Params:
  """Turns `nnx.state(model, nnx.Param)` into nested dicts of float64 NumPy arrays."""
  return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), nnx.to_pure_dict(params))


def read(params: Params, config, tokens, *, offset: int = 0, kept_fam=None) -> Reading:
  """Reads one row of tokens.

  Args:
    params: nested float64 arrays, see `to_numpy`.
    config: a ModelConfig.
    tokens: [S] token ids.
    offset: random position offset of the row (SPEC 2, RPO).
    kept_fam: [L, F, D] to start from in place of the initial FAM (SPEC 2, RSP), or None.

  Returns:
    The logits and what a state would hold.
  """
  memory, size = config.memory, config.memory.block_size
  layers = [_layer(params["layers"], index, config) for index in range(config.num_layers)]
  length = memory.fam_length if memory.kind == "fam" else 0
  if kept_fam is not None:
    fam, updates = list(np.asarray(kept_fam, np.float64)), 1
  else:
    fam, updates = _initial_fam(params, config, layers, length, offset), 0
  past = [[] for _ in layers]  # per layer, the (position, key, value) of every token read so far
  logits = []

  for block, start in enumerate(range(0, len(tokens), size)):
    x = [_embedded(params["embedder"]["embedding"][t], config) for t in tokens[start : start + size]]
    full = len(x) == size
    for index, layer in enumerate(layers):
      # Q, Kx, Vx of the tokens; Qf, Kf, Vf of the FAM that block t-1 wrote.
      for i, vector in enumerate(x):
        past[index].append((start + i, *_key_and_value(vector, layer, start + i + offset, config)))
      own = [(key, value) for _, key, value in past[index][start:]]
      fam_pairs = _fam_pairs(fam[index], layer, config, block - 1, offset)

      outputs = []
      for i, vector in enumerate(x):
        position = start + i
        visible = []
        for key_position, key, value in past[index]:
          segments_back = block - key_position // size
          in_window = all(key_position > position - window for window in layer["windows"])
          if segments_back <= memory.memory_segments and key_position <= position and in_window:
            visible.append((key, value))
        outputs.append(
            _layer_output(vector, vector, visible + fam_pairs, position + offset, layer, config)
        )

      if full:  # the FAM sees itself and the whole block, not the memory segments
        positions = _fam_positions(config, length, block, offset)
        fam[index] = np.array([
            _layer_output(
                vector,
                np.zeros_like(vector) if updates == 0 else vector,
                fam_pairs + own,
                positions[j],
                layer,
                config,
            )
            for j, vector in enumerate(fam[index])
        ]).reshape(length, config.model_dim)
      x = outputs
    updates += full and length > 0
    logits.extend(_logits(vector, params, config) for vector in x)

  last_block = len(tokens) // size - 1
  fam_pairs = [
      _fam_pairs(fam[index], layer, config, last_block, offset)
      for index, layer in enumerate(layers)
  ]
  shape = (len(layers), length, _kv_heads(config), _head_dim(config))
  return Reading(
      logits=np.array(logits),
      keys=np.array([[key for _, key, _ in layer] for layer in past]),
      values=np.array([[value for _, _, value in layer] for layer in past]),
      fam=np.array(fam).reshape(len(layers), length, config.model_dim),
      fam_keys=np.array([[k for k, _ in p] for p in fam_pairs]).reshape(shape),
      fam_values=np.array([[v for _, v in p] for p in fam_pairs]).reshape(shape),
      fam_updates=int(updates),
  )


def dense_logits(params: Params, config, tokens, mask) -> np.ndarray:
  """Logits [S, V] of a model without a FAM by dense attention under `mask` [S, S] (query, key)."""
  d, half = _head_dim(config), _head_dim(config) // 2
  groups = config.num_heads // _kv_heads(config)
  turn = np.outer(np.arange(len(tokens)), config.rope_theta ** (-np.arange(half) / half))
  turn = np.exp(1j * turn)[:, None, :]  # [S, 1, d/2]

  def rotate(x):
    pairs = (x[..., :half] + 1j * x[..., half:]) * turn
    return np.concatenate([pairs.real, pairs.imag], -1)

  x = params["embedder"]["embedding"][np.asarray(tokens)]  # [S, D]
  for index in range(config.num_layers):
    layer = _layer(params["layers"], index, config)
    weights = {name: leaf["kernel"] for name, leaf in layer["attention"].items()}
    normed = _norm(x, layer["attention_norm"], config)
    query = rotate(np.einsum("SD,DHd->SHd", normed, weights["query"]))
    key = rotate(np.einsum("SD,DKd->SKd", normed, weights["key"])).repeat(groups, axis=1)
    value = np.einsum("SD,DKd->SKd", normed, weights["value"]).repeat(groups, axis=1)
    scores = np.einsum("qHd,kHd->Hqk", query, key) / np.sqrt(d)
    scores = np.exp(np.where(mask, scores, -np.inf))
    scores /= scores.sum(-1, keepdims=True)
    x = x + np.einsum("Hqk,kHd,HdD->qD", scores, value, weights["out"])
    x = x + _feedforward(
        _norm(x, layer["feedforward_norm"], config), layer["feedforward"], config
    )
  return _logits(x, params, config)


def block_mask(length: int, block_size: int, memory_segments: int, window=None) -> np.ndarray:
  """The BSWA mask [S, S]: query i of block t sees blocks t-M .. t-1 and its own up to itself."""
  query, key = np.arange(length)[:, None], np.arange(length)[None, :]
  mask = (key <= query) & (query // block_size - key // block_size <= memory_segments)
  return mask if window is None else mask & (query - key < window)


def causal_mask(length: int) -> np.ndarray:
  """The mask [S, S] of full causal attention."""
  return np.tril(np.ones((length, length), bool))


def _initial_fam(params, config, layers, length, offset) -> list[np.ndarray]:
  """Per layer the FAM [F, D] before block 0: a prefix, or the prompt carried up on its own."""
  if length == 0:
    return [np.zeros((0, config.model_dim)) for _ in layers]
  if config.memory.fam_init == "prefix":
    return list(params["fam_prefix"])
  entering, fam = _embedded(params["fam_prompt"], config), []
  positions = _fam_positions(config, length, -1, offset)
  for layer in layers:
    fam.append(entering)
    pairs = _fam_pairs(entering, layer, config, -1, offset)
    entering = np.array([
        _layer_output(vector, vector, pairs, positions[j], layer, config)
        for j, vector in enumerate(entering)
    ])
  return fam


def _fam_positions(config, length, block, offset) -> list[float]:
  """Positions of the F vectors of the FAM that `block` writes; block -1 is the initial FAM's."""
  end = (block + 1) * config.memory.block_size + offset  # the position after the block's last token
  match config.memory.fam_position:
    case "last":
      return [end - length + j for j in range(length)]
    case "float":
      return [end - 1 + (j + 1) / (length + 1) for j in range(length)]
    case "zero":
      return [0] * length
  raise ValueError(config.memory.fam_position)


def _fam_pairs(fam, layer, config, block, offset):
  """Keys and values of one layer's FAM, which `block` wrote."""
  pairs = []
  for vector, position in zip(fam, _fam_positions(config, len(fam), block, offset)):
    pairs.append(_key_and_value(vector, layer, position, config))
  return pairs


def _key_and_value(vector, layer, position, config):
  weights = layer["attention"]
  normed = _norm(vector, layer.get("attention_norm"), config)
  key = _norm(_project(normed, weights["key"]), weights.get("key_norm"), config)
  return _rotate(key, position, layer), _project(normed, weights["value"])


def _layer_output(vector, residual, pairs, position, layer, config):
  """One vector's way through a layer: attention over `pairs`, residual, feed-forward, residual."""
  weights = layer["attention"]
  normed = _norm(vector, layer.get("attention_norm"), config)
  query = _norm(_project(normed, weights["query"]), weights.get("query_norm"), config)
  query = _rotate(query, position, layer)  # [H, d]
  scale = config.query_scale or 1 / np.sqrt(_head_dim(config))
  attended = np.zeros_like(vector)
  for head in range(config.num_heads):
    shared = head // (config.num_heads // _kv_heads(config))
    scores = np.array([query[head] @ key[shared] * scale for key, _ in pairs])
    scores = _capped(scores, config.attention_cap)
    probabilities = np.exp(scores - scores.max())
    probabilities /= probabilities.sum()
    mixed = sum(p * value[shared] for p, (_, value) in zip(probabilities, pairs))
    attended += mixed @ weights["out"]["kernel"][head]
  a = _norm(attended, layer.get("attention_post_norm"), config) + residual
  fed = _norm(a, layer.get("feedforward_norm"), config)
  fed = _feedforward(fed, layer["feedforward"], config)
  return a + _norm(fed, layer.get("feedforward_post_norm"), config)


def _project(vector, weights):
  return np.tensordot(vector, weights["kernel"], 1) + weights.get("bias", 0)  # [D] -> [K, d]


def _rotate(x, position, layer):
  half = x.shape[-1] // 2
  angle = position * layer["frequencies"]
  first, second = x[..., :half], x[..., half:]
  return np.concatenate([
      first * np.cos(angle) - second * np.sin(angle),
      second * np.cos(angle) + first * np.sin(angle),
  ], -1)


def _frequencies(config, kind):
  """[d/2] angles per position of one kind of layer."""
  if kind == "nope":
    return np.zeros(_head_dim(config) // 2)
  local = kind == "local"
  theta = config.local_rope_theta if local and config.local_rope_theta else config.rope_theta
  factor = config.local_rope_factor if local else config.rope_factor
  stretch = config.local_rope_stretch if local else config.rope_stretch
  result = []
  for pair in range(_head_dim(config) // 2):
    frequency = theta ** (-2 * pair / _head_dim(config))
    if stretch is None:
      frequency /= factor
    else:  # Llama 3: by wavelength
      low, high, context = stretch
      wavelength = 2 * np.pi / frequency
      if wavelength > context / low:
        frequency /= factor
      elif wavelength >= context / high:
        smooth = (context / wavelength - low) / (high - low)
        frequency = (1 - smooth) * frequency / factor + smooth * frequency
    result.append(frequency)
  return np.array(result)


def _norm(x, weights, config):
  """Over all axes that the scale has; no weights: no norm."""
  if weights is None:
    return x
  axes = tuple(range(-weights["scale"].ndim, 0))
  if config.norm == "layer":
    x = x - x.mean(axes, keepdims=True)
  x = x / np.sqrt((x**2).mean(axes, keepdims=True) + config.norm_eps)
  scale = weights["scale"] + 1 if config.norm == "rms_plus_one" else weights["scale"]
  return x * scale + weights.get("bias", 0)


def _feedforward(x, weights, config):
  gate = x @ weights["gate"]["kernel"]
  if config.activation == "gelu":
    gate = gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3))) / 2
  else:
    gate = gate / (1 + np.exp(-gate))
  return (gate * (x @ weights["up"]["kernel"])) @ weights["down"]["kernel"]


def _embedded(x, config):
  return x * np.sqrt(config.model_dim) if config.scale_embeddings else x


def _capped(x, cap):
  return x if cap is None else cap * np.tanh(x / cap)


def _logits(x, params, config):
  normed = _norm(x, params["final_norm"], config)
  if config.tie_embeddings:
    return _capped(normed @ params["embedder"]["embedding"].T, config.logit_cap)
  return _capped(normed @ params["head"]["kernel"], config.logit_cap)


def _layer(stacked, index, config):
  """One layer's weights, its RoPE, and the windows of tokens that it sees through."""
  kind = config.layer_kinds[index] if config.layer_kinds else "global"
  windows = [config.memory.window, config.local_window if kind == "local" else None]
  return jax.tree.map(lambda leaf: leaf[index], stacked) | {
      "frequencies": _frequencies(config, kind),
      "windows": [window for window in windows if window is not None],
  }


def _head_dim(config) -> int:
  return config.head_dim or config.model_dim // config.num_heads


def _kv_heads(config) -> int:
  return config.num_kv_heads or config.num_heads
