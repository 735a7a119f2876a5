"""The folder of a run: who may use it, and atomic writes into it."""

import contextlib
import fcntl
import json
import os
import shutil
import time
from typing import Any

from dsv3_jax import config, files
from dsv3_jax.train import processes

# Keys that may change when a run is resumed: what a checkpoint holds does not depend on them. Some
# of `runtime` change the numbers, so that each change is said and kept in metrics.jsonl.
# train.tokens may not change: the schedules' milestones are shares of it, so a run whose length
# changed half-way would follow the schedule of neither length.
FREE = ("runtime", "data.workers", "data.prefetch", "train.log_every", "train.eval_every",
        "train.eval_batches", "train.checkpoint_every", "train.keep_last", "train.keep_best",
        "train.max_bad_steps", "train.profile_from", "train.profile_steps",
        "train.sample_tokens", "exam")
_SHARED_WITHIN = 30.0  # seconds until a network file system shows what another host wrote
# Keys that decide which tokenizer a run trains.
_TOKENIZER = ("data.", "model.vocab_size")


class WorkdirError(ValueError):
  """A workdir that this run cannot use; the message says why and what to do."""


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
  if not isinstance(values, dict):
    return {prefix: list(values) if isinstance(values, tuple) else values}
  return {k: v for name, value in values.items()
          for k, v in _flat(value, f"{prefix}.{name}" if prefix else name).items()}


Differences = dict[str, tuple[Any, Any]]


def differences(old: config.Config, new: config.Config) -> tuple[Differences, Differences]:
  """Dotted keys whose values differ, with both values: those that may not, and those that may."""
  a, b = _flat(config.to_dict(old)), _flat(config.to_dict(new))
  found = {k: (a.get(k), b.get(k)) for k in sorted(a.keys() | b.keys()) if a.get(k) != b.get(k)}
  free = {k: v for k, v in found.items()
          if any(k == f or k.startswith(f + ".") for f in FREE)}
  return {k: v for k, v in found.items() if k not in free}, free


class Workdir:
  """Claims a workdir for this process and this config; a context manager.

  Makes the folder, takes its lock, removes what a killed process left half-written, checks the
  config that made the folder, writes `config.json`. Among several processes, process 0 does that,
  and the others look whether they see the same folder and have the same config.

  Attributes:
    changed: keys that changed since the folder was last trained in, with both values.

  Raises:
    WorkdirError: the folder cannot be made or written, another run is training in it, or another
      config trained in it (the differing keys are named); a process of the group was started with
      another config, or does not see the folder.
  """

  def __init__(self, path: str, cfg: config.Config, group: processes.Alone | None = None):
    self.path = os.path.abspath(os.path.expanduser(path))
    self.changed: Differences = {}
    self._config = cfg
    self._group = group or processes.Alone()
    self._lock: Any = None

  def file(self, *names: str) -> str:
    return os.path.join(self.path, *names)

  def __enter__(self) -> "Workdir":
    if not self._group.first:
      self._follow()
      return self
    try:
      os.makedirs(self.path, exist_ok=True)
      self._lock = open(self.file(".lock"), "a")
    except OSError as e:
      why = "it is a file" if os.path.isfile(self.path) else e.strerror
      raise WorkdirError(f"cannot write to workdir {self.path}: {why}; give a --workdir that can "
                         "be made and written") from e
    locked = True
    try:
      fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
      self._lock.close()
      raise WorkdirError(f"another process is training in {self.path}; wait for it, stop it, or "
                         "give another --workdir") from e
    except OSError:
      locked = False  # a file system without locks
    try:
      if locked:
        self._remove_leftovers()
      self._check()
      files.write_atomic(self.file("config.json"), config.to_json(self._config) + "\n")
      token = self._sign()
    except OSError as e:
      self.__exit__()
      raise WorkdirError(f"cannot write to workdir {self.path}: {e.strerror}") from e
    except BaseException:
      self.__exit__()
      raise
    self._group.share("workdir", json.dumps([token, config.to_json(self._config)]))
    return self

  def __exit__(self, *unused) -> None:
    if self._lock is not None:
      self._lock.close()

  def _sign(self) -> str:
    """Leaves a mark in the lock's file, by which other processes know this folder."""
    token = os.urandom(8).hex()
    self._lock.truncate(0)
    self._lock.write(token)
    self._lock.flush()
    os.fsync(self._lock.fileno())
    return token

  def _follow(self) -> None:
    """Waits for process 0's claim and checks that it is of this folder and this config."""
    token, text = json.loads(self._group.share("workdir", None))
    theirs = config.from_json(text)
    bound, free = differences(theirs, self._config)
    if bound or free:
      lines = [f"  {k}: {a!r} there, {b!r} here" for k, (a, b) in (bound | free).items()]
      raise WorkdirError(f"process {self._group.index} was started with another config than "
                         "process 0:\n" + "\n".join(lines))
    end = time.monotonic() + _SHARED_WITHIN
    while True:
      with contextlib.suppress(OSError), open(self.file(".lock")) as f:
        if f.read() == token:
          return
      if time.monotonic() > end:
        raise WorkdirError(
            f"process {self._group.index} does not see in {self.path} what process 0 wrote there; "
            "the workdir must be one folder, on a file system that all processes share")
      time.sleep(0.2)

  def _remove_leftovers(self) -> None:
    """Files and shard folders under the names that they have while they are written."""
    for folder in (self.path, self.file("data")):
      for name in os.listdir(folder) if os.path.isdir(folder) else ():
        if name.endswith(".tmp") and (name.startswith(".") or folder != self.path):
          path = os.path.join(folder, name)
          shutil.rmtree(path) if os.path.isdir(path) else os.unlink(path)

  def _bound(self, differing: Differences) -> Differences:
    """Those of the differences that what is in the folder forbids."""
    metrics, checkpoints = self.file("metrics.jsonl"), self.file("checkpoints")
    names = os.listdir(checkpoints) if os.path.isdir(checkpoints) else []
    steps = {int(name) for name in names if name.isdigit()}
    if any(steps) or (os.path.exists(metrics) and os.path.getsize(metrics) > 0):
      return differing
    # Nothing was trained: a mistake in the config ended that start, and it is being corrected. The
    # parameters of a converted model, in a checkpoint of step 0, still have their shapes.
    return {k: v for k, v in differing.items() if steps and k.startswith("model.")}

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
    differing, self.changed = differences(old, self._config)
    if bound := self._bound(differing):
      lines = [f"  {k}: {a!r} there, {b!r} now" for k, (a, b) in bound.items()]
      raise WorkdirError(f"workdir {self.path} was made by another config:\n" + "\n".join(lines) +
                         "\nGive another --workdir, or set these back to go on with this one.")
    # Runs of other kinds have the tokenizer of the model that they begin with, and check it.
    if self._config.kind == "pretrain" and any(key.startswith(_TOKENIZER) for key in differing):
      with contextlib.suppress(FileNotFoundError):
        os.unlink(self.file("tokenizer.json"))
