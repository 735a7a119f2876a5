"""Quantization in numpy and ml_dtypes, written from the equations alone (facts 2.2)."""

import ml_dtypes
import numpy as np

DTYPES = {"e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2}
MAX = {"e4m3": 448.0, "e5m2": 57344.0, "e5m6": 65024.0}


def e5m6_values():
  """The finite, non-negative values of E5M6, ascending: code i is element i."""
  code = np.arange(31 * 64)
  exponent, fraction = code // 64, code % 64
  return np.where(exponent == 0, fraction * 2.0**-20, (1 + fraction / 64) * 2.0**(exponent - 15.0))


def round_e5m6(y):
  """The nearest E5M6 value of each finite fp32, ties to the even code, saturating; float64."""
  values = e5m6_values()
  y64 = np.abs(y.astype(np.float64))
  above = np.clip(np.searchsorted(values, y64), 1, len(values) - 1)
  low, high = values[above - 1], values[above]
  up = (y64 - low > high - y64) | ((y64 - low == high - y64) & (above % 2 == 0))
  return np.copysign(np.where(up, high, low), y)


def quantize(x, name, tile, scale="fp32", floor=1e-4, amax=None):
  """(values of the codes before scaling, scales), both numpy, for a [m, n] array."""
  with np.errstate(all="ignore"):
    m, n = x.shape
    x = x.astype(np.float32)
    tm, tn = tile[0] or m, tile[1] or n
    padded = np.pad(x, ((0, -m % tm), (0, -n % tn)))
    tiles = padded.reshape(padded.shape[0] // tm, tm, padded.shape[1] // tn, tn)
    if amax is None:
      amax = np.abs(tiles).max((1, 3))
    s = np.maximum(amax.astype(np.float32), np.float32(floor)) / np.float32(MAX[name])
    if scale == "pow2":
      exponent = np.ceil(np.log2(s.astype(np.float64)))
      s = np.where(np.isfinite(s), np.exp2(np.where(np.isfinite(s), exponent, 0)), np.nan)
      s = s.astype(np.float32)
    y = (tiles / s[:, None, :, None]).reshape(padded.shape)[:m, :n]
    inside = np.clip(y, -MAX[name], MAX[name])
    y = np.where(np.isfinite(x), inside, np.nan)
    if name == "e5m6":
      values = np.where(np.isfinite(y), round_e5m6(np.where(np.isfinite(y), y, 0)), np.nan)
      return values.astype(np.float32), s
    return y.astype(np.float32).astype(DTYPES[name]).astype(np.float32), s


def spread_scales(s, shape, tile):
  """One scale an element."""
  tm, tn = tile[0] or shape[0], tile[1] or shape[1]
  return np.repeat(np.repeat(s, tm, 0), tn, 1)[:shape[0], :shape[1]]
