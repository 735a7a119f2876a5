"""Expert load over time, from a run's files or an array's."""

import json
from pathlib import Path

import numpy as np

from dsv3_jax.analysis import workdir
from dsv3_jax.config import ConfigError


def read(path: str | Path) -> np.ndarray:
  """Load of each step, layer and expert, float64 [S, L, E].

  Args:
    path: a run's workdir or its metrics.jsonl, whose "load" lines are the steps (relative loads);
      or a .npy or .json file that holds [step, layer, expert], of any unit.

  Raises:
    ConfigError: no such file, or it holds nothing of the kind.
  """
  path = Path(path)
  if not path.exists():
    raise ConfigError(f"{path} does not exist; give a workdir, metrics.jsonl, .npy or .json")
  if path.is_dir() or path.name == "metrics.jsonl":
    rows = [row["load_LE"] for row in workdir.read(path if path.is_dir() else path.parent).loads
            if row.get("load_LE")]
    if not rows:
      raise ConfigError(f'{path} has no line of kind "load"; a run of a model with experts writes '
                        "one at each evaluation")
  elif path.suffix in (".npy", ".json"):
    try:
      rows = (np.load(path, allow_pickle=False) if path.suffix == ".npy"
              else json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, EOFError) as error:
      raise ConfigError(f"{path} could not be read: {error}") from None
  else:
    raise ConfigError(f"{path} is neither a workdir nor metrics.jsonl, .npy or .json")
  try:
    load_SLE = np.asarray(rows, np.float64)
  except (ValueError, TypeError):
    raise ConfigError(f"{path} holds rows of unequal length or no numbers; give [step, layer, "
                      "expert]") from None
  if load_SLE.ndim != 3 or not load_SLE.size:
    raise ConfigError(f"{path} holds shape {load_SLE.shape}; give [step, layer, expert]")
  bad_SLE = ~(np.isfinite(load_SLE) & (load_SLE >= 0))
  if bad_SLE.any():
    where = np.argwhere(bad_SLE)[0]
    raise ConfigError(f"{path} holds {load_SLE[tuple(where)]:g} at {where.tolist()}; a load is "
                      "finite and not negative")
  return load_SLE
