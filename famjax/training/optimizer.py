"""Optimizers and learning-rate schedules, put together from optax parts.

The paper trains with Adafactor, b1 0.9, b2 0.99, at a constant rate (SPEC section 5, paper 3.1).
"""

from collections.abc import Callable
import dataclasses
import operator

import jax
import jax.numpy as jnp
import optax

from famjax.errors import UserError
from famjax.model.config import FAM_WEIGHTS

NAMES = ("adafactor", "adamw")
SCHEDULES = ("constant", "linear", "cosine", "rsqrt")
DECAYING = ("linear", "cosine")  # down to their end at `decay_steps`

# Parameters whose last name is one of these are never decayed: norms, biases, the memory's start.
NOT_DECAYED = ("scale", "bias", "tokens", "memory_gate", *FAM_WEIGHTS)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """How parameters move.

  Attributes:
    name: "adafactor" or "adamw".
    learning_rate: the highest rate of the schedule.
    schedule: after the warm-up: "constant"; "linear" or "cosine" down to `decay_to`; "rsqrt",
      `learning_rate * sqrt(warmup_steps / step)`.
    warmup_steps: steps over which the rate rises from 0.
    decay_steps: the step at which "linear" and "cosine" reach their end; None: the last step.
    decay_to: the rate there, as a fraction of `learning_rate`.
    clip_norm: gradients with a larger global norm are scaled down to it; 0: never.
    weight_decay: fraction of a weight, per step and unit of rate, that is taken off it. Norms,
      biases and the FAM's prompt or prefix are left alone.
    b1: decay of the first moment; 0: none is kept.
    b2: decay of the second moment.
    eps: AdamW's addition to the root of the second moment.
    parameter_scale: Adafactor's update is multiplied by the root mean square of the parameter, so
      that `learning_rate` is a relative rate.
    own_rates: of parameters, by their last name, times `learning_rate`: {"memory_gate": 10.0}. These
      have no decay and are not scaled by their size, which may be 0.
  """

  name: str = "adafactor"
  learning_rate: float = 1e-3
  schedule: str = "constant"
  warmup_steps: int = 0
  decay_steps: int | None = None
  decay_to: float = 0.0
  clip_norm: float = 1.0
  weight_decay: float = 0.0
  b1: float = 0.9
  b2: float = 0.99
  eps: float = 1e-8
  parameter_scale: bool = True
  own_rates: dict[str, float] | tuple[tuple[str, float], ...] = ()

  def __post_init__(self):
    items = self.own_rates.items() if isinstance(self.own_rates, dict) else self.own_rates
    object.__setattr__(self, "own_rates", tuple((name, float(rate)) for name, rate in items))

  def validate(self) -> None:
    """Raises UserError for a value that makes no sense."""
    for field, allowed in (("name", NAMES), ("schedule", SCHEDULES)):
      if getattr(self, field) not in allowed:
        raise UserError(
            f"optimizer {field} {getattr(self, field)!r} is unknown; choose one of"
            f" {', '.join(allowed)}"
        )
    for field in ("learning_rate", "eps"):
      if not getattr(self, field) > 0:
        raise UserError(f"optimizer {field} is {getattr(self, field)}; it must be above 0")
    for field in ("warmup_steps", "decay_to", "clip_norm", "weight_decay"):
      if not getattr(self, field) >= 0:
        raise UserError(f"optimizer {field} is {getattr(self, field)}; it must not be negative")
    for field in ("b1", "b2"):
      if not 0 <= getattr(self, field) < 1:
        raise UserError(f"optimizer {field} is {getattr(self, field)}; it must be in [0, 1)")
    for name, rate in self.own_rates:
      if not rate > 0:
        raise UserError(f"optimizer own_rates: {name} has {rate}; it must be above 0")
    if self.decay_steps is not None and self.decay_steps <= self.warmup_steps:
      raise UserError(
          f"optimizer decay_steps {self.decay_steps} is not above warmup_steps"
          f" {self.warmup_steps}: the rate has to rise before it falls"
      )


def check_names(config: OptimizerConfig, params) -> None:
  """Raises UserError if a rate of its own is meant for a parameter that is not among `params`."""
  there = {path[-1].key for path, _ in jax.tree_util.tree_leaves_with_path(params)}
  for name, _ in config.own_rates:
    if name not in there:
      raise UserError(
          f"optimizer own_rates names {name!r}, and the model's parameters are"
          f" {', '.join(sorted(there))}"
      )


def make_schedule(config: OptimizerConfig, train_steps: int) -> Callable[[jax.Array], jax.Array]:
  """The learning rate of each step, counted from 0.

  Args:
    config: `schedule`, `learning_rate`, `warmup_steps`, `decay_steps`, `decay_to`.
    train_steps: where a decay ends if `decay_steps` is None.

  Returns:
    A function of an int32 step to a float32 rate.
  """
  end = config.decay_steps if config.decay_steps is not None else train_steps
  span = max(end - config.warmup_steps, 1)
  peak, low = config.learning_rate, config.learning_rate * config.decay_to

  def rate(step):
    step = jnp.asarray(step, jnp.float32)
    done = jnp.clip((step - config.warmup_steps) / span, 0, 1)
    if config.schedule == "linear":
      value = peak + (low - peak) * done
    elif config.schedule == "cosine":
      value = low + (peak - low) * 0.5 * (1 + jnp.cos(jnp.pi * done))
    elif config.schedule == "rsqrt":
      start = max(config.warmup_steps, 1)
      value = peak * jnp.sqrt(start / jnp.maximum(step + 1, start))
    else:
      value = jnp.float32(peak)
    return value * jnp.minimum(1, (step + 1) / max(config.warmup_steps, 1))

  return rate


def make_optimizer(config: OptimizerConfig, train_steps: int) -> optax.GradientTransformation:
  """The optimizer that `config` describes.

  Adafactor here is scale_by_factored_rms with Adam's bias correction in place of the power law
  (a constant b2, as in the paper), updates clipped to a root mean square of 1 per parameter,
  momentum, and the parameter's own scale. A parameter of all layers is one array `[L, ...]` here, so
  that the clipping and the scale take the root mean square over all layers.

  Args:
    config: validated.
    train_steps: see `make_schedule`.

  Returns:
    An optax transformation whose `update` needs the parameters.
  """
  rates = dict(config.own_rates)
  parts = [optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm else []
  if config.name == "adamw":
    parts.append(optax.scale_by_adam(config.b1, config.b2, config.eps))
  else:
    parts += [
        optax.scale_by_factored_rms(decay_rate=config.b2, decay_rate_fn=_bias_corrected),
        optax.clip_by_block_rms(1.0),
    ]
    if config.b1:
      parts.append(optax.ema(config.b1, debias=False))
    if config.parameter_scale:
      scale = optax.scale_by_param_block_rms()
      parts.append(optax.masked(scale, lambda p: _named(p, rates, False)) if rates else scale)
  if config.weight_decay:
    without = lambda params: jax.tree.map(operator.and_, decayed(params), _named(params, rates, False))
    parts.append(optax.add_decayed_weights(config.weight_decay, without))
  for name, rate in rates.items():
    parts.append(optax.masked(optax.scale(rate), lambda p, name=name: _named(p, (name,), True)))
  schedule = make_schedule(config, train_steps)
  return optax.chain(*parts, optax.scale_by_learning_rate(schedule))


def _named(params, names, answer: bool) -> dict:
  """A tree of bools: `answer` where a parameter's last name is one of `names`."""
  of = lambda path, _: answer if path[-1].key in names else not answer
  return jax.tree_util.tree_map_with_path(of, params)


def _bias_corrected(step, b2):
  """The decay at step 0, 1, ... whose moving average is Adam's bias-corrected second moment."""
  step = jnp.asarray(step, jnp.float32)
  return b2 * (1 - b2**step) / (1 - b2 ** (step + 1))


def decayed(params) -> dict:
  """A tree of bools: which parameters weight decay touches, told by their last name."""
  return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key not in NOT_DECAYED, params)
