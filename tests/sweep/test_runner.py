"""Sweeps over a stub trainer whose numbers are a function of config and step (stub.py)."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import types

import pytest

from dsv3_jax import host
from dsv3_jax.analysis import records
from dsv3_jax.cli import sweep as command
from dsv3_jax.config import ConfigError
from dsv3_jax.sweep import local, pool, progress, rows, runner
from tests.sweep import sweeping
from tests.sweep.sweeping import arm, sweep


@pytest.fixture(autouse=True)
def _without_text():
  put_back = sweeping.no_text()
  yield
  put_back()


def _results(outcome):
  """All that a table of results shows, times apart."""
  return [(r.arm.name, r.arm.seed, r.progress.state, r.progress.step, r.progress.loss,
           r.progress.losses) for r in outcome.rows]


def _starts(folder):
  """Arm -> how often it was started."""
  return {path.parent.name.rsplit("-", 1)[0]: len(path.read_text().splitlines())
          for path in folder.glob("arms/*/starts")}


def _until(condition, seconds=20.0):
  end = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < end, "it did not happen"
    time.sleep(0.02)


def _process(folder, pause, jobs=2):
  return subprocess.Popen([sys.executable, "-m", "tests.sweep.sweeping", str(folder), str(pause),
                           str(jobs)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                          env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})


def _saved(folder, count):
  """Whether `count` arms have a checkpoint."""
  return lambda: len(list(folder.glob("arms/*/saved"))) >= count


def test_arms_are_run_once(tmp_path):
  """Oracle: the stub's own numbers; each arm has one start, whichever sweeps have it."""
  first = sweeping.run(tmp_path)
  assert first.exit_code == 0
  assert [r.progress.loss for r in first.rows] == pytest.approx(
      [5 / sweeping.STEPS + lr + seed / 8 for seed in (0, 1) for lr in (0.25, 0.5)])
  sweeping.run(tmp_path)
  other = sweep(arm("the same", 0, optim_lr=0.25), arm("new", 0, optim_lr=0.75),
                experiment="experiments/ablate_y.py")
  second = sweeping.run(tmp_path, other)
  assert [r.progress.state for r in second.rows] == ["done", "done"]
  assert _starts(tmp_path) == {"base-s0": 1, "base-s1": 1, "more-s0": 1, "more-s1": 1, "new-s0": 1}
  plan = json.loads((tmp_path / "sweeps/ablate_y-cpu.json").read_text())
  assert plan["question"] == "Does x help?" and plan["baseline"] == "the same"
  assert plan["arms"][0]["folder"] == f"arms/base-s0-{other.arms[0].id}"  # the first sweep's
  made = pool.read_arm(tmp_path / plan["arms"][0]["folder"])
  assert made["state"] == "done" and made["exit_code"] == 0 and made["code"] == host.code()


def test_plan_keeps_runs_of_its_own_arms_alone(tmp_path):
  """Oracle: by hand: a short trial run and an arm of another meaning leave the plan, runs of other
  seeds stay; the baseline is the experiment's, whichever arms are chosen."""
  made, seed = pool.Pool(tmp_path), lambda i, lr: (arm("base", i), arm("more", i, optim_lr=lr))
  plan = lambda its: json.loads(made.write_plan(its, "").read_text())
  runs = lambda plan: [(a["name"], a["seed"]) for a in plan["arms"]]
  plan(sweep(arm("base", 9, train_tokens=48), arm("more", 9, train_tokens=48, optim_lr=0.5)))
  assert runs(plan(sweep(*seed(0, 0.5)))) == [("base", 0), ("more", 0)]
  whole = sweep(*seed(1, 0.5))
  found = plan(command.select(whole, "1,2", "more"))
  assert runs(found) == [("base", 0), ("more", 1), ("more", 2), ("more", 0)]
  assert found["baseline"] == "base"
  assert runs(plan(sweep(*seed(3, 0.75)))) == [("base", 3), ("base", 0), ("more", 3)]


def test_killed_sweep_comes_to_the_same_table(tmp_path):
  """Oracle: the table of a sweep that nobody disturbed."""
  undisturbed = _results(sweeping.run(tmp_path / "a", jobs=2))
  folder = tmp_path / "b"
  process = _process(folder, 0.05)
  _until(_saved(folder, 2))
  for path in folder.glob("arms/*"):  # SIGKILL: nobody has a chance to say good-bye
    if pid := pool.read_arm(path).get("pid"):
      os.kill(pid, signal.SIGKILL)
      os.kill(int((path / "starts").read_text().split()[0]), signal.SIGKILL)
  process.kill()
  process.communicate()
  states = [row.progress.state for row in rows.look(sweep(), pool.Pool(folder))]
  assert states == ["interrupted", "interrupted", "waiting", "waiting"]
  resumed = sweeping.run(folder, jobs=2)
  assert _results(resumed) == undisturbed
  assert _starts(folder) == {"base-s0": 2, "more-s0": 2, "base-s1": 1, "more-s1": 1}


def test_arms_outlive_a_killed_sweep(tmp_path):
  """Law: an arm whose sweep was killed ends by itself, and no other sweep starts it meanwhile."""
  process = _process(tmp_path, 0.05)
  _until(_saved(tmp_path, 2))
  process.kill()
  process.communicate()
  assert sweeping.run(tmp_path, jobs=2).exit_code == 0
  assert set(_starts(tmp_path).values()) == {1}


@pytest.mark.parametrize("sweep_too", [True, False])
def test_training_that_lost_its_keeper_is_left_alone(tmp_path, sweep_too):
  """Law: where the process that started the training was killed, nobody starts the arm again until
  the training has ended; a sweep that goes on waits for it like one that comes later."""
  process = _process(tmp_path, 0.1, jobs=1)
  _until(_saved(tmp_path, 1))
  folder = next(tmp_path.glob("arms/*/saved")).parent
  if sweep_too:
    process.kill()
  os.kill(pool.read_arm(folder)["pid"], signal.SIGKILL)
  assert not (folder / "ends").exists() and pool.claim(folder) is None
  process.communicate()
  assert sweep_too or process.returncode == 0
  assert sweeping.run(tmp_path, sweep(sweep().arms[0])).exit_code == 0
  starts, ends = ([float(line.split()[1]) for line in (folder / name).read_text().splitlines()]
                  for name in ("starts", "ends"))
  assert len(starts) == len(ends) == 2 and ends[0] < starts[1]


def test_signal_saves_and_the_same_command_goes_on(tmp_path):
  """Oracle: the table of a sweep that nobody disturbed; 128 + SIGTERM is the exit code."""
  undisturbed = _results(sweeping.run(tmp_path / "a", jobs=2))
  folder = tmp_path / "b"
  process = _process(folder, 0.05)
  _until(_saved(folder, 2))
  process.terminate()
  process.communicate()
  assert process.returncode == 143
  stopped = [pool.read_arm(p) for p in sorted(folder.glob("arms/*-s0-*"))]
  assert [(s["state"], s["exit_code"]) for s in stopped] == [("waiting", 143)] * 2
  assert _results(sweeping.run(folder, jobs=2)) == undisturbed
  assert _starts(folder)["base-s0"] == 2


def test_failed_arm_stops_nobody(tmp_path):
  """Law: the others finish; why it failed is kept; it runs again only where that is asked for."""
  its = sweep(arm("bad", optim_lr=0.666), arm("good", optim_lr=0.5))
  outcome = sweeping.run(tmp_path, its)
  assert outcome.exit_code == 1 and [r.arm.name for r in outcome.failed] == ["bad"]
  assert [r.progress.state for r in outcome.rows] == ["failed", "done"]
  assert outcome.rows[0].progress.arm["error"] == [
      "step 3 was reached", "dsv3: error: the loss was not finite"]
  assert outcome.rows[0].note == "dsv3: error: the loss was not finite"
  assert sweeping.run(tmp_path, its).exit_code == 1
  assert _starts(tmp_path) == {"bad-s0": 1, "good-s0": 1}
  assert sweeping.run(tmp_path, its, rerun="failed").exit_code == 1
  assert _starts(tmp_path) == {"bad-s0": 2, "good-s0": 1}


def test_arm_that_was_stopped_by_hand_waits(tmp_path):
  """Law: whoever stops one arm's training wants the others; the next sweep goes on with it."""
  process = _process(tmp_path, 0.1, jobs=1)
  _until(_saved(tmp_path, 1))
  folder = next(tmp_path.glob("arms/*/saved")).parent
  os.kill(int((folder / "starts").read_text().split()[0]), signal.SIGTERM)
  out, err = process.communicate()
  assert process.returncode == 1 and "was stopped (exit code 143)" in out + err
  assert _starts(tmp_path) == {"base-s0": 1, "base-s1": 1, "more-s0": 1, "more-s1": 1}
  assert pool.read_arm(folder)["state"] == "waiting"
  assert sweeping.run(tmp_path).exit_code == 0
  assert _starts(tmp_path)[folder.name.rsplit("-", 1)[0]] == 2


def test_two_sweeps_at_once(tmp_path):
  """Law: two sweeps in one pool start each arm once, and both see all of them done."""
  processes = [_process(tmp_path, 0.01, jobs=1) for _ in range(2)]
  for process in processes:
    out = process.communicate(timeout=60)
    assert process.returncode == 0, out
  assert _starts(tmp_path) == {"base-s0": 1, "base-s1": 1, "more-s0": 1, "more-s1": 1}


def test_arms_at_once_have_their_own_cores(tmp_path):
  """Law: what runs at once shares no core, and together they have all; one core serves both."""
  sweeping.run(tmp_path, sweep(arm("a", optim_lr=0.1), arm("b", optim_lr=0.2)), jobs=2, pause=0.02)
  seen = [json.loads(path.read_text().split(" ", 3)[3]) for path in tmp_path.glob("arms/*/starts")]
  cores = local.cores()
  assert sorted(seen[0] + seen[1]) == (cores if len(cores) > 1 else 2 * cores)


def test_other_code_is_said_and_repeated_when_asked(tmp_path, monkeypatch):
  """Law: an arm of other training code is done but stale, and --rerun=stale starts it anew."""
  its = sweep(arm("a", optim_lr=0.1))
  sweeping.run(tmp_path, its)
  monkeypatch.setattr(host, "code", lambda: "0123456789abcdef")
  outcome = sweeping.run(tmp_path, its)
  assert outcome.rows[0].stale and outcome.rows[0].note.startswith("stale: trained at ")
  assert _starts(tmp_path) == {"a-s0": 1}
  outcome = sweeping.run(tmp_path, its, rerun="stale")
  assert _starts(tmp_path) == {"a-s0": 1} and not outcome.rows[0].note  # anew, in a fresh folder
  assert len(list(tmp_path.glob("replaced/*"))) == 1


def test_records_count_as_finished(tmp_path, monkeypatch):
  """Law: an arm whose record has its config is not run; one whose record has another config is."""
  its = sweep(arm("a", optim_lr=0.1), arm("b", optim_lr=0.2))
  outcome = sweeping.run(tmp_path / "one", its, records=str(tmp_path / "records"))
  for row in outcome.rows:
    assert records.find(tmp_path / "records", row.arm.id)["final"]["train_loss"] == pytest.approx(
        row.progress.loss)
  assert not any(r.stale for r in rows.look(its, pool.Pool(tmp_path / "new"),
                                              str(tmp_path / "records")))
  assert all(r.stale for r in rows.look(its, pool.Pool(tmp_path / "new"),
                                          str(tmp_path / "records"), code="of another day"))
  path = tmp_path / "records" / f"{its.arms[1].id}.json"
  text = path.read_text()
  assert text.count('"lr":0.2,') == 1
  path.write_text(text.replace('"lr":0.2,', '"lr":0.3,'))
  outcome = sweeping.run(tmp_path / "two", its, records=str(tmp_path / "records"))
  assert _starts(tmp_path / "two") == {"b-s0": 1}
  assert [r.note for r in outcome.rows] == ["from its record", ""]
  assert outcome.rows[0].progress.loss == pytest.approx(0.1 + 5 / sweeping.STEPS, rel=1e-4)


def test_interrupted_repeat_goes_on(tmp_path, monkeypatch):
  """Law: the old record of an arm that is started anew is no result of it, until the new one takes
  its place."""
  kept, its = str(tmp_path / "records"), sweep(arm("a", optim_lr=0.1))
  sweeping.run(tmp_path / "pool", its, records=kept)
  path = tmp_path / "records" / f"{its.arms[0].id}.json"
  path.write_text(path.read_text().replace('"final":', '"final": {"loss": 7}, "old":'))
  monkeypatch.setattr(runner._Run, "start", lambda self: setattr(self, "full", "it stops here"))
  with pytest.raises(pool.SweepError, match="it stops here"):
    sweeping.run(tmp_path / "pool", its, records=kept, rerun="all")
  monkeypatch.undo()
  outcome = sweeping.run(tmp_path / "pool", its, records=kept)
  assert outcome.rows[0].note == "" and _starts(tmp_path / "pool") == {"a-s0": 1}
  assert json.loads(path.read_text())["final"]["loss"] < 7
  assert pool.AGAIN not in pool.read_arm(outcome.rows[0].folder)


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"state": "waiting", "job": "12"}'])
def test_arms_that_nobody_would_start(tmp_path, damage):
  """Law: an arm whose arm.json is damaged, or names a cluster's job that was cancelled, is run."""
  its = sweep(arm("a", optim_lr=0.1))
  folder = pool.Pool(tmp_path).add(its.arms[0])
  (folder / pool.ARM).write_text(damage)
  outcome = sweeping.run(tmp_path, its)
  assert outcome.exit_code == 0 and outcome.rows[0].progress.state == "done"
  assert "job" not in pool.read_arm(folder)
  (folder / pool.ARM).write_text(damage)
  outcome = sweeping.run(tmp_path, its, records=str(tmp_path / "records"))
  assert outcome.exit_code == 0 and len(list(tmp_path.glob("records/*.json"))) == 1


def test_exit_code_is_0_only_where_all_is_done(tmp_path):
  """Oracle: by hand, over every state that an arm may be in."""
  for state in ("done", "failed", "waiting", "queued", "stopped", "interrupted"):
    row = rows.look(sweep(arm("a")), pool.Pool(tmp_path))[0]
    row.progress = progress.Progress(tmp_path, state)
    assert runner.Outcome([row], None).exit_code == (state != "done")
    assert runner.Outcome([row], None, submitted=True).exit_code == (state == "failed")
    assert runner.Outcome([row], signal.SIGINT).exit_code == 130


def test_finished_arm_of_another_config_does_not_count(tmp_path):
  """Law: where a default changed, an identity stands for another config, and that is said."""
  its = sweep(arm("a", optim_lr=0.1))
  folder = sweeping.run(tmp_path, its).rows[0].folder
  path = folder / pool.ARM_CONFIG
  path.write_text(path.read_text().replace('"weight_decay": 0.1', '"weight_decay": 0.2'))
  with pytest.raises(ConfigError, match="another config under the same identity"):
    sweeping.run(tmp_path, its)


def test_full_disk(tmp_path, monkeypatch):
  """Law: where an arm fails on a full disk, no other is started, and the message says why."""
  its = sweep(arm("bad", optim_lr=0.666), arm("good", optim_lr=0.5))
  monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=0))
  with pytest.raises(pool.SweepError, match="disk of .* is full"):
    sweeping.run(tmp_path, its)
  assert _starts(tmp_path) == {"bad-s0": 1}


def test_pools_that_cannot_be(tmp_path):
  """Law: a folder that cannot be one is named before anything is started."""
  (tmp_path / "file").write_text("")
  with pytest.raises(ConfigError, match="cannot be written"):
    pool.Pool(tmp_path / "file" / "pool")
  (tmp_path / "config.json").write_text("{}")
  with pytest.raises(ConfigError, match="workdir of one run"):
    pool.Pool(tmp_path)


def test_dropped_checkpoints(tmp_path):
  """Law: a finished arm's checkpoints go where that is asked for, its numbers stay."""
  its = sweep(arm("a", optim_lr=0.1))
  folder = pool.Pool(tmp_path).add(its.arms[0])
  (folder / "checkpoints" / "20").mkdir(parents=True)
  outcome = sweeping.run(tmp_path, its, drop_checkpoints=True)
  assert outcome.rows[0].progress.checkpoint == 20 and not (folder / "checkpoints").exists()
  assert progress.Follower(folder).read().loss is not None
