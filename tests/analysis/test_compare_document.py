"""Pages, tables and figures of comparisons, and `dsv3 report` of several runs."""

import dataclasses
import json
import shutil
import subprocess
import sys
import xml.etree.ElementTree
from pathlib import Path

import numpy as np
import pytest

from dsv3_jax import cli
from dsv3_jax.analysis import plots, records
from dsv3_jax.analysis.comparison import compare, curves, document, figures, gather
from dsv3_jax.config import ConfigError
from tests.analysis import pages, synthetic

LONG = "every mechanism of the report switched on, with weights 0.3 and then 0.1 <b>&"
ARMS = {"base": ({}, 0.0), LONG: ({"model.mtp_depth": 2}, -0.03),
        "none": ({"model.mtp_depth": 0}, 0.04)}
NAMES = {"differences", "loss_difference", "loss", "validation", "compute", "wall_time", "max_vio",
         "expert_load"}


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
  return synthetic.sweep(tmp_path_factory.mktemp("pool"), ARMS, question="Deeper <i>?")


@pytest.fixture(scope="module")
def made(pool):
  return compare.make(gather.collect([pool]))


@pytest.fixture(scope="module")
def report(made, tmp_path_factory):
  out = tmp_path_factory.mktemp("report")
  return document.write(made, out, ["pdf"], "dsv3 report 'x <y>'")


def test_page(report):
  """Oracle: an HTML parser: well-formed, fetches nothing, ids unique, no markup from names."""
  pages.check_fetches_nothing(report)
  pages.check_ids(report)
  page = pages.read(report)
  assert not {"i", "y"} & set(page.tags)
  labels = [value for tag, name, value in page.attributes if (tag, name) == ("svg", "aria-label")]
  assert len(labels) == len(set(labels)) == len(NAMES)
  text = "".join(page.text)
  for words in (LONG, "Deeper <i>?", "dsv3 report 'x <y>'", "To believe or doubt", "p, adjusted"):
    assert words in text, words


def test_files(report):
  """Oracle: parsers of the formats; each figure is named in the Markdown; nothing half is left."""
  folder = report.parent / "plots"
  assert {p.stem for p in folder.iterdir()} == NAMES
  markdown = (report.parent / "report.md").read_text()
  for name in NAMES:
    xml.etree.ElementTree.parse(folder / f"{name}.svg")
    assert (folder / f"{name}.pdf").read_bytes().startswith(b"%PDF")
    assert f"](plots/{name}.svg)" in markdown
  assert "<b>" not in markdown and not list(report.parent.rglob("*.tmp"))


def test_equal_files_give_equal_reports(made, report, tmp_path):
  """Law: writing elsewhere gives the same bytes; pictures that are not wanted any more go."""
  (tmp_path / "plots").mkdir()
  (tmp_path / "plots" / "loss.pdf").write_text("old")
  document.write(made, tmp_path, (), "dsv3 report 'x <y>'")
  files = lambda folder: {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*.*")}
  before = files(report.parent)
  assert files(tmp_path) == {p: data for p, data in before.items() if p.suffix != ".pdf"}
  figure = figures.forest(made)
  assert document.render(figure, "pdf") == before[Path("plots/differences.pdf")]
  assert document.render(figure, "png").startswith(b"\x89PNG")
  with pytest.raises(ConfigError, match="svg, pdf, png"):
    document.write(made, tmp_path, ["gif"])


def test_numbers_in_the_table(made):
  """Oracle: the numbers formatted here."""
  head, _, base, deeper, none = document.table(made).splitlines()
  mean, deviation = (made.arm("none").spread("loss")[i] for i in (1, 2))
  d = made.differences["none"]
  assert head.startswith("| arm | seeds | validation loss | less base's | p, adjusted | bits per ")
  assert base.startswith("| base (baseline) | 3 | ") and " | - | - | " in base
  assert none.startswith(
      f"| none | 3 | {mean:.4f} ± {deviation:.4f} | {d.mean:+.4f} [{d.low:+.4f}, {d.high:+.4f}] | "
      f"{made.adjusted['none']:.3f} | ")
  assert "&lt;b>" in deeper


def _boxes(figure):
  """Bounding boxes of axes, legend, and all text, in pixels; the figure's own size."""
  figure.draw_without_rendering()
  axes = [a.get_window_extent() for a in figure.axes]
  tight = [a.get_tightbbox() for a in figure.axes if a.get_visible()]
  return axes, [legend.get_window_extent() for legend in figure.legends], tight, figure.bbox


@pytest.mark.parametrize("count", [1, 2, 12])
def test_figures_of_few_and_many_arms(tmp_path, count):
  """Law: no legend on data, nothing cut off at the figure's edge, one style an arm."""
  arms = {f"gate {i}" if i % 2 else f"{i} {LONG}": ({"loss.bias_speed": 1e-3 * (i + 1)}, 0.01 * i)
          for i in range(count)}
  pool = synthetic.sweep(tmp_path, arms, seeds=2, steps=8)
  c = compare.make(gather.collect([pool]))
  look = figures.styles(c)
  assert len(set(map(str, look.values()))) == count and look[c.baseline] == (plots.TEXT, "-")
  drawn = 0
  for name in ("forest", "loss", "loss_difference", "validation", "expert_load"):
    figure = getattr(figures, name)(c)
    if figure is None:
      continue
    drawn += 1
    axes, legends, tight, whole = _boxes(figure)
    for legend in legends:
      assert not any(legend.overlaps(a) for a in axes), name
    for box in [*legends, *tight]:
      assert min(box.x0, box.y0) >= -1, name
      assert box.x1 <= whole.x1 + 1 and box.y1 <= whole.y1 + 1, name
  assert drawn == (3 if count == 1 else 5)


def test_curves(made):
  """Oracle: means and deviations of the records' own curves, with numpy; differences by seed."""
  arm, base = made.arm("none"), made.arm("base")
  of = lambda a, key: np.array([f.record["curve"][key] for f in a.runs.values()])
  x, mean, deviation = curves.curve(arm, "loss")
  np.testing.assert_allclose(x, of(arm, "tokens")[0])
  np.testing.assert_allclose(mean, of(arm, "loss").mean(0))
  np.testing.assert_allclose(deviation, of(arm, "loss").std(0, ddof=1), atol=1e-12)
  x, mean, deviation = curves.difference(arm, base)
  differences = of(arm, "loss") - of(base, "loss")
  np.testing.assert_allclose(mean, differences.mean(0), atol=1e-12)
  np.testing.assert_allclose(deviation, differences.std(0, ddof=1), atol=1e-12)
  line = figures.compute(made).axes[0].lines[2]
  tokens = of(arm, "tokens")[0] * arm.first["flops_per_token"]
  assert line.get_xdata()[-1] == pytest.approx(tokens[-1] / 1e12)  # TFLOP


def test_curves_of_runs_that_end_early(made):
  """Oracle: by hand: no difference where the baseline has ended, no deviation of one run."""
  def cut(arm, lengths):
    runs = {}
    for seed, length in enumerate(lengths):
      curve = {k: v[:length] for k, v in arm.runs[seed].record["curve"].items()}
      runs[seed] = dataclasses.replace(arm.runs[seed],
                                       record=arm.runs[seed].record | {"curve": curve})
    return dataclasses.replace(arm, runs=runs)

  whole = len(made.arms[0].first["curve"]["tokens"])
  arm, base = cut(made.arm("none"), (whole, whole)), cut(made.arm("base"), (20, 30))
  x, mean, deviation = curves.difference(arm, base)
  assert len(x) == 30 and np.isfinite(mean).all()
  assert np.isfinite(deviation[:20]).all() and np.isnan(deviation[20:]).all()
  x, mean, deviation = curves.curve(cut(made.arm("none"), (20, whole)), "loss")
  assert len(x) == whole and np.isfinite(mean).all() and np.isnan(deviation[20:]).all()
  assert figures.loss(dataclasses.replace(made, arms=(base, arm, made.arms[1])))


def test_dollars_in_names(tmp_path):
  """Law: a name between dollars, no formula, is drawn as it is written."""
  arms = {"$5_$ less": ({}, 0.0), r"$\foo$ 7": ({"loss.bias_speed": 0.01}, 0.1)}
  c = compare.make(gather.collect([synthetic.sweep(tmp_path, arms, seeds=2, steps=8)]))
  for draw in (figures.forest, figures.loss, figures.expert_load):
    svg = plots.to_svg(draw(c))
    assert all(name in svg for name in arms)


def test_expert_load(made):
  """Oracle: the records' loads; one scale for all, whose end is a whole number above the largest.
  """
  run = made.arms[2].runs[0]
  load_LE = 3 * np.array(run.record["load_LE"])[:2, ::-1]
  run = dataclasses.replace(run, record=run.record | {"load_LE": load_LE.tolist()})
  arm = dataclasses.replace(made.arms[2], runs={0: run})
  figure = figures.expert_load(dataclasses.replace(made, arms=(*made.arms[:2], arm)))
  for axes, expected in zip(figure.axes, (made.arms[0].first["load_LE"],
                                          made.arms[1].first["load_LE"], load_LE), strict=False):
    shown = np.array(axes.collections[0].get_array())
    np.testing.assert_allclose(shown.reshape(-1), np.ravel(expected))
    assert axes.collections[0].get_clim() == (0, np.ceil(load_LE.max()))


def test_runs_that_have_nothing_yet(tmp_path):
  """Law: runs without evaluations, without steps, and of NaN give a page all the same."""
  quiet = synthetic.write(tmp_path / "quiet", steps=6, eval_every=0, changes={"optim.lr": 1e-3})
  dead = synthetic.write(tmp_path / "dead", steps=6, finished=False)
  (dead / "metrics.jsonl").write_text("")
  nan = synthetic.write(tmp_path / "nan", steps=6, eval_every=3, changes={"optim.lr": 1e-4})
  rows = [json.loads(line) | {"loss": None, "max_vio": None} for line in
          (nan / "metrics.jsonl").read_text().splitlines()]
  (nan / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  late = synthetic.write(tmp_path / "late", steps=6, eval_every=3, changes={"optim.lr": 3e-4})
  rows = [json.loads(line) for line in (late / "metrics.jsonl").read_text().splitlines()]
  rows[0]["loss"] = rows[0]["max_vio"] = None
  (late / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  for sources in ([quiet, dead, nan, late], [dead], [nan]):
    c = compare.make(gather.collect(sources))
    pages.read(document.write(c, tmp_path / "out"))


# --- the command --------------------------------------------------------------------------------


def _run(capsys, *words):
  code = cli.run(["report", *map(str, words)])
  out = capsys.readouterr()
  return code, out.out, out.err


def test_command(pool, tmp_path, capsys, monkeypatch):
  """Oracle: which files are where, and what the library says."""
  monkeypatch.setattr(document, "write", lambda c, out, formats, command: (
      f"{out} {','.join(formats)} {c.baseline} {c.metric} {len(c.arms)} {command[:11]}"))
  own = tmp_path / "own"
  shutil.copytree(pool, own)
  (own / "sweeps" / "other-cpu.json").write_text(
      (own / "sweeps" / "ablate-cpu.json").read_text())
  arms = sorted((pool / "arms").iterdir())
  for words, said in (
      ([pool], f"{pool}/reports/ablate-cpu svg base loss 3 dsv3 report\n"),
      ([pool, "--out=x", "--baseline=none", "--metric=smoothed", "--format=pdf,png"],
       "x pdf,png none smoothed 3 dsv3 report\n"),
      ([own], f"{own}/reports/ablate-cpu svg base loss 3 dsv3 report\n"
              f"{own}/reports/other-cpu svg base loss 3 dsv3 report\n"),
      ([own, "--sweep=x/other.py:cpu"], f"{own}/reports/other-cpu svg base loss 3 dsv3 report\n"),
      ([arms[0], arms[3]], "report svg base loss 2 dsv3 report\n")):
    assert _run(capsys, *words) == (0, said, "")
  for words, said in (([own, "--out=x"], "2 sweeps"), ([pool, "--json", "--markdown"], "not both"),
                      ([pool, tmp_path / "absent"], "is not there")):
    code, out, error = _run(capsys, *words)
    assert (code, out) == (2, "") and said in error


def test_printed(pool, made, tmp_path, capsys):
  """Oracle: the library's table and numbers; nothing is written."""
  before = sorted(pool.rglob("*"))
  assert _run(capsys, pool, "--markdown") == (0, document.table(made), "")
  own = tmp_path / "own"
  shutil.copytree(pool, own)
  shutil.copy(own / "sweeps" / "ablate-cpu.json", own / "sweeps" / "other-cpu.json")
  table = document.table(made)
  assert _run(capsys, own, "--markdown") == (
      0, f"## ablate-cpu\n\n{table}\n## other-cpu\n\n{table}", "")
  code, out, _ = _run(capsys, pool, "--json")
  assert json.loads(out) == json.loads(json.dumps(compare.to_json(made)))
  assert sorted(pool.rglob("*")) == before


def test_records_of_an_experiment_file(tmp_path, capsys):
  """Oracle: records of the arms that the file's sweep yields, and one of another experiment."""
  experiment = tmp_path / "ablate_it.py"
  experiment.write_text(
      '"""Does it?\n\nArms: two.\n"""\n'
      "from dsv3_jax import config\n"
      "def get_config(arg=None):\n"
      "  return config.replace(config.Config(), **{'train.tokens': 4 * 2048})\n"
      "def sweep(arg=None):\n"
      "  for seed in range(2):\n"
      "    for lr in (1e-3, 2e-3):\n"
      "      yield {'arm': f'lr {lr}', 'optim.lr': lr, 'train.seed': seed}\n")
  for i, changes in enumerate([{"optim.lr": lr, "train.seed": s} for lr in (1e-3, 2e-3, 3e-3)
                               for s in range(2)][1:]):
    folder = synthetic.write(tmp_path / f"run{i}", steps=4, eval_every=2, changes=changes)
    records.write(folder, tmp_path / "kept")
  code, out, _ = _run(capsys, tmp_path / "kept", f"--sweep={experiment}", "--json")
  found = json.loads(out)
  assert (code, found["question"], found["title"]) == (0, "Does it?", "ablate_it")
  assert [(a["name"], a["seeds"], a["unfinished"]) for a in found["arms"]] == [
      ("lr 0.001", [1], {"0": "not found"}), ("lr 0.002", [0, 1], {})]
  assert found["arms"][1]["difference"]["seeds"] == [1]


def test_no_jax(pool):
  """Oracle: the modules of a fresh interpreter after the command."""
  code = ("import sys; from dsv3_jax import cli; cli.run(['report', sys.argv[1], '--markdown']); "
          "assert not {'jax', 'ml_collections'} & set(sys.modules)")
  subprocess.run([sys.executable, "-c", code, str(pool)], check=True, capture_output=True,
                 cwd=Path(__file__).parents[2])
