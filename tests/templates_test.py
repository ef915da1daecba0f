"""Templates: rows as texts, chats and ids."""

import pytest

from opd_jax import templates, tokenizer
from opd_jax.config import TemplateConfig
from opd_jax.errors import InputError
from tests.data.letters import Letters

ROW = {"q": "2+3?", "n": 3, "x": 0.5, "yes": True, "list": [1], "none": None}
MESSAGES = [
  {"role": "system", "content": "S"},
  {"role": "user", "content": "one"},
  {"role": "assistant", "content": "two"},
  {"role": "user", "content": "three", "name": "ignored"},
]


def text_of(row=ROW, **options):
  config = TemplateConfig(**options)
  return templates.prompt(config, row, Letters(), "here").text


@pytest.mark.parametrize(
  ("template", "text"),
  [
    ("{q}", "2+3?"),
    ("Q: {q}\nA:", "Q: 2+3?\nA:"),
    ("{n}, {x}, {yes}", "3, 0.5, True"),
    ("{{q}} {q}}}", "{q} 2+3?}"),
    ("no field", "no field"),
    ("{q}{q}", "2+3?2+3?"),
  ],
)
def test_fields_are_filled_in(template, text):
  assert templates.fill(template, ROW, "here") == text


def test_fields_of_a_template():
  assert templates.fields("{a} {{b}} {c}{a}") == ("a", "c", "a")


@pytest.mark.parametrize(
  ("template", "message"),
  [
    (
      "{question}",
      r"here: no field 'question'.*the row has q, n, .*prompt\.text",
    ),
    ("{list}", "here: field 'list' must be text, got list"),
    ("{none}", "here: field 'none' must be text, got NoneType"),
    ("{q", "malformed template '{q'"),
    ("{}", "must name each field"),
    ("{q!r}", "must name each field"),
    ("{n:3d}", "must name each field"),
    ("{q.x}", r"no field 'q\.x'"),
  ],
)
def test_bad_templates(template, message):
  with pytest.raises(InputError, match=message):
    templates.fill(template, ROW, "here")


def test_a_plain_prompt():
  assert text_of(text="{q} =\n", replace_newlines=" ") == "2+3? = "
  config = TemplateConfig(text="{q}", first_tokens=2)
  prompt = templates.prompt(config, ROW, Letters(), "here")
  assert (prompt.text, prompt.ids) == ("2+3?", (ord("2"), ord("+")))


def test_a_chat_prompt():
  assert text_of(text="{q}", chat=True) == "u:2+3?;a:"
  assert text_of(text="{q}", chat=True, system="n = {n}") == (
    "s:n = 3;u:2+3?;a:"
  )
  assert text_of(text="{q}", chat=True, thinking=True) == "u:2+3?;a:T"
  assert text_of(text="{q}", chat=True, thinking=False) == "u:2+3?;a:F"


def test_messages_of_a_row():
  row = {"chat": MESSAGES}
  found = text_of(row, chat=True, messages="chat")
  assert found == "s:S;u:one;a:two;u:three;a:"


@pytest.mark.parametrize(
  "value", [None, "text", [], ["text"], [{"role": "user"}], [{"content": "x"}]]
)
def test_bad_messages(value):
  row = {"q": "x"} if value is None else {"q": "x", "chat": value}
  with pytest.raises(
    InputError, match=r"here: field 'chat' .*prompt\.messages"
  ):
    text_of(row, chat=True, messages="chat")


@pytest.fixture(scope="module")
def qwen(shared_data):
  return tokenizer.load(shared_data / "tokenizers" / "qwen2.5")


def test_a_real_chat_template(qwen):
  """The published form of a Qwen2.5 prompt; its special tokens are one id."""
  config = TemplateConfig(text="{q}", chat=True, system="Be brief.")
  prompt = templates.prompt(config, ROW, qwen, "here")
  assert prompt.text == (
    "<|im_start|>system\nBe brief.<|im_end|>\n"
    "<|im_start|>user\n2+3?<|im_end|>\n<|im_start|>assistant\n"
  )
  start, end, newline = 151644, 151645, 198
  assert prompt.ids[0] == start
  assert prompt.ids.count(start) == 3
  assert prompt.ids.count(end) == 2
  assert prompt.ids[-1] == newline
  assert qwen.decode(prompt.ids, skip_special_tokens=False) == prompt.text


def test_a_switch_the_template_does_not_have(qwen):
  config = TemplateConfig(text="{q}", chat=True, thinking=False)
  with pytest.raises(InputError) as error:
    templates.prompt(config, ROW, qwen, "here")
  for part in ("prompt.thinking = False", "enable_thinking", "None"):
    assert part in str(error.value)


def test_a_missing_chat_template(shared_data):
  words = tokenizer.load(shared_data / "models" / "babyllama-student")
  with pytest.raises(InputError) as error:
    templates.prompt(TemplateConfig(text="{q}", chat=True), ROW, words, "here")
  for part in ("babyllama-student", "no chat template", "prompt.chat"):
    assert part in str(error.value)
