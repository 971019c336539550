"""Questions about long documents (the paper's Table 11), from the files that their makers give out.

Below one directory:

    narrativeqa/  qaps.csv, and the stories as download_stories.sh leaves them: tmp/ID.content
    qasper/       qasper-dev-v0.3.json
    quality/      QuALITY.v1.0.1.htmlstripped.dev
    xlsum/        english_test.jsonl

A document stands first and its question last, so that it is read once for all its questions.
PG-19 and Isabelle, the other two of that table, are `famjax.evaluation.documents`.
"""

from collections.abc import Iterator
import csv
import html
import io
import json
import pathlib
import re
import sys

from famjax.data.prompts import Example, Files, Generated, Ranked, Spec
from famjax.data.text_files import read_text
from famjax.errors import UserError


def _lines(path: pathlib.Path) -> Iterator[Example]:
  """Yields the objects of a file of JSON lines. Raises UserError for a line that holds none."""
  for number, line in enumerate(read_text(path).split("\n"), 1):
    if line.strip():
      yield _object(line, f"{path}, line {number}")


def _object(text: str, where: str) -> Example:
  """Returns the JSON object in a text. Raises UserError if there is none."""
  try:
    found = json.loads(text)
  except (ValueError, RecursionError) as error:
    raise UserError(f"{where} cannot be read ({error}): fetch it again") from None
  if not isinstance(found, dict):
    raise UserError(f"{where} holds no JSON object: fetch it again")
  return found


def _narrativeqa(path: pathlib.Path, split: str) -> Iterator[Example]:
  """Questions of `qaps.csv`; those about one story stand together there."""
  name, story, missing, changed = None, None, set(), set()
  for row in csv.DictReader(io.StringIO(read_text(path), newline="")):
    if row["set"] != split:
      continue
    if row["document_id"] != name:
      name = row["document_id"]
      place = path.parent / "tmp" / f"{name}.content"
      data = place.read_bytes() if place.is_file() else None
      story = None if data is None else _story(data.decode("utf-8-sig", "replace"))
      if data is not None and not _is_utf8(data):
        changed.add(name)
    if story is None:
      missing.add(name)
    else:
      yield row | {"story": story}
  if missing:
    some = f"{len(missing)} stories of the {split} set are not in {path.parent / 'tmp'}"
    print(f"narrativeqa: {some}: their questions are left out", file=sys.stderr, flush=True)
  if changed:  # the stories are pages of the web, some of them in older encodings
    some = f"{len(changed)} stories of the {split} set are not UTF-8"
    print(f"narrativeqa: {some}: U+FFFD stands for what is not", file=sys.stderr, flush=True)


def _is_utf8(data: bytes) -> bool:
  try:
    data.decode("utf-8")
  except UnicodeDecodeError:
    return False
  return True


def _story(text: str) -> str:
  """Returns a book as it is, and a film's script without the HTML that it comes in."""
  if re.search(r"<html|<body|<pre", text[:10_000], re.I):
    text = re.sub(r"<(script|style)\b.*?</\1>", "", text, flags=re.S | re.I)
    text = html.unescape(re.sub(r"<[^>]+>", "", text))
  return text.strip()


def _qasper(path: pathlib.Path, split: str) -> Iterator[Example]:
  """Questions about papers, with the answers of all who answered."""
  del split  # a file each
  for paper in _object(read_text(path), str(path)).values():
    parts = [paper["title"], paper["abstract"]]
    for section in paper["full_text"]:
      parts += [section["section_name"] or "", *section["paragraphs"]]
    text = "\n\n".join(part for part in parts if part)
    for asked in paper["qas"]:
      answers = [_qasper_answer(given["answer"]) for given in asked["answers"]]
      yield {"paper": text, "question": asked["question"], "answers": answers}


def _qasper_answer(answer: Example) -> str:
  """An answer as the data's own evaluator puts it into words."""
  if answer["unanswerable"]:
    return "Unanswerable"
  if answer["extractive_spans"]:
    return ", ".join(answer["extractive_spans"])
  return answer["free_form_answer"] or ("Yes" if answer["yes_no"] else "No")


def _quality(path: pathlib.Path, split: str) -> Iterator[Example]:
  """Questions about articles. The test set has no labels."""
  del split
  for article in _lines(path):
    for asked in article["questions"]:
      label = asked.get("gold_label", 0) - 1  # the file counts from one
      yield {"article": article["article"].strip(), "label": label} | {
          name: asked[name] for name in ("question", "options")
      }


def _xlsum(path: pathlib.Path, split: str) -> Iterator[Example]:
  del split
  yield from _lines(path)


_SPLITS = {name: name for name in ("train", "validation", "test")}
_ASK = "\n\nQuestion: {question}\nAnswer:"

TASKS: dict[str, Spec] = {
    "narrativeqa": Generated(
        Files(
            "narrativeqa/qaps.csv", _SPLITS | {"validation": "valid"}, _narrativeqa,
            "https://github.com/google-deepmind/narrativeqa, its stories by download_stories.sh",
        ),
        "test", "{story}" + _ASK, lambda x: [x["answer1"], x["answer2"]], ("rouge",), "rougeL",
    ),
    "qasper": Generated(
        Files(
            "qasper/qasper-{split}-v*.json", _SPLITS | {"validation": "dev"}, _qasper,
            "https://allenai.org/data/qasper",
        ),
        "validation", "{paper}" + _ASK, lambda x: x["answers"], ("rouge", "squad"), "rougeL",
    ),
    "quality": Ranked(
        Files(
            "quality/QuALITY.v*.htmlstripped.{split}", _SPLITS | {"validation": "dev"}, _quality,
            "https://github.com/nyu-mll/quality",
        ),
        "validation", "{article}" + _ASK, "options",
    ),
    "xlsum": Generated(
        Files(
            "xlsum/english_{split}.jsonl", _SPLITS | {"validation": "val"}, _xlsum,
            "https://github.com/csebuetnlp/xl-sum",
        ),
        "test", "{text}\n\nSummary:", lambda x: [x["summary"]], ("rouge",), "rougeL",
    ),
}  # fmt: skip
