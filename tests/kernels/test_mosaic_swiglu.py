"""Fused SwiGLU kernels in the interpreter, with race detection.

Oracle of all values: numpy float64 of the inputs as they are read, and of its derivative; codes and
scales against the values that they stand for, to half a step of e4m3.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.fp8 import quantize as model
from pallas_kernels import reference
from pallas_kernels.mosaic import compat, swiglu
from tests.kernels.test_mosaic_quantize import exact, oracle
from tests.quick import jit

pytestmark = [pytest.mark.timeout(60), pytest.mark.usefixtures("no_race")]
tails = pytest.mark.skipif(not compat.TAILS, reason="this jax's interpreter does not clip copies")


def inputs(rng, M, F, kept=False):
  """gate, up, dh and weights, with rows of very different size; gate and up also as codes."""
  def draw(size):
    return jnp.asarray(rng.normal(size=(M, F)) * size, jnp.bfloat16)

  sizes = jnp.asarray(np.exp2(rng.integers(-8, 8, size=(M, 1))), jnp.bfloat16)
  gate, up = draw(4), draw(1) * sizes
  dh, weight = draw(1e-6), jnp.asarray(rng.uniform(0.01, 2.5, size=M), jnp.float32)
  if not kept:
    return (gate, up, dh, weight), (exact(gate), exact(up), exact(dh), exact(weight))
  gate, up = (model.quantize(x, tile=(1, 128)) for x in (gate, up))
  values = exact(gate.dequantize()), exact(up.dequantize()), exact(dh), exact(weight)
  return ((gate.codes, gate.scales.T), (up.codes, up.scales.T), dh, weight), values


def derivatives(gate, up, dh, weight):
  """dgate, dup, h, dweight in float64."""
  s = 1 / (1 + np.exp(-gate))
  a, w = gate * s, weight[:, None]
  return dh * w * up * (s + a * (1 - s)), dh * w * a, w * a * up, (dh * a * up).sum(1)


def assert_quantized(got, x, floor, turned=False, pow2=False):
  """Scales to 2e-6 (dgate is some sixteen fp32 roundings of 6e-8) and codes to half their step.

  A hundredth of a step more is for fp32 where the derivative of silu passes through zero.
  """
  codes, scales = (np.asarray(a) for a in got)
  M, F = x.shape
  x = np.pad(x, ((0, -M % 128), (0, -F % 128)))
  _, expected = oracle(x, (128, 1) if turned else (1, 128), pow2, floor)
  if turned:
    codes, expected = codes.T, expected[:, :F]
    spread = np.repeat(expected, 128, 0)
  else:
    expected = expected.T[:, :M]
    spread = np.repeat(expected.T, 128, 1)[:, :F]
  assert scales.shape == expected.shape and scales.dtype == np.float32
  np.testing.assert_allclose(scales, expected, rtol=0 if pow2 else 2e-6)
  x = x[:codes.shape[0], :codes.shape[1]]
  y = x / spread
  step = np.exp2(np.floor(np.log2(np.maximum(np.abs(y), 2.0**-6))) - 3)
  assert codes.shape == x.shape
  steps = np.abs(codes.astype(np.float64) - y) / step
  assert steps.max() < 0.505


@pytest.mark.parametrize("pow2, weighted", [(False, True), (True, False)])
def test_rows(rng, pow2, weighted):
  """Oracle: numpy float64; seven tiles and three CTAs."""
  (gate, up, _, weight), values = inputs(rng, 448, 128)
  run = functools.partial(swiglu.swiglu_rows, pow2=pow2, num_sms=1, interpret=True)
  got = jit(run)(gate, up, *([weight] if weighted else []))
  h = derivatives(*values[:3], values[3] if weighted else np.ones(448))[2]
  # Next to a power of two the scale may be the next one; no row here is that close to it.
  assert_quantized(got, h, 1e-4, pow2=pow2)


@pytest.mark.parametrize("kept, weighted, pow2", [(False, True, False), (True, True, False),
                                                  (False, False, True)])
def test_backward(rng, kept, weighted, pow2):
  """Oracle: numpy float64; from bf16, and from the codes that the forward pass kept."""
  args, values = inputs(rng, 384, 256, kept)
  if not weighted:
    args, values = args[:3], (*values[:3], np.ones(384))
  run = functools.partial(swiglu.swiglu_backward, pow2=pow2, num_sms=1, interpret=True)
  dgate, dup, h, dweight = jit(run)(*args)
  dgate_64, dup_64, h_64, dweight_64 = derivatives(*values)
  for (rows, columns), x in ((dgate, dgate_64), (dup, dup_64)):
    assert_quantized(rows, x, 1e-30, pow2=pow2)
    assert_quantized(columns, x, 1e-30, turned=True, pow2=pow2)
  assert_quantized(h, h_64, 1e-4, turned=True, pow2=pow2)
  if weighted:
    np.testing.assert_allclose(dweight, dweight_64, rtol=1e-4, atol=1e-6 * np.abs(dweight_64).max())
  else:
    assert dweight is None


def test_derivatives_are_those_of_the_definition(rng):
  """Oracle: jax's own derivative of `reference.swiglu`, against the formulas of these tests."""
  args, values = inputs(rng, 8, 32)
  gate, up, dh, weight = (x.astype(jnp.float32) for x in args)
  h, pull = jax.vjp(reference.swiglu, gate, up, weight)
  dgate, dup, dweight = pull(dh)
  for a, b in zip((dgate, dup, h, dweight), derivatives(*values), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(b).max())


def test_large_and_bad_inputs(rng):
  """Law: silu(-1e30) is zero and not NaN; what is not finite spoils its own tiles alone."""
  (gate, up, _, weight), values = inputs(rng, 128, 128)
  gate = gate.at[0].set(-1e30).at[5, 7].set(jnp.nan)
  up = up.at[9, 7].set(jnp.inf)
  run = functools.partial(swiglu.swiglu_rows, num_sms=1, interpret=True)
  codes, scales = jit(run)(gate, up, weight)
  assert not np.asarray(codes[0]).astype(np.float32).any()
  assert np.argwhere(~np.isfinite(np.asarray(scales)))[:, 1].tolist() == [5, 9]


@tails
def test_ragged_edges(rng):
  """Oracle: numpy float64; an odd number of rows, columns that end in the middle of a tile."""
  args, values = inputs(rng, 77, 160)
  dgate_64, dup_64, h_64, dweight_64 = derivatives(*values)
  rows = functools.partial(swiglu.swiglu_rows, num_sms=1, interpret=True)
  assert_quantized(jit(rows)(args[0], args[1], args[3]), h_64, 1e-4)
  run = functools.partial(swiglu.swiglu_backward, num_sms=1, interpret=True)
  dgate, dup, h, dweight = jit(run)(*args)
  assert_quantized(dgate[0], dgate_64, 1e-30)
  assert_quantized(dup[1], dup_64, 1e-30, turned=True)
  assert_quantized(h, h_64, 1e-4, turned=True)
  np.testing.assert_allclose(dweight, dweight_64, rtol=1e-4, atol=1e-6 * np.abs(dweight_64).max())


def test_refusals():
  """Law: shapes that disagree are errors; what copies cannot address others should take."""
  x, w = jnp.ones((128, 128), jnp.bfloat16), jnp.ones((128,))
  with pytest.raises(ValueError, match="one shape"):
    swiglu.swiglu_rows(x, x[:64])
  with pytest.raises(ValueError, match=r"float32\[128\]"):
    swiglu.swiglu_rows(x, x, w[:64])
  with pytest.raises(NotImplementedError):
    swiglu.swiglu_backward(x.astype(jnp.float32), x, x)
