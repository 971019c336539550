"""Small random models for the property tests, and how the tests run and compare them.

Compiling dominates on a CPU. So the tests draw shapes from the lists below (which mix block sizes,
memories, head groupings, norms and positions) and everything else freely: weights, tokens, cuts,
lengths, offsets. A config needs few programs: calls of `width` aligned tokens, pieces of `piece`
tokens that stand anywhere, and single tokens; `lengths` makes all other sizes of them.
"""

import functools

from flax import nnx
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np

from famjax.model.config import MemoryConfig, ModelConfig
from famjax.model.decoder import Decoder
from famjax.model.state import empty_state
from tests.model import reference

VOCAB = 11
BATCH = 2
# float32 against float64, or against float32 in another order of summation. Differences come from
# rounding alone: 2e-6 at the median and 3e-5 at most, over 360 models drawn as below, in logits of
# size 1 to 10 after up to 3 layers and 3 FAM updates. Rounding the weights does as much.
TOLERANCE = dict(rtol=1e-4, atol=2e-4)


class On:
  """A placement that knows no more than its platform, and whether devices share its layers."""

  def __init__(self, platform, split=False):
    self.platform, self._split = platform, split

  def is_split(self, axes, shape):
    del axes, shape
    return self._split


def _config(kind, block_size, memory_segments, fam_length, layers, heads, dim=8, **options):
  names = ("fam_init", "fam_position", "stop_gradient", "window")
  memory = {name: options.pop(name) for name in names if name in options}
  memory = MemoryConfig(
      kind=kind,
      block_size=block_size,
      memory_segments=memory_segments,
      fam_length=fam_length,
      **memory,
  )
  num_heads, num_kv_heads = heads
  return ModelConfig(
      vocab_size=VOCAB,
      num_layers=layers,
      model_dim=dim,
      num_heads=num_heads,
      num_kv_heads=num_kv_heads,
      ff_dim=12,
      memory=memory,
      **options,
  )


bswa = functools.partial(_config, "bswa")
fam = functools.partial(_config, "fam")

# block size, memory segments, FAM length, layers, (query heads, key/value heads)
BSWA = [
    bswa(4, 1, 0, 2, (2, 2)),
    bswa(1, 2, 0, 3, (2, 1)),
    bswa(3, 0, 0, 2, (4, 2), dim=16, norm="layer", tie_embeddings=False),
    bswa(2, 3, 0, 3, (2, 1), head_dim=6, rope_theta=100.0),
    bswa(5, 2, 0, 2, (2, 2), window=4),
    bswa(6, 1, 0, 1, (4, 1), dim=16),
]
TOGETHER = {"feedback_order": "with_tokens"}
FAM = [
    fam(4, 1, 2, 2, (2, 2)),
    fam(3, 2, 3, 3, (4, 2), dim=16, norm="layer", tie_embeddings=False, **TOGETHER),
    fam(1, 0, 1, 2, (2, 1), head_dim=6, feedback_unroll=2),
    fam(2, 3, 1, 3, (2, 2), fam_position="float"),
    fam(4, 0, 3, 2, (4, 1), dim=16, fam_position="zero", rope_theta=100.0, **TOGETHER),
    fam(5, 1, 2, 2, (2, 1), window=3, **TOGETHER),
    fam(6, 2, 3, 1, (2, 2), fam_init="prefix", tie_embeddings=False, feedback_unroll=99),
    fam(3, 1, 2, 3, (2, 1), fam_init="prefix", fam_position="float", norm="layer", window=5),
]
# What families of open decoders differ in, with a FAM that goes through all of it.
FAMILIES = {
    "Qwen 3 with a bias, and RoPE as in Llama 3": fam(
        3, 1, 2, 2, (4, 2), dim=16, head_dim=6, qkv_bias=True, qk_norm="head", rope_factor=4.0,
        rope_stretch=(1.0, 4.0, 20.0),
    ),
    "Gemma 2": fam(
        4, 1, 2, 3, (2, 1), head_dim=6, norm="rms_plus_one", norm_place="both", activation="gelu",
        scale_embeddings=True, query_scale=0.3, attention_cap=1.5, logit_cap=2.0,
        layer_kinds=("local", "global", "local"), local_window=3, rope_factor=3.0,
        local_rope_factor=4.0, local_rope_stretch=(1.0, 4.0, 20.0),
    ),
    "Gemma 3": fam(
        3, 2, 3, 3, (2, 2), norm="rms_plus_one", norm_place="both", qk_norm="head", activation="gelu",
        scale_embeddings=True, rope_theta=1e6, rope_factor=8.0, local_rope_theta=100.0,
        layer_kinds=("local", "local", "global"), local_window=5,
    ),
    "OLMo 2 without RoPE in a layer": fam(
        4, 1, 2, 2, (4, 2), dim=16, norm_place="after", qk_norm="width", tie_embeddings=False,
        layer_kinds=("global", "nope"), fam_init="prefix",
    ),
}  # fmt: skip


def width(config) -> int:
  """Tokens in the tests' longest call: three blocks and a rest."""
  size = config.memory.block_size
  return 3 * size + max(size // 2, 1)


def piece(config) -> int:
  """Tokens in a padded piece: more than a block, so that it crosses boundaries from any place."""
  return config.memory.block_size + 1


ALL = FAM + BSWA
FEW = [FAM[0], FAM[1], FAM[7], BSWA[0]]  # for tests that need programs of their own
configs = st.sampled_from(ALL)
fam_configs = st.sampled_from(FAM)
bswa_configs = st.sampled_from(BSWA)
seeds = st.integers(0, 2**16)


@functools.lru_cache(maxsize=None)
def abstract(config):
  """(graphdef, abstract parameters) of a Decoder, without computing a weight."""
  return nnx.split(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))


def random_params(config, seed):
  """Weights far from their initial values: every scale and bias counts, and attention is peaked."""
  rng = np.random.default_rng(seed)

  def draw(path, leaf):
    name = jax.tree_util.keystr(path)
    noise = rng.standard_normal(leaf.shape)
    if "scale" in name:
      noise = 1 + 0.3 * noise
    elif "bias" in name:
      noise = 0.3 * noise
    elif "kernel" in name:
      gain = 1.3 if "query" in name or "key" in name else 0.7
      noise = gain * noise / np.sqrt(config.model_dim)
    return jnp.asarray(noise, leaf.dtype)

  return jax.tree_util.tree_map_with_path(draw, abstract(config)[1])


def model(config, params) -> Decoder:
  return nnx.merge(abstract(config)[0], params)


# Without optimisation: the programs run for microseconds, and compile in half of the time.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


@functools.partial(jax.jit, static_argnames=("config", "aligned", "within"), compiler_options=QUICK)
def call(config, params, tokens, state, start_of_sequence, lengths, aligned=False, within=False):
  """One compiled `Decoder.__call__`."""
  return model(config, params)(
      tokens, state, start_of_sequence=start_of_sequence, lengths=lengths,
      aligned=aligned, within_block=within,
  )  # fmt: skip


@functools.partial(jax.jit, static_argnames=("config",), compiler_options=QUICK)
def init_state(config, params):
  return model(config, params).init_state(BATCH)


class Stream:
  """Rows fed in pieces: keeps the state and, for each row, the logits of its real tokens."""

  def __init__(self, config, params, state=None):
    self.config, self.params, self.state = config, params, state
    self._logits = [[np.zeros((0, config.vocab_size))] for _ in range(BATCH)]
    if state is None:
      self.state = empty_state(config, BATCH)
      nothing = np.zeros((BATCH, piece(config)), int)
      self.feed(nothing, lengths=[0] * BATCH, start=[True] * BATCH)

  def feed(self, tokens, lengths=None, start=None, aligned=False, within=False):
    """Feeds tokens [B, S]; a row that starts forgets the logits it had. Returns logits [B, S, V].

    `start_of_sequence` and `lengths` are always given, to save programs; single tokens go
    without, as in decoding.
    """
    tokens = jnp.asarray(tokens, jnp.int32)
    count = tokens.shape[1]
    decode = count == 1 and start is None and lengths is None
    lengths = [count] * BATCH if lengths is None else [int(length) for length in lengths]
    start = [False] * BATCH if start is None else [bool(flag) for flag in start]
    logits, self.state = call(
        self.config,
        self.params,
        tokens,
        self.state,
        None if decode else jnp.array(start),
        None if decode else jnp.array(lengths, jnp.int32),
        aligned=aligned,
        within=within,
    )
    logits = np.asarray(logits)
    for row in range(BATCH):
      if start[row]:
        self._logits[row] = []
      self._logits[row].append(logits[row, : lengths[row]])
    return logits

  def logits(self, row):
    """[tokens read since the row's start, V]."""
    return np.concatenate(self._logits[row])


def draw_tokens(rng, *shape):
  return rng.integers(0, VOCAB, shape)


def live(config, state, row) -> dict[str, np.ndarray]:
  """Every field of one row's state; of the ring only what a later query can see, oldest first."""
  position, size = int(state.position[row]), config.memory.block_size
  blocks = config.memory.memory_segments + 1
  oldest = max(position // size - config.memory.memory_segments, 0) * size
  places = np.arange(oldest, position)
  per_row = ("position", "offset", "fam_updates")
  fields = {name: np.asarray(getattr(state, name)[row]) for name in per_row}
  fields["fam"] = np.asarray(state.fam[:, row])
  for name in ("fam_keys", "fam_values"):
    fields[name] = np.asarray(getattr(state, name)[:, row]).swapaxes(1, 2)  # [L, F, K, d]
  for name in ("keys", "values"):
    ring = np.moveaxis(np.asarray(getattr(state, name)[:, row]), 1, 3)  # [L, M+1, N, K, d]
    assert ring.shape[1:3] == (blocks, size)
    fields[name] = ring[:, places // size % blocks, places % size]  # [L, tokens, K, d]
  return fields


def assert_same_row(config, state, row, other, other_row, exact=False):
  """Every field of a row's state is the same in two states."""
  left, right = live(config, state, row), live(config, other, other_row)
  for name, value in left.items():
    if exact or value.dtype.kind == "i":
      np.testing.assert_array_equal(value, right[name], err_msg=name)
    else:
      np.testing.assert_allclose(value, right[name], err_msg=name, **TOLERANCE)


def assert_equals_reference(config, stream, row, reading, tolerance=TOLERANCE):
  """Logits and state of a row of a stream equal what the reference read."""
  np.testing.assert_allclose(stream.logits(row), reading.logits, **tolerance)
  fields = live(config, stream.state, row)
  count = fields["keys"].shape[1]
  position = fields["position"]
  assert position == len(reading.logits)
  assert config.memory.kind == "bswa" or fields["fam_updates"] == reading.fam_updates
  for name in ("keys", "values"):
    expected = getattr(reading, name)[:, position - count :]
    np.testing.assert_allclose(fields[name], expected, err_msg=name, **tolerance)
  for name in ("fam", "fam_keys", "fam_values"):
    np.testing.assert_allclose(fields[name], getattr(reading, name), err_msg=name, **tolerance)


def read(config, params, tokens, **options) -> reference.Reading:
  """The reference's reading of one row."""
  return reference.read(reference.to_numpy(params), config, tokens, **options)
