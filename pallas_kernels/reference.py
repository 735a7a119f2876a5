"""Definitions: the shortest code that says what each operation means. Oracles, not for speed."""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import latent_cache, scaled


def difference(x: jax.Array, y: jax.Array) -> jax.Array:
  """DeepGEMM's metric, 1 - 2 <x, y> / (<x, x> + <y, y>), fp32; NaN where either has one."""
  x, y = x.astype(jnp.float32), y.astype(jnp.float32)
  return 1 - 2 * jnp.sum(x * y) / (jnp.sum(x * x) + jnp.sum(y * y))


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


def mla_decode(q_BTHZ: jax.Array, cache: jax.Array, lengths_B: jax.Array, *, scale: float,
               pages_BN: jax.Array | None = None, kv_rank: int = 512, return_lse: bool = False
               ) -> jax.Array | tuple[jax.Array, jax.Array]:
  """Attention of the newest T tokens over what MLA caches, absorbed form (report 2.1.1).

  A token's cache entry is key and, in its first C = `kv_rank` numbers, value of every head.

  Args:
    q_BTHZ: queries folded with the key up-projection, then their rotary part; the T newest tokens.
    cache: [B, S, Z], or a pool of pages [pages, page size, Z] if `pages_BN` is given; floating
      point, or int32 records (`latent_cache`) in place of Z numbers.
    lengths_B: int32, tokens a sequence has, the T new ones included; at most its cache holds.
      Query t sees the first `length - (T - 1 - t)` of them.
    scale: factor on the scores.
    pages_BN: int32, numbers of a sequence's pages in order. Those from the first page that holds
      none of its tokens are never used and may be anything, as may cache entries beyond the length.
    kv_rank: C.
    return_lse: also return log(sum(exp(scale * score))).

  Returns:
    [B, T, H, C] in the dtype of the queries; with `return_lse` also fp32 [B, T, H]. A query that
    sees nothing gives zeros and -inf.

  Raises:
    ValueError: operands that do not fit each other.
  """
  latent_cache.check(q_BTHZ, cache, lengths_B, pages_BN, kv_rank)
  B, T = q_BTHZ.shape[:2]
  if pages_BN is not None:
    cache = cache.at[pages_BN].get(mode="clip").reshape(B, -1, cache.shape[-1])
  z_BSZ = latent_cache.values(cache).astype(jnp.float32)
  exists_BS = jnp.arange(z_BSZ.shape[1]) < lengths_B[:, None]
  z_BSZ = jnp.where(exists_BS[..., None], z_BSZ, 0)
  limits_BT = lengths_B[:, None] - (T - 1 - jnp.arange(T))
  seen_BTS = jnp.arange(z_BSZ.shape[1]) < limits_BT[..., None]
  scores = scale * jnp.einsum("bthz,bsz->bths", q_BTHZ.astype(jnp.float32), z_BSZ,
                              precision=lax.Precision.HIGHEST)
  lse_BTH = jax.nn.logsumexp(scores, axis=-1, where=seen_BTS[:, :, None])
  p = jnp.where(seen_BTS[:, :, None], jnp.exp(scores - lse_BTH[..., None]), 0)
  o_BTHC = jnp.einsum("bths,bsc->bthc", p, z_BSZ[..., :kv_rank], precision=lax.Precision.HIGHEST)
  o_BTHC = o_BTHC.astype(q_BTHZ.dtype)
  return (o_BTHC, lse_BTH) if return_lse else o_BTHC


def quantize(x_MK: jax.Array, tile: tuple[int, int], *, pow2: bool = False, floor: float = 1e-4
             ) -> tuple[jax.Array, jax.Array]:
  """e4m3 codes [M, K] and fp32 scales [ceil(M / tile[0]), ceil(K / tile[1])].

  `scale = max(max |x| of the tile, floor) / 448`, with `pow2` rounded up to a power of two, and
  `code = round(x / scale)`. A tile with NaN or inf has a scale that is not finite.
  """
  (M, K), (rows, columns) = x_MK.shape, tile
  x = jnp.pad(x_MK.astype(jnp.float32), ((0, -M % rows), (0, -K % columns)))
  x = x.reshape(-(-M // rows), rows, -(-K // columns), columns)
  amax = jnp.where(jnp.isfinite(x).all((1, 3)), jnp.abs(x).max((1, 3)), jnp.nan)
  scales = jnp.where(amax < floor, floor, amax) / 448
  if pow2:
    fraction, exponent = jnp.frexp(scales)  # in [1/2, 1)
    whole = jnp.ldexp(jnp.float32(1), exponent - (fraction == 0.5))
    scales = jnp.where(jnp.isfinite(scales), whole, jnp.nan)
  codes = (x / scales[:, None, :, None]).astype(jnp.float8_e4m3fn)
  m, _, k, _ = x.shape
  return codes.reshape(m * rows, k * columns)[:M, :K], scales


def swiglu(gate_MF: jax.Array, up_MF: jax.Array, weight_M: jax.Array | None = None) -> jax.Array:
  """`weight * silu(gate) * up` in fp32; jax differentiates it."""
  h_MF = jax.nn.silu(gate_MF.astype(jnp.float32)) * up_MF.astype(jnp.float32)
  return h_MF if weight_M is None else h_MF * weight_M[:, None]
