"""The model cut into stages of a pipeline, as functions of arrays (`parallel/pipeline.py`).

A stage holds consecutive layers. The first one takes the tokens' embedding for its input; the last
one ends in the final norm, the MTP modules, the head and the losses. Balance losses arise where
their layers are and are part of the objective there. Stages need not hold equally many layers, nor
any: a `Kind` says what a stage computes, and the arrays of all stages have room (slots) for the
layers of the largest.

Embedding, final norm, head and MTP modules are `shared` parameters: embedding and head are read on
both ends, and so each rank has them. The layers of a slot come from the stacks that a checkpoint
holds (`take`), and their gradients go back there (`put`), so that what is trained has the same form
under every schedule and on every mesh.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsv3_jax import config
from dsv3_jax.fp8 import weights as weights_lib
from dsv3_jax.fp8.recipe import resolve
from dsv3_jax.model import cross_entropy, layers, remat, rope
from dsv3_jax.model import loss as loss_lib
from dsv3_jax.model.block import Block, BlockCall
from dsv3_jax.model.cut import Kind
from dsv3_jax.model.moe import MoECall, expert_settings
from dsv3_jax.model.mtp import MTPModule
from dsv3_jax.model.routing import RouterBias
from dsv3_jax.model.transformer import shift
from dsv3_jax.parallel import placement, sharding
from dsv3_jax.parallel.pipeline import Result
from dsv3_jax.parallel.schedules.ops import Route

STACKS = ("dense", "moe")  # in the order of the layers


def slots(kinds: Sequence[Kind], routes: Sequence[Route]) -> dict[str, np.ndarray]:
  """Where layers lie: stack -> [slots, R, C] number of the layer in its stack, -1 where none.

  Args:
    kinds: of the stages.
    routes: of the schedule, direction -> stage -> (rank, chunk).
  """
  places = [place for route in routes for place in route]
  ranks, chunks = (1 + max(axis) for axis in zip(*places))
  found = {}
  for stack in STACKS:
    counts = [getattr(kind, stack) for kind in kinds]
    firsts = np.cumsum([0, *counts])
    found[stack] = np.full((max(counts), ranks, chunks), -1)
    for route in routes:
      for stage, (rank, chunk) in enumerate(route):
        found[stack][:counts[stage], rank, chunk] = firsts[stage] + np.arange(counts[stage])
  return found


def take(stacks: dict[str, Any], homes: dict[str, Any], where: dict[str, np.ndarray]
         ) -> dict[str, tuple[Any, ...]]:
  """This rank's layers for use, inside shard_map: stack -> slot -> tree, leaves [C, ...].

  Args:
    stacks: leaves [L, ...] at home (`parallel/placement.py`).
    homes: of the leaves.
    where: of `slots`. A slot without a layer holds some other layer, which no stage reads.
  """
  found = {}
  for stack, numbers in where.items():
    layers, C = _by_rank(numbers), numbers.shape[2]

    def leaf(x, home, layers=layers, C=C):
      rows = placement.take(x, home, layers)
      return [rows[n:n + C] for n in range(0, rows.shape[0], C)]

    if len(numbers):
      trees = jax.tree.map(leaf, stacks[stack], homes[stack])
      found[stack] = tuple(jax.tree.transpose(
          jax.tree.structure(stacks[stack]), jax.tree.structure([0] * len(numbers)), trees))
    else:
      found[stack] = ()
  return found


def put(in_slots: dict[str, tuple[Any, ...]], homes: dict[str, Any], where: dict[str, np.ndarray],
        axes: tuple[str, ...]) -> dict[str, Any]:
  """The reverse for gradients: summed over devices and over copies of a layer, at home.

  `axes` are those over which the gradients differ (`placement.summed`).
  """
  found = {}
  for stack, numbers in where.items():
    layers, depth = _by_rank(numbers), int(numbers.max(initial=-1)) + 1

    def leaf(home, *slots, layers=layers, depth=depth):
      return placement.put(jnp.concatenate(slots), home, layers, depth, axes)

    if len(numbers):
      found[stack] = jax.tree.map(leaf, homes[stack], *in_slots[stack])
  return found


def _by_rank(numbers: np.ndarray) -> np.ndarray:
  """[slots, R, C] to [R, slots * C]."""
  return numbers.transpose(1, 0, 2).reshape(numbers.shape[1], -1)


def gather(in_slots: Sequence[Any], numbers: np.ndarray, maximum: bool = False) -> Any:
  """Statistics of a stack's layers, leaves [C, ...] for each slot, to [L, ...] on every rank.

  `maximum`: copies of a layer give their largest value, at least 0, in place of their sum.
  """
  layers, depth = _by_rank(numbers), int(numbers.max()) + 1
  return jax.tree.map(
      lambda *slots: placement.gather_layers(jnp.concatenate(slots), layers, depth, maximum),
      *in_slots)


def shared(params: dict[str, Any]) -> dict[str, Any]:
  """The parameters that lie on every rank."""
  return {name: value for name, value in params.items() if name not in STACKS}


class Stages:
  """The stages' functions for one step. All arrays that it holds are constants of the step.

  A stage's `own` is {"params": stack -> slot -> tree, "amax": the same}, its `fixed` {"buffers",
  "prepared"}; amax and prepared are empty where there is no recipe, or none with a history. Its
  `shared` are the model's parameters outside the stacks, and "mtp_amax".

  Args:
    cfg: the model.
    weights: of the balance losses.
    runtime: dtypes, implementations and recipe.
    slots: MoE layers for which each stage's statistics have room.
    mtp: fixed of the MTP modules, {"buffers", "prepared"} with leaves [K, ...].
    mtp_weight, denominator, share: see `loss.loss_fn`.
    axes: mesh axes that shard the batch, and the experts (`Transformer.hidden`).
  """

  def __init__(self, cfg: config.Model, weights: config.Loss, runtime: config.Runtime, *,
               slots: int, mtp: Any, mtp_weight: Any, denominator: Any, share: Any,
               axes: tuple[str, ...] = ()):
    self.cfg, self.weights, self.runtime, self.slots = cfg, weights, runtime, slots
    self.mtp, self.mtp_weight, self.axes = mtp, mtp_weight, axes
    self.denominator, self.share = denominator, share
    self.recipe, self.words = resolve(runtime), loss_lib.vocabulary_axes(runtime, axes)
    graph = lambda make: nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))), nnx.Param,
                                   RouterBias)[0]
    self._block = {stack: graph(lambda rngs, s=stack: Block(cfg, moe=s == "moe", rngs=rngs))
                   for stack in STACKS}
    self._mtp = graph(lambda rngs: MTPModule(cfg, rngs=rngs))

  def enter(self, shared: dict[str, Any], data: dict[str, jax.Array]) -> jax.Array:
    """Input of the first stage, [B, T, D], of tokens [B, T + 1]."""
    return self._embed(shared, data["tokens"][:, :-1])

  def _embed(self, shared, tokens):
    return layers.embed(shared["embedding_VD"], tokens, self.runtime.compute_dtype, self.words)

  def functions(self, kinds: Sequence[Kind]) -> dict[Kind, Callable]:
    """Kind -> (own, shared, fixed, data, x) -> Result, as `pipeline.run` takes them."""
    return {kind: functools.partial(self._stage, kind) for kind in set(kinds)}

  def _call(self, data: dict[str, jax.Array]) -> BlockCall:
    B, T = data["tokens"].shape[0], data["tokens"].shape[1] - 1
    segments_BT = data["segments"][:, :T] if "segments" in data else None
    positions_BT = (jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
                    if segments_BT is None else rope.positions_from_segments(segments_BT))
    cos, sin = rope.rope_table(self.cfg.attention, positions_BT)
    valid_BT = loss_lib.not_padding(data)[:, :T]
    moe = MoECall(valid_BT, self.weights, self.axes, self.runtime.gemm, self.recipe,
                  expert_settings(self.cfg.moe, self.runtime, self.axes))
    return BlockCall(cos, sin, segments_BT, moe, self.runtime)

  def _stage(self, kind: Kind, own: Any, shared: Any, fixed: Any, data: dict[str, jax.Array],
             x_BTD: jax.Array) -> Result:
    call, found = self._call(data), []
    step = remat.wrap_step(lambda block, x_BTD, _: block(x_BTD, call), self.runtime.remat)
    for stack in STACKS:
      for slot in range(getattr(kind, stack)):
        at = lambda tree, none=None, s=stack, n=slot: tree[s][n] if tree and s in tree else none
        params = self._weights(at(own["params"]), at(fixed["prepared"]), at(own["amax"]))
        block = nnx.merge(self._block[stack], params, at(fixed["buffers"], {}))
        x_BTD, stats = step(block, x_BTD, None)
        found += [stats] if stats is not None else []
    E, K = self.cfg.moe.experts, self.cfg.mtp_depth
    counts = [s.counts_E for s in found] + [jnp.zeros(E)] * (self.slots - len(found))
    zero = jnp.zeros(())
    dropped = sum((s.dropped for s in found), zero)
    stats = {"dropped": dropped, "loss_sum": zero, "mtp_loss_sum": jnp.zeros(K), "tokens": zero,
             "mtp_tokens": jnp.zeros(K), "correct": zero, "counts": tuple(counts),
             "mtp_counts_KE": jnp.zeros((K, E))}
    objective, y_BTD, early = zero, x_BTD, {}
    if kind.last:
      y_BTD, (objective, ended, early, more) = None, self._end(shared, data, x_BTD, call)
      stats |= ended
      stats["dropped"] += sum((s.dropped for s in more), zero)
      found += more
    for name, field in loss_lib.BALANCES.items():
      stats[name] = sum((getattr(s, field) for s in found), zero) * self.share
      objective += getattr(self.weights, field) * stats[name]
    return Result(y_BTD, objective, jax.lax.stop_gradient(stats), early)

  def _weights(self, params: Any, prepared: Any, amax: Any) -> Any:
    """Parameters as layers take them: under a recipe, quantized and with these masters."""
    return params if self.recipe is None else weights_lib.with_masters(prepared, params, amax)

  def _end(self, shared, data, x_BTD, call: BlockCall):
    """Objective, statistics and head's gradient after the last layer, and MTP's MoEStats."""
    cfg, K, T = self.cfg, self.cfg.mtp_depth, x_BTD.shape[1]
    h_BTD = layers.rms_norm(x_BTD, shared["final_norm_D"], cfg.norm_eps)
    read, stats = [h_BTD], []
    deep_BTD = h_BTD if cfg.mtp_input == "normed" else x_BTD
    embedded_BSD = self._embed(shared, data["tokens"]) if K else None
    unmasked = {name: x for name, x in data.items() if name != "mask"}
    for k in range(1, K + 1):
      at_depth = lambda tree, k=k: jax.tree.map(lambda a: a[k - 1], tree)
      params = self._weights(*map(at_depth, (shared["mtp"], self.mtp["prepared"],
                                             shared.get("mtp_amax"))))
      module = nnx.merge(self._mtp, params, at_depth(self.mtp["buffers"]))
      depth_call = call._replace(moe=call.moe._replace(valid_BT=loss_lib.targets(unmasked, k)[1]))

      def step(module, deep_BTD, embedded_BTD, depth_call=depth_call):
        deep_BTD, stats = module(deep_BTD, embedded_BTD, depth_call)
        return deep_BTD, (module.readout(deep_BTD), stats)

      step = remat.wrap_step(step, self.runtime.remat)
      deep_BTD, (read_BTD, found) = step(module, deep_BTD, shift(embedded_BSD, k)[:, :T])
      read.append(read_BTD)
      stats.append(found)
    head_DV = shared["head_DV"].astype(x_BTD.dtype)
    predicted = [loss_lib.targets(data, k) for k in range(K + 1)]
    objective, head_gradient, sums, corrects = 0.0, 0.0, [], []
    for k, (h_BTD, (target_BT, weight_BT)) in enumerate(zip(read, predicted, strict=True)):
      with jax.named_scope("head_loss"):
        nll, correct, dw_DV = _head_loss(
            h_BTD.reshape(-1, cfg.dim), head_DV, target_BT.reshape(-1), weight_BT.reshape(-1),
            self.runtime.head_chunk, self.words)
      share = (self.mtp_weight / K if k else 1.0) / self.denominator
      objective += share * nll
      head_gradient += share * dw_DV.astype(jnp.float32)
      sums.append(nll)
      corrects.append(correct)
    ended = {"loss_sum": sums[0], "tokens": predicted[0][1].sum(), "correct": corrects[0]}
    if K:
      ended |= {"mtp_loss_sum": jnp.stack(sums[1:]),
                "mtp_tokens": jnp.stack([w.sum() for _, w in predicted[1:]]),
                "mtp_counts_KE": jnp.stack([s.counts_E for s in stats])}
    return objective, ended, {"head_DV": jax.lax.stop_gradient(head_gradient)}, stats


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _head_loss(h_PD, w_DV, target_P, weight_P, chunk, words):
  """Cross-entropy, correct predictions, and the gradient by the head.

  The forward makes that gradient anyway. It is a result here, to be added up at once, and not kept
  for the backward pass, where each micro-batch under way would hold one; the head gets none there.
  """
  return _head_loss_fwd(h_PD, w_DV, target_P, weight_P, chunk, words)[0]


def _head_loss_fwd(h_PD, w_DV, target_P, weight_P, chunk, words):
  (nll, correct), pull = jax.vjp(
      lambda h_PD, w_DV: cross_entropy.linear_cross_entropy(h_PD, w_DV, target_P, weight_P, chunk,
                                                            words),
      h_PD, w_DV)
  one = lambda x, value: sharding.varying(jnp.full((), value, x.dtype), tuple(sharding.varies(x)))
  dh_PD, dw_DV = pull((one(nll, 1), one(correct, 0)))
  return (nll, correct, dw_DV), dh_PD


def _head_loss_bwd(chunk, words, dh_PD, cotangents):
  del chunk, words
  return dh_PD * cotangents[0].astype(dh_PD.dtype), None, None, None


_head_loss.defvjp(_head_loss_fwd, _head_loss_bwd)
