"""A pair of models to damage, and what preflight says of it."""

import json

import jax
import numpy as np
from safetensors.numpy import load_file, save_file

from opd_jax import preflight, setup
from opd_jax.config import RunConfig
from opd_jax.parsing import parse
from opd_jax.sharding import make_mesh
from tests import pair

EMBEDDING = "model.embed_tokens.weight"
# A turn ends with </s>; `enable_thinking` false puts an empty thinking part.
CHAT = (
  "{% for m in messages %}{{ m.content }}"
  "{% if m.role == 'assistant' %}</s>{% endif %}{% endfor %}"
  "{% if add_generation_prompt and enable_thinking is defined and "
  "not enable_thinking %}<think> </think>{% endif %}"
)


def config_of(folder, prompt=None, teacher_prompt=None, **changes):
  texts = {"path": str(folder / "texts.jsonl"), "prompt": prompt or {}}
  texts["teacher_prompt"] = teacher_prompt
  data = {"sources": {"texts": texts}, "max_prompt_tokens": 40}
  sampling = {"max_new_tokens": 6, **changes.pop("sampling", {})}
  changes = {"data": data, "sampling": sampling, **changes}
  values = pair.config_of(folder, **changes)
  return parse(RunConfig, values)


def inspect(config, with_probe=False):
  prepared = setup.prepare(config)
  step = setup.make_step(prepared, make_mesh({}, jax.devices()[:1]))
  return preflight.inspect(prepared, step, with_probe=with_probe)


def messages(report):
  """Of the findings, by name."""
  return {found.name: found.message for found in report.findings}


def only(report, name, *words):
  """The report has this finding and no other, and its message these words."""
  found = messages(report)
  assert list(found) == [name]
  missing = [word for word in words if word not in found[name]]
  assert not missing, found[name]


def change_json(path, **values):
  content = json.loads(path.read_text())
  path.write_text(json.dumps({**content, **values}))


def change_embedding(folder, change):
  file = folder / "student" / "model.safetensors"
  tensors = load_file(file)
  tensors[EMBEDDING] = np.ascontiguousarray(change(tensors[EMBEDDING]))
  save_file(tensors, file)


def set_chat(folder, template, roles=("student", "teacher")):
  for role in roles:
    change_json(folder / role / "tokenizer_config.json", chat_template=template)
