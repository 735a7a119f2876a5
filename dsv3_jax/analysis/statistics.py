"""The few statistics of a comparison: smoothing, spread over seeds, tests by seed.

Arms of an experiment share their seeds: seed 1 of one arm has the initial weights (where the shapes
agree) and the order of data of seed 1 of another. What a seed adds is then common to both and drops
out of their difference, so that arms are compared seed by seed (Student's paired t test).
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from scipy import special

SMOOTHING = 0.9  # of the report's loss curves (appendix B.1)
LEVEL = 0.95  # of intervals
_EXACT = 1e-12  # a standard error of differences below it is rounding: they are all one number


def ema(values_N: np.ndarray, steps: int = 1, coefficient: float = SMOOTHING) -> np.ndarray:
  """Exponential moving average divided by its weights' sum, float64 [N]; not finite is skipped.

  Args:
    values_N: in the order of time.
    steps: training steps from a value to the next; the average forgets by the step.
    coefficient: weight of the past after one step.
  """
  keep = coefficient**steps
  total = weight = 0.0
  out = np.full(len(values_N), np.nan)
  for i, value in enumerate(values_N):
    total, weight = keep * total, keep * weight
    if np.isfinite(value):
      total, weight = total + (1 - keep) * value, weight + 1 - keep
    if weight:
      out[i] = total / weight
  return out


def spread(values: Sequence[float | None]) -> tuple[int, float | None, float | None]:
  """(n, mean, sample standard deviation) of the finite ones; the last is None below two."""
  found = np.array([v for v in values if v is not None and np.isfinite(v)], np.float64)
  mean = float(found.mean()) if found.size else None
  return found.size, mean, float(found.std(ddof=1)) if found.size > 1 else None


@dataclasses.dataclass(frozen=True)
class Difference:
  """An arm's metric less the baseline's, over the seeds that both have.

  Attributes:
    seeds: those seeds.
    values: the difference of each.
    mean: their mean; None without a seed.
    low, high: its 95 % confidence interval; None below two seeds.
    p: two-sided, of the paired t test; None below two seeds, or where all differences are equal.
  """

  seeds: tuple[int, ...]
  values: tuple[float, ...]
  mean: float | None
  low: float | None
  high: float | None
  p: float | None


def paired(arm: Mapping[int, float], baseline: Mapping[int, float]) -> Difference:
  """Student's t test of differences by seed.

  Args:
    arm, baseline: seed -> metric, finite.
  """
  seeds = tuple(sorted(arm.keys() & baseline.keys()))
  values = tuple(float(arm[s] - baseline[s]) for s in seeds)
  count, mean, deviation = spread(values)
  if deviation is None:
    return Difference(seeds, values, mean, None, None, None)
  error = deviation / np.sqrt(count)
  half = error * special.stdtrit(count - 1, (1 + LEVEL) / 2)
  p = None if error < _EXACT else float(2 * special.stdtr(count - 1, -abs(mean) / error))
  return Difference(seeds, values, mean, float(mean - half), float(mean + half), p)


def holm(values: Sequence[float | None]) -> list[float | None]:
  """p values adjusted for being several (Holm's step-down), in their order; None stays None.

  The chance that any of the adjusted ones falls below a level by luck is at most that level.
  """
  known = sorted((p, i) for i, p in enumerate(values) if p is not None)
  out: list[float | None] = [None] * len(values)
  largest = 0.0
  for rank, (p, i) in enumerate(known):
    largest = max(largest, min(1.0, (len(known) - rank) * p))
    out[i] = largest
  return out
