"""Small files of the long-context tasks, in the formats of those who gave them out."""

import json
import pathlib

STORY = "Ida had a boat. " * 20 + "It was red. " + "The sea was calm. " * 20
SCRIPT = "<html><head><style>b {}</style></head><body><pre><b>INT. SHIP</b>\nTom &amp; Ida row.</pre></html>"
QAPS = [  # document_id, set, question, answer1, answer2
    ("aa11", "test", "What colour was the boat?", "The boat was red", "Red, I think"),
    ("aa11", "test", "Whose was it?", "Her boat it was", "Ida's"),
    ("bb22", "train", "Who rows?", "Tom and Ida", "They do"),
    ("cc33", "test", "Why?", "Nobody kept the story", "Lost"),
]
PAPER = {
    "title": "On Boats", "abstract": "We look at boats.",
    "full_text": [
        {"section_name": "Introduction", "paragraphs": ["Boats float.", "Stones sink."]},
        {"section_name": None, "paragraphs": ["We used 12 boats. " * 12]},
    ],
    "qas": [
        {"question": q, "question_id": str(i), "answers": [
            {"answer": {"unanswerable": False, "extractive_spans": [], "yes_no": None,
             "free_form_answer": "",
                        "evidence": [], "highlighted_evidence": []} | answer, "annotation_id": "x"}
            for answer in answers
        ]}
        for i, (q, answers) in enumerate([
            ("How many boats?", [{"extractive_spans": ["12", "boats"]},
             {"free_form_answer": "a dozen"}]),
            ("Do stones sink?", [{"yes_no": True}]),
            ("Do boats sink?", [{"yes_no": False}, {"unanswerable": True}]),
        ])
    ],
}  # fmt: skip
ARTICLE = "The captain slept in the barn. " * 12 + "He never spoke of {it} \\1."
QUALITY = {
    "article_id": "1", "set_unique_id": "1_A", "title": "The Captain", "article": ARTICLE + "\n",
        "questions": [
        {"question": "Who slept?", "question_unique_id": "1_1",
         "options": ["A cow", "The captain", "Ida", "Tom"],
         "writer_label": 2, "gold_label": 2, "difficult": 0},
        {"question": "Where?", "question_unique_id": "1_2",
         "options": ["At sea", "At home", "In bed", "In a barn"],
         "writer_label": 4, "gold_label": 4, "difficult": 1},
        {"question": "Of what did he speak?", "question_unique_id": "1_3",
         "options": ["Of it", "No", "Sea", "Of all"],
         "writer_label": 2, "gold_label": 2, "difficult": 1},
    ],
}  # fmt: skip
XLSUM = [
    {"id": str(i), "url": "u", "title": "t", "summary": "Rain falls on Rome",
     "text": f"It rained {i} days."}
    for i in range(2)
]  # fmt: skip


def write(directory: pathlib.Path) -> None:
  """Leaves all of them below a directory, one of the stories left out."""
  for name in ("narrativeqa/tmp", "qasper", "quality", "xlsum"):
    (directory / name).mkdir(parents=True)
  head = "document_id,set,question,answer1,answer2,question_tokenized\n"
  rows = ['{},{},"{}","{}","{}",x\n'.format(*row) for row in QAPS]
  (directory / "narrativeqa" / "qaps.csv").write_text(head + "".join(rows))
  (directory / "narrativeqa" / "tmp" / "aa11.content").write_bytes(STORY.encode() + b"caf\xe9")
  (directory / "narrativeqa" / "tmp" / "bb22.content").write_text(SCRIPT)
  (directory / "qasper" / "qasper-dev-v0.3.json").write_text(json.dumps({"1234.5678": PAPER}))
  (directory / "qasper" / "qasper-dev-v0.2.json").write_text("{}")  # an older one
  path = directory / "quality" / "QuALITY.v1.0.1.htmlstripped.dev"
  path.write_text(json.dumps(QUALITY) + "\n")
  unlabelled = [{k: v for k, v in q.items() if "label" not in k} for q in QUALITY["questions"]]
  path.with_suffix(".test").write_text(json.dumps(QUALITY | {"questions": unlabelled}) + "\n")
  lines = "".join(json.dumps(row) + "\n" for row in XLSUM)
  (directory / "xlsum" / "english_test.jsonl").write_text(lines)
