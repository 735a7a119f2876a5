"""Whole runs: interruptions leave no trace, bad input and bad numbers end clearly."""

import errno
import gzip
import json
import random
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

from dsv3_jax import config as config_lib
from dsv3_jax import train
from dsv3_jax.train import checkpoint, loop, metrics, schedules, workdir
from tests.train import runs


def test_a_finished_run(whole, config):
  """Oracle: the schedules and counts by hand; learning; what the workdir should hold."""
  rows = runs.records(whole)
  steps = [r for r in rows if r["kind"] == "train"]
  assert [r["step"] for r in steps] == list(range(1, 13))
  assert [r["tokens"] for r in steps] == [64 * i for i in range(1, 13)]
  lr = schedules.learning_rate(config.optim, config.train.tokens)
  assert [r["lr"] for r in steps] == [lr(64 * i, i + 1) for i in range(12)]
  assert steps[-1]["loss"] < steps[0]["loss"] - 0.4
  assert steps[0]["balance"] > 0 and "batch_balance" not in steps[0]  # only what is on
  assert steps[-1]["loss"] != steps[-2]["loss"] and steps[0]["grad_norm"] > 0
  evals = [r for r in rows if r["kind"] == "eval"]
  assert [r["step"] for r in evals] == [4, 8, 12]
  assert evals[-1]["loss"] < evals[0]["loss"]
  load = [r for r in rows if r["kind"] == "load"][-1]["load_LE"]
  np.testing.assert_allclose(np.mean(load, axis=1), [1, 1], rtol=1e-6)
  assert evals[-1]["max_vio"] == pytest.approx(np.max(load) - 1, rel=1e-5)
  assert config_lib.from_json((whole / "config.json").read_text()) == config
  best = min(evals, key=lambda r: r["loss"])["step"]
  assert sorted(p.name for p in (whole / "checkpoints").iterdir()) == sorted(
      {"00000008", "00000012", f"{best:08d}"})
  summary = json.loads((whole / "summary.json").read_text())
  assert summary["final"]["loss"] == evals[-1]["loss"]
  assert summary["final"]["ema_bits_per_byte"] != summary["final"]["bits_per_byte"]
  assert {"unigram", "gzip -9", "xz"} == set(summary["baselines"])
  assert list((whole / "tensorboard").iterdir())


def test_a_finished_run_is_left_alone(whole, config, tmp_path):
  """Oracle: the files of the first run; nothing is trained again."""
  folder = tmp_path / "copy"
  shutil.copytree(whole, folder)
  before = (folder / "metrics.jsonl").read_bytes()
  result = runs.run(config, folder)
  assert result.finished and result.step == 12 and result.tokens == 768
  assert result.summary == json.loads((whole / "summary.json").read_text())
  assert (folder / "metrics.jsonl").read_bytes() == before


def test_samples_that_fail_cost_no_summary(whole, config, tmp_path, monkeypatch):
  """Oracle: the summary of the run without samples; the note says why there are none."""
  def fail(*args):
    raise IndexError("list index out of range")

  folder = tmp_path / "copy"
  shutil.copytree(whole, folder)
  (folder / "summary.json").unlink()
  monkeypatch.setattr(loop.sample_lib, "report_samples", fail)
  ui = runs.Notes()
  result = runs.run(config_lib.replace(config, **{"train.sample_tokens": 4}), folder, ui)
  expected = json.loads((whole / "summary.json").read_text())["final"]
  assert result.summary["samples"] == [] and result.summary["final"] == expected
  assert (folder / "summary.json").exists()
  assert "no samples: IndexError: list index out of range" in ui.notes


def test_a_signal_saves_and_the_run_goes_on(whole, config, tmp_path):
  """Oracle: the uninterrupted run, bit for bit, after SIGTERM between two checkpoints."""
  ui = runs.Interrupt(5)
  handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
  result = runs.run(config, tmp_path, ui)
  assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers
  assert not result.finished and result.exit_code == 143 and 5 <= result.step <= 7
  assert checkpoint.load_params(str(tmp_path))[2]["step"] == result.step
  assert any("SIGTERM" in n for n in ui.notes) and "run the same command" in ui.notes[-1]
  assert not (tmp_path / "summary.json").exists()
  # Lines from after the checkpoint, as a run that went on and died would leave.
  with open(tmp_path / "metrics.jsonl", "a") as f:
    f.write(json.dumps({"kind": "train", "step": 11, "loss": 0.0}) + '\n{"kind": "tr')
  result = runs.run(config, tmp_path)
  assert result.finished and result.exit_code == 0
  runs.assert_same(whole, tmp_path)


@pytest.mark.timeout(120)  # four processes' worth of start-up; 20 s on two free cores
def test_kill_9_three_times(whole, config, cache_dir, tmp_path):
  """Oracle: the uninterrupted run, bit for bit, after SIGKILL at three random steps."""
  folder = tmp_path / "run"
  folder.mkdir()
  (tmp_path / "config.json").write_text(config_lib.to_json(config))
  steps = sorted(random.sample(range(1, 12), 3))
  command = [sys.executable, "-m", "tests.train.killed", str(folder), str(cache_dir)]
  done = subprocess.run([*command, *map(str, steps)], capture_output=True, text=True)
  lines = done.stdout.splitlines()
  assert len(lines) == 3 and all(line.endswith("SIGKILL") for line in lines), (lines, done.stderr)
  result = runs.run(config, folder)
  assert result.finished, lines
  runs.assert_same(whole, folder)


def test_diverged(config, tmp_path, monkeypatch):
  """Oracle: parameters before the bad batches; the run stops at max_bad_steps and says so."""
  config = config_lib.replace(config, **{"train.max_bad_steps": 3, "optim.ema_decay": 0.0,
                                         "train.eval_every": 0})
  target = loop.step_lib.make_train_step

  def poisoned(*args, **kwargs):
    inner = target(*args, **kwargs)

    def train_step(state, batch, hyper):
      number = int(jax.device_get(state.step)) + 1
      bad = jax.device_put(np.float32(np.nan if number > 6 else hyper.lr))
      weight = hyper.mtp_weight if number <= 6 else bad
      return inner(state, batch, loop.state_lib.Hyper(hyper.lr, hyper.bias_speed, weight))
    return train_step

  monkeypatch.setattr(loop.step_lib, "make_train_step", poisoned)
  with pytest.raises(train.loop.DivergedError, match=(
      r"step 9.* 3 steps in a row.*in a new --workdir.*step 4 is whole")):
    runs.run(config, tmp_path)
  steps = [r for r in runs.records(tmp_path) if r["kind"] == "train"]
  assert [r["skipped"] for r in steps] == [0] * 6 + [1, 2]
  assert steps[-1]["grad_norm"] is None


def test_a_full_disk_for_the_metrics(config, tmp_path, monkeypatch):
  """Oracle: the kernel's error from a write becomes one sentence that says what to do."""

  def full(self, record):
    raise OSError(errno.ENOSPC, "No space left on device")

  monkeypatch.setattr(metrics.JsonLines, "write", full)
  with pytest.raises(checkpoint.CheckpointError, match="is full; free some space"):
    runs.run(config, tmp_path)


def test_profile(config, tmp_path):
  """Oracle: the trace file itself: the annotated steps of the capture and no other, the step's
  operations, no Python call (jaxlib writes those with a $; recording them can end the process)."""
  config = config_lib.replace(config, **{
      "train.profile_from": 2, "train.profile_steps": 2, "train.tokens": 64 * 5,
      "train.eval_every": 0})
  ui = runs.Notes()
  runs.run(config, tmp_path, ui)
  assert any(f"profile up to step 3 is in {tmp_path / 'profile'}" in n for n in ui.notes)
  (trace,) = tmp_path.glob("profile/**/*.trace.json.gz")
  events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
  steps = {e["args"]["step_num"] for e in events if "step_num" in e.get("args", {})}
  assert steps == {"2", "3"}
  assert any("hlo_op" in e.get("args", {}) for e in events)
  assert not any(e.get("name", "").startswith("$") for e in events)


def test_what_a_config_does_unseen_is_said(config, tmp_path):
  """Oracle: the notes: a profile beyond the end and behind a resumed run, with nothing captured; a
  warm-up without end; a key that changed on the way, in the metrics too."""
  for first, ui in ((6, runs.Interrupt(2)), (1, runs.Notes())):
    changes = {"train.tokens": 64 * 5, "train.eval_every": 0, "train.profile_from": first,
               "optim.warmup_steps": 5}
    runs.run(config_lib.replace(config, **changes), tmp_path, ui)
    assert any(f"train.profile_from={first} is not among the steps to come, " in n and
               "to 5" in n for n in ui.notes)
    assert any("optim.warmup_steps=5 leaves none of the run's 5 steps" in n for n in ui.notes)
  assert "changed since the last start: train.profile_from from 6 to 1" in ui.notes
  record, = (r for r in runs.records(tmp_path) if r["kind"] == "config")
  assert record["changed"] == {"train.profile_from": [6, 1]} and 2 <= record["step"] < 5
  assert not (tmp_path / "profile").exists()


def test_another_config_is_refused(whole, config):
  """Oracle: the key and both values in the message, before anything is touched."""
  other = config_lib.replace(config, **{"optim.lr": 0.5})
  before = (whole / "config.json").read_bytes()
  with pytest.raises(workdir.WorkdirError, match=r"optim.lr: 0.01 there, 0.5 now"):
    runs.run(other, whole)
  assert (whole / "config.json").read_bytes() == before


def test_ramp_mesh_and_samples(config, tmp_path):
  """Law: a batch ramp on two devices goes through, with its sizes in the metrics; samples exist."""
  config = config_lib.replace(config, **{
      "data.batch_size": 8, "data.batch_start": 2, "data.microbatch": 2,
      "data.batch_ramp_until": 0.5, "data.batch_ramp_stages": 3, "runtime.mesh.data": 2,
      "train.sample_tokens": 4})
  result = runs.run(config, tmp_path)
  sizes = [r["batch_size"] for r in runs.records(tmp_path) if r["kind"] == "train"]
  assert sizes == sorted(sizes) and set(sizes) == {2, 4, 6, 8}
  kinds = [s["kind"] for s in result.summary["samples"]]
  assert kinds == ["completion", "infill"] * 2
  assert all(s["text"] and s["reference"] for s in result.summary["samples"])


def test_another_mesh_each_time(config, tmp_path):
  """Oracle: the run on one device. The first part is a pipeline whose experts lie apart under
  ZeRO-1, the second is data parallel, the last one device."""
  config = config_lib.replace(config, **{"data.microbatch": 2})
  runs.run(config, tmp_path / "one")
  parts = ({"runtime.mesh": {"pipe": 2, "gpu": 2}, "runtime.zero": 1,
            "runtime.pipeline.schedule": "1f1b"}, {"runtime.mesh.data": 2}, {})
  for changes, stop in zip(parts, (3, 5, None), strict=True):
    ui = runs.Interrupt(stop) if stop else None
    result = runs.run(config_lib.replace(config, **changes), tmp_path / "moved", ui)
    assert result.finished == (stop is None)
  pairs = [[r for r in runs.records(tmp_path / name) if r["kind"] == "train"]
           for name in ("one", "moved")]
  assert len(pairs[0]) == len(pairs[1]) == 12
  for one, moved in zip(*pairs, strict=True):
    for key, value in one.items():
      np.testing.assert_allclose(moved[key], value, rtol=1e-4, err_msg=key) \
          if isinstance(value, (float, list)) else None


def test_a_pipeline_is_checked_for_every_batch_before_it_starts(config, tmp_path):
  """Law: what the batch ramp would run into is said at once, with the keys."""
  config = config_lib.replace(config, **{
      "data.batch_size": 8, "data.batch_start": 4, "data.microbatch": 2,
      "data.batch_ramp_until": 0.5, "data.batch_ramp_stages": 1, "runtime.mesh.pipe": 2})
  with pytest.raises(config_lib.ConfigError, match="at least 2 .* ranks = 4.*data.batch_start=4"):
    runs.run(config, tmp_path)
