"""Formats: codes, packing, power-of-two scales."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_jax.fp8 import formats
from dsv3_jax.fp8.formats import E4M3, E5M2, E5M6
from tests.fp8 import oracle
from tests.quick import jit

PACK, UNPACK = jax.jit(formats.pack), jax.jit(formats.unpack, static_argnums=1)
ENCODE_POW2, DECODE_POW2 = jax.jit(formats.encode_pow2), jax.jit(formats.decode_pow2)


def fp32_patterns(count=4096):
  """fp32 numbers of every exponent, with both signs, and the specials."""
  rng = np.random.default_rng(0)
  bits = rng.integers(0, 2**32, count, dtype=np.uint64).astype(np.uint32)
  special = np.float32([0, -0.0, np.inf, -np.inf, np.nan, 1e-45, -1e-40, 3.4e38, -3.4e38])
  return np.concatenate([bits.view(np.float32), special])


def midpoints(format):
  """All values of a format, what lies halfway between two, and the neighbours of that."""
  values = (oracle.e5m6_values() if format is E5M6 else
            np.arange(format.largest + 1, dtype=np.uint8).view(format.dtype).astype(np.float64))
  middle = ((values[1:] + values[:-1]) / 2).astype(np.float32)
  found = np.concatenate([values.astype(np.float32), middle, np.nextafter(middle, np.float32(0)),
                          np.nextafter(middle, np.float32(np.inf))])
  return np.concatenate([found, -found])


def rounded(x, format):
  return np.asarray(jit(lambda x: formats.decode(
      formats.encode(x, format), format, x.size))(jnp.asarray(x)))


@pytest.mark.parametrize("format", [E4M3, E5M2], ids=lambda f: f.name)
def test_codes_equal_ml_dtypes(format):
  """Oracle: ml_dtypes' conversion of numbers in range, bit for bit, signs of zero included."""
  x = np.concatenate([midpoints(format), fp32_patterns()])
  x = x[np.abs(x) <= format.max]
  codes = np.asarray(jit(lambda x: formats.encode(x, format))(jnp.asarray(x)))
  np.testing.assert_array_equal(codes.view(np.uint8), x.astype(format.dtype).view(np.uint8))


@pytest.mark.parametrize("format", [E4M3, E5M2], ids=lambda f: f.name)
def test_all_codes_decode_as_ml_dtypes(format):
  """Oracle: ml_dtypes' value of each of the 256 codes; infinity and NaN included."""
  codes = np.arange(256, dtype=np.uint8).view(format.dtype)
  found = jit(lambda c: formats.decode(c, format, 256))(jnp.asarray(codes))
  want = codes.astype(np.float32)
  np.testing.assert_array_equal(np.asarray(found), want)
  np.testing.assert_array_equal(np.signbit(found), np.signbit(want))


def test_e5m6_rounds_to_the_nearest_of_its_values():
  """Oracle: nearest element of the list of all values, ties to even, in float64."""
  x = np.concatenate([midpoints(E5M6), fp32_patterns()])
  x = x[np.isfinite(x)]
  found, want = rounded(x, E5M6), oracle.round_e5m6(x)
  np.testing.assert_array_equal(found, want.astype(np.float32))
  np.testing.assert_array_equal(np.signbit(found), np.signbit(x))


@pytest.mark.parametrize("format", [E4M3, E5M2, E5M6], ids=lambda f: f.name)
def test_out_of_range_saturates_and_specials_are_nan(format):
  """Oracle: the contract: finite numbers saturate, NaN and both infinities become NaN."""
  x = np.float32([1e30, -1e30, format.max * 1.5, np.inf, -np.inf, np.nan])
  want = np.float32([format.max, -format.max, format.max, np.nan, np.nan, np.nan])
  np.testing.assert_array_equal(rounded(x, format), want)


@settings(max_examples=30, deadline=None)
@given(st.sampled_from([1, 2, 7, 64]), st.randoms(use_true_random=False))
def test_packing_keeps_every_code(n, random):
  """Oracle: the inverse; and 12 bits a value in bytes."""
  codes = np.array([[random.getrandbits(12) for _ in range(n)] for _ in range(3)], np.int32)
  packed = PACK(codes)
  assert packed.shape == (3, 3 * -(-n // 2)) and packed.dtype == jnp.uint8
  np.testing.assert_array_equal(UNPACK(packed, n), codes)


@settings(max_examples=100, deadline=None)
@given(st.floats(2.0**-126, 2.0**127, width=32))
def test_pow2_is_the_next_power_of_two(scale):
  """Oracle: 2^ceil(log2 s) of numpy in float64, and ml_dtypes' reading of the byte."""
  code = np.asarray(ENCODE_POW2(np.float32(scale)))
  value = float(DECODE_POW2(code))
  assert value / 2 < scale <= value and np.log2(value) % 1 == 0
  assert code.view(ml_dtypes.float8_e8m0fnu).astype(np.float32) == value


def test_pow2_of_what_is_no_number():
  """Oracle: the UE8M0 definition: 255 is NaN; beyond 2^127 there is nothing."""
  found = formats.encode_pow2(jnp.float32([np.nan, np.inf, 3e38, 2.0**127]))
  np.testing.assert_array_equal(found, [255, 255, 255, 254])
  assert np.isnan(formats.decode_pow2(jnp.uint8(255)))


@pytest.mark.parametrize("format", [E4M3, E5M2, E5M6], ids=lambda f: f.name)
def test_stochastic_rounding_is_unbiased_and_never_leaves_the_neighbours(format):
  """Oracle: expectation: the mean of n draws is within 5 sigma of the number itself."""
  n = 20_000
  steps = np.float32([1.03, -1.7, 300.3, 0.4 * format.tiny, 1.3 * format.tiny, format.max])
  noise = jax.random.bits(jax.random.key(0), (n, steps.size), jnp.uint32)
  x = jnp.broadcast_to(steps, noise.shape)
  drawn = np.asarray(jit(lambda x, noise: formats.decode(
      formats.encode(x, format, noise), format, steps.size))(x, noise))
  gap = np.abs(steps) * 2.0**-format.mantissa + format.tiny * 2.0**-format.mantissa
  assert np.all(np.abs(drawn - steps) <= gap)
  assert np.all(np.abs(drawn.mean(0) - steps) <= 5 * gap / 2 / n**0.5)
  assert all(len(np.unique(drawn[:, i])) == 2 for i in range(steps.size - 1))


def test_unknown_format():
  """Oracle: the message names what exists."""
  with pytest.raises(ValueError, match="e4m3, e5m2, e5m6"):
    formats.get("e3m4")
