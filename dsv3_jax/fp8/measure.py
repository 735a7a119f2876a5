"""What a recipe does to one linear layer: rates of underflow and saturation, errors of its matmuls.

The three matmuls are those of `linear` and `grouped`: the same operands, formats, tiles and sums,
beside the same products in fp32. Errors are relative, ||found - fp32|| / ||fp32|| in the Frobenius
norm (DeepGEMM's metric is about half its square). They are those of one layer, on operands that are
exact: what a whole model accumulates is seen in its loss.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax.fp8 import grouped, linear, quantize
from dsv3_jax.fp8 import recipe as recipe_lib
from dsv3_jax.fp8.linear import again, same_form
from dsv3_jax.fp8.qtensor import QTensor
from dsv3_jax.fp8.recipe import Operand, Recipe
from dsv3_jax.fp8.weights import Held, hold, value

OPERANDS = ("x", "w", "dy")
GEMMS = ("fprop", "dgrad", "wgrad")
EXPONENTS = tuple(range(-40, 17))  # bins of the amax histograms: 2^e <= amax < 2^(e + 1)
_TILES = {"x": (1, 128), "w": (128, 128), "dy": (1, 128)}
_FP32 = Recipe(**{k: recipe_lib.parse(v) if isinstance(v, str) else v
                  for k, v in vars(recipe_lib.RECIPES["fp32"]).items()})


class Rows(NamedTuple):
  """The part of `model.moe.Plan` that grouped matmuls read."""

  pair_M: jax.Array
  group_m: jax.Array
  used: jax.Array


class _Site(NamedTuple):
  """How one layer holds its operands (static)."""

  x: Operand
  kept: Operand | None  # of the input, for Wgrad; None: it is computed again
  dy: Operand
  sent: bool  # dy exists as quantized alone, sent by the experts' dispatch


def _site(name: str, recipe: Recipe) -> _Site:
  """The layer whose parameter is called `name`."""
  routed, down = name.rpartition("_")[2].startswith("E"), name.startswith("w_down_")
  if name.startswith("w_o_"):
    return _Site(recipe.output_x, recipe.output_cache, recipe.dgrad_dy, False)
  if down:
    return _Site(recipe.fprop_x, None, recipe.dispatch_dy if routed else recipe.dgrad_dy, routed)
  x = recipe.dispatch_x if routed else recipe.fprop_x
  return _Site(x, x, recipe.dgrad_dy, False)


def _products(site: _Site, recipe: Recipe, x_MK: jax.Array, w: jax.Array, dy_MN: jax.Array,
              rows: Rows | None, amax: jax.Array | None
              ) -> tuple[dict[str, Held], dict[str, jax.Array]]:
  """Operands of Fprop and Dgrad as they are held, and the three products, fp32."""
  within = (lambda o: o) if rows is None else (lambda o: grouped.within(o, rows))
  if rows is None:
    gemm = lambda a, b: linear.gemm(a, b, recipe)
    wgrad = lambda a, b: linear.wgrad(a, b, recipe)
  else:
    gemm = lambda a, b: grouped.gemm(a, b, rows, recipe, "auto")
    wgrad = lambda a, b: grouped.wgrad(a, b, rows, w.shape[0], recipe, "auto")

  def activation(z, operand, floor, slot):
    known = amax is not None and operand.delayed
    given = None if not known else jnp.where(amax[slot] > 0, amax[slot], jnp.max(jnp.abs(z)))
    return hold(z, operand, floor, given)

  floor, small = recipe.floor, recipe.gradient_floor
  x_as, dy_as, wgrad_x, wgrad_dy = map(within, (site.x, site.dy, recipe.wgrad_x, recipe.wgrad_dy))
  x, dy = activation(x_MK, x_as, floor, 0), activation(dy_MN, dy_as, small, 1)
  weight = hold(w, recipe.fprop_w, floor)
  turned = (weight if same_form(recipe.fprop_w, recipe.dgrad_w)
            else hold(w, recipe.dgrad_w, floor)).mT
  if site.kept is None:
    x_t = hold(x_MK, wgrad_x, floor)
  else:
    kept = within(site.kept)
    x_t = again(x if kept == x_as else hold(x_MK, kept, floor), kept, wgrad_x, floor)
  dy_t = dy if same_form(dy_as, wgrad_dy) else hold(value(dy) if site.sent else dy_MN, wgrad_dy,
                                                    small)
  return ({"x": x, "w": weight, "dy": dy},
          {"fprop": gemm(x, weight), "dgrad": gemm(dy, turned), "wgrad": wgrad(x_t, dy_t)})


def _rates(exact: jax.Array, held: Held) -> tuple[jax.Array, jax.Array]:
  """Shares of the values that are not zero: those that became zero, those beyond the range."""
  size = jnp.abs(exact)
  count = jnp.maximum(jnp.sum(size > 0), 1)
  under = jnp.sum((size > 0) & (value(held) == 0)) / count
  if not isinstance(held, QTensor):
    return under, jnp.zeros(())
  limit = _scale_of_each(held) * (held.format.max * (1 + 2.0**-10))  # not for a scale's rounding
  return under, jnp.sum(size > limit) / count


def _scale_of_each(held: QTensor) -> jax.Array:
  """The scale of each element, in the shape of the array or one that broadcasts to it."""
  scales, lead = held.scale_values(), held.ndim - len(held.tile)
  for axis, (tile, size) in enumerate(zip(held.tile, held.shape[lead:], strict=True), lead):
    if tile:
      scales = jax.lax.slice_in_dim(jnp.repeat(scales, tile, axis=axis), 0, size, axis=axis)
  return scales


@functools.partial(jax.jit, static_argnames=("name", "recipe"))
def layer(x_MK: jax.Array, w: jax.Array, dy_MN: jax.Array, rows: Rows | None = None,
          amax: jax.Array | None = None, *, name: str, recipe: Recipe) -> dict[str, Any]:
  """Statistics of one layer under one recipe.

  Args:
    x_MK, w, dy_MN: operands; w is [K, N], or [E, K, N] with `rows`.
    rows: of routed experts; rows beyond the blocks in use are zero.
    amax: fp32 [2], what delayed scaling assumes of x and dy; None or 0: their own.
    name: the parameter's, such as "w_o_HUD": decides which of the recipe's operands are meant.
    recipe: the formats.

  Returns:
    underflow and saturation: shares of the nonzero values of x, w, dy; error of fprop, dgrad,
    wgrad. fp32 scalars.
  """
  x_MK, w, dy_MN = (z.astype(jnp.float32) for z in (x_MK, w, dy_MN))
  held, found = _products(_site(name, recipe), recipe, x_MK, w, dy_MN, rows, amax)
  _, exact = _products(_site(name, _FP32), _FP32, x_MK, w, dy_MN, rows, None)
  norm = lambda z: jnp.sqrt(jnp.sum(jnp.square(z)))
  rates = {k: _rates(z, held[k]) for k, z in zip(OPERANDS, (x_MK, w, dy_MN), strict=True)}
  return {"underflow": {k: r[0] for k, r in rates.items()},
          "saturation": {k: r[1] for k, r in rates.items()},
          "error": {k: norm(found[k] - exact[k]) / jnp.maximum(norm(exact[k]), 1e-38)
                    for k in GEMMS}}


@functools.partial(jax.jit, static_argnames="operand")
def amaxes(z: jax.Array, operand: str) -> tuple[jax.Array, jax.Array]:
  """The distribution of an operand's tile maxima: (counts of `EXPONENTS`, the largest).

  Args:
    z: the operand.
    operand: x, dy: tiles of 1x128; w: blocks of 128x128. Tiles of zeros are not counted.
  """
  found = quantize.amax(z, _TILES[operand]).reshape(-1)
  exponent = jnp.clip((jax.lax.bitcast_convert_type(found, jnp.int32) >> 23) - 127,
                      EXPONENTS[0], EXPONENTS[-1]) - EXPONENTS[0]
  counts = jnp.zeros(len(EXPONENTS), jnp.int32).at[exponent].add((found > 0).astype(jnp.int32))
  return counts, jnp.max(found, initial=0)


def median_exponent(counts: np.ndarray) -> int | None:
  """The bin that holds the median tile; None where there is none."""
  total = int(np.sum(counts))
  if not total:
    return None
  return int(EXPONENTS[int(np.searchsorted(np.cumsum(counts), (total + 1) // 2))])
