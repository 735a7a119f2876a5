"""`dsv3 numerics`: what people type, and what they get."""

import json

import numpy as np
import pytest

from dsv3_jax import cli
from dsv3_jax import config as config_lib
from dsv3_jax.fp8 import study
from tests.train import fakes


@pytest.mark.parametrize("words, named", [
    ([], ["--config=FILE"]),
    (["runs/x", "--config=experiments/tiny.py"], ["--config=FILE"]),
    (["runs/x", "--recipes=v3,hybrid_e5m3"], ["'hybrid_e5m3'", "did you mean 'hybrid_e5m2'"]),
    (["runs/x", "--recipes="], ["per_tensor_current"]),
    (["runs/x", "--recipes=none"], ["'none' is none of"]),
    (["runs/x", "--rows=0"], ["--rows=0", "positive"]),
    (["runs/x", "--config.train.seed=1"], ["--config.train.seed"]),
    (["--study=accumulation", "runs/x"], ["--study=accumulation"]),
    (["--config=experiments/tiny.py", "--ema"], ["--step and --ema"])])
def test_mistakes(words, named, capsys):
  """Oracle: exit code 2 and one line that names what was wrong and what would be right."""
  assert cli.run(["numerics", *words]) == 2
  err = capsys.readouterr().err.splitlines()
  assert len(err) == 1 and all(part in err[0] for part in named), err


def test_study(tmp_path, monkeypatch, capsys):
  """Oracle: the study's own result, in files and on the terminal."""
  result = {"study": "accumulation", "rows": 2, "report_rows": 2, "seed": 0,
            "grid": [{"K": 64, "interval": 0, "bits": 14, **_error()}],
            "report": [{"draw": "normal", "truncation": "zero", "K": 4096, "interval": 0,
                        "bits": 14, **_error()}],
            "exact": [{"draw": "normal", "bits": 14, "share": 0.5, "max_error": 0.1}]}
  assert set(_error()) == set(study.errors(np.ones((1, 1)), np.ones((1, 1))))
  monkeypatch.setattr(study, "accumulation", lambda say: result)
  assert cli.run(["numerics", "--study=accumulation", f"--out={tmp_path}"]) == 0
  assert json.loads((tmp_path / "accumulation.json").read_text()) == result
  assert "| 64 | never | 1 % |" in capsys.readouterr().out


def _error():
  return {"max_over_rms": 0.01, "max_over_max": 0.01, "norm": 0.01, "max_of_ratios": 0.01}


@pytest.mark.timeout(180)  # compiles the model once and its layers; 15 s on two free cores
def test_a_fresh_model(tmp_path, capsys):
  """Law: fp32 errs nowhere; each linear layer of the config is there; overrides reach the model."""
  (tmp_path / "small.json").write_text(config_lib.to_json(fakes.small_config()))
  assert cli.run(["numerics", f"--config={tmp_path / 'small.json'}", "--recipes=fp32", "--rows=2",
                  "--config.model.mtp_depth=0", f"--out={tmp_path / 'out'}"]) == 0
  found = json.loads((tmp_path / "out" / "numerics.json").read_text())
  names = [o["name"] for o in found["operators"]]
  assert len(names) == 5 + 3 + 3 and all(n.startswith("0.") for n in names)
  assert all(v == 0 for o in found["operators"] for v in o["recipes"]["fp32"]["error"].values())
  out = capsys.readouterr().out
  assert "0.ffn.w_down_EFD" in out and "per_tensor" not in out and "numerics.md" in out
