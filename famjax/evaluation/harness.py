"""A model as EleutherAI's lm-evaluation-harness asks for one; needs the extra `eval`.

    famjax harness --checkpoint=runs/books --tasks=lambada_openai,wikitext

or in Python:

    import famjax.evaluation.harness
    import lm_eval

    lm_eval.simple_evaluate(model="famjax", model_args="checkpoint=runs/books", tasks=["wikitext"])

A text of any length is read once, as it is, in constant memory: none is cut into windows.
"""

import argparse
import dataclasses
import json
import pathlib
from typing import Any

import numpy as np
from tqdm import tqdm

from famjax.data.chat_templates import ChatTemplate, Message
from famjax.data.tokenizers import TokenizerVocabulary
from famjax.data.vocabularies import begin_ids, begun, Vocabulary
from famjax.errors import UserError
from famjax.inference.continuations import batches
from famjax.inference.generation import Request
from famjax.inference.model import load, Model
from famjax.inference.sampling import Sampling
from famjax.training.metrics import write_text

try:
  import lm_eval
  from lm_eval.api.instance import Instance
  from lm_eval.api.model import TemplateLM
  from lm_eval.api.registry import register_model
  from lm_eval.tasks import TaskManager
  from lm_eval.utils import handle_non_serializable, make_table
except ModuleNotFoundError as missing:
  raise UserError(f"{missing}: the harness needs pip install 'famjax[eval]'") from missing

_MOST = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # the first wins
_SAMPLING = ("top_k", "top_p", "min_p", "repetition_penalty")
_KNOWN = {*_MOST, *_SAMPLING, "until", "do_sample", "temperature", "num_beams"}


def request_of(settings: dict[str, Any], max_gen_toks: int = 256, seed: int = 0) -> Request:
  """What a task's `generation_kwargs` ask for.

  Args:
    settings: `until`, `do_sample`, `temperature` and so on. Those that are None are not there.
    max_gen_toks: of a task that does not say it.
    seed: of the draws.

  Raises:
    UserError: a setting that is not known here.
  """
  settings = {name: value for name, value in settings.items() if value is not None}
  for name, value in settings.items():
    if name not in _KNOWN or (name == "num_beams" and value != 1):
      raise UserError(f"generation_kwargs: {name}={value!r} is not known here: leave it out")
  until, sample = settings.get("until", ()), settings.get("do_sample")
  until = (until,) if isinstance(until, str) else until
  # Without do_sample, a temperature alone asks for draws; with it, 1 is Hugging Face's default.
  temperature = 0.0 if sample is False else settings.get("temperature", 1.0 if sample else 0.0)
  others = {name: settings[name] for name in _SAMPLING if name in settings}
  most = next((settings[name] for name in _MOST if name in settings), max_gen_toks)
  sampling = Sampling(temperature, seed=seed, **others)
  return Request(int(most), sampling, tuple(filter(None, until)))


@register_model("famjax")
class HarnessModel(TemplateLM):
  """What the harness calls.

  Attributes:
    model: that is asked.
    batch_size: requests side by side.
    max_gen_toks: tokens that are written, at most, where a task does not say it.
    seed: of the first request's draws; every other has the next one.
  """

  def __init__(
      self,
      checkpoint: str | Model,
      batch_size: int | str = 8,
      max_gen_toks: int = 256,
      seed: int = 0,
  ):
    """Loads a model.

    Args:
      checkpoint: as `famjax.load` takes it, or a model that is there.
      batch_size, max_gen_toks, seed: see the attributes.

    Raises:
      UserError: no checkpoint there, or a batch size that is no number.
    """
    super().__init__()
    if not str(batch_size).isdecimal() or not int(batch_size):
      raise UserError(f"batch_size is {batch_size!r}: give a whole number, at least 1")
    self.model = checkpoint if isinstance(checkpoint, Model) else load(str(checkpoint))
    self.batch_size, self.max_gen_toks, self.seed = int(batch_size), max_gen_toks, seed

  @property
  def eot_token_id(self) -> int:
    """Id of the end of a text."""
    return self.model.vocabulary.eos_id

  @property
  def prefix_token_id(self) -> int:
    """What stands before a text that begins: the symbol for it, or else the end of another."""
    return [self.eot_token_id, *begin_ids(self.model.vocabulary)][-1]

  def tok_encode(
      self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
  ) -> list[int]:
    """Tokens of a text; one that begins has what the vocabulary puts there, once.

    Args:
      string: may have it already, as what a chat template gives has.
      add_special_tokens: False: it does not begin.
      **kwargs: of other models.
    """
    del kwargs
    tokens = self.model.vocabulary.encode(string)
    return tokens if add_special_tokens is False else begun(self.model.vocabulary, tokens)

  def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **kwargs):
    """`loglikelihood` of ((context, text), tokens of the context, tokens of the text)."""
    asked = [request[0] for request in requests]
    pairs = [(context or [self.prefix_token_id], text) for _, context, text in requests]
    answer = lambda scores: (scores.log_prob, bool(scores.likeliest.all()))
    return self._scored("loglikelihood", asked, pairs, answer, disable_tqdm)

  def loglikelihood_rolling(
      self, requests: list[Instance], disable_tqdm: bool = False
  ) -> list[float]:
    """Log-probabilities of whole texts after the prefix token, each read once."""
    asked = [request.args for request in requests]
    encode = lambda text: np.asarray(self.tok_encode(text, add_special_tokens=False), np.int32)
    pairs = [([self.prefix_token_id], encode(text)) for (text,) in asked]
    answer = lambda scores: scores.log_prob
    return self._scored("loglikelihood_rolling", asked, pairs, answer, disable_tqdm)

  def _scored(self, kind, asked, pairs, answer, disable_tqdm):
    answers = [None] * len(pairs)
    scored = self.model.scores_after(pairs, self.batch_size)
    for i, scores in tqdm(scored, total=len(pairs), desc=kind, disable=disable_tqdm):
      answers[i] = answer(scores)
      self.cache_hook.add_partial(kind, asked[i], answers[i])
    return answers

  def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
    """What the model writes after contexts of any length, without the string that ended it.

    Raises:
      UserError: see `request_of`.
    """
    asked = [request.args for request in requests]
    wanted = [
        request_of(settings, self.max_gen_toks, self.seed + i)
        for i, (_, settings) in enumerate(asked)
    ]
    answers, begin = [""] * len(asked), [self.prefix_token_id]
    order = sorted(range(len(asked)), key=lambda i: len(asked[i][0]), reverse=True)
    B = min(self.batch_size, len(asked))
    with tqdm(total=len(asked), desc="generate_until", disable=disable_tqdm) as bar:
      for some in batches(order, B):
        spare = B - len(some)  # rows that write nothing
        prompts = [self.tok_encode(asked[i][0]) or begin for i in some] + [begin] * spare
        limits = [wanted[i] for i in some] + [Request(max_new_tokens=0)] * spare
        for i, completion in zip(some, self.model.complete(prompts, limits)):
          answers[i] = completion.text
          self.cache_hook.add_partial("generate_until", asked[i], answers[i])
        bar.update(len(some))
    return answers

  @property
  def _template(self) -> ChatTemplate:
    template = getattr(self.model.vocabulary, "chat_template", None)
    if template is None:
      raise UserError("the model has no chat template: leave apply_chat_template out")
    return template

  def apply_chat_template(
      self, chat_history: list[Message], add_generation_prompt: bool = True
  ) -> str:
    """The text of a talk.

    Args:
      chat_history: its messages. Where the template refuses a system's, that is left out.
      add_generation_prompt: with what stands before an answer. False: the last message is one that
        has begun, and the text ends where it does.

    Raises:
      UserError: no template, or it refuses the messages.
    """
    try:
      text = self._template.render(chat_history, add_generation_prompt)
    except UserError:
      others = [message for message in chat_history if message["role"] != "system"]
      if len(others) in (0, len(chat_history)):
        raise
      text = self._template.render(others, add_generation_prompt)
    if add_generation_prompt:
      return text
    begun = chat_history[-1]["content"].strip()
    return text[: text.rindex(begun) + len(begun)]

  def chat_template(self, chat_template: bool | str = False) -> str | None:
    """The template's source; None where none is asked for."""
    return self._template.source if chat_template else None

  @property
  def tokenizer_name(self) -> str:
    """Stands for the vocabulary in the names of the harness's caches."""
    vocabulary = self.model.vocabulary
    return getattr(vocabulary, "path", type(vocabulary).__name__).replace("/", "__")

  def get_model_info(self) -> dict[str, Any]:
    """What the harness writes down of the model beside its results."""
    memory = dataclasses.asdict(self.model.config.memory)
    return {"model_sha": self.model.fingerprint, "model_memory": memory}


def metadata_of(vocabulary: Vocabulary, given: str) -> dict[str, Any]:
  """What tasks are told: `given`, JSON, and the tokenizer by which RULER's count, if it has a name.

  Raises:
    UserError: it is no JSON object.
  """
  try:
    told = json.loads(given)
  except ValueError as error:
    raise UserError(f"--metadata={given} is no JSON ({error}): give an object") from error
  if not isinstance(told, dict):
    raise UserError(f"--metadata={given} is no JSON object: give one, {{...}}")
  named = isinstance(vocabulary, TokenizerVocabulary)
  return ({"tokenizer": vocabulary.path} if named else {}) | told


def harness(arguments: argparse.Namespace) -> int:
  """`famjax harness`: prints the harness's own table, and leaves its results in `--out`."""
  model = load(arguments.checkpoint)
  metadata = metadata_of(model.vocabulary, arguments.metadata)
  manager = TaskManager(include_path=arguments.include_path, metadata=metadata)
  tasks = arguments.tasks.split(",")
  for task in tasks:
    if not manager.match_tasks([task]):
      raise UserError(f"--tasks: {task!r} is not known; add --include_path=DIR for your own")
  results = lm_eval.simple_evaluate(
      HarnessModel(model, arguments.batch_size),
      tasks=tasks,
      num_fewshot=arguments.num_fewshot,
      batch_size=arguments.batch_size,
      limit=arguments.limit,
      apply_chat_template=arguments.apply_chat_template,
      task_manager=manager,
      log_samples=False,
  )
  results["config"] |= {"model": "famjax", "model_args": {"checkpoint": arguments.checkpoint}}
  if arguments.out:
    out = pathlib.Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(results, indent=2, default=handle_non_serializable, ensure_ascii=False)
    write_text(out / "results.json", text + "\n")
  print(make_table(results))
  if results.get("groups"):
    print(make_table(results, "groups"))
  return 0
