"""What the lm-evaluation-harness is told equals slow sums over whole logits, without a network."""

import dataclasses
import functools
import importlib
import json
import pathlib
import socket
import sys

from flax import nnx
import lm_eval
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.tasks import TaskManager
import nltk
import numpy as np
import pytest

from famjax import cli
from famjax.data.tokenizers import TokenizerVocabulary
from famjax.errors import UserError
from famjax.evaluation import harness as harness_module
from famjax.evaluation.harness import HarnessModel, metadata_of, request_of
from famjax.inference import engine
from famjax.inference.generation import Request
from famjax.inference.model import Model
from famjax.inference.sampling import Sampling
from famjax.model.config import MemoryConfig
from famjax.model.decoder import Decoder
from tests.convert import tiny as hub
from tests.data import chats
from tests.inference import tiny

BATCH = 2
# Not the harness's own 14,000 tasks, which take seconds to list.
TASKS_OF = functools.partial(TaskManager, include_defaults=False)
RULER = pathlib.Path(lm_eval.__file__).parent / "tasks" / "ruler"
LONG = "The grass is green. The sky is blue. " * 30


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
  """Whoever reaches for a network is refused, and the test fails even if it goes on without."""
  tried = []

  def connect(self, address):
    tried.append(address)
    raise OSError(f"a test reaches for {address}")

  monkeypatch.setattr(socket.socket, "connect", connect)
  monkeypatch.setattr(socket, "getaddrinfo", lambda *address, **_: connect(None, address))
  yield
  assert not tried


@pytest.fixture(scope="module", name="model")
def _model():
  """A random model of bytes that finds letters, digits and the like likeliest: it writes text."""
  decoder = Decoder(tiny.CONFIG, rngs=nnx.Rngs(3))
  text = np.isin(np.arange(259), tiny.BYTES.encode("".join(map(chr, range(32, 127)))))
  decoder.head.kernel[...] = decoder.head.kernel[...] * text
  return Model(decoder, tiny.BYTES)


@pytest.fixture(scope="module", name="harness")
def _harness(model):
  return HarnessModel(model, BATCH)


def ask(kind, *arguments):
  """Requests as the harness makes them."""
  return [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]


def log_probs(model, tokens) -> np.ndarray:
  """float64 `[n - 1, V]` by one call of the model, of one shape whatever n is."""
  padded = np.pad(tokens, (0, len(LONG) + 32 - len(tokens)))
  logits, _ = model(padded[None], model.init_state())
  logits = np.asarray(logits[0, : len(tokens) - 1], np.float64)
  return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def total(model, context, text) -> float:
  """Sum of the log-probabilities of `text` after `context`, both of them tokens."""
  said = log_probs(model, [*context, *text])[len(context) - 1 :]
  return said[np.arange(len(text)), text].sum()


def test_log_likelihoods_are_sums_over_whole_logits(model, harness):
  pairs = [
      ("The sky is", " blue"), ("The sky is", " green, or is it not?"), (LONG, "The sky"),
      ("", "The end."), ("A space stays ", "whole"), ("  ", "x"), ("The sky is", "."),
  ]  # fmt: skip
  found = harness.loglikelihood(ask("loglikelihood", *pairs), disable_tqdm=True)
  for (context, text), (log_prob, _) in zip(pairs, found, strict=True):
    before, after = [tiny.BYTES.eos_id] * (not context.strip()), tiny.BYTES.encode(context + text)
    after = [*before, *after]  # bytes of whole and parts are the same
    n = len(tiny.BYTES.encode((context[len(context.rstrip()) :]) + text))
    # float32 logits, by other shapes: their last bits differ, and so do those of a sum.
    assert log_prob == pytest.approx(total(model, after[:-n], after[-n:]), rel=1e-5)


def test_greedy_is_what_the_model_would_have_written(model, harness):
  said = model.complete([tiny.BYTES.encode("The sky is")], Request(12))[0].text
  assert len(said) == 12
  other = said[:-1] + ("x" if said[-1] != "x" else "y")
  pairs = [("The sky is", said), ("The sky is", other), ("The sky is", said[:3])]
  found = harness.loglikelihood(ask("loglikelihood", *pairs), disable_tqdm=True)
  assert [greedy for _, greedy in found] == [True, False, True]


def test_a_context_is_read_once(harness, monkeypatch):
  read, before = [], engine.Engine.read

  def counted(self, rows, after, **options):
    read.extend(len(row) for row in rows if len(row))
    return before(self, rows, after, **options)

  monkeypatch.setattr(engine.Engine, "read", counted)
  choices = [("The sky is", f" {color}") for color in ("red", "green", "blue", "grey", "white")]
  harness.loglikelihood(ask("loglikelihood", *choices, ("It", " is")), disable_tqdm=True)
  assert read == [len("The sky is"), len("It")]


def test_documents_are_read_to_their_end(model, harness):
  """One too long for a chunk, one of nothing, more than a batch; and a long one in parts."""
  documents = [LONG, "", "Short.", LONG[::-1], LONG[:101]]
  found = harness.loglikelihood_rolling(
      ask("loglikelihood_rolling", *((d,) for d in documents)), disable_tqdm=True
  )
  for document, log_prob in zip(documents, found, strict=True):
    tokens = tiny.BYTES.encode(document)
    expected = total(model, [tiny.BYTES.eos_id], tokens) if tokens else 0.0
    assert log_prob == pytest.approx(expected, rel=1e-5)
  reading, parts = model.read([tiny.BYTES.eos_id]), 0.0
  for first in range(0, len(LONG), 333):
    score = model.score(LONG[first : first + 333], reading)
    parts, reading = parts + score.log_probs.sum(), score.reading
  assert found[0] == pytest.approx(parts, rel=1e-5)


def test_no_length_is_compiled_anew(harness):
  N = tiny.CONFIG.memory.block_size
  rolling = lambda *lengths: harness.loglikelihood_rolling(
      ask("loglikelihood_rolling", *(("a" * n,) for n in lengths)), disable_tqdm=True
  )
  rolling((2 * engine.CHUNK_BLOCKS - 1) * N + N - 2, 1)
  score = engine._score  # pylint: disable=protected-access
  sizes = score._cache_size()  # pylint: disable=protected-access
  rolling(20 * engine.CHUNK_BLOCKS * N + 3, 77, 5, 200, 12)
  assert score._cache_size() == sizes


def test_it_writes_what_the_model_writes(model, harness):
  whole = "".join(model.generate("The sky is", max_new_tokens=20))
  until = whole[6:8]
  hot = {"do_sample": True, "temperature": 0.7, "top_k": 20, "max_gen_toks": 9}
  asked = [
      ("The sky is", {"until": ["never", until], "max_gen_toks": 20}),
      ("The sky is", {"until": [], "max_gen_toks": 20, "temperature": 0.7, "do_sample": False}),
      (LONG, {"until": "\n\n", "max_gen_toks": 5}),
      ("It is", hot),
      ("It is", hot),
  ]
  found = harness.generate_until(ask("generate_until", *asked), disable_tqdm=True)
  assert found[0] == whole[: whole.index(until)] and found[1] == whole
  assert found[2] == "".join(model.generate(LONG, max_new_tokens=5, stop="\n\n"))
  drawn = lambda seed: "".join(
      model.generate("It is", max_new_tokens=9, temperature=0.7, top_k=20, seed=seed)
  )
  assert found[3:] == [drawn(3), drawn(4)] and drawn(3) != drawn(4)


@pytest.mark.parametrize(
    "settings, request_",
    [
        ({}, Request(256)),
        ({"until": ["a", ""], "max_new_tokens": 3}, Request(3, stop=("a",))),
        ({"until": "a", "max_gen_toks": 2, "max_tokens": 9}, Request(2, stop=("a",))),
        ({"until": None, "temperature": None, "top_p": None}, Request(256)),
        ({"temperature": 0.5}, Request(256, Sampling(0.5))),
        ({"do_sample": True, "min_p": 0.1}, Request(256, Sampling(1.0, min_p=0.1))),
        ({"do_sample": False, "temperature": 0.5, "num_beams": 1}, Request(256)),
    ],
)
def test_settings_of_a_task(settings, request_):
  assert request_of(settings) == request_


@pytest.mark.parametrize("settings", [{"num_beams": 4}, {"typical_p": 0.9}])
def test_settings_that_are_not_known(settings):
  with pytest.raises(UserError, match=f"{min(settings)}=.* is not known here"):
    request_of(settings)


@pytest.mark.parametrize("batch_size", ["auto", 0, -1, "2.5"])
def test_batch_sizes_that_are_none(model, batch_size):
  with pytest.raises(UserError, match="batch_size is .*: give a whole number"):
    HarnessModel(model, batch_size)


def test_an_ordinary_decoder_reads_as_far_as_its_context():
  config = dataclasses.replace(tiny.CONFIG, memory=MemoryConfig("full", 4, 5))  # of 24 tokens
  harness = HarnessModel(Model(Decoder(config, rngs=nnx.Rngs(0)), tiny.BYTES))
  score = lambda n: harness.loglikelihood(ask("loglikelihood", ("a" * n, "b")), disable_tqdm=True)
  assert np.isfinite(score(23)[0][0])
  with pytest.raises(UserError, match="25 tokens are more than the 24"):
    score(24)


def talker(directory, template) -> HarnessModel:
  """A random model of a directory with a tokenizer and a chat template."""
  hub.save_tokenizer(directory, LONG)
  chats.save(directory, template)
  vocabulary = TokenizerVocabulary(str(directory))
  config = dataclasses.replace(tiny.CONFIG, vocab_size=vocabulary.vocab_size)
  return HarnessModel(Model(Decoder(config, rngs=nnx.Rngs(0)), vocabulary))


TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is blue?"},
]


def test_chat_templates(tmp_path):
  harness = talker(tmp_path, chats.LLAMA3)
  vocabulary = harness.model.vocabulary
  text = harness.apply_chat_template(TALK)
  assert text == vocabulary.render(TALK) and text.startswith("<s>")
  # The template has begun the text, and nothing begins it again; other texts are begun.
  assert harness.tok_encode(text) == vocabulary.encode(text)
  assert harness.tok_encode("is blue") == [1, *vocabulary.encode("is blue")]
  assert harness.tok_encode("is blue", add_special_tokens=False) == vocabulary.encode("is blue")
  assert harness.prefix_token_id == 1 and harness.eot_token_id == 2
  begun = [*TALK, {"role": "assistant", "content": "The sky "}]
  assert harness.apply_chat_template(begun, add_generation_prompt=False) == text + "The sky"
  assert harness.chat_template(True) == chats.LLAMA3 and harness.chat_template(False) is None
  assert harness.tokenizer_name == str(tmp_path).replace("/", "__")


def test_a_system_message_that_is_refused_is_left_out(tmp_path):
  harness = talker(tmp_path, chats.GEMMA)
  text = harness.apply_chat_template(TALK)
  assert text == harness.model.vocabulary.render(TALK[1:])
  with pytest.raises(UserError, match="must alternate"):
    harness.apply_chat_template([TALK[1], TALK[1]])


def test_no_chat_template(harness):
  with pytest.raises(UserError, match="no chat template"):
    harness.apply_chat_template(TALK)
  assert harness.tokenizer_name == "ByteVocabulary"


@pytest.fixture(scope="module", name="tasks")
def _tasks(tmp_path_factory):
  """A directory with two tasks over a file of questions."""
  directory = tmp_path_factory.mktemp("tasks")
  colors = ["green", "blue", "red"]
  things = ["grass", "sky", "rose"]
  rows = [{"thing": thing, "colors": colors, "right": i} for i, thing in enumerate(things)]
  (directory / "things.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  common = f"""\
dataset_path: json
dataset_kwargs: {{data_files: {{test: {directory}/things.jsonl}}, cache_dir: {directory}/cache}}
test_split: test
doc_to_text: "The {{{{thing}}}} is"
"""
  (directory / "choose.yaml").write_text(
      "task: famjax_choose\noutput_type: multiple_choice\n" + common + "doc_to_choice: colors\n"
      "doc_to_target: right\nmetric_list: [{metric: acc}, {metric: acc_norm}]\n"
  )
  (directory / "write.yaml").write_text(
      "task: famjax_write\noutput_type: generate_until\n" + common
      + 'doc_to_target: "{{colors[right]}}"\nmetric_list: [{metric: exact_match}]\n'
      "generation_kwargs: {until: [q, z], max_gen_toks: 6}\n"
  )  # fmt: skip
  return directory


def test_tasks_of_a_directory(model, tasks):
  result = lm_eval.simple_evaluate(
      HarnessModel(model, BATCH), tasks=["famjax_choose", "famjax_write"],
      task_manager=TASKS_OF(include_path=str(tasks)), bootstrap_iters=0,
  )  # fmt: skip
  encode, right = tiny.BYTES.encode, 0
  for sample in result["samples"]["famjax_choose"]:
    thing, colors = sample["doc"]["thing"], sample["doc"]["colors"]
    scores = [total(model, encode(f"The {thing} is"), encode(f" {color}")) for color in colors]
    right += int(np.argmax(scores)) == sample["target"]
  assert result["results"]["famjax_choose"]["acc,none"] == pytest.approx(right / 3)
  for sample in result["samples"]["famjax_write"]:
    prompt = f"The {sample['doc']['thing']} is"
    said = "".join(model.generate(prompt, max_new_tokens=6, stop=["q", "z"]))
    assert sample["resps"] == [[said]]
  assert result["config"]["model_sha"] == model.fingerprint
  assert result["config"]["model_memory"]["fam_length"] == tiny.CONFIG.memory.fam_length


def test_tasks_as_talks(tasks, tmp_path, monkeypatch):
  """With an answer that has begun, and with examples."""
  harness = talker(tmp_path, chats.CHATML)
  monkeypatch.setattr(HarnessModel, "generate_until", lambda _, requests: ["x"] * len(requests))
  (tmp_path / "begun.yaml").write_text(
      f"include: {tasks}/write.yaml\ntask: famjax_begun\ngen_prefix: 'It is'\n"
  )
  result = lm_eval.simple_evaluate(
      harness, tasks=["famjax_begun", "famjax_write"], apply_chat_template=True, num_fewshot=1,
      limit=1, task_manager=TASKS_OF(include_path=[str(tasks), str(tmp_path)]), bootstrap_iters=0,
  )  # fmt: skip
  render = harness.model.vocabulary.render
  user = lambda thing: {"role": "user", "content": f"The {thing} is"}
  for name, begun in (("famjax_write", ""), ("famjax_begun", "It is")):
    ((text, _),) = [s["arguments"][0] for s in result["samples"][name]]
    example = {"sky": "blue", "rose": "red"}
    talks = [
        [user(t), {"role": "assistant", "content": f"{begun} {c}".strip()}, user("grass")]
        for t, c in example.items()
    ]
    assert text in [render(talk) + begun for talk in talks]


def test_ruler(model, tmp_path, monkeypatch):
  """Its texts are made here, and counted by the tokenizer of bytes, which needs no file."""
  (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "ByT5Tokenizer"}')
  # The task looks for data that splits essays into sentences; this one has no essays.
  (tmp_path / "nltk/tokenizers/punkt_tab").mkdir(parents=True)
  monkeypatch.setattr(nltk.data, "path", [str(tmp_path / "nltk")])
  metadata = {"tokenizer": str(tmp_path), "max_seq_lengths": [4096]}
  result = lm_eval.simple_evaluate(
      HarnessModel(model, BATCH), tasks=["niah_single_1"], limit=BATCH, bootstrap_iters=0,
      task_manager=TASKS_OF(include_path=str(RULER), metadata=metadata),
  )  # fmt: skip
  samples = result["samples"]["niah_single_1"]
  contexts = [sample["arguments"][0][0] for sample in samples]
  assert all(2000 < len(context) < 4096 for context in contexts)
  prompts = [tiny.BYTES.encode(context) for context in contexts]
  said = model.complete(prompts, Request(128))
  assert [sample["resps"] for sample in samples] == [[[one.text]] for one in said]
  scores = [float(sample["doc"]["outputs"][0] in one.text) for sample, one in zip(samples, said)]
  assert result["results"]["niah_single_1"]["4096,none"] == np.mean(scores)


@pytest.fixture(scope="module", name="run")
def _run(tmp_path_factory):
  directory = tmp_path_factory.mktemp("run")
  tiny.save(directory, tiny.CONFIG)
  return directory


def test_what_tasks_are_told(tmp_path):
  hub.save_tokenizer(tmp_path, LONG)
  vocabulary = TokenizerVocabulary(str(tmp_path))
  assert metadata_of(vocabulary, '{"a": 1}') == {"tokenizer": str(tmp_path), "a": 1}
  assert metadata_of(vocabulary, '{"tokenizer": "other"}') == {"tokenizer": "other"}
  assert metadata_of(tiny.BYTES, "{}") == {}
  for wrong in ("{", "3"):
    with pytest.raises(UserError, match="is no JSON"):
      metadata_of(tiny.BYTES, wrong)


def test_it_is_made_of_a_checkpoint(run):
  made = get_model("famjax").create_from_arg_string(f"checkpoint={run},max_gen_toks=7,batch_size=2")
  assert isinstance(made, HarnessModel) and made.batch_size == 2
  asked = ask("generate_until", ("The sky is", {"until": []}))
  said = "".join(made.model.generate("The sky is", max_new_tokens=7))
  assert made.generate_until(asked, disable_tqdm=True) == [said]


def test_the_command(run, tasks, tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(harness_module, "TaskManager", TASKS_OF)
  command = ["harness", f"--checkpoint={run}", f"--include_path={tasks}", f"--out={tmp_path}"]
  assert cli.main([*command, "--tasks=famjax_choose", "--limit=2", "--batch_size=2"]) == 0
  assert "|famjax_choose|" in capsys.readouterr().out
  results = json.loads((tmp_path / "results.json").read_text())
  assert results["config"]["model_args"] == {"checkpoint": str(run)}
  assert results["n-samples"]["famjax_choose"] == {"original": 3, "effective": 2}
  assert results["results"]["famjax_choose"]["acc,none"] in (0, 0.5, 1)
  assert cli.main([*command, "--tasks=famjax_choose,nothing"]) == 2
  error = capsys.readouterr().err.splitlines()[-1]
  assert error.startswith("famjax: error: --tasks: 'nothing' is not known")
  assert cli.main([*command, "--tasks=famjax_choose", "--gin.A=1"]) == 2
  assert "--gin.A=1: harness is not configured by gin" in capsys.readouterr().err


def test_the_extra_is_named_where_it_is_missing(monkeypatch, capsys):
  monkeypatch.delitem(sys.modules, "famjax.evaluation.harness")
  monkeypatch.setitem(sys.modules, "lm_eval", None)
  with pytest.raises(UserError, match=r"pip install 'famjax\[eval\]'"):
    importlib.import_module("famjax.evaluation.harness")
  assert cli.main(["harness", "--checkpoint=nowhere", "--tasks=x"]) == 2
  assert capsys.readouterr().err.count("\n") == 1
