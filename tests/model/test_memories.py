"""The rival memories equal a slow reference, and keep the properties of SPEC section 3.

As in the other tests of the model compiling dominates: of each configuration there are few
programs, calls of `cases.width` aligned tokens, of `cases.piece` tokens anywhere, and of single
tokens.
"""

import dataclasses
import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from famjax.errors import UserError
from famjax.model.config import MemoryConfig, ModelConfig
from famjax.model.state import num_bytes
from tests.model import cases, reference, rivals
from tests.model.cases import BATCH, VOCAB, Stream


def rival(
    kind, block_size=4, memory_segments=0, length=2, heads=(2, 2), dim=8, options=(), **others
):  # fmt: skip
  memory = MemoryConfig(
      kind, block_size=block_size, memory_segments=memory_segments, fam_length=length,
      options=options,
  )  # fmt: skip
  return ModelConfig(
      vocab_size=VOCAB, num_layers=2, model_dim=dim, num_heads=heads[0], num_kv_heads=heads[1],
      ff_dim=12, memory=memory, **others,
  )  # fmt: skip


# Through two layers a memory segment shows the two blocks before; the tests look three blocks back.
KINDS = {
    "rmt": rival("rmt", scale_embeddings=True, norm="layer"),
    "autocompressors": rival("autocompressors", heads=(4, 2), dim=16, options={"most": 2}),
    "infini linear": rival("infini", heads=(4, 2), dim=16, options={"update": "linear"}),
    "infini delta": rival("infini", 5, 1, heads=(2, 1), tie_embeddings=False, query_scale=0.3),
    "melodi": rival("melodi", 5, length=3, norm="layer", tie_embeddings=False),
    "armt": rival("armt", heads=(2, 1), options={"width": 3}),
    "feedback_segments": rival("feedback_segments", 4, 1, heads=(2, 1)),
    "feedback": rival("feedback", 4, 1, heads=(2, 1)),
    "feedback previous": rival("feedback", length=3, options={"previous": 2}),
    "feedback static": rival("feedback", heads=(4, 2), dim=16, options={"static": True}),
}
# What else changes what is computed.
MORE = {
    "rmt with a segment": rival("rmt", 4, 1, 1, tie_embeddings=False),
    "autocompressors that keep all": rival("autocompressors", length=1, norm_place="both"),
    "infini in a Gemma": rival(
        "infini", 4, 2, heads=(4, 2), dim=16, head_dim=6, norm="rms_plus_one", norm_place="both",
        qk_norm="head", activation="gelu", scale_embeddings=True, attention_cap=1.5, logit_cap=5.0,
    ),
    "melodi, its summaries scaled": rival("melodi", length=1, scale_embeddings=True),
    "armt with a segment": rival("armt", 4, 1, options={"width": 2}, scale_embeddings=True),
    "feedback_segments of two": rival("feedback_segments", 4, 2, qk_norm="width", qkv_bias=True),
    "feedback in a Gemma": rival(
        "feedback", heads=(4, 2), dim=16, norm="rms_plus_one", norm_place="both",
        scale_embeddings=True, attention_cap=1.5, options={"previous": 3},
    ),
}  # fmt: skip
every_kind = pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)


@functools.lru_cache(maxsize=None)
def random_params(config, seed=1):
  """`cases.random_params`, the matrices of ARMT as large as others: none is 0."""

  def scale(path, leaf):
    name = jax.tree_util.keystr(path)
    if "memory_layers" in name and config.memory.kind == "armt":
      return leaf * (2 * config.model_dim) ** -0.5
    return leaf

  return jax.tree_util.tree_map_with_path(scale, cases.random_params(config, seed))


def with_leaves(config, params):
  """The parameters of a Decoder of `config`, each by its path from nested dicts."""

  def find(path, leaf):
    found = params
    for key in path:
      name = getattr(key, "key", getattr(key, "name", None))
      found = found[name] if isinstance(found, dict) else found
    assert found.shape == leaf.shape
    return jnp.asarray(found, leaf.dtype)

  return jax.tree_util.tree_map_with_path(find, cases.abstract(config)[1])


def draw(config, seed=1):
  return cases.draw_tokens(np.random.default_rng(seed), BATCH, cases.width(config))


def at_once(config, tokens, lengths=None):
  stream = Stream(config, random_params(config))
  stream.feed(tokens, lengths=lengths, aligned=True)
  return stream


def feed_cut(stream, tokens, cuts, rng):
  """Feeds tokens `[B, S]`; `cuts` of each row are where its pieces end. Padding is garbage."""
  done, most = [0] * BATCH, cases.piece(stream.config)
  for ends in zip(*cuts):
    piece = cases.draw_tokens(rng, BATCH, most)
    for row, end in enumerate(ends):
      piece[row, : end - done[row]] = tokens[row, done[row] : end]
    stream.feed(piece, lengths=[end - begin for begin, end in zip(done, ends)])
    done = ends


def remembered(state):
  """All that a later call reads: everything but the penalty of the last call."""
  return state.replace(penalty=jnp.zeros(BATCH))


def of_row(state, row):
  """What one row remembers, as a list of arrays."""
  of_layers = jax.tree.leaves((state.memory["layers"], state.segments))
  of_model = jax.tree.leaves(state.memory["model"])
  rest = state.position, state.tokens, state.fam_updates
  of_layers = [np.asarray(x[:, row]) for x in of_layers]
  return of_layers + [np.asarray(x[row]) for x in (*of_model, *rest)]


def assert_same_state(left, right):
  compare = functools.partial(np.testing.assert_allclose, **cases.TOLERANCE)
  jax.tree.map(compare, remembered(left), remembered(right))


def assert_same(left, right):
  for row in range(BATCH):
    np.testing.assert_allclose(left.logits(row), right.logits(row), **cases.TOLERANCE)
  assert_same_state(left.state, right.state)


def assert_equals_reference(config, logits, tokens):
  params = reference.to_numpy(random_params(config))
  for row in range(BATCH):
    expected = rivals.read(params, config, tokens[row])
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(logits[row], expected, rtol=0, atol=2e-4)


@every_kind
def test_equals_the_reference(config):
  """Three blocks and an unfinished one, aligned from a fresh state."""
  tokens = draw(config)
  stream = at_once(config, tokens)
  assert_equals_reference(config, [stream.logits(row) for row in range(BATCH)], tokens)


@pytest.mark.parametrize("config", MORE.values(), ids=MORE)
def test_equals_the_reference_in_other_models(config):
  """As above, without a state."""
  tokens = draw(config)
  call = cases.call(config, random_params(config), jnp.asarray(tokens, jnp.int32), None, None, None)
  assert_equals_reference(config, np.asarray(call[0]), tokens)


@every_kind
def test_causal_and_remembers(config):
  """A token changes no logit before it, and some of every block from the one after the next on."""
  tokens, size = draw(config), config.memory.block_size
  before = at_once(config, tokens)
  for j in (0, size - 1, size, 2 * size - 1, 2 * size, 3 * size):
    changed = tokens.copy()
    changed[:, j] = (changed[:, j] + 3) % VOCAB
    after = at_once(config, changed)
    for row in range(BATCH):
      difference = np.abs(before.logits(row) - after.logits(row)).max(-1)
      np.testing.assert_array_equal(difference[:j], 0)
      assert difference[j] > 1e-3
      for block in range(j // size + 2, 4):
        assert difference[block * size :].max() > 1e-3, f"token {j} and block {block}"


@every_kind
def test_any_cut_is_the_same(config):
  """Uneven pieces, other ones in each row and some of them empty; and single tokens."""
  tokens, rng = draw(config), np.random.default_rng(2)
  whole, params = at_once(config, tokens), random_params(config)
  length, most = tokens.shape[1], cases.piece(config)
  cuts = []
  for _ in range(BATCH):
    ends = [0]
    while ends[-1] < length:
      ends.append(min(ends[-1] + rng.integers(0, most + 1), length))
    cuts.append(ends)
  longest = max(map(len, cuts))
  cuts = [ends + [length] * (longest - len(ends)) for ends in cuts]
  pieces, singles = Stream(config, params), Stream(config, params)
  feed_cut(pieces, tokens, cuts, rng)
  for place in range(length):
    singles.feed(tokens[:, place : place + 1])
  assert_same(pieces, whole)
  assert_same(singles, whole)


@every_kind
def test_rows_do_not_leak(config):
  """Whatever the neighbour reads, and whether it starts, changes no bit of a row."""
  params, rng = random_params(config), np.random.default_rng(3)
  mine, other = Stream(config, params), Stream(config, params)
  most = cases.piece(config)
  for starts in (False, False, True):
    tokens = cases.draw_tokens(rng, BATCH, most)
    beside = tokens.copy()
    beside[1] = (beside[1] + 1) % VOCAB
    mine.feed(tokens)
    other.feed(beside, lengths=[most, most - 2], start=[False, starts])
  np.testing.assert_array_equal(mine.logits(0), other.logits(0))
  for left, right in zip(of_row(mine.state, 0), of_row(other.state, 0)):
    np.testing.assert_array_equal(left, right)
  assert not np.array_equal(mine.logits(1)[-1], other.logits(1)[-1])


@every_kind
def test_a_row_that_starts_is_as_new(config):
  """One row starts in the middle of a block, after two, and the other goes on."""
  params, most, size = random_params(config), cases.piece(config), config.memory.block_size
  tokens = draw(config)
  past = cases.draw_tokens(np.random.default_rng(4), BATCH, cases.width(config))
  stream, fresh = Stream(config, params), Stream(config, params)
  stream.feed(past, lengths=[2 * size + 1] * BATCH, aligned=True)
  went_on = Stream(config, params, state=stream.state)
  for begin in range(0, 2 * most, most):
    piece, first = tokens[:, begin : begin + most], begin == 0
    mixed = stream.feed(piece, start=[first, False])
    np.testing.assert_array_equal(mixed[0], fresh.feed(piece)[0])
    np.testing.assert_array_equal(mixed[1], went_on.feed(piece)[1])
  for row, other in ((0, fresh), (1, went_on)):  # two blocks since: no segment of before is left
    for left, right in zip(of_row(stream.state, row), of_row(other.state, row)):
      np.testing.assert_array_equal(left, right)


@every_kind
def test_state_does_not_grow(config):
  """After 40 blocks it has as many bytes as after two, and what it says is finite."""
  stream, size = Stream(config, random_params(config)), config.memory.block_size
  tokens = draw(config)
  stream.feed(tokens, lengths=[2 * size] * BATCH, aligned=True)
  after_two = num_bytes(stream.state)
  for _ in range(13):
    logits = stream.feed(tokens, lengths=[3 * size] * BATCH, aligned=True)
  assert stream.state.position[0] == 41 * size and num_bytes(stream.state) == after_two
  assert np.isfinite(logits).all()


@every_kind
def test_padding_reaches_nothing(config):
  """Other garbage behind `lengths` changes no bit."""
  tokens, size = draw(config), config.memory.block_size
  garbage = (tokens + 5) % VOCAB
  params = random_params(config)
  for width, calls, aligned in ((cases.width(config), 1, True), (cases.piece(config), 3, False)):
    left, right = Stream(config, params), Stream(config, params)
    for _ in range(calls):
      lengths = [size - 1, min(width - 1, 2 * size + 1)]
      kept = np.arange(width) < np.array(lengths)[:, None]
      mine, other = tokens[:, :width], garbage[:, :width]
      left.feed(mine, lengths=lengths, aligned=aligned)
      right.feed(np.where(kept, mine, other), lengths=lengths, aligned=aligned)
    for row in range(BATCH):
      np.testing.assert_array_equal(left.logits(row), right.logits(row))
    jax.tree.map(np.testing.assert_array_equal, left.state, right.state)


@every_kind
def test_an_unfinished_block_does_not_write(config):
  """The memory waits for the last token of a block."""
  tokens, size, params = draw(config), config.memory.block_size, random_params(config)
  stream = Stream(config, params)
  stream.feed(tokens, lengths=[size] * BATCH, aligned=True)
  waiting = stream.state
  for place in range(size, 2 * size - 1):
    stream.feed(tokens[:, place : place + 1])
    for name in ("memory", "segments", "fam_updates"):
      left, right = getattr(stream.state, name), getattr(waiting, name)
      jax.tree.map(np.testing.assert_array_equal, left, right)
  stream.feed(tokens[:, 2 * size - 1 : 2 * size])
  np.testing.assert_array_equal(stream.state.fam_updates, 2)
  change = lambda left, right: np.abs(np.asarray(left - right)).max(initial=0)
  changes = jax.tree.map(change, stream.state.memory, waiting.memory)
  changes = jax.tree.leaves((changes, change(stream.state.segments.keys, waiting.segments.keys)))
  assert max(changes) > 1e-3
  assert_same_state(stream.state, at_once(config, tokens, lengths=[2 * size] * BATCH).state)


@functools.partial(jax.jit, static_argnames=("config",), compiler_options=cases.QUICK)
def gradient(config, params, tokens, weights):
  """Logits, and the gradient of sum(weights * logits), a row of tokens being read at once."""

  def loss(params):
    logits, _ = cases.model(config, params)(tokens)
    return (weights * logits).sum(), logits

  grads, logits = jax.grad(loss, has_aux=True)(params)
  return logits, grads


def test_feedback_is_the_fam_of_the_decoder():
  """Without options: the logits, and the gradient of the prompt."""
  config = KINDS["feedback"]
  memory = dataclasses.replace(config.memory, kind="fam")
  built_in = dataclasses.replace(config, memory=memory)
  params = random_params(config)
  other = nnx.to_pure_dict(params)
  other["fam_prompt"] = other.pop("memory")["fam_prompt"]
  tokens = jnp.asarray(draw(config), jnp.int32)
  weights = np.random.default_rng(5).standard_normal((*tokens.shape, VOCAB)).astype(np.float32)
  logits, grads = gradient(config, params, tokens, weights)
  expected, expected_grads = gradient(built_in, with_leaves(built_in, other), tokens, weights)
  np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4)
  grads = nnx.to_pure_dict(grads)["memory"]["fam_prompt"]
  expected = np.asarray(nnx.to_pure_dict(expected_grads)["fam_prompt"])
  assert np.abs(expected).min() > 1e-4
  np.testing.assert_allclose(grads, expected, rtol=1e-3, atol=1e-3 * np.abs(expected).mean())


def test_infini_reads_before_it_writes():
  """The first block is BSWA's; with gates open, no token sees another one of its block."""
  config, size = KINDS["infini linear"], KINDS["infini linear"].memory.block_size
  bswa = dataclasses.replace(
      config, memory=MemoryConfig("bswa", block_size=size, memory_segments=0, fam_length=0)
  )
  params, tokens = random_params(config), draw(config)
  others = nnx.to_pure_dict(params)
  gates = others.pop("memory_layers")["memory_gate"]
  assert np.abs(gates).min() > 1e-3
  plain = Stream(bswa, with_leaves(bswa, others))
  plain.feed(tokens, aligned=True)
  logits, expected = at_once(config, tokens).logits(0), plain.logits(0)
  np.testing.assert_allclose(logits[:size], expected[:size], **cases.TOLERANCE)
  assert np.abs(logits[size:] - expected[size:]).max(-1).min() > 1e-3

  opened = with_leaves(config, {**others, "memory_layers": {"memory_gate": gates * 0 + 40}})
  changed = tokens.copy()
  changed[:, size : size + 2] = (changed[:, size : size + 2] + 3) % VOCAB
  left, right = Stream(config, opened), Stream(config, opened)
  left.feed(tokens, aligned=True)
  right.feed(changed, aligned=True)
  difference = np.abs(left.logits(0) - right.logits(0)).max(-1)
  np.testing.assert_allclose(difference[size + 2 : 2 * size], 0, atol=1e-5)
  assert difference[2 * size :].min() > 1e-3


@pytest.mark.parametrize("name", ["infini linear", "infini delta"])
def test_infini_holds_keys_without_rope(name):
  """A row that stands elsewhere has the same memory, and other keys in its segments."""
  config = KINDS[name]
  params, tokens, size = random_params(config), draw(config), config.memory.block_size
  here, there = Stream(config, params), Stream(config, params)
  there.state = there.state.replace(offset=jnp.array([7, 1234], jnp.int32))
  for stream in (here, there):
    stream.feed(tokens, lengths=[2 * size] * BATCH, aligned=True)
  compare = functools.partial(np.testing.assert_allclose, **cases.TOLERANCE)
  jax.tree.map(compare, here.state.memory, there.state.memory)
  compare(here.logits(1), there.logits(1))
  if config.memory.memory_segments:
    assert np.abs(np.asarray(here.state.segments.keys - there.state.segments.keys)).max() > 0.1


def reached(config, block):
  """Which tokens' embeddings, and whether the memory's vectors, get gradient from a block's logits.

  Every place has an embedding of its own: places 0 to 10, in blocks of 4.
  """
  params, tokens = random_params(config), jnp.arange(VOCAB)[None]
  weights = np.random.default_rng(6).standard_normal((1, VOCAB, VOCAB)).astype(np.float32)
  weights *= (np.arange(VOCAB) // 4 == block)[None, :, None]
  grads = nnx.to_pure_dict(gradient(config, params, tokens, weights)[1])
  rows = np.abs(np.asarray(grads["embedder"]["embedding"])).max(-1) > 1e-7
  return rows, np.abs(np.asarray(grads["memory"]["tokens"])).max() > 1e-7


@pytest.mark.parametrize("truncate", [0, 1, 2])
def test_truncate_cuts_the_gradient_through_memory(truncate):
  """After so many blocks, again and again."""
  config = rival("rmt", tie_embeddings=False, options={"truncate": truncate})
  blocks = np.arange(VOCAB) // 4
  for block in range(3):
    first = block // truncate * truncate if truncate else 0
    rows, _ = reached(config, block)
    np.testing.assert_array_equal(rows, (blocks >= first) & (blocks <= block))


@pytest.mark.parametrize("truncate", [0, 1, 2])
def test_truncate_leaves_the_first_block_its_learned_memory(truncate):
  """The cut comes after blocks, not before the first: else nothing would train these vectors."""
  config = rival("rmt", tie_embeddings=False, options={"truncate": truncate})
  assert reached(config, 0)[1]


@pytest.mark.parametrize("kind", ["rmt", "autocompressors", "melodi", "armt", "feedback"])
def test_a_memory_of_no_vectors_is_refused(kind):
  with pytest.raises(UserError, match="fam_length"):
    rival(kind, length=0).validate()


@pytest.mark.parametrize("kind, option, value", [
    ("rmt", "truncate", "2"), ("rmt", "truncate", -1), ("rmt", "truncate", [2]),
    ("rmt", "truncate", None), ("autocompressors", "most", 2.0), ("feedback", "static", "no"),
    ("feedback", "diversity", "x"), ("feedback", "previous", True),
])  # fmt: skip
def test_an_option_of_a_wrong_type_is_named(kind, option, value):
  with pytest.raises(UserError, match=f"memory option {option} is"):
    rival(kind, options={option: value}).validate()


@pytest.mark.parametrize("option", [dict(fam_init="prefix"), dict(fam_position="zero")])
def test_options_of_fam_alone_are_refused(option):
  config = rival("feedback")
  config = dataclasses.replace(config, memory=dataclasses.replace(config.memory, **option))
  with pytest.raises(UserError, match=r"fam_\w+ is '\w+', which only kind 'fam' has"):
    config.validate()


def test_unknown_names_are_named_with_the_choices():
  with pytest.raises(UserError, match="rmtt.*bswa.*rmt.*infini"):
    rival("rmtt").validate()
  with pytest.raises(UserError, match="cut.*unknown to 'infini'.*update, truncate"):
    rival("infini", options={"cut": 1}).validate()
  with pytest.raises(UserError, match="'sum'.*linear or delta"):
    rival("infini", options={"update": "sum"}).validate()
