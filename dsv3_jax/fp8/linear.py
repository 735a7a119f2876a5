"""FP8 linear layers with their own derivatives (report 3.3).

One layer, three matmuls. Under the recipe `v3`:

    forward     x (bf16)   --1x128-->  x_q ----.
                w (fp32)  --128x128->  w_q ----+--> Fprop --> y (bf16)
                                       x_q is all that the backward pass keeps of x

    backward    dy (bf16)  --1x128-->  dy_q ---.
                                      w_q^T ---+--> Dgrad --> dx (bf16)
                dy (bf16)  --128x1-->  dy_t ---.
                x_q --read back, 128x1-> x_t --+--> Wgrad --> dw (fp32)

Why the tiles turn. Scales have to be constant along the summed axis for the length of a promotion
interval, so that each interval's partial sum can be multiplied by one number a row and one a
column. Fprop sums over channels, so x has a scale for 128 channels of one token. Wgrad sums over
tokens, so there both operands need a scale for 128 tokens of one channel. A weight block of 128x128
serves Fprop and, transposed byte by byte, Dgrad. Blocks for activations would save the second
quantization, but gradients differ so much between tokens that a block of 128 of them has no good
scale; the report saw such a run diverge (appendix B.2, recipe `block_gradients`).

What is saved. Residuals are the quantized operands: a byte an element and a scale a tile. A SwiGLU
keeps its two inputs in FP8 and computes its output again (`feed_forward.py`, `grouped.py`). The
input of the projection after attention is kept with 6 mantissa bits (E5M6, 12 bits an element),
because attention's own backward pass reads the same copy (`attention.py`).

Weights are `weights.Weight`s, quantized once an optimizer step; a plain array is quantized here.
Several weights may share one input, which is then quantized and kept once. Derivatives with respect
to weights are fp32 and go to the masters.

The arithmetic is `ops.fp8_gemm` (fp32 sums), or `accumulate.matmul` where the recipe sets `bits`:
then products are added as a tensor core of that width adds them, with a promotion to fp32 every
`interval` values. Operands that a recipe leaves unquantized take the same paths.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from dsv3_jax import ops
from dsv3_jax.fp8 import accumulate, probe
from dsv3_jax.fp8.formats import E5M6
from dsv3_jax.fp8.qtensor import QTensor
from dsv3_jax.fp8.recipe import Operand, Recipe
from dsv3_jax.fp8.weights import (
  Held,
  Weight,
  bare,
  from_scaled,
  hold,
  is_tiles,
  quantized,
  value,
)

Scaled = ops.Scaled


class Site(NamedTuple):
  """What is particular to one place in the model (static)."""

  x: Operand  # of Fprop
  cache: Operand  # what is kept of the input


# --- operands -----------------------------------------------------------------------------------


def scaled(x: Held) -> Scaled:
  """As kernels take it."""
  if isinstance(x, QTensor):
    return Scaled(x.codes, x.scale_values(), x.tile)
  return Scaled(x)


def same_form(x: Operand, y: Operand) -> bool:
  """Whether an operand held as `x` serves as `y` (only its scales may be of another kind)."""
  return (x.format, x.tile, x.dtype) == (y.format, y.tile, y.dtype)


def again(held: Held, was: Operand, operand: Operand, floor: float, dtype=jnp.float32) -> Held:
  """What is held as `was`, held as `operand`: read back and quantized in other tiles."""
  if same_form(was, operand):
    return held
  if is_tiles(was, 1, 128) and is_tiles(operand, 128, 1):
    try:
      return from_scaled(ops.fp8_turn(scaled(held), pow2=operand.scale == "pow2", floor=floor,
                                      impl=operand.impl), operand)
    except NotImplementedError:
      pass
  x = value(held)
  if operand.format is None:
    x = x.astype(dtype)
  elif was.format is E5M6 and was.scale == "pow2":
    x = x.astype(jnp.bfloat16)  # exact, and what kernels read
  return hold(x, operand, floor)


def measured(x: jax.Array, operand: Operand, floor: float, w: Weight, slot: int
             ) -> tuple[Held, jax.Array | None]:
  """`x` as the operand says, and its amax where a history is kept.

  A delayed amax is `w.amax[slot]`, or the present one until the history has any.
  """
  if not operand.delayed:
    return hold(x, operand, floor), None
  found = jnp.max(jnp.abs(x.astype(jnp.float32)), initial=0.0)
  if w.amax is None:
    return hold(x, operand, floor), None
  assumed = jnp.where(w.amax[slot] > 0, w.amax[slot], found)
  return hold(x, operand, floor, assumed), found


def gradients(dy_MN: jax.Array, rows: Operand, columns: Operand, floor: float, w: Weight
              ) -> tuple[Held, Held | None, jax.Array | None]:
  """dy as Dgrad wants it, as Wgrad does (None without a master), and its amax as `measured`."""
  if w.master is None or same_form(rows, columns):
    dy, seen = measured(dy_MN, rows, floor, w, 1)
    return dy, dy, seen
  if is_tiles(rows, 1, 128) and is_tiles(columns, 128, 1) and rows.scale == columns.scale:
    try:
      both = ops.fp8_quantize_both(dy_MN, pow2=rows.scale == "pow2", floor=floor, impl=rows.impl)
      return *(from_scaled(x, o) for x, o in zip(both, (rows, columns), strict=True)), None
    except NotImplementedError:
      pass
  dy, seen = measured(dy_MN, rows, floor, w, 1)
  return dy, hold(dy_MN, columns, floor), seen


# --- matmuls ------------------------------------------------------------------------------------


def gemm(a_MK: Held, b_KN: Held, recipe: Recipe, turned_NK: Held | None = None,
         dtype=jnp.float32) -> jax.Array:
  """`a @ b` in `dtype`, as the recipe adds; `turned_NK`: the transpose of b, where it exists."""
  if recipe.bits:
    return emulated(a_MK, b_KN, recipe).astype(dtype)
  return ops.fp8_gemm(scaled(a_MK), scaled(b_KN), dtype=dtype, interval=recipe.interval,
                      impl=recipe.impl,
                      turned_NK=None if turned_NK is None else scaled(turned_NK))


def wgrad(x_MK: Held, dy_MN: Held, recipe: Recipe) -> jax.Array:
  """`x^T dy`, fp32."""
  if recipe.bits:
    return emulated(x_MK.mT, dy_MN, recipe)
  return ops.fp8_wgrad(scaled(x_MK), scaled(dy_MN), interval=recipe.interval, impl=recipe.impl)


def emulated(a_MK: Held, b_KN: Held, recipe: Recipe) -> jax.Array:
  """`a @ b` on the emulated tensor core."""
  (a, scale_a, tile_a), (b, scale_b, tile_b) = scaled(a_MK), scaled(b_KN)
  return accumulate.matmul(a, b, interval=recipe.interval, bits=recipe.bits, scale_a=scale_a,
                           tile_a=tile_a, scale_b=scale_b, tile_b=tile_b)


# --- one layer ----------------------------------------------------------------------------------


def linear(x: jax.Array, ws: tuple[Weight | jax.Array, ...], recipe: Recipe, inner: int = 1,
           site: Site | None = None) -> tuple[jax.Array, ...]:
  """`x @ w` for each of the weights.

  Args:
    x: [..., *I].
    ws: [*I, *O] each, prepared or plain.
    recipe: formats of all operands.
    inner: number of axes I.
    site: None: an ordinary layer.

  Returns:
    [..., *O] each, in the dtype of `x`.
  """
  if isinstance(ws[0], probe.Probed):
    return probe.linear(x, ws, inner)
  ws = tuple(w if isinstance(w, Weight) else bare(w, inner) for w in ws)
  for w in ws:
    if w.inputs != x.shape[x.ndim - inner:]:
      raise ValueError(f"a weight with inputs {w.inputs} cannot multiply x of shape {x.shape}")
  site = site or Site(recipe.fprop_x, recipe.fprop_x)
  x_MK = x.reshape(-1, math.prod(x.shape[x.ndim - inner:]))
  ys = _linear(recipe, site, x_MK, ws)
  return tuple(y.reshape(*x.shape[:x.ndim - inner], *w.outputs)
               for y, w in zip(ys, ws, strict=True))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _linear(recipe, site, x_MK, ws):
  return _linear_fwd(recipe, site, x_MK, ws, transposed=False)[0]


def _linear_fwd(recipe, site, x_MK, ws, transposed=True):
  x, found = measured(x_MK, site.x, recipe.floor, ws[0], 0)
  ws = tuple(quantized(w, recipe, transposed) for w in ws)
  ys = tuple(gemm(x, w.fprop, recipe, w.dgrad, x_MK.dtype) for w in ws)
  kept = x if same_form(site.x, site.cache) else hold(x_MK, site.cache, recipe.floor)
  return ys, (save(kept), found, tuple(shell(w, recipe) for w in ws))


def _linear_bwd(recipe, site, residuals, dys):
  kept, found, ws = residuals
  dx_MK, dws = backward(load(kept), site.cache, dys, ws, recipe)
  dws = tuple(gradient(w, dw, found, seen) for w, (dw, seen) in zip(ws, dws, strict=True))
  return dx_MK, dws


_linear.defvjp(_linear_fwd, _linear_bwd)


def save(held: Held, name: str = "") -> Held:
  """What is held as a residual, under a checkpoint name; read it with `load`."""
  held = held.raw() if isinstance(held, QTensor) else held
  return checkpoint_name(held, name) if name else held


def load(saved: Held) -> Held:
  """Inverse of `save`."""
  return saved.typed() if isinstance(saved, QTensor) else saved


def shell(w: Weight, recipe: Recipe) -> Weight:
  """What the backward pass needs of a weight: Dgrad's operand, and of the master its dtype.

  The operand, read by `for_dgrad`, is in `dgrad`; or its transpose in `fprop`, where kernels read
  that one, so that no bytes move.
  """
  master = None if w.master is None else jnp.zeros((0,), w.master.dtype)
  fprop, dgrad = None, w.dgrad
  if ops.fp8_multiplies_transposed(recipe.impl):
    fprop, dgrad = (w.fprop if recipe.fprop_w == recipe.dgrad_w else w.dgrad.mT), None
  return Weight(master, *(None if z is None else save(z) for z in (fprop, dgrad)), w.amax, w.inputs,
                w.outputs)


def for_dgrad(w: Weight) -> tuple[Held, Held | None]:
  """Dgrad's operand of a `shell`, [..., N, K], and its transpose if that is what was kept."""
  if w.dgrad is not None:
    return load(w.dgrad), None
  turned = load(w.fprop)
  return turned.mT, turned


def backward(kept: Held, was: Operand, dys: tuple[jax.Array, ...], ws: tuple[Weight, ...],
             recipe: Recipe) -> tuple[jax.Array, list[tuple[jax.Array | None, jax.Array | None]]]:
  """Dgrad and Wgrad of layers that share their input.

  Args:
    kept: the input, held as `was`.
    dys: [M, N] each.
    ws: from `shell`.

  Returns:
    dx [M, K] in the dtype of `dys`; for each weight its fp32 gradient [K, N] (None without a
    master) and the amax of its dy (None without a history).
  """
  x = again(kept, was, recipe.wgrad_x, recipe.floor)
  *pairs, seen = zip(*(gradients(dy, recipe.dgrad_dy, recipe.wgrad_dy, recipe.gradient_floor, w)
                       for dy, w in zip(dys, ws, strict=True)), strict=True)
  dx_MK, dws = products(x, tuple(zip(*pairs, strict=True)), ws, recipe, dys[0].dtype)
  return dx_MK, list(zip(dws, seen, strict=True))


def products(x: Held, dys: tuple[tuple[Held, Held | None], ...], ws: tuple[Weight, ...],
             recipe: Recipe, dtype) -> tuple[jax.Array, list[jax.Array | None]]:
  """Dgrad and Wgrad of quantized operands: dx [M, K] in `dtype`, and each weight's gradient.

  Args:
    x: the input as Wgrad wants it.
    dys: for Dgrad and for Wgrad, each.
  """
  dx_MK, dws = 0.0, []
  partial = dtype if len(dys) == 1 else jnp.float32  # sums of several are fp32
  for (dy, dy_t), w in zip(dys, ws, strict=True):
    w_NK, turned_KN = for_dgrad(w)
    dx_MK += gemm(dy, w_NK, recipe, turned_KN, partial)
    dws.append(None if w.master is None else wgrad(x, dy_t, recipe))
  return dx_MK.astype(dtype), dws


def gradient(w: Weight, dw: jax.Array | None, x_amax: jax.Array | None,
             dy_amax: jax.Array | None) -> Weight | None:
  """The cotangent of a weight: its master's gradient, and what its history should record."""
  if w.master is not None:
    lead = dw.shape[:dw.ndim - 2]
    dw = dw.reshape(*lead, *w.inputs, *w.outputs).astype(w.master.dtype)
  amax = None
  if w.amax is not None:
    zero = jnp.zeros_like(w.amax[0])
    amax = jnp.stack([zero if a is None else a for a in (x_amax, dy_amax)])
  return Weight(dw, None, None, amax, w.inputs, w.outputs)
