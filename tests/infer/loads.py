"""Load matrices of many kinds, for tests of placements."""

import numpy as np

KINDS = ("uniform", "gamma", "lognormal", "zipf", "steep", "counts", "sparse", "groups", "ties")


def draw(kind: str, layers: int, experts: int, rng: np.random.Generator) -> np.ndarray:
  """A load matrix, float64 [L, E]."""
  shape = layers, experts
  rank_E = np.arange(1.0, experts + 1)
  return {
      "uniform": lambda: rng.random(shape),
      "gamma": lambda: rng.gamma(0.5, size=shape),
      "lognormal": lambda: np.exp(rng.normal(size=shape)),
      "zipf": lambda: rng.permuted(np.tile(rank_E**-0.8, (layers, 1)), axis=1),
      "steep": lambda: rng.permuted(np.tile(rank_E**-1.4, (layers, 1)), axis=1),
      "counts": lambda: rng.poisson(8, shape).astype(np.float64),
      "sparse": lambda: rng.gamma(0.3, size=shape) * (rng.random(shape) < 0.3),
      "groups": lambda: (np.repeat(rng.gamma(2, size=(layers, 4)), experts // 4, 1)
                         * rng.random(shape)),
      "ties": lambda: rng.integers(0, 4, shape).astype(np.float64),
  }[kind]()
