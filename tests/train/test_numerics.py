"""FP8 numerics logged during training."""

import jax
import numpy as np
import pytest
from flax import nnx

from dsv3_jax.train import checkpoint, numerics, schedules, state
from tests.train import fakes, runs


@pytest.mark.timeout(180)  # compiles a run and every layer's statistics; 20 s on two free cores
def test_logged_during_training(tmp_path):
  """Oracle: the same statistics from the checkpoint of that step and its batch."""
  cfg = fakes.small_config(**{"model.mtp_depth": 0, "train.tokens": 64 * 4, "train.eval_every": 0,
                              "train.numerics_every": 2, "runtime.recipe": "v3"})
  assert runs.run(cfg, tmp_path).finished
  rows = [r for r in runs.records(tmp_path) if r["kind"] == "numerics"]
  assert [(r["step"], r["tokens"], r["recipe"]) for r in rows] == [(2, 128, "v3"), (4, 256, "v3")]
  params, buffers, meta = checkpoint.load_params(str(tmp_path))
  assert meta["step"] == 4
  schedule = schedules.batch_schedule(cfg.data, cfg.train.tokens)
  batches = fakes.FakeCorpus(cfg).train_iterator(schedule)
  batches.set_state({"step": 3})
  batch = {k: v[0] for k, v in next(batches).items()}
  graphdef = state.split(nnx.eval_shape(lambda: state.build_model(cfg.model, 0)))[0]
  taps = numerics.make_capture(graphdef, cfg)(
      *jax.tree.map(jax.numpy.asarray, (params, buffers, batch)),
      np.float32(schedules.mtp_weight(cfg.loss, cfg.train.tokens)(256)))
  again = numerics.record(numerics.operators(params, taps, cfg.model), "v3", cfg.runtime)
  for key, value in again.items():
    assert rows[1][key] == value, key
  assert rows[0]["error"]["fprop"] != rows[1]["error"]["fprop"]
  assert all(0.005 < e < 0.1 for gemm in again["error"].values() for e in gemm)
