"""Several processes that train one model: they start, prepare, stop and end together.

    with processes.join(launch) as group:
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
  nothing of ours is asked. So a shell waits on a pipe for each process, and has the last word when
  its end is closed without a farewell.

jax's own heartbeats remain behind all this, with a longer limit, for a Python that stands still.
"""

import atexit
import contextlib
import dataclasses
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import jax
from jax._src import clusters, distributed  # what they know has no public name

from dsv3_jax.config import ConfigError

_PREFIX = "dsv3/"
_AGAIN = "Run the same command to go on from the newest checkpoint."


class ProcessError(RuntimeError):
  """The processes could not come together; the message says what to look at."""


@dataclasses.dataclass(frozen=True)
class Launch:
  """How this process finds the others; see `find`.

  Attributes:
    coordinator: HOST:PORT where process 0 listens.
    processes, process: how many there are, and which this is.
    devices: numbers of this host's devices that belong to this process; all where None.
    patience: seconds without a sign of life after which a process counts as lost.
    start_timeout: seconds that processes wait for each other at the start.
  """

  coordinator: str
  processes: int
  process: int
  devices: tuple[int, ...] | None = None
  patience: float = 30.0
  start_timeout: float = 300.0

  def __post_init__(self):
    if not re.fullmatch(r".+:\d{1,5}", self.coordinator):
      raise ConfigError(f"--coordinator={self.coordinator!r} must be HOST:PORT of process 0, such "
                        "as 10.0.0.1:5000")
    if not 0 <= self.process < self.processes:
      raise ConfigError(f"--process={self.process} must lie from 0 to {self.processes - 1}, for "
                        f"--processes={self.processes}")
    if self.patience <= 0 or self.start_timeout <= 0:
      raise ConfigError(f"--patience={self.patience:g} and --start-timeout={self.start_timeout:g} "
                        "must be positive")


def find(coordinator: str | None = None, processes: int | None = None, process: int | None = None,
         **limits: float) -> Launch | None:
  """How to find the others, or None for a process that is alone.

  Args:
    coordinator, processes, process: as in `Launch`; all None leaves them to the environment that
      SLURM, Open MPI, Kubernetes or a TPU pod gives. processes=1 is alone in any environment.
    limits: `patience`, `start_timeout`.

  Raises:
    ConfigError: some are given and some are missing, or they do not fit together.
  """
  given = {"--coordinator": coordinator, "--processes": processes, "--process": process}
  missing = [name for name, value in given.items() if value is None]
  if processes == 1 and not coordinator and not process:
    return None
  if not missing:
    return Launch(coordinator, processes, process, **limits)
  if len(missing) < 3:
    raise ConfigError(f"{' and '.join(missing)} missing: --coordinator=HOST:PORT --processes=N "
                      "--process=I go together; without any of them the cluster's environment is "
                      "asked, and --processes=1 trains in this process alone")
  address, count, index, devices = clusters.ClusterEnv.auto_detect_unset_distributed_params(
      None, None, None, None, None, int(limits.get("start_timeout", Launch.start_timeout)))
  if None in (address, count, index) or count == 1:
    return None
  if devices is None or _alone_on_host():  # jax gives each process one device; here it has the host
    return Launch(address, count, index, **limits)
  return Launch(address, count, index, tuple(devices), **limits)


def _alone_on_host() -> bool:
  local = os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE") or os.environ.get(
      "SLURM_STEP_TASKS_PER_NODE", "")
  return re.fullmatch(r"1(\(x\d+\))?", local) is not None


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

  def __init__(self, index: int, count: int, coordinator: str, patience: float):
    super().__init__()
    self.index, self.count, self.first = index, count, index == 0
    self._client = distributed.global_state.client
    self._patience = patience
    self._tick = min(2.0, patience / 10)
    self._over = threading.Event()
    self._condition = threading.Condition()
    self._begun = -1  # the last step count given to `stop`, which allowed one more
    self._stop_at: int | None = None
    self._noticed = False
    self._said_stop = False
    self._own: int | None = None  # signal that this process got
    who = f"dsv3: process {index} of {count}"
    cause = ("it was killed or crashed" if self.first else
             f"process 0, which coordinates at {coordinator}, was lost, or this process was killed")
    self._will = subprocess.Popen(
        ["/bin/sh", "-c", 'IFS= read -r line && exit 0; printf "%s\\n" "$0" >&2',
         f"{who} ended without a word: {cause}. {_AGAIN}"],
        stdin=subprocess.PIPE, start_new_session=True)
    self._who = who
    self._thread = threading.Thread(target=self._watch, name="processes", daemon=True)
    self._thread.start()

  # --- messages

  def _set(self, name: str, value: str, again: bool = False) -> None:
    self._client.key_value_set(_PREFIX + name, value, allow_overwrite=again)

  def _list(self, name: str) -> dict[str, str]:
    """What stands under "name/", by the rest of the key."""
    start = f"{_PREFIX}{name}/"
    return {k[k.index(start) + len(start):]: v for k, v in self._client.key_value_dir_get(start)}

  def _get(self, name: str) -> str:
    """Waits for a key as long as it takes: the thread sees to it that somebody is there."""
    while True:
      try:
        return self._client.blocking_key_value_get(_PREFIX + name, 5000)
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
    self._client.key_value_delete(f"{_PREFIX}{key}/")
    return values

  # --- stopping together

  def stop(self, step: int, received: int | None) -> bool:
    with self._condition:
      self._own = received
      while self._noticed and self._stop_at is None:
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
    while not self._over.wait(0.05 if self._noticed and self._stop_at is None else self._tick):
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
          self._leave(f"lost process 0, which coordinates ({str(e).splitlines()[0]})")
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
    self._bury()
    print(f"{self._who} ends: {reason}. {_AGAIN}", file=sys.stderr, flush=True)
    if self.first:
      time.sleep(2 * self._tick + 0.5)  # the store ends with us: others read it first
    _exit(1)

  def _bury(self) -> None:
    """The shell that waits for our end need not say anything."""
    with contextlib.suppress(OSError):
      self._will.communicate(b"\n", timeout=5)

  def fail(self, error: BaseException) -> None:
    if self.failed:
      return
    self.failed = True
    if _from_jax(error):  # a collective that broke: the thread will know whose fault it is
      self._over.wait(self._patience + 4 * self._tick + 1)
    self._over.set()
    self._thread.join()
    with contextlib.suppress(jax.errors.JaxRuntimeError):
      self._set(f"news/error/{self.index}", f"{type(error).__name__}: {error}")
      if self.first:
        time.sleep(2 * self._tick + 0.5)
    self._bury()
    # Python's exit must not wait for the others: jax would, and what is left of a checkpoint.
    code = 2 if isinstance(error, ValueError | OSError) else 1
    atexit.register(_exit, code)
    timer = threading.Timer(10, _exit, (code,))
    timer.daemon = True
    timer.start()

  def end(self) -> None:
    """The orderly end, for which all wait."""
    if self.first:
      self._over.set()
    self.share("end", "")
    self._over.set()
    self._thread.join()
    self._bury()


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


# --- the start ----------------------------------------------------------------------------------


def _reach(launch: Launch) -> None:
  """Waits until process 0 listens; jax's own client aborts where it does not."""
  host, _, port = launch.coordinator.rpartition(":")
  deadline, why = time.monotonic() + launch.start_timeout, None
  while time.monotonic() < deadline:
    try:
      socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
      return
    except OSError as e:
      why = e
      time.sleep(0.2)
  raise ProcessError(
      f"process {launch.process} of {launch.processes} could not reach process 0 at "
      f"{launch.coordinator} in {launch.start_timeout:g} seconds ({why}). Look whether process 0 "
      "runs, whether its host has that name and address on this one, and whether a firewall closes "
      "the port")


def _initialize(launch: Launch) -> None:
  jax.config.update("jax_enable_preemption_service", False)  # its SIGTERM handler replaces ours
  if jax.config.jax_cpu_collectives_implementation is None:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
  try:
    jax.distributed.initialize(
        launch.coordinator, launch.processes, launch.process, local_device_ids=launch.devices,
        cluster_detection_method="deactivate", initialization_timeout=int(launch.start_timeout),
        heartbeat_timeout_seconds=max(10, int(1.6 * launch.patience)), shutdown_timeout_seconds=60)
  except jax.errors.JaxRuntimeError as e:
    raise ProcessError(
        f"process {launch.process} waited {launch.start_timeout:g} seconds for all "
        f"{launch.processes} processes to come to {launch.coordinator} ({str(e).splitlines()[0]}). "
        "Look whether the others run, with the same --coordinator and --processes, whether each "
        "has a --process of its own, and whether the port is free on process 0's host") from e


@contextlib.contextmanager
def join(launch: Launch | None) -> Iterator[Alone]:
  """The group of this process; nothing may have asked jax for devices before.

  Args:
    launch: of `find`. Where jax.distributed is initialized already, its processes are the group.

  Raises:
    ProcessError: they do not come together in time.
  """
  ours = launch is not None and not jax.distributed.is_initialized()
  if ours:
    if launch.process:
      _reach(launch)
    _initialize(launch)
  state = distributed.global_state
  if state.client is None or state.num_processes == 1:
    yield Alone()
    return
  group = Group(state.process_id, state.num_processes, state.coordinator_address,
                Launch.patience if launch is None else launch.patience)
  try:
    yield group
  except BaseException as error:
    group.fail(error)
    raise
  group.end()
  if ours:
    jax.distributed.shutdown()
