"""The loop: a restart is bitwise, a signal saves, a loss that is not finite stops the run."""

import dataclasses
import json
import os
import pathlib
import signal
import threading

from flax import nnx
import jax
import numpy as np
import pytest

from famjax.errors import DivergedError, UserError
from famjax.model import diagnostics
from famjax.training import loop, run_directory
from famjax.training.checkpoint import About, Checkpoints
from famjax.training.storage import list_steps
from famjax.training.train_state import abstract
from tests.training import toy

change = dataclasses.replace


def train(run_dir, config=toy.TRAIN, model=toy.MODEL, reader=toy.ToyReader(), **options):
  options = {"optimizer": toy.OPTIMIZER, "vocabulary": "toy", **options}
  return loop.train(run_dir, model, reader, config=config, **options)


@pytest.mark.parametrize(
    "options",
    [dict(rsp_probability=0.5, random_offset=True), dict(follow_rows=True, rsp_probability=0.5)],
    ids=["rsp and offsets", "rows that are followed, and rsp"],
)
def test_a_restart_is_bitwise(tmp_path, options, capsys):
  """k steps, stop, restart, N - k steps equal N steps in everything that the next step needs."""
  config = change(toy.TRAIN, train_steps=7, **options)
  whole = train(tmp_path / "whole", config)
  train(tmp_path / "parts", change(config, train_steps=3))
  parts = train(tmp_path / "parts", config)
  assert "resuming" in capsys.readouterr().out
  state = jax.device_get(whole.state)
  toy.assert_equal(jax.device_get(parts.state), state)
  assert state.step == 7 and state.kept_updates > 0
  assert (state.carry is not None) == config.follow_rows
  for name in ("parts", "whole"):
    saved, position = read_checkpoint(tmp_path / name / "checkpoints", whole.state)
    toy.assert_equal(saved, state)
    assert position == [7, 28]
  # The losses of the steps after the restart are in the file as if nothing had happened.
  losses = lambda name: [(m["step"], m["loss"]) for m in read_metrics(tmp_path / name)]
  assert losses("parts")[-1] == losses("whole")[-1]


def test_looks_at_the_fam(tmp_path):
  """They are metrics of their own, what `look` sees, and change nothing."""
  config = change(toy.TRAIN, train_steps=4)
  plain = train(tmp_path / "plain", config)
  looked = train(tmp_path / "looked", change(config, look_every=2))
  toy.assert_equal(jax.device_get(looked.state), jax.device_get(plain.state))
  lines = read_metrics(tmp_path / "looked", "fam")
  assert [line["step"] for line in lines] == [2, 4]
  names = ("write", "read", "slots", "energy", "distance")
  reader = toy.ToyReader()
  batch, _ = reader.read(np.array([3, 12]), 3)
  graphdef = abstract(toy.MODEL)[0]
  look = lambda params, row: diagnostics.measures(diagnostics.look(nnx.merge(graphdef, params), row))
  most = 4 * toy.MODEL.memory.block_size
  row = batch["tokens"][np.argmax(batch["lengths"])][:most]
  measured = jax.device_get(jax.jit(look)(plain.state.params, row))
  for name in names:
    layers = [lines[1][f"{name}/{l}"] for l in range(toy.MODEL.num_layers)]
    np.testing.assert_allclose(layers, measured[name], rtol=1e-4)  # compiled in two ways
    assert lines[1][name] == pytest.approx(np.mean(layers))


def read_checkpoint(directory, template):
  """The newest checkpoint: the state, and where the reader stands."""
  with Checkpoints(directory, 1) as checkpoints:
    restored = checkpoints.restore_newest(template, np.zeros(2, np.int64), About(toy.MODEL, "toy"))
  return jax.device_get(restored.state), restored.position.tolist()


def read_metrics(run_dir, split="train"):
  lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
  return [line for line in lines if line["split"] == split]


class Harmful(toy.ToyReader):
  """Does something when a step's batch is read."""

  def __init__(self, at, harm):
    super().__init__()
    object.__setattr__(self, "harm", (at, harm))

  def read(self, position, step):
    batch, position = super().read(position, step)
    at, harm = self.harm
    if step == at:
      harm(batch)
    return batch, position


def test_metrics_checkpoints_and_evaluations(tmp_path, capsys):
  config = change(toy.TRAIN, train_steps=5, checkpoint_every=2, eval_every=4, keep_checkpoints=2)
  result = train(tmp_path, config, eval_reader=toy.ToyReader(seed=1))
  out = capsys.readouterr().out
  assert list_steps(tmp_path / "checkpoints") == [4, 5]
  metrics = read_metrics(tmp_path)
  assert [m["step"] for m in metrics] == [2, 4, 5]
  assert metrics[-1]["loss"] == result.metrics["train"]["loss"]
  assert metrics[-1]["tokens_per_second"] > 0 and metrics[-1]["mfu"] is None
  assert [m["step"] for m in read_metrics(tmp_path, "eval")] == [4, 5]
  assert "layers.attention.query.kernel" in out and "total" in out
  assert (tmp_path / "parameters.txt").read_text().strip() in out
  shown = [line.split()[1] for line in out.splitlines() if "tokens/s" in line]
  assert shown == ["2/5", "4/5", "5/5"]
  train(tmp_path, config, eval_reader=toy.ToyReader(seed=1))  # there is nothing left to do
  out = capsys.readouterr().out
  assert "has all of its 5 steps" in out and "step 5  eval loss" in out
  assert [m["step"] for m in read_metrics(tmp_path, "eval")] == [4, 5]


def test_steps_without_a_loss_weight_have_no_loss(tmp_path, capsys):
  def harm(batch):
    batch["weights"][:] = 0

  reader = Harmful(1, harm)
  train(tmp_path, change(toy.TRAIN, train_steps=2, log_every=1), reader=reader)
  first, second = read_metrics(tmp_path)
  assert first["loss"] > 0 and second["loss"] is None and second["accuracy"] is None
  assert "loss -  accuracy -" in capsys.readouterr().out


def test_metrics_after_the_step_that_a_run_resumes_from_are_dropped(tmp_path):
  train(tmp_path, change(toy.TRAIN, train_steps=4))
  path = tmp_path / "metrics.jsonl"
  before = path.read_text()
  path.write_text(before + '{"step": 6, "split": "train", "loss": 9}\n{"step": 8, "spl')
  train(tmp_path, change(toy.TRAIN, train_steps=6))
  lines = path.read_text()
  assert lines.startswith(before) and [m["step"] for m in read_metrics(tmp_path)] == [2, 4, 6]
  assert read_metrics(tmp_path)[-1]["loss"] != 9


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(tmp_path, value):
  def harm(batch):
    batch["weights"][:] = value

  reader = Harmful(4, harm)
  config = change(toy.TRAIN, train_steps=12, checkpoint_every=3, log_every=4)
  with pytest.raises(DivergedError, match=r"at step 5: "):
    train(tmp_path, config, reader=reader)
  assert list_steps(tmp_path / "checkpoints") == [3]
  assert max(m["step"] for m in read_metrics(tmp_path)) == 4


def test_sigterm_saves_and_the_run_goes_on(tmp_path, capsys):
  config = change(toy.TRAIN, train_steps=40, rsp_probability=0.5)
  reader = Harmful(5, lambda batch: os.kill(os.getpid(), signal.SIGTERM))
  before = signal.getsignal(signal.SIGTERM)
  result = train(tmp_path, config, reader=reader)
  assert signal.getsignal(signal.SIGTERM) is before
  stopped = int(result.state.step)
  assert result.terminated and 3 <= stopped < 40
  assert list_steps(tmp_path / "checkpoints") == [stopped]
  last = capsys.readouterr().out.splitlines()[-1]
  assert "SIGTERM" in last and f"after step {stopped} of 40" in last
  config = change(config, train_steps=stopped + 2)
  harmless = Harmful(99, None)
  gone_on = train(tmp_path, config, reader=harmless)
  whole = train(tmp_path / "whole", config, reader=harmless)
  toy.assert_equal(jax.device_get(gone_on.state), jax.device_get(whole.state))


def test_it_runs_on_a_thread_too(tmp_path):
  """Where signal handlers cannot be set."""
  results = []
  thread = threading.Thread(
      target=lambda: results.append(train(tmp_path, change(toy.TRAIN, train_steps=1)))
  )
  thread.start()
  thread.join()
  assert results[0].metrics["train"]["loss"] > 0


def test_another_run_starts_from_a_checkpoint(tmp_path, capsys):
  first = train(tmp_path / "bswa", change(toy.TRAIN, train_steps=2), toy.BSWA)
  config = change(toy.TRAIN, train_steps=1, init_checkpoint=str(tmp_path / "bswa"))
  second = train(tmp_path / "fam", config)
  out = capsys.readouterr().out
  assert f"parameters of {tmp_path / 'bswa'}, step 2" in out
  assert "fam_prompt [2, 16] is not in it: drawn anew" in out
  assert "fam_prompt" in second.state.params and second.state.step == 1
  moved = jax.tree.map(
      lambda a, b: np.abs(a - b).max(),
      first.state.params,
      {k: v for k, v in second.state.params.items() if k != "fam_prompt"},
  )
  assert max(jax.tree.leaves(moved)) < 1.1e-2  # one step of Adam at 1e-2
  with pytest.raises(UserError, match="ff_dim"):
    train(tmp_path / "other", config, change(toy.MODEL, ff_dim=64))
  assert not (tmp_path / "other").exists()


def test_parameters_take_the_dtype_of_the_run_that_starts_from_them(tmp_path):
  """Then a restart, which reads the run's own checkpoint, goes on with the same numbers."""
  train(tmp_path / "first", change(toy.TRAIN, train_steps=1))
  model = change(toy.MODEL, param_dtype="bfloat16")
  config = change(toy.TRAIN, train_steps=3, init_checkpoint=str(tmp_path / "first"))
  whole = train(tmp_path / "whole", config, model)
  params = dict(whole.state.params)
  assert params.pop("fam_prompt").dtype == "float32"  # a FAM's own weights always are
  assert {str(x.dtype) for x in jax.tree.leaves(params)} == {"bfloat16"}
  train(tmp_path / "parts", change(config, train_steps=1), model)
  parts = train(tmp_path / "parts", config, model)
  toy.assert_equal(jax.device_get(parts.state), jax.device_get(whole.state))


WRONG = {
    "accumulate": (dict(config=change(toy.TRAIN, accumulate=3)), "accumulate 3 does not divide"),
    "length": (dict(reader=toy.ToyReader(length=13)), "13 tokens, is not a multiple of block_size"),
    "vocabulary": (dict(model=change(toy.MODEL, vocab_size=15)), "has 16 entries"),
    "FAM": (
        dict(model=change(toy.MODEL, memory=change(toy.MODEL.memory, fam_length=5))),
        "longer than a block",
    ),
    "probability": (dict(config=change(toy.TRAIN, rsp_probability=2.0)), "rsp_probability is 2.0"),
    "steps": (dict(config=change(toy.TRAIN, train_steps=0)), "train_steps is 0"),
    "a rate of its own": (
        dict(optimizer=change(toy.OPTIMIZER, own_rates={"memory_gat": 10.0})),
        "own_rates names 'memory_gat', and the model's parameters are .*fam_prompt",
    ),
    "looks": (dict(config=change(toy.TRAIN, look_every=2), model=toy.BSWA), "has no FAM to look at"),
    "checkpoint": (dict(config=change(toy.TRAIN, init_checkpoint="/nowhere")), "/nowhere"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_does_not_fit_is_named_and_nothing_is_written(tmp_path, what):
  options, message = WRONG[what]
  with pytest.raises(UserError, match=message) as error:
    train(tmp_path / "run", **options)
  assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


def contents(directory):
  return {p: p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def test_a_run_directory_of_another_configuration(tmp_path):
  train(tmp_path, change(toy.TRAIN, train_steps=1))
  before = contents(tmp_path)
  one = change(toy.TRAIN, train_steps=1)
  others = {
      "model.num_layers is 2 there and 3 here": dict(model=change(toy.MODEL, num_layers=3)),
      "model.memory.kind is fam there and bswa here": dict(model=toy.BSWA),
      "data.batch_size is 4 there and 8 here": dict(reader=toy.ToyReader(batch_size=8)),
      "train.seed is 0 there and 1 here": dict(config=change(one, seed=1)),
      "gin.Lengths.high is 4 there and 5 here": dict(settings=lambda: {"Lengths.high": "5"}),
  }
  (tmp_path / "config.json").write_text(
      (tmp_path / "config.json").read_text().replace('"gin": {}', '"gin": {"Lengths.high": "4"}')
  )
  before[tmp_path / "config.json"] = (tmp_path / "config.json").read_bytes()
  for message, options in others.items():
    with pytest.raises(UserError, match=message):
      train(tmp_path, **{"config": one, **options})
  assert contents(tmp_path) == before
  free = change(one, log_every=7, eval_every=9, keep_checkpoints=5)
  train(tmp_path, free, model=change(toy.MODEL, remat="full"), eval_reader=toy.ToyReader(seed=1))


def test_more_steps_of_a_rate_that_decays_are_another_run(tmp_path):
  """The rate of every step depends on the last; with its end written down they may be added."""
  one, two = (change(toy.TRAIN, train_steps=n) for n in (1, 2))
  cosine = change(toy.OPTIMIZER, schedule="cosine")
  train(tmp_path, one, optimizer=cosine)
  with pytest.raises(UserError, match="optimizer.decay_steps is 1 there and 2 here"):
    train(tmp_path, two, optimizer=cosine)
  assert int(train(tmp_path, two, optimizer=change(cosine, decay_steps=1)).state.step) == 2


def test_a_directory_with_checkpoints_of_nobody_knows_what(tmp_path):
  (tmp_path / "checkpoints").mkdir()
  with pytest.raises(UserError, match="no config.json"):
    train(tmp_path)
  file = pathlib.Path(tmp_path / "file")
  file.write_text("")
  with pytest.raises(UserError, match="is a file"):
    train(file)


def test_a_broken_checkpoint_is_passed_over_with_a_line(tmp_path, capsys):
  config = change(toy.TRAIN, train_steps=4, checkpoint_every=2)
  train(tmp_path, config)
  step = tmp_path / "checkpoints" / "4"
  (step / "commit_success.txt").unlink()
  wanted = jax.device_get(train(tmp_path / "whole", config).state)
  capsys.readouterr()
  again = train(tmp_path, config)
  out = capsys.readouterr().out
  assert f"checkpoint {step} is not whole" in out and "resuming" in out and "after step 2" in out
  toy.assert_equal(jax.device_get(again.state), wanted)
  assert list_steps(tmp_path / "checkpoints") == [2, 4]


def test_an_ordinary_decoder_trains_within_its_context(tmp_path):
  full = lambda segments: change(
      toy.MODEL, memory=change(toy.MODEL.memory, kind="full", memory_segments=segments)
  )
  length = toy.ToyReader().length
  blocks = length // toy.MODEL.memory.block_size
  one = change(toy.TRAIN, train_steps=1)
  with pytest.raises(UserError, match=f"{length} tokens are more than the"):
    train(tmp_path / "a", one, model=full(blocks - 2))
  with pytest.raises(UserError, match="follow_rows is set, and full attention has room"):
    train(tmp_path / "b", change(one, follow_rows=True), model=full(blocks - 1))
  assert not list(tmp_path.iterdir())
  train(tmp_path / "c", one, model=full(blocks - 1))


def test_a_run_directory_is_here_or_in_a_bucket(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert str(run_directory.place("runs/a")) == str(tmp_path / "runs" / "a")
  bucket = run_directory.place("gs://bucket/runs/a")
  assert str(bucket / "checkpoints") == "gs://bucket/runs/a/checkpoints"
