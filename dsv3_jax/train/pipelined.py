"""Gradients of a batch by a pipeline: what `step.gradients` computes, on a mesh axis `pipe`."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from dsv3_jax import config
from dsv3_jax.model import loss as loss_lib
from dsv3_jax.model import stages as stages_lib
from dsv3_jax.parallel import mesh as mesh_lib
from dsv3_jax.parallel import pipeline, sharding
from dsv3_jax.parallel.schedules import Schedule
from dsv3_jax.train.state import Hyper
from dsv3_jax.train.step import Batch

PIPE = "pipe"


def gradients(cfg: config.Config, params: Any, buffers: Any, batch: Batch, hyper: Hyper,
              mesh: jax.sharding.Mesh, plan: Schedule, kinds: tuple[stages_lib.Kind, ...],
              unit: bool = False) -> tuple[Any, dict[str, Any]]:
  """Gradients of the whole batch's loss, and its summed statistics (see `loss.loss_fn`).

  Args:
    params, buffers: pure dictionaries, as one device has them.
    batch: arrays [M, B, T+1], B cut over the mesh axis `data` where there is one.
    hyper: `mtp_weight` is used; `micro_batches` must be None, the schedule having a fixed number.
    mesh: with an axis `pipe` of the schedule's ranks.
    plan: the schedule.
    kinds: of `stages.cut`, one a stage.
    unit: ticks of one F, I or W each (Schedule.ticks).

  Raises:
    ValueError: the batch's micro-batches, the mesh or the kinds do not fit the schedule; a recipe.
  """
  micros = batch["tokens"].shape[0]
  if micros != plan.microbatches or hyper.micro_batches is not None:
    raise ValueError(f"the schedule is for {plan.microbatches} micro-batches and the batch has "
                     f"{micros}; make the schedule with that number, and hyper.micro_batches None")
  tables = plan.ticks(unit).tables(kinds)
  where = stages_lib.slots(kinds, plan.routes)
  data_axes = (mesh_lib.DATA,) if mesh_lib.DATA in mesh.axis_names else ()
  shards = mesh.shape[mesh_lib.DATA] if data_axes else 1
  axes = (PIPE, *data_axes)

  def local(own, fixed, shared, mtp_buffers, batch, mtp_weight):
    targets = loss_lib.target_tokens({k: v.reshape(-1, v.shape[-1]) for k, v in batch.items()})
    denominator = jnp.maximum(jax.lax.psum(targets, data_axes) if data_axes else targets, 1)
    mtp_buffers, mtp_weight, denominator = sharding.varying(
        (mtp_buffers, mtp_weight, denominator), axes)
    stages = stages_lib.Stages(
        cfg.model, cfg.loss, cfg.runtime, slots=len(where["moe"]), mtp_buffers=mtp_buffers,
        mtp_weight=mtp_weight, denominator=denominator, share=1 / (micros * shards),
        axes=data_axes)
    here = lambda tree: jax.tree.map(lambda a: a[0], tree)
    sums = pipeline.run(tables, stages.enter, stages.functions(kinds), here(own), shared,
                        here(fixed), batch, axis=PIPE, axes=axes)
    kept = jax.tree.map(lambda a: a[None], (sums.own, sums.stats))
    kept = jax.lax.psum(kept, data_axes) if data_axes else kept
    return jax.lax.psum(sums.shared, axes), *kept

  mtp_buffers = buffers.get("mtp")
  rep, cut = PartitionSpec(), PartitionSpec(PIPE)
  data = PartitionSpec(None, *data_axes)
  shared, own, stats = jax.shard_map(
      local, mesh=mesh, in_specs=(cut, cut, rep, rep, data, rep), out_specs=(rep, cut, cut))(
          stages_lib.take(params, where), stages_lib.take(buffers, where),
          stages_lib.shared(params), mtp_buffers, batch, hyper.mtp_weight)
  counts = stages_lib.put({"moe": stats.pop("counts")}, where)
  aux = jax.tree.map(lambda a: a.sum((0, 1)), stats)
  found = [*counts.values(), aux.pop("mtp_counts_KE")]
  return shared | stages_lib.put(own, where), aux | {"counts_LE": jnp.concatenate(found)}
