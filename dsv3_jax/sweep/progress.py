"""Where a run stands, from the files in its workdir: read again and again, and cheaply.

A metrics.jsonl may be long, half written or cut back to a checkpoint's step. What was read is kept,
and only what is new is read; of a long file that is new to us, the tail and a sample of places.
"""

import contextlib
import dataclasses
import json
import math
import os
import statistics
import time
from pathlib import Path
from typing import Any

from dsv3_jax import config as config_lib
from dsv3_jax.sweep import pool

WHOLE = 2**20  # bytes of metrics.jsonl up to which all of it is read at first
_TAIL = 2**16
_SEEN = 256  # last bytes that were read
_PLACES = 64  # of a longer file, for the curve
_RECENT = 40  # training lines that speed is taken from
_PATIENCE = 120.0  # seconds without a line after which a run without arm.json counts as stopped

RUNNING = ("running", "starting")
OVER = ("done", "failed")


@dataclasses.dataclass(frozen=True)
class Progress:
  """A run at a moment. What is not known is None.

  Attributes:
    state: of an arm waiting, queued, starting, running, interrupted, done or failed; of another
      run starting, running, done or stopped.
    step, total: optimizer steps.
    losses: (step, loss) along the run, at most some hundred.
    tokens_per_s: median of late steps.
    eta_s: seconds that the remaining tokens will take, evaluations included.
    seconds: that it has trained, its earlier starts included.
    checkpoint: newest step saved.
    age_s: since the last line was written.
    arm: arm.json.
  """

  folder: Path
  state: str
  step: int = 0
  total: int | None = None
  losses: tuple[tuple[int, float], ...] = ()
  loss: float | None = None
  validation: float | None = None
  max_vio: float | None = None
  tokens_per_s: float | None = None
  eta_s: float | None = None
  seconds: float | None = None
  checkpoint: int | None = None
  age_s: float | None = None
  arm: dict[str, Any] = dataclasses.field(default_factory=dict)

  @property
  def share(self) -> float:
    """Finished share of the steps."""
    return 1.0 if self.state == "done" else self.step / self.total if self.total else 0.0


class Follower:
  """Reads one workdir whenever it is asked."""

  def __init__(self, folder: str | Path):
    self.folder = Path(folder)
    self._config: dict[str, Any] | None = None
    self._ramp: list[tuple[int, int]] = []
    self._reset()

  def _reset(self) -> None:
    self._inode, self._offset, self._rest, self._seen = -1, 0, b"", b""
    self._train: list[dict[str, Any]] = []
    self._eval: dict[str, Any] | None = None
    self._curve: dict[int, float] = {}

  def read(self) -> Progress:
    """Where it stands now; a folder without any file of a run is "waiting"."""
    age = self._follow()
    config, arm = self._read_config(), pool.read_arm(self.folder)
    last = self._train[-1] if self._train else None
    step, tokens = (last["step"], last.get("tokens", 0)) if last else (0, 0)
    wanted = config.get("train", {}).get("tokens")
    total = _total(self._ramp, wanted, step, tokens) if self._ramp else None
    recent = self._train[-_RECENT:]
    rates = [r for r in (_time(line, "tokens_per_s") for line in recent) if r]
    rate = statistics.median(rates) if rates else None
    finished = bool(wanted and tokens >= wanted and (self.folder / "summary.json").exists())
    state = self._state(arm, finished, step, age)
    eta = None
    if wanted and len(rates) > 2 and state not in OVER:  # the first step compiled
      eta = max(wanted - tokens, 0) / _pace(recent, rate)
    return Progress(
        self.folder, state, step, total, tuple(sorted(self._curve.items())),
        last and last.get("loss"), self._eval and self._eval.get("loss"),
        last and last.get("max_vio"), rate, eta, last and _time(last, "elapsed_s"),
        self._checkpoint(), age, arm)

  # --- metrics.jsonl

  def _follow(self) -> float | None:
    """Reads new lines; returns the file's age in seconds."""
    try:
      with open(self.folder / "metrics.jsonl", "rb") as file:
        stat = os.fstat(file.fileno())
        if not self._goes_on(file, stat):
          self._reset()
          self._inode = stat.st_ino
          if stat.st_size > WHOLE:
            self._sample(file, stat.st_size)
        file.seek(self._offset)
        read = file.read()
        new, self._seen = self._rest + read, (self._seen + read)[-_SEEN:]
        self._offset = file.tell()
    except OSError:
      self._reset()
      return None
    *lines, self._rest = new.split(b"\n")
    for line in lines:
      self._take(line)
    if len(self._curve) > 4 * _PLACES:  # the curve stays as coarse as it can be shown
      kept = sorted(self._curve)
      self._curve = {step: self._curve[step] for step in [*kept[:-1:2], kept[-1]]}
    del self._train[:-_RECENT]
    return max(time.time() - stat.st_mtime, 0.0)

  def _goes_on(self, file: Any, stat: os.stat_result) -> bool:
    """Whether the file still begins with what was read: a resumed run cuts it back."""
    if stat.st_ino != self._inode or stat.st_size < self._offset:
      return False
    file.seek(self._offset - len(self._seen))
    return file.read(len(self._seen)) == self._seen

  def _sample(self, file: Any, size: int) -> None:
    """Of a long file, the lines at some places; what follows begins at its tail."""
    for i in range(_PLACES):
      file.seek(i * (size - _TAIL) // _PLACES)
      if i:
        file.readline()  # the rest of a line
      for _ in range(4):  # a line between training lines is of another kind
        line = file.readline()
        if b'"train"' in line[:40]:
          self._take(line)
          break
    file.seek(size - _TAIL)
    file.readline()
    self._offset = file.tell()

  def _take(self, line: bytes) -> None:
    try:
      row = json.loads(line)
    except ValueError:
      return
    if not isinstance(row, dict) or not isinstance(row.get("step"), int):
      return
    if row.get("kind") == "train":
      if self._train and row["step"] <= self._train[-1]["step"]:  # the run went back
        self._train = [r for r in self._train if r["step"] < row["step"]]
        self._curve = {s: v for s, v in self._curve.items() if s < row["step"]}
      self._train.append(row)
      if isinstance(row.get("loss"), int | float):
        self._curve[row["step"]] = row["loss"]
    elif row.get("kind") == "eval":
      self._eval = row

  # --- the other files

  def _read_config(self) -> dict[str, Any]:
    for name in ("config.json", pool.ARM_CONFIG) if self._config is None else ():
      with contextlib.suppress(OSError, ValueError):
        found = json.loads((self.folder / name).read_text(encoding="utf-8"))
        if isinstance(found, dict) and all(
            isinstance(found.get(part, {}), dict) for part in ("data", "train")):
          self._config, self._ramp = found, _ramp(found)
          break
    return self._config or {}

  def _checkpoint(self) -> int | None:
    with contextlib.suppress(OSError):
      return max((int(n) for n in os.listdir(self.folder / "checkpoints") if n.isdigit()),
                 default=None)
    return None

  def _state(self, arm: dict[str, Any], finished: bool, step: int, age: float | None) -> str:
    if not arm:
      if finished:
        return "done"
      if age is None:
        config = self.folder / "config.json"
        with contextlib.suppress(OSError):
          return "starting" if time.time() - config.stat().st_mtime < 10 * _PATIENCE else "stopped"
        return "waiting"
      pace = max((_time(line, "step_s") or 0 for line in self._train[-_RECENT:]), default=0)
      return "running" if age < max(_PATIENCE, 5 * pace) else "stopped"
    state = arm.get("state", "waiting")
    if state in OVER:
      return state
    if state == "running" and self._alive(arm, age):
      return "running" if age is not None and step else "starting"
    if state == "waiting" and arm.get("job"):
      return "queued"
    return "interrupted" if step or state == "running" else "waiting"

  def _alive(self, arm: dict[str, Any], age: float | None) -> bool:
    """Whether someone runs the arm; locks of another host may not be seen here."""
    if pool.is_claimed(self.folder):
      return True
    return bool(arm.get("job")) and age is not None and age < _PATIENCE


def _time(line: dict[str, Any], name: str) -> float | None:
  value = (line.get("time") or {}).get(name)
  return value if isinstance(value, int | float) else None


def _pace(recent: list[dict[str, Any]], rate: float) -> float:
  """Tokens a second over the recent lines, evaluations and checkpoints among them included."""
  usable = [(line.get("tokens"), _time(line, "elapsed_s")) for line in recent]
  usable = [(n, s) for n, s in usable if n is not None and s is not None]
  if len(usable) > 10 and usable[-1][1] > usable[0][1]:
    return max((usable[-1][0] - usable[0][0]) / (usable[-1][1] - usable[0][1]), 1e-9)
  return rate


def _ramp(config: dict[str, Any]) -> list[tuple[int, int]]:
  """(tokens from which it holds, tokens a step) of each stage of the run's batch ramp."""
  data, wanted = config.get("data", {}), config.get("train", {}).get("tokens")
  if not wanted or not data.get("batch_size") or not data.get("sequence_length"):
    return []
  try:
    stages = config_lib.from_dict(data, config_lib.Data, "data").ramp(wanted)
  except config_lib.ConfigError:  # of another version
    stages = [(0, data["batch_size"])]
  return [(first, size * data["sequence_length"]) for first, size in stages if first < wanted]


def _total(ramp: list[tuple[int, int]], wanted: float, step: int, tokens: int) -> int:
  """Steps of the whole run that has come to `step`; the last one is the first to reach `wanted`."""
  ends = [first for first, _ in ramp[1:]] + [math.ceil(wanted)]
  for (_, size), end in zip(ramp, ends, strict=True):
    more = max(-((tokens - end) // size), 0)
    step, tokens = step + more, tokens + more * size
  return step
