"""Chat templates: the text that transformers makes of them, and what each turn of a talk adds."""

import json

import pytest

from famjax.data.chat_templates import ChatTemplate, Talk, rest
from famjax.data.tokenizers import TokenizerVocabulary
from famjax.errors import UserError
from tests.convert import tiny
from tests.data import chats

ONE = [{"role": "user", "content": " Who is \u00e9tienne? \n"}]
MANY = [
    *ONE,
    {"role": "assistant", "content": "A baker.\n", "tool_calls": None},
    {"role": "user", "content": "Is <b>he</b> \"old\"?"},
]
SYSTEM = [{"role": "system", "content": "Be short."}, *MANY]
TOOL = [*MANY[:2], {"role": "tool", "content": "<b>\u00e9</b> & 'x'"}]
TALKS = {
    "chatml": (chats.CHATML, [ONE, MANY, SYSTEM, MANY[:2]]),
    "llama3": (chats.LLAMA3, [ONE, MANY, SYSTEM, TOOL]),
    "gemma": (chats.GEMMA, [ONE, MANY, MANY[:2]]),
    "thinking": (chats.THINKING, [ONE, MANY]),
}


@pytest.fixture(scope="module", name="tokenizer")
def _tokenizer(tmp_path_factory):
  """A directory with a tokenizer and no template."""
  pytest.importorskip("tokenizers", reason="the core runs without it")
  directory = tmp_path_factory.mktemp("tokenizer")
  tiny.save_tokenizer(directory, "A text.")
  return directory


def copy(tokenizer, directory):
  for path in tokenizer.iterdir():
    (directory / path.name).write_bytes(path.read_bytes())


@pytest.mark.parametrize("name", TALKS)
@pytest.mark.parametrize("old", [False, True])
def test_renders_what_transformers_renders(name, old, tokenizer, tmp_path):
  transformers = pytest.importorskip("transformers", reason="the extra hf brings it")
  template, talks = TALKS[name]
  copy(tokenizer, tmp_path)
  chats.save(tmp_path, template, old)
  theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
  ours = TokenizerVocabulary(str(tmp_path))
  for talk in talks:
    for prompt in (True, False):
      expected = theirs.apply_chat_template(talk, tokenize=False, add_generation_prompt=prompt)
      text = ours.render(talk, prompt)
      assert text == expected and text
      ids = theirs.apply_chat_template(talk, add_generation_prompt=prompt, return_dict=False)
      assert ours.encode(text) == ids and ids.count(1) == (name in ("llama3", "gemma"))


def test_the_default_of_several_and_a_file_before_the_configuration(tokenizer, tmp_path):
  copy(tokenizer, tmp_path)
  assert TokenizerVocabulary(str(tmp_path)).chat_template is None
  several = [dict(name="tool_use", template="a"), dict(name="default", template="{{ eos_token }}b")]
  chats.save(tmp_path, several, old=True)
  assert TokenizerVocabulary(str(tmp_path)).render(ONE) == "</s>b"
  (tmp_path / "chat_template.jinja").write_text("{{ pad_token }}{{ bos_token }}{{ mine }}")
  assert TokenizerVocabulary(str(tmp_path)).render(ONE, mine="c") == "<pad><s>c"


def test_a_directory_without_a_template(tokenizer):
  with pytest.raises(UserError, match="has no chat template: add its chat_template.jinja"):
    TokenizerVocabulary(str(tokenizer)).render(ONE)


@pytest.mark.parametrize(
    "messages, message",
    [
        ("Hello", "messages are 'Hello': give a list of them"),
        ([], "give a list of them"),
        (["Hello"], "'Hello' is no message: give a role and a content"),
        ([{"content": "Hello"}], "is no message"),
        ([{"role": "user", "content": 3}], "is no message"),
        ([{"role": "system", "content": "x"}], "here: its chat template refuses .*System role not"),
        (2 * ONE, "refuses the messages .*must alternate"),
    ],
)
def test_wrong_messages_are_one_line(messages, message):
  with pytest.raises(UserError, match=message) as error:
    ChatTemplate(chats.GEMMA, {}, "here").render(messages)
  assert "\n" not in str(error.value)


def test_wrong_templates_are_one_line(tmp_path, tokenizer):
  with pytest.raises(UserError, match="here: its chat template cannot be compiled"):
    ChatTemplate("{% for %}", {}, "here")
  with pytest.raises(UserError, match="refuses the messages"):
    ChatTemplate("{{ messages.append(1) }}", {}, "here").render(ONE)
  with pytest.raises(UserError, match="refuses the messages .*unsafe"):
    ChatTemplate("{{ messages.__class__.__mro__ }}", {}, "here").render(ONE)
  copy(tokenizer, tmp_path)
  (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
  with pytest.raises(UserError, match="chat_template.jinja cannot be read"):
    TokenizerVocabulary(str(tmp_path)).render(ONE)


def said(template, answers, begun=False):
  """All that is read and written in a talk, and its rendering as a whole."""
  template = ChatTemplate(template, {"bos_token": "<s>"}, "here")
  talk, heard, messages = Talk(template, begun), "", []
  for number, answer in enumerate(answers):
    line = f"Line {number}."
    heard += talk.turn(line) + answer
    talk.add(line, answer)
    messages += [dict(role="user", content=line), dict(role="assistant", content=answer)]
  return heard, template.render([*messages[:-1]], True) + answers[-1]


@pytest.mark.parametrize("template", [chats.CHATML, chats.LLAMA3, chats.GEMMA, chats.THINKING])
def test_the_turns_of_a_talk_join_to_the_whole(template):
  heard, whole = said(template, ["One.", "", "Three", "Four."])
  assert heard == whole.removesuffix("<|im_end|>\n")


def test_white_space_that_a_template_strips_stays_as_it_was_written():
  heard, whole = said(chats.GEMMA, [" One.\n\n", "Two."])
  assert heard == whole.replace("One.", " One.\n\n")
  assert rest("<u>a<m> b </m>", "<u>a<m>", "b") == " </m>"
  assert rest("<u>a<m>b", "<u>a<m>", "c") is None and rest("<u>", "<u>a", "") is None


def test_answers_that_a_template_renders_otherwise():
  """The answer is ended and the turn begun, as in the whole."""
  heard, whole = said(chats.THINKING, ["<think>x</think>One.", "Two.", "Three."])
  assert heard == whole.replace("One.", "<think>x</think>One.")
  silent = "{{ bos_token }}{% for m in messages if m.role == 'user' %}U: {{ m.content }}\n"
  silent += "{% endfor %}"
  assert said(silent, ["One.", "Two."])[0] == "<s>U: Line 0.\nOne.U: Line 1.\nTwo."


def test_a_talk_of_which_nothing_is_known():
  heard, whole = said(chats.GEMMA, ["One.", "Two."], begun=True)
  assert heard == whole.removeprefix("<s>")


def test_settings_of_fine_tuning_cut_no_text(tmp_path):
  tiny.save_tokenizer(tmp_path, "some text")
  file = tmp_path / "tokenizer.json"
  settings = json.loads(file.read_text())
  settings["truncation"] = dict(direction="Right", max_length=4, strategy="LongestFirst", stride=0)
  settings["padding"] = dict(
      strategy={"Fixed": 64}, direction="Right", pad_to_multiple_of=None, pad_id=0, pad_type_id=0,
      pad_token="<pad>",
  )  # fmt: skip
  file.write_text(json.dumps(settings))
  vocabulary = TokenizerVocabulary(str(tmp_path))
  for text in ("a", "a longer text than that"):
    assert vocabulary.decode(vocabulary.encode(text)) == text
