"""Every implementation of the grouped matmul against a loop over rows."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax import ops
from pallas_kernels.xla import grouped_gemm as xla
from tests.oracles import operations as oracle
from tests.oracles.tolerance import assert_close
from tests.quick import jit

BLOCKS, BLOCK, G, K, N = 6, 4, 4, 5, 7
# name: (group of each block, blocks in use)
LOADS = {
    "even": ([0, 0, 1, 2, 2, 3], 6),
    "hot group": ([2] * 6, 6),
    "empty groups": ([1, 3, 3, 3, 3, 3], 3),
    "one block": ([0, 3, 3, 3, 3, 3], 1),
    "nothing": ([3] * 6, 0),
}


@functools.cache
def compiled(impl):
  """(x, w, group, used, dy) -> (y, dx, dw)."""
  def run(x_MK, w_GKN, group_m, used, dy_MN):
    y_MN, back = jax.vjp(
        lambda x, w: ops.grouped_gemm(x, w, group_m, used, impl=impl), x_MK, w_GKN)
    return y_MN, *back(dy_MN)

  return jit(run)


def inputs(dtype, seed=0):
  rng = np.random.default_rng(seed)
  shapes = (BLOCKS * BLOCK, K), (G, K, N), (BLOCKS * BLOCK, N)
  return [jnp.asarray(rng.normal(size=s), dtype) for s in shapes]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("impl", ["auto", "xla", "ragged_dot", "reference"])
def test_forward_and_gradients(impl, dtype):
  """Oracle: a numpy loop over rows, float64."""
  x, w, dy = inputs(dtype)
  x64, w64, dy64 = (np.asarray(a.astype(jnp.float32), np.float64) for a in (x, w, dy))
  for name, (group, used) in LOADS.items():
    got = compiled(impl)(x, w, jnp.array(group, jnp.int32), jnp.int32(used), dy)
    expected = (oracle.grouped_gemm(x64, w64, group, used),
                *oracle.grouped_gemm_gradients(x64, w64, group, used, dy64))
    for a, b in zip(got, expected, strict=True):
      assert a.dtype == jnp.dtype(dtype), name
      assert_close(a, b, dtype)


def test_blocks_of_a_group_may_stand_apart():
  """Oracle: a numpy loop over rows; the XLA form promises this, the others do not."""
  x, w, dy = inputs("float32", seed=1)
  group = [3, 0, 3, 1, 0, 0]
  got = compiled("xla")(x, w, jnp.array(group, jnp.int32), jnp.int32(5), dy)
  args = [np.asarray(a, np.float64) for a in (x, w)]
  assert_close(got[0], oracle.grouped_gemm(*args, group, 5))
  for a, b in zip(got[1:], oracle.grouped_gemm_gradients(*args, group, 5, np.asarray(dy, float))):
    assert_close(a, b)


@pytest.mark.parametrize("runs", [
    [(0, 11), (1, 13), (0, 3), (1, 5)], [(1, 32)], [(0, 1), (1, 2), (0, 4), (1, 7)], []])
def test_blocks_of_long_groups_are_taken_together(runs):
  """Oracle: a numpy loop over rows; 32 blocks of 32 rows for two groups merge up to 16 blocks."""
  assert xla._merges(1024, 2, 32) == (16, 8, 4, 2, 1)
  rng = np.random.default_rng(2)
  shapes = (1024, 3), (2, 3, 2), (1024, 2)
  x, w, dy = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in shapes)
  group = [g for g, blocks in runs for _ in range(blocks)]
  used = len(group)
  group += [1] * (32 - used)
  x, dy = (a.at[used * 32:].set(jnp.nan) for a in (x, dy))
  got = compiled("xla")(x, w, jnp.array(group, jnp.int32), jnp.int32(used), dy)
  x64, w64, dy64 = (np.asarray(jnp.nan_to_num(a), np.float64) for a in (x, w, dy))
  assert_close(got[0], oracle.grouped_gemm(x64, w64, group, used))
  expected = oracle.grouped_gemm_gradients(x64, w64, group, used, dy64)
  for a, b in zip(got[1:], expected, strict=True):
    assert_close(a, b)


def test_unused_blocks_are_not_read():
  """Law: NaN in rows past the used blocks reaches neither the output nor a gradient."""
  x, w, dy = inputs("float32")
  x, dy = (a.at[4 * BLOCK:].set(jnp.nan) for a in (x, dy))
  group = jnp.array([0, 1, 2, 3, 3, 3], jnp.int32)
  y, dx, dw = compiled("xla")(x, w, group, jnp.int32(4), dy)
  assert not np.any(y[4 * BLOCK:]) and not np.any(dx[4 * BLOCK:])
  assert all(np.isfinite(a).all() for a in (y, dx, dw))


def test_bf16_weight_gradient_sums_in_fp32():
  """Oracle: numpy float64 over 2,048 rows of one group, where a bf16 sum would stall at 256."""
  rows = 2048
  x, w = jnp.ones((rows, 1), jnp.bfloat16), jnp.ones((1, 1, 1), jnp.bfloat16)
  group = jnp.zeros((rows // 8,), jnp.int32)
  dw = jax.grad(lambda w: xla.grouped_gemm(x, w, group, rows // 8).astype(jnp.float32).sum())(w)
  assert dw.dtype == jnp.bfloat16 and float(dw[0, 0, 0]) == rows


def test_unknown_implementation_is_named():
  """Law: the message names what was asked for and what exists."""
  x, w, _ = inputs("float32")
  with pytest.raises(ValueError, match="'fast'.*xla"):
    ops.grouped_gemm(x, w, jnp.zeros((BLOCKS,), jnp.int32), jnp.int32(0), impl="fast")
