"""Quantizers and QTensor against numpy and ml_dtypes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_jax.fp8 import formats
from dsv3_jax.fp8.formats import E4M3, E5M2, E5M6
from dsv3_jax.fp8.qtensor import QTensor
from dsv3_jax.fp8.quantize import quantize
from tests.fp8 import oracle
from tests.quick import jit

TILES = [(1, 128), (128, 1), (128, 128), (0, 0), (1, 32), (7, 13)]
SHAPES = [(128, 256), (130, 257), (5, 3), (1, 1)]
KINDS = ["normal", "wide", "subnormal", "huge", "zero", "nan", "inf", "outlier"]




def make(shape, kind, seed):
  rng = np.random.default_rng(seed)
  x = rng.standard_normal(shape).astype(np.float32)
  if kind == "wide":
    x = (x * np.exp(rng.uniform(-25, 25, shape))).astype(np.float32)
  elif kind == "subnormal":
    x = (x * np.float32(1e-39)).astype(np.float32)
  elif kind == "huge":
    x = (np.sign(x) * rng.uniform(1e37, 3.4e38, shape)).astype(np.float32)
  elif kind == "zero":
    x = np.where(rng.random(shape) < 0.5, np.float32(0), np.float32(-0.0))
  elif kind in ("nan", "inf"):
    x[rng.random(shape) < 0.01] = {"nan": np.nan, "inf": -np.inf}[kind]
    x[-1, -1] = {"nan": np.nan, "inf": np.inf}[kind]
  elif kind == "outlier":
    x[rng.random(shape) < 0.01] *= 1e6
  return x


_jitted = {}


def run(x, format, tile, scale):
  """Jitted once for each static setting; hypothesis then varies the data."""
  key = (format, tile, scale)
  if key not in _jitted:
    _jitted[key] = jit(lambda x: quantize(x, format, tile, scale=scale))
  return _jitted[key](jnp.asarray(x))


def assert_equal_bits(q, x, tile, scale, **given):
  values, s = oracle.quantize(x, q.format.name, tile, scale, **given)
  np.testing.assert_array_equal(np.asarray(q.scale_values()), s)
  found = np.asarray(q.decoded())
  bad = ~np.isfinite(oracle.spread_scales(s, x.shape, tile))
  np.testing.assert_array_equal(np.where(bad, 0, found), np.where(bad, 0, values))
  np.testing.assert_array_equal(np.signbit(found[~bad]), np.signbit(values[~bad]))
  with np.errstate(all="ignore"):
    want = np.where(bad, np.nan, values * oracle.spread_scales(s, x.shape, tile))
  np.testing.assert_array_equal(np.asarray(q.dequantize()), want)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(TILES), st.sampled_from(SHAPES), st.sampled_from(KINDS),
       st.sampled_from(["fp32", "pow2"]), st.integers(0, 2**31))
def test_e4m3_equals_the_oracle_bit_for_bit(tile, shape, kind, scale, seed):
  """Oracle: numpy arithmetic and ml_dtypes' cast, every tile, ragged edges, every kind of input."""
  x = make(shape, kind, seed)
  assert_equal_bits(run(x, E4M3, tile, scale), x, tile, scale)


def test_division_is_one_division_under_full_optimization():
  """Oracle: numpy on values next to ties, where a product with a rounded reciprocal goes astray."""
  rng = np.random.default_rng(3)
  x = np.empty((2048, 128), np.float32)
  x[:, 0] = rng.uniform(0.1, 10, 2048)
  s = (x[:, :1] / np.float32(448)).astype(np.float32)
  ties = np.array([17, 19, 21, 23, 25, 27, 29, 31], np.float32)[rng.integers(8, size=(2048, 127))]
  x[:, 1:] = np.nextafter(ties * s, np.float32(np.inf) * rng.choice([-1, 1], (2048, 127)))
  q = jax.jit(quantize)(x)
  values, scales = oracle.quantize(x, "e4m3", (1, 128))
  np.testing.assert_array_equal(q.scales, scales)
  np.testing.assert_array_equal(np.asarray(q.decoded()), values)


@pytest.mark.parametrize("format", [E5M2, E5M6], ids=lambda f: f.name)
@pytest.mark.parametrize("kind", KINDS)
def test_other_formats_equal_the_oracle(format, kind):
  """Oracle: the same, and the list of all E5M6 values."""
  x = make((130, 257), kind, 1)
  for scale in ("fp32", "pow2"):
    assert_equal_bits(run(x, format, (1, 128), scale), x, (1, 128), scale)


@pytest.mark.parametrize("scale", ["fp32", "pow2"])
def test_compiled_equals_eager(scale):
  """Oracle: the same function without jit: no rewritten division, no lost NaN."""
  x = make((130, 257), "wide", 2)
  x[0, 0], x[3, 200] = np.nan, np.inf
  eager, compiled = quantize(jnp.asarray(x), scale=scale), run(x, E4M3, (1, 128), scale)
  for a, b in zip(jax.tree.leaves(eager), jax.tree.leaves(compiled), strict=True):
    np.testing.assert_array_equal(np.asarray(a).view(np.uint8), np.asarray(b).view(np.uint8))


def test_one_bad_number_shows_in_its_whole_tile_and_nowhere_else():
  """Oracle: the contract."""
  x = np.ones((2, 256), np.float32)
  x[0, 130], x[1, 3] = np.nan, np.inf
  found = np.isnan(quantize(jnp.asarray(x)).dequantize())
  want = np.zeros((2, 256), bool)
  want[0, 128:], want[1, :128] = True, True
  np.testing.assert_array_equal(found, want)


def test_given_amax_saturates_but_hides_nothing():
  """Oracle: numpy with the given amax; NaN and inf stay where they are, the rest saturates."""
  x = make((130, 257), "wide", 3)
  x[0, 0], x[3, 200], x[4, 4] = np.nan, np.inf, -np.inf
  given = np.full((1, 1), 2.0, np.float32)
  q = jit(lambda x, a: quantize(x, E4M3, None, amax=a))(x, given)
  values, s = oracle.quantize(x, "e4m3", (0, 0), amax=given)
  np.testing.assert_array_equal(np.asarray(q.dequantize()), values * s)
  np.testing.assert_array_equal(np.isnan(values), ~np.isfinite(x))
  assert np.nanmax(q.dequantize()) == 2.0


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_other_dtypes_are_read_exactly(dtype):
  """Oracle: the same numbers as fp32."""
  x = jnp.asarray(make((4, 200), "normal", 4), dtype)
  a, b = quantize(x), quantize(x.astype(jnp.float32))
  np.testing.assert_array_equal(a.dequantize(), b.dequantize())


def test_stacked_arrays_are_quantized_one_by_one():
  """Oracle: a loop over the stacking axes; scan and vmap see slices of the same bits."""
  x = jnp.asarray(np.stack([make((130, 257), "wide", i) for i in range(3)]))
  whole = quantize(x, tile=(128, 128))
  each = [quantize(x[i], tile=(128, 128)) for i in range(3)]
  loop = jax.lax.scan(lambda c, q: (c, q.dequantize()), 0, whole)[1]
  mapped = jax.vmap(lambda x: quantize(x, tile=(128, 128)))(x)
  for i, one in enumerate(each):
    want = np.asarray(one.dequantize())
    for found in (whole[i].dequantize(), loop[i], mapped[i].dequantize(), whole.dequantize()[i]):
      np.testing.assert_array_equal(found, want)


@pytest.mark.parametrize("format", [E4M3, E5M6], ids=lambda f: f.name)
@pytest.mark.parametrize("tile", [(1, 128), (128, 128), (0, 0)])
def test_transpose_is_exact(format, tile):
  """Oracle: the transpose of the dequantized array; square tiles equal quantizing it."""
  x = jnp.asarray(make((130, 257), "wide", 5))
  q = quantize(x, format, tile)
  np.testing.assert_array_equal(q.mT.dequantize(), q.dequantize().T)
  assert q.mT.shape == (257, 130)
  if tile[0] == tile[1]:
    again = quantize(x.T, format, tile)
    for a, b in zip(jax.tree.leaves(q.mT), jax.tree.leaves(again), strict=True):
      np.testing.assert_array_equal(np.asarray(a).view(np.uint8), np.asarray(b).view(np.uint8))


def test_bytes():
  """Oracle: 1 byte or 12 bits an element, 4 bytes or 1 a scale."""
  x = jnp.ones((256, 512))
  assert quantize(x).nbytes == 256 * 512 + 4 * 256 * 4
  assert quantize(x, scale="pow2").nbytes == 256 * 512 + 256 * 4
  assert quantize(x, E5M6, scale="pow2").nbytes == 256 * 512 * 3 // 2 + 256 * 4
  assert quantize(x, tile=(128, 128)).nbytes == 256 * 512 + 2 * 4 * 4


def test_requantizing_pow2_tiles_is_exact_in_bf16():
  """Oracle: a power-of-two scale makes every dequantized E4M3 number a bf16 number."""
  q = quantize(jnp.asarray(make((130, 257), "normal", 6)), scale="pow2")
  np.testing.assert_array_equal(q.dequantize(jnp.bfloat16).astype(jnp.float32), q.dequantize())


def test_eight_devices_quantize_as_one():
  """Oracle: one device; rows over a mesh, under shard_map and with sharded codes."""
  mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
  spec = jax.sharding.PartitionSpec("data")
  x = jnp.asarray(make((128, 257), "wide", 7))
  mapped = jax.jit(jax.shard_map(quantize, mesh=mesh, in_specs=spec, out_specs=spec))(x)
  placed = jax.device_put(quantize(x), jax.sharding.NamedSharding(mesh, spec))
  for q in (mapped, placed):
    assert len(q.codes.sharding.device_set) == 8
    np.testing.assert_array_equal(jax.jit(QTensor.dequantize)(q), quantize(x).dequantize())


def test_a_checkpoint_keeps_every_bit(tmp_path):
  """Oracle: what was saved."""
  import orbax.checkpoint as ocp
  x = jnp.asarray(make((130, 257), "wide", 8))
  saved = {"a": quantize(x), "b": quantize(x, E5M6, scale="pow2")}
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(tmp_path / "q", saved)
    checkpointer.wait_until_finished()
    restored = checkpointer.restore(tmp_path / "q", jax.tree.map(ocp.utils.to_shape_dtype_struct,
                                                                 saved))
  assert jax.tree.structure(restored) == jax.tree.structure(saved)
  for a, b in zip(jax.tree.leaves(saved), jax.tree.leaves(restored), strict=True):
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(np.asarray(a).view(np.uint8), np.asarray(b).view(np.uint8))


def test_errors_name_what_is_wrong():
  """Oracle: the message."""
  x = jnp.ones((4, 200))
  with pytest.raises(ValueError, match="tile"):
    quantize(x, tile=(1, 1, 128))
  with pytest.raises(ValueError, match="fp32, pow2"):
    quantize(x, scale="ue8m0")
  with pytest.raises(ValueError, match="floor=0"):
    quantize(x, floor=0.0)
  q = quantize(x)
  with pytest.raises(ValueError, match=r"needs \[4, 2\]"):
    QTensor(q.codes, q.scales[:, :1], q.format, q.tile, q.last).dequantize()
  with pytest.raises(ValueError, match="float8_e4m3fn"):
    QTensor(q.codes.astype(jnp.float8_e5m2), q.scales, q.format, q.tile, q.last).validate()
  with pytest.raises(ValueError, match="199"):
    QTensor(q.codes, q.scales, q.format, q.tile, 199).validate()
  with pytest.raises(ValueError, match="dtype int32"):
    QTensor(q.codes, q.scales.astype(jnp.int32), formats.E4M3, q.tile, q.last).validate()
  with pytest.raises(IndexError, match="tiles"):
    q[0]
