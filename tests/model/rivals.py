"""The rival memories in NumPy float64, one row, token by token: what famjax/model/memories must be.

Written from the equations at the head of those files and of the papers they name, never from
their code. Each memory is a loop of its own: blocks, layers, tokens, heads. A vector's way through
a layer is `reference`'s, and so are the names of parameters; those that a memory adds are under
"memory" and, stacked over layers, "memory_layers". The penalties of "feedback" are not here.

All of them have M memory segments: tokens see the keys of the tokens of the last M blocks.
"""

import jax
import numpy as np

from tests.model import reference
from tests.model.reference import (
    _embedded, _feedforward, _fam_pairs, _fam_positions, _head_dim, _initial_fam, _key_and_value,
    _kv_heads, _layer, _layer_output, _logits, _norm, _project, _rotate,
)  # fmt: skip

Params = reference.Params
_SMALL = 1e-5  # added to what ARMT divides by, which may be 0


def read(params: Params, config, tokens) -> np.ndarray:
  """Logits `[S, V]` of one row.

  Args:
    params: nested float64 arrays, see `reference.to_numpy`.
    config: a ModelConfig whose memory is one of `_READERS`.
    tokens: `[S]` token ids.
  """
  x = [_embedded(params["embedder"]["embedding"][token], config) for token in tokens]
  out = _READERS[config.memory.kind](params, config, x)
  assert len(out) == len(tokens)
  return np.array([_logits(vector, params, config) for vector in out])


def _rmt(params, config, tokens):
  """y_t = decoder([m_t; x_t; m_t]), m_{t+1} = norm(y_t)[-P:]; places go on from block to block."""
  N, P = config.memory.block_size, config.memory.fam_length
  layers, segments = _layers(params, config), _Segments(config)
  m, out = _new_vectors(params, config), []
  for start in range(0, len(tokens), N):
    x = tokens[start : start + N]
    y = m + x + m
    places = _range(start - P, P) + _range(start, len(x)) + _range(start + N, P)
    for index, layer in enumerate(layers):
      y, pairs = _causal(y, places, layer, config, segments.of(index))
      segments.add(index, pairs[P : P + len(x)])
    out += y[P : P + len(x)]
    m = [_norm(vector, params["final_norm"], config) for vector in y[-P:]]  # unused if not full
  return out


def _autocompressors(params, config, tokens):
  """y_t = decoder([s_1 .. s_{t-1}; x_t; u]), s_t = norm(y_t)[-P:].

  All of s stand at the place before the block, all of u at the one behind it.
  """
  N, P = config.memory.block_size, config.memory.fam_length
  most = dict(config.memory.options).get("most", 30)
  layers, segments = _layers(params, config), _Segments(config)
  u, summaries, out = _new_vectors(params, config), [], []
  for start in range(0, len(tokens), N):
    x, s = tokens[start : start + N], sum(summaries[-most:], [])
    y = s + x + u
    places = [start - 1] * len(s) + _range(start, len(x)) + [start + N] * P
    for index, layer in enumerate(layers):
      y, pairs = _causal(y, places, layer, config, segments.of(index))
      segments.add(index, pairs[len(s) : len(s) + len(x)])
    out += y[len(s) : len(s) + len(x)]
    summaries.append([_norm(vector, params["final_norm"], config) for vector in y[-P:]])
  return out


def _infini(params, config, tokens):
  """A = sigmoid(b) s(Q) M / (s(Q) z) + (1 - sigmoid(b)) A_dot; a block is read, then written."""
  N, K, d = config.memory.block_size, _kv_heads(config), _head_dim(config)
  delta = dict(config.memory.options).get("update", "delta") == "delta"
  layers, segments = _layers(params, config), _Segments(config)
  own = _layer_weights(params, config)
  matrices, sums = np.zeros((len(layers), K, d, d)), np.zeros((len(layers), K, d))
  out = []
  for start in range(0, len(tokens), N):
    x = tokens[start : start + N]
    for index, layer in enumerate(layers):
      weights, gate = layer["attention"], 1 / (1 + np.exp(-own[index]["memory_gate"]))
      matrix, total = matrices[index], sums[index]
      pairs, plain_keys, y = list(segments.of(index)), [], []
      for i, vector in enumerate(x):
        pairs.append(_key_and_value(vector, layer, start + i, config))
        normed = _norm(vector, layer.get("attention_norm"), config)
        plain_keys.append(
            _norm(_project(normed, weights["key"]), weights.get("key_norm"), config)
        )
        query = _norm(_project(normed, weights["query"]), weights.get("query_norm"), config)
        rotated = _rotate(query, start + i, layer)
        attended = np.zeros_like(vector)
        for head in range(config.num_heads):
          shared = head // (config.num_heads // K)
          mixed = _softmax_mix(rotated[head], [(k[shared], v[shared]) for k, v in pairs], config)
          if start > 0:  # the first block finds nothing
            found = _features(query[head]) @ matrix[shared]
            found = found / (_features(query[head]) @ total[shared])
            mixed = gate[head] * found + (1 - gate[head]) * mixed
          attended += mixed @ weights["out"]["kernel"][head]
        y.append(_rest(attended, vector, layer, config))
      own_pairs = pairs[len(pairs) - len(x) :]
      segments.add(index, own_pairs)
      before_matrix, before_sum = matrix.copy(), total.copy()
      for key, (_, value) in zip(plain_keys, own_pairs):
        for head in range(K):
          feature, new = _features(key[head]), value[head]
          if delta and start > 0:
            new = new - feature @ before_matrix[head] / (feature @ before_sum[head])
          matrices[index, head] += np.outer(feature, new)
          sums[index, head] += feature
      x = y
    out += x
  return out


def _melodi(params, config, tokens):
  """short_t = Mix([x'; u']) + u' is seen as keys by the next block; u'' = Mix'([x'; u']) + u'."""
  N, S = config.memory.block_size, config.memory.fam_length
  layers, segments = _layers(params, config), _Segments(config)
  own, short, out = _layer_weights(params, config), [[] for _ in layers], []
  for start in range(0, len(tokens), N):
    x = tokens[start : start + N]
    n = len(x)
    x = x + _new_vectors(params, config)
    places = _range(start, n) + _range(start + N, S)
    for index, layer in enumerate(layers):
      seen = [
          _key_and_value(vector, layer, start - S + j, config)
          for j, vector in enumerate(short[index])
      ]
      x, pairs = _causal(x, places, layer, config, segments.of(index) + seen)
      segments.add(index, pairs[:n])
      if n == N:  # else no block follows, and nobody sees what the summaries became
        short[index] = _mixed(x, own[index]["keep"], config, S)
        x = x[:N] + _mixed(x, own[index]["hand_on"], config, S)
    out += x[:n]
  return out


def _armt(params, config, tokens):
  """x + A phi(W_q x) / (z . phi(W_q x)) goes through the layer; what became of the P is written."""
  N, P = config.memory.block_size, config.memory.fam_length
  layers, segments = _layers(params, config), _Segments(config)
  own = _layer_weights(params, config)
  size = 6 * own[0]["key"].shape[1]
  matrices = [np.zeros((config.model_dim, size)) for _ in layers]
  sums, out = [np.zeros(size) for _ in layers], []

  for start in range(0, len(tokens), N):
    x = tokens[start : start + N]
    n = len(x)
    x = x + _new_vectors(params, config)
    places = _range(start, n) + _range(start + N, P)
    for index, layer in enumerate(layers):
      matrix, total, mine = matrices[index], sums[index], own[index]
      for i, vector in enumerate(x):
        phi = _dpfp(vector @ mine["query"])
        x[i] = vector + matrix @ phi / (total @ phi + _SMALL)
      x, pairs = _causal(x, places, layer, config, segments.of(index))
      segments.add(index, pairs[:n])
      matrices[index], sums[index] = matrix.copy(), total.copy()
      for m in x[n:]:  # all of them find what was there before the block
        phi = _dpfp(m @ mine["key"])
        there = matrix @ phi / (total @ phi + _SMALL)
        beta = 1 / (1 + np.exp(-m @ mine["beta"]))
        gamma = min(max(1 - total @ phi / (phi @ phi + _SMALL), 0), 1)
        matrices[index] += beta * np.outer(m @ mine["value"] - there, phi)
        sums[index] += gamma * phi
    out += x[:n]
  return out


def _feedback_segments(params, config, tokens):
  """The queries of a block see the keys of what the layer gave for the last M blocks."""
  N = config.memory.block_size
  layers, segments, out = _layers(params, config), _Segments(config), []
  for start in range(0, len(tokens), N):
    x = tokens[start : start + N]
    for index, layer in enumerate(layers):
      x, _ = _causal(x, _range(start, len(x)), layer, config, segments.of(index))
      segments.add(
          index, [_key_and_value(y, layer, start + i, config) for i, y in enumerate(x)]
      )
    out += x
  return out


def _feedback(params, config, tokens):
  """Algorithm 2; tokens see `previous` FAMs; `static`: queries and residual of the initial FAM."""
  N, F = config.memory.block_size, config.memory.fam_length
  options = dict(config.memory.options)
  previous, static = options.get("previous", 1), options.get("static", False)
  layers, segments = _layers(params, config), _Segments(config)
  initial = _initial_fam(params["memory"], config, layers, F, 0)
  fams, out = [[fam] for fam in initial], []  # of each layer, that of block t is fams[t + 1]
  for block, start in enumerate(range(0, len(tokens), N)):
    x = tokens[start : start + N]
    for index, layer in enumerate(layers):
      seen = []
      for of in range(max(block - previous, -1), block):
        seen += _fam_pairs(fams[index][of + 1], layer, config, of, 0)
      y, own = _causal(x, _range(start, len(x)), layer, config, segments.of(index) + seen)
      segments.add(index, own)
      before = fams[index][block]
      pairs, new = _fam_pairs(before, layer, config, block - 1, 0) + own, []
      for j, position in enumerate(_fam_positions(config, F, block, 0)):
        if static:
          vector = residual = initial[index][j]
        else:
          vector, residual = before[j], before[j] if block else np.zeros_like(before[j])
        new.append(_layer_output(vector, residual, pairs, position, layer, config))
      fams[index].append(np.array(new))  # if the block is not full, no block follows
      x = y
    out += x
  return out


_READERS = {
    "rmt": _rmt,
    "autocompressors": _autocompressors,
    "infini": _infini,
    "melodi": _melodi,
    "armt": _armt,
    "feedback_segments": _feedback_segments,
    "feedback": _feedback,
}


class _Segments:
  """The keys and values of tokens of earlier blocks, of each layer."""

  def __init__(self, config):
    self._most = config.memory.memory_segments
    self._blocks = [[] for _ in range(config.num_layers)]

  def of(self, layer):
    """Those of the last M blocks."""
    blocks = self._blocks[layer]
    return sum(blocks[max(len(blocks) - self._most, 0) :], [])

  def add(self, layer, pairs):
    self._blocks[layer].append(list(pairs))


def _range(start, count):
  return list(range(start, start + count))


def _layers(params, config):
  return [_layer(params["layers"], index, config) for index in range(config.num_layers)]


def _layer_weights(params, config):
  """What the memory adds to each layer."""
  part = lambda index: jax.tree.map(lambda leaf: leaf[index], params["memory_layers"])
  return [part(index) for index in range(config.num_layers)]


def _new_vectors(params, config):
  """The learned vectors that stand in a block, scaled as embeddings."""
  return [_embedded(vector, config) for vector in params["memory"]["tokens"]]


def _causal(x, places, layer, config, others):
  """A layer's outputs, vector i seeing `others` and vectors 0 to i; and all keys and values."""
  pairs = [_key_and_value(vector, layer, place, config) for vector, place in zip(x, places)]
  out = []
  for i, vector in enumerate(x):
    out.append(_layer_output(vector, vector, others + pairs[: i + 1], places[i], layer, config))
  return out, pairs


def _softmax_mix(query, pairs, config):
  """One head's attention `[d]`."""
  scale, cap = config.query_scale or 1 / np.sqrt(len(query)), config.attention_cap
  scores = np.array([query @ key * scale for key, _ in pairs])
  scores = scores if cap is None else cap * np.tanh(scores / cap)
  weights = np.exp(scores - scores.max())
  return sum(w * value for w, (_, value) in zip(weights / weights.sum(), pairs))


def _rest(attended, residual, layer, config):
  """A layer after its attention: residual, feed-forward, residual."""
  a = _norm(attended, layer.get("attention_post_norm"), config) + residual
  fed = _feedforward(_norm(a, layer.get("feedforward_norm"), config), layer["feedforward"], config)
  return a + _norm(fed, layer.get("feedforward_post_norm"), config)


def _features(x):
  """elu(x) + 1."""
  return np.where(x > 0, x + 1, np.exp(np.minimum(x, 0)))


def _dpfp(x):
  """DPFP-3: products of [relu(x); relu(-x)] with itself turned by 1, 2 and 3 places."""
  y = [max(value, 0) for value in (*x, *-x)]
  return np.array([y[i] * y[(i - turn) % len(y)] for turn in (1, 2, 3) for i in range(len(y))])


def _mixed(x, weights, config, count):
  """Mix([x'; u']) + u'."""
  normed, result = [_norm(vector, weights["norm"], config) for vector in x], []
  for j in range(count):
    mix = sum(weights["kernel"][i, j] * vector for i, vector in enumerate(normed))
    result.append(mix + x[len(x) - count + j])
  return result
