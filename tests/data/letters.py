"""A tokenizer of characters for tests of prompts: id = code point."""

import json


class Letters:
  """As `tokenizer.Tokenizer`, with a chat template of its own."""

  path = "letters"

  def encode(self, text, *, special_tokens=True):
    return [ord(character) for character in text]

  def chat(self, messages, *, thinking=None):
    turns = [f"{m['role'][0]}:{m['content']};" for m in messages]
    return "".join(turns) + "a:" + {None: "", True: "T", False: "F"}[thinking]


def write_rows(path, rows):
  """Texts, or whole rows, as JSONL."""
  rows = [row if isinstance(row, dict) else {"text": row} for row in rows]
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return str(path)
