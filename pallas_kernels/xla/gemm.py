"""Dense matmul whose weight gradient reads rows as they lie, for the CPU."""

import jax
from jax import lax


@jax.custom_vjp
def _gemm(x_MK: jax.Array, w_KN: jax.Array) -> jax.Array:
  return x_MK @ w_KN


def _fwd(x_MK, w_KN):
  return _gemm(x_MK, w_KN), (x_MK, w_KN)


def _bwd(residuals, dy_MN):
  x_MK, w_KN = residuals
  dx_MK = lax.dot_general(dy_MN, w_KN, (((1,), (1,)), ((), ())))
  # Behind a barrier, or the transpose is fused into whatever made x, elementwise and strided.
  x_KM = lax.optimization_barrier(x_MK.T)
  return dx_MK, x_KM @ dy_MN


_gemm.defvjp(_fwd, _bwd)


def gemm(x_MK: jax.Array, w_KN: jax.Array) -> jax.Array:
  """`x @ w`, both of one dtype; the weight gradient is a product with an explicit transpose.

  Raises:
    NotImplementedError: not on a CPU, whose matmul library alone gains from it.
  """
  if jax.default_backend() != "cpu":
    raise NotImplementedError(f"explicit transposes do not pay on {jax.default_backend()}")
  return _gemm(x_MK, w_KN)
