"""What MLA caches of a token: the latent (C numbers) and the shared rotary key (R numbers).

A cache holds a token as its C + R numbers, or as a record of 8-bit codes: FlashMLA's 656 bytes,

    0    512 e4m3 codes of the latent
    512    4 fp32 scales, one per 128 of the latent; they multiply codes
    528   64 bfloat16 numbers of the rotary key, never quantized

Records are kept as 164 little-endian int32 words. The type is the kernel's wish: reading codes,
scales and halves out of 32-bit registers costs shifts, while to view a pool of bytes as another
type XLA copies the pool. `np.asarray(records).view(np.uint8)` shows the bytes.

A paged cache is a pool [pages, page size, words] and a table of page numbers a sequence; a
contiguous one is [B, S, words].
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

TILE = 128
CODES, SCALES, HALVES = 512, 4, 64  # of a record
WORDS = CODES // 4 + SCALES + HALVES // 2
LARGEST = 448.0  # of e4m3


def _bits(x: jax.Array, dtype=jnp.int32) -> jax.Array:
  return lax.bitcast_convert_type(x, dtype)


def _divide(x: jax.Array, by: jax.Array) -> jax.Array:
  """x / by rounded once; by the reciprocal of a divisor known to repeat, XLA would multiply."""
  zero = (_bits(x) & 0x7FFFFFFF) >> 31
  return x / _bits(_bits(by) + zero, jnp.float32)


def encode_record(latent: jax.Array, rope: jax.Array, floor: float = 1e-4) -> jax.Array:
  """Packs tokens into records.

  Args:
    latent: [..., 512], any float dtype. A tile with NaN or infinity comes back as NaN.
    rope: [..., 64], stored as bfloat16.
    floor: least amax of a tile.

  Returns:
    int32 [..., 164]; see the module docstring for the layout.
  """
  if latent.shape[-1] != CODES or rope.shape[-1] != HALVES:
    raise ValueError(f"a record holds {CODES} + {HALVES} numbers, "
                     f"not {latent.shape[-1]} + {rope.shape[-1]}")
  lead = latent.shape[:-1]
  x = latent.astype(jnp.float32).reshape(*lead, SCALES, TILE)
  amax = _bits(jnp.max(_bits(x) & 0x7FFFFFFF, axis=-1), jnp.float32)  # NaN is above everything
  scales = _divide(jnp.where(amax < floor, np.float32(floor), amax), np.float32(LARGEST))
  codes = _divide(x, scales[..., None]).astype(jnp.float8_e4m3fn)
  return jnp.concatenate([
      _bits(codes.reshape(*lead, CODES // 4, 4)),
      _bits(scales),
      _bits(rope.astype(jnp.bfloat16).reshape(*lead, HALVES // 2, 2))], axis=-1)


def decode_record(records: jax.Array, dtype=jnp.bfloat16) -> jax.Array:
  """The tokens [..., 576] of records int32 [..., 164]: `code * scale` rounded to `dtype`, rope."""
  if records.dtype != jnp.int32 or records.shape[-1] != WORDS:
    raise ValueError(f"records are int32 [..., {WORDS}], not {records.dtype} {records.shape}")
  lead = records.shape[:-1]
  codes, scales, halves = jnp.split(records, (CODES // 4, CODES // 4 + SCALES), axis=-1)
  values = _bits(codes, jnp.float8_e4m3fn).astype(jnp.float32).reshape(*lead, SCALES, TILE)
  latent = (values * _bits(scales, jnp.float32)[..., None]).reshape(*lead, CODES)
  rope = _bits(halves, jnp.bfloat16).reshape(*lead, HALVES)
  return jnp.concatenate([latent.astype(dtype), rope.astype(dtype)], axis=-1)


def values(cache: jax.Array) -> jax.Array:
  """A cache's tokens, decoded if they are records."""
  return decode_record(cache) if cache.dtype == jnp.int32 else cache


def check(q_BTHZ: jax.Array, cache: jax.Array, lengths_B: jax.Array, pages_BN: jax.Array | None,
          kv_rank: int) -> None:
  """ValueError unless the operands of `mla_decode` fit each other."""
  B, Z = q_BTHZ.shape[0], q_BTHZ.shape[-1]
  records = cache.dtype == jnp.int32
  if q_BTHZ.ndim != 4 or not 0 < kv_rank <= Z:
    raise ValueError(f"queries must be [B, T, H, Z] with Z >= kv_rank = {kv_rank}, "
                     f"not {q_BTHZ.shape}")
  if records and (Z, kv_rank) != (CODES + HALVES, CODES):
    raise ValueError(f"records hold a latent of {CODES} and a rotary key of {HALVES}; "
                     f"the queries are for {kv_rank} and {Z - kv_rank}")
  if not records and not jnp.issubdtype(cache.dtype, jnp.floating):
    raise ValueError(f"a cache is floating point or int32 records, not {cache.dtype}")
  width = WORDS if records else Z
  if cache.ndim != 3 or cache.shape[-1] != width or cache.shape[1] < 1:
    raise ValueError(f"the cache must be [pages, page size, {width}] or [B, S, {width}], "
                     f"not {cache.shape}")
  if lengths_B.shape != (B,) or lengths_B.dtype != jnp.int32:
    raise ValueError(f"lengths must be int32 [{B}], not {lengths_B.dtype} {lengths_B.shape}")
  if pages_BN is None and cache.shape[0] != B:
    raise ValueError(f"a contiguous cache for {B} sequences cannot be {cache.shape}; "
                     "for a pool of pages give pages_BN")
  if pages_BN is not None and (pages_BN.dtype != jnp.int32 or pages_BN.ndim != 2 or
                               pages_BN.shape[0] != B or pages_BN.shape[1] < 1):
    raise ValueError(f"pages_BN must be int32 [{B}, pages of a sequence], "
                     f"not {pages_BN.dtype} {pages_BN.shape}")
