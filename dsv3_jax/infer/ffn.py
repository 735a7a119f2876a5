"""Feed-forward layers of a pass: SwiGLU, and experts here or on several devices.

On a mesh each device has tokens of its own and some of the experts (`slots.py`). Tokens travel to
them and back as in training (`parallel/dispatch.py`), in one hop or two, in the formats that
`runtime.dispatch` names; the routing is the same, and only then a slot takes an expert's place.
Tokens that do not count travel nowhere and load nobody.
"""

import jax
from jax import lax

from dsv3_jax import config
from dsv3_jax.infer import matmul, slots
from dsv3_jax.infer.parameters import FFN, Experts
from dsv3_jax.model import layers, moe, routing
from dsv3_jax.parallel import dispatch, hops, rounds
from dsv3_jax.parallel import mesh as mesh_lib


def swiglu(x_PD: jax.Array, w: FFN, runtime: config.Runtime) -> jax.Array:
  """[P, D] to [P, D]."""
  gate, up = matmul.split_gate(matmul.linear(x_PD, w.w_in_DF, runtime), w.w_out_FD)
  return matmul.linear(layers.swiglu(gate, up), w.w_out_FD, runtime)


def experts(x_PD: jax.Array, w: Experts, valid_P: jax.Array, cfg: config.MoE,
            runtime: config.Runtime) -> tuple[jax.Array, jax.Array]:
  """[P, D], routed and shared experts together, and the experts of each token, int32 [P, A].

  Args:
    x_PD: this device's tokens.
    w: with `slots`: the weights of this device's slots, inside shard_map over a mesh as in
      `runtime.mesh`.
    valid_P: bool; what comes of other tokens is anything.
    cfg, runtime: the layer and implementations.
  """
  routed = routing.route(x_PD, w.w_router_DE, w.bias_E, cfg)
  if w.slots is None:
    block = matmul.block_rows(routed.expert_PA.size, cfg.experts, w.w_in_EDF, runtime)
    y_PD = _rows(matmul.read(x_PD, w.w_in_EDF, runtime), routed.gate_PA, w.w_in_EDF, w.w_out_EFD,
                 moe.plan(routed.expert_PA, cfg.experts, block), runtime, x_PD.dtype)
  else:
    y_PD = _distant(x_PD, routed, w, valid_P, cfg, runtime)
  return (y_PD if w.shared is None else y_PD + swiglu(x_PD, w.shared, runtime)), routed.expert_PA


def _rows(x_PD, gate_PA, w_in_EDF, w_out_EFD, p, runtime: config.Runtime, dtype) -> jax.Array:
  """Sum over each token's experts here of gate * FFN(x), [P, D] in `dtype`.

  `x_PD`: of `matmul.read`; `p`: of `moe.plan`.
  """
  both_MF = matmul.grouped(matmul.spread(x_PD, p), w_in_EDF, p, runtime, dtype)
  gate, up = matmul.split_gate(both_MF, w_out_EFD)
  gate_M = moe.spread_gates(gate_PA, p).astype(dtype)
  y_MD = matmul.grouped(layers.swiglu(gate, up) * gate_M[:, None], w_out_EFD, p, runtime, dtype)
  return moe.collect(y_MD, p)


def _distant(x_PD, routed: routing.Routing, w: Experts, valid_P, cfg: config.MoE,
             runtime: config.Runtime) -> jax.Array:
  axes = tuple(a for a in mesh_lib.EXPERTS if lax.axis_size(a) > 1) or (mesh_lib.GPU,)
  slot_PA = slots.choose(routed.expert_PA, w.slots, valid_P, lax.axis_index(mesh_lib.BATCH))
  count = w.slots.slot_I.shape[0]
  block = matmul.block_rows(slot_PA.size, count // hops.size(axes), w.w_in_EDF, runtime)
  settings = moe.expert_settings(cfg, runtime, axes)

  def body(operands, gate_ZK, route):
    x_PD, (w_in_EDF, w_out_EFD) = operands
    x_ZD = matmul.send(matmul.read(x_PD, w_in_EDF, runtime), route)
    y_ZD = _rows(x_ZD, gate_ZK, w_in_EDF, w_out_EFD, route.rows, runtime, x_PD.dtype)
    return dispatch.combine(y_ZD, route)

  y_PD, _ = rounds.run(body, (x_PD, (w.w_in_EDF, w.w_out_EFD)), slot_PA, routed.gate_PA, count,
                       block, settings)
  return y_PD
