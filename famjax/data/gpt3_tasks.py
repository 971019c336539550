"""The 26 tasks of the paper's Table 12: 21 ranked, 5 generated, all of them GPT-3's and in TFDS.

The paper says neither prompts nor shots. Here they are asked without shots, in the words of GPT-3's
appendix G (Brown et al. 2020) or close to them, each on the split that has public answers.
"""

from collections.abc import Iterator
import re

from famjax.data.prompts import Example, Generated, Ranked, Spec


def _race(data: Example) -> Iterator[Example]:
  """A question each; TFDS has an article with all of its own."""
  for question, options, answer in zip(data["questions"], data["options"], data["answers"]):
    label = "ABCD".index(answer)
    yield {"article": data["article"], "question": question, "options": options, "label": label}


def _arc(data: Example) -> Iterator[Example]:
  choices = data["choices"]
  right = [label == data["answerKey"] for label in choices["label"]]
  yield {"question": data["question"], "options": choices["text"], "right": right}


def _story_cloze(data: Example) -> Iterator[Example]:
  yield data | {"label": data["label"] - 1}  # the files count from one, and TFDS leaves it so


def _winograd(data: Example) -> Iterator[Example]:
  text = data["text"]
  before, after = text[: data["pronoun_start"]], text[data["pronoun_end"] :]
  yield data | {"before": before, "after": after}


def _winogrande(data: Example) -> Iterator[Example]:
  before, after = data["sentence"].split("_", 1)
  yield data | {"before": before, "after": after}


def _copa(data: Example) -> Iterator[Example]:
  clauses = {f"choice{i}": data[f"choice{i}"] for i in (1, 2)}
  small = lambda text: text if re.match(r"I\b", text) else text[:1].lower() + text[1:]
  clauses = {name: small(text) for name, text in clauses.items()}
  word = {"cause": "because", "effect": "so"}[data["question"]]
  yield data | clauses | {"premise": data["premise"].strip().rstrip("."), "word": word}


def _multirc(data: Example) -> Iterator[Example]:
  paragraph = re.sub(r"</?b>", "", data["paragraph"].replace("<br>", " "))
  yield data | {"paragraph": paragraph}


def _record(data: Example) -> Iterator[Example]:
  said = [data["query"].replace("@placeholder", entity) for entity in data["entities"]]
  right = [entity in data["answers"] for entity in data["entities"]]
  passage = data["passage"].replace("\n@highlight\n", "\n- ")
  yield {"passage": passage, "said": said, "right": right}


def _lambada(data: Example) -> Iterator[Example]:
  context, word = data["passage"].strip().rsplit(" ", 1)
  yield {"context": context, "word": word}


def _first_word(said: str) -> str:
  return said.split()[0] if said.split() else ""


_ARTICLE = "Article:\n{article}\n\nQuestion: {question}\n\nAnswer:"
_QUESTION = "Question: {question}\nAnswer:"
_CLAIM = "{context}\nquestion: {hypothesis} true, false, or neither?\nanswer:"
_ENTAILED = (" true", " neither", " false")  # as ANLI's labels; CommitmentBank has others
_NO_YES = (" no", " yes")
_PREMISE = "{premise}\nquestion: {hypothesis}. true, false, or neither?\nanswer:"
_SAME = "{sentence1}\n{sentence2}\nquestion: Is the word '{word}' used in the same way in the two" \
    " sentences above?\nanswer:"  # fmt: skip
_REFERS = "Passage: {text}\nQuestion: In the passage above, does the pronoun \"{span2_text}\"" \
    " refer to \"{span1_text}\"?\nAnswer:"  # fmt: skip
_PASSAGE = "Title: {title}\n\nBackground: {context}\n\nQuestion: {question} If the background" \
    " does not say it, the answer is: unanswerable.\n\nAnswer:"  # fmt: skip
_Q = "Q: {question}\nA:"

# Winograd and Winogrande are evaluated partially, as GPT-3 does: the options stand in the prompt,
# and what comes after them is compared.
TASKS: dict[str, Spec] = {
    "hellaswag": Ranked("hellaswag:1.1.0", "validation", "{activity_label}: {context}", "endings"),
    "story_cloze": Ranked(
        "story_cloze/2016:1.0.0", "test", "{context}", "endings", each=_story_cloze
    ),
    "winograd": Ranked(
        "wsc273:1.0.0", "test",
        ("{before}{option1_normalized}", "{before}{option2_normalized}"), ("{after}", "{after}"),
        each=_winograd,
    ),
    "winogrande": Ranked(
        "winogrande:1.2.0", "validation",
        ("{before}{option1}", "{before}{option2}"), ("{after}", "{after}"), each=_winogrande,
    ),
    "race_m": Ranked("race/middle:2.0.0", "test", _ARTICLE, "options", each=_race),
    "race_h": Ranked("race/high:2.0.0", "test", _ARTICLE, "options", each=_race),
    "piqa": Ranked("piqa:1.0.0", "validation", "{goal}", (" {sol1}", " {sol2}")),
    "arc_e": Ranked("ai2_arc/ARC-Easy:1.0.0", "test", _QUESTION, "options", "right", _arc),
    "arc_c": Ranked("ai2_arc/ARC-Challenge:1.0.0", "test", _QUESTION, "options", "right", _arc),
    "openbookqa": Ranked(
        "openbookqa:0.1.0", "test", "{question[stem]}",
        tuple(f" {{question[choice_{letter}]}}" for letter in "ABCD"), "answerKey",
    ),
    "boolq": Ranked(
        "super_glue/boolq:1.0.2", "validation",
        "{passage}\nquestion: {question}?\nanswer:", _NO_YES,
    ),
    "copa": Ranked(
        "super_glue/copa:1.0.2", "validation",
        "{premise} {word}", (" {choice1}", " {choice2}"), each=_copa,
    ),
    "rte": Ranked(
        "super_glue/rte:1.0.2", "validation",
        "{premise}\nquestion: {hypothesis} True or False?\nanswer:", (" True", " False"),
    ),
    "wic": Ranked("super_glue/wic:1.0.2", "validation", _SAME, _NO_YES),
    "multirc": Ranked(
        "super_glue/multirc:1.0.2", "validation", "{paragraph}\n\n{question}\n-",
        (" [False] {answer}", " [True] {answer}"), each=_multirc, classes=2, score="f1",
    ),
    "wsc": Ranked("super_glue/wsc.fixed:1.0.2", "validation", _REFERS, _NO_YES),
    "record": Ranked(
        "super_glue/record:1.0.2", "validation", "{passage}\n-", "said", "right", _record
    ),
    "cb": Ranked(
        "super_glue/cb:1.0.2", "validation", _PREMISE, (" true", " false", " neither"), classes=3
    ),
    "anli_r1": Ranked("anli/r1:0.1.0", "test", _CLAIM, _ENTAILED),
    "anli_r2": Ranked("anli/r2:0.1.0", "test", _CLAIM, _ENTAILED),
    "anli_r3": Ranked("anli/r3:0.1.0", "test", _CLAIM, _ENTAILED),
    "trivia_qa": Generated(
        "trivia_qa/unfiltered.nocontext:1.1.0", "validation", _Q,
        lambda x: [x["answer"]["value"], *x["answer"]["aliases"]], ("trivia_qa",), "em",
    ),
    "natural_questions": Generated(
        "natural_questions_open:1.0.0", "validation", _Q,
        lambda x: x["answer"], ("trivia_qa",), "em",
    ),
    "web_questions": Generated(
        "web_questions:1.0.0", "test", _Q, lambda x: x["answers"], ("trivia_qa",), "em"
    ),
    "squad_v2": Generated(
        "squad/v2.0:3.0.0", "validation", _PASSAGE,
        lambda x: x["answers"]["text"] or ["unanswerable"], ("squad",), "f1",
    ),
    "lambada": Generated(
        "lambada:1.0.0", "test", "{context}", lambda x: [x["word"]], ("squad",), "em",
        each=_lambada, taken=_first_word,
    ),
}  # fmt: skip
