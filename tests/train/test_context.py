"""Sequences cut over devices: loss, gradients and whole runs are those of one device."""

import json

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax import config
from dsv3_jax.parallel import mesh as mesh_lib
from dsv3_jax.train import state, step
from tests import quick
from tests.model import small
from tests.oracles.tolerance import assert_close
from tests.train import runs

B, T = 4, 24
CFG = config.replace(
    config.Config(loss=small.WEIGHTS),
    **{"model": small.BASE, "model.vocab_size": 24, "model.layers": 1, "model.dense_layers": 0,
       "model.mtp_depth": 2, "runtime.gemm": "reference",
       "model.attention.yarn": config.Yarn(factor=4.0, original_length=8),
       "runtime.attention_block": 4, "runtime.head_chunk": 16, "data.sequence_length": T,
       "data.batch_size": B})
HYPER = state.Hyper(jnp.float32(3e-4), jnp.float32(1e-3), jnp.float32(0.3))


def batch():
  """Documents of uneven length, apart from each other, padding, and masked targets."""
  draw = np.random.default_rng(0)
  segments = np.sort(draw.integers(0, 3, (1, B, T + 1))).astype(np.int32)
  segments[:, 0, -5:] = -1
  return {"tokens": draw.integers(0, 23, (1, B, T + 1)).astype(np.int32), "segments": segments,
          "mask": draw.integers(0, 2, (1, B, T + 1)).astype(np.int8)}


def gradients(changes=None):
  """Gradients of a batch, and its statistics."""
  cfg = config.replace(CFG, **(changes or {}))
  graphdef, params, buffers = state.split(small.build(cfg.model, seed=2))
  made = mesh_lib.make_mesh(cfg.runtime.mesh) if cfg.runtime.mesh.devices > 1 else None
  run = quick.jit(lambda p, b: step.gradients(graphdef, cfg, p, buffers, b, HYPER, made))
  grads, aux = jax.device_get(run(params, batch()))
  del aux["amax"]
  return grads, aux


def test_loss_and_gradients():
  """Oracle: one device; packed documents, MTP, all balance losses, YaRN; experts apart besides."""
  expected, expected_aux = gradients()
  grads, aux = gradients({
      "runtime.mesh.context": 4, "runtime.mesh.gpu": 2, "runtime.remat": "report",
      "runtime.zero": 1, "runtime.shard_vocab": True})
  for key in ("counts_LE", "tokens", "mtp_tokens", "correct"):
    np.testing.assert_array_equal(aux[key], expected_aux[key], key)
  assert aux["mtp_tokens"].min() > 0 and aux["balance"] > 0 and aux["expert_balance"] > 0
  for key, value in aux.items():
    assert_close(value, expected_aux[key])
  for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(expected), jax.tree.leaves(grads),
                          strict=True):
    assert np.any(a), path
    assert_close(b, a)


def test_a_run(whole, tmp_path):
  """Oracle: the run on one device, evaluation included."""
  cfg = config.from_dict(json.loads((whole / "config.json").read_text()))
  runs.run(config.replace(cfg, **{"runtime.mesh.context": 2}), tmp_path)
  pairs = list(zip(runs.records(whole), runs.records(tmp_path), strict=True))
  assert {a["kind"] for a, _ in pairs} > {"train", "eval"}
  for a, b in pairs:
    for key in ("loss", "mtp_loss", "balance", "grad_norm"):
      if key in a:
        np.testing.assert_allclose(b[key], a[key], rtol=1e-4, err_msg=f"{a['step']} {key}")
