"""Small pieces every block uses: initialisation, RMSNorm, the SwiGLU feed-forward.

All modules here are containers of named parameters; what they compute is a pure function of the
parameters and the call's arguments. Weights are kept in the dtype given at construction (fp32
masters) and cast to the activations' dtype where they are used.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from dsv3_jax import ops
from dsv3_jax.fp8 import linear as fp8_linear
from dsv3_jax.fp8 import weights
from dsv3_jax.fp8.feed_forward import feed_forward
from dsv3_jax.fp8.recipe import Recipe


def normal_param(rngs: nnx.Rngs, shape: tuple[int, ...], std: float, dtype) -> nnx.Param:
  """A weight drawn from N(0, std^2) (report 4.2: std 0.006 for all learnable parameters)."""
  return nnx.Param(std * jax.random.normal(rngs.params(), shape, dtype))


def ones_param(size: int, dtype) -> nnx.Param:
  """A norm gain."""
  return nnx.Param(jnp.ones((size,), dtype))


def rms_norm(x: jax.Array, gain: jax.Array, eps: float) -> jax.Array:
  """RMSNorm over the last axis: `x / sqrt(mean(x^2) + eps) * gain`.

  Args:
    x: [..., n]; statistics are taken in fp32 whatever the dtype.
    gain: [n].
    eps: added to the mean square.

  Returns:
    [..., n] in the dtype of `x`.
  """
  x32 = x.astype(jnp.float32)
  inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
  return (x32 * inverse).astype(x.dtype) * gain.astype(x.dtype)


def linear(x: jax.Array, w: jax.Array | weights.Weight, inner: int = 1,
           recipe: Recipe | None = None, site: fp8_linear.Site | None = None) -> jax.Array:
  """Contracts the last `inner` axes of x with the first of w: [..., *I] and [*I, *O] to [..., *O].

  Without a recipe the weight is cast to the dtype of `x`, which is the dtype of the result.
  """
  if recipe is not None:
    return fp8_linear.linear(x, (w,), recipe, inner, site)[0]
  w = weights.plain(w, x.dtype)
  width = math.prod(w.shape[:inner])
  y = ops.gemm(x.reshape(-1, width), w.astype(x.dtype).reshape(width, -1))
  return y.reshape(*x.shape[:x.ndim - inner], *w.shape[inner:])


def swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
  """`silu(gate) * up`, elementwise; both [..., F]."""
  return jax.nn.silu(gate) * up


class DenseFFN(nnx.Module):
  """SwiGLU feed-forward `w_down(silu(w_gate x) * (w_up x))`, no biases."""

  def __init__(self, dim: int, ffn_dim: int, std: float, *, rngs: nnx.Rngs, dtype=jnp.float32):
    self.w_gate_DF = normal_param(rngs, (dim, ffn_dim), std, dtype)
    self.w_up_DF = normal_param(rngs, (dim, ffn_dim), std, dtype)
    self.w_down_FD = normal_param(rngs, (ffn_dim, dim), std, dtype)

  def __call__(self, x_PD: jax.Array, recipe: Recipe | None = None) -> jax.Array:
    """[P, D] to [P, D]."""
    with jax.named_scope("dense_ffn"):
      if recipe is not None:
        ws = self.w_gate_DF[...], self.w_up_DF[...], self.w_down_FD[...]
        return feed_forward(x_PD, *ws, recipe)
      gate_PF = checkpoint_name(linear(x_PD, self.w_gate_DF[...]), "ffn_gate")
      up_PF = checkpoint_name(linear(x_PD, self.w_up_DF[...]), "ffn_up")
      return linear(swiglu(gate_PF, up_PF), self.w_down_FD[...])


def embed(w_VD: jax.Array, tokens: jax.Array, dtype: str, axes: tuple[str, ...] = ()) -> jax.Array:
  """Rows [..., D] of the embedding in `dtype`; no scaling.

  Args:
    w_VD: the embedding, this device's words where `axes` cut it.
    tokens: int [...] in [0, V) of the whole vocabulary; each device along `axes` has its own, of
      the same shape.
    axes: mesh axes that cut the vocabulary, inside shard_map.
  """
  if not axes:
    return jnp.take(w_VD, tokens, axis=0).astype(dtype)
  V, D = w_VD.shape
  all_P = jax.lax.all_gather(tokens.reshape(-1), axes, tiled=True)
  here_P = all_P - jax.lax.axis_index(axes) * V
  here_P = jnp.where(here_P < 0, V, here_P)  # a negative index would count from the end
  rows_PD = jnp.take(w_VD, here_P, axis=0, mode="fill", fill_value=0).astype(dtype)
  # One device has each row and the others zeros: the sum is exact in any dtype.
  found = jax.lax.psum_scatter(rows_PD, axes, scatter_dimension=0, tiled=True)
  return found.reshape(*tokens.shape, D)
