"""Comparisons: statistics, arms from runs, and what there is to doubt."""

import dataclasses
import json
import os
import shutil
import time

import numpy as np
import pytest

from dsv3_jax import config
from dsv3_jax.analysis import records, statistics
from dsv3_jax.analysis.comparison import arms as arms_lib
from dsv3_jax.analysis.comparison import compare, doubts, gather, tables
from dsv3_jax.config import ConfigError
from tests.analysis import synthetic

ARMS = {"base": ({}, 0.0), "deeper": ({"model.mtp_depth": 2}, -0.03),
        "none": ({"model.mtp_depth": 0}, 0.04)}


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
  return synthetic.sweep(tmp_path_factory.mktemp("pool"), ARMS, question="Deeper?")


@pytest.fixture
def copy(pool, tmp_path):
  """A pool of one's own, to damage, and a function that finds an arm's folder."""
  shutil.copytree(pool, tmp_path / "pool")
  return tmp_path / "pool", lambda name, seed: next(
      (tmp_path / "pool" / "arms").glob(f"{name}-s{seed}-*"))


def _edit(folder, name, **changes):
  values = json.loads((folder / name).read_text()) | changes
  (folder / name).write_text(json.dumps(values))


def _found(c, about):
  return next(d for d in doubts.find(c) if d.about == about)


# --- statistics ---------------------------------------------------------------------------------


def test_paired_test():
  """Oracle: Student's sleep data, as R prints t.test(extra ~ group, paired): and scipy."""
  one = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
  two = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]
  d = statistics.paired(dict(enumerate(two)), dict(enumerate(one)))
  assert d.mean == pytest.approx(1.58)
  assert (d.low, d.high) == pytest.approx((0.7001142, 2.4598858), abs=1e-7)
  assert d.p == pytest.approx(0.002833, abs=5e-7)
  from scipy import stats

  expected = stats.ttest_rel(two[:3], one[:3])
  low, high = expected.confidence_interval(0.95)
  d = statistics.paired({0: 1.9, 1: 0.8, 2: 1.1, 7: 5.0}, {2: -0.2, 0: 0.7, 1: -1.6, 9: 1.0})
  assert d.seeds == (0, 1, 2)
  assert (d.low, d.high, d.p) == pytest.approx((low, high, expected.pvalue))


def test_without_a_test():
  """Oracle: by hand: one seed has no interval, equal differences no p, no common seed nothing."""
  assert statistics.paired({1: 3.0}, {1: 2.0}) == statistics.Difference(
      (1,), (1.0,), 1.0, None, None, None)
  same = statistics.paired({1: 0.3, 2: 0.4}, {1: 0.1, 2: 0.2})
  assert same.p is None and same.low == pytest.approx(same.high) == pytest.approx(0.2)
  assert statistics.paired({1: 3.0}, {2: 2.0}).mean is None
  assert statistics.spread([1.0, None, 2.0, float("nan"), 3.0]) == (3, 2.0, 1.0)
  assert statistics.spread([4.0])[1:] == (4.0, None) and statistics.spread([])[1:] == (None, None)


def test_holm():
  """Oracle: by hand, 4 x 0.005, 3 x 0.01, 2 x 0.03, then no smaller than before."""
  assert statistics.holm([0.01, 0.04, None, 0.03, 0.005]) == pytest.approx(
      [0.03, 0.06, None, 0.06, 0.02])
  assert statistics.holm([0.6, 0.7]) == [1.0, 1.0]


# --- arms ---------------------------------------------------------------------------------------


def test_numbers_of_a_sweep(pool):
  """Oracle: means, deviations and differences of the summaries, with numpy here."""
  c = compare.make(gather.collect([pool]))
  assert [a.name for a in c.arms] == list(ARMS) and c.baseline == "base"
  assert (c.question, c.metric, c.why) == ("Deeper?", "loss", "")
  loss = {(a["name"], a["seed"]): json.loads((pool / a["folder"] / "summary.json").read_text())[
      "final"]["loss"] for a in json.loads((pool / "sweeps/ablate-cpu.json").read_text())["arms"]}
  for name in ARMS:
    mine = np.array([loss[name, s] for s in range(3)])
    assert c.arm(name).spread("loss") == pytest.approx(
        (3, mine.mean(), mine.std(ddof=1)), abs=2e-6)
    if name != "base":
      base = np.array([loss["base", s] for s in range(3)])
      assert c.differences[name].values == pytest.approx(mine - base, abs=2e-6)
  assert c.ranks == {"deeper": 1, "base": 2, "none": 3}
  other = compare.make(gather.collect([pool]), baseline="none", metric="smoothed")
  assert set(other.differences) == {"base", "deeper"} and other.metric == "smoothed"
  assert other.differences["base"].mean == pytest.approx(-compare.make(
      gather.collect([pool]), metric="smoothed").differences["none"].mean)


def test_records_and_workdirs_give_one_report(pool, tmp_path):
  """Law: the pool, its arms' workdirs one by one, and the records kept of them say the same."""
  whole = compare.make(gather.collect([pool]))
  plan = gather.plans(pool)["ablate-cpu"]
  for folder in (pool / "arms").iterdir():
    records.write(folder, tmp_path / "kept")
  (tmp_path / "kept" / "suite.json").write_text("[]")  # something else that lies there
  bare = lambda c: json.dumps(compare.to_json(c) | {"notes": 0}).replace(str(tmp_path / "kept"), "")
  strip = lambda values: [
      {k: v for k, v in arm.items() if k != "runs"} | {
          "runs": [{k: v for k, v in r.items() if k != "where"} for r in arm["runs"]]}
      for arm in json.loads(values)["arms"]]
  kept = compare.make(gather.collect([tmp_path / "kept"], plan))
  assert kept.notes == () and strip(bare(kept)) == strip(bare(whole))
  assert tables.compact(kept) == tables.compact(whole)
  assert [dataclasses.replace(d) for d in doubts.find(kept)] == doubts.find(whole)
  alone = compare.make(gather.collect(sorted((pool / "arms").iterdir())))  # without a plan
  assert {a.name for a in alone.arms} == set(ARMS)
  assert alone.arm("none").values("loss") == whole.arm("none").values("loss")
  mixed = compare.make(gather.collect([tmp_path / "kept", pool], plan))  # each run twice, alike
  assert mixed.notes == () and strip(bare(mixed)) == strip(bare(whole))


def test_runs_without_a_sweep_are_named_by_what_differs(tmp_path):
  """Oracle: the keys that were changed; seeds make no arms; equal configs, other commits: by them.
  """
  made = []
  for i, changes in enumerate([{"optim.lr": 1e-3}, {"optim.lr": 2e-3},
                               {"optim.lr": 2e-3, "train.seed": 1}]):
    made.append(synthetic.write(tmp_path / f"run{i}", steps=4, eval_every=2, changes=changes))
  c = compare.make(gather.collect(made))
  assert [(a.name, list(a.runs)) for a in c.arms] == [("lr=0.001", [0]), ("lr=0.002", [0, 1])]
  shutil.copytree(made[0], tmp_path / "again")
  _edit(tmp_path / "again", "summary.json", commit="fedcba")
  c = compare.make(gather.collect([made[0], tmp_path / "again"]))
  assert [a.name for a in c.arms] == ["at 0123456789abcdef", "at fedcba"]
  assert len(c.differences) == 1 and _found(c, "commits").level == doubts.WARN


def test_sweeps_of_other_dates_are_joined(pool, tmp_path):
  """Oracle: by hand: arms of one config are one, of one name and two configs two; seeds add up."""
  later = synthetic.sweep(tmp_path / "later", {
      "start": ({}, 0.0), "deeper": ({"model.mtp_depth": 2, "loss.mtp_weight": 0.1}, 0.0)},
      seeds=4, name="again-cpu")
  for path in later.glob("arms/*/metrics.jsonl"):
    os.utime(path, (time.time() + 60,) * 2)
  c = compare.make(gather.collect([pool, later]))
  assert [a.name for a in c.arms] == ["base", "deeper (mtp_weight=0.3)", "none",
                                      "deeper (mtp_weight=0.1)"]
  assert [len(a.runs) for a in c.arms] == [4, 3, 3, 4]
  twice = [note for note in c.notes if "more than once" in note]
  assert len(twice) == 3 and str(later) in twice[0].split("counts")[0]  # the newest of the two
  assert _found(c, "seeds").level == doubts.WARN


def test_one_name_for_two_configs(tmp_path):
  """Oracle: a plan that lists a short trial run among the arm's runs: two arms, never one mean.
  The order of the data may change with the seed."""
  pool = synthetic.sweep(tmp_path, {"base": ({}, 0.0), "x": ({"model.mtp_depth": 2}, 0.0)}, seeds=2,
                         steps=8)
  folder = synthetic.write(pool / "arms" / "trial", steps=4, eval_every=2,
                           changes={"train.seed": 2})
  other = synthetic.write(pool / "arms" / "order", steps=8, eval_every=2,
                          changes={"train.seed": 3, "data.seed": 3})
  path = pool / "sweeps" / "ablate-cpu.json"
  plan = json.loads(path.read_text())
  for f, seed in ((folder, 2), (other, 3)):
    (f / "arm.json").write_text('{"name": "base", "state": "done"}')
    plan["arms"].append({"name": "base", "seed": seed, "id": records.record(f)["id"]})
  path.write_text(json.dumps(plan))
  c = compare.make(gather.collect([pool]))
  assert {a.name: list(a.runs) for a in c.arms} == {
      "base (tokens=16384)": [0, 1, 3], "base (tokens=8192)": [2], "x": [0, 1]}
  assert c.baseline == "base (tokens=16384)"
  arm = dataclasses.replace(c.arms[0], runs=c.arms[0].runs | c.arms[1].runs)
  text = _found(dataclasses.replace(c, arms=(arm, c.arms[2])), "sizes").text
  assert "tokens: base (tokens=16384) -50.0 %; steps:" in text


def test_of_two_the_newest_finished_one_counts(tmp_path):
  """Oracle: times set by hand, whatever the order; a newer one that is not finished does not."""
  for name, shift, minute in (("new", 0.5, 2), ("old", 0.0, 1), ("going", 0.9, 3)):
    folder = synthetic.write(tmp_path / name / "arms" / "a-s0-1", steps=4, shift=shift)
    (folder / "arm.json").write_text("{}")
    if name == "going":
      (folder / "summary.json").unlink()
    os.utime(folder / "metrics.jsonl", (60 * minute,) * 2)
  for order in (("new", "old", "going"), ("going", "old", "new")):
    c = compare.make(gather.collect([tmp_path / name for name in order]))
    assert [a.values("loss") for a in c.arms] == [{0: 3.6}]
    assert len([note for note in c.notes if "does not" in note]) == 2


def test_unfinished_runs_of_an_arm_do_not_count(copy):
  """Oracle: mean of the two that finished; the third is named; with none finished all are shown."""
  pool, arm = copy
  (arm("none", 1) / "summary.json").unlink()
  c = compare.make(gather.collect([pool]))
  assert list(c.arm("none").runs) == [0, 2] and list(c.arm("none").unfinished) == [1]
  assert c.differences["none"].seeds == (0, 2)
  for seed in (0, 2):
    (arm("none", seed) / "summary.json").unlink()
  c = compare.make(gather.collect([pool]))
  assert list(c.arm("none").runs) == [0, 1, 2] and "none" not in c.differences | c.ranks


def test_runs_that_diverged(copy):
  """Oracle: by hand: the arm that lost its worst seed has no rank and is called no better; where
  none is left there is no value, and both are warned of."""
  pool, arm = copy
  nan = dict.fromkeys(("loss", "bits_per_byte"), float("nan"))
  for seed in range(3):
    _edit(arm("deeper", seed), "summary.json", final=nan)
  _edit(arm("none", 2), "summary.json", final=nan)
  for seed in (0, 1):
    _edit(arm("none", seed), "summary.json", final={"loss": 1.0 + 1e-3 * seed})
  c = compare.make(gather.collect([pool]))
  assert c.ranks == {"base": 1}
  cells = {row[0]: row[1:5] for row in tables.compact(c)[1]}
  assert cells["none"][0] == "2 of 3" and cells["none"][1].startswith("1.0005")
  assert cells["deeper"] == ["0 of 3", "-", "no value", "no value"]
  assert tables.differences(c)[1][0][4] == "no value"
  said = tables.verdict(c)
  assert "Lowest: base" in said and "Better" not in said
  assert "without a validation loss: deeper (seed 0, 1, 2); none (seed 2)" in said
  doubt = _found(c, "runs without a value")
  assert doubt.level == doubts.WARN and "deeper, seed 0, 1, 2; none, seed 2." in doubt.text
  for seed in (0, 1):
    _edit(arm("none", seed), "summary.json", final=nan)
  assert "no test" in _found(compare.make(gather.collect([pool])), "tests").text


@pytest.mark.parametrize("options, words", [
    ({"baseline": "dee"}, "did you mean 'deeper'"), ({"baseline": "x"}, "arms: base, deeper, none"),
    ({"metric": "mfu"}, "loss, bits_per_byte, smoothed")])
def test_bad_choices(pool, options, words):
  """Oracle: the message names what there is."""
  with pytest.raises(ConfigError, match=words):
    compare.make(gather.collect([pool]), **options)


@pytest.mark.parametrize("make, words", [
    (lambda p: p / "absent", "is not there"), (lambda p: p, "holds no run, sweep or record"),
    (lambda p: (p / "x.json").write_text("{") and p / "x.json", "could not be read"),
    (lambda p: (p / "x.json").write_text("{}") and p / "x.json", "no record")])
def test_bad_sources(tmp_path, make, words):
  """Oracle: the message."""
  with pytest.raises(ConfigError, match=words):
    gather.collect([make(tmp_path)])


# --- doubts -------------------------------------------------------------------------------------


def test_nothing_to_doubt(pool):
  """Oracle: a sweep of which everything is equal but what was changed."""
  c = compare.make(gather.collect([pool]))
  for about in ("seeds", "unfinished runs", "commits", "machines"):
    assert _found(c, about).level == doubts.GOOD, about
  assert _found(c, "sizes").text.startswith("Against base, beyond 1 %: parameters: deeper +15.9 %")
  assert doubts.config_table(c) == (["arm", "model.mtp_depth"],
                                    [["base", "1"], ["deeper", "2"], ["none", "0"]])
  head, rows = doubts.trace_table(c)
  assert len(rows) == 9 and rows[0][head.index("commit")] == "0123456789abcdef"
  assert all((pool / "arms").as_posix() in row[head.index("from")] for row in rows)


def test_damage_is_said(copy):
  """Oracle: what was done to each file, by hand: it is named, and the rest is compared."""
  pool, arm = copy
  _edit(arm("none", 0), "summary.json", commit="abc+")
  _edit(arm("none", 1), "summary.json", device="H100", versions={"jax": "0.11"})
  (arm("none", 2) / "config.json").write_text("{")
  _edit(arm("deeper", 0), "arm.json", state="failed", error="line\nDivergedError: stopped")
  (arm("deeper", 0) / "summary.json").unlink()
  for file in arm("deeper", 1).iterdir():
    if file.is_file() and file.name != "arm.json":
      file.unlink()
  _edit(arm("deeper", 1), "arm.json", state="waiting")
  shutil.rmtree(arm("deeper", 2))
  (pool / "sweeps" / "half.json").write_text('{"experiment": ')
  c = compare.make(gather.collect([pool]))
  assert {a.name: list(a.runs) for a in c.arms} == {
      "base": [0, 1, 2], "deeper": [0], "none": [0, 1]}
  assert not c.arm("deeper").finished and set(c.differences) == {"none"}
  assert c.differences["none"].seeds == (0, 1)
  text = _found(c, "unfinished runs").text
  for words in ("deeper, seed 0: failed at step 40: DivergedError: stopped",
                "deeper, seed 1: waiting", "deeper, seed 2: not found", "none, seed 2: "):
    assert words in text, words
  assert "deeper lacks 0, 1, 2; none lacks 2" in _found(c, "seeds").text
  assert "abc+: none (seed 0)" in _found(c, "commits").text and "not committed" in _found(
      c, "commits").text
  assert "2 devices" in _found(c, "machines").text and "2 versions" in _found(c, "machines").text
  assert any("half.json" in note for note in c.notes)
  assert any("config.json could not be read" in note for note in c.notes)
  assert "(not finished)" in tables.arms(c)[1][1][0]


@pytest.mark.parametrize("changes, level, metric", [
    ({}, doubts.GOOD, "loss"), ({"text": "other"}, doubts.WARN, "loss"),
    ({"text": "other", "tokenizer": "other"}, doubts.WARN, "bits_per_byte")])
def test_text(copy, changes, level, metric):
  """Oracle: hashes put in by hand; other tokenizers are ranked by bits per byte."""
  pool, arm = copy
  plan = gather.plans(pool)["ablate-cpu"]
  for folder in list((pool / "arms").iterdir()):
    made = records.record(folder)
    made["corpus"] = {"tokenizer": "t", "text": "x"} | (
        changes if made["arm"]["name"] == "none" else {})
    (pool / f"{made['id']}.json").write_text(records.dumps(made))
  for name in ("arms", "sweeps"):
    shutil.rmtree(pool / name)
  c = compare.make(gather.collect([pool], plan))
  assert (_found(c, "text").level, c.metric) == (level, metric)
  assert ("different tokenizers" in tables.verdict(c)) == (metric != "loss")


@pytest.mark.parametrize("changes, level", [
    ({"data.microbatch": 4}, doubts.WARN), ({"train.eval_batches": 4}, doubts.WARN),
    ({"data.microbatch": 4, "train.eval_batches": 16}, doubts.NOTE)])
def test_amounts_of_validation_text(tmp_path, changes, level):
  """Oracle: by hand: an evaluation scores eval_batches (8) times the microbatch (8) sequences."""
  assert (config.Train().eval_batches, config.Data().microbatch or config.Data().batch_size) == (
      8, 8)
  pool = synthetic.sweep(tmp_path, {"base": ({}, 0.0), "x": (changes, 0.0)}, seeds=1, steps=4)
  doubt = _found(compare.make(gather.collect([pool])), "text")
  assert doubt.level == level and ("base 64, x 32" in doubt.text) == (level == doubts.WARN)


def test_other_training_text(tmp_path):
  """Oracle: a rate that training text has and validation has not."""
  pool = synthetic.sweep(tmp_path, {"fim": ({"data.fim_rate": 0.5}, 0.1), "none": (
      {"data.fim_rate": 0.0}, 0.0)}, seeds=1, steps=4)
  c = compare.make(gather.collect([pool]))
  assert "data.fim_rate differs" in _found(c, "training loss").text
  assert _found(c, "training loss").level == doubts.NOTE
  assert _found(compare.make(gather.collect([pool]), metric="smoothed"),
                "training loss").level == doubts.WARN
  assert "1 seed: no test" in _found(c, "tests").text
  assert tables.compact(c)[1][1][4] == "1 seed: no test"
  assert "There is one seed (0)" in _found(c, "seeds").text


@pytest.mark.parametrize("key, keys, expected", [
    ("loss.mtp_weight", ["loss.mtp_weight"], "mtp_weight"),
    ("model.a.kind", ["model.a.kind", "model.b.kind"], "model.a.kind")])
def test_short(key, keys, expected):
  """Oracle: by hand."""
  assert arms_lib.short(key, keys) == expected
