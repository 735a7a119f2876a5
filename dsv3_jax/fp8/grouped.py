"""Routed experts under a recipe: FP8 dispatch, grouped matmuls, their derivatives (report 3.3).

The order of one layer's operations is that of the report's training trace:

    forward    x --1x128, powers of two--> x_q        quantized before it is sent, once a token
               rows of x_q in expert order            a quarter of bf16's bytes travel
               Fprop of gate and up; both kept in FP8
               h = gate_m * silu(g) * u               routing weight before the down-projection
               h --1x128--> Fprop of down; sum of each token's rows, in the compute dtype

    backward   dy --1x128, powers of two--> dy_q      sent like the activations
               Dgrad of down; h computed again from the kept FP8 inputs; Wgrad of down
               dg, du --1x128--> Dgrad, --128x1--> Wgrad; sum of each token's rows

What is kept is x_q of the P tokens, not of their M = P * A and more rows: the rows are gathered
again, bytes that a single device copies faster than it could write and read them.

A tile along the tokens (128x1, 128x128) must not mix experts, since their sums are different ones.
Experts start at whole blocks of rows (`model.moe.plan`), so a tile of t rows becomes one of
gcd(t, block) rows: with blocks of 128 the report's, with smaller blocks (few tokens an expert)
smaller tiles, whose scales fit at least as well.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from dsv3_jax import ops
from dsv3_jax.fp8 import accumulate, probe, swiglu
from dsv3_jax.fp8.linear import (
  again,
  for_dgrad,
  gradient,
  load,
  measured,
  save,
  scaled,
  shell,
)
from dsv3_jax.fp8.qtensor import QTensor
from dsv3_jax.fp8.recipe import Operand, Recipe
from dsv3_jax.fp8.weights import Held, Weight, bare, hold, quantized, value


def experts(x_PD: jax.Array, gate_PA: jax.Array, w_gate, w_up, w_down, plan: Any, recipe: Recipe,
            impl: str = "auto", exchange: Any = None) -> jax.Array:
  """Sum over each token's experts of gate * FFN(x), [P, D] in the dtype of `x_PD`.

  Args:
    x_PD: tokens.
    gate_PA: fp32 routing weights.
    w_gate, w_up: [E, D, F]; w_down: [E, F, D]; prepared or plain.
    plan: `model.moe.Plan`.
    recipe: formats of all operands.
    impl: of `ops.grouped_gemm`.
    exchange: `parallel.dispatch.Route` where experts are cut over devices: what is quantized here
      goes to the devices of its experts, and what they give is added up here. Then `gate_PA`,
      `plan` and the weights are those of the rows that arrive and of the experts of this device.

  Raises:
    NotImplementedError: weights to be probed, over devices.
  """
  if isinstance(w_gate, probe.Probed):
    if exchange is not None:
      raise NotImplementedError("operands are measured with all experts on one device")
    x_MD = spread(x_PD, plan)
    gate_MF, up_MF = (probe.grouped(x_MD, w, plan, impl) for w in (w_gate, w_up))
    h_MF = swiglu.hidden(gate_MF, up_MF, _gates(gate_PA, plan, x_PD.dtype))
    return collect(probe.grouped(h_MF, w_down, plan, impl), plan, x_PD.dtype)
  ws = tuple(w if isinstance(w, Weight) else bare(w, 1, 1) for w in (w_gate, w_up, w_down))
  return _experts(recipe, impl, x_PD, gate_PA, ws, plan, exchange)


# --- rows ---------------------------------------------------------------------------------------


def _take(x: jax.Array, index_M: jax.Array) -> jax.Array:
  return jnp.take(x, index_M, axis=0, mode="fill", fill_value=0)


def spread(held: Held, plan: Any) -> Held:
  """Rows of a [P, D] operand in expert order, [M, D]; padding rows are zero.

  A tile of several tokens becomes rows that carry that tile's scale.
  """
  token_M = plan.pair_M // plan.row_PA.shape[1]
  if not isinstance(held, QTensor):
    return _take(held, token_M)
  codes = lax.bitcast_convert_type(_take(lax.bitcast_convert_type(held.codes, jnp.uint8), token_M),
                                   held.codes.dtype)
  rows, columns = held.tile
  if not rows:
    return dataclasses.replace(held, codes=codes)
  return dataclasses.replace(held, codes=codes, scales=_take(held.scales, token_M // rows),
                             tile=(1, columns))


def arrived(held: Held, exchange: Any) -> Held:
  """A [P, D] operand at the devices of its experts, [Z, D]; each row brings its own scales."""
  if exchange is None:
    return held
  if isinstance(held, QTensor) and held.tile[0] != 1:
    row_P = jnp.arange(held.shape[0]) // (held.tile[0] or held.shape[0])
    held = dataclasses.replace(held, scales=held.scales[row_P], tile=(1, held.tile[1]))
  return exchange.send(held)


def collect(y_MD: jax.Array, plan: Any, dtype) -> jax.Array:
  """Sums each token's rows in fp32: [M, D] to [P, D]."""
  return jnp.take(y_MD, plan.row_PA, axis=0).astype(jnp.float32).sum(1).astype(dtype)


def within(operand: Operand, plan: Any) -> Operand:
  """The operand with tiles that end where an expert may; see the module docstring."""
  rows, columns = operand.tile
  if operand.format is None or rows < 2:
    return operand
  block = plan.pair_M.shape[0] // plan.group_m.shape[0]
  return dataclasses.replace(operand, tile=(math.gcd(rows, block), columns))


# --- matmuls ------------------------------------------------------------------------------------


def _blocks(held: Held, count: int) -> Held:
  """[M, K] as [count, M / count, K], tiles of a row or of the whole."""
  def cut(x):
    return x.reshape(count, -1, x.shape[-1])

  if not isinstance(held, QTensor):
    return cut(held)
  if held.tile[0]:
    return dataclasses.replace(held, codes=cut(held.codes), scales=cut(held.scales))
  scales = jnp.broadcast_to(held.scales, (count, *held.scales.shape))
  return dataclasses.replace(held, codes=cut(held.codes), scales=scales)


def _emulated(a: Held, b: Held, recipe: Recipe) -> jax.Array:
  (a, scale_a, tile_a), (b, scale_b, tile_b) = scaled(a), scaled(b)
  return accumulate.matmul(a, b, interval=recipe.interval, bits=recipe.bits, scale_a=scale_a,
                           tile_a=tile_a, scale_b=scale_b, tile_b=tile_b)


def _impl(recipe: Recipe, impl: str) -> str:
  """The recipe's, unless it leaves the choice: then the one of the unquantized grouped matmul."""
  return impl if recipe.impl == "auto" else recipe.impl


def gemm(x_MK: Held, w_GKN: Held, plan: Any, recipe: Recipe, impl: str,
         turned_GNK: Held | None = None, dtype=jnp.float32) -> jax.Array:
  """`y[block] = x[block] @ w[group of block]`, [M, N]; zeros beyond the blocks in use."""
  if not recipe.bits:
    return ops.fp8_grouped_gemm(
        scaled(x_MK), scaled(w_GKN), plan.group_m, plan.used, dtype=dtype,
        interval=recipe.interval, impl=_impl(recipe, impl),
        turned_GNK=None if turned_GNK is None else scaled(turned_GNK))
  blocks = plan.group_m.shape[0]
  y_mbN = lax.map(lambda z: _emulated(z[0], jax.tree.map(lambda w: w[z[1]], w_GKN), recipe),
                  (_blocks(x_MK, blocks), plan.group_m))
  y_mbN = jnp.where((jnp.arange(blocks) < plan.used)[:, None, None], y_mbN, 0)
  return y_mbN.reshape(-1, y_mbN.shape[-1]).astype(dtype)


def wgrad(x_MK: Held, dy_MN: Held, plan: Any, groups: int, recipe: Recipe, impl: str) -> jax.Array:
  """`dw[g] = sum over the blocks of g of x^T dy`, fp32 [G, K, N].

  An emulated tensor core promotes after every `interval` rows of an expert, rounded up to whole
  blocks where it is longer than one; 0: never. A step of 32 products does not reach over blocks:
  shorter ones end it early, and are cut more often than on hardware.
  """
  if not recipe.bits:
    return ops.fp8_grouped_wgrad(scaled(x_MK), scaled(dy_MN), plan.group_m, plan.used, groups,
                                 interval=recipe.interval, impl=_impl(recipe, impl))
  blocks = plan.group_m.shape[0]
  rows = plan.pair_M.shape[0] // blocks
  x_mbK, dy_mbN = _blocks(x_MK, blocks), _blocks(dy_MN, blocks)
  used_m = jnp.arange(blocks) < plan.used
  if 0 < recipe.interval <= rows:
    parts = lax.map(lambda z: _emulated(z[0].mT, z[1], recipe), (x_mbK, dy_mbN))
    parts = jnp.where(used_m[:, None, None], parts, 0)
    return jax.ops.segment_sum(parts, plan.group_m, groups)

  # Blocks lie sorted by expert, so one register (and one fp32 sum of what it held) serves in turn.
  period = -(-recipe.interval // rows)  # blocks between promotions; 0: none

  def step(carry, block):
    dw_GKN, promoted_KN, register_KN, count, last = carry
    x, dy, group, used = block
    fresh = group != last
    count = jnp.where(fresh, 0, count)
    promote = (count > 0) & (count % period == 0) if period else False
    promoted_KN = jnp.where(fresh, 0, promoted_KN) + jnp.where(promote, register_KN, 0)
    register_KN = accumulate.add(jnp.where(fresh | promote, 0, register_KN), value(x).T, value(dy),
                                 bits=recipe.bits)
    dw_KN = jnp.where(used, promoted_KN + register_KN, dw_GKN[group])
    return (dw_GKN.at[group].set(dw_KN), promoted_KN, register_KN, count + 1, group), None

  K, N = x_MK.shape[-1], dy_MN.shape[-1]
  zeros = ops.varying_zeros((groups + 2, K, N), jnp.float32, plan.group_m)
  start = (zeros[2:], zeros[0], zeros[1], plan.used * 0, plan.used * 0 - 1)
  (dw_GKN, *_), _ = lax.scan(step, start, (x_mbK, dy_mbN, plan.group_m, used_m))
  return dw_GKN


# --- the layer ----------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _experts(recipe, impl, x_PD, gate_PA, ws, plan, exchange):
  return _experts_fwd(recipe, impl, x_PD, gate_PA, ws, plan, exchange, transposed=False)[0]


def _gates(gate_PA, plan, dtype):
  return _take(gate_PA.reshape(-1), plan.pair_M).astype(dtype)[:, None]


def _summed(y_ZD, exchange):
  return y_ZD if exchange is None else exchange.back(y_ZD)


def _experts_fwd(recipe, impl, x_PD, gate_PA, ws, plan, exchange, transposed=True):
  dtype = x_PD.dtype
  ws = tuple(quantized(w, recipe, transposed) for w in ws)
  with jax.named_scope("dispatch"):
    x, x_amax = measured(x_PD, recipe.dispatch_x, recipe.floor, ws[0], 0)
    x = arrived(x, exchange)
    kept = save(x, "dispatched")
    x_rows, gate_M1 = spread(x, plan), _gates(gate_PA, plan, dtype)
  with jax.named_scope("experts"):
    gate_MF, up_MF = (gemm(x_rows, w.fprop, plan, recipe, impl, w.dgrad, dtype)
                      for w in ws[:2])
    caches = tuple(save(hold(z, within(recipe.swiglu_cache, plan), recipe.floor), "expert_gate_up")
                   for z in (gate_MF, up_MF))
    h, h_amax = swiglu.forward(gate_MF, up_MF, gate_M1, within(recipe.fprop_x, plan), recipe.floor,
                               ws[2])
    y_MD = gemm(h, ws[2].fprop, plan, recipe, impl, ws[2].dgrad, dtype)
  with jax.named_scope("combine"):
    y_PD = _summed(collect(y_MD, plan, dtype), exchange)
  ws = tuple(shell(w, recipe) for w in ws)
  return y_PD, (kept, caches, gate_PA, x_amax, h_amax, ws, plan, exchange)


def _experts_bwd(recipe, impl, residuals, dy_PD):
  kept, caches, gate_PA, x_amax, h_amax, ws, plan, exchange = residuals
  dtype, floors = dy_PD.dtype, (recipe.floor, recipe.gradient_floor)
  wgrad_x, dgrad_dy, wgrad_dy = (within(o, plan) for o in (recipe.wgrad_x, recipe.dgrad_dy,
                                                           recipe.wgrad_dy))

  def dgrad(dy, w, dtype=jnp.float32):
    w_GNK, turned_GKN = for_dgrad(w)
    return gemm(dy, w_GNK, plan, recipe, impl, turned_GKN, dtype)

  def weight_gradient(x, dy_t, w):
    groups = for_dgrad(w)[0].shape[0]
    return None if w.master is None else wgrad(x, dy_t, plan, groups, recipe, impl)

  with jax.named_scope("dispatch"):
    dy, dy_amax = measured(dy_PD, recipe.dispatch_dy, recipe.gradient_floor, ws[2], 1)
    dy, gate_M1 = spread(arrived(dy, exchange), plan), _gates(gate_PA, plan, dtype)
  with jax.named_scope("experts"):
    dh_MF = dgrad(dy, ws[2], dtype)
    back = swiglu.backward(tuple(load(c) for c in caches), dh_MF, gate_M1, swiglu.Operands(
        within(recipe.swiglu_cache, plan), wgrad_x, dgrad_dy, wgrad_dy, *floors), ws[:2])
    dy_t = again(dy, recipe.dispatch_dy, wgrad_dy, recipe.gradient_floor)
    dw_down = weight_gradient(back.h, dy_t, ws[2])
    x = again(spread(load(kept), plan), recipe.dispatch_x, wgrad_x, recipe.floor)
    dx_MD = sum(dgrad(dy, w) for (dy, _), w in zip(back.dys, ws, strict=False))
    dws = [weight_gradient(x, dy_t, w) for (_, dy_t), w in zip(back.dys, ws, strict=False)]
  with jax.named_scope("combine"):
    dx_PD = _summed(collect(dx_MD.astype(dtype), plan, dtype), exchange)
    dgate_PA = back.dweight_M1[:, 0].astype(gate_PA.dtype)[plan.row_PA]
  dws = tuple(gradient(w, dw, a, seen) for w, dw, a, seen in zip(
      ws, (*dws, dw_down), (x_amax, x_amax, h_amax), (*back.seen, dy_amax), strict=True))
  return dx_PD, dgate_PA, dws, None, None


_experts.defvjp(_experts_fwd, _experts_bwd)
