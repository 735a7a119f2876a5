"""FP8 quantize kernels in the interpreter, with race detection, bit for bit.

Oracles: numpy and ml_dtypes in float64, and `dsv3_jax.fp8.quantize`, whose semantics the model has.
The interpreter fills outputs and shared memory with NaN before the kernel writes them.
"""

import functools

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from dsv3_jax.fp8 import quantize as model
from pallas_kernels import reference
from pallas_kernels.mosaic import cast, compat, quantize
from tests.quick import jit

pytestmark = [pytest.mark.timeout(60), pytest.mark.usefixtures("no_race")]
tails = pytest.mark.skipif(not compat.TAILS, reason="this jax's interpreter does not clip copies")
E4M3 = ml_dtypes.float8_e4m3fn


def run(kernel, *args, **kwargs):
  """The kernel's results as numpy arrays."""
  kwargs = dict(num_sms=1, interpret=True) | kwargs
  out = jit(functools.partial(kernel, **kwargs))(*args)
  return [np.asarray(x) for x in out]


def oracle(x, tile, pow2=False, floor=1e-4):
  """Codes and scales of a float64 matrix whose sides are multiples of the tile's."""
  (m, k), (tm, tk) = x.shape, tile
  tiles = x.reshape(m // tm, tm, k // tk, tk)
  scales = (np.maximum(np.abs(tiles).max((1, 3)), np.float32(floor)) / 448).astype(np.float32)
  if pow2:
    scales = np.exp2(np.ceil(np.log2(scales.astype(np.float64)))).astype(np.float32)
  codes = (tiles / scales[:, None, :, None].astype(np.float64)).astype(np.float32).astype(E4M3)
  return codes.reshape(m, k), scales


def matrix(rng, *shape, dtype=jnp.bfloat16):
  """Rows and columns of very different size, among them zeros, and what the floor should catch."""
  x = rng.normal(size=shape) * np.exp2(rng.integers(-30, 30, size=(*shape[:-1], 1)))
  x = x * np.exp2(rng.integers(-6, 6, size=shape[-1]))
  x[..., 3, :], x[..., :, 5] = 0, 0
  x[..., :128, :128] *= 1e-12
  return jnp.asarray(x, dtype)


def exact(x):
  return np.asarray(x.astype(jnp.float32)).astype(np.float64)


def assert_same(got, expected):
  """Bit for bit."""
  for a, b in zip(got, expected, strict=True):
    a, b = np.asarray(a), np.asarray(b)
    assert a.shape == b.shape and a.dtype == b.dtype, (a.shape, a.dtype, b.shape, b.dtype)
    bits = np.uint8 if a.itemsize == 1 else np.uint32
    wrong = np.argwhere(a.view(bits) != b.view(bits))
    assert not len(wrong), (len(wrong), wrong[:4], a[tuple(wrong[0])], b[tuple(wrong[0])])


def transposed(codes, scales):
  return codes.T.copy(), scales


# --- each kernel --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, pow2", [("bfloat16", False), ("bfloat16", True),
                                         ("float32", False)])
def test_rows(rng, dtype, pow2):
  """Oracle: numpy float64; four tiles a CTA of the bf16 kernel, more than its ring holds."""
  x = matrix(rng, 512, 256, dtype=dtype)
  codes, scales = oracle(exact(x), (1, 128), pow2)
  assert_same(run(quantize.rows, x, pow2=pow2), (codes, scales.T.copy()))


@pytest.mark.parametrize("pow2", [False, True])
def test_columns(rng, pow2):
  """Oracle: numpy float64."""
  x = matrix(rng, 256, 384)
  assert_same(run(quantize.columns, x, pow2=pow2), transposed(*oracle(exact(x), (128, 1), pow2)))


@pytest.mark.parametrize("pow2, floor", [(False, 1e-4), (True, 1e-30)])
def test_both(rng, pow2, floor):
  """Oracle: numpy float64; gradients have a far lower floor."""
  x = matrix(rng, 384, 256)
  rows, columns = jit(lambda x: quantize.both(x, pow2=pow2, floor=floor, num_sms=1,
                                              interpret=True))(x)
  codes, scales = oracle(exact(x), (1, 128), pow2, floor)
  assert_same(rows, (codes, scales.T.copy()))
  assert_same(columns, transposed(*oracle(exact(x), (128, 1), pow2, floor)))


@pytest.mark.parametrize("dtype, pow2", [("float32", False), ("bfloat16", True)])
def test_blocks_of_a_stack(rng, dtype, pow2):
  """Oracle: numpy float64; a stack of two matrices, in both orientations."""
  w = matrix(rng, 2, 256, 128, dtype=dtype)
  codes_t, codes, scales = run(quantize.blocks, w, pow2=pow2)
  for g in range(2):
    expected, s = oracle(exact(w[g]), (128, 128), pow2)
    assert_same((codes[g], codes_t[g], scales[g]), (expected, expected.T.copy(), s.T.copy()))


@pytest.mark.parametrize("pow2", [False, True])
def test_turn(rng, pow2):
  """Oracle: numpy float64 of codes times scales, rounded to fp32 as the model reads them back."""
  codes, scales = oracle(exact(matrix(rng, 256, 256)), (1, 128), pow2)
  x = (codes.astype(np.float64) * np.repeat(scales, 128, 1)).astype(np.float32)
  assert_same(run(quantize.turn, jnp.asarray(codes), jnp.asarray(scales.T), pow2=pow2),
              transposed(*oracle(x.astype(np.float64), (128, 1), pow2)))


# --- laws ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("pow2", [False, True])
def test_as_the_model_quantizes(rng, pow2):
  """Oracle: `dsv3_jax.fp8.quantize`, bit for bit, and `reference.quantize` to a code step."""
  x = matrix(rng, 128, 256)
  scale = "pow2" if pow2 else "fp32"
  rows, columns = jit(lambda x: quantize.both(x, pow2=pow2, num_sms=1, interpret=True))(x)
  for (codes, scales), tile in (((rows[0], rows[1].T), (1, 128)),
                                ((columns[0].T, columns[1]), (128, 1))):
    q = jit(lambda x, t=tile: model.quantize(x, tile=t, scale=scale))(x)
    assert_same((codes, scales), (q.codes, q.scale_values()))
    defined, defined_scales = jit(lambda x, t=tile: reference.quantize(x, t, pow2=pow2))(x)
    np.testing.assert_allclose(scales, defined_scales, rtol=3e-7)
    assert np.mean(np.asarray(codes) != np.asarray(defined)) < 1e-3


def test_quotients_next_to_ties(rng):
  """Oracle: numpy float64; products with a reciprocal would round 3 in 10^6 of these another way.

  Quotients by 448 / amax of 8-bit significands at every tie between codes, a few ulps around it.
  """
  ties = np.arange(17, 32, 2) * 14.0  # five-bit significands, up to 434
  amax = 448 * (1 + rng.integers(1, 2**23, size=(64, 1)) * 2.0**-23)
  x = np.zeros((64, 128), np.float32)
  x[:, :1] = amax
  x[:, 1:121] = (np.repeat(ties, 15) * (amax / 448)).astype(np.float32).view(np.int32).__add__(
      np.tile(np.arange(-7, 8), 8).astype(np.int32)).view(np.float32)
  codes, scales = oracle(x.astype(np.float64), (1, 128))
  assert_same(run(quantize.rows, jnp.asarray(x)), (codes, scales.T.copy()))


@pytest.mark.parametrize("bad, pow2", [(np.nan, True), (np.inf, False), (-np.inf, True)])
def test_what_is_not_finite_is_not_hidden(rng, bad, pow2):
  """Law: the tiles that hold it, and no others, have scales that are not finite."""
  x = matrix(rng, 128, 256).at[17, 200].set(bad)
  rows, columns = jit(lambda x: quantize.both(x, pow2=pow2, num_sms=1, interpret=True))(x)
  assert np.argwhere(~np.isfinite(rows[1])).tolist() == [[1, 17]]
  assert np.argwhere(~np.isfinite(columns[1])).tolist() == [[0, 200]]
  *_, scales = run(quantize.blocks, x, pow2=pow2)
  assert np.argwhere(~np.isfinite(scales)).tolist() == [[1, 0]]
  _, scales = run(quantize.turn, *(jnp.asarray(a) for a in rows))
  assert np.argwhere(~np.isfinite(scales))[:, 1].tolist() == [*range(128, 256)]


def test_the_number_of_sms_changes_nothing(rng):
  """Law: who computes a tile is not what it holds; also with more CTAs than tiles."""
  x = matrix(rng, 384, 128)
  few, more, most = (run(quantize.columns, x, num_sms=n) for n in (1, 2, 132))
  assert_same(few, more)
  assert_same(few, most)


@tails
@pytest.mark.parametrize("M, K", [(1, 32), (205, 160)])
def test_ragged_edges(rng, M, K):
  """Oracle: `dsv3_jax.fp8.quantize`; `columns` fills its tokens up to whole tiles with zeros."""
  x = jnp.asarray(rng.normal(size=(M, K)), jnp.bfloat16)
  rows, columns = jit(lambda x: quantize.both(x, num_sms=1, interpret=True))(x)
  q, q_t = model.quantize(x, tile=(1, 128)), model.quantize(x, tile=(128, 1))
  expected_rows = q.codes, np.asarray(q.scales).T.copy()
  codes_t = np.zeros((K, -(-M // 128) * 128), E4M3)
  codes_t[:, :M] = np.asarray(q_t.codes).T
  assert_same(rows, expected_rows)
  assert_same(columns, (codes_t, q_t.scales))
  assert_same(run(quantize.rows, x), expected_rows)
  assert_same(run(quantize.columns, x), (codes_t, q_t.scales))
  assert run(quantize.turn, q.codes, q.scales.T)[0].shape == codes_t.shape


@tails
def test_ragged_blocks(rng):
  """Oracle: `dsv3_jax.fp8.quantize`."""
  w = jnp.asarray(rng.normal(size=(160, 224)), jnp.float32)
  q = model.quantize(w, tile=(128, 128))
  codes = np.asarray(q.codes)
  assert_same(run(quantize.blocks, w), (codes.T.copy(), codes, np.asarray(q.scales).T.copy()))


def test_refusals():
  """Law: what copies cannot address is another implementation's; nonsense is an error."""
  x = jnp.ones((128, 128), jnp.bfloat16)
  for bad in (x[:, :48], x[:0], x.astype(jnp.float16)):
    with pytest.raises(NotImplementedError):
      quantize.rows(bad)
  with pytest.raises(NotImplementedError):
    quantize.columns(x.astype(jnp.float32))
  with pytest.raises(NotImplementedError):
    quantize.turn(x.astype(jnp.float8_e5m2), jnp.ones((1, 128)))
  with pytest.raises(ValueError, match=r"\[2, 128\]"):
    quantize.turn(x.astype(cast.E4M3), jnp.ones((2, 128)))
  with pytest.raises(ValueError, match="matrices"):
    quantize.rows(x[0])
