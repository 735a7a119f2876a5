"""The real model through the pipeline."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax import config
from dsv3_jax.fp8 import delayed
from dsv3_jax.fp8.recipe import resolve
from dsv3_jax.parallel import mesh as mesh_lib
from dsv3_jax.parallel import placement
from dsv3_jax.train import pipelined, state, step
from tests import quick
from tests.model import small

HYPER = state.Hyper(jnp.float32(1e-2), jnp.float32(1e-3), jnp.float32(0.3))
# The plain implementations: what the pipeline does is the same, and they compile sooner.
RUNTIME = config.Runtime(attention="reference", gemm="reference", head_chunk=16)
MODELS = {
    "dense": config.replace(small.BASE, layers=3, dense_layers=3, mtp_depth=0),
    "moe": config.replace(small.BASE, vocab_size=24),
}


B = 4  # sequences of a micro-batch, all devices together


def tokens(microbatches):
  draw = np.random.default_rng(5)
  return {"tokens": jnp.asarray(draw.integers(23, size=(microbatches, B, 9)), jnp.int32),
          "mask": jnp.asarray(draw.random((microbatches, B, 9)) < 0.8)}


@functools.cache
def model(name):
  graphdef, params, buffers = state.split(small.build(MODELS[name]))
  cfg = config.Config(model=MODELS[name], loss=small.WEIGHTS, runtime=RUNTIME)
  return graphdef, cfg, params, buffers


@functools.cache
def expected(name, microbatches):
  graphdef, cfg, params, buffers = model(name)
  return quick.jit(lambda p, b, batch: step.gradients(graphdef, cfg, p, b, batch, HYPER))(
      params, buffers, tokens(microbatches))


def check(name, schedule, mesh, microbatches, layers=(), runtime=(), tolerance=1e-5):
  """The pipeline's gradients and statistics against those of one device; the worst deviation."""
  _, cfg, params, buffers = model(name)
  mesh = config.Mesh(**mesh)
  cfg = config.replace(cfg, **{
      "runtime.mesh": mesh, "runtime.pipeline": {"schedule": schedule, "layers": layers},
      "data.batch_size": B * microbatches, "data.microbatch": B, **dict(runtime)})
  devices = mesh_lib.make_mesh(mesh)
  plan = pipelined.plan(cfg, microbatches)
  params = jax.device_put(params, placement.shardings(
      placement.places(params, devices, cfg.runtime), devices))
  found = quick.jit(lambda p, b, batch: pipelined.gradients(
      cfg, p, b, batch, HYPER, devices, plan))(params, buffers, tokens(microbatches))
  want = expected(name, microbatches)
  found[1].pop("amax")
  worst = 0.0
  for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(
      (want[0], {k: v for k, v in want[1].items() if k != "amax"})), strict=True):
    scale = np.abs(b).max(initial=1e-30)
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * scale,
                               err_msg=jax.tree_util.keystr(path))
    worst = max(worst, np.abs(np.asarray(a) - np.asarray(b)).max(initial=0) / scale)
  return worst


@pytest.mark.parametrize("schedule, mesh, microbatches, layers", [
    ("1f1b", {"pipe": 2, "data": 2}, 3, ()), ("zb1p", {"pipe": 4}, 5, (2, 0, 1, 0)),
    ("dualpipe_v", {"pipe": 2}, 5, ())])
def test_dense(schedule, mesh, microbatches, layers):
  """Oracle: the sequential step's gradients and statistics, stages unequal or without a layer."""
  check("dense", schedule, mesh, microbatches, layers)


def test_moe():
  """Oracle: the sequential step's gradients and statistics, balance losses and MTP among them. The
  stages: a dense layer; an MoE layer; another; MTP and head."""
  check("moe", "zb1p", {"pipe": 4}, 5)


def test_experts_apart():
  """Oracle: the sequential step; experts and words over node and gpu, ZeRO-1."""
  check("moe", "1f1b", {"pipe": 2, "node": 2, "gpu": 2}, 3,
        runtime={"runtime.zero": 1, "runtime.shard_vocab": True})


def test_errors():
  """Oracle: messages that name both numbers, the keys, and what to do."""
  _, cfg, params, buffers = model("dense")
  with pytest.raises(ValueError, match="schedule is for 4 micro-batches and the batch has 3"):
    piped = config.replace(cfg, **{"runtime.mesh.pipe": 2, "runtime.pipeline.schedule": "1f1b"})
    pipelined.gradients(piped, params, buffers, tokens(3), HYPER, None, pipelined.plan(piped, 4))
  with pytest.raises(config.ConfigError, match="runtime.mesh.pipe=2: dualpipe_v needs at least"):
    pipelined.plan(config.replace(cfg, **{"runtime.mesh.pipe": 2}), 3)
  with pytest.raises(config.ConfigError, match="runtime.pipeline.layers.*must be 2 numbers"):
    pipelined.plan(config.replace(cfg, **{"runtime.mesh.pipe": 2, "runtime.pipeline": {
        "schedule": "1f1b", "layers": (1, 1, 1)}}), 3)
  with pytest.raises(config.ConfigError, match="must add up to model.layers=3"):
    config.replace(cfg, **{"runtime.mesh.pipe": 2, "runtime.pipeline.layers": (1, 1)})


def test_amaxes_of_experts_apart():
  """Law: a history is per layer, not per expert: it is not cut where experts are. Traced alone."""
  _, cfg, params, buffers = model("moe")
  mesh = config.Mesh(pipe=2, gpu=4)
  cfg = config.replace(cfg, **{
      "runtime.mesh": mesh, "runtime.pipeline.schedule": "1f1b",
      "runtime.recipe": "per_tensor_delayed", "data.batch_size": B * 3, "data.microbatch": B})
  amax = delayed.assumed(delayed.init(params, resolve(cfg.runtime)))
  _, aux = jax.eval_shape(lambda p, b, batch, amax: pipelined.gradients(
      cfg, p, b, batch, HYPER, mesh_lib.make_mesh(mesh), pipelined.plan(cfg, 3), amax),
      params, buffers, tokens(3), amax)
  assert jax.tree.map(jnp.shape, aux["amax"]) == jax.tree.map(jnp.shape, amax)
