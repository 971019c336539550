"""The command line: `famjax COMMAND ...`.

A command is a function that adds its parser and sets `run`, a function of the parsed arguments to
an exit status. It imports what it needs when it runs, so that `famjax --help` costs nothing.

Exit status: 0 done; 1 the run diverged, or the step does not fit; 2 bad input; 70 an error of the
program or of another process, with its traceback; 74 a full disk or a place out of reach; 130
interrupted; 141 standard output was closed (train, eval, study and bench continue instead); 143
ended by SIGTERM, or by a notice of preemption, and to be started again.
"""

import argparse
import contextlib
import importlib
import pathlib
import sys
import traceback

import famjax
from famjax import compile_cache, console, trust
from famjax.errors import DivergedError, TerminatedError, UserError

_INFERENCE = "famjax.inference.commands"


def main(argv: list[str] | None = None) -> int:
  """Runs a command; bad input is one line on stderr.

  Args:
    argv: arguments without the program's name; None: those of the process.

  Returns:
    The exit status.
  """
  argv = sys.argv[1:] if argv is None else argv
  gin_bindings = [a.removeprefix("--gin.") for a in argv if a.startswith("--gin.")]
  arguments = _parser().parse_args([a for a in argv if not a.startswith("--gin.")])
  arguments.gin = gin_bindings
  try:
    compile_cache.enable(arguments.compile_cache, arguments.compile_cache_gb)
    with contextlib.ExitStack() as stack:
      stack.enter_context(trust.code(arguments.trust_code))
      if arguments.survives:
        stack.enter_context(console.surviving())
      status = arguments.run(arguments)
      if sys.stdout is not None:
        sys.stdout.flush()  # a pipe that was closed shows here, and not when Python ends
      return status
  except UserError as e:
    return _fail(e, 2)
  except (FileExistsError, FileNotFoundError, NotADirectoryError, IsADirectoryError) as e:
    return _fail(e, 2)
  except BrokenPipeError as e:  # `famjax generate ... | head`: nobody wants the rest
    return _fail(e, 74) if arguments.survives else _nobody_reads()
  except OSError as e:  # a full disk, a bucket that is out of reach: it may go better later
    return _fail(e, 74)
  except DivergedError as e:
    return _fail(e, 1)
  except TerminatedError as e:
    return _fail(e, 143)
  except KeyboardInterrupt:
    return _fail("interrupted", 130)
  except Exception:  # pylint: disable=broad-exception-caught
    traceback.print_exc()  # Python's own status for it, 1, means something here
    return 70


def _nobody_reads() -> int:
  """Ends quietly, as other programs do when their output pipe closes."""
  console.silence(sys.stdout)
  console.silence(sys.stderr)
  return 141


def _fail(error: Exception | str, status: int) -> int:
  print(f"famjax: error: {error}", file=sys.stderr)
  return status


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
      prog="famjax", description="TransformerFAM in JAX: a decoder with a feedback working memory."
  )
  parser.add_argument("--version", action="version", version=f"famjax {famjax.__version__}")
  commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
  for add in (
      _add_train, _add_eval, _add_harness, _add_study, _add_generate, _add_score, _add_look,
      _add_chat, _add_convert, _add_compile, _add_bench,
  ):  # fmt: skip
    add(commands)
  for name, command in commands.choices.items():
    _add_common_options(command)
    # What leaves its result in a directory goes on when its terminal or pipe is gone.
    command.set_defaults(survives=name in ("train", "eval", "study", "bench"))
  return parser


def _add_common_options(parser: argparse.ArgumentParser) -> None:
  """Options of every command."""
  parser.add_argument(
      "--trust_code", action="store_true",
      help="let a model's directory name Python code as its memory, and run that code",
  )  # fmt: skip
  parser.add_argument(
      "--compile_cache", metavar="DIR",
      help="directory for compiled programs, or off (default: $FAMJAX_COMPILE_CACHE, or"
      " ~/.cache/famjax/compiled)",
  )  # fmt: skip
  parser.add_argument(
      "--compile_cache_gb", type=float, default=2.0, metavar="GB",
      help="largest size of that directory (default: 2)",
  )  # fmt: skip


def _add_gin_options(parser: argparse.ArgumentParser) -> None:
  """Options of a command that is configured by gin."""
  parser.add_argument(
      "--gin_file", action="append", default=[], metavar="FILE",
      help="a gin file; give several to stack them, later ones win",
  )  # fmt: skip
  parser.add_argument(
      "--gin.NAME", dest="_", metavar="VALUE",
      help="sets a name that the files use, such as --gin.BATCH_SIZE=8 or"
      " --gin.OptimizerConfig.learning_rate=1e-3; a plain string needs no quotes",
  )  # fmt: skip


def _add_train(commands) -> None:
  parser = commands.add_parser(
      "train", help="train a model, or go on with a run",
      description="Trains what gin files describe. The same command goes on with a run that was"
      " stopped. Example: famjax train --gin_file=gin/runs/long_text.gin --gin.RUN_DIR=runs/first",
  )  # fmt: skip
  _add_gin_options(parser)
  parser.add_argument(
      "--distributed", action="store_true",
      help="one of several processes that train together, as on every machine of a TPU slice",
  )  # fmt: skip
  parser.set_defaults(run=_train)


def _train(arguments: argparse.Namespace) -> int:
  if not arguments.gin_file:
    raise UserError("train needs a run: add --gin_file=gin/runs/long_text.gin, or another run file")
  if arguments.distributed:
    from famjax.parallel import processes  # pylint: disable=import-outside-toplevel

    processes.connect()
  from famjax import configuration  # pylint: disable=import-outside-toplevel

  configuration.configure(arguments.gin_file, arguments.gin)
  result = configuration.train_from_gin(arguments.gin)
  return 143 if result.terminated else 0


def _add_eval(commands) -> None:
  parser = commands.add_parser(
      "eval", help="ask a trained model about long texts",
      description="With --checkpoint, asks its model questions about texts that are made, in constant"
      " memory: famjax eval --gin_file=gin/eval/ruler.gin --checkpoint=runs/first. It goes on where it"
      " was stopped. Without, asks the newest checkpoint of a run for pass keys, or what its"
      " Measurement.evaluation says, and takes the arguments that trained the run.",
  )  # fmt: skip
  _add_gin_options(parser)
  parser.add_argument("--checkpoint", metavar="DIR", help="a run's or a Hugging Face directory")
  parser.add_argument("--out", metavar="DIR", help="of the report; else eval/ in the checkpoint's")
  parser.set_defaults(run=_eval)


def _eval(arguments: argparse.Namespace) -> int:
  if not arguments.gin_file:
    raise UserError(
        "eval needs the files that trained the run, or gin/eval/ruler.gin and --checkpoint=DIR: add"
        " --gin_file=..."
    )
  from famjax import configuration  # pylint: disable=import-outside-toplevel

  configuration.configure(arguments.gin_file, arguments.gin)
  if arguments.checkpoint:
    name = pathlib.Path(arguments.gin_file[-1]).stem
    print(configuration.measure_from_gin(arguments.checkpoint, arguments.out, name))
    return 0
  from famjax.evaluation import report  # pylint: disable=import-outside-toplevel

  result = configuration.evaluate_from_gin()
  for length, accuracy in result["accuracy"].items():
    print(f"{length:>6} {report.unit(result)}  {accuracy:.3f}")
  return 0


def _add_harness(commands) -> None:
  parser = commands.add_parser(
      "harness", help="ask a model what the lm-evaluation-harness asks",
      description="Runs tasks of EleutherAI's lm-evaluation-harness (extra eval), texts of any length"
      " in constant memory. Example: famjax harness --checkpoint=runs/first --tasks=niah_single_1"
      ' --metadata=\'{"max_seq_lengths": [4096]}\' --limit=20',
  )  # fmt: skip
  parser.add_argument(
      "--checkpoint", required=True, metavar="DIR", help="a run's or a Hugging Face directory"
  )
  parser.add_argument("--tasks", required=True, metavar="NAME,...", help="tasks, groups, or tags")
  parser.add_argument("--include_path", metavar="DIR", help="of your own tasks' YAML files")
  parser.add_argument("--num_fewshot", type=int, metavar="N", help="examples before each question")
  parser.add_argument(
      "--limit", type=float, metavar="N", help="questions of each task; below 1: the share of them"
  )
  parser.add_argument("--batch_size", type=int, default=8, metavar="B", help="side by side (8)")
  parser.add_argument(
      "--apply_chat_template", action="store_true", help="questions by the model's chat template"
  )
  parser.add_argument(
      "--metadata", default="{}", metavar="JSON",
      help='what tasks are told, such as {"max_seq_lengths": [4096], "tokenizer": "DIR"} for RULER\'s;'
      " the tokenizer is the model's own, if that is one of Hugging Face",
  )  # fmt: skip
  parser.add_argument("--out", metavar="DIR", help="where results.json is left")
  parser.set_defaults(run=_not_by_gin("famjax.evaluation.harness", "harness"))


def _add_study(commands) -> None:
  parser = commands.add_parser(
      "study", help="train and compare several models on several seeds",
      description="Trains every model and seed of a study, asks each for pass keys, and writes"
      " report.json, a table and a plot. The same command goes on with a study that was stopped."
      " Example: famjax study --gin_file=gin/runs/quickstart.gin",
  )  # fmt: skip
  _add_gin_options(parser)
  parser.set_defaults(run=_study)


def _study(arguments: argparse.Namespace) -> int:
  if not arguments.gin_file:
    raise UserError("study needs a study: add --gin_file=gin/runs/quickstart.gin, or another")
  from famjax import configuration  # pylint: disable=import-outside-toplevel

  for binding in arguments.gin:
    name = binding.partition("=")[0]
    if name in ("RUN_DIR", "SEED"):
      raise UserError(
          f"--gin.{name}: a study sets it for each of its runs; set"
          f" {dict(RUN_DIR='STUDY_DIR', SEED='SEEDS')[name]}"
      )
  # Each run of a study gets a directory of its own; this process trains nothing.
  configuration.configure(arguments.gin_file, ["RUN_DIR=none", *arguments.gin])
  configuration.study_from_gin(arguments.gin_file, arguments.gin)
  return 0


def _add_generate(commands) -> None:
  parser = commands.add_parser(
      "generate", help="go on from a prompt, a file, or standard input",
      description="Reads a text of any length in constant memory and writes what comes next."
      ' Example: famjax generate runs/quickstart/fam-0 --prompt="The pass key is"',
  )  # fmt: skip
  _add_model(parser)
  parser.add_argument("--prompt", metavar="TEXT", help="text to read first")
  parser.add_argument("--file", metavar="FILE", help="a UTF-8 file to read first; - is standard input")
  parser.add_argument(
      "--jsonl", metavar="FILE",
      help='a request a line, {"prompt": "...", "temperature": 0.7}; writes a line for each. In'
      ' place of a prompt: {"messages": [{"role": "user", "content": "..."}]}, where the model has a'
      " chat template",
  )  # fmt: skip
  parser.add_argument(
      "--batch_size", type=int, default=8, metavar="B", help="lines of --jsonl side by side"
  )
  _add_session(parser)
  _add_sampling(parser)
  parser.set_defaults(run=_not_by_gin(_INFERENCE, "generate"))


def _add_text(parser: argparse.ArgumentParser) -> None:
  """Options of a command that reads one text."""
  parser.add_argument("--text", metavar="TEXT", help="the text")
  parser.add_argument("--file", metavar="FILE", help="a UTF-8 file; - is standard input")


def _add_score(commands) -> None:
  parser = commands.add_parser(
      "score", help="say how probable a text is",
      description="Reads a text of any length in constant memory, and says how well it was foreseen."
      " Example: famjax score runs/books --file=book.txt",
  )  # fmt: skip
  _add_model(parser)
  _add_text(parser)
  parser.add_argument("--tokens", action="store_true", help="a JSON line for every token")
  parser.set_defaults(run=_not_by_gin(_INFERENCE, "score"))


def _add_look(commands) -> None:
  parser = commands.add_parser(
      "look", help="see how a FAM is written and read",
      description="Reads a text and draws what attention does with the FAM, layer by layer (Fig. 11)."
      " Example: famjax look runs/books --file=book.txt --out=runs/books/look",
  )  # fmt: skip
  _add_model(parser)
  _add_text(parser)
  parser.add_argument("--blocks", type=int, default=8, help="of the text that are read (8)")
  parser.add_argument("--out", metavar="DIR", default="look", help="of fam.json and fam.png (look)")
  parser.set_defaults(run=_not_by_gin("famjax.evaluation.diagnostics", "command"))


def _add_chat(commands) -> None:
  parser = commands.add_parser(
      "chat", help="talk with a model that remembers all of it in constant memory",
      description="Every line is read after all that was read and written before; /help in it lists"
      " its commands.",
  )  # fmt: skip
  _add_model(parser)
  parser.add_argument(
      "--turn", metavar="TEXT",
      help="what the model reads for a line that is typed, {}: 'User: {}\\nModel:', say; without it"
      " the model's own chat template, or else the line as it is",
  )  # fmt: skip
  _add_session(parser)
  _add_sampling(parser)
  parser.set_defaults(run=_not_by_gin(_INFERENCE, "chat"))


def _add_convert(commands) -> None:
  parser = commands.add_parser(
      "convert", help="take a model from Hugging Face, or give one back",
      description="Makes a famjax checkpoint of a directory of the Hugging Face hub, or of a LoRA"
      " adapter of PEFT and its base, or the other way round. Example: famjax convert --from=hf"
      " --src=SmolLM2-135M --dst=runs/smollm2",
  )  # fmt: skip
  kinds = ["hf", "peft"]
  parser.add_argument("--from", dest="source", choices=kinds, help="what --src is, if not famjax's")
  parser.add_argument("--to", dest="target", choices=kinds, help="what --dst is, if not famjax's")
  parser.add_argument("--src", required=True, metavar="DIR", help="the model; stays as it is")
  parser.add_argument("--dst", required=True, metavar="DIR", help="a new directory")
  parser.add_argument(
      "--base", metavar="MODEL",
      help="with peft: the model that LoRA is added to, a directory; for --to=peft also a name on the"
      " hub, which the adapter then carries",
  )  # fmt: skip
  parser.add_argument(
      "--resize_vocabulary", action="store_true",
      help="with --from=hf: grow embedding and head to all ids of the tokenizer; new rows are the mean"
      " of the old ones",
  )  # fmt: skip
  parser.add_argument(
      "--allow_nonfinite", action="store_true",
      help="with hf: take weights that are NaN or infinite",
  )  # fmt: skip
  parser.set_defaults(run=_not_by_gin("famjax.conversion", "convert"))


def _add_compile(commands) -> None:
  parser = commands.add_parser(
      "compile", help="see whether a step fits a TPU slice, without one",
      description="Compiles the real step of a run for a TPU slice, which need not be here, and says"
      " what it needs of a chip's memory and what chips send one another. Nothing is measured. Exit"
      " status 1: it does not fit. Example: famjax compile --topology=v5e:4x8"
      " --gin_file=gin/runs/finetune_flan.gin --gin_file=gin/models/flan_1b.gin"
      " --gin.ModelConfig.vocab_size=256000",
  )  # fmt: skip
  _add_gin_options(parser)
  parser.add_argument(
      "--topology", required=True, metavar="NAME", help="generation and chips of a slice: v5e:4x8"
  )
  parser.add_argument("--slices", type=int, default=1, metavar="N", help="slices of that shape (1)")
  parser.add_argument(
      "--step", choices=("train", "prefill", "decode"), default="train", help="what is compiled (train)"
  )
  parser.add_argument("--out", metavar="DIR", help="where report.json is left")
  parser.set_defaults(run=_compile)


def _compile(arguments: argparse.Namespace) -> int:
  if not arguments.gin_file:
    raise UserError("compile needs a run: add --gin_file=gin/runs/finetune_flan.gin, or another")
  from famjax import compilation  # pylint: disable=import-outside-toplevel

  return compilation.compile_command(arguments)


def _add_bench(commands) -> None:
  parser = commands.add_parser(
      "bench", help="measure training, prefill and decoding on this machine",
      description="Times steps of a random model with a FAM, without it, and with full attention, by"
      " length, beside the floor that the machine's own rates set. It goes on where it was stopped."
      " Example: taskset -c 0 famjax bench --gin_file=gin/bench/small.gin --out=runs/bench",
  )  # fmt: skip
  _add_gin_options(parser)
  parser.add_argument("--out", metavar="DIR", default="runs/bench", help="of the report (runs/bench)")
  parser.set_defaults(run=_bench)


def _bench(arguments: argparse.Namespace) -> int:
  if not arguments.gin_file:
    raise UserError("bench needs a model: add --gin_file=gin/bench/small.gin, or another")
  from famjax import configuration  # pylint: disable=import-outside-toplevel
  from famjax.bench import measure  # pylint: disable=import-outside-toplevel

  configuration.configure(arguments.gin_file, arguments.gin)
  return measure.command(configuration.bench_from_gin(), arguments)


def _add_model(parser: argparse.ArgumentParser) -> None:
  parser.add_argument(
      "model", metavar="MODEL", help="directory of a run, a checkpoint or a Hugging Face model"
  )


def _add_session(parser: argparse.ArgumentParser) -> None:
  parser.add_argument(
      "--session", metavar="DIR",
      help="what is remembered is taken up from this directory and saved there afterwards",
  )  # fmt: skip


def _add_sampling(parser: argparse.ArgumentParser) -> None:
  for name, kind, default, text in (
      ("max_new_tokens", int, 100, "at most so many tokens"),
      ("temperature", float, 0.0, "0 takes the likeliest token"),
      ("top_k", int, 0, "only the k likeliest tokens; 0: all"),
      ("top_p", float, 1.0, "only the likeliest tokens that together reach p; 1: all"),
      ("min_p", float, 0.0, "only tokens at least so probable, beside the likeliest; 0: all"),
      ("repetition_penalty", float, 1.0, "above 1: tokens that were there before are less likely"),
      ("seed", int, 0, "the same seed gives the same text"),
  ):
    parser.add_argument(
        f"--{name}", type=kind, default=default, metavar="N", help=f"{text} ({default})"
    )
  parser.add_argument(
      "--stop", action="append", default=[], metavar="TEXT", help="ends the text; may be repeated"
  )
  parser.add_argument(
      "--stop_token", dest="stop_tokens", action="append", type=int, default=[], metavar="ID",
      help="a token that ends the text, as the vocabulary's end symbol does; may be repeated",
  )  # fmt: skip


def _not_by_gin(module: str, name: str):
  """A command that is the function `name` of a module, and refuses gin's bindings."""

  def run(arguments: argparse.Namespace) -> int:
    if arguments.gin:
      raise UserError(f"--gin.{arguments.gin[0]}: {name} is not configured by gin; see --help")
    return getattr(importlib.import_module(module), name)(arguments)

  return run


if __name__ == "__main__":
  sys.exit(main())
