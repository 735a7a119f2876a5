"""Curves of an arm: means and deviations over its seeds, from the thinned curves of records."""

import numpy as np

from dsv3_jax.analysis.comparison.arms import Arm

# x, mean and deviation over seeds [N]; NaN where no run has a value, and where fewer than two have.
Curve = tuple[np.ndarray, np.ndarray, np.ndarray | None]


def curve(arm: Arm, key: str) -> Curve | None:
  """A curve of the records over tokens; None where there is none."""
  return _mean([_series(f.record["curve"], key) for f in arm.runs.values()])


def difference(arm: Arm, base: Arm) -> Curve | None:
  """Smoothed training loss less the baseline's of the same seed, as far as both went."""
  found = []
  for seed in arm.runs.keys() & base.runs.keys():
    x, y = _series(arm.runs[seed].record["curve"], "loss")
    base_x, base_y = _series(base.runs[seed].record["curve"], "loss")
    if len(x) and len(base_x):
      both = (x >= base_x[0]) & (x <= base_x[-1])
      found.append((x[both], y[both] - np.interp(x[both], base_x, base_y)))
  return _mean(found)


def evaluations(arm: Arm, key: str) -> Curve | None:
  """A metric of the evaluations over tokens."""
  return _mean([_series({k: [e.get(k) for e in f.record["evaluations"]] for k in ("tokens", key)},
                        key) for f in arm.runs.values()])


def _series(columns: dict[str, list], key: str) -> tuple[np.ndarray, np.ndarray]:
  x, y = (np.array([np.nan if v is None else v for v in columns[k]], np.float64)
          for k in ("tokens", key))
  kept = np.isfinite(x) & np.isfinite(y)
  return x[kept], y[kept]


def _mean(found: list[tuple[np.ndarray, np.ndarray]]) -> Curve | None:
  """Over runs, at the points of the longest; where a run has ended the others' mean goes on."""
  found = [(x, y) for x, y in found if len(x)]
  if not found:
    return None
  x_N = max((x for x, _ in found), key=lambda x: x[-1])
  values = np.array([np.interp(x_N, x, y, left=np.nan, right=np.nan) for x, y in found])
  count_N = np.isfinite(values).sum(0)
  mean_N = np.where(count_N > 0, np.nansum(values, 0) / np.maximum(count_N, 1), np.nan)
  if len(found) == 1:
    return x_N, mean_N, None
  squares_N = np.nansum((values - mean_N) ** 2, 0)
  deviation_N = np.sqrt(squares_N / np.maximum(count_N - 1, 1))
  return x_N, mean_N, np.where(count_N > 1, deviation_N, np.nan)
