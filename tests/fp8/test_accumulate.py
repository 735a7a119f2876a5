"""Promotion and limited accumulation."""

from fractions import Fraction

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from dsv3_jax.fp8 import accumulate
from tests import quick
from tests.oracles import tensor_core

E4M3 = ml_dtypes.float8_e4m3fn


def _codes(rng, *shape, wide=True):
  """E4M3 values; `wide` draws every code, so that exponents differ as much as they can."""
  if wide:
    x = rng.integers(0, 256, shape).astype(np.uint8).view(E4M3).astype(np.float32)
    return np.where(np.isnan(x), 0, x)
  return (64 * rng.normal(size=shape)).astype(E4M3).astype(np.float32)


def _emulate(a, b, **kwargs):
  return np.asarray(quick.jit(lambda a, b: accumulate.matmul(a, b, **kwargs))(a, b))


@pytest.mark.parametrize("truncation", accumulate.TRUNCATIONS)
@pytest.mark.parametrize("bits, interval", [(14, 128), (14, 64), (8, 0), (18, 96), (22, 32),
                                            (27, 0), (36, 128)])
@pytest.mark.parametrize("wide", [True, False])
def test_bit_for_bit(bits, interval, truncation, wide):
  """Oracle: the same steps in exact rational arithmetic, product by product."""
  rng = np.random.default_rng(bits)
  M, N, K = 3, 5, 200  # K ends within a step and within an interval
  a, b = _codes(rng, M, K, wide=wide), _codes(rng, K, N, wide=wide)
  found = _emulate(a, b, bits=bits, interval=interval, truncation=truncation)
  expected = np.array([[tensor_core.dot(a[m], b[:, n], interval or K, bits, truncation)
                        for n in range(N)] for m in range(M)], np.float32)
  np.testing.assert_array_equal(found, expected)


def test_scales_at_promotion():
  """Oracle: rational arithmetic, powers of two as scales, so that their order cannot matter."""
  rng = np.random.default_rng(0)
  M, N, K = 5, 260, 300
  a, b = _codes(rng, M, K, wide=False), _codes(rng, K, N, wide=False)
  scale_a = (2.0**rng.integers(-9, 9, (M, 3))).astype(np.float32)
  scale_b = (2.0**rng.integers(-9, 9, (3, 3))).astype(np.float32)
  found = _emulate(a, b, bits=14, scale_a=scale_a, scale_b=scale_b)
  for m, n in ((0, 0), (4, 127), (2, 128), (1, 259)):
    scale_K = np.repeat(scale_a[m] * scale_b[:, n // 128], 128)[:K]
    assert found[m, n] == tensor_core.dot(a[m], b[:, n], 128, 14, "zero", scale_K)


@pytest.mark.parametrize("bits, tolerance", [(0, 1e-6), (30, 1e-6), (14, 3e-3)])
@pytest.mark.parametrize("interval, tile_a, tile_b", [
    (128, (1, 128), (128, 128)), (32, (1, 128), (128, 1)), (256, (1, 128), (128, 128)),
    (96, (2, 64), (64, 32)), (0, (1, 128), (128, 128)), (128, (0, 0), (1000, 1000))])
def test_any_interval_over_any_tile(bits, tolerance, interval, tile_a, tile_b):
  """Oracle: numpy float64 on the dequantized operands."""
  rng = np.random.default_rng(1)
  M, N, K = 6, 150, 400
  a, b = _codes(rng, M, K, wide=False), _codes(rng, K, N, wide=False)
  whole_a, whole_b, scales = a.astype(np.float64), b.astype(np.float64), {}
  for name, tile, shape in (("a", tile_a, (M, K)), ("b", tile_b, (K, N))):
    tile = tuple(t or n for t, n in zip(tile, shape))
    scale = rng.uniform(0.5, 2, [-(-n // t) for n, t in zip(shape, tile)]).astype(np.float32)
    index = np.ix_(*(np.arange(n) // t for n, t in zip(shape, tile)))
    scales[f"scale_{name}"] = scale
    if name == "a":
      whole_a = whole_a * scale[index]
    else:
      whole_b = whole_b * scale[index]
  found = _emulate(a, b, bits=bits, interval=interval, tile_a=tile_a, tile_b=tile_b, **scales)
  expected = whole_a @ whole_b
  assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()


def test_one_interval_is_one_dot():
  """Law: without promotion and with fp32 sums it is a matmul."""
  rng = np.random.default_rng(2)
  a, b = _codes(rng, 7, 320), _codes(rng, 320, 9)
  plain = np.asarray(jnp.dot(a, b, precision="highest"))
  for interval in (0, 320, 4096):
    np.testing.assert_array_equal(_emulate(a, b, interval=interval), plain)


def test_widths_that_add_exactly():
  """Law: 36 bits add any 32 E4M3 products exactly; 35 do not, nor do 34 reach the extremes."""
  rng = np.random.default_rng(3)
  a, b = _codes(rng, 64, 32), _codes(rng, 32, 64)
  exact = a.astype(np.float64) @ b.astype(np.float64)
  cut = np.trunc(exact / (unit := 2.0**(np.floor(np.log2(np.abs(exact))) - 23))) * unit
  np.testing.assert_array_equal(_emulate(a, b, bits=36), cut)
  # 448 * 448 beside 2^-9 * 2^-9, and the large one taken away again.
  a, b = np.zeros((1, 64), np.float32), np.zeros((64, 1), np.float32)
  a[0, [0, 1, 2]], b[[0, 1, 2], 0] = (448, 448, 2.0**-9), (448, -448, 2.0**-9)
  assert _emulate(a, b, bits=36)[0, 0] == 2.0**-18
  assert _emulate(a, b, bits=35)[0, 0] == 0
  a[0, [0, 1]] = 240  # of 8 bits without E4M3's extended top exponent; 240 * 448 < 2^17
  assert _emulate(a, b, bits=35)[0, 0] == 2.0**-18
  b[[0, 1], 0] = 240, -240
  assert _emulate(a, b, bits=34)[0, 0] == 2.0**-18
  assert _emulate(a, b, bits=33)[0, 0] == 0


@pytest.mark.parametrize("truncation", accumulate.TRUNCATIONS)
def test_one_step_of_any_width(truncation):
  """Oracle: rational arithmetic; the width is an argument of the compiled function."""
  rng = np.random.default_rng(4)
  a, b = _codes(rng, 20, 32), _codes(rng, 20, 32)
  for bits in (8, 14, 18, 19, 30, 36):
    found = np.asarray(accumulate.sum_of_step(a, b, bits, truncation))
    expected = [float(tensor_core.step(
        Fraction(0), [Fraction(float(x)) * Fraction(float(y)) for x, y in zip(a[s], b[s])], bits,
        truncation, 24)) for s in range(20)]
    np.testing.assert_array_equal(found, np.array(expected, np.float32))


def test_not_finite_is_never_hidden():
  """Oracle: numpy; integers of the emulation know neither NaN nor infinity."""
  rng = np.random.default_rng(5)
  a, b = _codes(rng, 4, 256, wide=False), _codes(rng, 256, 4, wide=False)
  a[1, 200], b[3, 2] = np.nan, np.inf
  found = _emulate(a, b, bits=14)
  assert np.isnan(found[1]).all() and np.isinf(found[[0, 2, 3], 2]).all()
  assert np.isfinite(found[[0, 2, 3]][:, [0, 1, 3]]).all()


@pytest.mark.parametrize("bits", [0, 14])
def test_under_vmap_and_in_many_chunks(bits):
  """Law: a batch is its members, and chunks of rows do not show."""
  rng = np.random.default_rng(6)
  a, b = _codes(rng, 2, 150, 64, wide=False), _codes(rng, 2, 64, 700, wide=False)
  run = lambda a, b: accumulate.matmul(a, b, bits=bits, interval=64)
  found = np.asarray(quick.jit(jax.vmap(run))(a, b))
  one_row = quick.jit(run)
  for g, m in ((0, 0), (1, 46), (1, 149)):
    row = np.asarray(one_row(a[g, m:m + 1], b[g]))[0]
    tolerance = 0 if bits else 1e-6 * np.abs(row).max()
    np.testing.assert_allclose(found[g, m], row, rtol=0, atol=tolerance)


def test_memory_stays_below_products():
  """Law: no buffer of M * N * (K / interval) or more appears in the compiled program."""
  M, N, K = 512, 512, 4096
  shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)
  compiled = jax.jit(lambda a, b: accumulate.matmul(a, b, bits=14)).lower(
      shape(M, K), shape(K, N)).compile()
  assert compiled.memory_analysis().temp_size_in_bytes < 4 * (3 * M * K + 2 * K * N + 8 * M * N)


@pytest.mark.parametrize("kwargs, says", [
    (dict(interval=100), "multiple of 32"), (dict(bits=3), "from 4 to 36"),
    (dict(bits=40), "from 4 to 36"), (dict(truncation="up"), "zero, floor"),
    (dict(scale_a=jnp.ones((4, 3))), r"scale_a has shape \(4, 3\); \(4, 2\)")])
def test_errors(kwargs, says):
  """Oracle: the message names the value and the fix."""
  with pytest.raises(ValueError, match=says):
    accumulate.matmul(jnp.ones((4, 256)), jnp.ones((256, 4)), **kwargs)


@pytest.mark.parametrize("bits", [14, 30])
def test_pieces_added_one_after_another(bits):
  """Law: a register that goes on over pieces of K holds the matmul of the whole, bit for bit."""
  rng = np.random.default_rng(bits)
  a, b = _codes(rng, 6, 160, wide=True), _codes(rng, 160, 9, wide=True)
  add = quick.jit(lambda r, a, b: accumulate.add(r, a, b, bits=bits))
  register = np.zeros((6, 9), np.float32)
  for k0, k1 in ((0, 32), (32, 128), (128, 160)):
    register = add(register, a[:, k0:k1], b[k0:k1])
  np.testing.assert_array_equal(register, _emulate(a, b, bits=bits, interval=0))
  assert np.abs(register - np.asarray(a, np.float64) @ np.asarray(b, np.float64)).max() > 0
  a = np.array(a, np.float32)
  a[2, 3] = np.nan
  assert np.isnan(add(register, a[:, :32], b[:32])).any(1).tolist() == [False, False, True] + [
      False] * 3


def test_add_wants_bits():
  """Oracle: the message names the value and the fix."""
  with pytest.raises(ValueError, match="bits=0 is an fp32 sum"):
    accumulate.add(jnp.zeros((2, 2)), jnp.ones((2, 32)), jnp.ones((32, 2)), bits=0)
