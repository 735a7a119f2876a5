"""Several processes that train one model: they start, prepare, stop and end together.

    with launch.join(found) as group:   # launch.py
      group.first                       # process 0: it alone writes logs and prepares the data
      group.share("step", text)         # what process 0 says, in all
      group.stop(step, received)        # before each step: whether all end here

jax.distributed connects them: process 0 runs its coordination service, a key-value store with
barriers, beside its own work. Everything here goes through that store and never through the
devices, so that it cannot disturb the order of a step's collectives and works while they hang.

A thread in each process looks at the store every second or two.

- *Signals.* Whoever gets SIGTERM or SIGINT says so. Each process answers with the last step that it
  allowed itself to begin, and waits at the next; the largest of these plus one is where all stop:
  nobody is beyond, and everybody can get there, because a step's collectives are begun by all. A
  training step asks only a variable.
- *Errors.* A process that cannot go on says why before it leaves; the others print that and leave.
- *Lost processes.* Each process counts up a number in the store. Process 0 misses one that stands
  still for `patience` seconds, whatever ended it, and says so. Others then leave by os._exit: a
  collective whose partner is gone may hang for ever, and nothing that waits for it can be closed.
  The newest checkpoint is whole, as after any kill -9.
- *A lost process 0.* With the store gone, jax's client aborts the process at once, from C++, where
  nothing of ours is asked. So each process has a shell that waits on a pipe and has the last word
  when the other end is closed without a farewell. The same serves where they do not come together.

jax's own heartbeats remain behind all this, with a longer limit, for a Python that stands still.
"""

import atexit
import contextlib
import os
import subprocess
import sys
import threading
import time
from typing import Any

import jax

_AGAIN = "Run the same command to go on from the newest checkpoint."


class LastWords:
  """Something to say should this process end without a word of its own, whatever ends it."""

  def __init__(self):
    self._shell = subprocess.Popen(
        ["/bin/sh", "-c", 'trap "" TERM INT HUP; last=; '
                          'while IFS= read -r line; do last=$line; done; '
                          '[ -z "$last" ] || printf "%s\\n" "$last" >&2'],
        stdin=subprocess.PIPE, text=True, start_new_session=True)

  def set(self, text: str) -> None:
    with contextlib.suppress(OSError, ValueError):
      self._shell.stdin.write(text + "\n")
      self._shell.stdin.flush()

  def forget(self) -> None:
    """Nothing more to say; another call does nothing."""
    self.set("")
    with contextlib.suppress(OSError, ValueError, subprocess.TimeoutExpired):
      self._shell.stdin.close()
      self._shell.wait(timeout=5)


class Alone:
  """The group of a process that is alone; the interface of `Group`."""

  index, count, first = 0, 1, True

  def __init__(self):
    self.received: int | None = None  # the signal for which all stop
    self.failed = False

  def stop(self, step: int, received: int | None) -> bool:
    """Whether to begin no further step.

    Args:
      step: steps that were begun.
      received: the signal that this process got, or None.
    """
    self.received = received
    return received is not None

  def share(self, name: str, value: str | None) -> str:
    """Process 0's `value` in all processes, which wait for it; each name once in a run."""
    del name
    return value

  def gather(self, name: str, value: str) -> list[str]:
    """All processes' values in process 0, an empty list in the others; each name once in a run."""
    del name
    return [value]

  def fail(self, error: BaseException) -> None:
    """Tells the others why this process ends; does not return if another one is the reason.

    Call it before anything is closed that may wait for the others.
    """


class Group(Alone):
  """This process among several; see the module's docstring."""

  def __init__(self, client: Any, index: int, count: int, coordinator: str, patience: float,
               last_words: LastWords, run: int = 0):
    """Args:
      client: jax.distributed's.
      index, count: number of this process, and of processes.
      coordinator: HOST:PORT of process 0, to be named.
      patience: seconds after which a process without a sign of life is lost.
      last_words: for this process.
      run: number of the group, for processes that make several in turn; alike in all.
    """
    super().__init__()
    self.index, self.count, self.first = index, count, index == 0
    self._client = client
    self._prefix = f"dsv3/{run}/"
    self._patience, self._coordinator = patience, coordinator
    self._tick = min(2.0, patience / 10)
    self._over = threading.Event()
    self._wake = threading.Event()  # the thread looks before its time
    self._condition = threading.Condition()
    self._begun = -1  # the last step count given to `stop`, which allowed one more
    self._stop_at: int | None = None
    self._noticed = False
    self._said_stop = False
    self._own: int | None = None  # signal that this process got
    who = f"dsv3: process {index} of {count}"
    cause = ("it was killed or crashed" if self.first else
             f"process 0, which coordinates at {coordinator}, was lost, or this process was killed")
    self._who, self._last_words = who, last_words
    last_words.set(f"{who} ended without a word: {cause}. {_AGAIN}")
    self._thread = threading.Thread(target=self._watch, name="processes", daemon=True)
    self._thread.start()

  # --- messages

  def _set(self, name: str, value: str, again: bool = False) -> None:
    self._client.key_value_set(self._prefix + name, value, allow_overwrite=again)

  def _list(self, name: str) -> dict[str, str]:
    """What stands under "name/", by the rest of the key."""
    start = f"{self._prefix}{name}/"
    return {k[k.index(start) + len(start):]: v for k, v in self._client.key_value_dir_get(start)}

  def _get(self, name: str) -> str:
    """Waits for a key as long as it takes: the thread sees to it that somebody is there."""
    while True:
      try:
        return self._client.blocking_key_value_get(self._prefix + name, 5000)
      except jax.errors.JaxRuntimeError as e:
        if "DEADLINE_EXCEEDED" not in str(e):
          raise

  def share(self, name: str, value: str | None) -> str:
    if self.first:
      self._set(f"share/{name}", value)
      return value
    return self._get(f"share/{name}")

  def gather(self, name: str, value: str) -> list[str]:
    key = f"gather/{name}"
    if not self.first:
      self._set(f"{key}/{self.index}", value)
      return []
    values = [value] + [self._get(f"{key}/{i}") for i in range(1, self.count)]
    self._client.key_value_delete(f"{self._prefix}{key}/")
    return values

  # --- stopping together

  def stop(self, step: int, received: int | None) -> bool:
    with self._condition:
      if received is not None and self._own is None:
        self._own = received
        self._wake.set()
      # The process that got a signal waits at once, so that the others cannot run on either.
      while (self._noticed or self._own is not None) and self._stop_at is None:
        self._condition.wait()
      self._begun = step
      return self._stop_at is not None and step >= self._stop_at

  def _agree(self, signals: dict[str, str]) -> None:
    """One look at who wants to stop, and where everybody stands."""
    with self._condition:
      if self._stop_at is not None:
        return
      if self._own is not None and not self._said_stop:
        self._set(f"news/stop/{self.index}", str(self._own))
        self._said_stop = True
      if not signals:
        return
      if not self._noticed:
        self._noticed = True
        self._set(f"begun/{self.index}", str(self._begun))
      begun = self._list("begun")
      if len(begun) == self.count:
        self.received = int(signals[min(signals, key=int)])
        self._stop_at = max(map(int, begun.values())) + 1
        self._condition.notify_all()

  # --- ending

  def _watch(self) -> None:
    seen: dict[int, tuple[str, float]] = {}
    beats = 0
    while not self._over.is_set():
      self._wake.wait(0.05 if self._noticed and self._stop_at is None else self._tick)
      self._wake.clear()
      if self._over.is_set():
        return
      try:
        beats += 1
        self._set(f"beat/{self.index}", str(beats), again=True)
        news = self._list("news")
        if self.first:
          lost = self._missing(seen)
          if lost:
            reason = (f"lost process {', '.join(map(str, lost))}, which gave no sign of life for "
                      f"{self._patience:g} seconds")
            self._set("news/lost", reason)
            self._leave(reason)
      except jax.errors.JaxRuntimeError as e:
        if not self._over.is_set():
          self._leave(f"lost process 0, which coordinates at {self._coordinator} "
                      f"({str(e).splitlines()[0]})")
        return
      for name, value in news.items():
        if name == "lost":
          self._leave(value)
        if name.startswith("error/") and name != f"error/{self.index}":
          self._leave(f"process {name.removeprefix('error/')} ended: {value}")
      try:
        self._agree({k.removeprefix("stop/"): v for k, v in news.items() if k.startswith("stop/")})
      except jax.errors.JaxRuntimeError:
        continue  # the next look says what is wrong

  def _missing(self, seen: dict[int, tuple[str, float]]) -> list[int]:
    """Processes whose number has not moved; `seen` holds numbers and when they came."""
    now, beats = time.monotonic(), self._list("beat")
    for i in range(self.count):
      beat = beats.get(str(i), "")
      if i not in seen or seen[i][0] != beat:
        seen[i] = beat, now
    return [i for i, (_, when) in seen.items() if now - when > self._patience]

  def _leave(self, reason: str) -> None:
    """Ends the process, whatever its other threads wait for."""
    self._last_words.forget()
    print(f"{self._who} ends: {reason}. {_AGAIN}", file=sys.stderr, flush=True)
    if self.first:
      time.sleep(2 * self._tick + 0.5)  # the store ends with us: others read it first
    _exit(1)

  def fail(self, error: BaseException) -> None:
    if self.failed:
      return
    self.failed = True
    if _from_jax(error):  # a collective that broke: the thread will know whose fault it is
      time.sleep(self._patience + 4 * self._tick + 1)
    self._finish()
    with contextlib.suppress(jax.errors.JaxRuntimeError):
      self._set(f"news/error/{self.index}", f"{type(error).__name__}: {error}")
      if self.first:
        time.sleep(2 * self._tick + 0.5)
    self._last_words.forget()
    # Python's exit must not wait for the others: jax would, and what is left of a checkpoint.
    code = 2 if isinstance(error, ValueError | OSError) else 1
    atexit.register(_exit, code)
    timer = threading.Timer(10, _exit, (code,))
    timer.daemon = True
    timer.start()

  def _finish(self) -> None:
    """Ends the thread: this process looks after nobody any more."""
    self._over.set()
    self._wake.set()
    self._thread.join()

  def end(self) -> None:
    """The orderly end, for which all wait."""
    if self.first:
      self._finish()
    self.share("end", "")
    self._finish()
    self._last_words.forget()


def _exit(code: int) -> None:
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(code)


def _from_jax(error: BaseException | None) -> bool:
  while error is not None:
    if isinstance(error, jax.errors.JaxRuntimeError):
      return True
    error = error.__cause__ or error.__context__
  return False
