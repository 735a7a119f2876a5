"""A SwiGLU feed-forward under a recipe (report 3.3.3): three layers, of which little is kept.

Kept for the backward pass are the quantized x and the SwiGLU's two inputs as `swiglu_cache` says;
its output is computed again.
"""

import functools

import jax

from dsv3_jax.fp8 import probe, swiglu
from dsv3_jax.fp8.linear import (
  again,
  for_dgrad,
  gemm,
  gradient,
  gradients,
  load,
  measured,
  products,
  save,
  shell,
  wgrad,
)
from dsv3_jax.fp8.recipe import Recipe
from dsv3_jax.fp8.weights import Weight, bare, hold, quantized


def feed_forward(x: jax.Array, w_gate, w_up, w_down, recipe: Recipe) -> jax.Array:
  """`(silu(x w_gate) * (x w_up)) w_down`, [..., D] to [..., D]; weights prepared or plain."""
  if isinstance(w_gate, probe.Probed):
    return probe.feed_forward(x, w_gate, w_up, w_down)
  ws = tuple(w if isinstance(w, Weight) else bare(w, 1) for w in (w_gate, w_up, w_down))
  return _feed_forward(recipe, x.reshape(-1, x.shape[-1]), ws).reshape(x.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _feed_forward(recipe, x_PD, ws):
  return _fwd(recipe, x_PD, ws, transposed=False)[0]


def _fwd(recipe, x_PD, ws, transposed=True):
  ws = tuple(quantized(w, recipe, transposed) for w in ws)
  x, x_amax = measured(x_PD, recipe.fprop_x, recipe.floor, ws[0], 0)
  gate_PF, up_PF = (gemm(x, w.fprop, recipe, w.dgrad, x_PD.dtype) for w in ws[:2])
  caches = tuple(save(hold(z, recipe.swiglu_cache, recipe.floor), name)
                 for z, name in ((gate_PF, "ffn_gate"), (up_PF, "ffn_up")))
  h, h_amax = swiglu.forward(gate_PF, up_PF, None, recipe.fprop_x, recipe.floor, ws[2])
  y_PD = gemm(h, ws[2].fprop, recipe, ws[2].dgrad, x_PD.dtype)
  return y_PD, (save(x), caches, x_amax, h_amax, tuple(shell(w, recipe) for w in ws))


def _bwd(recipe, residuals, dy_PD):
  x, caches, x_amax, h_amax, ws = residuals
  dtype, floors = dy_PD.dtype, (recipe.floor, recipe.gradient_floor)
  dy, dy_t, dy_amax = gradients(dy_PD, recipe.dgrad_dy, recipe.wgrad_dy, floors[1], ws[2])
  w_DF, turned_FD = for_dgrad(ws[2])
  dh_PF = gemm(dy, w_DF, recipe, turned_FD, dtype)
  back = swiglu.backward(tuple(load(c) for c in caches), dh_PF, None, swiglu.Operands(
      recipe.swiglu_cache, recipe.wgrad_x, recipe.dgrad_dy, recipe.wgrad_dy, *floors), ws[:2])
  dw_down = None if ws[2].master is None else wgrad(back.h, dy_t, recipe)
  x = again(load(x), recipe.fprop_x, recipe.wgrad_x, recipe.floor)
  dx_PD, dws = products(x, back.dys, ws[:2], recipe, dtype)
  dws = tuple(gradient(w, dw, a, seen) for w, dw, a, seen in zip(
      ws, (*dws, dw_down), (x_amax, x_amax, h_amax), (*back.seen, dy_amax), strict=True))
  return dx_PD, dws


_feed_forward.defvjp(_fwd, _bwd)
