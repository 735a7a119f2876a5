"""Gradients of a batch by a pipeline: what `step.gradients` computes, on the mesh axis `pipe`."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from dsv3_jax import config
from dsv3_jax.fp8 import weights
from dsv3_jax.fp8.recipe import resolve
from dsv3_jax.model import cut as cut_lib
from dsv3_jax.model import loss as loss_lib
from dsv3_jax.model import stages as stages_lib
from dsv3_jax.parallel import mesh as mesh_lib
from dsv3_jax.parallel import pipeline, placement, schedules, sharding
from dsv3_jax.train.state import Hyper

Batch = dict[str, jax.Array]


class Plan(NamedTuple):
  """A schedule and the model's stages for it.

  Attributes:
    schedule: for a fixed number of micro-batches.
    kinds: of `stages.cut`, one a stage.
    unit: ticks of one F, I or W each, in place of whole ops (`Schedule.ticks`): a dx then leaves
      before the rank turns to W, which pays where no op is an FB.
  """

  schedule: schedules.Schedule
  kinds: tuple[stages_lib.Kind, ...]
  unit: bool = False


def plan(cfg: config.Config, microbatches: int) -> Plan:
  """The plan of `runtime.pipeline` for a batch of so many micro-batches.

  Raises:
    ConfigError: the schedule has no order for the ranks and micro-batches, or the layers do not fit
      the stages.
  """
  name, ranks = cfg.runtime.schedule, cfg.runtime.mesh.pipe
  try:
    schedule = schedules.make(name, ranks, microbatches)
  except ValueError as e:
    raise config.ConfigError(
        f"runtime.pipeline.schedule={name} on runtime.mesh.pipe={ranks}: {e}. A step has as many "
        f"micro-batches as data.batch_size={cfg.data.batch_size} (at first data.batch_start="
        f"{cfg.data.batch_start or cfg.data.batch_size}) has data.microbatch="
        f"{cfg.data.micro_batch}") from e
  try:
    kinds = cut_lib.cut(cfg.model, schedule.stages, cfg.runtime.pipeline.layers or None)
  except ValueError as e:
    raise config.ConfigError(f"runtime.pipeline.layers with {name}: {e}") from e
  return Plan(schedule, kinds, unit=not name.startswith("dualpipe"))


def gradients(cfg: config.Config, params: Any, buffers: Any, batch: Batch, hyper: Hyper,
              mesh: jax.sharding.Mesh, plan: Plan, amax: Any = None) -> tuple[Any, dict[str, Any]]:
  """Gradients of the whole batch's loss, and its summed statistics; see `step.gradients`.

  Args:
    params: at home (`parallel/placement.py`); so are the gradients.
    buffers, amax: replicated.
    batch: arrays [M, B, T+1], B cut over `mesh.BATCH`.
    hyper: `mtp_weight` is used; `micro_batches` must be None, the schedule having a fixed number.
    mesh: of `mesh.make_mesh`, `pipe` having the schedule's ranks.
    plan: for the batch's micro-batches.

  Raises:
    ValueError: the batch's micro-batches, the mesh or the kinds do not fit the schedule.
  """
  micros, recipe = batch["tokens"].shape[0], resolve(cfg.runtime)
  if micros != plan.schedule.microbatches or hyper.micro_batches is not None:
    raise ValueError(f"the schedule is for {plan.schedule.microbatches} micro-batches and the "
                     f"batch has {micros}; make the schedule with that number, and "
                     "hyper.micro_batches None")
  tables = plan.schedule.ticks(plan.unit).tables(plan.kinds)
  where = stages_lib.slots(plan.kinds, plan.schedule.routes)
  homes = placement.places(params, mesh, cfg.runtime)
  amax_homes = _replicated(amax)
  batch_axes = mesh_lib.several(mesh, mesh_lib.BATCH)
  axes = (mesh_lib.PIPE, *batch_axes)
  shards = cfg.runtime.mesh.batch_shards

  def local(params, buffers, amax, batch, mtp_weight):
    targets = loss_lib.target_tokens({k: v.reshape(-1, v.shape[-1]) for k, v in batch.items()})
    targets = jax.lax.psum(targets, batch_axes) if batch_axes else targets
    params, buffers, amax = sharding.varying((params, buffers, amax or {}), axes)
    own = stages_lib.take(params, homes, where)
    shared_homes = stages_lib.shared(homes)
    shared = jax.tree.map(placement.whole, stages_lib.shared(params), shared_homes)
    own_amax = stages_lib.take(amax, amax_homes, where) if amax else {}
    fixed = {"buffers": _unstacked(buffers, where), "prepared": _prepared(own, recipe)}
    mtp = {"buffers": buffers.get("mtp"), "prepared": _prepared(shared.get("mtp"), recipe)}
    mtp, mtp_weight, denominator = sharding.varying(
        (mtp, mtp_weight, jnp.maximum(targets, 1)), axes)
    stages = stages_lib.Stages(
        cfg.model, cfg.loss, cfg.runtime, slots=len(where["moe"]), mtp=mtp, mtp_weight=mtp_weight,
        denominator=denominator, share=1 / (micros * shards), axes=batch_axes)
    noted = {"mtp_amax": amax["mtp"]} if amax.get("mtp") else {}
    maxima = {"params": False, "amax": True}, {k: k == "mtp_amax" for k in (*shared, *noted)}
    sums = pipeline.run(tables, stages.enter, stages.functions(plan.kinds),
                        {"params": own, "amax": own_amax}, shared | noted, fixed, batch,
                        axis=mesh_lib.PIPE, axes=axes, maxima=maxima)
    grads = stages_lib.put(sums.own["params"], homes, where, axes)
    found = {stack: stages_lib.gather(slots, where[stack], maximum=True)
             for stack, slots in sums.own["amax"].items() if slots}
    if noted:
      found["mtp"] = jax.lax.pmax(sums.shared.pop("mtp_amax"), mesh_lib.PIPE)
    grads |= {name: jax.tree.map(lambda g, home: placement.summed(g, home, axes), g,
                                 shared_homes[name]) for name, g in sums.shared.items()}
    counts = sums.stats.pop("counts")
    counts = [stages_lib.gather(counts, where["moe"])] if counts else []
    aux = jax.lax.psum(jax.tree.map(lambda a: a.sum(0), sums.stats), mesh_lib.PIPE)
    aux["counts_LE"] = jnp.concatenate([*counts, aux.pop("mtp_counts_KE")])
    if batch_axes:
      aux, found = jax.lax.psum(aux, batch_axes), jax.lax.pmax(found, batch_axes)
    return grads, aux | {"amax": found or None}

  rep, specs = PartitionSpec(), placement.specs(homes)
  in_specs = (specs, rep, rep, sharding.batch_sharding(mesh).spec, rep)
  return jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=(specs, rep))(
      params, buffers, amax, batch, hyper.mtp_weight)


def _replicated(tree):
  """Homes of arrays whose names are not to be read: every device has them whole."""
  return jax.tree.map(lambda x: placement.Place(x.ndim, None, (), None, (), False), tree)


def _unstacked(buffers, where):
  return stages_lib.take(buffers, _replicated(buffers),
                         {s: n for s, n in where.items() if s in buffers})


def _prepared(params, recipe):
  """Quantized weights without masters; none without a recipe."""
  if recipe is None or params is None:
    return None
  return weights.without_masters(weights.prepare(params, recipe))
