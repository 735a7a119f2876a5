"""What the tests that interpret kernels share."""

import numpy as np
import pytest


@pytest.fixture
def rng():
  """Fresh random numbers; a failing test shows the seed."""
  seed = np.random.SeedSequence().entropy
  print(f"seed {seed}")
  return np.random.default_rng(seed)


@pytest.fixture
def no_race(capfd):
  """Fails a test in which the interpreter found a race, of which it only speaks."""
  yield
  said = "".join(capfd.readouterr())
  print(said)
  assert "RACE DETECTED" not in said
