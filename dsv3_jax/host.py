"""The host process: its allocator on a CPU, signals that ask it to end, which code it runs."""

import contextlib
import ctypes
import hashlib
import logging
import os
import signal
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

_log = logging.getLogger(__name__)

_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8  # glibc's mallopt(3)


def keep_memory() -> bool:
  """Lets glibc reuse large freed blocks instead of returning them to the kernel.

  XLA on a CPU allocates a step's temporaries as one block and frees it after. By default glibc maps
  such a block afresh every time, and the kernel clears every page again: a third of the tiny
  model's step (measured: 143,000 page faults and 0.27 s of system time against none). Call it
  before any library starts its threads; it changes no result.

  Returns:
    Whether the settings took hold; False where the C library is not glibc.
  """
  if not sys.platform.startswith("linux"):
    return False
  try:
    mallopt = ctypes.CDLL(None).mallopt
  except (OSError, AttributeError):
    return False
  # One arena: only the main one can grow without bound, others map large blocks whatever is said.
  settings = ((_M_ARENA_MAX, 1), (_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1))
  done = all([mallopt(option, value) == 1 for option, value in settings])
  _log.debug("keep_memory: %s", "on" if done else "refused by the C library")
  return done


class Signals(contextlib.AbstractContextManager):
  """SIGINT and SIGTERM ask for an orderly end; a second one ends the process at once.

  The handler may interrupt a write to the terminal, so it writes nothing itself. Outside of the
  main thread signals are someone else's, and nothing is handled.

  Attributes:
    received: the signal's number, or None.
  """

  def __init__(self):
    self.received: int | None = None
    self._before: dict[int, Any] = {}

  def __enter__(self) -> "Signals":
    with contextlib.suppress(ValueError):  # not the main thread
      for number in (signal.SIGINT, signal.SIGTERM):
        self._before[number] = signal.signal(number, self.handle)
    return self

  def __exit__(self, *unused) -> None:
    for number, handler in self._before.items():
      signal.signal(number, handler)

  def handle(self, number: int, frame: types.FrameType | None) -> None:
    """What a signal does."""
    if self.received is not None:
      os._exit(128 + number)
    self.received = number


def commit() -> str:
  """The code's git commit, with "+" where it was changed since; empty outside a checkout."""
  def git(*args: str) -> str:
    done = subprocess.run(["git", *args], cwd=os.path.dirname(__file__), capture_output=True,
                          text=True, timeout=10, check=True)
    return done.stdout.strip()

  try:
    return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "-uno")
                                                     else "")
  except (OSError, subprocess.SubprocessError):
    return ""


# What a training run does not consist of.
_BESIDE = ("analysis", "cli", "cost", "interop", "sweep", "rehearsal.py")


def code() -> str:
  """16 hex digits by which the code of training is known: a hash of its source files.

  Unlike the commit it stays the same when documentation, reports or results change, and it knows
  changes that were not committed.
  """
  root, digest = Path(__file__).parent, hashlib.sha256()
  for path in sorted([*root.rglob("*.py"), *(root.parent / "pallas_kernels").glob("*.py")]):
    name = path.relative_to(root.parent).as_posix()
    if name.split("/")[1] not in _BESIDE:
      digest.update(name.encode() + b"\0" + path.read_bytes() + b"\0")
  return digest.hexdigest()[:16]
