"""Paired, alternating timing and one way to print and keep results.

The two sides of a benchmark take turns in one process (peer, ours, peer, ours, ...), so that what
else the machine does meets both. The ratio is the median of the ratios of the pairs; times are
given as median and minimum. Between two turns the process sleeps: threads of torch and of XLA spin
for a while after their last task and would take cores from the other side.
"""

import argparse
import dataclasses
import datetime
import gc
import importlib.metadata
import json
import os
import pathlib
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

from dsv3_jax import files

RESULTS = pathlib.Path(__file__).parent / "results"
HEADER = ("name", "peer", "ours", "ratio", "target")
_WIDTHS = (52, 26, 26, 7, 0)


@dataclasses.dataclass(frozen=True)
class Line:
  """One row of a benchmark's output.

  Attributes:
    name: what was measured.
    peer, ours: values with their units, as text; "-" where there is no such side.
    ratio: how many times better ours is (over 1) or what the target speaks of; None: none.
    target: the target in words.
    met: whether it was met; None where there is no target.
    details: numbers for the JSON file.
  """

  name: str
  peer: str
  ours: str
  ratio: float | None
  target: str
  met: bool | None = None
  details: dict[str, Any] = dataclasses.field(default_factory=dict)

  def __str__(self) -> str:
    ratio = "-" if self.ratio is None else f"{self.ratio:.3g}x"
    verdict = {True: " (met)", False: " (missed)", None: ""}[self.met]
    return row(self.name, self.peer, self.ours, ratio, self.target + verdict)


def row(*cells: str) -> str:
  """Cells as one aligned line."""
  return " | ".join(c.ljust(w) for c, w in zip(cells, _WIDTHS, strict=True)).rstrip()


def cores() -> int:
  """CPU cores this process may use."""
  return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def seconds(value: float) -> str:
  """A duration in a readable unit."""
  for unit, scale in (("s", 1.0), ("ms", 1e-3)):
    if value >= scale:
      return f"{value / scale:.3g} {unit}"
  return f"{value / 1e-6:.3g} us"


def alternate(sides: dict[str, Callable[[], Any]], rounds: int, *, warmup: int = 1,
              least: float = 0.0, settle: float = 0.05) -> dict[str, list[float]]:
  """Seconds a call of each side, side after side, `rounds` times.

  Args:
    sides: name to a function that returns when its work is done.
    rounds: turns of each side that count.
    warmup: calls of each side before that do not (compilation, caches, allocators).
    least: a turn repeats a call until this many seconds have passed, and gives the mean.
    settle: seconds slept before each turn.
  """
  for run in sides.values():
    for _ in range(warmup):
      run()
  found: dict[str, list[float]] = {name: [] for name in sides}
  enabled = gc.isenabled()
  gc.disable()
  try:
    for _ in range(rounds):
      for name, run in sides.items():
        time.sleep(settle)
        calls, start = 0, time.perf_counter()
        while True:
          run()
          calls += 1
          elapsed = time.perf_counter() - start
          if elapsed >= least:
            break
        found[name].append(elapsed / calls)
      gc.collect()
  finally:
    if enabled:
      gc.enable()
  return found


def paired(over: Sequence[float], under: Sequence[float]) -> float:
  """Median of the ratios of the pairs."""
  return statistics.median(a / b for a, b in zip(over, under, strict=True))


def summary(times: Sequence[float]) -> dict[str, float]:
  """Median, minimum and number of the times of one side."""
  return {"median_s": statistics.median(times), "min_s": min(times), "rounds": len(times)}


def times_text(times: Sequence[float]) -> str:
  """Median and minimum, as a cell."""
  return f"{seconds(statistics.median(times))} (min {seconds(min(times))})"


def device() -> str:
  """The processor's name and the cores used."""
  name = platform.processor() or platform.machine()
  try:
    with open("/proc/cpuinfo", encoding="utf-8") as file:
      name = next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
  except (OSError, StopIteration):
    pass
  return f"{name}, {cores()} cores"


def versions(*packages: str) -> dict[str, str]:
  """Python's version and those of the packages that are installed."""
  found = {"python": platform.python_version()}
  for package in packages or ("jax", "jaxlib", "flax", "torch", "transformers"):
    try:
      found[package] = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
      continue
  return found


def save(benchmark: str, lines: Sequence[Line]) -> pathlib.Path:
  """Writes results/<benchmark>.json atomically: lines, device, versions, load and date."""
  RESULTS.mkdir(exist_ok=True)
  path = RESULTS / f"{benchmark}.json"
  content = {
      "benchmark": benchmark,
      "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
      "device": device(),
      "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
      "versions": versions(),
      "lines": [dataclasses.asdict(line) for line in lines],
  }
  return files.write_atomic(path, json.dumps(content, indent=2, sort_keys=True) + "\n")


def parser(doc: str, rounds: int) -> argparse.ArgumentParser:
  """Arguments that every benchmark has."""
  p = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawTextHelpFormatter)
  p.add_argument("--rounds", type=int, default=rounds,
                 help="turns of each side (default %(default)s)")
  p.add_argument("--save", action="store_true", help="write benchmarks/results/<name>.json")
  return p


def report(benchmark: str, lines: Sequence[Line], keep: bool) -> None:
  """Prints the lines under their header, and saves them where asked to."""
  print(row(*HEADER))
  for line in lines:
    print(line)
  if keep:
    print(f"saved {save(benchmark, lines).relative_to(RESULTS.parent.parent)}")
