"""Questions about texts that are made: each is answered here by reading its text, and by that alone."""

import collections
import re

import hypothesis
from hypothesis import strategies as st
import pytest

from famjax.data import questions
from famjax.data.vocabularies import load_vocabulary
from famjax.errors import UserError

BYTES = load_vocabulary("bytes")


def needle(text):
  asked = re.search(r"special magic (?:number|uuid) for (\S+) mentioned", text)[1]
  return {re.search(rf"for {asked} is: ([\w-]+)\.", text)[1]}


def variables(text):
  value = re.search(r"assigned the value (\d+) in", text)[1]
  found = set()
  for name, given in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", text):  # in the order of the text
    if given == value or given in found:
      found.add(name)
  return found


def most_common(text, count, pattern):
  words = collections.Counter(re.findall(pattern, text)).most_common(count + 1)
  assert len(words) <= count or words[count - 1][1] > words[count][1], "the answer is not unique"
  return {word for word, _ in words[:count]}


def last_pair(text):
  pairs, _, asked = text.partition("; ? ")
  return {dict(re.findall(r"(\w+): (\w+)", pairs))[asked.rstrip(":")]}  # a later one replaces


def place(text):
  where, held, lies = {}, {}, {}
  for line in text.splitlines():
    if fact := re.fullmatch(r"The (\w+) is in the (\w+)\.", line):
      lies[fact[1]] = fact[2]
    elif fact := re.fullmatch(r"(\w+) (?:is in|went to) the (\w+)\.", line):
      where[fact[1]] = fact[2]
      lies |= {thing: fact[2] for thing, person in held.items() if person == fact[1]}
    elif fact := re.fullmatch(r"(\w+) picked up the (\w+)\.", line):
      assert lies[fact[2]] == where[fact[1]] and fact[2] not in held
      held[fact[2]] = fact[1]
    elif fact := re.fullmatch(r"(\w+) put down the (\w+)\.", line):
      assert held.pop(fact[2]) == fact[1]
  return {lies[re.search(r"Where is the (\w+)\?", text)[1]]}


def repeated(text):
  words, _, begun = text.partition("\n[repeat random segment]: ")
  return {re.search(rf"{begun} (\w+ \w+ \w+ \w+)", words)[1]}


READ = {
    "niah_single_1": needle, "niah_multikey_2": needle, "niah_multikey_3": needle,
    "vt": variables, "remember": last_pair, "rewrite": last_pair, "state_tracking": place,
    "repeat_segment": repeated,
    "cwe": lambda text: most_common(text.split("\n")[1], 10, r"\d+\. (\w+)"),
    "fwe": lambda text: most_common(text.partition("words. ")[2].split("\n")[0], 3, r"\w+"),
}  # fmt: skip


def test_every_task_is_read_here():
  assert set(READ) == set(questions.TASKS)


@pytest.mark.parametrize("name", questions.TASKS)
@hypothesis.settings(max_examples=15)
@hypothesis.given(tokens=st.integers(4200, 7000), index=st.integers(0, 99))
def test_the_text_has_the_answer_and_the_length(name, tokens, index):
  question = questions.ask(name, BYTES, tokens, seed=3, index=index)
  assert READ[name](question.text) == set(question.answers)
  used = len(BYTES.encode(question.text + question.target)) + 1
  assert tokens - 400 < used <= tokens
  assert question == questions.ask(name, BYTES, tokens, seed=3, index=index)
  assert question != questions.ask(name, BYTES, tokens, seed=3, index=index + 100)


def test_scores_are_shares_of_the_answers():
  question = questions.Question("?", ("Anna", "boris"))
  said = ("", "anna", "Boris, ANNA.", " clara")
  assert [question.score(s) for s in said] == [0, 0.5, 1, 0]


def test_examples_to_train_on_have_weight_on_the_answer_alone():
  source = questions.QuestionExamples(BYTES, "rewrite", 200, 400)
  lengths = set()
  for index in range(8):
    tokens, weights = source.example(1, index, 0)
    text, answer = (BYTES.decode(tokens[weights == w].tolist()) for w in (0, 1))
    assert READ["rewrite"](text) == {answer.strip()} and tokens[-1] == BYTES.eos_id
    lengths.add(len(tokens))
  assert len(lengths) > 4 and 150 < min(lengths) and max(lengths) <= 400


@pytest.mark.parametrize("make, message", [
    (lambda: questions.task_of("nothing"), "task 'nothing' is unknown; choose one of niah_single_1"),
    (lambda: questions.ask("cwe", BYTES, 100, 0, 0), "task 'cwe' has no text of 100 tokens"),
    (lambda: questions.QuestionExamples(BYTES, "vt", 900, 800), "questions of 900 to 800 tokens"),
])  # fmt: skip
def test_what_makes_no_sense_is_named(make, message):
  with pytest.raises(UserError, match=message):
    make()
