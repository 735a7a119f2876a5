"""Arrays in a file that is whole or not there."""

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np


def write(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
  """Writes an npz file, atomically."""
  temporary = path.with_name(f".{path.name}.tmp")
  with open(temporary, "wb") as file:
    np.savez(file, **arrays)
    file.flush()
    os.fsync(file.fileno())
  os.replace(temporary, path)
