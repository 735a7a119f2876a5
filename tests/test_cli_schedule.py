"""`dsv3 schedule`: what people type, and what they get."""

import json
import subprocess
import sys

import numpy as np
import pytest

from dsv3_jax import cli
from dsv3_jax.analysis import schedule_plot
from dsv3_jax.parallel import schedules

FIGURE_5 = ["schedule", "--name=dualpipe", "--ranks=8", "--microbatches=20"]


def test_text(capsys):
  """Oracle: the printed order and numbers of figure 5 (facts 3.3)."""
  assert cli.run(FIGURE_5) == 0
  lines = capsys.readouterr().out.splitlines()
  rows = [line.split() for line in lines[3:11]]
  assert rows[0] == ["0", "6", "9", "FFFFFFFFbwFbwFbwFXXXXXXBXBXBXBbwbwbwbw"]
  assert rows[4] == ["4", "6", "9", "FFFFFFFFFBXXXXXXXXXXXBBBBbbbbwwww"]
  assert any(line.startswith("makespan 66, ") and line.endswith("formula: 6") for line in lines)
  assert cli.run(["schedule"]) == 0
  assert capsys.readouterr().out.splitlines() == lines


@pytest.mark.parametrize("name, sizes, options, costs", [
    ("dualpipe_v", (3, 7), ["--overlapped=2.4", "--comm=.1"], {"overlapped": 2.4, "comm": 0.1}),
    ("zb1p", (4, 6), ["--forward=2", "--backward_input", "1.5", "--backward_weight=.5"],
     {"forward": 2.0, "backward_input": 1.5, "backward_weight": 0.5})])
def test_json(name, sizes, options, costs, capsys):
  """Oracle: the schedule's own numbers, made in Python; the orders come back from their text."""
  ranks, microbatches = sizes
  assert cli.run(["schedule", f"--name={name}", f"--ranks={ranks}",
                  f"--microbatches={microbatches}", *options, "--json"]) == 0
  got = json.loads(capsys.readouterr().out)
  plan = schedules.make(name, ranks, microbatches)
  found = plan.simulate(**costs)
  assert (got["makespan"], got["bubble"], got["peak_activations"]) == (
      found.makespan, list(found.bubble), list(found.peak_activations))
  unit = lambda u: u and schedules.Unit(**u)
  orders = tuple(tuple(schedules.Op(o["kind"], unit(o["forward"]), unit(o["backward"]))
                       for o in order) for order in got["orders"])
  assert orders == plan.orders
  assert got["orders"][-1][-1]["end"] == found.ends[-1][-1]
  assert got["lockstep"]["ops"] == {"ticks": len(plan.ticks().rows),
                                    "makespan": plan.ticks().simulate(**costs).makespan}


@pytest.mark.parametrize("words, named", [
    (["--name=dualpipev"], ["'dualpipev'", "did you mean 'dualpipe_v'"]),
    (["--ranks=7"], ["ranks=7", "even"]), (["--microbatches=14"], ["microbatches=14", "16"]),
    (["--forward=-1"], ["forward=-1", "not negative"]), (["--comm=nan"], ["comm=nan"]),
    (["--plot=x.gif"], ["x.gif", ".svg, .png, .pdf"]),
    (["--ranks=1", "--name=gpipe", "--plot=/no/such/folder/x.svg"], ["/no/such/folder"])])
def test_mistakes(words, named, capsys):
  """Oracle: exit code 2 and one line that names what was wrong and what would be right."""
  assert cli.run(["schedule", *words]) == 2
  err = capsys.readouterr().err.splitlines()
  assert len(err) == 1 and all(part in err[0] for part in named), err


def test_without_jax():
  """Law: the command starts without jax, so that it answers at once."""
  code = ("import sys; from dsv3_jax import cli; status = cli.run(['schedule', '--ranks=2']); "
          "sys.exit(status or 'jax' in sys.modules)")
  assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL).returncode == 0


@pytest.mark.parametrize("suffix, start", [
    (".svg", b"<?xml"), (".png", b"\x89PNG"), (".pdf", b"%PDF")])
def test_picture_files(suffix, start, tmp_path, capsys):
  """Oracle: the formats' first bytes; the SVG holds the title as text."""
  path = tmp_path / f"picture{suffix}"
  assert cli.run(["schedule", "--ranks=2", "--microbatches=4", f"--plot={path}"]) == 0
  content = path.read_bytes()
  assert content.startswith(start) and str(path) in capsys.readouterr().out
  if suffix == ".svg":
    assert b"dualpipe, 2 ranks, 4 micro-batches: makespan 12, bubble 0" in content


def test_picture():
  """Law: cells cover each op's time once, a pair's halves half of it; labels are micro-batches."""
  bar = schedule_plot.Bar
  ranks = [[bar(0, 1, (("F", 0, 0),)), bar(1, 4, (("F", 1, 0), ("B", 2, 1)))],
           [bar(0.5, 1.5, (("I", 3, 1),)), bar(1.5, 2.5, (("W", 3, 1),))]]
  axes = schedule_plot.draw(ranks, "a title").axes[0]
  assert axes.get_title(loc="left") == "a title" and axes.get_ylim() == (2, 0)
  areas = {}
  for collection in axes.collections:
    for path in collection.get_paths():
      low, high = path.get_extents().min, path.get_extents().max
      colour = tuple(np.round(collection.get_facecolor()[0], 2)) if len(
          collection.get_facecolor()) else "frame"
      areas[colour] = areas.get(colour, 0) + np.prod(high - low)
  assert sorted(areas.values()) == [1, 1, 1.5, 2.5, 3]  # I, W, B's half, F and its half, the frame
  texts = sorted((t.get_text(), *np.round(t.get_position(), 2)) for t in axes.texts)
  assert texts == [("0", 0.5, 0.5), ("1", 2.5, 0.25), ("2", 2.5, 0.75), ("3", 1, 1.5),
                   ("3", 2, 1.5)]


def test_way_back_is_drawn_as_the_other_direction(tmp_path, monkeypatch):
  """Oracle: the first ops of a V's turn, by hand: down, and back up with the same micro-batch."""
  drawn = []
  draw = schedule_plot.draw
  monkeypatch.setattr(schedule_plot, "draw",
                      lambda bars, title: (drawn.append(bars), draw(bars, title))[1])
  assert cli.run(["schedule", "--name=dualpipe_v", "--ranks=2", "--microbatches=4",
                  f"--plot={tmp_path / 'v.svg'}"]) == 0
  assert [bar.parts for bar in drawn[0][1][:2]] == [(("F", 0, 0),), (("F", 0, 1),)]
  assert drawn[0][0][-1].parts[0][0] == "W"
