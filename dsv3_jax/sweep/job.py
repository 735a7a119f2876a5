"""One start of one arm: claims it, runs its training as a process, and writes down how it ended.

    python -m dsv3_jax.sweep.job ARM [--cores=0,1] [--devices=0] [-- COMMAND ...]

Every launcher runs this, on whichever machine; a sweep only looks at the arm's files. So an arm
whose sweep was killed still ends as it should. SIGINT and SIGTERM are passed on once, and training
saves. COMMAND is `dsv3 train` on the arm, unless a test says otherwise.
"""

import argparse
import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dsv3_jax import host
from dsv3_jax.sweep import pool

BUSY = 75  # exit code: someone else runs the arm
_TAIL = 15  # lines of an error that are kept
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\r")


def command(folder: str | Path) -> list[str]:
  """The training of an arm, on the machine where this is called."""
  return [sys.executable, "-m", "dsv3_jax.cli", "train",
          f"--config={Path(folder) / pool.ARM_CONFIG}", f"--workdir={folder}"]


def environment() -> dict[str, str]:
  """Of the processes of a sweep: modules are found where this process found them."""
  return os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}


class Job:
  """An arm's training process.

  Args:
    folder: the arm.
    argv: what to run there; `command(folder)` where None.
    cores: CPU cores that it may use; all where empty. XLA sees these alone.
    devices: value of CUDA_VISIBLE_DEVICES; as it is where None.
    first: whether this one of several processes of the run keeps arm.json.
    notes: further values for arm.json (owner, launcher, job).
  """

  def __init__(self, folder: str | Path, argv: Sequence[str] | None = None,
               cores: Sequence[int] = (), devices: str | None = None, first: bool = True,
               notes: dict[str, Any] | None = None):
    self.folder, self.first, self._notes = Path(folder), first, notes or {}
    self._argv, self._cores, self._devices = argv, tuple(cores), devices
    self._child: subprocess.Popen | None = None
    self._signal = 0
    self._began = self._before = 0.0

  def stop(self, number: int = signal.SIGTERM) -> None:
    """Asks the training to save and end; the second time it ends at once."""
    self._signal = number
    if self._child is not None:
      with contextlib.suppress(ProcessLookupError):
        self._child.send_signal(number)

  def interrupt(self) -> None:
    """Within a signal's handler while `run` waits: stops the training, waits until it has saved,
    and notes that the arm goes on later. `run` must not go on afterwards."""
    if self._child is None:
      return
    self.stop()
    with contextlib.suppress(ChildProcessError):  # Popen.wait holds its lock below this handler
      os.waitid(os.P_PID, self._child.pid, os.WEXITED | os.WNOWAIT)
    if self.first:
      pool.write_arm(self.folder, state="waiting", ended=pool.now(), seconds=self._seconds())

  def run(self) -> int:
    """Runs to the end; returns the training's exit code, or BUSY."""
    if not self.first:
      return self.train()
    claimed = pool.claim(self.folder)
    if claimed is None:
      return BUSY
    try:
      before = pool.read_arm(self.folder)
      self._began, self._before = time.monotonic(), before.get("seconds", 0.0)
      if before.get("state") == "done":  # by another sweep, since this start was decided
        return 0
      pool.write_arm(self.folder, state="running", pid=os.getpid(), host=socket.gethostname(),
                     cores=list(self._cores) or None, started=pool.now(), ended=None,
                     exit_code=None, error=None, commit=host.commit(), code=host.code(),
                     **{"launcher": None, "job": None} | self._notes)
      log = self.folder / pool.OUTPUT
      begin = log.stat().st_size if log.exists() else 0
      code = self.train(claimed)
      state, error = self._outcome(code, begin)
      pool.write_arm(self.folder, state=state, exit_code=code, error=error, ended=pool.now(),
                     seconds=self._seconds())
      return code
    finally:
      os.close(claimed)

  def _seconds(self) -> float:
    """Of this start and those before."""
    return round(self._before + time.monotonic() - self._began, 1)

  def train(self, claimed: int | None = None) -> int:
    """Runs the training process alone; it inherits the open file of a claim."""
    rank = "" if self.first else f".{os.environ.get('SLURM_PROCID', os.getpid())}"
    visible = {} if self._devices is None else {"CUDA_VISIBLE_DEVICES": self._devices}
    with open(self.folder / f"{pool.OUTPUT}{rank}", "ab") as log:
      if self._signal:
        return 128 + self._signal
      self._child = subprocess.Popen(
          self._argv or command(self.folder), stdin=subprocess.DEVNULL, stdout=log, stderr=log,
          env=environment() | visible, pass_fds=() if claimed is None else (claimed,),
          start_new_session=True,  # a signal to the group of processes would reach it twice
          preexec_fn=self._begin)
    try:
      if self._signal:  # came in between
        self.stop(self._signal)
      return self._child.wait()
    except BaseException:  # Ctrl-C while a calibration runs: nobody would wait for it
      self._child.kill()
      self._child.wait()
      raise

  def _begin(self) -> None:
    """In the new process, before its program starts."""
    # SLURM's warning goes to all processes of a job; of ours, only the one above knows it.
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    if self._cores:
      os.sched_setaffinity(0, self._cores)  # XLA counts the cores that it may use

  def _outcome(self, code: int, begin: int) -> tuple[str, list[str] | None]:
    """The arm's state after an exit code, and the last lines of what went wrong."""
    if code == 0:
      return "done", None
    if self._signal or code in (128 + signal.SIGINT, 128 + signal.SIGTERM):
      return "waiting", None  # interrupted: it goes on when it is started again
    lines = last_lines(self.folder / pool.OUTPUT, begin)
    if code < 0:
      name = signal.Signals(-code).name
      lines.append(f"killed by {name}" + (" (was memory short?)" if name == "SIGKILL" else ""))
    return "failed", lines or [f"exit code {code}"]


def last_lines(path: Path, begin: int = 0, count: int = _TAIL) -> list[str]:
  """The last lines of a log, from byte `begin` on, without what only a terminal understands."""
  try:
    with open(path, "rb") as file:
      end = file.seek(0, os.SEEK_END)
      file.seek(max(begin, end - 2**14))
      text = file.read().decode("utf-8", "replace")
  except OSError:
    return []
  lines = [_ESCAPES.sub("", line).rstrip() for line in text.splitlines()]
  return [line for line in lines if line][-count:]


def _main() -> int:
  parser = argparse.ArgumentParser(prog="python -m dsv3_jax.sweep.job", description=__doc__)
  parser.add_argument("arm")
  parser.add_argument("--cores", default="")
  parser.add_argument("--devices")
  parser.add_argument("--note", action="append", default=[], metavar="KEY=VALUE")
  own, _, argv = _split(sys.argv[1:])
  args = parser.parse_args(own)
  notes = dict(note.split("=", 1) for note in args.note)
  job = Job(args.arm, argv or None, [int(c) for c in args.cores.split(",") if c], args.devices,
            notes=notes)

  def handle(number: int, frame: types.FrameType | None) -> None:
    job.stop(number)

  for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, handle)
  return job.run()


def _split(words: list[str]) -> tuple[list[str], str, list[str]]:
  at = words.index("--") if "--" in words else len(words)
  return words[:at], "--", words[at + 1:]


if __name__ == "__main__":
  code = _main()
  sys.exit(code if code >= 0 else 128 - code)
