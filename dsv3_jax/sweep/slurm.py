"""Arms as SLURM jobs, through submitit: one job an arm, of one process or of many on many nodes.

    sbatch -> srun -> one task a process -> `Task` -> job.Job -> `dsv3 train`

Each task starts the training, whose processes find each other by SLURM's environment
(train/launch.py); task 0 keeps arm.json. Before a job's time is up, or when it is pre-empted, SLURM
sends SIGUSR2: the training saves, and the job is queued again and goes on. The pool must be on a
file system that all nodes see.
"""

import importlib.util
import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dsv3_jax.config import ConfigError
from dsv3_jax.sweep import job, pool

_REQUEUES = 1000  # submitit's default gives up a job after three full times
_NUMBERS = ("cpus_per_task", "cpus_per_gpu", "gpus_per_task", "signal_delay_s")


class Task:
  """What submitit pickles and calls in every task of an arm's job.

  Args:
    folder: the arm.
    argv: what trains it; `job.command` where None.
  """

  def __init__(self, folder: str, argv: Sequence[str] | None = None):
    self._folder, self._argv = folder, argv
    self._job: job.Job | None = None

  def __call__(self) -> int:
    import submitit

    environment = submitit.JobEnvironment()
    self._job = job.Job(self._folder, self._argv, first=environment.global_rank == 0,
                        notes={"launcher": "slurm", "job": str(environment.job_id)})
    return self._job.run()

  def checkpoint(self) -> Any:
    """Called by submitit within `__call__`, at the warning: training saves, the job requeues."""
    import submitit

    if self._job is not None:
      self._job.interrupt()
    return submitit.helpers.DelayedSubmission(Task(self._folder, self._argv))


def minutes(time: str) -> int:
  """A time limit in one of SLURM's forms: M, M:S, H:M:S, D-H, D-H:M, D-H:M:S; rounded up.

  Raises:
    ConfigError: none of them.
  """
  found = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", time)
  if not found:
    raise ConfigError(f"--time={time}: MINUTES, HH:MM:SS or DAYS-HH:MM:SS is expected")
  days, *rest = found.groups()
  parts = [int(p) for p in rest if p is not None]
  if days is not None:  # D-HH[:MM[:SS]]
    h, m, s = [*parts, 0, 0][:3]
  elif len(parts) == 3:
    h, m, s = parts
  else:  # M or MM:SS
    h, (m, s) = 0, [*parts, 0][:2]
  return max(1, int(days or 0) * 1440 + h * 60 + m + (s > 0))


class Slurm:
  """Submits arms.

  Args:
    pool_folder: submitit's files are kept in its submitit/.
    nodes, tasks_per_node, gpus_per_node, cpus_per_task: of each arm; None leaves it to SLURM.
    partition, account: as sbatch's; None leaves them out.
    time: limit of a job (see `minutes`); it is queued again and goes on when it is over.
    jobs: how many run at once at most; 0: no limit of ours.
    options: any other options of sbatch, and submitit's setup and srun_args.
    cluster: "slurm", or one of submitit's others: "local", "debug".
    command: what trains an arm; `job.command` where None.

  Attributes:
    submitted: submitit's objects of the jobs.

  Raises:
    ConfigError: submitit is not installed, there is no sbatch here, an option is not right.
  """

  name = "slurm"

  def __init__(self, pool_folder: Path, *, nodes: int = 1, tasks_per_node: int = 1,
               gpus_per_node: int | None = None, cpus_per_task: int | None = None,
               partition: str | None = None, account: str | None = None,
               time: str = "1-00:00:00", jobs: int = 0, options: dict[str, str] | None = None,
               cluster: str = "slurm", command: Any = None):
    if importlib.util.find_spec("submitit") is None:
      raise ConfigError("--launcher=slurm needs submitit: pip install submitit")
    if cluster == "slurm" and shutil.which("sbatch") is None:
      raise ConfigError("--launcher=slurm: there is no sbatch on this machine; run the command on "
                        "a login node of the cluster")
    import submitit

    self._command, self._cluster, self.jobs = command, cluster, jobs
    self.submitted: list[Any] = []
    more = {"slurm_max_num_timeout": _REQUEUES} if cluster == "slurm" else {}
    self._executor = submitit.AutoExecutor(folder=pool_folder / "submitit", cluster=cluster, **more)
    try:
      self._executor.update_parameters(
          nodes=nodes, tasks_per_node=tasks_per_node, gpus_per_node=gpus_per_node,
          cpus_per_task=cpus_per_task, timeout_min=minutes(time), slurm_partition=partition,
          slurm_account=account, **_specific(options or {}))
    except (ValueError, NameError, AssertionError) as error:
      raise ConfigError(f"--launcher=slurm: {error}") from error

  def submit(self, folders: Sequence[Path]) -> list[str]:
    """Queues arms; returns their jobs' numbers. With a limit of jobs they are one job array."""
    tasks = [Task(str(f), self._command and list(self._command(f))) for f in folders]
    try:
      if self.jobs and self.jobs < len(tasks):
        self._executor.update_parameters(name="dsv3-sweep", slurm_array_parallelism=self.jobs)
        with self._executor.batch():
          made = [self._executor.submit(task) for task in tasks]
      else:
        made = []
        for folder, task in zip(folders, tasks, strict=True):
          self._executor.update_parameters(name=f"dsv3-{folder.name}")
          made.append(self._executor.submit(task))
    except Exception as error:  # submitit has many kinds, of sbatch's refusals among others
      raise pool.SweepError(f"SLURM did not take the jobs: {error}") from error
    self.submitted += made
    return [str(j.job_id) for j in made]

  def alive(self, number: str) -> bool:
    """Whether a job is queued or runs; where that cannot be asked, it is taken to."""
    if self._cluster != "slurm" or shutil.which("squeue") is None:
      return self._cluster == "slurm"
    asked = subprocess.run(["squeue", "--noheader", "--jobs", number, "--format", "%T"],
                           capture_output=True, text=True, timeout=60)
    return bool(asked.stdout.strip())

  def stop(self, number: int) -> None:
    """Jobs outlive the command that submitted them."""


def _specific(options: dict[str, str]) -> dict[str, Any]:
  """sbatch's options as submitit's parameters: its own names, and the rest as they are."""
  from submitit.slurm.slurm import SlurmExecutor

  own, rest = {}, {}
  for key, text in options.items():
    name = key.replace("-", "_")
    if name == "additional_parameters" or name not in SlurmExecutor._valid_parameters():
      rest[key.replace("_", "-")] = True if text.lower() in ("", "true") else text
    elif name in ("setup", "teardown"):
      own[f"slurm_{name}"] = [text]
    elif name == "srun_args":
      own["slurm_srun_args"] = shlex.split(text)
    else:
      own[f"slurm_{name}"] = int(text) if name in _NUMBERS and text.isdigit() else text
  return own | ({"slurm_additional_parameters": rest} if rest else {})
