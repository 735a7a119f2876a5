"""Runs a job: an answer's runs, one after another, each in a process of its own.

The job comes as JSON on standard input: {"limits", "walls", "runs", "folders", "wires"}, or
{"probe": .., ..}. For each run a line of JSON goes to standard output: how it ended and what it
wrote (`sandbox.Run`). A line {"broken": ..} says that a wall could not be built; then nothing was
run.
"""

import json
import os
import select
import signal
import time

from . import kernel, program, walls

_BLOCK = 1 << 16
_LAST_WORDS = 1.0  # seconds for what is still in the pipes of a dead program


def main() -> None:
  kernel.die_with_parent()
  job = json.loads(_read_all(0))
  if "probe" in job:
    _write(1, {"walls": walls.probe(job["limits"], job["folders"][0])})
    return
  user = walls.spare_user()
  for run, folder, wire in zip(job["runs"], job["folders"], job["wires"], strict=True):
    parent = os.getpid()
    monitor = os.fork()
    if monitor == 0:
      kernel.die_with_parent()
      if os.getppid() == parent:
        try:
          _write(1, _Monitor(job, run, folder, wire, user).watch())
        except OSError as error:
          _write(1, {"broken": str(error)})
      os._exit(0)
    for descriptor in wire:
      os.close(descriptor)
    os.waitpid(monitor, 0)


class _Monitor:
  """Starts one program, watches it, ends it."""

  def __init__(self, job: dict, run: dict, folder: str, wire: list[int], user: int):
    limits = self._limits = job["limits"]
    self._run, self._wire, self._wired = run, wire, bool(wire)
    walls.namespaces(job["walls"])
    inputs, outputs, errors, results, status = (os.pipe() for _ in range(5))
    self._began = time.monotonic()
    parent = os.getpid()
    self._pid = os.fork()
    if self._pid == 0:
      # Places of the program's descriptors, all else is closed. First out of each other's way.
      kept = [inputs[0], outputs[1], errors[1], wire[1] if wire else results[1],
              wire[0] if wire else outputs[1], status[1]]
      kept = [_high(descriptor) for descriptor in kept]
      for place, descriptor in enumerate(kept):
        os.dup2(descriptor, place)
      os.closerange(len(kept), 1 << 16 if os.sysconf("SC_OPEN_MAX") > 1 << 16 else
                    os.sysconf("SC_OPEN_MAX"))
      _program(job, run, folder, user, parent, status=len(kept) - 1, wired=bool(wire))
    for pair, end in ((inputs, 0), (outputs, 1), (errors, 1), (results, 1), (status, 1)):
      os.close(pair[end])
    for descriptor in wire:
      os.close(descriptor)
    self._input, self._todo = inputs[1], run.get("stdin", "").encode()
    self._status = status[0]
    self._names = {outputs[0]: "stdout", errors[0]: "stderr", results[0]: "results"}
    self._taken = {name: bytearray() for name in self._names.values()}
    self._most = limits["output"]

  def watch(self) -> dict:
    """Until the program has ended, or has been ended; then all it left behind is ended too."""
    broken = _read_all(self._status)  # its end says that the walls stand
    if broken:
      self._end()
      raise OSError(broken.decode())
    done = os.pidfd_open(self._pid)
    poll = select.poll()
    for descriptor in (done, *self._names):
      poll.register(descriptor, select.POLLIN)
    os.set_blocking(self._input, False)
    poll.register(self._input, select.POLLOUT)
    deadline = self._began + self._limits["seconds"]
    ended = ""
    while not ended:
      left = deadline - time.monotonic()
      if left <= 0:
        ended = "time"
        break
      for descriptor, _ in poll.poll(left * 1000):
        if descriptor == done:
          ended = "itself"
        elif descriptor == self._input:
          self._feed(poll)
        elif not self._take(descriptor):
          poll.unregister(descriptor)
        elif max(map(len, self._taken.values())) > self._most:
          ended = "output"
    status, used = self._end()
    self._drain()
    if ended == "itself" and os.WIFSIGNALED(status):
      cpu = used.ru_utime + used.ru_stime
      ended = "cpu" if os.WTERMSIG(status) in (signal.SIGKILL, signal.SIGXCPU) and \
          cpu > self._limits["cpu"] - 0.2 else "signal"
    elif ended == "itself":
      # Its last words, which come after its end, are under the limit too.
      ended = "output" if max(map(len, self._taken.values())) > self._most else "exit"
    text = {name: bytes(data[:self._most]).decode("utf-8", "replace")
            for name, data in self._taken.items()}
    return {"ended": ended, "status": os.waitstatus_to_exitcode(status),
            "seconds": time.monotonic() - self._began, **text}

  def _feed(self, poll) -> None:
    try:
      self._todo = self._todo[os.write(self._input, self._todo[:_BLOCK]):] if self._todo else b""
    except BlockingIOError:
      return
    except OSError:  # the program reads no more
      self._todo = b""
    if not self._todo:
      poll.unregister(self._input)
      os.close(self._input)

  def _take(self, descriptor: int) -> bool:
    """Whether there may be more."""
    data = os.read(descriptor, _BLOCK)
    self._taken[self._names[descriptor]] += data
    return bool(data)

  def _end(self):
    """Kills the program; in a pid namespace, whose first process it is, all others with it."""
    os.kill(self._pid, signal.SIGKILL)
    _, status, used = os.wait4(self._pid, 0)
    return status, used

  def _drain(self) -> None:
    """Takes what the dead program left in its pipes, up to the limit."""
    until = time.monotonic() + _LAST_WORDS
    for descriptor in self._names:
      os.set_blocking(descriptor, False)
      try:
        while (len(self._taken[self._names[descriptor]]) <= self._most
               and time.monotonic() < until and self._take(descriptor)):
          pass
      except BlockingIOError:
        pass


def _program(job: dict, run: dict, folder: str, user: int, parent: int, status: int,
             wired: bool) -> None:
  """The program's process, until its end."""
  try:
    os.setsid()
    for number in range(1, signal.NSIG):
      if number not in (signal.SIGKILL, signal.SIGSTOP, signal.SIGPIPE):
        try:
          signal.signal(number, signal.SIG_DFL)
        except (OSError, ValueError):
          pass
    walls.enter(job["walls"], job["limits"], folder, user)
    if "processes" not in job["walls"] and os.getppid() != parent:
      os._exit(1)
  except BaseException as error:
    os.write(status, f"{type(error).__name__}: {error}".encode() or b"?")
    os._exit(1)
  os.close(status)
  if not wired:
    os.close(program.CALLS)
  os._exit(program.main(run))


def _high(descriptor: int) -> int:
  import fcntl
  return fcntl.fcntl(descriptor, fcntl.F_DUPFD, 100)


def _read_all(descriptor: int) -> bytes:
  blocks = []
  while block := os.read(descriptor, _BLOCK):
    blocks.append(block)
  return b"".join(blocks)


def _write(descriptor: int, record: dict) -> None:
  data = json.dumps(record).encode() + b"\n"
  while data:
    data = data[os.write(descriptor, data):]
