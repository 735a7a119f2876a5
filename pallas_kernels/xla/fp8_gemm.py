"""FP8 matmuls on hardware without them: operands dequantized to fp32, products added in fp32.

What a kernel with fp32 promotion computes, up to the order of additions. The operands exist in fp32
while their product is formed; nothing larger than operands and result does.
"""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.scaled import Scaled, dequantize


def gemm(a_MK: Scaled, b_KN: Scaled) -> jax.Array:
  """`a @ b`, fp32."""
  b = dequantize(b_KN, None if b_KN.scales is None else a_MK.codes)
  return jnp.dot(dequantize(a_MK), b, precision=lax.Precision.HIGHEST)


def wgrad(x_MK: Scaled, dy_MN: Scaled) -> jax.Array:
  """`x^T dy`, fp32 [K, N]: the sum over tokens."""
  # A transpose of its own is faster on a CPU than a product over the rows of both operands.
  x_KM = lax.optimization_barrier(dequantize(x_MK).T)
  return jnp.dot(x_KM, dequantize(dy_MN), precision=lax.Precision.HIGHEST)
