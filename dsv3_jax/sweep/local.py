"""Arms as processes of this machine, one after another or several at once.

Several at once get a part of the cores each, before jax starts: XLA makes as many threads as it may
use cores, and arms that shared all of them would wait for each other. Where there are GPUs they are
divided likewise (CUDA_VISIBLE_DEVICES).

Each arm is in a process group of its own, so that Ctrl-C reaches it once, through the sweep.
"""

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from dsv3_jax.config import ConfigError
from dsv3_jax.sweep import job, pool

Command = Callable[[Path], Sequence[str]]  # an arm's folder -> what trains it


def cores() -> list[int]:
  """The CPU cores that this process may use."""
  if hasattr(os, "sched_getaffinity"):
    return sorted(os.sched_getaffinity(0))
  return list(range(os.cpu_count() or 1))


def gpus() -> list[str]:
  """What CUDA_VISIBLE_DEVICES allows, or all NVIDIA GPUs of the machine."""
  given = os.environ.get("CUDA_VISIBLE_DEVICES")
  if given is not None:
    return [name for name in given.split(",") if name and name != "-1"]
  if os.environ.get("JAX_PLATFORMS", "cuda").startswith("cpu") or not shutil.which("nvidia-smi"):
    return []
  try:
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20)
  except (OSError, subprocess.SubprocessError):
    return []
  return [str(i) for i in range(sum(s.startswith("GPU ") for s in listed.stdout.splitlines()))]


def divide(things: Sequence, parts: int) -> list[list]:
  """Cuts a sequence into parts as equal as can be; with fewer things than parts, in turn."""
  if len(things) < parts:
    return [[things[i % len(things)]] for i in range(parts)] if things else [[]] * parts
  edges = [i * len(things) // parts for i in range(parts + 1)]
  return [list(things[a:b]) for a, b in zip(edges, edges[1:], strict=False)]


class Local:
  """Starts arms on this machine.

  Args:
    jobs: how many at once.
    command: what trains an arm; `job.command` where None.

  Attributes:
    jobs, command: as given.
    slots: (cores, GPUs or None) of each of the arms that run at once; the cores are empty where
      there is only one slot, which has the machine.

  Raises:
    ConfigError: more at once than there are GPUs.
  """

  name = "local"

  def __init__(self, jobs: int = 1, command: Command | None = None):
    if jobs < 1:
      raise ConfigError(f"--jobs={jobs} must be positive")
    self.jobs, self.command = jobs, command
    visible = gpus() if jobs > 1 else []
    if visible and jobs > len(visible):
      raise ConfigError(f"--jobs={jobs}: there are {len(visible)} GPUs, and an arm wants one of "
                        f"its own; use --jobs={len(visible)}, or JAX_PLATFORMS=cpu")
    shares = [",".join(part) for part in divide(visible, jobs)] if visible else [None] * jobs
    whole = jobs == 1 or not hasattr(os, "sched_setaffinity")
    self.slots = list(zip([[]] * jobs if whole else divide(cores(), jobs), shares, strict=True))
    self._running: dict[Path, tuple[subprocess.Popen, int]] = {}

  @property
  def running(self) -> list[Path]:
    """Arms that this sweep started and that have not ended, as far as `poll` has seen."""
    return list(self._running)

  def start(self, folder: Path) -> None:
    """Starts an arm in a free slot."""
    used = {slot for _, slot in self._running.values()}
    slot = next(i for i in range(self.jobs) if i not in used)
    own, visible = self.slots[slot]
    argv = [sys.executable, "-m", "dsv3_jax.sweep.job", str(folder), f"--note=owner={os.getpid()}"]
    argv += [f"--cores={','.join(map(str, own))}"] * bool(own)
    argv += [f"--devices={visible}"] * (visible is not None)
    argv += ["--", *self.command(folder)] if self.command else []
    with open(folder / pool.OUTPUT, "ab") as log:
      process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                                 env=job.environment(), start_new_session=True)
    self._running[folder] = process, slot

  def poll(self) -> dict[Path, int]:
    """Exit codes of the arms that have ended since the last call."""
    ended = {folder: process.returncode for folder, (process, _) in self._running.items()
             if process.poll() is not None}
    for folder in ended:
      del self._running[folder]
    return ended

  def stop(self, number: int) -> None:
    """Passes a signal on to the arms: they save, the second time they end at once."""
    for process, _ in self._running.values():
      with contextlib.suppress(ProcessLookupError):
        process.send_signal(number)
