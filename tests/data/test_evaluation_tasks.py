"""The paper's 30 tasks on small files in the data sets' own formats: what is asked, and metrics."""

import json

import numpy as np
import pytest

seqio = pytest.importorskip("seqio", reason="the core runs without it")
import tensorflow as tf  # pylint: disable=wrong-import-position
import tensorflow_datasets as tfds

from famjax.data import evaluation_tasks  # pylint: disable=wrong-import-position
from famjax.data.evaluation_tasks import GPT3, LONG_CONTEXT, TASKS
from famjax.data.prompts import Generated, Ranked
from famjax.data.vocabularies import load_vocabulary
from famjax.errors import UserError
from tests.convert import tiny
from tests.data import gpt3_files, long_context_files

BYTES = load_vocabulary("bytes")
RANKED = [name for name, spec in TASKS.items() if isinstance(spec, Ranked)]
GENERATED = [name for name, spec in TASKS.items() if isinstance(spec, Generated)]
_NLI = "It rains.\nquestion: It is wet. true, false, or neither?\nanswer:"
_ANLI = (_NLI, [" true", " neither", " false"], 0)
_ARC = ("Question: What melts ice?\nAnswer:", [" cold", " wind", " heat"], 2)
_ARTICLE = gpt3_files.RACE["article"]
_RACE = (
    f"Article:\n{_ARTICLE}\n\nQuestion: Which \\1 colour is Kit?\n\nAnswer:",
    [" Black", " Red", " Blue", " Green"], 0,
)  # fmt: skip
_CUP = "The cup is not in the box since "
# Of each ranked task one question as it is asked, its options and the right one; and the score of
# one who takes the first option of every question.
ASKED = {
    "hellaswag": ("Candles: She lights a candle. she",
    [" dies.", " flies.", " blows it out.", " is a tree."], 2, 50),
    "story_cloze": ("Bob was ill. He lay down. He slept. It was night.",
    [" He got well.", " He was a fish."], 0, 50),
    "winograd": ([_CUP + "the cup", _CUP + "the box"], [" is too big."] * 2, 0, 100),
    "winogrande": (["Ann paid Bob, since Ann", "Ann paid Bob, since Bob"], [" had money."] * 2, 0,
    50),
    "race_m": (*_RACE, 50),
    "race_h": (*_RACE, 50),
    "piqa": ("To dry hair", [" use soap.", " use a towel."], 1, 50),
    "arc_e": (*_ARC, 50),
    "arc_c": (*_ARC, 50),
    "openbookqa": ("D is", [f" option {c}" for c in "ABCD"], 3, 0),
    "boolq": ("Ice is cold.\nquestion: is ice cold?\nanswer:", [" no", " yes"], 1, 50),
    "copa": ("The floor was wet because", [" it was dark.", " the pipe broke."], 1, 50),
    "rte": ("Rome is big.\nquestion: Rome is small. True or False?\nanswer:", [" True", " False"],
    1, 50),
    "wic": (
        "A river bank.\nThe bank lends.\nquestion: Is the word 'bank' used in the same way in the two"
        " sentences above?\nanswer:", [" no", " yes"], 0, 50,
    ),
    "multirc": (
        "Sentence 1: Tom ate a pear. He slept.\n\nWhat did Tom do?\n-",
        [" [False] ran", " [True] ran"], 0, 0,
    ),
    "wsc": (
        "Passage: Ann thanked Bob as he helped.\nQuestion: In the passage above, does the pronoun \"he\""
        " refer to \"Bob\"?\nAnswer:", [" no", " yes"], 1, 50,
    ),
    "record": (
        "Ann met Bob in Rome.\n- Ann is a cook\n-",
        [f" The cook {name} likes it." for name in ("Ann", "Bob", "Rome")], 0, 100,
    ),
    "cb": (
        "It rains\nquestion: it is dry. true, false, or neither?\nanswer:",
        [" true", " false", " neither"], 1,
        100 / 3,
    ),
    **{f"anli_r{i}": (*_ANLI, 100 / 3) for i in (1, 2, 3)},
    "quality": (
        f"{long_context_files.ARTICLE}\n\nQuestion: Where?\nAnswer:",
        [" At sea", " At home", " In bed", " In a barn"], 3, 0,
    ),
}  # fmt: skip
_PAPER = "On Boats\n\nWe look at boats.\n\nIntroduction\n\nBoats float.\n\nStones sink.\n\n" \
    + long_context_files.PAPER["full_text"][1]["paragraphs"][0]  # fmt: skip
# Of each generated task one question and its answers; what is said to every question, its scores.
WRITTEN = {
    "trivia_qa": (
        "Q: Who wrote Hamlet?\nA:", ["William Shakespeare", "Shakespeare", "The Bard"],
        " the bard.\nQ: Who else?", {"em": 100, "f1": 100},
    ),
    "natural_questions": (
        "Q: where is rome\nA:", ["Italy", "in Italy"], " near Italy", {"em": 0, "f1": 200 / 3},
    ),
    "web_questions": ("Q: what is up?\nA:", ["The Sky", "Nothing"], "sky", {"em": 100, "f1": 100}),
    "squad_v2": (
        "Title: Rome\n\nBackground: Rome is in Italy.\n\nQuestion: Who built Rome? If the background does"
        " not say it, the answer is: unanswerable.\n\nAnswer:", ["unanswerable"],
        " Italy", {"em": 50, "f1": 50},
    ),
    "lambada": (
        "he opened the door and closed the", ["door"], " Door, and then", {"em": 50, "f1": 50},
    ),
    "narrativeqa": (
        f"{long_context_files.STORY}caf\ufffd\n\nQuestion: Whose was it?\nAnswer:",
            ["Her boat it was", "Ida's"],
        " boat was\nand more", {"rougeL": 200 / 3},  # two of four words, and no other
    ),
    "qasper": (
        f"{_PAPER}\n\nQuestion: Do boats sink?\nAnswer:", ["No", "Unanswerable"],
        "Yes", {"f1": 100 / 3, "em": 100 / 3},
    ),
    "xlsum": (
        "It rained 1 days.\n\nSummary:", ["Rain falls on Rome"], "Rain on Rome",
        {"rouge1": 600 / 7, "rougeL": 600 / 7, "rouge2": 40},
    ),
}  # fmt: skip


@pytest.fixture(name="tasks", scope="module")
def _tasks(tmp_path_factory):
  """All tasks, on small files, with the vocabulary of bytes."""
  directory = tmp_path_factory.mktemp("data")
  gpt3_files.prepare_all(directory, [TASKS[name].source for name in GPT3])
  tasks = evaluation_tasks.register(directory=str(directory))
  yield {task.name: task for task in tasks}
  for task in tasks:
    seqio.TaskRegistry.remove(task.name)


def examples_of(task):
  evaluation_tasks.prepare(task, TASKS[task.name].split)
  dataset = task.get_dataset(None, TASKS[task.name].split, shuffle=False)
  return list(dataset.as_numpy_iterator())


def decode(tokens):
  assert tokens.dtype == np.int32
  return BYTES.decode(tokens.tolist())


def measure(task, examples, outputs):
  """As seqio's evaluator does."""
  targets = [task.postprocess_fn(None, example=x, is_target=True) for x in examples]
  outputs = [task.postprocess_fn(y, example=x, is_target=False) for x, y in zip(examples, outputs)]
  return {k: v for metric in task.metric_fns for k, v in metric(targets, outputs).items()}


def test_they_are_those_of_table_12():
  assert len(GPT3) == 26 and len(LONG_CONTEXT) == 4 and len(TASKS) == 30
  assert len(set(RANKED) & set(GPT3)) == 21 and len(set(GENERATED) & set(GPT3)) == 5
  assert set(ASKED) == set(RANKED) and set(WRITTEN) == set(GENERATED)


@pytest.mark.parametrize("name", RANKED)
@pytest.mark.filterwarnings("ignore:Only one class")
def test_ranked(tasks, name):
  task, (prompt, options, right, first) = tasks[name], ASKED[name]
  examples = examples_of(task)
  text = lambda x, field: x[f"{field}_pretokenized"].decode()
  questions = {}
  for x in examples:
    assert decode(x["inputs"]) == text(x, "inputs") and decode(x["targets"]) == text(x, "targets")
    questions.setdefault(x["idx"][0], []).append(x)
  prompts = [prompt] * len(options) if isinstance(prompt, str) else prompt
  expected = [(p, o, i == right) for i, (p, o) in enumerate(zip(prompts, options))]
  words = lambda x: (text(x, "inputs"), text(x, "targets"), bool(x["is_correct"]))
  assert expected in [list(map(words, question)) for question in questions.values()]
  score = TASKS[name].score
  assert measure(task, examples, [float(x["is_correct"]) for x in examples])[score] == 100
  taken = [-float(x["idx"][1]) for x in examples]
  assert measure(task, examples, taken)[score] == pytest.approx(first)


@pytest.mark.parametrize("name", GENERATED)
def test_generated(tasks, name):
  task, (prompt, answers, said, scores) = tasks[name], WRITTEN[name]
  examples = examples_of(task)
  asked = {x["inputs_pretokenized"].decode(): [a.decode() for a in x["answers"]] for x in examples}
  assert asked[prompt] == answers
  x = examples[0]
  assert decode(x["targets"]) == x["targets_pretokenized"].decode() == f" {x['answers'][0].decode()}"
  found = measure(task, examples, [said] * len(examples))
  for metric, score in scores.items():
    assert found[metric] == pytest.approx(score), metric
  assert TASKS[name].score in found
  right = [x["answers"][-1].decode() + "\nmore" for x in examples]
  assert measure(task, examples, right)[TASKS[name].score] == pytest.approx(100)


def test_multirc_has_an_f1_over_all_answers(tasks):
  examples = examples_of(tasks["multirc"])
  found = measure(tasks["multirc"], examples, [float(x["idx"][1]) for x in examples])
  # Always "true" of labels 1, 0, 1: two of three are right, and none is missed.
  assert found["accuracy"] == pytest.approx(200 / 3) and found["f1"] == pytest.approx(80)


def test_options_by_the_token(tasks):
  examples = [x for x in examples_of(tasks["piqa"]) if b"hair" in x["inputs_pretokenized"]]
  lengths = [len(x["targets"]) for x in examples]
  assert lengths == [10, 13]  # the longer one is right
  scores = [-10.0, -12.0]
  assert measure(tasks["piqa"], examples, scores)["accuracy"] == 0
  spec = TASKS["piqa"]
  _, (metric,), postprocess = evaluation_tasks._ranked(spec,
  per_token=True)  # pylint: disable=protected-access
  targets = [postprocess(None, example=x, is_target=True) for x in examples]
  assert metric(targets, scores)["accuracy"] == 100


def options(vocabulary, *texts):
  """Their tokens as the tasks have them."""
  (preprocess,) = evaluation_tasks._options(vocabulary, True)  # pylint: disable=protected-access
  alone = ({"targets_pretokenized": t, "targets": np.array(vocabulary.encode(t), np.int32)} for t in texts)
  kinds = {"targets_pretokenized": tf.TensorSpec([], tf.string), "targets": tf.TensorSpec([None], tf.int32)}
  dataset = tf.data.Dataset.from_generator(lambda: alone, output_signature=kinds)
  return [x["targets"].tolist() for x in preprocess(dataset).as_numpy_iterator()]


def test_options_without_a_space_have_none_and_no_option_is_empty(tmp_path):
  tiny.save_tokenizer(tmp_path, "the cup. the cat is a cat.", adds_space=True)
  spaced = load_vocabulary(str(tmp_path))
  assert spaced.encode(".") == spaced.encode(" .")  # it cannot say one without
  dot, word, nothing = options(spaced, ".", " cat", "")
  assert spaced.decode(spaced.encode("the cup") + dot) == spaced.decode(spaced.encode("the cup."))
  assert dot != spaced.encode(".") and word == spaced.encode(" cat") and nothing == [spaced.eos_id]
  assert options(BYTES, "'s", " a", "") == [BYTES.encode("'s"), BYTES.encode(" a"), [BYTES.eos_id]]


def test_copa_leaves_i_large():
  asked = {"premise": "I ran.", "question": "effect", "choice1": "I fell.", "choice2": "It rained."}
  (choice,) = TASKS["copa"].ask(asked | {"label": 0})
  assert choice.options == [" I fell.", " it rained."]


def test_a_prediction_is_held_to_the_nearest_reference():
  targets = [["a b c d", "x y"], ["x y", "p q r"]]
  found = evaluation_tasks.rouge(targets, ["x z", "x z"])
  assert found == {"rouge1": pytest.approx(50), "rougeL": pytest.approx(50), "rouge2": 0}


def test_stories_that_are_not_there_are_left_out_and_films_are_text(tasks, capsys):
  assert len(examples_of(tasks["narrativeqa"])) == 2
  assert "1 stories of the test set are not in" in capsys.readouterr().err
  (film,) = tasks["narrativeqa"].get_dataset(None, "train", shuffle=False).as_numpy_iterator()
  assert film["inputs_pretokenized"].startswith(b"INT. SHIP\nTom & Ida row.\n\nQuestion: Who rows?")


def test_answers_of_papers(tasks):
  answers = [[a.decode() for a in x["answers"]] for x in examples_of(tasks["qasper"])]
  assert answers == [["12, boats", "a dozen"], ["Yes"], ["No", "Unanswerable"]]


def test_what_is_missing_is_named(tasks, tmp_path, monkeypatch):
  quality, piqa = evaluation_tasks.register(("quality", "piqa"), directory=str(tmp_path))
  with pytest.raises(UserError, match=r"no quality/QuALITY.v\*.htmlstripped.dev in .*nyu-mll"):
    evaluation_tasks.prepare(quality, "validation")

  def fail(*args, **kwargs):
    raise ConnectionError("no network\nat all")

  monkeypatch.setattr(tfds.download.DownloadManager, "download_and_extract", fail)
  with pytest.raises(UserError, match="'piqa': piqa/.* TFDS cannot fetch it: no network$"):
    evaluation_tasks.prepare(piqa, "validation")
  (nowhere,) = evaluation_tasks.register(("xlsum",))
  with pytest.raises(UserError, match="set DATA_DIR; it comes from https://github.com/csebuetnlp"):
    evaluation_tasks.prepare(nowhere, "test")
  with pytest.raises(UserError, match="'piqa' has no split 'test'; use one of: train, validation"):
    evaluation_tasks.prepare(tasks["piqa"], "test")
  with pytest.raises(UserError, match="'helaswag' is unknown; there is hellaswag"):
    evaluation_tasks.spec_of("helaswag")


def test_names_and_prompts_need_no_tensorflow():
  spec = TASKS["squad_v2"]
  asked = {"title": "t", "context": "c {x}", "question": "q?", "answers": {"text": []}}
  ((prompt, answers),) = spec.ask(json.loads(json.dumps(asked)))
  assert prompt.startswith("Title: t\n\nBackground: c {x}\n\nQuestion: q?")
  assert answers == ["unanswerable"]
