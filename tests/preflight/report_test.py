"""The report as a whole: of a good pair, by the command, and in `train`."""

import json
import pathlib

import pytest

from opd_jax import cli, preflight, train
from opd_jax.errors import InputError
from opd_jax.models import hf
from tests import pair
from tests.preflight.support import config_of, inspect

REPO = pathlib.Path(__file__).resolve().parent.parent.parent


def test_a_good_pair_has_no_findings(good):
  report = inspect(config_of(good))
  assert not report.findings
  report.enforce()
  text = "\n".join(report.lines())
  assert text.endswith("findings\n  nothing found")
  for words in (
    "rows of the model     32               32",
    "a completion ends at 2 '</s>', 5 'c'",
    "texts   100.0 %  10    10",
    "held_out: 0 of 10 rows",
    # The last of "a is a letter." behind <s>.
    "14        30 '.'        14        30 '.'        prompt",
  ):
    assert words in text, words
  figures = json.loads(json.dumps(report.figures()))
  assert figures["findings"] == []
  assert figures["vocabulary"]["stop_ids"] == [2, 5]
  assert figures["memory"]["resident_bytes"] > 0


def test_train_stops_before_it_loads_a_weight(folder, tmp_path, monkeypatch):
  def load(*arguments, **options):
    pytest.fail("loaded weights")

  monkeypatch.setattr(hf, "load", load)
  text = {"text": "<s>{text}"}
  with pytest.raises(InputError, match=r"1 error: bos_doubled: .*preflight.al"):
    train.train(
      config_of(folder, prompt=text, batch={"prompts": 8}), tmp_path / "run"
    )
  assert not (tmp_path / "run").exists()


def test_an_unknown_name_to_allow(good):
  with pytest.raises(
    InputError, match=r"'bos_double'.*mean 'bos_doubled'.*eos"
  ):
    inspect(config_of(good, preflight={"allow": ("bos_double",)}))


CONFIG_FILE = """\
import json
import pathlib


def get_config(folder):
  return json.loads((pathlib.Path(folder) / "config.json").read_text())
"""


def test_the_command(folder, capsys, tmp_path):
  values = pair.config_of(folder, batch={"prompts": 8})
  (folder / "config.py").write_text(CONFIG_FILE)
  (folder / "config.json").write_text(json.dumps(values))
  file = tmp_path / "report.json"
  arguments = [
    "preflight",
    f"--config={folder}/config.py:{folder}",
    "--noprobe",
    f"--json={file}",
  ]
  assert cli.main(arguments) == 0
  out, err = capsys.readouterr()
  assert out.endswith("findings\n  nothing found\n")
  assert not err
  assert json.loads(file.read_text())["findings"] == []
  text = "--config.data.sources.texts.prompt.text=<s>{text}"
  assert cli.main([*arguments, text, "--config.data.max_prompt_tokens=32"]) == 2
  out, err = capsys.readouterr()
  assert "error bos_doubled: the student's prompt" in out
  assert err.startswith("opd-jax: error: preflight found 1 error: bos_doubled")
  assert err.endswith("preflight.allow = ('bos_doubled',))\n")
  (found,) = json.loads(file.read_text())["findings"]
  assert found["name"] == "bos_doubled"
  assert not found["allowed"]


def test_the_page_names_every_finding():
  page = (REPO / "docs" / "preflight.md").read_text()
  missing = [name for name in preflight.KINDS if f"`{name}`" not in page]
  assert not missing
