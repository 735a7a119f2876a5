"""Arms as jobs of a Ray cluster, through its job submission client: one process an arm.

Ray places a job by the CPUs and GPUs that it asks for. The pool, and this code, must be where every
node sees them under the same path.
"""

import contextlib
import os
import secrets
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dsv3_jax.config import ConfigError
from dsv3_jax.sweep import pool


class Ray:
  """Submits arms.

  Args:
    address: of the cluster's dashboard, such as http://10.0.0.1:8265; None leaves it to
      RAY_ADDRESS.
    gpus, cpus: that an arm asks for.
    command: what trains an arm; `job.command` where None.
    client: in place of ray's JobSubmissionClient.

  Raises:
    ConfigError: ray is not installed, or the cluster cannot be reached.
  """

  name = "ray"
  jobs = 0  # at once: as many as the cluster has room for

  def __init__(self, address: str | None = None, *, gpus: float = 0, cpus: float = 1,
               command: Any = None, client: Any = None):
    self._gpus, self._cpus, self._command = gpus, cpus, command
    if client is None:
      try:
        from ray.job_submission import JobSubmissionClient
      except ImportError as error:
        raise ConfigError("--launcher=ray needs ray with its job submission client: pip install "
                          "'ray[default]'") from error
      try:
        client = JobSubmissionClient(address)
      except Exception as error:  # ConnectionError, RuntimeError, requests' own
        raise ConfigError(f"--launcher=ray: the cluster at {address or 'RAY_ADDRESS'} cannot be "
                          f"reached ({error}); give --address=http://HOST:8265 of its dashboard"
                          ) from error
    self._client = client

  def submit(self, folders: Sequence[Path]) -> list[str]:
    """Queues arms; returns their jobs' names."""
    names = []
    for folder in folders:
      name = f"dsv3-{folder.name}-{secrets.token_hex(3)}"  # Ray takes a name once
      argv = [sys.executable, "-m", "dsv3_jax.sweep.job", str(folder), "--note=launcher=ray",
              f"--note=job={name}"]
      argv += ["--", *self._command(folder)] if self._command else []
      try:
        made = self._client.submit_job(
            entrypoint=shlex.join(argv), submission_id=name,
            runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}},
            metadata={"sweep": str(folder.parent.parent)}, entrypoint_num_cpus=self._cpus,
            **({"entrypoint_num_gpus": self._gpus} if self._gpus else {}))
      except Exception as error:
        raise pool.SweepError(f"Ray did not take the job of {folder.name}: {error}") from error
      names.append(made or name)
    return names

  def alive(self, name: str) -> bool:
    """Whether a job is queued or runs; one that the cluster does not know is neither."""
    with contextlib.suppress(RuntimeError):  # what the client raises for an unknown job
      return str(self._client.get_job_status(name)) in ("PENDING", "RUNNING")
    return False

  def stop(self, number: int) -> None:
    """Jobs outlive the command that submitted them."""
