"""FP8 weights with one scale a block, as the release stores them (facts 6.1).

Despite its name, `weight_scale_inv` multiplies: weight = codes * scale.
"""

import ml_dtypes
import numpy as np


def scale_shape(shape: tuple[int, int], block: tuple[int, int]) -> tuple[int, int]:
  """Blocks along each axis of a weight [out, in]; the last one of an axis may be ragged."""
  return -(-shape[0] // block[0]), -(-shape[1] // block[1])


def dequantize(codes: np.ndarray, scale: np.ndarray, block: tuple[int, int]) -> np.ndarray:
  """The fp32 weight [out, in].

  Args:
    codes: float8_e4m3fn, [out, in].
    scale: fp32, `scale_shape(codes.shape, block)`.
    block: rows and columns that share a scale.
  """
  decode = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
  weight = decode[codes.view(np.uint8)]  # a table is far quicker than a cast
  columns = np.repeat(scale.astype(np.float32), block[1], axis=1)[:, :codes.shape[1]]
  for row in range(scale.shape[0]):  # one strip of blocks at a time: no full-size scale array
    weight[row * block[0]:(row + 1) * block[0]] *= columns[row]
  return weight
