"""Adam's moments in block-wise FP8, for study (the report keeps both in bfloat16, 3.3.3).

E4M3 codes with an fp32 scale for every 128 values of a row: 1.03 bytes instead of bf16's 2. Three
things go wrong when that is done as for activations.

The second moment squares the range. A block's gradients may differ by 2^18 and E4M3 still tells
the smallest from zero, but their squares differ by 2^36. So the square root is stored, which is
also what the update divides by; its relative precision is that of the code (half a unit of 3 bits:
6 %). E5M2 would buy range that the root no longer needs with half of the precision.

A second moment that rounds to zero divides by eps: the update explodes. The smallest code stands in
for zero wherever the value is not zero; a moment that is too large only makes a step smaller.

Averages stand still. With beta2 = 0.95 a root changes by 2.5 % a step and less, under half the
distance of neighbouring codes (6 to 12 %), so rounding to nearest would give back the old code for
ever. Rounding is stochastic, up or down with probabilities that keep the mean, seeded by the step:
a resumed run draws what the uninterrupted one did.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dsv3_jax.fp8 import formats
from dsv3_jax.fp8.qtensor import QTensor
from dsv3_jax.fp8.quantize import quantize

NAME = "float8"  # in optim.mu_dtype and optim.nu_dtype
TILE = 128
_FLOOR = 1e-30  # of amax; activations' 1e-4 would erase moments


def store(x: jax.Array, key: jax.Array, root: bool = False) -> QTensor:
  """A moment as codes.

  Args:
    x: fp32, any shape; blocks lie along the last axis.
    key: decides how values between two codes are rounded.
    root: `x` is not negative: its square root is stored, and only zeros become zero.
  """
  held = jnp.sqrt(x) if root else x
  tile = (1,) * min(x.ndim - 1, 1) + (TILE,) if x.ndim else ()
  q = quantize(held, formats.E4M3, tile, floor=_FLOOR, key=key)
  if not root:
    return q
  codes = lax.bitcast_convert_type(q.codes, jnp.uint8)
  codes = jnp.where((codes & 0x7F == 0) & (held > 0), np.uint8(1), codes)
  return dataclasses.replace(q, codes=lax.bitcast_convert_type(codes, q.codes.dtype))


def zeros(shape: tuple[int, ...]) -> QTensor:
  """The moment before the first step."""
  like = jax.eval_shape(lambda: store(jnp.zeros(shape), jax.random.key(0)))
  return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)


def load(q: QTensor, root: bool = False) -> jax.Array:
  """The fp32 moment that codes stand for."""
  x = q.dequantize()
  return x * x if root else x
