"""How long a sweep will take: measured speeds, carried from arm to arm by their FLOPs.

An arm's time is its tokens at some speed, and what comes on top: starting, compiling, evaluating.
Both are measured on finished arms of the pool, and before there are any on a few steps of the first
one. POOL/calibration.json keeps them by machine and shape (what a step computes); an arm of another
shape is taken to do as many FLOPs a second.
"""

import dataclasses
import hashlib
import json
import platform
import statistics
from collections.abc import Sequence
from typing import Any

from dsv3_jax import config as config_lib
from dsv3_jax import counts, files
from dsv3_jax.config import Config
from dsv3_jax.sweep import local
from dsv3_jax.sweep.pool import Pool
from dsv3_jax.sweep.progress import OVER, Progress


def shape(config: Config) -> str:
  """16 hex digits: equal for configs whose steps compute equally much in equal ways."""
  data = config.data
  parts = [config_lib.to_dict(config.model), config_lib.to_dict(config.runtime), data.batch_size,
           data.microbatch, data.sequence_length, bool(config.optim.ema_decay)]
  return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def machine(jobs: int = 1) -> str:
  """What speeds depend on: the processor, the cores of an arm, the GPUs."""
  name = platform.processor() or platform.machine()
  try:
    with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
      name = next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
  except (OSError, StopIteration):
    pass
  gpus = len(local.gpus())
  return (f"{name} x {max(len(local.cores()) // jobs, 1)}" +
          (f", {max(gpus // jobs, 1)} GPUs" if gpus else ""))


@dataclasses.dataclass(frozen=True)
class Speed:
  """tokens_per_s of training steps, overhead_s on top of them, of a shape's FLOPs a token."""

  tokens_per_s: float
  overhead_s: float
  flops_per_token: float


class Estimator:
  """Speeds known of this machine.

  Args:
    pool: where calibration.json is.
    jobs: arms at once.
  """

  def __init__(self, pool: Pool, jobs: int = 1):
    self._path, self._machine = pool.folder / "calibration.json", machine(jobs)
    self._speeds: dict[str, list[Speed]] = {}
    for key, value in self._read().get(self._machine, {}).items():
      self._speeds[key] = [Speed(**value)]
    self._calibrated = set(self._speeds)

  def _read(self) -> dict[str, Any]:
    try:
      return json.loads(self._path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
      return {}

  @property
  def known(self) -> bool:
    return bool(self._speeds)

  def learn(self, config: Config, progress: Progress) -> None:
    """Takes the speed of an arm that finished here; it replaces a calibration of its shape."""
    seconds = progress.arm.get("seconds") or progress.seconds
    if not progress.tokens_per_s or not seconds:
      return
    overhead = max(seconds - config.train.tokens / progress.tokens_per_s, 0.0)
    self._keep(config, progress.tokens_per_s, overhead)

  def _keep(self, config: Config, tokens_per_s: float, overhead: float) -> None:
    key = shape(config)
    if key in self._calibrated:
      self._calibrated.discard(key)
      del self._speeds[key]
    self._speeds.setdefault(key, []).append(Speed(tokens_per_s, overhead, _flops(config)))

  def save(self, config: Config, tokens_per_s: float, overhead: float) -> None:
    """Keeps a calibration on the disk, for this machine."""
    found = self._read()
    speed = Speed(tokens_per_s, overhead, _flops(config))
    found.setdefault(self._machine, {})[shape(config)] = dataclasses.asdict(speed)
    files.write_atomic(self._path, json.dumps(found, indent=1) + "\n")
    self._speeds[shape(config)] = [speed]
    self._calibrated.add(shape(config))

  def seconds(self, config: Config) -> float | None:
    """Of a whole arm; None where no speed is known."""
    same = self._speeds.get(shape(config))
    every = [s for speeds in self._speeds.values() for s in speeds]
    if not every:
      return None
    overhead = statistics.median(s.overhead_s for s in same or every)
    if same:
      rate = statistics.median(s.tokens_per_s for s in same)
    else:
      rate = statistics.median(s.tokens_per_s * s.flops_per_token for s in every) / _flops(config)
    return config.train.tokens / rate + overhead

  def remaining(self, arms: Sequence[tuple[Config, Progress]], jobs: int) -> float | None:
    """Seconds until all these arms are done, `jobs` at once; None where nothing is known."""
    work = []
    for config, progress in arms:
      if progress.state in OVER:
        continue
      whole = self.seconds(config)
      left = None if whole is None else whole * (1 - progress.share)
      if progress.eta_s is not None:
        left = progress.eta_s
      if left is None:
        return None
      work.append(left)
    return max(max(work, default=0.0), sum(work) / jobs) if work else None


def _flops(config: Config) -> float:
  return counts.flops_per_token(config.model, config.data.sequence_length)
