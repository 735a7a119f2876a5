"""Records of finished runs: what they hold, how they are found, and what is refused."""

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest

from dsv3_jax import config
from dsv3_jax.analysis import records, statistics
from dsv3_jax.config import ConfigError
from tests.analysis import synthetic


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  folder = tmp_path_factory.mktemp("records") / "run"
  return synthetic.write(folder, steps=300, changes={"train.seed": 4, "model.mtp_depth": 1})


def test_numbers_are_those_of_the_files(run):
  """Oracle: metrics.jsonl and summary.json read with json alone; the EMA as a weighted mean."""
  rows = [json.loads(line) for line in (run / "metrics.jsonl").open()]
  train = [row for row in rows if row["kind"] == "train"]
  made = records.record(run)
  assert set(records.FIELDS) <= made.keys()
  summary = json.loads((run / "summary.json").read_text())
  for key in ("parameters", "activated_parameters"):
    assert made[key] == {"parameters": 12624384, "activated_parameters": 7905792}[key]
  assert (made["commit"], made["versions"]) == (summary["commit"], summary["versions"])
  assert (made["seed"], made["steps"], made["tokens"]) == (4, 300, 300 * 2048)
  weights = 0.9 ** np.arange(300)[::-1]
  for key, name, digits in (("loss", "train_smoothed", 6), ("max_vio", "train_max_vio", 5)):
    expected = np.average([row[key] for row in train], weights=weights)
    assert made["final"][name] == pytest.approx(expected, abs=0.6 * 10**-digits)
    assert made["curve"][key][-1] == pytest.approx(expected, abs=1e-3)
  curve = made["curve"]
  assert len(curve["step"]) == records.POINTS and curve["step"][0] == 1
  assert (curve["step"][-1], curve["tokens"][-1]) == (300, 300 * 2048)
  assert [e["loss"] for e in made["evaluations"]] == pytest.approx(
      [row["loss"] for row in rows if row["kind"] == "eval"], abs=1e-5)
  assert made["final"]["bits_per_byte"] == pytest.approx(summary["final"]["bits_per_byte"])
  np.testing.assert_allclose(made["load_LE"], rows[-1]["load_LE"], atol=6e-4)
  assert made["rows"] == ["layer 1", "layer 2", "layer 3", "MTP 1"]


def test_written_record_comes_back(run, tmp_path):
  """Law: read(write(x)) == x, by its config's fingerprint; under 12 KB; the whole config in it."""
  path = records.write(run, tmp_path / "new" / "records")
  cfg = config.from_json((run / "config.json").read_text())
  assert path.name == f"{config.fingerprint(cfg)}.json" and path.stat().st_size < 12_000
  found = records.find(path.parent, config.fingerprint(cfg))
  assert found == records.record(run) and [found] == records.read(path.parent)
  assert config.from_dict(found["config"]) == cfg
  assert records.find(path.parent, "0" * 16) is None
  assert records.read(tmp_path / "absent") == []
  assert str(run.parent) not in path.read_text()  # nothing of this machine


def test_unfinished_runs_get_no_record(tmp_path):
  """Oracle: a run at half of its tokens, and one killed before its summary."""
  half = synthetic.write(tmp_path / "half", steps=10, finished=False)
  killed = synthetic.write(tmp_path / "killed", steps=10)
  (killed / "summary.json").unlink()
  for folder in (half, killed):
    assert records.record(folder)["finished"] is False
    with pytest.raises(ConfigError, match="not finished"):
      records.write(folder, tmp_path / "records")
  assert not (tmp_path / "records").exists()


@pytest.mark.parametrize("content", ["{", "\xff", '{"id": 1, "curve": {}, "format": 0}',
                                     '{"id": 1, "curve": {}, "format": 1}'])
def test_unreadable_records_are_named(run, tmp_path, content):
  """Oracle: the file's name in the note; the others are read; JSON of something else is no matter.
  """
  records.write(run, tmp_path)
  (tmp_path / "broken.json").write_bytes(content.encode("latin-1"))
  (tmp_path / "other.json").write_text('{"suite": 1}')
  notes = []
  assert len(records.read(tmp_path, notes)) == 1
  assert len(notes) == 1 and str(tmp_path / "broken.json") in notes[0]
  assert records.find(tmp_path, "broken") is None


def test_a_crash_while_writing_leaves_the_old_record(run, tmp_path, monkeypatch):
  """Law: the old file or the new one, and no other file."""
  path = records.write(run, tmp_path)
  before = path.read_bytes()

  def fail(*_):
    raise OSError("disk full")

  monkeypatch.setattr(os, "replace", fail)
  with pytest.raises(OSError, match="disk full"):
    records.write(run, tmp_path)
  assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_damaged_workdirs(tmp_path):
  """Oracle: a config of another version and NaN losses give a record that says so."""
  folder = synthetic.write(tmp_path / "run", steps=8, eval_every=4)
  values = json.loads((folder / "config.json").read_text()) | {"gone": 1}
  (folder / "config.json").write_text(json.dumps(values))
  lines = (folder / "metrics.jsonl").read_text().splitlines()
  rows = [json.loads(line) | {"loss": None, "max_vio": float("nan")} for line in lines]
  (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  (folder / "arm.json").write_text("{")
  made = records.record(folder)
  assert "gone" in " ".join(made["notes"]) and "arm.json" in " ".join(made["notes"])
  assert len(made["id"]) == 16 and made["config"]["gone"] == 1
  assert made["final"]["train_smoothed"] is None and made["parameters"] == 10_630_000
  json.loads(records.dumps(made), parse_constant=pytest.fail)  # no NaN in it


def test_texts_are_known_by_their_shards(tmp_path):
  """Oracle: the formula of `data.pipeline.Corpus.fingerprint`; a checkpoint's word counts more."""
  folder = synthetic.write(tmp_path / "run", steps=2, changes={
      "data.sources": ("stdlib", f"shards:{tmp_path / 'shared'}")})
  assert records.record(folder)["corpus"] == {"tokenizer": "", "text": ""}
  for path, content in ((folder / "data" / "x", "b"), (tmp_path / "shared", "a")):
    path.mkdir(parents=True)
    (path / "index.json").write_text(json.dumps({"tokenizer": "t", "content": content}))
  expected = hashlib.sha256(b"t b a").hexdigest()[:16]
  assert records.record(folder)["corpus"] == {"tokenizer": "t", "text": expected}
  for step, value in ((1, "old"), (2, "new")):
    path = folder / "checkpoints" / f"{step:08d}"
    path.mkdir(parents=True)
    (path / "checkpoint.json").write_text(json.dumps({"iterator": {"corpus": value}}))
  assert records.record(folder)["corpus"] == {"tokenizer": "t", "text": "new"}


@pytest.mark.parametrize("steps", [1, 3])
def test_ema(steps):
  """Oracle: the weighted mean written out, what is not finite left out."""
  values = np.array([2.0, np.nan, 4.0, 1.0, np.inf, 3.0])
  got = statistics.ema(values, steps)
  for i in range(len(values)):
    kept = [j for j in range(i + 1) if np.isfinite(values[j])]
    expected = np.average(values[kept], weights=[0.9 ** (steps * (i - j)) for j in kept])
    assert got[i] == pytest.approx(expected, rel=1e-12)
  assert np.isnan(statistics.ema(np.array([np.nan]))).all()


def test_no_jax(run):
  """Oracle: the modules of a fresh interpreter."""
  import subprocess
  import sys

  code = ("import sys; from dsv3_jax.analysis import records; records.record(sys.argv[1]); "
          "assert 'jax' not in sys.modules")
  subprocess.run([sys.executable, "-c", code, str(run)], check=True,
                 cwd=Path(__file__).parents[2])
