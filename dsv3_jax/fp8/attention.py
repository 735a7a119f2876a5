"""Attention and the projection after it as one differentiable step that keeps its output once.

Two backward passes read attention's output o: Wgrad of the projection, which needs it as an FP8
operand, and attention's own, which needs sum(o * do) a query. The report keeps o for both with 6
mantissa bits, 12 bits an element with power-of-two scales (3.3.3, E5M6): E4M3 would hurt attention,
bf16 would cost a third more. As two steps each would keep its own; here one E5M6 copy serves both.
"""

import functools

import jax
from jax.ad_checkpoint import checkpoint_name

from dsv3_jax import ops
from dsv3_jax.fp8 import linear
from dsv3_jax.fp8.formats import E5M6
from dsv3_jax.fp8.recipe import Recipe
from dsv3_jax.fp8.weights import Weight, bare, hold, quantized, value


def joined(recipe: Recipe | None, w: Weight | jax.Array, impl: str, like: jax.Array,
           segments_BT: jax.Array | None = None) -> bool:
  """Whether `attend` applies: the recipe keeps o in E5M6, and attention's halves are at hand.

  cuDNN's are not, it keeps o itself. A copy in E4M3 serves the projection alone.

  Args:
    impl, segments_BT: of `ops.attention`.
    like: has the queries' dtype.
  """
  return (recipe is not None and recipe.output_cache.format is E5M6
          and isinstance(w, Weight | jax.Array)
          and ops.attention_in_halves(impl, like.dtype, segments_BT))


def attend(q_BTHK: jax.Array, k_BTHK: jax.Array, v_BTHU: jax.Array, w_HUD: Weight | jax.Array,
           segments_BT: jax.Array | None, recipe: Recipe, *, scale: float, impl: str = "auto",
           block: int = 0) -> jax.Array:
  """`attention(q, k, v) @ w`, [B, T, D] in the dtype of `v`.

  Args:
    w_HUD: the projection, prepared or plain.
    segments_BT, scale, impl, block: of `ops.attention`.
  """
  w = w_HUD if isinstance(w_HUD, Weight) else bare(w_HUD, 2)
  B, T = q_BTHK.shape[:2]
  y_PD = _attend(recipe, scale, impl, block, q_BTHK, k_BTHK, v_BTHU, w, segments_BT)
  return y_PD.reshape(B, T, *w.outputs)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _attend(recipe, scale, impl, block, q, k, v, w, segments_BT):
  return _fwd(recipe, scale, impl, block, q, k, v, w, segments_BT, transposed=False)[0]


def _fwd(recipe, scale, impl, block, q, k, v, w, segments_BT, transposed=True):
  o_BTHU, lse_BTH = ops.attention_forward(q, k, v, scale=scale, segments_BT=segments_BT, impl=impl,
                                          block=block)
  o_PK = o_BTHU.reshape(-1, o_BTHU.shape[2] * o_BTHU.shape[3])
  with jax.named_scope("mla_output"):
    x, found = linear.measured(o_PK, recipe.output_x, recipe.floor, w, 0)
    w = quantized(w, recipe, transposed)
    y_PD = linear.gemm(x, w.fprop, recipe, w.dgrad, v.dtype)
    kept = (x if linear.same_form(recipe.output_x, recipe.output_cache)
            else hold(o_PK, recipe.output_cache, recipe.floor))
  kept = linear.save(kept, "attention_out")
  return y_PD, (q, k, v, segments_BT, kept, checkpoint_name(lse_BTH, "attention_lse"), found,
                linear.shell(w, recipe))


def _bwd(recipe, scale, impl, block, residuals, dy_PD):
  q, k, v, segments_BT, kept, lse_BTH, found, w = residuals
  with jax.named_scope("mla_output"):
    kept = linear.load(kept)
    do_PK, [(dw, seen)] = linear.backward(kept, recipe.output_cache, (dy_PD,), (w,), recipe)
  o_BTHU, do_BTHU = (z.astype(v.dtype).reshape(v.shape) for z in (value(kept), do_PK))
  dq, dk, dv = ops.attention_backward(q, k, v, o_BTHU, lse_BTH, do_BTHU, scale=scale,
                                      segments_BT=segments_BT, impl=impl, block=block)
  return dq, dk, dv, linear.gradient(w, dw, found, seen), None


_attend.defvjp(_fwd, _bwd)
