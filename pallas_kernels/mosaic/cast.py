"""Scales and codes of tiles in registers, as all FP8 quantize kernels compute them.

    amax  = max |x| over the tile, at least `floor`
    scale = amax / 448, or the next power of two not below that
    code  = round(x / scale)

Both divisions are exact to the last bit, as in `reference.quantize`, though the device's own are
not. Divisors are shared, so that with r = 1 / divisor a division costs three instructions: q = x r
is within three units in the last place, and q + (x - q divisor) r, in fused multiply-adds, is the
rounded quotient. For amax / 448 that was checked for every significand; for x / scale it holds as
far as an e4m3 code can tell: always for significands of 8 bits, that is bf16 inputs, while one of
24 bits would have to lie within 2^-43 of a tie between two codes. (Below an amax of 2^-83, where
x - q scale is no longer representable, a code next to a tie may become its neighbour.) Multiplying
by a reciprocal alone, as other kernels do, moves one code in 10^6: so does `exact=False`, for
values that carry larger errors anyway.

NaN and inf are never hidden: the scale of a tile with either is not finite. The maximum of the
device propagates NaN; XLA's on a CPU does not, so the interpreter takes it over bit patterns, which
for magnitudes have the same order and NaN above everything. There, too, XLA would turn a division
by something broadcast into a product with a reciprocal unless it cannot tell that it is broadcast.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic import compat

E4M3 = jnp.float8_e4m3fn
LARGEST = 448.0
ROWS = plgpu.Layout.WGMMA_8BIT  # of tiles as they lie in memory
TURNED = plgpu.Layout.WGMMA  # of tiles transposed on their way into registers


def _bits(x: jax.Array) -> jax.Array:
  return lax.bitcast_convert_type(x, jnp.int32)


def _floats(x: jax.Array) -> jax.Array:
  return lax.bitcast_convert_type(x, jnp.float32)


def _reciprocal(x: jax.Array) -> jax.Array:
  r = 1.0 / x  # the device's approximate one, one unit in the last place off
  return r + r * (1.0 - x * r)


def _divide(x: jax.Array, by, r, interpret: compat.Interpret) -> jax.Array:
  """x / by rounded once, given r = 1 / by."""
  if interpret:
    zero = (_bits(x) & 0x7FFFFFFF) >> 31
    return x / _floats(_bits(jnp.asarray(by, jnp.float32)) + zero)
  q = x * r
  return q + (x - q * by) * r


def amax(x_MK: jax.Array, interpret: compat.Interpret) -> jax.Array:
  """max |x| of each row, fp32; NaN where there is one."""
  if interpret:
    return _floats(jnp.max(_bits(x_MK.astype(jnp.float32)) & 0x7FFFFFFF, axis=1))
  return jnp.max(jnp.abs(x_MK), axis=1).astype(jnp.float32)  # bf16 in pairs: half the instructions


def scales(amax: jax.Array, pow2: bool, floor: float, interpret: compat.Interpret) -> jax.Array:
  """Multipliers of tiles, fp32."""
  amax = jnp.where(amax < np.float32(floor), np.float32(floor), amax)
  found = _divide(amax, LARGEST, np.float32(1 / LARGEST), interpret)
  if not pow2:
    return found
  bits = _bits(found)
  return jnp.where(bits >= 0x7F800000, np.float32(np.nan),
                   _floats((bits + 0x7FFFFF) & 0x7F800000))


def codes(x_MK: jax.Array, scale: jax.Array, exact: bool, interpret: compat.Interpret) -> jax.Array:
  """e4m3 of fp32 `x` under a scale a row, or a scalar one.

  With `exact`, of the rounded quotient; else of x times a reciprocal, which is the same where the
  scale is a power of two.
  """
  def spread(v):
    return lax.broadcast_in_dim(v, x_MK.shape, [0] if v.ndim else [])

  by, r = spread(scale), spread(_reciprocal(scale))
  return (_divide(x_MK, by, r, interpret) if exact else x_MK * r).astype(E4M3)


def quantize(x_MK: jax.Array, pow2: bool, floor: float, interpret: compat.Interpret,
             exact: bool = True) -> tuple[jax.Array, jax.Array]:
  """Codes [M, K] and one scale a row."""
  scale = scales(amax(x_MK, interpret), pow2, floor, interpret)
  return codes(x_MK.astype(jnp.float32), scale, exact and not pow2, interpret), scale


def load(ref, interpret: compat.Interpret) -> jax.Array:
  """A tile as it lies."""
  return compat.load(ref, (Ellipsis,), ROWS, interpret)


def load_vector(ref, interpret: compat.Interpret) -> jax.Array:
  """A number for each row of a tile read by `load`."""
  return compat.load(ref, (Ellipsis,), ROWS.reduce(1), interpret)


def load_turned(ref, interpret: compat.Interpret) -> jax.Array:
  """A 16-bit tile [M, K] as [K, M].

  Read in pairs along K, and pairs exchanged between lanes: a shuffle and two byte permutations for
  four elements, where single elements of shared memory would be four loads with bank conflicts.
  """
  if interpret:
    return ref[...].T
  x = compat.load(ref.T, (Ellipsis,), plgpu.Layout.WGMMA_TRANSPOSED, interpret, optimized=False)
  return plgpu.layout_cast(x, TURNED)


def load_across(ref, interpret: compat.Interpret) -> jax.Array:
  """A number for each column of a tile read by `load_turned`."""
  return compat.load(ref, (Ellipsis,), TURNED.reduce(0), interpret)


def amax_of(parts: list[jax.Array], interpret: compat.Interpret) -> jax.Array:
  """The largest of several vectors of amaxes, a scalar."""
  if interpret:
    return _floats(jnp.max(jnp.stack([_bits(p) for p in parts])))
  found = parts[0]
  for part in parts[1:]:
    found = jnp.maximum(found, part)
  return jnp.max(found)
