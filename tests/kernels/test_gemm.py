"""Every implementation of the dense matmul."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax import ops
from tests.oracles.tolerance import assert_close
from tests.quick import jit


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("impl", ["auto", "xla", "reference"])
@pytest.mark.parametrize("shape", [(6, 5, 7), (1, 3, 1), (0, 4, 2)])
def test_forward_and_gradients(shape, impl, dtype):
  """Oracle: numpy in float64."""
  M, K, N = shape
  rng = np.random.default_rng(0)
  x, w, dy = (jnp.asarray(rng.normal(size=s), dtype) for s in ((M, K), (K, N), (M, N)))

  @jit
  def run(x, w, dy):
    y, back = jax.vjp(lambda x, w: ops.gemm(x, w, impl=impl), x, w)
    return y, *back(dy)

  x64, w64, dy64 = (np.asarray(a.astype(jnp.float32), np.float64) for a in (x, w, dy))
  for got, expected in zip(run(x, w, dy), (x64 @ w64, dy64 @ w64.T, x64.T @ dy64), strict=True):
    assert got.dtype == jnp.dtype(dtype)
    assert_close(got, expected, dtype)


def test_unknown_implementation():
  """Law: the choices are named."""
  x = jnp.ones((2, 2))
  with pytest.raises(ValueError, match="gemm: no implementation 'fast'"):
    ops.gemm(x, x, impl="fast")
