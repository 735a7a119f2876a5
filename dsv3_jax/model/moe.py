"""DeepSeekMoE feed-forward, dropless (report 2.1.2): plan, gather, experts, sum.

P tokens each go to A of E experts. `plan` sorts the P*A (token, choice) pairs by expert and pads
each expert to whole blocks of rows, in which form a grouped matmul sees one expert a block. Every
token keeps all its experts however uneven the load; the capacity M = P*A + E*(block - 1), rounded
up, is what the worst case needs.

Moving rows is two linear maps, each the transpose of the other, so that both directions are gathers
and no scatter-add runs in the backward pass:

    spread   x_PD -> x_MD   row m copies its token (or is zero)
    collect  y_MD -> y_PD   a token sums its A rows

The gate multiplies the hidden activations before the down-projection, where rows are F wide instead
of D; the sum in `collect` is then unweighted.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from dsv3_jax import config, ops
from dsv3_jax.fp8 import grouped, weights
from dsv3_jax.fp8.qtensor import QTensor
from dsv3_jax.fp8.quantize import FLOOR, quantize
from dsv3_jax.fp8.recipe import Recipe, parse
from dsv3_jax.model import layers, routing
from dsv3_jax.parallel import dispatch, hops, payload, rounds
from dsv3_jax.parallel import mesh as mesh_lib

_GRADIENT_FLOOR = 1e-30  # gradients may all be tiny; see fp8/recipe.py


class Plan(NamedTuple):
  """Where every (token, choice) pair stands among M rows sorted by expert."""

  pair_M: jax.Array  # int32, token * A + choice; P * A marks padding
  row_PA: jax.Array  # int32, inverse of pair_M
  group_m: jax.Array  # int32 [blocks], expert of each block
  used: jax.Array  # int32, blocks that hold rows


class MoEStats(NamedTuple):
  """Statistics of one layer's routing, fp32."""

  counts_E: jax.Array  # valid tokens routed to each expert
  sequence_balance: jax.Array  # unweighted losses, averaged over sequences; 0 where not asked for
  batch_balance: jax.Array
  expert_balance: jax.Array
  dropped: jax.Array  # (token, expert) pairs lost; 0 unless `MoECall.expert` allows it


class MoECall(NamedTuple):
  """What a forward pass tells every MoE layer (static but for `valid_BT`)."""

  valid_BT: jax.Array | None = None  # fp32 0/1: tokens that count in statistics
  balance: config.Loss | None = None  # losses with a positive weight are computed
  axes: tuple[str, ...] = ()  # mesh axes that shard the batch, and sequences
  gemm: str = "auto"
  recipe: Recipe | None = None  # of the linear layers, outside MoE too; None: the compute dtype
  expert: dispatch.Settings | None = None  # mesh axes that cut the experts; None: all are here


def block_rows(pairs: int, experts: int, recipe: Recipe | None = None) -> int:
  """Rows of a block: about a quarter of an expert's mean share, a power of two from 8 to 64.

  Larger blocks make better matmuls, smaller ones waste fewer padded rows; above 64 the grouped
  matmul takes several blocks of an expert together instead (`pallas_kernels/xla/grouped_gemm.py`).
  FP8 kernels have blocks of their own.
  """
  kernels = recipe is not None and recipe.quantized
  if kernels and ops.fp8_block(recipe.impl):
    return ops.fp8_block(recipe.impl)
  share = max(pairs // (4 * experts), 1)
  return int(np.clip(2 ** int(np.log2(share)), 8, 64))


def _sort(expert_n: jax.Array, experts: int) -> tuple[jax.Array, jax.Array]:
  """Stable order of the pairs by expert, and their experts in that order; int32."""
  n = expert_n.size
  if experts * n >= 2**31:
    order = jnp.argsort(expert_n, stable=True).astype(jnp.int32)
    return order, expert_n[order]
  # One sort of numbers that hold both is several times faster than one of keys with payload.
  both = jnp.sort(expert_n.astype(jnp.int32) * n + jnp.arange(n, dtype=jnp.int32))
  return both % n, both // n


def plan(expert_PA: jax.Array, experts: int, block: int) -> Plan:
  """Sorts pairs by expert (stably) into blocks of `block` rows; see the module docstring."""
  pairs = expert_PA.size
  blocks = pairs // block + min(experts, pairs)
  expert_flat = expert_PA.reshape(-1)
  order, sorted_expert = _sort(expert_flat, experts)
  counts_E = jnp.zeros((experts,), jnp.int32).at[expert_flat].add(1)
  blocks_E = -(-counts_E // block)
  end_block_E = jnp.cumsum(blocks_E)
  first_row_E = (end_block_E - blocks_E) * block
  first_pair_E = jnp.cumsum(counts_E) - counts_E
  row_sorted = (jnp.arange(pairs, dtype=jnp.int32) + (first_row_E - first_pair_E)[sorted_expert])
  row_flat = jnp.zeros((pairs,), jnp.int32).at[order].set(row_sorted, unique_indices=True)
  pair_M = jnp.full((blocks * block,), pairs, jnp.int32).at[row_sorted].set(
      order, unique_indices=True)
  group_m = jnp.searchsorted(end_block_E, jnp.arange(blocks), side="right")
  group_m = jnp.minimum(group_m, experts - 1).astype(jnp.int32)
  return Plan(pair_M, row_flat.reshape(expert_PA.shape), group_m, end_block_E[-1])


def _spread(x_PD, pair_M, active):
  return jnp.take(x_PD, pair_M // active, axis=0, mode="fill", fill_value=0)


def _collect(y_MD, row_PA):
  return jnp.take(y_MD, row_PA, axis=0).astype(jnp.float32).sum(1).astype(y_MD.dtype)


@jax.custom_vjp
def spread(x_PD: jax.Array, p: Plan) -> jax.Array:
  """Copies each token to its A rows: [P, D] to [M, D], padding rows zero."""
  return _spread(x_PD, p.pair_M, p.row_PA.shape[1])


@jax.custom_vjp
def collect(y_MD: jax.Array, p: Plan) -> jax.Array:
  """Sums each token's A rows: [M, D] to [P, D], in fp32."""
  return _collect(y_MD, p.row_PA)


spread.defvjp(lambda x_PD, p: (spread(x_PD, p), p),
              lambda p, dx_MD: (_collect(dx_MD, p.row_PA), None))
collect.defvjp(lambda y_MD, p: (collect(y_MD, p), p),
               lambda p, dy_PD: (_spread(dy_PD, p.pair_M, p.row_PA.shape[1]), None))


@jax.custom_vjp
def spread_gates(gate_PA: jax.Array, p: Plan) -> jax.Array:
  """The gate of each row, fp32 [M]; 0 for padding."""
  return jnp.take(gate_PA.reshape(-1), p.pair_M, mode="fill", fill_value=0)


spread_gates.defvjp(lambda gate_PA, p: (spread_gates(gate_PA, p), p),
                    lambda p, dgate_M: (dgate_M[p.row_PA], None))


def _experts(x_PD: jax.Array, gate_PA: jax.Array, ws: tuple, p: Plan, gemm: str,
             name: str = "dispatched") -> jax.Array:
  """`MoELayer.experts` in the dtype of `x_PD`; `name` is the checkpoint name of the rows."""
  dtype = x_PD.dtype
  with jax.named_scope("dispatch"):
    x_MD = checkpoint_name(spread(x_PD, p), name)
    gate_M = spread_gates(gate_PA, p).astype(dtype)
  with jax.named_scope("experts"):
    w_gate_EDF, w_up_EDF, w_down_EFD = (weights.plain(w, dtype) for w in ws)
    both_MF = ops.grouped_gemm(x_MD, jnp.concatenate([w_gate_EDF, w_up_EDF], -1), p.group_m,
                               p.used, impl=gemm)
    gated_MF, up_MF = jnp.split(checkpoint_name(both_MF, "expert_gate_up"), 2, axis=-1)
    h_MF = layers.swiglu(gated_MF, up_MF) * gate_M[:, None]
    y_MD = ops.grouped_gemm(h_MF, w_down_EFD, p.group_m, p.used, impl=gemm)
  with jax.named_scope("combine"):
    return collect(y_MD, p)


def _unseen(w):
  """The weight without what would go to its history."""
  if not isinstance(w, weights.Weight):
    return w
  return dataclasses.replace(w, amax=jax.lax.stop_gradient(w.amax))


def expert_settings(cfg: config.MoE, runtime: config.Runtime, axes: tuple[str, ...]
                    ) -> dispatch.Settings | None:
  """How tokens reach their experts, for `MoECall.expert`; None where all experts are here.

  Args:
    cfg: of the layers.
    runtime: `dispatch` and `mesh` are read.
    axes: mesh axes that shard the batch; `node` and `gpu` among them cut the experts.
  """
  cut = tuple(a for a in mesh_lib.EXPERTS if a in axes)
  if not cut:
    return None
  given = dataclasses.asdict(runtime.dispatch)
  wire = payload.Wire(_codec(given.pop("activations"), FLOOR),
                      _codec(given.pop("gradients"), _GRADIENT_FLOOR), given.pop("combine"))
  if len(cut) == 1 and given["form"] == "two_hop":
    given["form"] = "flat"  # one hop is all there is
  # Groups are nodes' experts, or parts of them, wherever the nodes divide them.
  limit = cfg.active_groups if cfg.groups % runtime.mesh.node == 0 else 0
  return dispatch.Settings(axes=cut, limit=limit, wire=wire, **given)


@functools.cache  # static arguments must compare equal
def _codec(text: str, floor: float) -> payload.Codec | None:
  if not text:
    return None
  operand = parse(text)
  encode = functools.partial(quantize, format=operand.format, tile=operand.tile,
                             scale=operand.scale, floor=floor)
  return payload.Codec(encode, QTensor.dequantize)


class MoELayer(nnx.Module):
  """Router, routed experts and shared experts."""

  def __init__(self, cfg: config.Model, *, rngs: nnx.Rngs, dtype=jnp.float32):
    m, D, std = cfg.moe, cfg.dim, cfg.init_std
    E, F = m.experts, m.ffn_dim
    self.cfg = m
    self.w_router_DE = layers.normal_param(rngs, (D, E), std, dtype)
    self.bias_E = routing.RouterBias(jnp.zeros((E,), jnp.float32))
    self.w_gate_EDF = layers.normal_param(rngs, (E, D, F), std, dtype)
    self.w_up_EDF = layers.normal_param(rngs, (E, D, F), std, dtype)
    self.w_down_EFD = layers.normal_param(rngs, (E, F, D), std, dtype)
    self.shared = nnx.data(
        layers.DenseFFN(D, m.shared * F, std, rngs=rngs, dtype=dtype) if m.shared else None)

  def experts(self, x_PD: jax.Array, routed: routing.Routing, gemm: str,
              recipe: Recipe | None = None) -> jax.Array:
    """Sum over each token's experts of gate * FFN(x), [P, D]."""
    E = self.cfg.experts
    p = plan(routed.expert_PA, E, block_rows(routed.expert_PA.size, E, recipe))
    ws = self.w_gate_EDF[...], self.w_up_EDF[...], self.w_down_EFD[...]
    if recipe is not None:
      return grouped.experts(x_PD, routed.gate_PA, *ws, p, recipe, gemm)
    return _experts(x_PD, routed.gate_PA, ws, p, gemm)

  def distant_experts(self, x_PD: jax.Array, routed: routing.Routing, call: MoECall
                      ) -> tuple[jax.Array, jax.Array]:
    """`experts` where `call.expert` cuts them over mesh axes and the weights are this device's.

    Returns:
      [P, D]; and the (token, expert) pairs that this device dropped, int32.

    Raises:
      ValueError: both the recipe and the settings give formats for what dispatch sends.
    """
    settings, recipe = call.expert, call.recipe
    if recipe is not None and (settings.wire.activations or settings.wire.gradients):
      raise ValueError("a recipe says how rows are dispatched (dispatch_x, dispatch_dy); leave "
                       "activations and gradients of the wire None")
    local = self.cfg.experts // hops.size(settings.axes)
    block = settings.block or block_rows(routed.expert_PA.size, local, recipe)

    def body(operands, gate_ZK, route):
      x_PD, ws = operands
      if recipe is None:
        x_ZD = checkpoint_name(dispatch.dispatch(x_PD, route), "dispatched")
        y_ZD = _experts(x_ZD, gate_ZK, ws, route.rows, call.gemm, "dispatched_rows")
        return dispatch.combine(y_ZD, route)
      if not route.first:  # a history notes what the first turn sees; more would be added to it
        ws = tuple(_unseen(w) for w in ws)
      return grouped.experts(x_PD, gate_ZK, *ws, route.rows, recipe, call.gemm, route)

    ws = self.w_gate_EDF[...], self.w_up_EDF[...], self.w_down_EFD[...]
    return rounds.run(body, (x_PD, ws), routed.expert_PA, routed.gate_PA, self.cfg.experts, block,
                      settings)

  def __call__(self, x_BTD: jax.Array, call: MoECall) -> tuple[jax.Array, MoEStats]:
    """[B, T, D] to [B, T, D] (without the residual) and the routing's statistics."""
    B, T, D = x_BTD.shape
    x_PD = x_BTD.reshape(B * T, D)
    routed = routing.route(x_PD, self.w_router_DE[...], self.bias_E[...], self.cfg)
    if call.expert is None:
      y_PD, dropped = self.experts(x_PD, routed, call.gemm, call.recipe), jnp.zeros(())
    else:
      y_PD, dropped = self.distant_experts(x_PD, routed, call)
    if self.shared is not None:  # waits for nothing above, so it runs while rows are under way
      y_PD = y_PD + self.shared(x_PD, call.recipe)
    stats = self._stats(routed, (B, T), call, dropped.astype(jnp.float32))
    return y_PD.reshape(B, T, D), stats

  def _stats(self, routed: routing.Routing, shape: tuple[int, int], call: MoECall,
             dropped: jax.Array) -> MoEStats:
    valid_BT = jnp.ones(shape, jnp.float32) if call.valid_BT is None else call.valid_BT
    counts_E = routing.expert_counts(routed.expert_PA, self.cfg.experts, valid_BT.reshape(-1))
    affinity_BTE = routed.affinity_PE.reshape(*shape, -1)
    expert_BTA = routed.expert_PA.reshape(*shape, -1)
    zero, want, A = jnp.zeros(()), call.balance or config.Loss(sequence_balance=0), self.cfg.active
    cut = tuple(a for a in call.axes if a == mesh_lib.CONTEXT)  # those that cut a sequence
    return MoEStats(
        counts_E,
        routing.sequence_balance(affinity_BTE, A, valid_BT, cut) if want.sequence_balance else zero,
        routing.batch_balance(affinity_BTE, A, valid_BT, call.axes) if want.batch_balance else zero,
        routing.expert_balance(affinity_BTE, expert_BTA, valid_BT, cut) if want.expert_balance
        else zero,
        dropped)
