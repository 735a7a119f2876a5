"""The 8-bit half of the MLA decode kernel: records of the latent cache into shared memory as bf16.

A warpgroup prefetches pages into L2, loads them from there into registers a chunk of one scale
ahead, unpacks their 32-bit words and writes bf16. That puts the latent's columns in another order:
of each 128 those of every word's first code, then of every second code, and so on. `reorder_query`
brings queries into it, `restore` the output back.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import latent_cache
from pallas_kernels.mosaic import compat

PAGE = 64  # tokens
LATENT, ROPE = latent_cache.CODES, latent_cache.HALVES
STAGES = 2  # pages in the ring
_WGMMA = plgpu.Layout.WGMMA


def _reorder(x: jax.Array) -> jax.Array:
  """The latent's columns in the order of unpacked words."""
  *lead, n = x.shape
  return x.reshape(*lead, n // 128, 32, 4).swapaxes(-1, -2).reshape(x.shape)


def restore(x: jax.Array) -> jax.Array:
  """The inverse of `_reorder`."""
  *lead, n = x.shape
  return x.reshape(*lead, n // 128, 4, 32).swapaxes(-1, -2).reshape(x.shape)


def reorder_query(q: jax.Array) -> jax.Array:
  """Columns of queries as those of unpacked records; the rotary ones: low halves, high halves."""
  *lead, _ = q.shape
  rope = q[..., LATENT:].reshape(*lead, ROPE // 2, 2).swapaxes(-1, -2).reshape(*lead, ROPE)
  return jnp.concatenate([_reorder(q[..., :LATENT]), rope], axis=-1)


def spread(vector: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """One value a row, repeated along the columns."""
  return lax.broadcast_in_dim(vector, shape, [0])


def ring(first, last, step, empty, carry=None) -> None:
  """`carry = step(i, slot, carry)` for each page, once its slot of the ring is free; drains it."""

  def fill(i, carry):
    slot = lax.rem(i - first, jnp.int32(STAGES))

    @pl.when(i >= first + STAGES)
    def _():
      plgpu.barrier_wait(empty.at[slot])

    return step(i, slot, carry)

  lax.fori_loop(first, last, fill, carry)

  for back in range(STAGES, 0, -1):

    @pl.when(last - first >= back)
    def _(back=back):
      plgpu.barrier_wait(empty.at[lax.rem(last - first - back, jnp.int32(STAGES))])


def _unpack(words: jax.Array, code: int) -> jax.Array:
  """Code 0 to 3 of each word, as fp32."""
  byte = lax.shift_right_logical(words, jnp.full_like(words, 8 * code)) if code else words
  return lax.bitcast_convert_type(byte.astype(jnp.int8), jnp.float8_e4m3fn).astype(jnp.float32)


def _half(words: jax.Array, high: bool) -> jax.Array:
  """The low or high bfloat16 of each word."""
  bits = words & -65536 if high else lax.shift_left(words, jnp.full_like(words, 16))
  return lax.bitcast_convert_type(bits, jnp.float32).astype(jnp.bfloat16)


def produce(cache_g, page_of, first, last, length, k_s, full, empty, interpret) -> None:
  """Fills the ring from records: global memory -> registers -> bf16 in shared memory."""
  words = latent_cache.TILE // 4  # that share a scale; 32, and so many of the rotary key
  scales = LATENT // latent_cache.TILE

  def load(index, layout=_WGMMA):
    return compat.load(cache_g, index, layout, interpret, optimized=False)

  def chunk_of(page, chunk):
    """Words of a scale of the latent, the last chunk those of the rotary key."""
    start = chunk * words + (latent_cache.SCALES if chunk == scales else 0)
    return load((page, slice(None), pl.ds(start, words)))

  token = compat.iota((PAGE, words), 0, _WGMMA, interpret)

  def write(page, count, slot, chunk, codes):
    """A chunk of the latent, zeros from the sequence's end on: what is there may be anything."""
    scale = load((page, slice(None), scales * words + chunk), _WGMMA.reduce(1))
    exists = token < count
    codes, scale = (jnp.where(exists, x, jnp.zeros_like(x))
                    for x in (codes, spread(scale, codes.shape)))
    scale = lax.bitcast_convert_type(scale, jnp.float32)
    for code in range(4):
      columns = pl.ds((4 * chunk + code) * words, words)
      k_s[slot, :, columns] = (_unpack(codes, code) * scale).astype(jnp.bfloat16)

  def prefetch(i):
    """Number of page i, or of the last; its records start on their way into L2."""
    page = page_of(jnp.minimum(i, last - 1))
    if not interpret:  # jax 0.10.2's interpreter does not know it
      plgpu.async_prefetch(cache_g.at[page])
    return page

  def step(i, slot, carry):
    """Writes page i, whose first chunk is here; returns that of the next page."""
    page, next_page, codes = carry
    far_page = prefetch(i + 2)
    for chunk in range(scales):
      following = chunk_of(page, chunk + 1)
      write(page, length - i * PAGE, slot, chunk, codes)
      codes = following
    following = chunk_of(next_page, 0)
    for high in range(2):
      columns = pl.ds(LATENT + high * words, words)
      k_s[slot, :, columns] = _half(codes, bool(high))
    plgpu.commit_smem()
    plgpu.barrier_arrive(full.at[slot])
    return next_page, far_page, following

  @pl.when(first < last)
  def _():
    page, next_page = prefetch(first), prefetch(first + 1)
    ring(first, last, step, empty, (page, next_page, chunk_of(page, 0)))
