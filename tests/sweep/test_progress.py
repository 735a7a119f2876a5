"""Where runs stand, read from files: `dsv3 watch`, the sparkline, estimates."""

import dataclasses
import json
import os
import socket
import time

import pytest

from dsv3_jax import cli, counts
from dsv3_jax import config as config_lib
from dsv3_jax.sweep import calibrate, corpus, estimate, pool, progress, table, watch
from tests.sweep import sweeping


def _config(**changes):
  return config_lib.replace(sweeping.BASE, **changes)


def _line(step, loss=None, seconds=0.5, batch=2):
  return json.dumps({
      "kind": "train", "step": step, "tokens": step * batch * 8, "loss": loss or 4 - step / 1000,
      "batch_size": batch, "max_vio": 0.25,
      "time": {"tokens_per_s": batch * 8 / seconds, "step_s": seconds,
               "elapsed_s": step * seconds}}) + "\n"


def _workdir(folder, lines="", config=None):
  folder.mkdir(parents=True, exist_ok=True)
  (folder / "config.json").write_text(config_lib.to_json(config or _config()))
  (folder / "metrics.jsonl").write_text(lines)
  return folder


def test_lines_are_read_as_they_come(tmp_path):
  """Oracle: by hand: the whole lines so far, a half one when it is whole."""
  folder = _workdir(tmp_path / "run", _line(1) + _line(2)[:30])
  follower = progress.Follower(folder)
  assert follower.read().step == 1
  with open(folder / "metrics.jsonl", "a") as file:
    file.write(_line(2)[30:] + "not json\n" + _line(3))
    file.write('{"kind": "eval", "step": 3, "loss": 3.5}\n')
  found = follower.read()
  assert (found.step, found.total, found.loss, found.validation) == (3, 20, 3.997, 3.5)
  assert found.state == "running" and found.losses == ((1, 3.999), (2, 3.998), (3, 3.997))
  assert found.tokens_per_s == pytest.approx(32) and found.eta_s == pytest.approx(17 * 0.5)
  assert found.max_vio == 0.25 and found.seconds == 1.5


@pytest.mark.parametrize("in_place", [True, False])
def test_a_resumed_run_goes_back(tmp_path, in_place):
  """Oracle: a reader that never saw the lines that were cut off."""
  folder = _workdir(tmp_path / "run", "".join(_line(i, 5.0) for i in range(1, 9)))
  follower = progress.Follower(folder)
  assert follower.read().step == 8
  text = "".join(_line(i, 5.0) for i in range(1, 5)) + "".join(
      _line(i, 6.0, seconds=0.25) for i in range(5, 12))
  (folder / "new").write_text(text)
  if in_place:
    (folder / "metrics.jsonl").write_text(text)
  else:
    os.replace(folder / "new", folder / "metrics.jsonl")
  found, fresh = follower.read(), progress.Follower(folder).read()
  assert dataclasses.replace(found, age_s=None) == dataclasses.replace(fresh, age_s=None)


def test_a_long_file_is_not_read_whole(tmp_path):
  """Oracle: the file itself: same last line and same speed, and a curve over the whole run."""
  config = _config(**{"train.tokens": 16 * 50_000})
  folder = _workdir(tmp_path / "run", "".join(_line(i) for i in range(1, 40_001)), config)
  size = (folder / "metrics.jsonl").stat().st_size
  assert size > 4 * progress.WHOLE
  follower = progress.Follower(folder)
  found = follower.read()
  assert (found.step, found.total) == (40_000, 50_000) and found.tokens_per_s == pytest.approx(32)
  steps = [step for step, _ in found.losses]
  assert steps[0] == 1 and steps == sorted(steps) and 40 < len(steps) < 600
  assert max(b - a for a, b in zip(steps, steps[1:], strict=False)) < 2000
  assert len(follower._train) <= 40
  with open(folder / "metrics.jsonl", "a") as file:
    file.write(_line(40_001))
  assert follower.read().step == 40_001


def test_states(tmp_path):
  """Oracle: by hand, for a run alone and for an arm."""
  old = time.time() - 3600
  run = _workdir(tmp_path / "run", _line(20))
  assert progress.Follower(run).read().state == "running"
  os.utime(run / "metrics.jsonl", (old, old))
  assert progress.Follower(run).read().state == "stopped"
  (run / "summary.json").write_text("{}")
  assert progress.Follower(run).read().state == "done"
  arm = _workdir(tmp_path / "arm", _line(3))
  for state, job, claimed, shown in (
      ("waiting", None, False, "interrupted"), ("waiting", "12", False, "queued"),
      ("running", None, False, "interrupted"), ("running", None, True, "running"),
      ("done", None, False, "done"), ("failed", None, False, "failed")):
    (arm / pool.ARM).unlink(missing_ok=True)
    pool.write_arm(arm, state=state, job=job)
    held = pool.claim(arm) if claimed else None
    assert progress.Follower(arm).read().state == shown, state
    if held:
      assert pool.claim(arm) is None and pool.is_claimed(arm)
      os.close(held)


@pytest.mark.parametrize("seen", [0, 1, 7, 30, 1000])
def test_steps_of_a_run_whose_batch_grows(tmp_path, seen):
  """Oracle: the ramp walked step by step, from the start; the reader begins at any step."""
  config = _config(**{"data.batch_size": 16, "data.batch_start": 2, "data.microbatch": 2,
                      "data.batch_ramp_until": 0.5, "train.tokens": 10_001.0})
  tokens, ramp = [0], config.data.ramp(config.train.tokens)
  while tokens[-1] < config.train.tokens:
    batch = [size for first, size in ramp if first <= tokens[-1]][-1]
    tokens.append(tokens[-1] + batch * config.data.sequence_length)
  total = len(tokens) - 1
  seen = min(seen, total)
  lines = "".join(json.dumps({"kind": "train", "step": i, "tokens": tokens[i], "loss": 1.0}) + "\n"
                  for i in range(1, seen + 1))
  found = progress.Follower(_workdir(tmp_path / "run", lines, config)).read()
  assert (found.step, found.total) == (seen, total)


def test_sparkline():
  """Oracle: by hand: the lowest and the highest block at the ends of a straight line."""
  assert table.sparkline([(i, float(i)) for i in range(8)], 8) == "▁▂▃▄▅▆▇█"
  assert table.sparkline([(1, 2.0), (2, float("nan")), (3, 2.0)]) == "▁▁"
  assert table.sparkline([]) == ""


def test_watch_finds_runs_and_pools(tmp_path, capsys):
  """Oracle: the folders as they were made; the table fits a narrow terminal."""
  _workdir(tmp_path / "alone", _line(3))
  its = sweeping.sweep()
  made = pool.Pool(tmp_path / "pool")
  made.write_plan(its, "c")
  for arm in its.arms[:3:2]:
    _workdir(made.add(arm), _line(5))
  _workdir(tmp_path / "pool" / ".calibration-x", _line(1))
  names = [name for name, _ in watch.Watch([tmp_path]).read()]
  assert names == ["alone", "pool/base-s0", "pool/base-s1", "pool/more-s0", "pool/more-s1"]
  assert cli.run(["watch", str(tmp_path), "--once"]) == 0
  shown = capsys.readouterr().out
  assert "pool/more-s0" in shown and "1 running, 2 interrupted, 2 waiting" in shown
  assert f"tensorboard --logdir={tmp_path}" in shown
  for width in (60, 90, 130):
    text = table.render(watch.render(watch.Watch([tmp_path]).read(), width=width), width)
    assert max(map(len, text.splitlines())) <= width and "pool/more-s0" in text
  assert cli.run(["watch", str(tmp_path / "absent")]) == 2
  (tmp_path / "empty").mkdir()
  assert cli.run(["watch", str(tmp_path / "empty")]) == 2


def test_watch_passes_damage_by(tmp_path):
  """Law: plans and configs that are JSON, but not what they should be, cost no traceback; names
  that look like markup are shown as they are written."""
  made = pool.Pool(tmp_path / "[red]pool")
  folder = made.add(sweeping.arm("a"))
  (folder / "config.json").write_text("[]")
  for i, text in enumerate(('{"arms": [{}]}', '{"arms": [3]}', "[]", '{"arms": 3}')):
    (made.folder / "sweeps" / f"{i}.json").write_text(text)
  found = watch.Watch([made.folder])
  assert [p.state for _, p in found.read()] == ["waiting"]
  assert "[red]pool" in table.render(watch.render(found.read(), found.tensorboard()))
  assert "[red]" in table.render(table.arms([], caption="[red]"))


def test_estimates(tmp_path):
  """Oracle: by hand: tokens over speed, and FLOPs for arms of another shape."""
  guess = estimate.Estimator(pool.Pool(tmp_path), model=lambda config: 7.0, where="a model")
  base, other = _config(), _config(**{"model.dim": 128})
  assert guess.seconds(base) == 7 and "(cost model, a model)" in guess.describe([base])
  guess.keep(base, tokens_per_s=100.0, overhead=3.0)
  assert guess.seconds(base) == pytest.approx(320 / 100 + 3)
  length = base.data.sequence_length
  ratio = (counts.flops_per_token(other.model, length) / counts.flops_per_token(base.model, length))
  assert guess.seconds(other) == pytest.approx(320 / 100 * ratio + 3)
  again = estimate.Estimator(pool.Pool(tmp_path))  # from the file
  assert again.seconds(base) == guess.seconds(base) and "measured here" in again.describe([base])
  half = progress.Progress(tmp_path, "interrupted", 10, 20)
  done = progress.Progress(tmp_path, "done", 20, 20)
  assert again.remaining([(base, half), (base, done), (base, half)], 2) == pytest.approx(6.2 / 2)


def test_finished_arms_replace_a_calibration(tmp_path):
  """Oracle: by hand, of an arm that trained 320 tokens at 50 a second within 10 seconds."""
  guess = estimate.Estimator(pool.Pool(tmp_path))
  guess.keep(_config(), tokens_per_s=1.0, overhead=99.0)
  for host, expected in (("elsewhere", 320 + 99), (socket.gethostname(), 10)):
    guess.learn(_config(), progress.Progress(
        tmp_path, "done", 20, 20, tokens_per_s=50.0, arm={"seconds": 10.0, "host": host}))
    assert guess.seconds(_config()) == pytest.approx(expected)


def test_calibration_leaves_nothing(tmp_path):
  """Oracle: the stub's 1,000 tokens a second; a failing arm is no error of the sweep's own."""
  put_back = sweeping.no_text()
  try:
    text = corpus.prepare(tmp_path, sweeping.BASE)
  finally:
    put_back()
  rate, overhead = calibrate.measure(sweeping.BASE, tmp_path, text, command=sweeping.command())
  assert rate == 1000 and 0 <= overhead < 20
  with pytest.raises(pool.SweepError, match="the loss was not finite"):
    calibrate.measure(_config(**{"optim.lr": 0.666}), tmp_path, text, command=sweeping.command())
  assert not list(tmp_path.glob(".calibration-*"))


def test_text_is_tokenized_once(tmp_path):
  """Law: arms of one vocabulary share tokenizer and shards, arms of another have their own."""
  source = tmp_path / "text.txt"
  source.write_text("def f(x):\n  return x + 1\n\n" * 400)
  config = _config(**{"data.sources": (str(source),), "model.vocab_size": 300})
  other = config_lib.replace(config, **{"model.vocab_size": 280})
  seeds = config_lib.replace(config, **{"train.seed": 3, "data.fim_rate": 0.0, "optim.lr": 1.0})
  assert corpus.key(config) == corpus.key(seeds) != corpus.key(other)
  made = corpus.prepare(tmp_path / "corpora", config)
  index = list(made.glob("data/*/index.json"))
  assert len(index) == 1
  stamp = index[0].stat().st_mtime_ns
  assert corpus.prepare(tmp_path / "corpora", seeds) == made
  assert index[0].stat().st_mtime_ns == stamp
  folder = tmp_path / "arms" / "a"
  folder.mkdir(parents=True)
  corpus.share(made, folder)
  corpus.share(made, folder)
  assert os.path.samefile(folder / "data" / index[0].parent.name / "index.json", index[0])
  assert (folder / "tokenizer.json").read_bytes() == (made / "tokenizer.json").read_bytes()
  with pytest.raises(pool.SweepError, match="no-such"):
    corpus.prepare(tmp_path / "corpora", _config(**{"data.sources": ("no-such.txt",)}))
