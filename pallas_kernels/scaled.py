"""A quantized operand as kernels take it, and the matmuls of such operands by plain XLA."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class Scaled(NamedTuple):
  """`codes * scale of the tile`; an operand that is not quantized has no scales.

  Attributes:
    codes: [..., m, n] float8 (or any float dtype without scales).
    scales: fp32 [..., ceil(m / tile[0]), ceil(n / tile[1])], or None.
    tile: rows and columns that share a scale; 0 covers an axis whole.
  """

  codes: jax.Array
  scales: jax.Array | None = None
  tile: tuple[int, int] = (0, 0)


def dequantize(x: Scaled, after: jax.Array | None = None) -> jax.Array:
  """fp32 [..., m, n].

  With `after`, any array, XLA takes the codes (of a byte) to depend on it. Otherwise it dequantizes
  the weights of all layers at once: before a loop over steps, which finds them the same each time,
  or at the begin of a step, where there is nothing to wait for. (`lax.optimization_barrier` does
  not help on a CPU: it is gone when operations are put in order.)
  """
  codes = x.codes
  if after is not None:
    some = lax.bitcast_convert_type(after[(0,) * after.ndim].astype(jnp.float32), jnp.int32)
    zero = ((some & 0x7FFFFFFF) >> 31).astype(jnp.uint8)
    codes = lax.bitcast_convert_type(lax.bitcast_convert_type(codes, jnp.uint8) + zero, codes.dtype)
  values = codes.astype(jnp.float32)
  if x.scales is None:
    return values
  *lead, m, n = values.shape
  (rows, columns), (tm, tn) = x.scales.shape[-2:], (t or s for t, s in zip(x.tile, (m, n)))
  pad = [(0, 0)] * len(lead) + [(0, rows * tm - m), (0, columns * tn - n)]
  if pad[-1][1] or pad[-2][1]:
    values = jnp.pad(values, pad)
  values = values.reshape(*lead, rows, tm, columns, tn) * x.scales[..., :, None, :, None]
  return values.reshape(*lead, rows * tm, columns * tn)[..., :m, :n]
