"""How the processes of a run come together: from a cluster's environment, or from the command line.

    with launch.join(launch.find()) as group:   # before anything asks jax for devices
      ...

jax.distributed connects them. Its client waits for the others within C++, and aborts the process
where they do not come; what can be said before is looked at first, and what cannot is left as last
words.
"""

import contextlib
import dataclasses
import itertools
import os
import re
import socket
import time
from collections.abc import Iterator

import jax
from jax._src import clusters, distributed  # what they know has no public name

from dsv3_jax.config import ConfigError
from dsv3_jax.train.processes import Alone, Group, LastWords

_RUNS = itertools.count()  # of this process; each has messages of its own


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
    ConfigError: some are given and some are missing, they do not fit together, or the environment
      cannot be made out.
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
  try:
    address, count, index, devices = clusters.ClusterEnv.auto_detect_unset_distributed_params(
        None, None, None, None, None, int(limits.get("start_timeout", Launch.start_timeout)))
  except Exception as e:  # of the Kubernetes client, of mpi4py, of parsing
    raise ConfigError(f"the environment is that of a cluster, which does not tell enough: {e}. "
                      "Give --coordinator=HOST:PORT --processes=N --process=I, or --processes=1 to "
                      "train in this process alone") from e
  if None in (address, count, index) or count == 1:
    return None
  if devices is None or _alone_on_host():  # jax gives each process one device; here it has the host
    return Launch(address, count, index, **limits)
  return Launch(address, count, index, tuple(devices), **limits)


def _alone_on_host() -> bool:
  local = os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE") or os.environ.get(
      "SLURM_STEP_TASKS_PER_NODE", "")
  return re.fullmatch(r"1(\(x\d+\))?", local) is not None


def _reach(launch: Launch) -> None:
  """Waits until process 0 listens; in process 0 looks that it can."""
  host, _, port = launch.coordinator.rpartition(":")
  if launch.process == 0:
    with socket.socket() as s:
      s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
      try:
        s.bind(("", int(port)))
      except OSError as e:
        raise ProcessError(f"process 0 cannot listen at port {port} of its host, as --coordinator="
                           f"{launch.coordinator} asks for: {e.strerror}; take another one, in all "
                           "processes") from e
    return
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


def _initialize(launch: Launch, last_words: LastWords) -> None:
  """Connects the processes, or aborts: jax's client does not return where they do not come."""
  jax.config.update("jax_enable_preemption_service", False)  # its SIGTERM handler replaces ours
  if jax.config.jax_cpu_collectives_implementation is None:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
  last_words.set(
      f"dsv3: process {launch.process} of {launch.processes} did not meet the others at "
      f"{launch.coordinator} in {launch.start_timeout:g} seconds. Look whether they run, with the "
      "same --coordinator and --processes, and each with a --process of its own")
  jax.distributed.initialize(
      launch.coordinator, launch.processes, launch.process, local_device_ids=launch.devices,
      cluster_detection_method="deactivate", initialization_timeout=int(launch.start_timeout),
      heartbeat_timeout_seconds=max(10, int(1.6 * launch.patience)), shutdown_timeout_seconds=60)


@contextlib.contextmanager
def join(launch: Launch | None) -> Iterator[Alone]:
  """The group of this process; nothing may have asked jax for devices before.

  Args:
    launch: of `find`. Where jax.distributed is initialized already, its processes are the group.

  Raises:
    ProcessError: they do not come together in time.
  """
  ours = launch is not None and not jax.distributed.is_initialized()
  last_words = None
  if ours:
    _reach(launch)
    last_words = LastWords()
    try:
      _initialize(launch, last_words)
    except BaseException:
      last_words.forget()
      raise
  state = distributed.global_state
  if state.client is None or state.num_processes == 1:
    if last_words is not None:
      last_words.forget()
    yield Alone()
    return
  patience = Launch.patience if launch is None else launch.patience
  group = Group(state.client, state.process_id, state.num_processes, state.coordinator_address,
                patience, last_words or LastWords(), next(_RUNS))
  try:
    yield group
  except BaseException as error:
    group.fail(error)
    raise
  group.end()
  if ours:
    jax.distributed.shutdown()
