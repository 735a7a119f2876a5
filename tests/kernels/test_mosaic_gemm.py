"""FP8 GEMM kernels in the interpreter, with race detection.

Oracle of all values: numpy, the product of the dequantized operands in float64. The interpreter
fills outputs and shared memory with NaN before the kernel writes them.
"""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels.mosaic import compat, gemm, schedule
from pallas_kernels.mosaic import config as config_lib
from pallas_kernels.mosaic.config import GemmConfig

pytestmark = [pytest.mark.timeout(60), pytest.mark.usefixtures("no_race")]
clusters = pytest.mark.skipif(not compat.CLUSTERS,
                              reason="this jax's interpreter has no cluster barriers")
SMALL = GemmConfig(stages=2)
ONE = GemmConfig(warpgroups=1, tile_n=64, stages=3)
WAVES = GemmConfig(rows=128, stages=2)


def codes(rng, *shape):
  return np.clip(rng.normal(size=shape) * 60, -448, 448).astype(ml_dtypes.float8_e4m3fn)


def scales(rng, *shape):
  return np.exp(rng.normal(size=shape)).astype(np.float32)


def up(size):
  return -(-size // 128)


def by_row(x, s_kM):
  """float64 of an operand with a scale a row and 128 values."""
  return x.astype(np.float64) * np.repeat(s_kM, 128, 0)[:x.shape[1]].T


def by_block(x, s_nk):
  s = np.repeat(np.repeat(s_nk, 128, 0), 128, 1)
  return x.astype(np.float64) * s[:x.shape[0], :x.shape[1]]


def assert_near(got, expected, bound=1e-6):
  got = np.asarray(got).astype(np.float64)
  assert got.shape == expected.shape
  assert np.isfinite(got).all()
  error = np.linalg.norm(got - expected) / max(np.linalg.norm(expected), 1e-30)
  assert error < bound, error


def call(f, *args, **kwargs):
  return jax.jit(functools.partial(f, num_sms=kwargs.pop("num_sms", 2), interpret=True, **kwargs))(
      *map(jnp.asarray, args))


def dense(rng, M, N, K):
  args = (codes(rng, M, K), scales(rng, up(K), M), codes(rng, N, K), scales(rng, up(N), up(K)))
  return args, by_row(*args[:2]) @ by_block(*args[2:]).T


@pytest.mark.parametrize("config, shape", [
    (SMALL, (256, 256, 384)),  # two tiles a block: the ring runs on, the epilogue is put off
    (WAVES, (256, 128, 256)),
    (GemmConfig(tile_n=192, stages=2, overlap=False), (128, 384, 128)),  # tiles straddle scales
], ids=["two", "waves", "straddling"])
def test_dense(rng, config, shape):
  args, expected = dense(rng, *shape)
  assert_near(call(gemm.gemm, *args, config=config, out_dtype=jnp.float32), expected)


@pytest.mark.parametrize("shape", [(100, 136, 200)], ids=str)
def test_ragged(rng, shape):
  """bf16; sizes that no tile divides, weights with rows and columns of half a block."""
  args, expected = dense(rng, *shape)
  y = call(gemm.gemm, *args, config=ONE)
  assert y.dtype == jnp.bfloat16
  assert_near(y, expected, 4e-3)


def test_promotion_interval(rng):
  args, expected = dense(rng, 64, 64, 256)
  y = call(gemm.gemm, *args, config=ONE, out_dtype=jnp.float32, interval=32, num_sms=1)
  assert_near(y, expected)


@clusters
@pytest.mark.parametrize("axis", ["m", "n"])
def test_clusters(rng, axis):
  """Tile counts are odd: the second block of the last pair has nothing to write."""
  args, expected = dense(rng, 384, 328, 256)
  config = GemmConfig(stages=2, cluster=axis)
  assert_near(call(gemm.gemm, *args, config=config, out_dtype=jnp.float32, num_sms=4), expected)


def test_sms_do_not_matter(rng):
  args, _ = dense(rng, 64, 192, 128)
  one, many = (call(gemm.gemm, *args, config=ONE, num_sms=sms) for sms in (1, 3))
  np.testing.assert_array_equal(np.asarray(one), np.asarray(many))


def test_empty():
  for M, N, K in ((0, 128, 128), (128, 0, 128), (8, 8, 0)):
    args, expected = dense(np.random.default_rng(0), M, N, K)
    assert_near(call(gemm.gemm, *args), expected)


# --- weight gradients ---------------------------------------------------------------------------


def tokens(rng, K, N, T):
  return codes(rng, K, T), scales(rng, up(T), K), codes(rng, N, T), scales(rng, up(T), N)


@pytest.mark.parametrize("accumulate", [False, True])
def test_wgrad(rng, accumulate):
  """Ragged in all axes; added to what there was, or not."""
  K, N, T = 72, 96, 328
  args = tokens(rng, K, N, T)
  before = rng.normal(size=(K, N)).astype(np.float32) * 1e3
  expected = by_row(*args[:2]) @ by_row(*args[2:]).T + before * accumulate
  more = dict(accumulate=jnp.asarray(before)) if accumulate else {}
  assert_near(call(gemm.wgrad, *args, config=ONE, **more), expected)


@pytest.mark.parametrize("config", [
    SMALL, pytest.param(GemmConfig(stages=2, cluster="m", tile_n=64), marks=clusters)],
    ids=["plain", "cluster"])
def test_grouped_wgrad(rng, config):
  """Groups of 1, 0, 3 and 0 blocks, the last behind all tokens."""
  K, N, T = 128, 128, 512
  args, bounds = tokens(rng, K, N, T), np.array([(0, 1), (1, 1), (1, 4), (4, 4)], np.int32)
  x, dy = by_row(*args[:2]), by_row(*args[2:])
  expected = np.stack([x[:, a * 128:b * 128] @ dy[:, a * 128:b * 128].T for a, b in bounds])
  assert_near(call(gemm.grouped_wgrad, *args, bounds, config=config), expected)


def test_grouped_wgrad_accumulates(rng):
  """A group without tokens keeps what it had."""
  K, N, T = 64, 64, 128
  args, bounds = tokens(rng, K, N, T), np.array([(0, 0), (0, 1)], np.int32)
  before = rng.normal(size=(2, K, N)).astype(np.float32)
  expected = before + 0.0
  expected[1] += by_row(*args[:2]) @ by_row(*args[2:]).T
  assert_near(call(gemm.grouped_wgrad, *args, bounds, config=ONE, accumulate=jnp.asarray(before)),
              expected.astype(np.float64))


# --- groups -------------------------------------------------------------------------------------


@pytest.mark.parametrize("config, N", [
    (SMALL, 128), (ONE, 64),
    pytest.param(GemmConfig(stages=2, cluster="n", tile_n=64), 136, marks=clusters),
    pytest.param(GemmConfig(stages=2, cluster="m"), 128, marks=clusters),
], ids=["two", "one", "cluster_n", "cluster_m"])
def test_grouped(rng, config, N):
  """An empty group, a hot one, and blocks not in use whose rows are NaN and groups nonsense."""
  K, G, group_m, used = 256, 3, [0, 2, 2, 7, -5], 3
  M = 128 * len(group_m)
  a, sa = codes(rng, M, K), scales(rng, up(K), M)
  a[used * 128:] = np.nan
  sa[:, used * 128:] = np.nan
  b, sb = codes(rng, G, N, K), scales(rng, G, up(N), up(K))
  expected = np.zeros((M, N))
  for block in range(used):
    rows, g = slice(block * 128, block * 128 + 128), group_m[block]
    expected[rows] = by_row(a[rows], sa[:, rows]) @ by_block(b[g], sb[g]).T
  y = call(gemm.grouped_gemm, a, sa, b, sb, np.array(group_m, np.int32), np.int32(used),
           config=config, out_dtype=jnp.float32)
  assert_near(y, expected)


def test_pairs_share_weights_within_a_group():
  """Law: blocks of a cluster copy B together only for one group, and always run the same k.

  The interpreter does not split a shared copy, so it would not notice.
  """
  group_m, used, steps = jnp.array([0, 0, 0, 1, 1, 9], jnp.int32), jnp.array([5], jnp.int32), 7
  plan = schedule.schedule("grouped", GemmConfig(cluster="m"), 6 * 128, 256, steps, 2,
                           (group_m, used), 2)
  spots = [plan.spot(jnp.int32(mi), 0, 0) for mi in range(6)]
  assert [bool(s.shared) for s in spots] == [True, True, False, False, True, True]
  assert [int(s.last) for s in spots] == [steps] * 6  # the unused block runs with its neighbour
  assert [bool(s.keep) for s in spots] == [True] * 5 + [False]
  assert [int(s.b_row) for s in spots] == [0, 0, 0, 256, 256, 256]


@pytest.mark.parametrize("config, finite", [
    (ONE, True), (ONE, False),
    pytest.param(GemmConfig(stages=2, cluster="n", tile_n=64), True, marks=clusters)],
    ids=["one", "one_unwritten", "cluster"])
def test_masked(rng, config, finite):
  """Groups with none, some and all of their rows in use; nothing behind a tile is touched."""
  G, M, N, K, masked = 3, 160, 64, 256, (0, 70, 160)
  a, sa = codes(rng, G, M, K), scales(rng, G, up(K), M)
  b, sb = codes(rng, G, N, K), scales(rng, G, up(N), up(K))
  y = np.asarray(call(gemm.masked_gemm, a, sa, b, sb, np.array(masked, np.int32), finite=finite,
                      config=config, out_dtype=jnp.float32))
  for g, m in enumerate(masked):
    if m:
      assert_near(y[g, :m], (by_row(a[g], sa[g]) @ by_block(b[g], sb[g]).T)[:m])
    behind = y[g, -(-m // config.tile_m) * config.tile_m:]
    assert (behind == 0).all() if finite else np.isnan(behind).all()
    assert not finite or np.isfinite(y[g]).all()


# --- lowering -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", config_lib.KINDS)
def test_lowers_for_the_device(kind):
  """Law: each kind lowers for the device too, in the configuration that the model chooses."""
  G, M, N, K = 4, 1024, 7168, 2048
  a, b = (jax.ShapeDtypeStruct((rows, K), jnp.float8_e4m3fn) for rows in (M, N))
  sa, sb = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((K // 128, M), (N // 128, K // 128)))
  many = lambda x: jax.ShapeDtypeStruct((G, *x.shape), x.dtype)
  ints = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)
  rows = jax.ShapeDtypeStruct((K // 128, N), jnp.float32)
  f, args = {
      "dense": (gemm.gemm, (a, sa, b, sb)),
      "grouped": (gemm.grouped_gemm, (a, sa, many(b), many(sb), ints(M // 128), ints())),
      "masked": (gemm.masked_gemm, (many(a), many(sa), many(b), many(sb), ints(G))),
      "wgrad": (gemm.wgrad, (a, sa, b, rows)),
      "grouped_wgrad": (gemm.grouped_wgrad, (a, sa, b, rows, ints(G, 2))),
  }[kind]
  text = jax.jit(f).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
  assert "mosaic_gpu" in text


# --- refusals -----------------------------------------------------------------------------------


def test_refusals():
  """Law: what cannot run says why; only another format is for another implementation."""
  (a, sa, b, sb), _ = dense(np.random.default_rng(0), 128, 128, 128)
  a, sa, b, sb = map(jnp.asarray, (a, sa, b, sb))
  with pytest.raises(NotImplementedError, match="e5m2"):
    gemm.gemm(a.astype(jnp.float8_e5m2), sa, b, sb)
  with pytest.raises(ValueError, match="float8_e4m3fn"):
    gemm.gemm(a.astype(jnp.float32), sa, b, sb)
  with pytest.raises(ValueError, match=r"a_scales_kM must be float32\[1, 128\]"):
    gemm.gemm(a, sa[:, :64], b, sb)
  with pytest.raises(ValueError, match="interval"):
    gemm.gemm(a, sa, b, sb, interval=256)
  with pytest.raises(ValueError, match="shared memory"):
    gemm.gemm(a, sa, b, sb, config=GemmConfig(stages=9))
