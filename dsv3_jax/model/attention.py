"""What every kind of attention shares: rotary projections, attention, projection of its output."""

import jax
import jax.numpy as jnp

from dsv3_jax import config, ops
from dsv3_jax.fp8 import attention as fp8_attention
from dsv3_jax.fp8 import linear as fp8_linear
from dsv3_jax.fp8 import weights
from dsv3_jax.fp8.recipe import Recipe
from dsv3_jax.model import layers, rope


def _in_halves(w: jax.Array, keep: int) -> jax.Array:
  """Columns from `keep` on brought from pairs into halves; see `rope`."""
  return jnp.concatenate([w[..., :keep], rope.to_halves(w[..., keep:])], axis=-1)


def projected(x: jax.Array, ws, keeps: tuple[int, ...], recipe: Recipe | None
              ) -> tuple[jax.Array, ...]:
  """`x @ w` for each weight, the columns from its `keep` on in halves."""
  if recipe is None:  # weights are fewer than what they make
    return tuple(layers.linear(x, _in_halves(weights.plain(w, x.dtype), keep))
                 for w, keep in zip(ws, keeps, strict=True))
  ys = fp8_linear.linear(x, tuple(ws), recipe)  # their blocks stay as they are
  return tuple(_in_halves(y, keep) for y, keep in zip(ys, keeps, strict=True))


def attend(q_BTHK: jax.Array, k_BTHK: jax.Array, v_BTHU: jax.Array,
           w_o_HUD: jax.Array | weights.Weight, segments_BT: jax.Array | None,
           cfg: config.Attention, runtime: config.Runtime, recipe: Recipe | None) -> jax.Array:
  """Causal attention and the projection of its output, [B, T, D] in the dtype of the queries.

  Args:
    q_BTHK, k_BTHK, v_BTHU: queries, keys, values of H heads, positions in them.
    w_o_HUD: the projection.
    segments_BT: int32; tokens see only their own segment. None: plain causal.
    cfg: gives the scale of the scores.
    runtime: chooses the implementation.
    recipe: of the projection.
  """
  how = dict(scale=rope.softmax_scale(cfg), impl=runtime.attention, block=runtime.attention_block)
  if fp8_attention.joined(recipe, w_o_HUD, runtime.attention, q_BTHK, segments_BT):
    return fp8_attention.attend(q_BTHK, k_BTHK, v_BTHU, w_o_HUD, segments_BT, recipe, **how)
  return output(ops.attention(q_BTHK, k_BTHK, v_BTHU, segments_BT=segments_BT, **how), w_o_HUD,
                recipe)


def output(o_BTHU: jax.Array, w_o_HUD: jax.Array | weights.Weight, recipe: Recipe | None
           ) -> jax.Array:
  """The projection of attention's output: [B, T, H, U] to [B, T, D]."""
  with jax.named_scope("mla_output"):
    site = recipe and fp8_linear.Site(recipe.output_x, recipe.output_cache)
    return layers.linear(o_BTHU, w_o_HUD, 2, recipe, site)
