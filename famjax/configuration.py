"""gin at the edge: which names a gin file can use, and how files and command line become a run.

Nothing else in famjax knows gin. Files are stacked in the order in which they are given, and then
the command line's `--gin.NAME=VALUE`; a later value replaces an earlier one. UPPERCASE names are
macros: what a run file offers to be set.
"""

import ast
import collections.abc
from collections.abc import Sequence
import contextlib
import copy
import dataclasses
import difflib
import functools
import inspect
import logging
import os
import re
import sys
import tokenize
import types
import typing
from typing import Any

import gin

from famjax import data, gin_paths
from famjax.bench.measure import Bench
from famjax.errors import UserError
from famjax.evaluation import documents, passkey, questions, report, study, tasks
from famjax.evaluation.record import Evaluation, Measurement, measure_run
from famjax.model.config import MemoryConfig, ModelConfig
from famjax.parallel.mesh import MeshConfig
from famjax.parallel.placement import AxisRules
from famjax.training.adoption import model_of
from famjax.training.checks import check
from famjax.training.config import TrainConfig
from famjax.training.loop import TrainResult, train
from famjax.training.optimizer import OptimizerConfig


def vocabulary_size(name: str, multiple_of: int = 1) -> int:
  """Entries of a vocabulary, rounded up, for `ModelConfig.vocab_size`.

  Args:
    name: see `famjax.data.load_vocabulary`.
    multiple_of: rows of the embedding that fit the hardware's tiles: 128 on a TPU.
  """
  return -(-data.load_vocabulary(name).vocab_size // multiple_of) * multiple_of


CONFIGURABLE = {
    thing.__name__: thing
    for thing in (
        train, TrainConfig, ModelConfig, MemoryConfig, OptimizerConfig, MeshConfig, AxisRules,
        data.load_vocabulary, vocabulary_size, model_of,
        data.PassKeyExamples, data.Lengths, data.LongText, data.PairFiles, data.TaskExamples,
        data.ExampleReader, data.PackedReader, data.FollowingReader,
        data.QuestionExamples, passkey.PassKeyEval, study.Study,
        Measurement, questions.QuestionEval, documents.DocumentEval, tasks.TaskEval,
        Bench,
    )
}  # fmt: skip


def configure(gin_files: list[str], bindings: list[str], unneeded: Sequence[str] = ()) -> None:
  """Reads gin files and then bindings, in place of whatever gin held before.

  Args:
    gin_files: paths, from the working directory or the root of famjax.
    bindings: "NAME=VALUE" each; see `quoted` for a VALUE that is a plain string.
    unneeded: macros that need not be set, although the files say so; they become "none".

  Raises:
    UserError: a file is missing, a name is unknown, a value is missing.
  """
  gin.clear_config()
  texts = []
  for path in gin_files:
    texts += gin_paths.read_all(path)
    with _gin_errors():
      gin.parse_config_file(path)
  offered = {name for text in texts for name in (*_DEFINED.findall(text), *_macros(text))}
  for binding in bindings:
    name, equals, value = binding.partition("=")
    if not equals:
      raise UserError(f"--gin.{binding} has no value: write --gin.{name}=VALUE")
    if re.fullmatch(r"\w+", name) and name not in offered:
      raise UserError(f"no gin file of this run uses the name {name!r}{_near(name, offered)}")
    texts.append(f"{name} = {quoted(value)}")
    with _gin_errors(f"--gin.{binding}: "):
      gin.parse_config(texts[-1])
  for name in unneeded:
    if re.search(rf"^{name} = %gin.REQUIRED$", gin.config_str(), re.M):
      gin.parse_config(f"{name} = 'none'")
  _check_macros({name for text in texts for name in _macros(text)})
  with _gin_errors():
    gin.finalize()


def train_from_gin(bindings: Sequence[str] = ()) -> TrainResult:
  """Runs `train` with the arguments that `configure` has given it.

  Names that `bindings` set and nothing uses get a line: a study gives all of its runs the same
  ones, so that they are no error.
  """
  arguments = train_arguments()
  check(**arguments, settings=operative_settings)
  for name in _unused(bindings):
    print(f"famjax: note: --gin.{name}: nothing in this run uses it", file=sys.stderr)
  return train(**arguments, settings=operative_settings)


def evaluate_from_gin() -> dict[str, Any]:
  """Asks the model of `train.run_dir` what `Measurement.evaluation` says; without, for pass keys.

  Returns:
    What it leaves in `measured.json` or `passkey.json`: see `record.measure_run` and
    `passkey.evaluate_run`.
  """
  arguments = train_arguments()
  check(**arguments, settings=operative_settings)
  asked = _asked()
  evaluate = passkey.evaluate_run if isinstance(asked, passkey.PassKeyEval) else measure_run
  with gin.unlock_config():  # see `measure_from_gin`
    return evaluate(arguments["run_dir"], asked, arguments["train_reader"])


def _asked() -> passkey.PassKeyEval | Evaluation:
  """What `famjax eval` asks of a run."""
  try:
    gin.query_parameter("Measurement.evaluation")
  except ValueError:  # nothing is bound to it
    with _gin_errors(kinds=()):
      return gin.get_configurable("PassKeyEval")()
  with _gin_errors(kinds=()):
    return gin.get_configurable("Measurement")().evaluation


def measure_from_gin(checkpoint: str, out: str | None, name: str) -> str:
  """Measures a checkpoint's model as the gin files say; see `record.Measurement`."""
  with _gin_errors(kinds=()):
    measurement = gin.get_configurable("Measurement")()
  with gin.unlock_config():  # t5 gives gin names of its own when a task imports it
    return measurement.of(checkpoint, out, name)


def study_from_gin(gin_files: list[str], bindings: list[str]) -> None:
  """Runs the `Study` that the files describe; its runs are given the same files and bindings."""
  with _gin_errors(kinds=()):
    what = gin.get_configurable("Study")()
  study.run(what, gin_files, bindings, plan)


def plan(gin_files: list[str], bindings: list[str]) -> study.Plan:
  """What `famjax train` and then `famjax eval` would do with the same arguments.

  Raises:
    UserError: they could not.
  """
  configure(gin_files, bindings)
  arguments = train_arguments()
  run = check(**arguments, settings=operative_settings)
  asked = _asked()
  if isinstance(asked, passkey.PassKeyEval):
    asked.check(arguments["train_reader"].vocabulary, arguments["model"].memory)
    file = report.PASSKEY
  else:
    asked.validate()
    file = report.MEASURED
  return study.Plan(run["train"]["train_steps"], dataclasses.asdict(asked), file)


def run_from_gin(gin_files: list[str], bindings: list[str]) -> dict[str, Any]:
  """A run without its data and its directory, which may be missing: the fields of `compilation.Run`."""
  configure(gin_files, bindings, unneeded=("RUN_DIR", "DATA", "INITIAL_CHECKPOINT"))

  def value(name, default=None):
    try:
      bound = gin.query_parameter(name)
    except ValueError:  # nothing is bound to it
      return default
    with _gin_errors(kinds=()):
      return copy.deepcopy(bound)  # gin calls what it refers to

  try:
    reader = gin.query_parameter("train.train_reader").selector  # its data need not be here
  except (ValueError, AttributeError):
    reader = "no reader"
  return {
      "model": value("train.model"),
      "optimizer": value("train.optimizer", OptimizerConfig()),
      "config": value("train.config", TrainConfig()),
      "mesh": value("train.mesh", MeshConfig()),
      "rules": value("train.rules", AxisRules()),
      "batch_size": value(f"{reader}.batch_size"),
      "length": value(f"{reader}.length"),
  }


def bench_from_gin() -> Bench:
  """What `famjax bench` measures."""
  with _gin_errors(kinds=()):
    return gin.get_configurable("Bench")()


def _unused(bindings: Sequence[str]) -> list[str]:
  """Names among `bindings` that the run has not used, once it has been built."""
  used = operative_settings()
  names = [binding.partition("=")[0] for binding in bindings]
  evaluation = tuple(  # of other commands
      f"{name}."
      for name, thing in CONFIGURABLE.items()
      if thing.__module__.startswith("famjax.evaluation.")
  )
  return [n for n in names if "." in n and n not in used and not n.startswith(evaluation)]


def train_arguments() -> dict[str, Any]:
  """What `configure` has given `train`, by its arguments' names.

  Raises:
    UserError: gin cannot make them, or the data is not of the vocabulary that is named.
  """
  with _gin_errors(kinds=()):
    arguments = gin.get_configurable("train")()
  name = arguments.get("vocabulary", "bytes")
  named = data.load_vocabulary(name)
  for reader in filter(None, (arguments["train_reader"], arguments.get("eval_reader"))):
    theirs = reader.vocabulary
    if theirs.vocab_size != named.vocab_size or theirs.encode(_PROBE) != named.encode(_PROBE):
      raise UserError(
          f"train.vocabulary is {name!r}, and the data is made of other tokens: a checkpoint would"
          " vouch for the wrong one; set VOCABULARY to that of the data"
      )
  return arguments


def operative_settings() -> dict[str, str]:
  """Every setting that this run has used so far, by name, as gin text with macros put in."""
  text = gin.operative_config_str(max_line_length=10**6)
  settings = dict(re.findall(r"^([\w./]+) = (.*?)\n(?=\S|\n|\Z)", text + "\n", re.M | re.S))
  macros = {name: value for name, value in settings.items() if "." not in name}
  put_in = lambda m: macros.get(m[1], repr(m[1])) if m[1] else m[0]
  while any(map(_macros, settings.values())):
    settings = {name: _MACRO.sub(put_in, value) for name, value in settings.items()}
  return {name: value for name, value in settings.items() if "." in name}


def quoted(value: str) -> str:
  """A value from the command line as gin text: what is no gin value is a string.

  Numbers, True, None, quoted strings, tuples, lists, dicts, `@references` and `%MACROS` stay; so
  `/data/books` needs no quotes of its own.
  """
  with contextlib.suppress(ValueError, SyntaxError, MemoryError, RecursionError):
    literal = ast.literal_eval(_REFERENCE.sub("None", value))
    return value.strip() if _REFERENCE.search(value) else repr(literal)
  return repr(value)


_DEFINED = re.compile(r"^(\w+)\s*=", re.M)
# A macro, or a string in quotes, which may hold what looks like one: group 1 is empty there.
_MACRO = re.compile(r"'(?:[^'\\\n]|\\.)*'|\"(?:[^\"\\\n]|\\.)*\"|%(\w+)\b(?!\.)")
_REFERENCE = re.compile(r"(?<![\w/.])[@%][A-Za-z_][\w./]*(\(\))?")


def _macros(text: str) -> list[str]:
  """Names of the macros that a gin text uses; not what stands in quotes."""
  return [name for name in _MACRO.findall(text) if name]


def _check_macros(used: set[str]) -> None:
  """Raises UserError for macros without a value, and for those that nothing ever used."""
  text = gin.config_str()
  values = dict(re.findall(r"^(\w+) = (.*)$", text, re.M))
  required = "%gin.REQUIRED"
  needed = set(_macros(text)) | set(values)
  missing = [name for name in sorted(needed) if values.get(name, required) == required]
  if missing:
    options = " ".join(f"--gin.{name}=..." for name in missing)
    raise UserError(f"{', '.join(missing)} must be set: add {options}")
  idle = sorted(set(values) - used)
  if idle:
    raise UserError(f"{', '.join(idle)} is set in a gin file, but nothing in this run uses it")


def _near(name: str, known) -> str:
  near = difflib.get_close_matches(name, known, n=3) or sorted(known)
  return f"; there is {', '.join(near)}" if near else ""


_PROBE = "The pass key is 71432. Naïve? 1 + 1 = 2."  # two vocabularies that agree on it are one
_PARSING = (ValueError, OSError, SyntaxError, ImportError, tokenize.TokenError)


@contextlib.contextmanager
def _gin_errors(where: str = "", kinds=_PARSING):
  """Turns what gin raises about names and files into one line."""
  logging.disable(logging.ERROR)  # gin logs a file that is missing, and then raises it
  try:
    yield
  except UserError as e:
    raise UserError(str(e).splitlines()[0]) from None  # gin has added where it was called
  except kinds as e:
    lines = [line.strip() for line in str(e).splitlines() if line.strip(" ^")]
    raise UserError(f"gin: {where}{' '.join(lines)}{_hint(lines[0])}") from None
  finally:
    logging.disable(logging.NOTSET)


def _hint(message: str) -> str:
  """What a message of gin's about an unknown name may have meant."""
  if unknown := re.match(r"No configurable matching (?:reference )?'@?([\w./]+)", message):
    return _near(unknown[1].split("/")[-1], CONFIGURABLE)
  if unknown := re.match(r"Configurable '(\w+)' doesn't have a parameter named '(\w+)'", message):
    return _near(unknown[2], _signature(CONFIGURABLE[unknown[1]]).parameters)
  return ""


def _signature(thing) -> inspect.Signature:
  """A signature in which `**kwargs` are replaced by the parameters of the base class."""
  parameters = {}
  for cls in inspect.getmro(thing) if inspect.isclass(thing) else (thing,):
    own = inspect.signature(cls).parameters.values() if cls is not object else ()
    named = [p for p in own if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    parameters |= {p.name: p for p in named if p.name not in parameters}
    if len(named) == len(own):
      break
  named_only = [p.replace(kind=p.KEYWORD_ONLY) for p in parameters.values()]
  return inspect.Signature(named_only)


_UNIONS = (types.UnionType, typing.Union)
_PLAIN = (int, float, str, bool, type(None), tuple, list, dict)  # what gin text can say


def _check_type(name: str, value: Any, hint: Any) -> None:
  """Raises UserError for a value of a type that its parameter does not take."""
  if not _fits(value, hint):
    raise UserError(f"{name} is {value!r}: it must be {_words(hint)}")


def _fits(value: Any, hint: Any) -> bool:
  origin, inner = typing.get_origin(hint), typing.get_args(hint)
  if origin in _UNIONS:
    return any(_fits(value, kind) for kind in inner)
  if hint in (Any, inspect.Parameter.empty):
    return True
  if hint in (int, float):  # True is no number here
    return type(value) in (int, hint)
  if origin is tuple and inner[-1] is not ...:
    many = isinstance(value, (tuple, list)) and len(value) == len(inner)
    return many and all(map(_fits, value, inner))
  if origin in (tuple, collections.abc.Sequence):
    return isinstance(value, (tuple, list)) and all(_fits(v, inner[0]) for v in value)
  if origin is dict:
    return isinstance(value, dict) and all(_fits(v, inner[1]) for v in value.values())
  if hint in _PLAIN:
    return isinstance(value, hint)
  return not isinstance(value, _PLAIN)  # an object: what kind of, it has to know


def _words(hint: Any) -> str:
  """A type as people say it."""
  inner = [kind for kind in typing.get_args(hint) if kind is not ...]
  if typing.get_origin(hint) in _UNIONS:  # a path is a str, in gin
    kinds = [kind for kind in inner if typing.get_origin(kind) is not os.PathLike]
    return " or ".join(map(_words, kinds))
  if typing.get_origin(hint) is tuple and len(inner) > 1:
    return f"({', '.join(map(_words, inner))})"
  if typing.get_origin(hint) in (tuple, collections.abc.Sequence):
    return f"several {_words(inner[0])}, as (a, b)"
  if hint is type(None):
    return "None"
  if typing.get_origin(hint) is dict or hint in _PLAIN:
    return getattr(hint, "__name__", "dict")
  return f"an object, as @{hint.__name__}()"


def _at_the_edge(name: str, thing):
  """`thing` with named parameters alone, which are checked when it is called."""
  signature = _signature(thing)
  hints = {p.name: p.annotation for p in signature.parameters.values()}

  @functools.wraps(thing, updated=())
  def call(**kwargs):
    for p in signature.parameters.values():
      if p.name not in kwargs and p.default is p.empty:
        raise UserError(f"{name}.{p.name} must be set: add --gin.{name}.{p.name}=...")
    for key, value in kwargs.items():
      _check_type(f"{name}.{key}", value, hints[key])
    return kwargs if thing is train else thing(**kwargs)

  del call.__wrapped__
  call.__signature__ = signature
  return call


for _name, _thing in CONFIGURABLE.items():
  gin.external_configurable(_at_the_edge(_name, _thing), name=_name)
gin_paths.register()
