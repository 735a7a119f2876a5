"""One optimizer step: gradients over micro-batches and data shards, AdamW, router biases.

    state, metrics = train_step(state, batch, hyper)

A plain `jax.jit` with the state donated. The batch is [A, B, T+1]: A micro-batches are run one
after another, their fp32 gradients summed (A == 1 has no accumulator). With a mesh, `shard_map`
(`check_vma=True`) gives each device its part of the B sequences: the axes `data`, `node` and `gpu`
cut them, and the last two routed experts besides; `context` cuts their tokens, inside of the loss
function. Parameters, at home as `parallel/placement.py` says, are collected and cast to varying
before differentiation, so that gradients stay local until one sum adds them. With an axis `pipe`,
or where a schedule is asked for, gradients come from `pipelined.gradients`. The loss is normalised
by the target tokens of the whole global batch, and expert counts are those of the whole global
batch: neither depends on how the batch was cut.

A step whose loss or gradient norm is not finite changes nothing but the counters: each new value
is selected against the old one inside the very pass that computes it (the moments' selection is in
`optim.scale_by_adam`), so the check is free.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import PartitionSpec

from dsv3_jax import config
from dsv3_jax.fp8 import delayed, weights
from dsv3_jax.fp8.recipe import resolve
from dsv3_jax.model import loss as loss_lib
from dsv3_jax.model import routing
from dsv3_jax.parallel import compiler, placement, sharding
from dsv3_jax.parallel import mesh as mesh_lib
from dsv3_jax.train import pipelined
from dsv3_jax.train import state as state_lib
from dsv3_jax.train.state import Hyper, TrainState

Batch = dict[str, jax.Array]


def _target_tokens(batch: Batch, micros: Any, axes: tuple[str, ...], shards: int) -> jax.Array:
  """Target tokens of the global batch, fp32, given this shard's [A, B, T+1]."""
  _, B, S = batch["tokens"].shape
  if batch.keys() == {"tokens"}:
    return jnp.asarray(micros * (B * (S - 1) * shards), jnp.float32)
  flat = {k: v.reshape(-1, S) for k, v in batch.items()}  # padding micro-batches weigh nothing
  targets = loss_lib.target_tokens(flat)
  return jnp.maximum(jax.lax.psum(targets, axes) if axes else targets, 1)


def _slice(batch: Batch, i: Any) -> Batch:
  return {k: jax.lax.dynamic_index_in_dim(v, i, 0, keepdims=False) for k, v in batch.items()}


def update_biases(buffers: Any, counts_LE: jax.Array, speed: jax.Array) -> Any:
  """The router biases after one step; rows of `counts_LE` are the MoE layers, then MTP's."""
  row = 0
  new = {}
  for stack in ("moe", "mtp"):
    if stack not in buffers:
      continue

    def update(bias_LE, first=row):
      return routing.update_bias(bias_LE, counts_LE[first:first + bias_LE.shape[0]], speed)

    new[stack] = jax.tree.map(update, buffers[stack])
    row += jax.tree.leaves(buffers[stack])[0].shape[0]
  assert row == counts_LE.shape[0] and set(new) == set(buffers), (row, counts_LE.shape)
  return new


def gradients(graphdef: nnx.GraphDef, cfg: config.Config, params: Any, buffers: Any, batch: Batch,
              hyper: Hyper, mesh: jax.sharding.Mesh | None = None,
              loss_fn: Callable = loss_lib.loss_fn, amax: Any = None
              ) -> tuple[Any, dict[str, Any]]:
  """Gradients of the whole batch's loss, and its summed statistics (see `loss.loss_fn`).

  Under an FP8 recipe the weights are quantized here, once for all micro-batches.

  Args:
    params: pure dictionary, at home (`parallel/placement.py`); so are the gradients.
    buffers: pure dictionary, replicated.
    batch: arrays [A, B, T+1], B cut over `mesh.BATCH`.
    hyper: `mtp_weight` and `micro_batches` are used.
    loss_fn: `loss.loss_fn` or a stand-in of its signature.
    amax: from `delayed.assumed`, or None; the statistics' "amax" has the same form.
  """
  recipe = resolve(cfg.runtime)
  axes = mesh_lib.several(mesh, mesh_lib.TOKENS)
  batch_axes = mesh_lib.several(mesh, mesh_lib.BATCH)
  parts, shards = (math.prod(mesh.shape[a] for a in group) for group in (axes, batch_axes))
  homes = None if mesh is None else placement.places(params, mesh, cfg.runtime)

  def local(params, buffers, batch, hyper, amax):
    static_micros = batch["tokens"].shape[0]
    micros = static_micros if hyper.micro_batches is None else hyper.micro_batches
    share = 1.0 / (micros * parts)
    denominator = _target_tokens(batch, micros, batch_axes, shards)
    if homes is not None:
      params = jax.tree.map(placement.whole, params, homes)
    params, buffers, amax = sharding.varying((params, buffers, amax), axes)
    prepared = weights.prepare(params, recipe)

    def micro_gradients(micro):
      def total(params, amax):
        if recipe is not None:
          params = weights.with_masters(prepared, params, amax)
        model = nnx.merge(graphdef, params, buffers)
        return loss_fn(model, micro, loss=cfg.loss, mtp_weight=hyper.mtp_weight,
                       runtime=cfg.runtime, denominator=denominator, share=share, axes=axes)

      (_, aux), (grads, found) = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(
          params, amax)
      return sharding.varying(((grads, aux), found), axes)

    if static_micros == 1:
      sums, found = micro_gradients(_slice(batch, 0))
    else:
      shapes = jax.eval_shape(micro_gradients, _slice(batch, 0))
      zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), shapes)
      zeros = sharding.varying(zeros, axes)

      def add(i, total):
        sums, found = micro_gradients(_slice(batch, i))
        return (jax.tree.map(jnp.add, total[0], sums),
                jax.tree.map(jnp.maximum, total[1], found))

      sums, found = jax.lax.fori_loop(0, micros, add, zeros)
    grads, aux = sums
    if axes:
      grads = jax.tree.map(lambda g, home: placement.summed(g, home, axes), grads, homes)
      aux, found = jax.lax.psum(aux, axes), jax.lax.pmax(found, axes)
    return grads, aux | {"amax": found}

  if mesh is None:
    return local(params, buffers, batch, hyper, amax)
  rep, specs = PartitionSpec(), placement.specs(homes)
  in_specs = (specs, rep, sharding.batch_sharding(mesh).spec, rep, rep)
  return jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=(specs, rep))(
      params, buffers, batch, hyper, amax)


def gradient_norm(grads: Any, mesh: jax.sharding.Mesh | None, runtime: config.Runtime
                  ) -> jax.Array:
  """Norm of all gradients together, fp32; on a mesh the same bits with ZeRO-1 and without."""
  if mesh is None:
    return optax.tree.norm(grads)
  homes = placement.places(grads, mesh, runtime)
  sums = jax.shard_map(lambda grads: placement.square_sums(grads, homes), mesh=mesh,
                       in_specs=(placement.specs(homes),), out_specs=PartitionSpec())
  return jnp.sqrt(sums(grads))


def make_train_step(
    graphdef: nnx.GraphDef, cfg: config.Config, optimizer: optax.GradientTransformationExtraArgs,
    mesh: jax.sharding.Mesh | None = None, loss_fn: Callable = loss_lib.loss_fn,
) -> Callable[[TrainState, Batch, Hyper], tuple[TrainState, dict[str, jax.Array]]]:
  """The compiled step; it donates its state.

  Under a pipeline's schedule it is compiled again for each number of micro-batches, which must not
  be padded, and `hyper.micro_batches` is None (`pipelined.plan`).

  Metrics, fp32 scalars unless said otherwise: loss (main cross-entropy, nats a target token),
  mtp_loss [depth], those of `loss.BALANCES`, accuracy, grad_norm (before clipping), max_vio_L,
  counts_LE, dropped (token-expert pairs without room), more (a loss function's own), bad (bool:
  this step was skipped), bad_steps (int32, in a row), skipped (int32, in the run).
  """

  def train_step(state: TrainState, batch: Batch, hyper: Hyper):
    amax = delayed.assumed(state.amax)
    if cfg.runtime.schedule == "none":
      grads, aux = gradients(graphdef, cfg, state.params, state.buffers, batch, hyper, mesh,
                             loss_fn, amax)
    else:
      plan = pipelined.plan(cfg, batch["tokens"].shape[0])
      grads, aux = pipelined.gradients(cfg, state.params, state.buffers, batch, hyper, mesh, plan,
                                       amax)
    with jax.named_scope("optimizer"):
      grad_norm = gradient_norm(grads, mesh, cfg.runtime)
      loss = aux["loss_sum"] / jnp.maximum(aux["tokens"], 1)
      good = jnp.isfinite(grad_norm) & jnp.isfinite(loss)
      updates, opt_state = optimizer.update(grads, state.opt_state, state.params,
                                            grad_norm=grad_norm, lr=hyper.lr, good=good)
      params = jax.tree.map(jnp.add, state.params, updates)
      buffers = update_biases(state.buffers, aux["counts_LE"], hyper.bias_speed)
      select = lambda new, old: jax.tree.map(lambda n, o: jnp.where(good, n, o), new, old)
      amax = delayed.record(state.amax, aux["amax"])
      params, buffers, amax = select((params, buffers, amax),
                                     (state.params, state.buffers, state.amax))
    bad = ~good
    new = TrainState(params, buffers, opt_state, state.step + 1,
                     jnp.where(bad, state.bad_steps + 1, 0), state.skipped + bad, amax)
    metrics = {
        "loss": loss,
        "mtp_loss": aux["mtp_loss_sum"] / jnp.maximum(aux["mtp_tokens"], 1),
        **{name: aux[name] for name in loss_lib.BALANCES},
        "accuracy": aux["correct"] / jnp.maximum(aux["tokens"], 1),
        "grad_norm": grad_norm,
        "max_vio_L": routing.max_vio(aux["counts_LE"]),
        "counts_LE": aux["counts_LE"],
        "dropped": aux["dropped"],
        "more": aux.get("more", {}),
        "bad": bad,
        "bad_steps": new.bad_steps,
        "skipped": new.skipped,
    }
    return new, metrics

  if mesh is None:
    return jax.jit(train_step, donate_argnums=0)

  def placed(state: TrainState, batch: Batch, hyper: Hyper):
    new, metrics = train_step(state, batch, hyper)
    where = state_lib.shardings(new, optimizer, mesh, cfg.runtime)
    return jax.lax.with_sharding_constraint(
        (new, metrics), (where, jax.tree.map(lambda _: sharding.replicated(mesh), metrics)))

  return compiler.jit(placed, mesh, cfg.runtime.schedule.startswith("dualpipe"),
                      donate_argnums=0)


def pad_micro_batches(batch: dict[str, Any], micros: int) -> dict[str, Any]:
  """Numpy batch [A, B, S] padded along A with micro-batches that count nothing."""
  missing = micros - batch["tokens"].shape[0]
  if missing == 0:
    return batch
  fill = {"segments": -1}
  return {k: np.pad(v, [(0, missing)] + [(0, 0)] * (v.ndim - 1),
                    constant_values=fill.get(k, 0)) for k, v in batch.items()}
