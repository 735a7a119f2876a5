"""The multiplications by weights of one decoding pass, in plain arrays or in FP8.

A weight is an array, or an `fp8.weights.Weight` without master: E4M3 codes, a byte each, and a
scale a block of 128x128. Such a weight is multiplied as the released inference code does: what
comes in is quantized a token at a time in tiles of 1x128 (`runtime.recipe`; under `none` it stays
as it is), the product is an FP8 one with sums in fp32, and no copy of the weight in another dtype
is made. Off a Hopper GPU this is emulated: a matrix is dequantized where it is used, one at a
time (of long prompts the experts of a layer together).

Absorption is no such layer. A query's part without position is multiplied by W_UK and what
attention gives by W_UV, parts of one matrix that the release dequantizes at each use. Where a
head's part lies within one block of columns (as in the released sizes, N = U = 128), the scale of
a latent's tile is the same for all of the head's columns, and goes to the activations instead:

    (W_UK^T q)_c = scale_hc sum_n code_hnc q_n       (W_UV o)_u = sum_c code_huc (scale_hc o_c)

Blocks of quantized columns stay where they are. Rotary columns are therefore brought into halves
after the product, not before; and where gate and up lie side by side, gate is filled up to whole
blocks (`parameters.py`).
"""

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax import config, ops
from dsv3_jax.fp8 import grouped as fp8_grouped
from dsv3_jax.fp8 import linear as fp8_linear
from dsv3_jax.fp8 import recipe as recipe_lib
from dsv3_jax.fp8.qtensor import QTensor
from dsv3_jax.fp8.recipe import Recipe
from dsv3_jax.fp8.weights import Held, Weight, hold
from dsv3_jax.infer.parameters import Attention
from dsv3_jax.model import layers, moe, rope
from dsv3_jax.parallel import dispatch

Matrix = jax.Array | Weight
Scaled = ops.Scaled


def linear(x: jax.Array, w: Matrix, runtime: config.Runtime, inner: int = 1) -> jax.Array:
  """Contracts the last `inner` axes of x with the first of w: [..., *I] and [*I, *O] to [..., *O].

  Result in the dtype of `x`. With two inner axes it is the projection after attention.
  """
  if not isinstance(w, Weight):
    return layers.linear(x, w, inner)
  recipe = _recipe(runtime)
  operand = recipe.fprop_x if inner == 1 else recipe.output_x
  w_KN, turned_NK = _forms(w)
  x_MK = hold(x.reshape(-1, w_KN.shape[0]), operand, recipe.floor)
  y_MN = fp8_linear.gemm(x_MK, w_KN, recipe, turned_NK, x.dtype)
  return y_MN.reshape(*x.shape[:x.ndim - inner], *w.outputs)


def rotary(x: jax.Array, w: Matrix, keep: int, runtime: config.Runtime) -> jax.Array:
  """`linear` whose columns from `keep` on come in halves, as `rope.apply_rope` wants them.

  Columns of an array lie so already; those of a quantized matrix lie in the order of its blocks.
  """
  y = linear(x, w, runtime)
  if not isinstance(w, Weight):
    return y
  return jnp.concatenate([y[..., :keep], rope.to_halves(y[..., keep:])], axis=-1)


# --- experts ------------------------------------------------------------------------------------


def block_rows(pairs: int, experts: int, w: Matrix, runtime: config.Runtime) -> int:
  """Rows of a block of `grouped` by `w`, for `moe.plan`."""
  return moe.block_rows(pairs, experts, _recipe(runtime) if isinstance(w, Weight) else None)


def read(x_PD: jax.Array, w: Matrix, runtime: config.Runtime) -> Held:
  """Tokens as their experts' `w` is multiplied with: quantized once, before rows are copied."""
  if not isinstance(w, Weight):
    return x_PD
  recipe = _recipe(runtime)
  return hold(x_PD, recipe.dispatch_x, recipe.floor)


def send(x_PD: Held, route: dispatch.Route) -> Held:
  """Tokens of `read` at the devices of their experts, [Z, D]; FP8 travels as FP8."""
  if isinstance(x_PD, QTensor):
    return fp8_grouped.arrived(x_PD, route)
  return dispatch.dispatch(x_PD, route)


def spread(x_PD: Held, p: moe.Plan) -> Held:
  """Each token's rows in expert order, [M, D]."""
  return fp8_grouped.spread(x_PD, p) if isinstance(x_PD, QTensor) else moe.spread(x_PD, p)


def grouped(x_MD: Held, w: Matrix, p: moe.Plan, runtime: config.Runtime, dtype) -> jax.Array:
  """Rows in blocks of one expert each, times that expert's matrix; zeros beyond the used blocks.

  Args:
    x_MD: of `spread`, or an array.
    w: [E, D, F].
    p: where the rows of experts are.
    runtime: implementations.
    dtype: of the result, and of `x_MD` where that is an array.
  """
  if not isinstance(w, Weight):
    return ops.grouped_gemm(x_MD, w, p.group_m, p.used, impl=runtime.gemm)
  recipe = _recipe(runtime)
  if not isinstance(x_MD, QTensor):
    x_MD = hold(x_MD, recipe.fprop_x, recipe.floor)
  w_EDF, turned_EFD = _forms(w)
  return fp8_grouped.gemm(x_MD, w_EDF, p, recipe, runtime.gemm, turned_EFD, dtype)


def split_gate(both: jax.Array, w_out: Matrix) -> tuple[jax.Array, jax.Array]:
  """Gate and up of what was multiplied by them side by side; `w_out`: the down-projection.

  Between the two there may be columns that fill up gate's last block.
  """
  F = w_out.inputs[0] if isinstance(w_out, Weight) else w_out.shape[-2]
  return both[..., :F], both[..., -F:]


# --- absorption ---------------------------------------------------------------------------------


def expand(c_BTC: jax.Array, w: Attention, nope: int, runtime: config.Runtime
           ) -> tuple[jax.Array, jax.Array]:
  """Keys without position [B, T, H, N] and values [B, T, H, U] of latents; `nope`: N."""
  if w.w_ukv_CHW is None:
    return (jnp.einsum("btc,hnc->bthn", c_BTC, w.w_uk_HNC),
            jnp.einsum("btc,hcu->bthu", c_BTC, w.w_uv_HCU))
  kv_BTHW = linear(c_BTC, w.w_ukv_CHW, runtime)
  return kv_BTHW[..., :nope], kv_BTHW[..., nope:]


def absorb(q_BTHN: jax.Array, w: Attention) -> jax.Array:
  """Queries times W_UK: [B, T, H, C], to be multiplied by latents."""
  if w.w_ukv_CHW is None:
    return jnp.einsum("bthn,hnc->bthc", q_BTHN, w.w_uk_HNC)
  w_HNC, scale_HC = _part(w.w_ukv_CHW, slice(0, q_BTHN.shape[-1]), q_BTHN)
  y_BTHC = jnp.einsum("bthn,hnc->bthc", q_BTHN, w_HNC, preferred_element_type=jnp.float32)
  return (y_BTHC if scale_HC is None else y_BTHC * scale_HC).astype(q_BTHN.dtype)


def values(o_BTHC: jax.Array, w: Attention, nope: int) -> jax.Array:
  """Sums of latents times W_UV: [B, T, H, U]; `nope`: N."""
  if w.w_ukv_CHW is None:
    return jnp.einsum("bthc,hcu->bthu", o_BTHC, w.w_uv_HCU)
  w_HUC, scale_HC = _part(w.w_ukv_CHW, slice(nope, w.w_ukv_CHW.outputs[1]), o_BTHC)
  if scale_HC is not None:
    o_BTHC = (o_BTHC * scale_HC).astype(o_BTHC.dtype)
  return jnp.einsum("bthc,huc->bthu", o_BTHC, w_HUC)


def _part(w: Weight, columns: slice, x: jax.Array) -> tuple[jax.Array, jax.Array | None]:
  """Some columns of each head of the up-projection in the dtype of `x`, [H, columns, C].

  With fp32 factors [H, C] that are still to be multiplied, or None.
  """
  (H, W), held = w.outputs, _typed(w.dgrad)
  rows, width = held.tile
  first = np.arange(H) * W + columns.start
  block = first // (rows or H * W)
  if (block == (first + columns.stop - columns.start - 1) // (rows or H * W)).all():
    codes, scales = Scaled(held.codes), held.scale_values()[block]
    scale_HC = jnp.repeat(scales, width or held.last, axis=1)[:, :held.last]
  else:
    codes, scale_HC = fp8_linear.scaled(held), None
  values = ops.fp8_dequantize(codes, after=x).astype(x.dtype)
  return values.reshape(H, W, -1)[:, columns], scale_HC


# --- operands -----------------------------------------------------------------------------------


def _recipe(runtime: config.Runtime) -> Recipe:
  return recipe_lib.resolve(runtime, held=True)


def _typed(held: QTensor) -> QTensor:
  """Codes as floats, whether they are held so or as bytes."""
  return held.typed() if held.codes.dtype == jnp.uint8 else held


def _forms(w: Weight) -> tuple[QTensor, QTensor | None]:
  """[..., K, N] of a weight, and its transpose if that is what is held."""
  if w.dgrad is None:
    return _typed(w.fprop), None
  turned = _typed(w.dgrad)
  return turned.mT, turned
