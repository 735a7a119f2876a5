"""How closely results must agree with an oracle, by dtype: the one place where tolerances stand.

They are not relaxed without an entry in LOG.md.
"""

import jax.numpy as jnp
import numpy as np

TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}
GRADIENT = 1e-4  # fp32 gradients through a whole model against finite differences


def assert_close(actual, expected, dtype="float32", factor=1.0):
  """Largest error at most the dtype's tolerance (times `factor`) of the largest expected value."""
  actual = np.asarray(jnp.asarray(actual).astype(jnp.float32), np.float64)
  expected = np.asarray(expected, np.float64)
  assert actual.shape == expected.shape, (actual.shape, expected.shape)
  if not expected.size:
    return
  assert np.isfinite(actual).all(), "not finite"
  error, size = np.abs(actual - expected).max(), np.abs(expected).max()
  allowed = TOLERANCE[jnp.dtype(dtype).name] * factor
  assert error <= allowed * max(size, 1e-30), f"error {error:.3g} of {size:.3g}, allowed {allowed}"
