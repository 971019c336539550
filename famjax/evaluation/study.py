"""A study: several models, several seeds, trained and asked for pass keys, in one report.

Each model of each seed is a run of its own, `famjax train` and then `famjax eval`, in a process of
its own: on a CPU as many at once as there are cores to share. A study that was stopped goes on
where it was; a run that is finished is not trained again. Before anything is started, the arguments
of every run are gone through, so that a mistake does not cost the hours before it.
"""

from collections.abc import Callable, Sequence
import concurrent.futures
import contextlib
import dataclasses
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
import time
from typing import NamedTuple

from famjax import locks, trust
from famjax.errors import TerminatedError, UserError
from famjax.evaluation import report


@dataclasses.dataclass(frozen=True)
class Study:
  """What to compare.

  Attributes:
    run_dir: gets a directory for every run.
    models: name of each model, to what its runs add to the command line: gin files, and bindings
      NAME=VALUE. Later ones win.
    seeds: each model is trained once for each.
    parallel: runs at a time, each on its share of the processor's cores; 1 on an accelerator.
    title: of the plot.
    report_dir: gets `report.json`, the plot and the table; None: `run_dir`. Studies that share some of
      their runs have one run_dir, and reports of their own.
    prompt: a model of the first name and seed goes on from here, as a sample; empty: none does.
    sample_tokens: how far.
  """

  run_dir: str
  models: dict[str, Sequence[str]]
  seeds: tuple[int, ...] = (0,)
  parallel: int = 1
  title: str = "PassKey retrieval"
  report_dir: str | None = None
  prompt: str = ""
  sample_tokens: int = 60

  def validate(self) -> None:
    """Raises UserError for a value that makes no sense."""
    if not isinstance(self.seeds, (tuple, list)):
      raise UserError(f"Study.seeds is {self.seeds!r}: give seeds, as (0,) or (0, 1, 2)")
    if not self.models or not self.seeds:
      raise UserError("Study.models and Study.seeds must name at least one model and one seed")
    if len(set(self.seeds)) < len(self.seeds):
      raise UserError(f"Study.seeds {self.seeds}: each seed is one run; name each once")
    places = [_directory_name(name, 0) for name in self.models]
    if shared := next((name for name, p in zip(self.models, places) if places.count(p) > 1), None):
      raise UserError(f"Study.models: {shared!r} has the directory of another model; rename it")
    if self.parallel < 1:
      raise UserError(f"Study.parallel is {self.parallel}; it must be at least 1")


class Plan(NamedTuple):
  """What a run of given arguments ends with.

  Attributes:
    steps: of training.
    asked: the settings of its evaluation, by name.
    file: that the evaluation leaves in the run's directory.
  """

  steps: int
  asked: dict[str, object]
  file: str = report.PASSKEY


@dataclasses.dataclass(frozen=True)
class _Job:
  name: str
  seed: int
  directory: pathlib.Path
  gin_files: tuple[str, ...]
  bindings: tuple[str, ...]

  @property
  def label(self) -> str:
    return f"{self.name}, seed {self.seed}"

  @property
  def log(self) -> pathlib.Path:
    return self.directory.with_name(self.directory.name + ".log")

  @property
  def seconds(self) -> pathlib.Path:
    """Holds the time of training, over all of its sittings."""
    return self.directory.with_name(self.directory.name + ".seconds")

  def result(self, plan: Plan) -> report.Result:
    return {
        "name": self.name,
        "seed": self.seed,
        "train_seconds": float(self.seconds.read_text()),
        **json.loads((self.directory / plan.file).read_text()),
    }

  def finished(self, plan: Plan) -> bool:
    """Whether it was trained as long as planned, and asked what is to be asked."""
    if not ((self.directory / plan.file).exists() and self.seconds.exists()):
      return False
    result = self.result(plan)
    asked = json.loads(json.dumps(plan.asked))
    return (result.get("steps"), result.get("asked")) == (plan.steps, asked)


def run(
    study: Study,
    gin_files: Sequence[str],
    bindings: Sequence[str],
    plan: Callable[[Sequence[str], Sequence[str]], Plan],
) -> list[report.Result]:
  """Trains and evaluates every model of every seed, and writes the report.

  Args:
    study: what to compare.
    gin_files: of the base run, which the models' arguments are stacked on.
    bindings: NAME=VALUE of the command line; they win over the models' files.
    plan: of a run with given gin files and bindings; raises UserError if they cannot be run.

  Returns:
    The results, those of a failed run left out.

  Raises:
    UserError: a run cannot be started as it is described, or its directory belongs to another
      configuration: nothing was started then. Or a run failed; the line says where its log is.
    TerminatedError: SIGTERM has ended it, and the runs under way have saved what they have.
  """
  study.validate()
  root = pathlib.Path(study.run_dir)
  jobs = [
      _job(study, name, seed, gin_files, bindings, root)
      for seed in study.seeds
      for name in study.models
  ]
  plans = {job: _plan(job, plan) for job in jobs}
  with locks.held(root, "study directory"):
    return _run(study, jobs, plans, root, gin_files, bindings)


def _run(
    study: Study,
    jobs: Sequence[_Job],
    plans: dict[_Job, Plan],
    root: pathlib.Path,
    gin_files: Sequence[str],
    bindings: Sequence[str],
) -> list[report.Result]:
  """Trains and evaluates in a directory that no other process uses. See `run`."""
  started = time.time()
  print(f"{len(jobs)} runs, {study.parallel} at a time; logs: {root}/*.log", flush=True)
  shares = _core_shares(study.parallel)
  idle = list(range(study.parallel))
  lock = threading.Lock()

  def work(job: _Job) -> str | None:
    with lock:
      worker = idle.pop()
    try:
      return _run_job(job, plans[job], shares[worker], started, children)
    finally:
      with lock:
        idle.append(worker)

  with _Children() as children, concurrent.futures.ThreadPoolExecutor(study.parallel) as pool:
    try:
      failures = [f for f in pool.map(work, jobs) if f]
    except BaseException:  # Ctrl-C
      children.terminate()
      raise
  if children.terminated:
    raise TerminatedError(
        f"SIGTERM: the runs of {root} have saved what they have; the same command goes on from there"
    )
  results = [job.result(plans[job]) for job in jobs if job.finished(plans[job])]
  if results:
    command = [*(f"--gin_file={f}" for f in gin_files), *(f"--gin.{b}" for b in bindings)]
    _write(study, results, command, time.time() - started)
  if failures:
    raise UserError("; ".join(failures))
  return results


def _job(study, name, seed, gin_files, bindings, root) -> _Job:
  directory = root / _directory_name(name, seed)
  own = [a for a in study.models[name] if a.endswith(".gin")]
  own_bindings = [a for a in study.models[name] if not a.endswith(".gin")]
  values = (*own_bindings, *bindings, f"RUN_DIR={directory}", f"SEED={seed}")
  return _Job(name, seed, directory, (*gin_files, *own), values)


def _plan(job: _Job, plan) -> Plan:
  try:
    return plan(job.gin_files, job.bindings)
  except UserError as e:
    raise UserError(f"{job.label}: {e}") from e


def _directory_name(name: str, seed: int) -> str:
  return f"{re.sub(r'[^a-z0-9.]+', '-', name.lower()).strip('-')}-{seed}"


class _Children:
  """The processes of the runs under way; SIGTERM is passed on to them.

  Attributes:
    terminated: SIGTERM has come, and no more processes are started.
  """

  def __init__(self):
    self.terminated = False
    self._processes: list[subprocess.Popen] = []
    self._lock = threading.Lock()

  def __enter__(self):
    self._before = None
    if threading.current_thread() is threading.main_thread():
      self._before = signal.signal(signal.SIGTERM, self.terminate)
    return self

  def __exit__(self, *_):
    if self._before is not None:
      signal.signal(signal.SIGTERM, self._before)

  def start(self, arguments: Sequence[str]) -> subprocess.Popen | None:
    """Starts a process with a pipe; None once SIGTERM has come."""
    with self._lock:
      if self.terminated:
        return None
      process = subprocess.Popen(
          arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
          env={**os.environ, "PYTHONUNBUFFERED": "1"},
      )  # fmt: skip
      self._processes.append(process)
      return process

  def terminate(self, *_) -> None:
    """Ends the processes, which save what they have, and starts no more."""
    with self._lock:  # of the main thread, which never starts a process itself
      self.terminated = True
      for process in self._processes:
        process.terminate()


def _run_job(
    job: _Job, plan: Plan, cores: Sequence[int], started: float, children: _Children
) -> str | None:
  """Trains and evaluates; returns what went wrong, if anything did."""
  say = lambda text: print(f"[{time.time() - started:5.0f} s] {job.label}: {text}", flush=True)
  if job.finished(plan):
    say("done before")
    return None
  for command in ("train", "eval"):
    began = time.time()
    arguments = [sys.executable, "-m", "famjax.cli", command]
    arguments += [f"--gin_file={f}" for f in job.gin_files] + [f"--gin.{v}" for v in job.bindings]
    arguments += ["--trust_code"] * trust.trusts_code()
    process = children.start(arguments)
    if process is None:
      return None
    say({"train": "training", "eval": "evaluating"}[command])
    with job.log.open("a") as log:
      _pin(process.pid, cores)
      last = ""
      for line in process.stdout:
        log.write(line)
        log.flush()
        last = line.strip() or last
        if line.startswith("step "):
          say(line.strip())
    status = process.wait()
    if command == "train":
      before = float(job.seconds.read_text()) if job.seconds.exists() else 0.0
      job.seconds.write_text(f"{before + time.time() - began:.1f}\n")
    if status:
      say(f"failed: {last}")
      return f"{job.label} failed ({last}); its log is {job.log}"
  if not job.finished(plan):
    steps = job.result(plan).get("steps")
    return (
        f"{job.label} has {steps} steps of training, and {plan.steps} were asked for: name another"
        f" directory than {job.directory}"
    )
  result = job.result(plan)
  unit = report.unit(result)
  say("  ".join(f"{n} {unit} {a:.2f}" for n, a in result["accuracy"].items()))
  return None


def _core_shares(parallel: int) -> list[list[int]]:
  """Parts of the cores that this process may use, one for each worker; empty: no part."""
  if parallel == 1 or not hasattr(os, "sched_getaffinity"):
    return [[] for _ in range(parallel)]
  cores = sorted(os.sched_getaffinity(0))
  if len(cores) < parallel:
    return [[] for _ in range(parallel)]
  size = len(cores) // parallel
  return [cores[i * size : (i + 1) * size] for i in range(parallel)]


def _pin(pid: int, cores: Sequence[int]) -> None:
  """Keeps a child on its cores: two programs of one thread are faster than two that share two.

  From outside, before the child has started threads: code between fork and exec can deadlock.
  """
  if cores:
    with contextlib.suppress(ProcessLookupError):  # it has ended already
      os.sched_setaffinity(pid, cores)


def _write(study: Study, results, command, seconds: float) -> None:
  """Writes report.json, the plot, the table and a sample, and shows table and sample."""
  root = pathlib.Path(study.report_dir or study.run_dir)
  name = {"blocks": "passkey", "tokens": "accuracy"}[report.unit(results[0])]
  plot = root / f"{name}.png"
  report.plot(results, plot, study.title)
  table = report.table(results)
  sample = _sample(study, pathlib.Path(study.run_dir))
  report.write_json(root / "report.json", {
      "title": study.title,
      "command": ["famjax", "study", *command],
      "machine": report.machine(),
      "seconds": round(seconds, 1),
      "sample": sample,
      "results": results,
  })  # fmt: skip
  (root / f"{name}.md").write_text(table + "\n")
  print(f"\n{table}\n\nreport: {root / 'report.json'}   plot: {plot}", flush=True)


def _sample(study: Study, root: pathlib.Path) -> dict[str, str] | None:
  """Streams how the first model goes on from the prompt, and returns it."""
  if not study.prompt:
    return None
  from famjax.inference.model import load  # pylint: disable=g-import-not-at-top

  name, seed = next(iter(study.models)), study.seeds[0]
  directory = root / _directory_name(name, seed)
  if not (directory / report.PASSKEY).exists():  # its run failed
    return None
  model = load(str(directory))
  print(f"\n{name} goes on after the bar:\n{study.prompt} |", end="", flush=True)
  pieces = []
  for piece in model.generate(study.prompt, max_new_tokens=study.sample_tokens):
    print(piece, end="", flush=True)
    pieces.append(piece)
  print(flush=True)
  return {"prompt": study.prompt, "continuation": "".join(pieces)}
