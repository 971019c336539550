"""Where a run's numbers go: a JSON-lines file, TensorBoard, and the terminal."""

import contextlib
import json
import math
import os
import pathlib
import sys
import time

from etils import epath

from famjax import console
from famjax.training.flops import FlopsPerToken, utilisation


class MetricsWriter:
  """Writes metrics to `metrics.jsonl` and to TensorBoard event files in one directory.

  A line of the file is `{"step": 100, "split": "train", "time": 1764000000.0, "loss": 1.5, ...}`: `step`
  counts finished steps, `time` is when the line was written (Unix, seconds), and a value that is not a
  finite number is null. Lines beyond the step that a run resumes from are taken out first, so that no
  step stands in it twice.

  Attributes:
    note: why there are no event files although they were asked for; else None.
  """

  def __init__(self, directory: pathlib.Path | epath.Path, *, tensorboard: bool = True, step: int = 0):
    """Opens the files.

    Args:
      directory: exists.
      tensorboard: write event files. TensorFlow is imported for it.
      step: steps that are done.
    """
    self.note = None
    path = directory / "metrics.jsonl"
    if path.exists():
      kept = [line for line in path.read_text().splitlines() if _step_of(line) <= step]
      write_text(path, "".join(line + "\n" for line in kept))
    self._file = path.open("a", encoding="utf-8")
    self._events = self._open_events(directory) if tensorboard else None

  def write(self, step: int, split: str, values: dict[str, float | None]) -> None:
    """Writes one line of the file, and one point per value as `split/name`."""
    finite = {k: v for k, v in values.items() if v is not None and math.isfinite(v)}
    line = {"step": step, "split": split, "time": time.time(), **{k: finite.get(k) for k in values}}
    self._file.write(json.dumps(line) + "\n")
    self._file.flush()
    if self._events is not None:
      self._events.write_scalars(step, {f"{split}/{k}": v for k, v in finite.items()})

  def close(self) -> None:
    self._file.close()
    if self._events is not None:
      self._events.close()

  def _open_events(self, directory):
    # pylint: disable=import-outside-toplevel
    try:
      with _without_greeting():
        from clu import metric_writers
        import tensorflow as tf

        with contextlib.suppress(RuntimeError):  # it has begun to use them before
          tf.config.set_visible_devices([], "GPU")  # accelerators are JAX's
        return metric_writers.SummaryWriter(str(directory))
    except ImportError as e:
      self.note = f"no TensorBoard event files: {e}; pip install clu tensorflow tensorboard"
      return None


@contextlib.contextmanager
def _without_greeting():
  """Sends standard error nowhere: TensorFlow's C++ part greets there, whatever the log level is."""
  sys.stderr.flush()
  kept = os.dup(2)
  nowhere = os.open(os.devnull, os.O_WRONLY)
  os.dup2(nowhere, 2)
  try:
    yield
  finally:
    os.dup2(kept, 2)
    os.close(kept)
    os.close(nowhere)


def _step_of(line: str) -> float:
  """The step of a line; infinite for one that a crash cut off."""
  try:
    return json.loads(line)["step"]
  except (ValueError, KeyError, TypeError):
    return math.inf


def write_text(path: pathlib.Path | epath.Path, text: str) -> None:
  """Writes a file whole or not at all."""
  temporary = path.with_name(path.name + ".tmp")
  temporary.write_text(text, encoding="utf-8")
  temporary.replace(path)


class Clock:
  """Seconds spent on training; evaluations and checkpoints pause it."""

  def __init__(self):
    self._start = time.perf_counter()

  @contextlib.contextmanager
  def paused(self):
    before = time.perf_counter()
    try:
      yield
    finally:
      self._start += time.perf_counter() - before

  def lap(self) -> float:
    """Seconds since the last lap, at least a microsecond."""
    now = time.perf_counter()
    seconds, self._start = now - self._start, now
    return max(seconds, 1e-6)


def speed(
    flops: FlopsPerToken, tokens: float, seconds: float, device_kind: str, devices: int
) -> dict[str, float | None]:
  """Tokens per second, model TFLOP/s, the FAM's part of them, and MFU; see flops.py."""
  rate = tokens / seconds
  return {
      "tokens_per_second": rate,
      "model_tflops_per_second": rate * flops.total / 1e12,
      "fam_share_of_flops": flops.fam / flops.total,
      "mfu": utilisation(flops, rate, device_kind, devices),
  }


def number(value: float | None) -> str:
  """A metric as people read it."""
  return "-" if value is None else f"{value:.4f}"


class Progress:
  """A progress bar on a terminal, plain lines elsewhere."""

  def __init__(self, total: int, done: int = 0, *, log: console.Log | None = None, shown: bool = True):
    """Shows nothing yet.

    Args:
      total: Steps of the run.
      done: Steps that are done.
      log: Keeps every line too. None: lines are printed alone.
      shown: Whether anything is shown.
    """
    self._total, self._bar, self._shown = total, None, shown
    self._log = log or console.Log(None)
    if shown and sys.stderr.isatty():
      import tqdm  # pylint: disable=import-outside-toplevel

      self._bar = tqdm.tqdm(total=total, initial=done, unit="step", dynamic_ncols=True)

  def say(self, text: str) -> None:
    """A line of its own, above the bar."""
    if self._bar is not None:
      self._bar.write(text)
      self._log.keep(text)
    elif self._shown:
      self._log.print(text)

  def advance(self, step: int, values: dict[str, float | None]) -> None:
    """Shows training metrics after `step` steps."""
    shown = [f"{name} {number(values[name])}" for name in ("loss", "accuracy")]
    if "tokens_per_second" in values:
      shown.append(f"{values['tokens_per_second']:,.0f} tokens/s")
    if values.get("mfu") is not None:
      shown.append(f"MFU {values['mfu']:.1%}")
    line = f"step {step:>{len(str(self._total))}}/{self._total}  " + "  ".join(shown)
    if self._bar is None:
      self.say(line)
    else:
      self._log.keep(line)
      self._bar.set_postfix_str("  ".join(shown), refresh=False)
      self._bar.update(step - self._bar.n)

  def close(self) -> None:
    if self._bar is not None:
      self._bar.close()
