"""Expert load by domain: the numbers, and the page that shows them."""

import json
import math
import re

import numpy as np
import pytest

from dsv3_jax.analysis import expert_load, expert_load_plots
from dsv3_jax.config import ConfigError

LAYERS = ("layer 1", "layer 2", "MTP 1")


def drawn(share_XLE, tokens=(640, 320), batches=8, active=2, seed=0) -> list[np.ndarray]:
  """Counts [batches, L, E] of each domain, drawn token by token with given chances."""
  rng = np.random.default_rng(seed)
  return [np.stack([[rng.multinomial(active * n // batches, p) for p in share_LE]
                    for _ in range(batches)]).astype(np.float32)
          for n, share_LE in zip(tokens, share_XLE, strict=True)]


def measured(folder, counts=None, names=("code", "prose"), held_out=1.0) -> dict:
  """What `train.domains.measure` returns."""
  folder.mkdir(parents=True, exist_ok=True)
  if counts is None:
    p = np.array([[[.4, .2, .2, .2], [.1, .1, .4, .4], [.25, .25, .25, .25]],
                  [[.1, .5, .2, .2], [.1, .1, .4, .4], [.25, .25, .25, .25]]])
    counts = drawn(p)
  facts = {"source": "some texts", "documents": 3, "held_out": held_out, "tokens": 640,
           "bytes": 2000, "loss": 2.5, "mtp_loss": [2.75], "bits_per_byte": 1.154, "accuracy": 0.4}
  return {"workdir": str(folder), "step": 7, "ema": False, "id": "0123456789abcdef",
          "experts": counts[0].shape[-1], "active": 2, "layers": list(LAYERS[:counts[0].shape[1]]),
          "domains": {name: dict(facts) for name in names},
          "counts": dict(zip(names, counts, strict=True))}


def test_relative_load_and_its_error():
  """Oracle: by hand; and the errors, loads that were drawn a thousand times."""
  counts = np.array([[[6, 2, 0, 0]], [[2, 2, 4, 0]]], np.float32)
  assert expert_load.relative_load(counts.sum(0)).tolist() == [[2.0, 1.0, 1.0, 0.0]]
  assert expert_load.relative_load(np.zeros((2, 4))).tolist() == [[0.0] * 4] * 2
  # Without a batch the loads are those of the other: half their difference, for two.
  np.testing.assert_allclose(expert_load.standard_error(counts), [[1.0, 0.0, 1.0, 0.0]])
  assert np.isnan(expert_load.standard_error(counts[:1])).all()
  chances = np.array([[[.7, .1, .1, .1], [.25, .25, .25, .25]]])
  loads, errors = zip(*((expert_load.relative_load(c.sum(0)), expert_load.standard_error(c))
                        for c in (drawn(chances, (400,), 10, 1, seed)[0] for seed in range(1000))),
                      strict=True)
  np.testing.assert_allclose(np.sqrt(np.mean(np.square(errors), 0)), np.std(loads, 0), rtol=0.08)


def test_specialisation_of_a_table_checked_by_hand():
  """Oracle: total variation distances worked out by hand; its bounds 0 and 1 - 1/X."""
  busy = np.array([[4.0, 0, 0, 0]])
  assert expert_load.specialisation([busy, busy]).tolist() == [0.0]  # unbalanced, not specialised
  apart = [np.eye(4)[[i]] * 4 for i in range(4)]
  np.testing.assert_allclose(expert_load.specialisation(apart), [0.75])
  # Shares (.5, .5, 0, 0) and (.5, 0, .25, .25), mean (.5, .25, .125, .125): distances .25 and .25.
  # Second layer: (1, 0, 0, 0) and (0, 0, 0, 1): .5 each.
  loads = [np.array([[2.0, 2, 0, 0], [4, 0, 0, 0]]), np.array([[2.0, 0, 1, 1], [0, 0, 0, 4]])]
  np.testing.assert_allclose(expert_load.specialisation(loads), [0.25, 0.5])
  assert expert_load.specialisation(loads[:1]).tolist() == [0.0, 0.0]


def test_chance_is_what_equal_domains_have():
  """Oracle: domains drawn from one distribution: the index itself is its chance, on average."""
  same = np.tile(np.array([[.4, .3, .2, .1]]), (3, 1, 1))
  found, chance = zip(*(
      (expert_load.specialisation([expert_load.relative_load(c.sum(0)) for c in counts])[0],
       expert_load.by_chance(counts, deals=40)[0])
      for a, b, c in (drawn(same, (60, 60, 60), 6, seed=s) for s in range(100))
      for counts in [(a, b, c[:3])]), strict=True)
  assert np.mean(found) == pytest.approx(np.mean(chance), rel=0.06) and np.mean(found) > 0.02
  apart = drawn(np.array([[[.7, .1, .1, .1]], [[.1, .1, .1, .7]]]))
  loads = [expert_load.relative_load(c.sum(0)) for c in apart]
  assert expert_load.specialisation(loads)[0] > 3 * expert_load.by_chance(apart)[0]


def test_numbers_of_a_run(tmp_path):
  """Oracle: numpy, recounted from the counts; a sweep's arm.json and a run's summary.json."""
  one = measured(tmp_path / "run")
  made = expert_load.numbers(one)
  assert json.loads(json.dumps(made)) == made and "counts" not in made
  for name, counts in one["counts"].items():
    sums = counts.sum(0)
    expected = sums / sums.sum(-1, keepdims=True) * 4
    np.testing.assert_allclose(made["load"][name], expected, atol=1e-4)
    facts = made["domains"][name]
    assert facts["max_vio"] == pytest.approx(expected.max() - 1, abs=1e-4)
    assert expected[tuple(facts["largest"])] == expected.max()
    assert facts["balanced"] == pytest.approx(sums[0].sum() / 4) and facts["loss"] == 2.5
    assert 0 < facts["error"] < 0.3
  index = made["specialisation"]
  assert index["mean"] == pytest.approx(np.mean(index["layers"]), abs=1e-4)
  assert index["layers"][0] > 0.1 > 0.05 > index["layers"][1] and index["by_chance"] < 0.05
  assert (made["name"], made["arm"], made["commit"]) == ("run", None, None)
  assert expert_load.specialised(made, "prose", 1)[0][:2] == ("layer 1", 1)
  assert expert_load.specialised(made, "code", 1)[0][:2] == ("layer 1", 0)
  _, _, here, error, elsewhere = expert_load.specialised(made, "prose", 1)[0]
  assert here == made["load"]["prose"][0][1] and elsewhere == made["load"]["code"][0][1]
  assert error == made["standard_error"]["prose"][0][1]

  (tmp_path / "run" / "arm.json").write_text('{"name": "bias alone", "seed": 2}')
  (tmp_path / "run" / "summary.json").write_text('{"commit": "abc"}')
  made = expert_load.numbers(one)
  assert (made["name"], made["arm"], made["commit"]) == ("bias alone, seed 2", "bias alone", "abc")


def test_one_domain_and_one_batch_say_what_is_unknown(tmp_path):
  """Oracle: null in JSON and words on the page, not NaN."""
  counts = [np.full((1, 2, 4), 5, np.float32)]
  made = expert_load.numbers(measured(tmp_path / "run", counts, ["all"], held_out=0.25))
  assert made["specialisation"] == {"mean": None, "layers": None, "by_chance": None}
  assert made["domains"]["all"]["error"] is None
  values = expert_load.join([made])
  assert expert_load.comparison(values) == [("run", "-", "-", "1.000", "0.000", "2.500")]
  assert expert_load.rows(made)[0][6] == "?"
  uncertain, trained = expert_load.warnings(values)
  assert "uncertain (standard error): all (unknown)" in uncertain and "all (25% held" in trained
  page = expert_load_plots.write(values, tmp_path / "out").read_text()
  assert "NaN" not in (tmp_path / "out" / "domains.json").read_text()
  assert "domains_index.svg" not in {p.name for p in (tmp_path / "out").iterdir()}
  assert "nan" not in re.sub("<svg.*?</svg>", "", page, flags=re.DOTALL).lower()


def test_seeds_are_summarised(tmp_path):
  """Oracle: mean and standard deviation by hand."""
  runs = []
  for seed, loss in enumerate((2.0, 3.0)):
    one = measured(tmp_path / f"r{seed}")
    for facts in one["domains"].values():
      facts["loss"] = loss
    (tmp_path / f"r{seed}" / "arm.json").write_text(json.dumps({"name": "aux", "seed": seed}))
    runs.append(expert_load.numbers(one))
  rows = expert_load.comparison(expert_load.join(runs))
  assert [row[0] for row in rows] == ["aux, seed 0", "aux, seed 1", "aux: 2 seeds"]
  assert rows[2][-1] == f"2.500 ± {math.sqrt(0.5):.3f}"


@pytest.fixture
def two(tmp_path) -> dict:
  """Two runs of one name: the second's domains have experts of their own."""
  flat = measured(tmp_path / "a" / "run", drawn(np.full((2, 3, 16), 1 / 16)))
  p = np.full((2, 3, 16), 0.5 / 16)
  p[0, :, 3] += 0.5
  p[1, :, 11] += 0.5
  special = measured(tmp_path / "b" / "run", drawn(p))
  return expert_load.join([expert_load.numbers(run) for run in (flat, special)])


def test_figure_9_is_told_apart(two, tmp_path):
  """Oracle: the loads that were drawn: 8.5 of one expert in the second run, 1 in the first."""
  flat, special = two["runs"]
  assert flat["name"] != special["name"]  # their folders, as the names are one
  assert special["specialisation"]["mean"] > 0.2 > 3 * flat["specialisation"]["mean"] / 2
  assert special["specialisation"]["mean"] > 5 * special["specialisation"]["by_chance"] / 2
  assert special["load"]["code"][0][3] == pytest.approx(8.5, rel=0.1)
  assert np.max(flat["load"]["code"]) < 2
  norm = expert_load_plots.scale(two)
  top = max(np.max(run["load"][name]) for run in two["runs"] for name in run["load"])
  assert norm.vmax == top and norm(1.0) == pytest.approx(0.5)  # white; one scale for both

  out = tmp_path / "out"
  page = expert_load_plots.write(two, out)
  assert {p.name for p in out.iterdir()} == {
      "domains.json", "domains.md", "domains.html", "domains_all.svg", "domains_layers.svg",
      "domains_index.svg"}
  assert expert_load.read(out / "domains.json") == two["runs"]
  assert json.loads((out / "domains.json").read_text()) == two
  longest = max((out / "domains.json").read_text().splitlines(), key=len)
  assert longest.strip().startswith("[") and len(longest) < 200  # a line a layer
  svg = (out / "domains_all.svg").read_text()
  for word in ("code", "prose", "layer 1", "layer 2", "MTP 1", "1: balanced", "routed expert"):
    assert f">{word}</text>" in svg, word
  large = (out / "domains_layers.svg").read_text()
  assert f">{special['load']['code'][0][3]:.2f}</text>" in large and "layer 1: " in large
  text, markdown = page.read_text(), (out / "domains.md").read_text()
  assert not re.search(r'(src|href)="http', text) and text.count("<svg") == 3
  for word in (flat["workdir"], "0123456789abcdef", "Text: code, prose from some texts.",
               f"{special['specialisation']['mean']:.3f}"):
    assert word in text and word in markdown
  assert expert_load_plots.write(two, tmp_path / "again").read_text() == text


def test_many_runs_are_drawn_in_bands(two):
  """Oracle: six runs are two bands of three: each named once, each layer named in both."""
  runs = [run | {"name": f"run {i}"} for i, run in enumerate(two["runs"] * 3)]
  figure = expert_load_plots.every_layer(two | {"runs": runs})
  maps = [axes for axes in figure.axes if axes.collections and axes.get_title()]
  assert [axes.get_title() for axes in maps] == [f"run {i}" for i in range(6)]
  assert [axes.get_ylabel() for axes in figure.axes].count("layer 2") == 2


def test_which_layers_are_drawn_large():
  """Oracle: a third and two thirds of the way, as 9 and 18 of the report's 26; or those named."""
  choose = expert_load_plots.choose
  assert choose([[f"layer {i}" for i in range(1, 27)]]) == ["layer 9", "layer 18"]
  assert choose([LAYERS, LAYERS]) == ["layer 1", "layer 2"]
  assert choose([LAYERS[1:]]) == ["layer 2"] and choose([LAYERS[2:]]) == ["MTP 1"]
  assert choose([["layer 1", "layer 2", "layer 3", "MTP 1"]]) == ["layer 1", "layer 2"]
  assert choose([LAYERS], ["2", "MTP 1"]) == ["layer 2", "MTP 1"]
  with pytest.raises(ConfigError, match="'9' is no MoE layer of the runs; there are layer 2, MTP"):
    choose([LAYERS, LAYERS[1:]], ["9"])
  for layers, words in (([[]], "the model has no"), ([["layer 1"], ["layer 2"]], "of one number")):
    with pytest.raises(ConfigError, match=words):
      choose(layers)


def test_what_cannot_be_joined(two, tmp_path):
  """Oracle: the words a person needs."""
  other = expert_load.numbers(measured(tmp_path / "c", names=("code", "chats")))
  with pytest.raises(ConfigError, match="measured on code, chats, .* on code, prose"):
    expert_load.join([two["runs"][0], other])
  (tmp_path / "x.json").write_text('{"format": 99}')
  for name in ("x.json", "none.json"):
    with pytest.raises(ConfigError, match="no domains.json of this version"):
      expert_load.read(tmp_path / name)
