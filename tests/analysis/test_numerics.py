"""Tables and figures of FP8 numerics, and the accumulation study's."""

import json

import numpy as np
import pytest

from dsv3_jax.analysis import accumulation, numerics, report, workdir
from tests.analysis import synthetic


@pytest.fixture(scope="module")
def measured():
  """Two recipes on three operators; numbers that tell where they came from."""
  operators = []
  for i, name in enumerate(("0.attn.w_o_HUD", "1.ffn.w_up_EDF", "mtp0.w_embed_DD")):
    part = lambda keys, scale, i=i: {k: scale * (i + 1) * (j + 1) for j, k in enumerate(keys)}
    stats = lambda scale, part=part: {
        "underflow": part(numerics.OPERANDS, scale / 100), "error": part(numerics.GEMMS, scale),
        "saturation": dict.fromkeys(numerics.OPERANDS, 0.0)}
    histogram = [0] * 57
    histogram[30 + i] = 12
    operators.append({"name": name, "shape": [8, 4],
                      "amax": {k: {"largest": 0.5, "histogram": histogram}
                               for k in numerics.OPERANDS},
                      "recipes": {"v3": stats(0.01), "hybrid_e5m2": stats(0.02)}})
  return {"recipes": ["v3", "hybrid_e5m2"], "exponents": list(range(-40, 17)),
          "operators": operators}


def test_rows_and_summary(measured):
  """Oracle: the numbers put in, by hand."""
  rows = numerics.rows(measured)
  assert len(rows) == 6 and {len(r) for r in rows} == {len(numerics.HEAD)}
  assert rows[3] == ("", "hybrid_e5m2", "", "", "", "0.04", "0.08", "0.12", "0", "0", "0",
                     "4", "8", "12")
  summary = {(r[0], r[1]): r[2:] for r in numerics.summary(measured)}
  assert summary["v3", "error dgrad"] == ("4", "6", "mtp0.w_embed_DD")
  assert summary["hybrid_e5m2", "saturation x"] == ("0", "0", "-")


def test_files(measured, tmp_path):
  """Oracle: the JSON comes back; the errors' axis reaches the largest; names stand in figures."""
  path = numerics.write(measured, tmp_path / "out", "a model")
  assert json.loads((path.parent / "numerics.json").read_text()) == measured
  text = path.read_text()
  assert "a model" in text and "1.ffn.w_up_EDF" in text
  for file in ("numerics_errors.svg", "numerics_amax.svg"):
    assert file in text and "mtp0.w_embed_DD" in (path.parent / file).read_text()
  axes = numerics.errors(measured).axes
  assert all(a.get_ylim()[0] == 0 and a.get_ylim()[1] >= 18 for a in axes)


def test_report_of_a_run(measured, tmp_path):
  """Oracle: a run with logged numerics shows them, a run without does not."""
  folder = synthetic.write(tmp_path / "run", steps=20, eval_every=0)
  assert "FP8 numerics" not in report.write(folder).read_text()
  with open(folder / "metrics.jsonl", "a") as f:
    for step in (5, 10):
      lists = {part: {k: [0.01 * step, 0.02] for k in keys} for part, keys in (
          ("error", numerics.GEMMS), ("underflow", numerics.OPERANDS))}
      f.write(json.dumps({"kind": "numerics", "step": step, "tokens": 2048 * step,
                          "recipe": "v3", **lists}) + "\n")
  assert "FP8 numerics" in report.write(folder).read_text()
  figure = numerics.over_time(workdir.read(folder))
  mean, worst = figure.axes[0].lines[:2]
  np.testing.assert_allclose(mean.get_ydata(), [3.5, 6])
  np.testing.assert_allclose(worst.get_ydata(), [5, 10])
  assert (folder / "plots" / "numerics.svg").exists()


def test_accumulation_study(tmp_path):
  """Oracle: each number of the study stands in its cell."""
  error = lambda x: {"max_over_rms": x, "max_over_max": x / 2, "norm": x / 4, "max_of_ratios": 9.0}
  study = {
      "study": "accumulation", "rows": 8, "report_rows": 16, "seed": 0,
      "grid": [{"K": K, "interval": i, "bits": b, **error(K / 1e6 / b)}
               for K in (64, 128) for i in (32, 0) for b in (10, 14)],
      "report": [{"draw": "normal", "truncation": "floor", "K": 4096, "interval": 0, "bits": 14,
                  **error(0.02)}],
      "exact": [{"draw": d, "bits": b, "share": 0.25, "max_error": 1e-3}
                for d in ("normal", "codes") for b in (10, 36)]}
  text = accumulation.write(study, tmp_path).read_text()
  assert "| 128 | never | 0.0013 % | 0.00091 % |" in text
  assert "| normal | minus infinity | never | 2 % | 1 % | 0.5 % | 9e+02 % |" in text
  assert "| 36 | 25.00 % | 1.0e-03 | 25.00 % | 1.0e-03 |" in text
  assert json.loads((tmp_path / "accumulation.json").read_text()) == study
  figure = accumulation.figure(study)
  assert len(figure.axes) == 3 and len(figure.axes[0].lines) == 2
