"""How long a sweep will take: measured speeds, carried from arm to arm by their FLOPs.

An arm's time is its tokens at some speed, and what comes on top: starting, compiling, evaluating.
Both are measured on finished arms of the pool, and before there are any on a few steps of the first
one. POOL/calibration.json keeps them by machine and shape (what a step computes); an arm of another
shape is taken to do as many FLOPs a second. Where nothing was measured the cost model's word counts
(dsv3_jax.cost, which the command line brings along).
"""

import dataclasses
import hashlib
import json
import platform
import socket
import statistics
from collections.abc import Callable, Sequence
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
  jobs = jobs or 1
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
    jobs: arms at once; 0: all.
    price: dollars an hour of one device (a core where there are no others); 0: not said.
    model: seconds of a config by a model of costs, None where it does not know; None for none.
    where: for which devices the model speaks.
    here: whether the arms run on this machine, so that what was measured on it counts.
  """

  def __init__(self, pool: Pool, jobs: int = 1, price: float = 0.0,
               model: Callable[[Config], float | None] | None = None, where: str = "",
               here: bool = True):
    self.price, self._jobs, self._model, self._where, self._here = price, jobs, model, where, here
    self._speeds: dict[str, list[Speed]] = {}
    self._finished: set[str] = set()  # shapes whose speeds are of whole arms
    self._path, self._machine = pool.folder / "calibration.json", machine(jobs)
    for key, value in self._read().get(self._machine, {}).items() if here else ():
      self._speeds[key] = [Speed(**value)]

  def _read(self) -> dict[str, Any]:
    try:
      return json.loads(self._path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
      return {}

  @property
  def known(self) -> bool:
    """Whether anything was measured on this machine."""
    return bool(self._speeds)

  def learn(self, config: Config, progress: Progress) -> None:
    """Takes the speed of an arm that finished here; it replaces a calibration of its shape."""
    seconds = progress.arm.get("seconds")
    there = progress.arm.get("host") == socket.gethostname()
    if not (self._here and there and progress.tokens_per_s and seconds):
      return
    key = shape(config)
    if key not in self._finished:
      self._finished.add(key)
      self._speeds[key] = []
    overhead = max(seconds - config.train.tokens / progress.tokens_per_s, 0.0)
    self._speeds[key].append(Speed(progress.tokens_per_s, overhead, _flops(config)))

  def keep(self, config: Config, tokens_per_s: float, overhead: float) -> None:
    """Takes a calibration, and writes it down for this machine."""
    found, speed = self._read(), Speed(tokens_per_s, overhead, _flops(config))
    found.setdefault(self._machine, {})[shape(config)] = dataclasses.asdict(speed)
    files.write_atomic(self._path, json.dumps(found, indent=1) + "\n")
    self._speeds[shape(config)] = [speed]

  def seconds(self, config: Config) -> float | None:
    """Of a whole arm; None where nothing is known."""
    same = self._speeds.get(shape(config))
    every = [s for speeds in self._speeds.values() for s in speeds]
    if not every:
      return self._model(config) if self._model else None
    overhead = statistics.median(s.overhead_s for s in same or every)
    if same:
      rate = statistics.median(s.tokens_per_s for s in same)
    else:
      rate = statistics.median(s.tokens_per_s * s.flops_per_token for s in every) / _flops(config)
    return config.train.tokens / rate + overhead

  def describe(self, arms: Sequence[Config]) -> str:
    """What all these arms will take, for a person."""
    each = [self.seconds(config) for config in arms]
    if not arms or None in each:
      return ""
    at_once = min(self._jobs or len(arms), len(arms))
    text = f"about {span(each)} each"
    if len(arms) > 1:
      text += f", in all {duration(max(sum(each) / at_once, max(each)))}"
      text += f" with {at_once} at once" if at_once > 1 else " one after another"
    hours, what = 0.0, "core"
    for config, seconds in zip(arms, each, strict=True):
      count = max(len(local.cores()) // at_once, 1)
      if local.gpus() or not self._here:
        count, what = config.runtime.mesh.devices, "device"
      hours += count * seconds / 3600
    text += f": {hours:,.3g} {what}-hours"
    text += f", ${hours * self.price:,.2f} at ${self.price:g} an hour" if self.price else ""
    return f"{text} ({'measured here' if self.known else f'cost model, {self._where}'})"

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
    return max(max(work), sum(work) / (jobs or len(work))) if work else None


def duration(seconds: float | None) -> str:
  """Seconds as 12 s, 3:05 or 1:02:03 (hours), beyond two days as 2.5 d."""
  if seconds is None:
    return "-"
  if seconds >= 2 * 86400:
    return f"{seconds / 86400:.1f} d"
  minutes, seconds = divmod(int(seconds + 0.5), 60)
  hours, minutes = divmod(minutes, 60)
  if hours:
    return f"{hours}:{minutes:02}:{seconds:02}"
  return f"{minutes}:{seconds:02}" if minutes else f"{seconds} s"


def span(seconds: Sequence[float]) -> str:
  """Shortest to longest, or one duration where they are close."""
  low, high = duration(min(seconds)), duration(max(seconds))
  return low if max(seconds) < 1.1 * min(seconds) else f"{low} to {high}"


def _flops(config: Config) -> float:
  return counts.flops_per_token(config.model, config.data.sequence_length)
