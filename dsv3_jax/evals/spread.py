"""Means with their uncertainty."""

import math
from collections.abc import Sequence

import numpy as np


def mean(values: Sequence[float]) -> tuple[float, float | None]:
  """Mean and its standard error: the sample standard deviation / sqrt(n), None for one value."""
  n = len(values)
  error = float(np.std(values, ddof=1)) / math.sqrt(n) if n > 1 else None
  return float(np.mean(values)), error


def ratio(tops: Sequence[float], bottoms: Sequence[float]) -> tuple[float, float | None]:
  """Sum of `tops` / sum of `bottoms`, and its standard error over the pairs, None for one pair.

  The pairs are documents, say: their bits and bytes. The error is that of the ratio estimator, by
  linearisation (Cochran, Sampling Techniques, 1977, equation 2.39).
  """
  top, bottom, n = np.asarray(tops, float), np.asarray(bottoms, float), len(tops)
  value = float(top.sum() / bottom.sum())
  if n < 2:
    return value, None
  variance = ((top - value * bottom)**2).sum() * n / (n - 1)
  return value, float(np.sqrt(variance) / bottom.sum())
