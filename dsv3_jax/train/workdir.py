"""The folder of a run: who may use it, and atomic writes into it."""

import contextlib
import fcntl
import json
import os
from typing import Any

from dsv3_jax import config, files

# Keys that may change when a run is resumed: they change neither the parameters' trajectory nor
# what a checkpoint holds. train.tokens may not: the schedules' milestones are shares of it, so a
# run whose length changed half-way would follow the schedule of neither length.
FREE = ("runtime", "data.workers", "data.prefetch", "train.log_every", "train.eval_every",
        "train.eval_batches", "train.checkpoint_every", "train.keep_last", "train.keep_best",
        "train.max_bad_steps", "train.profile_from", "train.profile_steps",
        "train.sample_tokens")
# Keys that decide which tokenizer a run trains.
_TOKENIZER = ("data.", "model.vocab_size")


class WorkdirError(ValueError):
  """A workdir that this run cannot use; the message says why and what to do."""


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
  if not isinstance(values, dict):
    return {prefix: list(values) if isinstance(values, tuple) else values}
  return {k: v for name, value in values.items()
          for k, v in _flat(value, f"{prefix}.{name}" if prefix else name).items()}


def differences(old: config.Config, new: config.Config) -> dict[str, tuple[Any, Any]]:
  """Dotted keys whose values differ and may not, with both values."""
  a, b = _flat(config.to_dict(old)), _flat(config.to_dict(new))
  free = lambda key: any(key == f or key.startswith(f + ".") for f in FREE)
  return {k: (a.get(k), b.get(k)) for k in sorted(a.keys() | b.keys())
          if a.get(k) != b.get(k) and not free(k)}


class Workdir:
  """Claims a workdir for this process and this config; a context manager.

  Makes the folder, takes its lock, checks the config that made it, writes `config.json`.

  Raises:
    WorkdirError: the folder cannot be made or written, another process is training in it, or
      another config trained in it (the differing keys are named).
  """

  def __init__(self, path: str, cfg: config.Config):
    self.path = os.path.abspath(os.path.expanduser(path))
    self._config = cfg
    self._lock: Any = None

  def file(self, *names: str) -> str:
    return os.path.join(self.path, *names)

  def __enter__(self) -> "Workdir":
    try:
      os.makedirs(self.path, exist_ok=True)
      self._lock = open(self.file(".lock"), "w")
    except OSError as e:
      why = "it is a file" if os.path.isfile(self.path) else e.strerror
      raise WorkdirError(f"cannot write to workdir {self.path}: {why}; give a --workdir that can "
                         "be made and written") from e
    try:
      fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
      self._lock.close()
      raise WorkdirError(f"another process is training in {self.path}; wait for it, stop it, or "
                         "give another --workdir") from e
    except OSError:
      pass  # a file system without locks
    try:
      self._check()
      files.write_atomic(self.file("config.json"), config.to_json(self._config) + "\n")
    except OSError as e:
      self.__exit__()
      raise WorkdirError(f"cannot write to workdir {self.path}: {e.strerror}") from e
    except BaseException:
      self.__exit__()
      raise
    return self

  def __exit__(self, *unused) -> None:
    self._lock.close()

  def _started(self) -> bool:
    """Whether the folder holds a step of training."""
    metrics, checkpoints = self.file("metrics.jsonl"), self.file("checkpoints")
    return (os.path.exists(metrics) and os.path.getsize(metrics) > 0
            or os.path.isdir(checkpoints) and any(n.isdigit() for n in os.listdir(checkpoints)))

  def _check(self) -> None:
    path = self.file("config.json")
    if not os.path.exists(path):
      return
    try:
      with open(path) as f:
        old = config.from_json(f.read())
    except (config.ConfigError, json.JSONDecodeError) as e:
      raise WorkdirError(f"{path} is not a config of this version ({e}); give another --workdir, "
                         "or remove this one") from e
    differing = differences(old, self._config)
    if differing and not self._started():
      # Nothing was trained: a mistake in the config ended that start, and it is being corrected.
      if any(key.startswith(_TOKENIZER) for key in differing):
        with contextlib.suppress(FileNotFoundError):
          os.unlink(self.file("tokenizer.json"))
    elif differing:
      lines = [f"  {k}: {a!r} there, {b!r} now" for k, (a, b) in differing.items()]
      raise WorkdirError(f"workdir {self.path} was made by another config:\n" + "\n".join(lines) +
                         "\nGive another --workdir, or set these back to go on with this one.")
