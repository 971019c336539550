"""Self-distillation: the frozen original with full attention is what a student comes near to."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from famjax.errors import UserError
from famjax.training import distillation, loop
from famjax.training.checkpoint import load_params
from famjax.training.flops import flops_per_token
from tests.training import toy

change = dataclasses.replace
LORA = change(toy.MODEL, lora_rank=4)


def train(run_dir, model, **options):
  config = change(toy.TRAIN, objective="distill", **options)
  return loop.train(run_dir, model, toy.ToyReader(), toy.OPTIMIZER, config, vocabulary="toy")


def losses(run_dir):
  lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
  return [line["loss"] for line in lines if line["split"] == "train"]


@pytest.fixture(scope="module", name="base")
def _base(tmp_path_factory):
  """A trained model to make a student of."""
  directory = tmp_path_factory.mktemp("base")
  loop.train(
      directory, toy.BSWA, toy.ToyReader(), toy.OPTIMIZER,
      change(toy.TRAIN, train_steps=60, log_every=60), vocabulary="toy",
  )  # fmt: skip
  return directory


def test_a_student_that_sees_all_has_nothing_to_learn(base, tmp_path):
  """Its window covers the rows, and LoRA's products begin at 0."""
  wide = change(toy.BSWA, lora_rank=4, memory=change(toy.BSWA.memory, memory_segments=2))
  train(tmp_path / "wide", wide, train_steps=1, log_every=1, init_checkpoint=str(base))
  assert abs(losses(tmp_path / "wide")[0]) < 1e-5
  narrow = change(wide, memory=change(wide.memory, memory_segments=0))
  train(tmp_path / "narrow", narrow, train_steps=1, log_every=1, init_checkpoint=str(base))
  assert losses(tmp_path / "narrow")[0] > 1e-3


def test_the_teacher_of_a_student_made_of_a_lora_run_has_that_lora_in_it(base, tmp_path, capsys):
  """Its factors are merged, and the student's are new."""
  wide = change(toy.BSWA, lora_rank=4, memory=change(toy.BSWA.memory, memory_segments=2))
  tuned = tmp_path / "tuned"
  config = change(toy.TRAIN, train_steps=20, init_checkpoint=str(base))
  loop.train(tuned, wide, toy.ToyReader(), toy.OPTIMIZER, config, vocabulary="toy")
  train(tmp_path / "run", wide, train_steps=1, log_every=1, init_checkpoint=str(tuned))
  assert abs(losses(tmp_path / "run")[0]) < 1e-5
  assert "tuned was trained with a window; its teaching is with full" in capsys.readouterr().out


def test_a_teacher_is_not_believed_beyond_its_context():
  memory = change(toy.MODEL.memory, kind="full")
  full = lambda segments: change(toy.MODEL, memory=change(memory, memory_segments=segments))
  assert not distillation.notes("hub", full(2), 12)
  (note,) = distillation.notes("hub", full(1), 12)
  assert "hub is an ordinary decoder of 8 tokens, and it teaches rows of 12" in note


@pytest.mark.parametrize("trainable", ["lora", "fam"])
def test_a_student_comes_nearer_and_the_original_stays(trainable, base, tmp_path):
  options = dict(train_steps=80, log_every=20, init_checkpoint=str(base), trainable=trainable)
  model = LORA if trainable == "lora" else toy.MODEL
  result = train(tmp_path / "run", model, **options)
  first, *_, last = losses(tmp_path / "run")
  assert last < (0.7 if trainable == "lora" else 1.0) * first
  before = load_params(base).params
  kernel = lambda params: params["layers"]["attention"]["query"]["kernel"]
  np.testing.assert_array_equal(kernel(result.state.frozen), kernel(before))


def test_accumulated_rows_learn_the_same(base, tmp_path):
  options = dict(train_steps=2, init_checkpoint=str(base))
  one = train(tmp_path / "one", LORA, **options).state.params
  four = train(tmp_path / "four", LORA, accumulate=4, **options).state.params
  close = lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4)  # Adam divides small by small
  jax.tree.map(close, jax.device_get(one), jax.device_get(four))


def test_a_teacher_has_what_is_not_trained_and_sees_all():
  distill = change(toy.TRAIN, objective="distill")
  lora = distillation.teacher_config(distill, LORA, "lora", 12)
  assert lora.lora_rank == 0 and lora.memory.context == 12
  assert distillation.teacher_config(distill, LORA, "fam", 12).lora_rank == 4
  assert distillation.teacher_config(toy.TRAIN, LORA, "lora", 12) is None
  alone, taught = (flops_per_token(LORA, 12, frozen=True, teacher=t) for t in (None, lora))
  assert taught.matrices == pytest.approx(1.5 * alone.matrices) and taught.fam == alone.fam
  assert taught.attention > alone.attention


@pytest.mark.parametrize(
    "model, options, message",
    [
        (toy.MODEL, {}, "all parameters are trained: set ModelConfig.lora_rank"),
        (LORA, {"follow_rows": True}, "needs whole texts, .* leave follow_rows out"),
        (LORA, {"init_checkpoint": None}, "needs a model to learn from"),
        (LORA, {"objective": "copy"}, "objective 'copy' is unknown; choose next_token or distill"),
    ],
)
def test_nothing_to_learn_from(model, options, message, tmp_path):
  config = change(toy.TRAIN, **{"objective": "distill", "init_checkpoint": "base", **options})
  with pytest.raises(UserError, match=message):
    loop.train(tmp_path / "run", model, toy.ToyReader(), toy.OPTIMIZER, config, vocabulary="toy")
  assert not (tmp_path / "run").exists()
