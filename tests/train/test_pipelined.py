"""The real model through the pipeline."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from dsv3_jax import config
from dsv3_jax.model import stages
from dsv3_jax.parallel.schedules import make
from dsv3_jax.train import pipelined, state, step
from tests import quick
from tests.model import small

HYPER = state.Hyper(jnp.float32(1e-2), jnp.float32(1e-3), jnp.float32(0.3))
# The plain implementations: what the pipeline does is the same, and they compile sooner.
RUNTIME = config.Runtime(attention="reference", gemm="reference", head_chunk=16)
MODELS = {
    "dense": config.replace(small.BASE, layers=3, dense_layers=3, mtp_depth=0),
    "moe": small.BASE,
}


def tokens(microbatches, B=2):
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


def check(name, schedule, ranks, microbatches, unit=False, layers=None, shards=None):
  """The pipeline's gradients and statistics against those of one device."""
  _, cfg, params, buffers = model(name)
  plan = make(schedule, ranks, microbatches)
  shape = {"pipe": ranks} | ({"data": shards} if shards else {})
  mesh = jax.make_mesh(tuple(shape.values()), tuple(shape),
                       axis_types=(AxisType.Auto,) * len(shape))
  kinds = stages.cut(cfg.model, plan.stages, layers)
  grads, aux = quick.jit(lambda p, b, batch: pipelined.gradients(
      cfg, p, b, batch, HYPER, mesh, plan, kinds, unit))(params, buffers, tokens(microbatches))
  want, want_aux = expected(name, microbatches)
  want_aux = {k: v for k, v in want_aux.items() if k != "amax"}
  assert aux.keys() == want_aux.keys()
  jax.tree.map(lambda a, b: np.testing.assert_allclose(
      a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max(initial=0)), (grads, aux), (want, want_aux))


@pytest.mark.parametrize("schedule, ranks, microbatches, layers, shards", [
    ("1f1b", 2, 3, None, 2), ("zb1p", 4, 5, (2, 0, 1, 0), None), ("dualpipe_v", 2, 5, None, None)])
def test_dense(schedule, ranks, microbatches, layers, shards):
  """Oracle: the sequential step's gradients and statistics, stages unequal or without a layer."""
  check("dense", schedule, ranks, microbatches, layers=layers, shards=shards)


def test_moe():
  """Oracle: the sequential step's gradients and statistics, balance losses and MTP among them. The
  stages: a dense layer; an MoE layer; another; MTP and head."""
  check("moe", "zb1p", 4, 5)


def test_errors():
  """Oracle: messages that name both numbers, and what is not there yet."""
  with pytest.raises(ValueError, match="schedule is for 4 micro-batches and the batch has 3"):
    _, cfg, params, buffers = model("dense")
    plan = make("1f1b", 2, 4)
    pipelined.gradients(cfg, params, buffers, tokens(3), HYPER, None, plan, ())
  with pytest.raises(ValueError, match="recipe=v3: the pipeline has no FP8 recipes yet"):
    stages.Stages(cfg.model, cfg.loss, config.Runtime(recipe="v3"), slots=0, mtp_buffers=None,
                  mtp_weight=0.0, denominator=1.0, share=1.0)
