"""SwiGLU between quantized layers: the operand it makes, and all those of its backward pass.

    forward    h = weight * silu(gate) * up, held as the down-projection's input
    backward   from gate and up as they were kept: h for Wgrad of the down-projection; dgate and
               dup, each for Dgrad and for Wgrad of the projections before

Kernels make each of these in one pass; elsewhere they are composed of elementwise operations and
quantizers. `weight` is the routing weight of a row, or None.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dsv3_jax import ops
from dsv3_jax.fp8 import linear
from dsv3_jax.fp8.recipe import Operand
from dsv3_jax.fp8.weights import Held, Weight, from_scaled, hold, is_tiles, value


class Operands(NamedTuple):
  """How the layer's operands are held, with the floors of their amaxes (static)."""

  cache: Operand
  wgrad_x: Operand
  dgrad_dy: Operand
  wgrad_dy: Operand
  floor: float
  gradient_floor: float


class Back(NamedTuple):
  """What the backward pass multiplies.

  dys: (for Dgrad, for Wgrad) of gate and of up; seen: their amaxes, or None.
  """

  h: Held
  dys: tuple[tuple[Held, Held | None], tuple[Held, Held | None]]
  seen: tuple[jax.Array | None, jax.Array | None]
  dweight_M1: jax.Array | None


def hidden(gate_MF: jax.Array, up_MF: jax.Array, weight_M1: jax.Array | None) -> jax.Array:
  """h, unquantized."""
  h_MF = jax.nn.silu(gate_MF) * up_MF
  return h_MF if weight_M1 is None else h_MF * weight_M1


def forward(gate_MF: jax.Array, up_MF: jax.Array, weight_M1: jax.Array | None, operand: Operand,
            floor: float, w: Weight) -> tuple[Held, jax.Array | None]:
  """h as `operand` says, and its amax as `linear.measured` gives it; `w`: the down-projection."""
  if is_tiles(operand, 1, 128):
    try:
      return from_scaled(ops.fp8_swiglu(
          gate_MF, up_MF, _flat(weight_M1), pow2=operand.scale == "pow2", floor=floor,
          impl=operand.impl), operand), None
    except NotImplementedError:
      pass
  return linear.measured(hidden(gate_MF, up_MF, weight_M1), operand, floor, w, 0)


def backward(caches: tuple[Held, Held], dh_MF: jax.Array, weight_M1: jax.Array | None,
             how: Operands, ws: tuple[Weight, Weight]) -> Back:
  """Operands of the backward pass; `ws`: the projections of gate and up."""
  if _has_kernel(how, ws):
    try:
      return _by_kernel(caches, dh_MF, weight_M1, how)
    except NotImplementedError:
      pass
  gate_MF, up_MF = (value(c).astype(dh_MF.dtype) for c in caches)
  h_MF, pull = jax.vjp(hidden, gate_MF, up_MF, weight_M1)
  *dys, dweight_M1 = pull(dh_MF)
  *pairs, seen = zip(*(linear.gradients(dy, how.dgrad_dy, how.wgrad_dy, how.gradient_floor, w)
                       for dy, w in zip(dys, ws, strict=True)), strict=True)
  return Back(hold(h_MF, how.wgrad_x, how.floor), tuple(zip(*pairs, strict=True)), seen, dweight_M1)


def _has_kernel(how: Operands, ws: tuple[Weight, Weight]) -> bool:
  return (is_tiles(how.cache, 1, 128) and is_tiles(how.dgrad_dy, 1, 128)
          and is_tiles(how.wgrad_x, 128, 1) and is_tiles(how.wgrad_dy, 128, 1)
          and how.dgrad_dy.scale == how.wgrad_dy.scale == how.wgrad_x.scale
          and all(w.master is not None for w in ws))


def _by_kernel(caches, dh_MF, weight_M1, how: Operands) -> Back:
  gate, up, h, dweight_M = ops.fp8_swiglu_backward(
      *(linear.scaled(c) for c in caches), dh_MF, _flat(weight_M1),
      pow2=how.dgrad_dy.scale == "pow2", floor=how.floor, gradient_floor=how.gradient_floor,
      impl=how.dgrad_dy.impl)
  dys = tuple(tuple(from_scaled(x, o) for x, o in zip(pair, (how.dgrad_dy, how.wgrad_dy),
                                                      strict=True)) for pair in (gate, up))
  dweight_M1 = None if weight_M1 is None else dweight_M[:, None].astype(weight_M1.dtype)
  return Back(from_scaled(h, how.wgrad_x), dys, (None, None), dweight_M1)


def _flat(weight_M1: jax.Array | None) -> jax.Array | None:
  return None if weight_M1 is None else weight_M1[:, 0].astype(jnp.float32)
