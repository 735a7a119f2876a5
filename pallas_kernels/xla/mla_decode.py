"""MLA decode over the latent cache by plain XLA, for any platform and any widths.

One pass over the cache, a block of keys at a time for all sequences, with a running softmax: scores
exist for one block, and the latent serves as key and value of every head without being expanded.
"""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import latent_cache, vma

_FLOOR = -1e30  # below any score, and finite: a row that sees no key has exp(-inf - _FLOOR) = 0


def _fetch(cache, lengths_B, pages_BN, block: int):
  """Size of a block of keys, their number, and a function i -> (tokens [B, S, Z], positions [S]).

  The last block may begin early to end at the cache's end; then it has positions of an earlier one.
  """
  B, per_page = lengths_B.shape[0], cache.shape[1]
  if pages_BN is None:
    size = min(block, per_page)
    return size, per_page, lambda start: lax.dynamic_slice_in_dim(cache, start, size, 1)
  columns = min(max(1, block // per_page), pages_BN.shape[1])

  def fetch(start):
    table = lax.dynamic_slice_in_dim(pages_BN, start // per_page, columns, 1)
    first = start + per_page * jnp.arange(columns)  # what the table says beyond is not for use
    table = jnp.where(first[None] < lengths_B[:, None], table, 0)
    return cache.at[table].get(mode="clip").reshape(B, columns * per_page, cache.shape[-1])

  return columns * per_page, pages_BN.shape[1] * per_page, fetch


def mla_decode(q_BTHZ: jax.Array, cache: jax.Array, lengths_B: jax.Array, *, scale: float,
               pages_BN: jax.Array | None = None, kv_rank: int = 512, return_lse: bool = False,
               block: int = 128) -> jax.Array | tuple[jax.Array, jax.Array]:
  """See `pallas_kernels.reference.mla_decode`; `block` is the number of keys taken at once."""
  latent_cache.check(q_BTHZ, cache, lengths_B, pages_BN, kv_rank)
  B, T, H, Z = q_BTHZ.shape
  size, capacity, fetch = _fetch(cache, lengths_B, pages_BN, block)
  q_BMZ = q_BTHZ.reshape(B, T * H, Z)
  limits_BM = lengths_B[:, None] - (T - 1 - jnp.arange(T * H) // H)

  def body(i, carry):
    o_BMC, top_BM, total_BM = carry
    start = jnp.minimum(i * size, capacity - size)
    positions_S = start + jnp.arange(size)
    fresh_S = positions_S >= i * size
    # What lies beyond a sequence may be NaN, which a weight of zero would not remove.
    exists_BS = positions_S[None] < lengths_B[:, None]
    z_BSZ = jnp.where(exists_BS[..., None], latent_cache.values(fetch(start)), 0)
    scores_BMS = scale * jnp.einsum("bmz,bsz->bms", q_BMZ, z_BSZ.astype(q_BMZ.dtype),
                                    preferred_element_type=jnp.float32)
    seen_BMS = (positions_S < limits_BM[..., None]) & fresh_S
    scores_BMS = jnp.where(seen_BMS, scores_BMS, -jnp.inf)
    highest_BM = jnp.maximum(top_BM, scores_BMS.max(-1))
    p_BMS = jnp.exp(scores_BMS - highest_BM[..., None])
    shrink_BM = jnp.exp(top_BM - highest_BM)
    # All Z columns, the rotary ones for nothing: cutting the latent out would copy the block.
    pv_BMZ = jnp.einsum("bms,bsz->bmz", p_BMS.astype(q_BMZ.dtype), z_BSZ.astype(q_BMZ.dtype),
                        preferred_element_type=jnp.float32)
    return (o_BMC * shrink_BM[..., None] + pv_BMZ[..., :kv_rank], highest_BM,
            total_BM * shrink_BM + p_BMS.sum(-1))

  like = (q_BTHZ, cache, lengths_B) if pages_BN is None else (q_BTHZ, cache, lengths_B, pages_BN)
  start = (vma.zeros((B, T * H, kv_rank), jnp.float32, *like),
           vma.match(jnp.full((B, T * H), _FLOOR, jnp.float32), *like),
           vma.zeros((B, T * H), jnp.float32, *like))
  longest = jnp.clip(jnp.max(lengths_B), 0, capacity)
  o_BMC, top_BM, total_BM = lax.fori_loop(0, (longest + size - 1) // size, body, start)
  o_BMC = o_BMC / jnp.where(total_BM > 0, total_BM, 1.0)[..., None]
  o_BTHC = o_BMC.reshape(B, T, H, kv_rank).astype(q_BTHZ.dtype)
  if not return_lse:
    return o_BTHC
  lse_BM = jnp.where(total_BM > 0, top_BM + jnp.log(total_BM), -jnp.inf)
  return o_BTHC, lse_BM.reshape(B, T, H)
