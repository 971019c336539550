"""Two questions of each GPT-3 task in its makers' own files, and TFDS's own reading of them.

`prepare` has TFDS's real builders make the data sets from these files, without a network: what is
tested is the features, splits and labels that they have.
"""

import json
import pathlib
from unittest import mock

from etils import epath
import gin
import tensorflow_datasets as tfds
import tree

from tests.data import long_context_files

RACE = {
    "id": "high1.txt", "article": "Tom has 3 cats. One of them, {Kit}, is black.",
    "questions": ["How many cats has Tom?", "Which \\1 colour is Kit?"],
    "options": [["One", "Two", "Three", "Four"], ["Black", "Red", "Blue", "Green"]],
    "answers": ["C", "A"],
}  # fmt: skip
ARC = [
    {
        "id": "a", "answerKey": "3", "question": {"stem": "What melts ice?", "choices": [
            {"label": "1", "text": "cold"}, {"label": "2", "text": "wind"},
             {"label": "3", "text": "heat"}
        ]},
    },
    {
        "id": "b", "answerKey": "A", "question": {"stem": "What do plants need?", "choices": [
            {"label": c, "text": t} for c, t in zip("ABCD", ("light", "salt", "noise", "coal"))
        ]},
    },
]  # fmt: skip
ANLI = [
    {"uid": "1", "context": "It rains.", "hypothesis": "It is wet.", "label": "e"},
    {"uid": "2", "context": "It rains.", "hypothesis": "It is dry.", "label": "c"},
    {"uid": "3", "context": "It rains.", "hypothesis": "It is May.", "label": "n"},
]
STORY = "InputStoryid,InputSentence1,InputSentence2,InputSentence3,InputSentence4," \
    "RandomFifthSentenceQuiz1,RandomFifthSentenceQuiz2,AnswerRightEnding\n" \
    "s1,Ann was hungry.,She had bread.,She cut it.,She sat down.,She flew away.,She ate.,2\n" \
    "s2,Bob was ill.,He lay down.,He slept.,It was night.,He got well.,He was a fish.,1\n"  # fmt: skip
TRIVIA = {
    "Question": "Who wrote Hamlet?", "QuestionId": "q1", "QuestionSource": "x", "Answer": {
        "Aliases": ["Shakespeare", "The Bard"], "NormalizedAliases": ["shakespeare", "bard"],
        "NormalizedValue": "william shakespeare", "Type": "WikipediaEntity",
        "Value": "William Shakespeare",
    },
}  # fmt: skip


def _trivia_file(article: dict) -> str:
  """As TFDS reads it: line by line, by the indentation of the original."""
  return json.dumps({"Data": [article]}, indent=4) + "\n"


def _squad(title: str, context: str, *asked: dict) -> str:
  paragraphs = [{"context": context, "qas": asked}]
  return json.dumps({"data": [{"title": title, "paragraphs": paragraphs}]})


def _lines(*rows: dict) -> str:
  return "".join(json.dumps(row) + "\n" for row in rows)


def _super_glue(name: str, *rows: dict) -> dict[str, str]:
  rows = [row | {"idx": i} for i, row in enumerate(rows)]
  return {f"{name}/{file}.jsonl": _lines(*rows) for file in ("train", "val", "test")}


def _all(names: str, text: str) -> dict[str, str]:
  return {name: text for name in names.split()}


_PEOPLE = "Ann met Bob in Rome.\n@highlight\nAnn is a cook"
_ENTITIES = [
    {"start": _PEOPLE.index(w), "end": _PEOPLE.index(w) + len(w) - 1}
    for w in ("Ann", "Bob", "Rome")
]
_HELLASWAG = [  # TFDS has splits by kind and by source, and none may be empty
    question | {"split_type": kind, "source_id": f"{source}~1"}
    for kind in ("indomain", "zeroshot")
    for source, question in (
        ("activitynet", {
            "ctx": "A man sits on a roof. he", "activity_label": "Roofing", "label": 0,
            "endings": ["starts to pull tiles.", "is a cat.", "eats it.", "sings."],
        }),
        ("wikihow", {
            "ctx": "She lights a candle. she", "activity_label": "Candles", "label": 2,
            "endings": ["dies.", "flies.", "blows it out.", "is a tree."],
        }),
    )
]  # fmt: skip
_BOOK = {"fact1": "f", "humanScore": "1.00", "clarity": "1.40", "turkIdAnonymized": "t"}

# Of each TFDS name: what a download has, by the path in it, or the key of a file among several.
FILES: dict[str, dict[str, str]] = {
    "hellaswag": _all("train validation test", _lines(*_HELLASWAG)),
    "story_cloze/2016": _all(
        "cloze_test_val__spring2016.csv cloze_test_test__spring2016.csv", STORY
    ),
    "winogrande": _all(
        " ".join(f"winogrande_1.1/{n}.jsonl" for n in (
            "train_xs", "train_s", "train_m", "train_l", "train_xl", "dev", "test"
        )),
        _lines(
            {"qID": "1", "sentence": "The cup fell off the box as the _ was small.",
             "option1": "cup", "option2": "box", "answer": "2"},
            {"qID": "2", "sentence": "Ann paid Bob, since _ had money.",
             "option1": "Ann", "option2": "Bob", "answer": "1"},
        ),
    ),
    **{
        f"race/{kind}": _all(
            " ".join(f"RACE/{split}/{kind}/1.txt" for split in ("train", "dev", "test")),
            json.dumps(RACE),
        )
        for kind in ("middle", "high")
    },
    "piqa": _all(
        "physicaliqa-train-dev/train.jsonl physicaliqa-train-dev/dev.jsonl",
        _lines(
            {"id": "1", "goal": "To open a jar", "sol1": "twist the lid.", "sol2": "eat the lid."},
            {"id": "2", "goal": "To dry hair", "sol1": "use soap.", "sol2": "use a towel."},
        ),
    ) | _all(
        "physicaliqa-train-dev/train-labels.lst physicaliqa-train-dev/dev-labels.lst", "0\n1\n"
    ),
    **{
        f"ai2_arc/{name}": _all(
            " ".join(f"ARC-V1-Feb2018-2/{name}/{name}-{s}.jsonl" for s in ("Train", "Dev", "Test")),
            _lines(*ARC),
        )
        for name in ("ARC-Easy", "ARC-Challenge")
    },
    "openbookqa": _all(
        " ".join(
            f"OpenBookQA-V1-Sep2018/Data/Additional/{s}_complete.jsonl"
            for s in ("train", "dev", "test")
        ),
        _lines(*(
            _BOOK | {"id": key, "answerKey": key, "question": {
                "stem": f"{key} is",
                "choices": [{"text": f"option {c}", "label": c} for c in "ABCD"],
            }}
            for key in "DB"
        )),
    ),
    "super_glue/boolq": _super_glue(
        "BoolQ", {"passage": "Ice is cold.", "question": "is ice cold", "label": True},
        {"passage": "Ice is cold.", "question": "is ice hot", "label": False},
    ),
    "super_glue/copa": _super_glue(
        "COPA",
        {"premise": "The floor was wet.", "choice1": "It was dark.", "choice2": "The pipe broke.",
         "question": "cause", "label": 1},
        {"premise": "Bob fell.", "choice1": "He hurt his knee.", "choice2": "He won.",
         "question": "effect", "label": 0},
    ),
    "super_glue/rte": _super_glue(
        "RTE",
        {"premise": "Rome is big.", "hypothesis": "Rome is small.", "label": "not_entailment"},
        {"premise": "Rome is big.", "hypothesis": "Rome is large.", "label": "entailment"},
    ),
    "super_glue/wic": _super_glue(
        "WiC",
        {"word": "bank", "sentence1": "A river bank.", "sentence2": "The bank lends.",
         "start1": 8, "end1": 12, "start2": 4, "end2": 8, "label": False},
        {"word": "run", "sentence1": "I run.", "sentence2": "We run.",
         "start1": 2, "end1": 5, "start2": 3, "end2": 6, "label": True},
    ),
    "super_glue/multirc": _super_glue("MultiRC", {"passage": {
        "text": "<b>Sentence 1: </b>Tom ate a pear.<br>He slept.", "questions": [
            {"idx": 0, "question": "What did Tom do?", "answers": [
                {"idx": 0, "text": "ate", "label": 1}, {"idx": 1, "text": "ran", "label": 0},
                {"idx": 2, "text": "slept", "label": 1},
            ]},
        ],
    }}),
    "super_glue/wsc.fixed": _super_glue(
        "WSC",
        {"text": "Ann thanked Bob as he helped.", "label": True, "target": {
            "span1_index": 2, "span1_text": "Bob", "span2_index": 4, "span2_text": "he"}},
        {"text": "Ann thanked Bob as he helped.", "label": False, "target": {
            "span1_index": 0, "span1_text": "Ann", "span2_index": 4, "span2_text": "he"}},
    ),
    "super_glue/record": _super_glue("ReCoRD", {
        "passage": {"text": _PEOPLE, "entities": _ENTITIES},
        "qas": [{"idx": 0, "query": "The cook @placeholder likes it.", "answers": [
            {"start": 0, "end": 2, "text": "Ann"}]}],
    }),
    "super_glue/cb": _super_glue(
        "CB", *({"premise": "It rains", "hypothesis": h, "label": label} for h, label in (
            ("it is wet", "entailment"), ("it is dry", "contradiction"), ("it is May", "neutral")
        )),
    ),
    **{
        f"anli/r{i}": _all(
            " ".join(f"anli_v0.1/R{i}/{split}.jsonl" for split in ("train", "dev", "test")),
            _lines(*ANLI),
        )
        for i in (1, 2, 3)
    },
    "trivia_qa/unfiltered.nocontext": {
        f"unfiltered/triviaqa-unfiltered/unfiltered-web-{s}.json": _trivia_file(TRIVIA)
        for s in ("train", "dev", "test-without-answers")
    },
    "natural_questions_open": _all("train validation", _lines(
        {"question": "where is rome", "answer": ["Italy", "in Italy"]}
    )),
    "web_questions": _all("train test", json.dumps([{
        "url": "u", "utterance": "what is up?",
        "targetValue": '(list (description "The Sky") (description Nothing))',
    }])),
    "squad/v2.0": _all("train dev", _squad(
        "Rome", "Rome is in Italy.",
        {"id": "1", "question": "Where is Rome?", "is_impossible": False,
         "answers": [{"text": "in Italy", "answer_start": 8},
         {"text": "Italy", "answer_start": 11}]},
        {"id": "2", "question": "Who built Rome?", "is_impossible": True, "answers": [],
         "plausible_answers": [{"text": "Italy", "answer_start": 11}]},
    )),
    "lambada": _all(
        "lambada_development_plain_text.txt lambada_test_plain_text.txt",
        "he opened the door and closed the door\nshe said : yes , i said yes\n",
    ),
}  # fmt: skip

# Its builder reads XML by a package that TFDS does not bring along: only its features are tested.
_TEXT = "The cup is not in the box since it is too big."
WINOGRAD = [{
    "text": _TEXT, "pronoun_text": "it", "pronoun_start": _TEXT.index("it is"),
    "pronoun_end": _TEXT.index("it is") + 2, "option1": "The cup", "option2": "The box",
    "option1_normalized": "the cup", "option2_normalized": "the box", "label": 0, "idx": 0,
}]  # fmt: skip


def prepare_all(directory: pathlib.Path, tfds_names: list[str]) -> None:
  """Leaves the files of all tasks below a directory, and the data of these names."""
  gin.clear_config()  # another test's is locked, and t5 gives gin names when it is imported
  long_context_files.write(directory)
  tfds.disable_progress_bar()
  for name in tfds_names:
    prepare(directory, name)


def prepare(directory: pathlib.Path, tfds_name: str) -> None:
  """Has TFDS's builder of a name, with version, make its data below a directory."""
  builder = tfds.builder(tfds_name, data_dir=directory)
  name = tfds_name.split(":")[0]
  if name == "wsc273":
    made = lambda _: {"test": ((x["idx"], x) for x in WINOGRAD)}
    with mock.patch.object(builder, "_split_generators", made):
      builder.download_and_prepare()
    return
  downloads = directory / "downloads" / name.replace("/", "_")
  for path, text in FILES[name].items():
    (downloads / path).parent.mkdir(parents=True, exist_ok=True)
    (downloads / path).write_text(text, encoding="utf-8")

  def download(self, urls):
    """A folder for one address, and files or folders in it for several that have names."""
    del self
    if not isinstance(urls, dict):
      return epath.Path(downloads)
    return tree.map_structure_with_path(lambda path, _: epath.Path(downloads) / path[0], urls)

  patches = dict(download=download, download_and_extract=download, manual_dir=epath.Path(downloads))
  with mock.patch.multiple(tfds.download.DownloadManager, **patches):
    builder.download_and_prepare()
