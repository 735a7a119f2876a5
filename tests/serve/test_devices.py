"""A server's devices: how they are named, and what is recorded of their experts' load."""

import json

import numpy as np
import pytest

from dsv3_jax import cli, config
from dsv3_jax.analysis import recorded_load
from dsv3_jax.config import ConfigError
from dsv3_jax.serve import devices


def test_sizes():
  """Oracle: by hand."""
  assert devices.sizes("2x4") == config.Mesh(node=2, gpu=4)
  assert devices.sizes("3x1x8") == config.Mesh(data=3, node=1, gpu=8)
  for text in ("4", "2x", "0x4", "2x2x2x2", "2*4"):
    with pytest.raises(ConfigError, match="write NODESxGPUS, such as 2x4"):
      devices.sizes(text)


def test_recorder(tmp_path, monkeypatch, caplog):
  """Law: what is recorded is read again as a run's load is, over a line that a crash cut off too;
  windows without load are left out; a full disk costs a line and is said."""
  clock = iter([100, 100, 200, 201, 202])
  monkeypatch.setattr(devices.time, "time", lambda: next(clock))
  made = devices.Recorder(tmp_path / "new")
  load_LE = np.array([[3.0, 0, 5], [4, 4, 0]])
  for times in (1, 0, 2):
    made(times * load_LE)
  with open(tmp_path / "new" / devices.RECORD, "a") as file:
    file.write('{"kind": "load", "st')
  devices.Recorder(tmp_path / "new")(load_LE)
  np.testing.assert_array_equal(recorded_load.read(tmp_path / "new"),
                                np.array([1, 2, 1])[:, None, None] * load_LE)
  monkeypatch.setattr(devices.Recorder, "_append", lambda self, text: open("/dev/full", "w").write(
      " " * 100_000))
  made(load_LE)
  assert "the load of a window is lost" in caplog.text
  assert json.loads((tmp_path / "new" / devices.RECORD).read_text().splitlines()[0])["step"] == 100


@pytest.mark.parametrize("words, message", [
    (["--redundant=4"], "--redundant goes with --mesh"),
    (["--halves"], "--halves goes with --mesh"),
    (["--mesh=2x2", "--redundant=-1"], "--redundant=-1 must not be negative"),
    (["--mesh=4"], "--mesh=4: write NODESxGPUS"),
    (["--mesh=1x2", "--load=nowhere"], "nowhere does not exist"),
    (["--mesh=8x8"], "--mesh: 64 devices are needed"),
    (["--mesh=2x4", "--apart"], "--mesh and --apart: 16 devices"),
    (["--record=x", "--rebalance=0"], "--record writes a line each --rebalance seconds")])
def test_errors(tmp_path, capsys, words, message):
  """Law: bad settings are said before the model is loaded."""
  (tmp_path / "checkpoints").mkdir()
  (tmp_path / "tokenizer.json").write_text("")
  assert cli.run(["serve", str(tmp_path), *words]) == 2
  assert message in capsys.readouterr().err
