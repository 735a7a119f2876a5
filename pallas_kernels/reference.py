"""Definitions: the shortest code that says what each operation means. Oracles, not for speed."""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import scaled


def attention(q_BTHK: jax.Array, k_BTHK: jax.Array, v_BTHU: jax.Array, *, scale: float,
              segments_BT: jax.Array | None = None) -> jax.Array:
  """Causal softmax attention [B, T, H, U]; all scores exist at once."""
  T = q_BTHK.shape[1]
  scores = jnp.einsum("bthk,bshk->bhts", q_BTHK, k_BTHK, preferred_element_type=jnp.float32)
  allowed = jnp.tril(jnp.ones((T, T), bool))[None]
  if segments_BT is not None:
    allowed = allowed & (segments_BT[:, :, None] == segments_BT[:, None, :])
  p = jax.nn.softmax(jnp.where(allowed[:, None], scores * scale, -jnp.inf), axis=-1)
  return jnp.einsum("bhts,bshu->bthu", p.astype(v_BTHU.dtype), v_BTHU)


def gemm(x_MK: jax.Array, w_KN: jax.Array) -> jax.Array:
  """`x @ w`."""
  return x_MK @ w_KN


def grouped_gemm(x_MK: jax.Array, w_GKN: jax.Array, group_m: jax.Array, used: jax.Array
                 ) -> jax.Array:
  """`y[block i] = x[block i] @ w[group_m[i]]` for the first `used` blocks, zeros after."""
  blocks = group_m.shape[0]
  x_mbK = x_MK.reshape(blocks, -1, x_MK.shape[1])
  y_mbN = jnp.einsum("mbk,mkn->mbn", x_mbK, w_GKN[group_m], preferred_element_type=jnp.float32)
  y_mbN = jnp.where((jnp.arange(blocks) < used)[:, None, None], y_mbN, 0)
  return y_mbN.reshape(x_MK.shape[0], -1).astype(x_MK.dtype)


def ragged_dot(x_MK: jax.Array, w_GKN: jax.Array, group_m: jax.Array, used: jax.Array
               ) -> jax.Array:
  """The same by `lax.ragged_dot`; blocks must be sorted by group."""
  block = x_MK.shape[0] // group_m.shape[0]
  in_use = jnp.arange(group_m.shape[0]) < used
  sizes_G = jnp.zeros((w_GKN.shape[0],), jnp.int32).at[group_m].add(in_use * block)
  return lax.ragged_dot(x_MK, w_GKN, sizes_G, preferred_element_type=jnp.float32).astype(x_MK.dtype)


def fp8_gemm(a_MK: scaled.Scaled, b_KN: scaled.Scaled) -> jax.Array:
  """The product of the dequantized operands, fp32."""

  def values(x):
    found = x.codes.astype(jnp.float32)
    if x.scales is None:
      return found
    for axis in (0, 1):
      size = found.shape[axis]
      index = jnp.arange(size) // (x.tile[axis] or size)
      x = x._replace(scales=jnp.take(x.scales, index, axis=axis))
    return found * x.scales

  return jnp.dot(values(a_MK), values(b_KN), precision=lax.Precision.HIGHEST)
