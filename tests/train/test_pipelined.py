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
MODELS = {
    "dense": config.replace(small.BASE, layers=4, dense_layers=4, mtp_depth=0),
    "moe": config.replace(small.BASE, layers=4, dense_layers=1),
}


def tokens(microbatches, B=2):
  draw = np.random.default_rng(5)
  return {"tokens": jnp.asarray(draw.integers(23, size=(microbatches, B, 9)), jnp.int32),
          "mask": jnp.asarray(draw.random((microbatches, B, 9)) < 0.8)}


@functools.cache
def model(name):
  graphdef, params, buffers = state.split(small.build(MODELS[name]))
  cfg = config.Config(model=MODELS[name], loss=small.WEIGHTS, runtime=small.RUNTIME)
  return graphdef, cfg, params, buffers


@functools.cache
def expected(name, microbatches):
  graphdef, cfg, params, buffers = model(name)
  return quick.jit(lambda p, b, batch: step.gradients(graphdef, cfg, p, b, batch, HYPER))(
      params, buffers, tokens(microbatches))


def check(name, schedule, ranks, microbatches, unit=False, layers=None):
  _, cfg, params, buffers = model(name)
  plan = make(schedule, ranks, microbatches)
  mesh = jax.make_mesh((ranks,), ("pipe",), axis_types=(AxisType.Auto,))
  kinds = stages.cut(cfg.model, plan.stages, layers)
  grads, aux = quick.jit(lambda p, b, batch: pipelined.gradients(
      cfg, p, b, batch, HYPER, mesh, plan, kinds, unit))(params, buffers, tokens(microbatches))
  want, want_aux = expected(name, microbatches)
  want_aux = {k: v for k, v in want_aux.items() if k != "amax"}
  assert aux.keys() == want_aux.keys()
  jax.tree.map(lambda a, b: np.testing.assert_allclose(
      a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max(initial=0)), (grads, aux), (want, want_aux))


@pytest.mark.parametrize("schedule, ranks, microbatches", [("1f1b", 2, 3)])
def test_dense(schedule, ranks, microbatches):
  """Oracle: the sequential step's gradients and statistics."""
  check("dense", schedule, ranks, microbatches)


@pytest.mark.parametrize("schedule, ranks, microbatches", [("1f1b", 2, 3)])
def test_moe(schedule, ranks, microbatches):
  """Oracle: the sequential step's gradients and statistics."""
  check("moe", schedule, ranks, microbatches)
