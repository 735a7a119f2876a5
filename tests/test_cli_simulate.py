"""`dsv3 simulate`: what people type, and what they get."""

import json
import subprocess
import sys

import numpy as np
import pytest

from dsv3_jax import cli
from dsv3_jax.analysis import placement_plot
from dsv3_jax.infer import simulate

SMALL = ["simulate", "--steps=12", "--layers=2", "--experts=32", "--ranks=8,16", "--window=3",
         "--every=3"]
LOAD = {"steps": 12, "layers": 2, "experts": 32}


def printed(words, capsys):
  assert cli.run(words) == 0
  return capsys.readouterr().out


def test_table(capsys):
  """Oracle: the simulation's own numbers, made in Python."""
  lines = printed(SMALL, capsys).splitlines()
  assert lines[0] == ("made-up load, seed 0: 12 steps, 2 layers, 32 experts; rebalanced every 3 "
                      "from the last 3")
  assert lines[2] == "8 GPUs, 40 slots, 8 redundant experts, global"
  assert lines[11] == "16 GPUs, 48 slots, 16 redundant experts, hierarchical"
  load = simulate.synthetic(**LOAD)
  for first, gpus in ((4, 8), (13, 16)):
    want = simulate.run(load, simulate.cluster(gpus, 32, redundant=4), simulate.POLICIES, 3, 3)
    for line, o in zip(lines[first:], want):
      moved = f"{np.mean(o.moved):,.0f}" if o.moved else "-"
      assert line.split()[:5] == [o.policy, f"{o.ratio_S.mean():.4f}", f"{o.ratio_S.max():.4f}",
                                  f"{o.worst:.3f}", moved]
      assert float(line.split()[5]) >= 0


def test_json(capsys):
  """Oracle: the simulation's own numbers; a seed repeats all but the times."""
  words = [*SMALL, "--seed=4", "--policies=eplb,limited", "--moves=2", "--json"]
  got = json.loads(printed(words, capsys))
  want = simulate.run(simulate.synthetic(**LOAD, seed=4), simulate.cluster(16, 32, redundant=4),
                      ("eplb", "limited"), 3, 3, 2)
  assert (got["window"], got["every"], got["clusters"][1]["slots"]) == (3, 3, 48)
  for row, o in zip(got["clusters"][1]["policies"], want, strict=True):
    assert (row["policy"], row["ratio"], row["moved"]) == (
        o.policy, o.ratio_S.tolist(), list(o.moved))
    assert (row["mean"], row["worst_layer"]) == (np.mean(row["ratio"]), o.worst)
    assert len(row["milliseconds"]) == 3
  assert max(got["clusters"][1]["policies"][1]["moved"]) <= 4
  again = json.loads(printed(words, capsys))
  for run in (got, again):
    for cluster in run["clusters"]:
      for row in cluster["policies"]:
        del row["milliseconds"]
  assert got == again


@pytest.mark.parametrize("kind", ["npy", "json", "workdir", "metrics"])
def test_recorded(kind, tmp_path, capsys):
  """Law: every kind of file gives the same loads; other lines and half lines are skipped."""
  load = np.random.default_rng(0).gamma(1.0, size=(5, 2, 16)).round(3)
  if kind == "npy":
    path = tmp_path / "load.npy"
    np.save(path, load)
  elif kind == "json":
    path = tmp_path / "load.json"
    path.write_text(json.dumps(load.tolist()))
  else:
    rows = [{"kind": "train", "step": 1, "loss": 2.0}]
    rows += [{"kind": "load", "step": s, "load_LE": x.tolist()} for s, x in enumerate(load)]
    path = tmp_path / "metrics.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + '\n{"kind": "load", "st')
    path = tmp_path if kind == "workdir" else path
  got = json.loads(printed(["simulate", f"--load={path}", "--ranks=4", "--json"], capsys))
  assert (got["load"], got["steps"], got["layers"], got["experts"]) == (str(path), 5, 2, 16)
  want = simulate.run(load, simulate.cluster(4, 16, redundant=2), simulate.POLICIES, 1, 1)
  assert [row["ratio"] for row in got["clusters"][0]["policies"]] == [
      o.ratio_S.tolist() for o in want]


@pytest.mark.parametrize("words, named", [
    (["--ranks=a"], ["--ranks=a", "whole numbers"]), (["--ranks=12"], ["ranks=12", "8 GPUs"]),
    (["--groups=3"], ["num_groups=3", "32 experts"]), (["--moves=-1"], ["max_moves=-1"]),
    (["--policies=elpb"], ["'elpb'", "eplb"]), (["--window=12"], ["window=12", "12 steps"]),
    (["--load=/no/such"], ["/no/such"]), (["--load={0}"], ["--steps=12", "recorded"]),
    (["--plot=x.gif"], ["x.gif", ".svg"])])
def test_mistakes(words, named, tmp_path, capsys):
  """Oracle: exit code 2 and one line that names what was wrong and what would be right."""
  path = tmp_path / "load.npy"
  np.save(path, np.ones((3, 2, 16)))
  words = [word.format(path) for word in words]
  assert cli.run([*(SMALL if words != ["--load=/no/such"] else ["simulate"]), *words]) == 2
  err = capsys.readouterr().err.splitlines()
  assert len(err) == 1 and all(part in err[0] for part in named), err


@pytest.mark.parametrize("content, named", [
    ("[1, 2", ["could not be read"]), ("[[1, 2], [3]]", ["unequal length"]), ("[]", ["(0,)"]),
    ("[[1, 2]]", ["(1, 2)"]), ('[[["a"]]]', ["no numbers"]), ("[[[1, -2]]]", ["-2", "[0, 0, 1]"]),
    ("[[[1, NaN]]]", ["nan"])])
def test_bad_files(content, named, tmp_path, capsys):
  """Oracle: one line that names the file and what it should hold."""
  path = tmp_path / "load.json"
  path.write_text(content)
  assert cli.run(["simulate", f"--load={path}"]) == 2
  err = capsys.readouterr().err.splitlines()
  assert len(err) == 1 and all(part in err[0] for part in [str(path), *named]), err


def test_without_jax():
  """Law: the command starts without jax, so that it answers at once."""
  code = (f"import sys; from dsv3_jax import cli; status = cli.run({SMALL!r}); "
          "sys.exit(status or 'jax' in sys.modules or 'matplotlib' in sys.modules)")
  assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL).returncode == 0


def test_picture(tmp_path, capsys):
  """Oracle: the curves' points, read back; the SVG holds titles and names, and repeats."""
  ratio = np.array([1.5, 1.2, 1.0])
  axes = placement_plot.draw([("a title", {"eplb": ratio, "ours": ratio / 1.1})], 7, 2).axes[0]
  points = {line.get_label(): line.get_xydata() for line in axes.lines}
  np.testing.assert_allclose(points["eplb"], [[7, 0.5], [8, 0.2], [9, placement_plot.LEAST]])
  assert [list(line.get_xdata()) for line in axes.lines if line.get_marker() == "|"] == [[7, 9]]
  texts = []
  for name in ("a.svg", "b.svg"):
    assert str(tmp_path / name) in printed([*SMALL, f"--plot={tmp_path / name}"], capsys)
    texts.append((tmp_path / name).read_text())
  assert texts[0] == texts[1]
  assert all(word in texts[0] for word in (*simulate.POLICIES, "8 GPUs, 40 slots, 8 redundant"))
