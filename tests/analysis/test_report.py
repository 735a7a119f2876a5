"""The report of a run, from synthetic workdirs."""

import json
import re
import xml.etree.ElementTree

import numpy as np
import pytest

from dsv3_jax import config
from dsv3_jax.analysis import plots, report
from dsv3_jax.analysis import workdir as workdir_lib
from dsv3_jax.config import ConfigError
from tests.analysis import pages, synthetic

PLOTS = ("loss", "bits_per_byte", "mtp_loss", "schedules", "grad_norm", "throughput", "max_vio",
         "expert_load")


def _page(workdir):
  path = report.write(workdir)
  assert path == workdir / "report.html"
  return pages.read(path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  workdir = synthetic.write(tmp_path_factory.mktemp("finished") / "tiny", steps=200, eval_every=50)
  return workdir, _page(workdir)


def test_page_is_well_formed_and_fetches_nothing(finished):
  """Oracle: an HTML parser, and the attributes through which a page can load something."""
  pages.check_fetches_nothing(finished[0] / "report.html")


def test_every_plot_is_there_three_times(finished):
  """Oracle: an XML parser reads each SVG; the page has as many pictures as the folder has files."""
  workdir, page = finished
  assert page.tags.count("svg") == len(PLOTS)
  markdown = (workdir / "report.md").read_text()
  for name in PLOTS:
    xml.etree.ElementTree.parse(workdir / "plots" / f"{name}.svg")
    assert f"](plots/{name}.svg)" in markdown
  labels = [value for tag, name, value in page.attributes if (tag, name) == ("svg", "aria-label")]
  assert len(set(labels)) == len(PLOTS)


def test_ids_of_inline_pictures_are_unique_and_resolved(finished):
  """Law: no id twice on a page, and each reference into a picture meets its id."""
  pages.check_ids(finished[0] / "report.html")


def test_numbers_are_those_of_the_files(finished):
  """Oracle: metrics.jsonl and summary.json, read here with json alone."""
  workdir, page = finished
  text = " ".join(page.text)
  rows = [json.loads(line) for line in (workdir / "metrics.jsonl").open()]
  evals = [row for row in rows if row["kind"] == "eval"]
  train = [row for row in rows if row["kind"] == "train"]
  markdown = (workdir / "report.md").read_text()
  window = plots.smoothing_window(len(train))
  for content in (text, markdown):
    assert f"{evals[-1]['bits_per_byte']:.4f}" in content
    assert f"{evals[-1]['loss']:.3f}" in content
    assert re.search(rf"skipped steps\W+{train[-1]['skipped']}\b", content)
    assert f"{np.mean([row['loss'] for row in train[-window:]]):.3f}" in content
    assert f"{np.median([row['time']['tokens_per_s'] for row in train]):,.0f}" in content
    for words in ("2.1300", "1.9200", "4.9000", "10,630,000", "0123456789abcdef", "3f1c9a2b77de",
                  "jax 0.10.2", "2 CPU cores", "Finished: 200 steps", "infill, temperature 0.8",
                  "completion, greedy",
                  "dsv3 train --config=experiments/tiny.py"):
      assert words in content, words


def test_samples_cannot_inject_markup(tmp_path):
  """Oracle: the parser sees the hostile text as text, and no new tag or attribute."""
  hostile = "</pre><script>alert(1)</script><img src=http://x onerror=y>```\n````\n&amp;\"'"
  samples = [{"kind": hostile, "prompt": hostile, "suffix": hostile, "text": hostile,
              "reference": hostile}]
  workdir = synthetic.write(tmp_path / "<b>run & co", steps=20, eval_every=10, samples=samples)
  page = _page(workdir)
  assert not {"script", "img", "b"} & set(page.tags)
  assert "".join(page.text).count(hostile) == 5
  assert "`````\n" + hostile + "\n`````" in (workdir / "report.md").read_text()


def test_report_of_equal_files_is_equal(finished):
  """Law: writing again changes no byte."""
  workdir, _ = finished
  names = ["report.html", "report.md", *(f"plots/{name}.svg" for name in PLOTS)]
  before = [(workdir / name).read_bytes() for name in names]
  report.write(workdir)
  assert [(workdir / name).read_bytes() for name in names] == before
  assert not list(workdir.rglob("*.tmp"))


def test_interrupted_run_without_evals(tmp_path):
  """Oracle: the words that say what is missing; a half-written last line is survived."""
  workdir = synthetic.write(tmp_path / "run", steps=7, eval_every=0, finished=False)
  with (workdir / "metrics.jsonl").open("a") as file:
    file.write('{"kind": "train", "step": 8, "tok')
  page = _page(workdir)
  text = " ".join(page.text)
  assert "Not finished: 7 steps" in text and "50% of" in text
  assert "No evaluation has run yet" in text
  assert "summary.json is not there yet" in text
  assert "1 line of metrics.jsonl could not be read" in text
  assert not (workdir / "plots" / "bits_per_byte.svg").exists()


@pytest.mark.parametrize("metrics", [None, "", "\n", "not json\n[1]\n{}\n"])
def test_run_that_died_before_its_first_step(tmp_path, metrics):
  """Oracle: a page that says so, instead of an exception."""
  workdir = synthetic.write(tmp_path / "run", steps=1, finished=False)
  if metrics is None:
    (workdir / "metrics.jsonl").unlink()
  else:
    (workdir / "metrics.jsonl").write_text(metrics)
  assert "No training step has been logged yet." in " ".join(_page(workdir).text)
  assert not list((workdir / "plots").iterdir())


@pytest.mark.parametrize("name", ["config.json", "summary.json"])
@pytest.mark.parametrize("content", ["{", "[]", "\xff"])
def test_damaged_files_are_named(tmp_path, name, content):
  """Oracle: the file's name among the notes that the page prints."""
  workdir = synthetic.write(tmp_path / "run", steps=2, eval_every=1)
  (workdir / name).write_bytes(content.encode("latin-1"))
  assert any(note.startswith(name) for note in workdir_lib.read(workdir).notes)
  if content == "{":
    assert any(name in words for words in _page(workdir).text)


def test_nan_losses_and_missing_fields(tmp_path):
  """Law: what a skipped or an old step lacks leaves a gap, not a crash."""
  workdir = synthetic.write(tmp_path / "run", steps=30, eval_every=10)
  rows = [json.loads(line) for line in (workdir / "metrics.jsonl").open()]
  for row in rows[5:8]:
    row["loss"] = row["grad_norm"] = float("nan")
  for row in rows[10:14]:
    for key in ("mtp_loss", "max_vio_L", "time", "lr", "accuracy"):
      row.pop(key, None)
  rows[20]["grad_norm"] = float("inf")
  rows[21].update(loss=None, mtp_loss=[None], max_vio_L=[None] * 4)  # NaN as the run writes it
  (workdir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  assert _page(workdir).tags.count("svg") == len(PLOTS)


def test_every_loss_nan(tmp_path):
  """Law: a run that diverged at once still has a report."""
  workdir = synthetic.write(tmp_path / "run", steps=5, eval_every=0, finished=False)
  rows = [json.loads(line) for line in (workdir / "metrics.jsonl").open()]
  for row in rows:
    row.update(loss=float("nan"), grad_norm=float("nan"), mtp_loss=[float("nan")],
               max_vio_L=[float("nan")] * 4)
  (workdir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  _page(workdir)


def test_resumed_run_counts_a_repeated_step_once(tmp_path):
  """Oracle: the last line of a step that appears twice."""
  workdir = synthetic.write(tmp_path / "run", steps=10, eval_every=0)
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  again = json.loads(lines[6]) | {"loss": 123.0}
  (workdir / "metrics.jsonl").write_text("\n".join([*lines, json.dumps(again)]) + "\n")
  run = workdir_lib.read(workdir)
  assert [row["step"] for row in run.train] == list(range(1, 11))
  assert run.train[6]["loss"] == 123.0


def test_large_model_and_long_run_stay_a_light_page(tmp_path):
  """Bound: 61 layers x 256 experts and 6,000 steps give a page under 4 MB."""
  workdir = synthetic.write(tmp_path / "run", steps=6000, eval_every=2000, layers=61, experts=256)
  _page(workdir)
  assert (workdir / "report.html").stat().st_size < 4e6


@pytest.mark.parametrize("make, words", [
    (lambda p: p / "absent", "not a folder"), (lambda p: p, "no run was started there")])
def test_not_a_workdir(tmp_path, make, words):
  """Oracle: one clear error."""
  with pytest.raises(ConfigError, match=words):
    report.write(make(tmp_path))


@pytest.mark.parametrize("window", [1, 2, 5, 8])
def test_smooth(window):
  """Oracle: a plain loop over the definition, NaN left out."""
  values = np.array([1.0, np.nan, 3.0, 5.0, 4.0, np.inf, 2.0, 8.0, 0.0])
  expected = []
  for i in range(len(values)):
    part = values[max(i - window // 2, 0):i + (window + 1) // 2]
    part = part[np.isfinite(part)]
    expected.append(part.mean() if part.size else np.nan)
  np.testing.assert_allclose(plots.smooth(values, window), expected, rtol=1e-12)


def test_says_how_the_run_was_cut():
  """Oracle: the config, in words; nothing where there is nothing to say."""
  runtime = config.to_dict(config.Runtime(
      mesh=config.Mesh(pipe=2, node=2, gpu=2), zero=1, recipe="v3", compute_dtype="bfloat16"))
  rows = dict(report._parallelism(runtime, {"device": 2**20, "whole": 8 * 2**20}))
  assert rows == {
      "mesh": "pipe 2 x node 2 x gpu 2, dualpipe_v pipeline, two-hop dispatch, ZeRO-1",
      "weights and moments": "1.0 MiB a device, 8.0 MiB in all",
      "recipe": "v3, bfloat16 between layers"}
  runtime = config.to_dict(config.Runtime(mesh=config.Mesh(data=2, context=4)))
  assert report._parallelism(runtime, {}) == [("mesh", "data 2 x context 4")]
  assert report._parallelism(config.to_dict(config.Runtime()), {"device": 1, "whole": 1}) == []
