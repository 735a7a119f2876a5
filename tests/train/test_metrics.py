"""Where numbers go."""

import json
import math
import os
import sys
import types
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.config import ConfigError
from dsv3_jax.train import metrics


def _lines(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def test_cut_back_on_resume(tmp_path):
  """Oracle: the lines up to the step, written out; a half line and later steps are gone."""
  path = tmp_path / "metrics.jsonl"
  rows = [{"kind": kind, "step": step} for step in range(1, 6) for kind in ("train", "eval")]
  path.write_text("".join(json.dumps(r) + "\n" for r in rows) + '{"kind": "train", "st')
  log = metrics.JsonLines(str(path), 3)
  log.write({"kind": "train", "step": 4, "again": True})
  log.close()
  assert _lines(path) == rows[:6] + [{"kind": "train", "step": 4, "again": True}]
  metrics.JsonLines(str(path), 0).close()
  assert path.read_text() == ""


def test_plain_is_json():
  """Oracle: a strict JSON parser, and exact float32 values."""
  record = {"loss": np.float32(0.1), "bad": jnp.asarray(True), "nan": jnp.nan,
            "list": [np.float32("inf"), np.arange(2)], "time": {"x": math.pi}}
  found = json.loads(json.dumps(metrics.plain(record), allow_nan=False))
  assert found == {"loss": float(np.float32(0.1)), "bad": True, "nan": None,
                   "list": [None, [0, 1]], "time": {"x": math.pi}}


def test_tensorboard_has_the_same_numbers(tmp_path):
  """Oracle: the event file read back by tensorboardX's own protocol buffers."""
  from tensorboardX.proto import event_pb2

  board = metrics.TensorBoard(str(tmp_path), 0)
  board.write({"kind": "train", "step": 3, "loss": 2.5, "mtp_loss": [3.5], "grad_norm": None,
               "time": {"mfu": 0.5}})
  board.write({"kind": "load", "step": 3, "load_LE": [[1.0, 1.0]]})
  board.close()
  data = next(tmp_path.iterdir()).read_bytes()
  found, at = {}, 0
  while at < len(data):
    size = int.from_bytes(data[at:at + 8], "little")
    event = event_pb2.Event.FromString(data[at + 12:at + 12 + size])
    for value in event.summary.value:
      found[value.tag] = (event.step, value.simple_value)
    at += size + 16
  assert {k: v for k, v in found.items() if not k.startswith("load")} == {
      "train/loss": (3, 2.5), "train/mtp_loss_1": (3, 3.5), "train/mfu": (3, 0.5)}
  assert "load/layer_0" in found


def test_progress_line():
  """Oracle: the text, written out."""
  record = {"step": 1200, "loss": 2.34567, "max_vio": 0.256, "skipped": 0,
            "time": {"tokens_per_s": 5123.4, "mfu": 0.624}}
  assert metrics.progress_line(record, 2000, 3725.0) == (
      "step 1,200/2,000  loss 2.3457  5,123 tok/s  ETA 1:02:05  MaxVio 0.26  MFU 62%")
  broken = record | {"loss": None, "max_vio": None, "skipped": 2}
  assert metrics.progress_line(broken, 2000, None) == (
      "step 1,200/2,000  loss nan  5,123 tok/s  MFU 62%  skipped 2")


def test_lines_are_few(capsys):
  """Oracle: counting: one line at the start, none within the interval, the last one always."""
  lines = metrics.Lines(every_s=1000)
  for i in range(10):
    lines.progress(f"step {i}", i / 10)
  lines.progress("last", 1.0)
  assert capsys.readouterr().out.splitlines() == ["step 0", "last"]


def test_peak_is_that_of_the_devices_in_use(monkeypatch):
  """Oracle: the data sheet, times the mesh's devices, whatever number the machine has."""
  device = types.SimpleNamespace(device_kind="NVIDIA H100 80GB HBM3", platform="gpu")
  monkeypatch.setattr(jax, "local_devices", lambda: [device])
  assert jax.device_count() > 4
  assert metrics.peak_flops() == 989.4e12 and metrics.peak_flops(4) == 4 * 989.4e12


def test_expert_load():
  """Oracle: by hand."""
  np.testing.assert_allclose(metrics.load_of([[1, 3], [0, 0]]), [[0.5, 1.5], [0, 0]])


class FakeWandB:
  """What of the wandb package is used here."""

  def __init__(self, error: str = ""):
    self.error, self.calls, self.rows, self.metrics = error, [], [], []
    self.id, self.finished = "run-1", False

  def init(self, **kwargs):
    if self.error:
      raise RuntimeError(self.error)
    self.calls.append(kwargs)
    return self

  def define_metric(self, name, step_metric):
    self.metrics.append((name, step_metric))

  def log(self, row):
    self.rows.append(row)

  def finish(self):
    self.finished = True


@pytest.fixture
def wandb_environment(monkeypatch):
  for name in [name for name in os.environ if name.startswith("WANDB_")]:
    monkeypatch.delenv(name)
  monkeypatch.setenv("WANDB_PROJECT", "p")
  return monkeypatch


def test_wandb_gets_the_same_numbers_and_a_resumed_run_the_same_run(tmp_path, wandb_environment):
  """Oracle: the calls that a stand-in for wandb sees, written out."""
  fake = FakeWandB()
  wandb_environment.setitem(sys.modules, "wandb", fake)
  record = {"kind": "train", "step": 3, "loss": np.float32(2.5), "mtp_loss": [3.5],
            "time": {"mfu": 0.5}}
  for step in (0, 2):
    everything = metrics.Metrics(str(tmp_path), step, {"a": 1})
    everything.write(record)
    everything.close()
  wanted = {"train/loss": 2.5, "train/mtp_loss_1": 3.5, "train/mfu": 0.5, "step": 3}
  assert fake.rows == [wanted, wanted] and fake.finished
  assert fake.metrics[0] == ("*", "step")  # the step is an axis: W&B's own must never go back
  assert [(c["id"], c["resume"], c["dir"], c["config"]) for c in fake.calls] == [
      (None, "allow", str(tmp_path), {"a": 1}), ("run-1", "allow", str(tmp_path), {"a": 1})]


def test_wandb_that_does_not_start_says_what_to_do(tmp_path, wandb_environment):
  """Oracle: the library's own words and the three ways out; no file was opened before."""
  wandb_environment.setitem(sys.modules, "wandb", FakeWandB("no API key"))
  with pytest.raises(ConfigError, match="no API key.*wandb login.*WANDB_MODE=offline.*unset"):
    metrics.Metrics(str(tmp_path), 0, {})
  assert not list(tmp_path.iterdir())


def test_wandb_asked_for_and_missing_is_said(wandb_environment):
  """Oracle: the package's name and the remedy, where a project is named; silence elsewhere."""
  wandb_environment.delitem(sys.modules, "wandb", raising=False)
  wandb_environment.setattr(metrics.importlib.util, "find_spec", lambda name: None)
  with pytest.warns(UserWarning, match="WANDB_PROJECT=p .*wandb is not installed.*pip install"):
    assert not metrics.WandB.wanted()
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    wandb_environment.setenv("WANDB_MODE", "disabled")
    assert not metrics.WandB.wanted()
    wandb_environment.delenv("WANDB_MODE")
    wandb_environment.delenv("WANDB_PROJECT")
    assert not metrics.WandB.wanted()
