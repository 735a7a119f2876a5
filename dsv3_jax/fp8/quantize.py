"""Quantizers: any tile, fp32 or power-of-two scales, online or given amax.

    amax  = max |x| over the tile, at least `floor`      (released code: 1e-4)
    scale = amax / max of the format, or the next power of two above that
    code  = round(x / scale)

The divisions are real ones, rounded once (see `_divide`): with products of rounded reciprocals,
which XLA would put in their place, half of all scales differ in the last bit, and codes next to a
tie become their neighbours. The maximum is taken over bit patterns: for magnitudes the order is
the same, NaN is above everything, and XLA's own maximum on a CPU loses NaN.

NaN and inf are never hidden. A tile that contains either has a scale that is not finite, so every
element of it comes back as NaN: what one bad number did is visible wherever the tile is used. With
a given amax the scale does not see the data; then the bad elements alone come back as NaN, and
finite values beyond the range saturate.

A ragged last tile is filled up with zeros, which never changes an amax.
"""

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax.fp8 import formats
from dsv3_jax.fp8.formats import Format
from dsv3_jax.fp8.qtensor import QTensor, Tile, join, scales_shape, split

FLOOR = 1e-4  # smallest amax of the released quantizer
SCALES = ("fp32", "pow2")


def _divide(x: jax.Array, by: jax.Array | float) -> jax.Array:
  """x / by rounded once.

  The divisor is made to differ from element to element as far as XLA can tell, for it turns a
  division by a constant or by something broadcast into a product with a rounded reciprocal.
  """
  by = formats.bits(jnp.asarray(by, jnp.float32))
  zero = (formats.bits(x) & 0x7FFFFFFF) >> 31
  return x / formats.from_bits(by + zero)


def amax(x: jax.Array, tile: Tile) -> jax.Array:
  """max |x| over each tile, fp32; NaN where a tile has one.

  Args:
    x: any float dtype; its trailing axes are tiled.
    tile: see `QTensor`.
  """
  axes = tuple(range(x.ndim - len(tile) + 1, x.ndim + len(tile), 2))
  magnitude = split(formats.bits(x.astype(jnp.float32)) & 0x7FFFFFFF, tile)
  # Halving by slices is elementwise, which XLA vectorizes; a reduction of integers along the last
  # axis it does not (measured on a CPU: 5 ms against 30 ms for 29 million elements).
  for _ in range(3):
    size = magnitude.shape[-1]
    if size >= 16 and size % 2 == 0:
      magnitude = jnp.maximum(magnitude[..., :size // 2], magnitude[..., size // 2:])
  return formats.from_bits(jnp.max(magnitude, axis=axes, initial=0))


def scales(amax: jax.Array, format: Format, scale: str = "fp32", floor: float = FLOOR) -> jax.Array:
  """Multipliers of tiles whose largest magnitude is `amax`: fp32, or UE8M0 bytes for "pow2"."""
  if scale not in SCALES:
    raise ValueError(f"scale={scale!r} must be one of {', '.join(SCALES)}")
  if not floor >= 1e-30:
    raise ValueError(f"floor={floor} must be at least 1e-30, so that no scale is subnormal")
  amax = amax.astype(jnp.float32)
  found = _divide(jnp.where(amax < np.float32(floor), np.float32(floor), amax), format.max)
  return formats.encode_pow2(found) if scale == "pow2" else found


def full_tile(x: jax.Array, tile: Tile | None) -> Tile:
  """The tile, checked; None means one scale for the trailing two axes (one axis of a vector)."""
  if tile is None:
    tile = (0,) * min(x.ndim, 2)
  if len(tile) > x.ndim or not tile or min(tile) < 0:
    raise ValueError(f"tile {tile} does not fit an array of shape {list(x.shape)}")
  return tuple(int(t) for t in tile)


def quantize(x: jax.Array, format: Format = formats.E4M3, tile: Tile | None = (1, 128), *,
             scale: str = "fp32", floor: float = FLOOR, amax: jax.Array | None = None,
             key: jax.Array | None = None) -> QTensor:
  """Quantizes an array tile by tile.

  Args:
    x: [..., m, n], any float dtype; computed in fp32.
    format: of the codes.
    tile: elements along the trailing axes that share a scale, such as (1, 128), (128, 1) or
      (128, 128); 0 covers an axis whole, None is (0, 0): one scale a matrix.
    scale: "fp32", or "pow2" for scales rounded up to powers of two, stored as UE8M0 bytes.
    floor: least amax.
    amax: largest magnitudes to assume instead of those of `x` (delayed scaling), broadcastable to
      the scales' shape; what exceeds them saturates.
    key: a PRNG key; rounds stochastically.

  Returns:
    A QTensor; see the module docstring for NaN and inf.

  Raises:
    ValueError: a tile that does not fit, an unknown scale, a floor below 1e-30.
  """
  tile = full_tile(x, tile)
  x = x.astype(jnp.float32)
  if amax is None:
    found = scales(_amax(x, tile), format, scale, floor)
  else:
    found = scales(jnp.broadcast_to(amax, scales_shape(x.shape, tile)), format, scale, floor)
  multiplier = formats.decode_pow2(found) if scale == "pow2" else found
  y = join(_divide(split(x, tile), split(multiplier, (1,) * len(tile))), x.shape, tile)
  if amax is not None:  # a quotient may overflow to inf though its numerator is finite
    y = jnp.where(jnp.isfinite(x), jnp.clip(y, -format.max, format.max), np.float32(np.nan))
  noise = None if key is None else jax.random.bits(key, x.shape, jnp.uint32)
  return QTensor(formats.encode(y, format, noise), found, format, tile, x.shape[-1]).validate()


_amax = amax  # the argument of `quantize` has the same name
