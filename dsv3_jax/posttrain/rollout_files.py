"""What a run of GRPO keeps beside its checkpoints, to go on as if it had not been interrupted.

`rollout-N.npz` is a rollout whose steps are not all done, `reference-N.npz` the reference that was
taken before rollout N. Both stay for as long as a checkpoint is there that may ask for them.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dsv3_jax.config import ConfigError
from dsv3_jax.posttrain import arrays as arrays_lib
from dsv3_jax.train import checkpoint


class Rollout(NamedTuple):
  """Batches of a rollout's steps, and numbers that describe it."""

  batches: list[dict[str, np.ndarray]]
  said: dict[str, Any]


def save(folder: Path, number: int, rollout: Rollout) -> None:
  """Writes a rollout, atomically."""
  arrays = {f"{i}/{name}": x for i, made in enumerate(rollout.batches) for name, x in made.items()}
  said = np.frombuffer(json.dumps(rollout.said).encode(), np.uint8)
  arrays_lib.write(_path(folder, "rollout", number), {**arrays, "said": said})


def load(folder: Path, number: int) -> Rollout:
  """Reads a rollout; ConfigError where it is not there."""
  arrays = _read(_path(folder, "rollout", number))
  said = json.loads(bytes(arrays.pop("said")))
  batches: list[dict[str, np.ndarray]] = []
  for name, x in arrays.items():
    index, key = name.split("/")
    while len(batches) <= int(index):
      batches.append({})
    batches[int(index)][key] = x
  return Rollout(batches, said)


def save_reference(folder: Path, number: int, reference: Any) -> None:
  """Writes a reference, a tree of arrays, atomically."""
  arrays_lib.write(_path(folder, "reference", number), checkpoint.flatten(reference))


def load_reference(folder: Path, number: int, like: Any) -> Any:
  """Reads a reference of the form of `like`; ConfigError where it is not there."""
  return checkpoint.unflatten(_read(_path(folder, "reference", number)), like)


def tidy(folder: Path, micro_steps: int, every: int) -> None:
  """Removes what no checkpoint of the run asks for.

  Args:
    folder: the workdir.
    micro_steps: steps of a rollout.
    every: rollouts after which the reference is taken anew; 0: never.
  """
  steps = checkpoint.steps(str(folder))
  if not steps:
    return
  oldest = steps[0] // micro_steps
  for kind, needed in (("rollout", oldest), ("reference", refreshed(oldest, every))):
    for path in folder.glob(f"{kind}-*.npz"):
      if int(path.stem.removeprefix(f"{kind}-")) < needed:
        path.unlink(missing_ok=True)


def refreshed(number: int, every: int) -> int:
  """The rollout before which the reference of a rollout was taken; 0: the initial one."""
  return number // every * every if every else 0


def _path(folder: Path, kind: str, number: int) -> Path:
  return folder / f"{kind}-{number}.npz"


def _read(path: Path) -> dict[str, np.ndarray]:
  if not path.is_file():
    raise ConfigError(f"{path} is missing, and the checkpoint goes on from it; bring it back, or "
                      "begin a new workdir")
  with np.load(path) as held:
    return dict(held)
