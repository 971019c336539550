"""What a training run does, apart from its model, data and optimizer."""

import dataclasses
import math
import operator

from famjax.errors import UserError


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  """Options of `train`.

  Attributes:
    train_steps: optimizer steps of the whole run.
    seed: of the initial parameters and of every random draw of a step.
    accumulate: microbatches that a batch's rows are cut into; gradients are summed over them.
    follow_rows: each row of the batch goes on, from step to step, in the document that its reader
      follows: FAM and memory segments are carried, without gradient. Otherwise every row starts
      anew in every step.
    objective: "next_token", or "distill": the next-token distribution of the frozen original with
      full attention over the same rows (`distillation`). Evaluation is by next tokens in any case.
    trainable: the parameters that are trained: "full", "lora" (LoRA's factors and the FAM's own
      weights), "fam" (those alone: a memory for a frozen model); None: "lora" for a model that has
      LoRA, "full" for one that has not.
    fam_block_noise: Normal noise on the FAM after every block of a step, as a share of its root mean
      square; each row draws a factor from [0, 1) for it. The loop has to remove the noise block by
      block, so that what it holds does not drift. A number, or pairs of a step and the number from
      that step on: ((0, 0.5), (1500, 0.25)). Not in the paper.
    rsp_probability: of a starting row starting from the kept FAM (random state passing, B.2.3); the
      paper's best is 0.8. Without a FAM it does nothing.
    rsp_from: the first step that passes it. The paper starts from a pretrained model and passes at
      once; a model that starts at random must learn first what a FAM is for.
    random_offset: starting rows draw a random position offset (B.2.2).
    offset_cap: the draw is below min(2 pi rope_theta, offset_cap).
    loss_chunk: tokens whose logits stand in a device's memory at once.
    init_checkpoint: checkpoint directory or run directory whose parameters a fresh run starts from.
    eval_every: steps between evaluations; 0: only at the end.
    eval_batches: batches of an evaluation, the same ones each time.
    look_every: steps between looks at the FAM, whose entropies, energy and distance are metrics of
      the split "fam" (`famjax.model.diagnostics`); 0: none.
    checkpoint_every: steps between checkpoints; 0: only at the end.
    keep_checkpoints: newest checkpoints that stay.
    log_every: steps between lines of metrics; the loop does not wait for the device in between.
    tensorboard: metrics also go to TensorBoard event files.
  """

  train_steps: int = 1000
  seed: int = 0
  accumulate: int = 1
  follow_rows: bool = False
  objective: str = "next_token"
  trainable: str | None = None
  fam_block_noise: float | tuple[tuple[int, float], ...] = 0.0
  rsp_probability: float = 0.0
  rsp_from: int = 0
  random_offset: bool = False
  offset_cap: int = 65536
  loss_chunk: int = 1024
  init_checkpoint: str | None = None
  eval_every: int = 0
  eval_batches: int = 8
  look_every: int = 0
  checkpoint_every: int = 0
  keep_checkpoints: int = 3
  log_every: int = 100
  tensorboard: bool = True

  def validate(self) -> None:
    """Raises UserError for a value that makes no sense."""
    for name in (
        "train_steps", "accumulate", "offset_cap", "loss_chunk", "eval_batches", "keep_checkpoints",
        "log_every",
    ):  # fmt: skip
      if getattr(self, name) < 1:
        raise UserError(f"{name} is {getattr(self, name)}; it must be at least 1")
    for name in (
        "seed", "rsp_from", "eval_every", "look_every", "checkpoint_every",
    ):  # fmt: skip
      if getattr(self, name) < 0:
        raise UserError(f"{name} is {getattr(self, name)}; it must not be negative")
    if self.objective not in ("next_token", "distill"):
      raise UserError(f"objective {self.objective!r} is unknown; choose next_token or distill")
    self.block_noise_stages()
    if not 0 <= self.rsp_probability <= 1:
      raise UserError(f"rsp_probability is {self.rsp_probability}; it must be in [0, 1]")

  def block_noise_stages(self) -> tuple[tuple[int, float], ...]:
    """Returns `fam_block_noise` as pairs of a step and the noise from that step on.

    Raises:
      UserError: it's neither a number nor such pairs, or a number is negative.
    """
    noise = self.fam_block_noise
    stages = noise if isinstance(noise, (tuple, list)) else ((0, noise),)
    try:
      stages = tuple((operator.index(step), float(share)) for step, share in stages)
    except (TypeError, ValueError):
      stages = ()
    steps = [step for step, _ in stages]
    if steps[:1] != [0] or steps != sorted(set(steps)) or not all(0 <= x < math.inf for _, x in stages):
      raise UserError(
          f"fam_block_noise is {noise}: use a number of at least 0, or pairs of a step and a number;"
          " the first step is 0 and steps grow: ((0, 0.5), (1500, 0.25))"
      )
    return stages

  def check_batch_size(self, batch_size: int, row_parts: int = 1) -> None:
    """Raises UserError if rows cannot be dealt out to devices and microbatches alike."""
    if batch_size % self.accumulate:
      raise UserError(
          f"accumulate {self.accumulate} does not divide a batch of {batch_size} rows: choose a"
          " batch size that is a multiple of it"
      )
    if batch_size % (self.accumulate * row_parts):
      parts = f"{row_parts} devices" + f" and {self.accumulate} microbatches" * (self.accumulate > 1)
      raise UserError(
          f"a batch of {batch_size} rows cannot be dealt out evenly to {parts}: choose a batch size"
          f" that is a multiple of {self.accumulate * row_parts}, put devices on the mesh axis tensor,"
          " or let it see fewer (CUDA_VISIBLE_DEVICES)"
      )


# Options that do not change what a step computes: they may differ when a run is resumed.
MAY_CHANGE = frozenset({
    "train_steps", "init_checkpoint", "eval_every", "eval_batches", "look_every", "checkpoint_every",
    "keep_checkpoints", "log_every", "tensorboard",
})  # fmt: skip
