"""Small floating-point formats and power-of-two scales, exact to the bit on every backend.

    E4M3   1-4-3  largest 448, no infinity            all tensors of the report's recipe
    E5M2   1-5-2  largest 57344, IEEE-like            gradients of the older "hybrid" recipes
    E5M6   1-5-6  largest 65024, IEEE-like, 12 bits   the report's input of the output projection
    UE8M0  8-bit exponents, 2^(code - 127), 255: NaN  power-of-two scales

Encoding and decoding are integer arithmetic on the bits of an fp32. That is quicker than the
compiler's own conversions on a CPU, does not depend on how a backend treats subnormal numbers, and
lets 12-bit values exist at all. The result equals a conversion that rounds to nearest even (ties by
the last kept bit), as `ml_dtypes` does it.

E5M6 is stored packed: the low bytes of all values of a row, then the high nibbles of the values j
and j + h in byte h_j, where h is half the row (rounded up): two values in three bytes, and both
directions work on whole contiguous runs.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


@dataclasses.dataclass(frozen=True)
class Format:
  """A sign, `exponent` bits with bias 2^(exponent-1) - 1, and `mantissa` bits.

  Attributes:
    name: as configs spell it.
    exponent, mantissa: bits of each.
    finite: there is no infinity, and only an all-ones code is NaN (the "fn" of e4m3fn).
    dtype: numpy dtype of the stored codes; uint8 for packed ones.
  """

  name: str
  exponent: int
  mantissa: int
  finite: bool
  dtype: str

  @property
  def bits(self) -> int:
    return 1 + self.exponent + self.mantissa

  @property
  def packed(self) -> bool:
    """Two codes in three bytes; otherwise one a byte."""
    return self.bits == 12

  @property
  def bias(self) -> int:
    return 2 ** (self.exponent - 1) - 1

  @property
  def largest(self) -> int:
    """Magnitude bits of the largest finite value."""
    ones = 2 ** (self.bits - 1) - 1
    return ones - 1 if self.finite else (2**self.exponent - 1 << self.mantissa) - 1

  @property
  def nan(self) -> int:
    """Magnitude bits of NaN."""
    ones = 2 ** (self.bits - 1) - 1
    return ones if self.finite else self.largest + 1 + (1 << self.mantissa - 1)

  @property
  def max(self) -> float:
    """The largest finite value."""
    exponent, fraction = divmod(self.largest, 2**self.mantissa)
    return 2.0 ** (exponent - self.bias) * (1 + fraction / 2**self.mantissa)

  @property
  def tiny(self) -> float:
    """The smallest normal value."""
    return 2.0 ** (1 - self.bias)

  def width(self, values: int) -> int:
    """Bytes that a row of `values` takes."""
    return 3 * -(-values // 2) if self.packed else values


E4M3 = Format("e4m3", 4, 3, True, "float8_e4m3fn")
E5M2 = Format("e5m2", 5, 2, False, "float8_e5m2")
E5M6 = Format("e5m6", 5, 6, False, "uint8")
FORMATS = {f.name: f for f in (E4M3, E5M2, E5M6)}


def get(name: str) -> Format:
  """A format by its name; ValueError lists those that exist."""
  if name not in FORMATS:
    raise ValueError(f"no format {name!r}; choose from {', '.join(FORMATS)}")
  return FORMATS[name]


def bits(x: jax.Array) -> jax.Array:
  """The bits of an fp32 array as int32."""
  return lax.bitcast_convert_type(x, jnp.int32)


def from_bits(x: jax.Array) -> jax.Array:
  return lax.bitcast_convert_type(x, jnp.float32)


def _bits_of(value: float) -> int:
  return int(np.float32(value).view(np.int32))


def encode(x: jax.Array, format: Format, noise: jax.Array | None = None) -> jax.Array:
  """Codes of fp32 values, saturating at the largest finite value; NaN and inf become NaN.

  Args:
    x: fp32, last axis = the rows that packing works on.
    format: target.
    noise: uint32 of the shape of `x`: rounds up with the probability of the distance (stochastic
      rounding) instead of to nearest even.

  Returns:
    Codes in `format.dtype`, last axis `format.width(n)`.
  """
  cut = 23 - format.mantissa  # fp32 mantissa bits that go
  magnitude = bits(x) & 0x7FFFFFFF
  if noise is None:
    up = (1 << cut - 1) - 1 + (magnitude >> cut & 1)
  else:
    up = (noise >> 32 - cut).astype(jnp.int32)
  # No overflow: the magnitude is at most 0x7FFFFFFF, and NaN is put in below.
  normal = (jnp.minimum(magnitude, 0x7F800000) + up >> cut) - (127 - format.bias << format.mantissa)
  # Below the smallest normal value all codes are multiples of one step. Adding the power of two
  # whose spacing that step is makes the adder itself round to it, ties to even.
  step = 2.0 ** (1 - format.bias - format.mantissa)
  if noise is None:
    anchor = step * 2**23
    small = bits(from_bits(magnitude) + np.float32(anchor)) - _bits_of(anchor)
  else:
    part = (noise >> 9).astype(jnp.float32) * np.float32(2.0**-23)
    small = jnp.floor(jnp.minimum(from_bits(magnitude), np.float32(format.tiny)) *
                      np.float32(1 / step) + part).astype(jnp.int32)
  code = jnp.where(magnitude < _bits_of(format.tiny), small, normal)
  code = jnp.minimum(code, format.largest)
  code = jnp.where(magnitude >= 0x7F800000, format.nan, code)
  sign = bits(x) >> 31 & 1
  code = code | sign << format.bits - 1
  if format.packed:
    return pack(code)
  return lax.bitcast_convert_type(code.astype(jnp.uint8), jnp.dtype(format.dtype))


def decode(codes: jax.Array, format: Format, values: int) -> jax.Array:
  """fp32 values of codes, exactly; `values` is the length of the last axis."""
  if format.packed:
    code = unpack(codes, values)
  else:
    code = lax.bitcast_convert_type(codes, jnp.uint8).astype(jnp.int32)
  magnitude = code & 2 ** (format.bits - 1) - 1
  normal = from_bits(magnitude + (127 - format.bias << format.mantissa) << 23 - format.mantissa)
  step = 2.0 ** (1 - format.bias - format.mantissa)
  small = magnitude.astype(jnp.float32) * np.float32(step)
  value = jnp.where(magnitude < 1 << format.mantissa, small, normal)
  value = jnp.where(magnitude > format.largest, _special(magnitude, format), value)
  sign = code >> format.bits - 1 << 31
  return from_bits(bits(value) | sign)


def _special(magnitude: jax.Array, format: Format) -> jax.Array:
  """NaN, or the infinity of formats that have one."""
  nan = np.float32(np.nan)
  if format.finite:
    return jnp.full(magnitude.shape, nan)
  return jnp.where(magnitude == format.largest + 1, np.float32(np.inf), nan)


def pack(code: jax.Array) -> jax.Array:
  """12-bit codes [..., n] (int32) as bytes [..., 3 ceil(n/2)] uint8; see the module docstring."""
  code = jnp.pad(code, [(0, 0)] * (code.ndim - 1) + [(0, code.shape[-1] % 2)])
  half = code.shape[-1] // 2
  high = code >> 8
  nibbles = high[..., :half] | high[..., half:] << 4
  return jnp.concatenate([(code & 0xFF).astype(jnp.uint8), nibbles.astype(jnp.uint8)], axis=-1)


def unpack(packed: jax.Array, values: int) -> jax.Array:
  """Inverse of `pack`, int32 [..., values]."""
  half = -(-values // 2)
  low, nibbles = packed[..., :2 * half].astype(jnp.int32), packed[..., 2 * half:].astype(jnp.int32)
  high = jnp.concatenate([nibbles & 15, nibbles >> 4], axis=-1)
  return (low | high << 8)[..., :values]


# --- power-of-two scales ------------------------------------------------------------------------


def encode_pow2(scale: jax.Array) -> jax.Array:
  """The smallest powers of two not below `scale` (positive fp32), as UE8M0 bytes; NaN for the rest.

  2^ceil(log2(s)), by the exponent's bits: no logarithm, hence no rounding.
  """
  b = bits(scale)
  exponent = (b >> 23) + ((b & 0x7FFFFF) != 0)
  return jnp.where(exponent >= 255, 255, jnp.maximum(exponent, 1)).astype(jnp.uint8)


def decode_pow2(codes: jax.Array) -> jax.Array:
  """fp32 of UE8M0 bytes; code 0, 2^-127, is a subnormal fp32 and never written by `encode_pow2`."""
  code = codes.astype(jnp.int32)
  value = jnp.where(code == 0, np.float32(2.0**-127), from_bits(code << 23))
  return jnp.where(code == 255, np.float32(np.nan), value)
