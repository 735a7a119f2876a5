"""A pipeline of small layers, and what the tests of executors ask of it."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, PartitionSpec

from dsv3_jax.parallel import pipeline
from tests import quick

D, B, V = 8, 2, 5


def layer(w, x):
  return x + jnp.tanh(x * w["gain_D"] @ w["in_DD"]) @ w["out_DD"]


def weights(stages: int):
  draw = np.random.default_rng(0)
  normal = lambda *shape: jnp.asarray(draw.normal(size=shape) / np.sqrt(shape[-1]), jnp.float32)
  own = {"gain_D": 1 + normal(stages, D), "in_DD": normal(stages, D, D),
         "out_DD": normal(stages, D, D)}
  return own, {"embedding_VD": normal(V, D), "head_DV": normal(D, V)}


def batch(microbatches: int):
  draw = np.random.default_rng(1)
  return {"tokens": jnp.asarray(draw.integers(V, size=(microbatches, B)), jnp.int32),
          "c_BV": jnp.asarray(draw.normal(size=(microbatches, B, V)), jnp.float32)}


def enter(shared, data):
  return shared["embedding_VD"][data["tokens"]]


def middle(own, shared, fixed, data, x):
  del shared, data
  y = layer(own, x)
  return pipeline.Result(y, 0.1 * (y * fixed).mean(), {"sum": y.sum()})


def last(own, shared, fixed, data, x):
  """The embedding is used here too, as MTP does."""
  y = layer(own, x) + shared["embedding_VD"][data["tokens"][::-1]]
  out = jnp.tanh(y @ shared["head_DV"])
  objective = (out * data["c_BV"]).sum() + 0.1 * (y * fixed).mean()
  return pipeline.Result(None, objective, {"sum": y.sum()})


def reference(own, shared, fixed_S, data):
  """Objective of one micro-batch and the statistic of each stage."""
  x, objective, sums, stages = enter(shared, data), 0.0, [], fixed_S.shape[0]
  for s in range(stages):
    w = jax.tree.map(lambda a, s=s: a[s], own)
    result = (last if s == stages - 1 else middle)(w, shared, fixed_S[s], data, x)
    x = result.y
    objective += result.objective
    sums.append(result.stats["sum"])
  return objective, jnp.stack(sums)


def places(plan):
  """Stage of each rank and chunk."""
  stage_RC = np.zeros((plan.ranks, plan.chunks), int)
  for route in plan.routes:
    for s, (rank, chunk) in enumerate(route):
      stage_RC[rank, chunk] = s
  return stage_RC


def gradients(plan, own, shared, fixed_S, data, unit=False, ranks=None, middle=middle,
              wrap=quick.jit, maxima=(False, False)):
  """As `reference` summed over the batch and differentiated, by the executor."""
  tables = plan.ticks(unit).tables(["middle"] * (plan.stages - 1) + ["last"])
  stage_RC = places(plan)
  mesh = jax.make_mesh((ranks or plan.ranks,), ("pipe",), axis_types=(AxisType.Auto,))

  def local(own, shared, fixed, data):
    here = lambda tree: jax.tree.map(lambda a: a[0], tree)
    sums = pipeline.run(tables, enter, {"middle": middle, "last": last}, here(own), shared,
                        here(fixed), data, maxima=maxima)
    if sums.own is None:
      sums = sums._replace(own={}, shared=jax.tree.map(jnp.zeros_like, shared))
    join = lambda maximum, a: (jax.lax.pmax if maximum else jax.lax.psum)(a, "pipe")
    total = jax.tree.map(join, jax.tree.broadcast(maxima[1], shared), sums.shared)
    kept = jax.tree.map(lambda a: a[None], (sums.own, sums.stats))
    return jax.lax.psum(sums.objective, "pipe"), total, kept

  def whole(own, shared, fixed_S, data):
    cut = lambda tree: jax.tree.map(lambda a: a[stage_RC], tree)
    P = PartitionSpec
    objective, shared, (own, stats) = jax.shard_map(
        local, mesh=mesh, in_specs=(P("pipe"), P(), P("pipe"), P()),
        out_specs=(P(), P(), P("pipe")))(cut(own), shared, cut(fixed_S), data)
    back = lambda a: jnp.zeros((plan.stages, *a.shape[2:])).at[stage_RC].add(a)
    return objective, jax.tree.map(back, own), shared, back(stats["sum"])

  return wrap(whole)(own, shared, fixed_S, data)
