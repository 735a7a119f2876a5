"""Dispatch and combine on virtual devices: any form and mesh against the single device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from dsv3_jax import ops
from dsv3_jax.model import moe
from dsv3_jax.parallel import dispatch, rounds
from dsv3_jax.parallel.dispatch import Settings
from tests.oracles.tolerance import assert_close
from tests.quick import jit

D, F, E, A, TOKENS = 6, 4, 16, 3, 24  # TOKENS of all devices
MESHES = [(1, 8), (2, 4), (4, 2), (8, 1), (2, 2)]
AXES = ("node", "gpu")
CUT = PartitionSpec(AXES)
RNG = np.random.default_rng(0)
X, DY = (RNG.normal(size=(TOKENS, D)).astype(np.float32) for _ in range(2))
GATES = RNG.uniform(0.1, 1, (TOKENS, A)).astype(np.float32)
WS = [RNG.normal(size=s).astype(np.float32) for s in ((E, D, F), (E, F, D))]


def loads():
  """Choices int32 [TOKENS, A] by name; under all but the first something is extreme."""
  rng = np.random.default_rng(1)
  some = lambda n: np.argsort(rng.normal(size=(TOKENS, n)), 1)[:, :A]
  one = np.concatenate([np.full((TOKENS, 1), 5), some(5)[:, 1:]], 1)
  return {name: v.astype(np.int32) for name, v in {
      "free": some(E), "hot": one,  # all on expert 5, and those from 6 have none
      "one node": E - 1 - some(4), "few": E - 1 - some(A)}.items()}


LOADS = loads()


def mesh_of(shape):
  count = int(np.prod(shape))
  if len(jax.devices()) < count:
    pytest.skip(f"needs {count} devices")
  return jax.make_mesh(shape, AXES, axis_types=(jax.sharding.AxisType.Auto,) * 2,
                       devices=jax.devices()[:count])


def ffn(x_PD, gate_PA, ws, plan):
  """The layer's order of things: spread, gate on the hidden values, collect."""
  h_MF = jnp.tanh(ops.grouped_gemm(moe.spread(x_PD, plan), ws[0], plan.group_m, plan.used))
  h_MF = h_MF * moe.spread_gates(gate_PA, plan)[:, None]
  return moe.collect(ops.grouped_gemm(h_MF, ws[1], plan.group_m, plan.used), plan)


def body(operands, gate_ZK, route):
  x_PD, ws = operands
  return dispatch.combine(ffn(dispatch.dispatch(x_PD, route), gate_ZK, ws, route.rows), route)


def both(forward, x, gates, ws, dy):
  """Output and gradients with respect to x, gates and both weights."""
  y, pull, extra = jax.vjp(forward, x, gates, ws, has_aux=True)
  return (y, *pull(dy)), extra


@functools.cache
def local():
  def run(expert, x, gates, ws, dy):
    plan = moe.plan(expert, E, 4)
    return both(lambda x, g, ws: (ffn(x, g, ws, plan), ()), x, gates, ws, dy)[0]

  return jit(run)


@functools.cache
def spread_out(shape, settings):
  """The same over a mesh; also the pairs each device dropped."""
  def run(expert, x, gates, ws, dy):
    def forward(x, gates, ws):
      return rounds.run(body, (x, ws), expert, gates, E, 4, settings)

    result, dropped = both(forward, x, gates, ws, dy)
    return result, dropped[None]

  return jit(jax.shard_map(run, mesh=mesh_of(shape), in_specs=CUT, out_specs=CUT, check_vma=True))


def same(found, expected, factor=0.1):
  """1e-6 of the largest value, for output and every gradient."""
  for name, a, b in zip(("y", "dx", "dgate", "dw0", "dw1"), jax.tree.leaves(found),
                        jax.tree.leaves(expected), strict=True):
    assert np.any(b), name
    assert_close(a, b, factor=factor)


@pytest.mark.parametrize("shape", MESHES)
@pytest.mark.parametrize("form", dispatch.FORMS)
def test_any_mesh_equals_one_device(shape, form):
  """Law: output and all gradients are those of one device, whatever the loads."""
  run = spread_out(shape, Settings(form=form))
  for expert in LOADS.values():
    args = expert, X, GATES, WS, DY
    found, dropped = run(*args)
    same(found, local()(*args))
    assert not np.any(dropped)
