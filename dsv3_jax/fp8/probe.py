"""A linear layer's three operands, x, w and dy, taken out of a model's backward pass.

A `Probed` weight stands where a matrix stood, and with it the layer computes as without any recipe.
Beside the matrix it carries zeros in the shapes of the layer's input and of its output's gradient.
They take no part in the forward pass; their "gradient" is what the backward pass finds there. So
operands come out of a scan over layers, stacked, without a second model and without state:

    operands = jax.grad(lambda taps: loss(model with Probed(w, taps)))(taps)
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dsv3_jax import ops


class Taps(NamedTuple):
  """Zeros going in, fp32; operands coming out. May lead with a layer axis."""

  x_MK: jax.Array
  dy_MN: jax.Array
  group_m: jax.Array | None = None  # expert of each block of rows, -1: not in use; routed experts


@functools.partial(jax.tree_util.register_dataclass, data_fields=["master", "taps"],
                   meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Probed:
  """A matrix [*inputs, *outputs] (experts: [E, K, N]) and the taps of its layer."""

  master: jax.Array
  taps: Taps

  def __getitem__(self, key) -> "Probed":
    """`[...]`, as nnx variables read their values."""
    if key is not Ellipsis:
      raise IndexError(f"a weight is read whole, with [...], not with [{key}]")
    return self


@jax.custom_vjp
def _tapped(y_MN: jax.Array, x_MK: jax.Array, group_m: jax.Array | None, taps: Taps) -> jax.Array:
  """`y`; the cotangent of `taps` is (x, dy, group)."""
  return y_MN


def _fwd(y_MN, x_MK, group_m, taps):
  return y_MN, (x_MK, group_m)


def _bwd(residuals, dy_MN):
  x_MK, group_m = residuals
  found = Taps(*(z if z is None else z.astype(jnp.float32) for z in (x_MK, dy_MN, group_m)))
  return dy_MN, jnp.zeros_like(x_MK), None, found


_tapped.defvjp(_fwd, _bwd)


def linear(x: jax.Array, ws: tuple[Probed, ...], inner: int = 1) -> tuple[jax.Array, ...]:
  """`x @ w` for each weight, as `linear.linear`."""
  lead, ys = x.shape[:x.ndim - inner], []
  for w in ws:
    x_MK = x.reshape(-1, w.taps.x_MK.shape[1])
    y_MN = ops.gemm(x_MK, w.master.astype(x.dtype).reshape(x_MK.shape[1], -1))
    y_MN = _tapped(y_MN, x_MK, None, w.taps)
    ys.append(y_MN.reshape(*lead, *w.master.shape[inner:]))
  return tuple(ys)


def feed_forward(x_PD: jax.Array, w_gate: Probed, w_up: Probed, w_down: Probed) -> jax.Array:
  """SwiGLU, as `feed_forward.feed_forward`."""
  gate_PF, up_PF = linear(x_PD, (w_gate, w_up))
  return linear(jax.nn.silu(gate_PF) * up_PF, (w_down,))[0]


def grouped(x_MK: jax.Array, w: Probed, plan: Any, impl: str) -> jax.Array:
  """`x[block] @ w[group of block]`, rows in expert order as `plan` says."""
  y_MN = ops.grouped_gemm(x_MK, w.master.astype(x_MK.dtype), plan.group_m, plan.used, impl=impl)
  in_use_m = jnp.arange(plan.group_m.shape[0]) < plan.used
  return _tapped(y_MN, x_MK, jnp.where(in_use_m, plan.group_m, -1), w.taps)
