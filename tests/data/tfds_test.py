"""TensorFlow Datasets made of JSONL and read again, without TensorFlow."""

import json
from pathlib import Path

import grain
import pytest
import tensorflow_datasets

from opd_jax.data import tfds
from opd_jax.errors import InputError
from tests.data.letters import write_rows

# One field of every kind of value that JSON has, and of mixtures of them.
ROWS = [
  {
    "text": "naïve ☃ \u2028\0" if n % 3 else "",
    "count": n * 10**15 * (-1) ** n,
    "yes": n % 2 == 0,
    "ratio": n / 3,
    "huge": 2**63 - 1 + n,
    "messages": [{"role": "user", "content": f"{n}"}] * n,
    "mixed": [n, str(n), None, True, 0.5][n % 5],
    "null": None,
    "one": 1,
    "": "nameless",
    "a/b": {"c": n},
    **({"sometimes": n} if n % 2 else {}),
  }
  for n in range(23)
]


@pytest.fixture
def built(tmp_path):
  """A dataset of ROWS; returns its folder of datasets."""
  jsonl = write_rows(tmp_path / "rows.jsonl", ROWS)
  folder = tfds.build(jsonl, "some_rows", tmp_path / "data")
  assert folder == tmp_path / "data" / "some_rows" / "1.0.0"
  # Nothing else is left behind.
  assert [path.name for path in (tmp_path / "data").iterdir()] == ["some_rows"]
  return str(tmp_path / "data")


def read(data_dir, split="train", name="some_rows"):
  return tfds.read(name, split, {"data_dir": data_dir})


def test_rows_come_back_as_they_were_in_their_order(built):
  found = read(built)
  assert found == ROWS
  # 1 == True == 1.0 in Python: their types must be the same, too.
  assert repr([sorted(row.items()) for row in found]) == (
    repr([sorted(row.items()) for row in ROWS])
  )
  assert read(built, "train[3:5]") == ROWS[3:5]


def test_it_is_a_dataset_of_tensorflow_datasets(built):
  """Its own loader finds it by name and serves it to grain."""
  builder = tensorflow_datasets.builder("some_rows", data_dir=built)
  assert builder.info.splits["train"].num_examples == len(ROWS)
  source = builder.as_data_source("train")
  counts = [row["count"] for row in grain.MapDataset.source(source)]
  assert counts == [row["count"] for row in ROWS]
  assert source[1]["text"].decode() == ROWS[1]["text"]


def test_splits_are_added_one_by_one(built, tmp_path):
  # `count` is text here: the feature's type must suit both splits.
  more = [{"text": "x", "count": "many"}, {"text": "y", "count": "few"}]
  jsonl = write_rows(tmp_path / "more.jsonl", more)
  tfds.build(jsonl, "some_rows", built, "test")
  assert read(built, "test") == more
  assert read(built) == ROWS
  with pytest.raises(InputError, match="has the split 'test'; choose another"):
    tfds.build(jsonl, "some_rows", built, "test")
  with pytest.raises(InputError, match="splits train, test, got 'valid'"):
    read(built, "valid")


def test_many_rows_keep_their_order(tmp_path):
  """More than one shard's worth is not needed to see a sort by text: 9 < 10."""
  rows = [{"n": n} for n in range(1200)]
  jsonl = write_rows(tmp_path / "rows.jsonl", rows)
  tfds.build(jsonl, "numbers", tmp_path)
  assert read(str(tmp_path), name="numbers") == rows


@pytest.mark.parametrize(
  ("name", "split", "message"),
  [
    ("Some-Rows", "train", "name of a dataset must be .*'Some-Rows'"),
    ("rows", "Train", "split of a dataset must be .*'Train'"),
    ("1rows", "train", "begin with a letter"),
  ],
)
def test_bad_names(tmp_path, name, split, message):
  jsonl = write_rows(tmp_path / "rows.jsonl", "a")
  with pytest.raises(InputError, match=message):
    tfds.build(jsonl, name, tmp_path, split)


def test_bad_rows(tmp_path):
  with pytest.raises(InputError, match="no data file"):
    tfds.build(tmp_path / "rows.jsonl", "rows", tmp_path)
  bad = tmp_path / "bad.jsonl"
  bad.write_text('{"text": "a"}\n{"text": "a \\ud800"}\n')
  with pytest.raises(InputError, match="line 2: not valid text"):
    tfds.build(bad, "rows", tmp_path)
  assert not (tmp_path / "rows").exists()


def test_an_unknown_dataset(built):
  with pytest.raises(InputError) as error:
    read(built, name="ag_news_subsets")
  message = str(error.value)
  for part in (
    "'ag_news_subsets'",
    built,
    "'ag_news_subset'",
    "opd-jax dataset",
  ):
    assert part in message
  with pytest.raises(InputError, match="NAME/CONFIG") as raised:
    read(built, name="huggingface:some")
  example = str(raised.value).rpartition("tfds:")[2]
  assert example in tensorflow_datasets.list_builders(
    with_community_datasets=False
  )
  with pytest.raises(InputError, match=r"unknown option 'folder'.*data_dir"):
    tfds.read("some_rows", "train", {"folder": built})
  with pytest.raises(InputError, match="data_dir must be a folder, got 3"):
    tfds.read("some_rows", "train", {"data_dir": 3})


def test_a_dataset_of_the_catalogue_that_cannot_be_had(tmp_path, monkeypatch):
  """Known by name, but its download fails: the reason and a way out."""

  def fail(self, **options):
    raise ConnectionError("no route to host")

  monkeypatch.setattr(
    tensorflow_datasets.core.DatasetBuilder, "download_and_prepare", fail
  )
  with pytest.raises(InputError) as error:
    read(str(tmp_path), name="ag_news_subset")
  message = str(error.value)
  for part in ("ag_news_subset", "no route to host", "JSONL", "tfds build"):
    assert part in message


def test_a_dataset_in_another_format(built):
  info = Path(built) / "some_rows" / "1.0.0" / "dataset_info.json"
  text = info.read_text()
  assert text.count('"fileFormat": "array_record"') == 1
  info.write_text(text.replace('"array_record"', '"tfrecord"'))
  with pytest.raises(
    InputError, match=r"not in the format array_record, .*tfds"
  ):
    read(built)


def test_rows_written_by_others_are_plain(tmp_path):
  """Sequences, nested features and floats, as the catalogue has them."""
  features = tensorflow_datasets.features

  class Other(
    tensorflow_datasets.core.GeneratorBasedBuilder, skip_registration=True
  ):
    name = "other"
    VERSION = tensorflow_datasets.core.Version("2.1.0")

    def _info(self):
      return tensorflow_datasets.core.DatasetInfo(
        builder=self,
        features=features.FeaturesDict(
          {
            "text": features.Text(),
            "label": features.ClassLabel(names=["no", "yes"]),
            "parts": features.Sequence({"word": features.Text()}),
            "nested": {"words": features.Sequence(features.Text())},
          }
        ),
        disable_shuffling=True,
      )

    def _split_generators(self, dl_manager):
      return {"train": self._generate_examples()}

    def _generate_examples(self):
      yield (
        0,
        {
          "text": "é",
          "label": "yes",
          "parts": [{"word": "a"}, {"word": "b"}],
          "nested": {"words": ["c"]},
        },
      )

  tensorflow_datasets.disable_progress_bar()
  Other(data_dir=tmp_path, file_format="array_record").download_and_prepare()
  expected = {
    "text": "é",
    "label": 1,
    "parts": {"word": ["a", "b"]},
    "nested": {"words": ["c"]},
  }
  for name in ("other", "other:2.1.0"):
    assert read(str(tmp_path), name=name) == [expected]
  json.dumps(expected)
