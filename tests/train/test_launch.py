"""Which processes a run is to meet."""

import socket

import pytest

from dsv3_jax.config import ConfigError
from dsv3_jax.train import launch

SLURM = {"SLURM_JOB_ID": "4097", "SLURM_STEP_NODELIST": "node[07-08],other", "SLURM_NTASKS": "4",
         "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_STEP_TASKS_PER_NODE": "2(x2)"}
OMPI = {"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
        "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "0",
        "OMPI_COMM_WORLD_LOCAL_SIZE": "1", "OMPI_VERSION": "4.1.5"}


@pytest.fixture
def environment(monkeypatch):
  def put(values):
    for name, value in values.items():
      monkeypatch.setenv(name, value)
  return put


def test_flags():
  """Oracle: the values given."""
  found = launch.find("10.0.0.1:5000", 3, 2, patience=4.0)
  assert found == launch.Launch("10.0.0.1:5000", 3, 2, None, 4.0, 300.0)
  assert launch.find() is None


@pytest.mark.parametrize("given, message", [
    (("a:1", None, None), "--processes and --process missing"),
    ((None, 2, 1), "--coordinator missing"),
    (("host", 2, 1), "'host' must be HOST:PORT"),
    (("a:1", 2, 2), "--process=2 must lie from 0 to 1"),
    (("a:1", 0, 0), "--process=0 must lie"),
])
def test_flags_that_do_not_fit_together(given, message):
  """Oracle: the option and its value in the message."""
  with pytest.raises(ConfigError, match=message):
    launch.find(*given)
  with pytest.raises(ConfigError, match="--patience=0"):
    launch.find("a:1", 2, 1, patience=0)


def test_environments(environment):
  """Oracle: what the managers' documents say their variables mean; one process is alone."""
  environment(OMPI)
  found = launch.find()
  assert (found.coordinator.split(":")[0], found.processes, found.process) == ("10.96.0.1", 2, 1)
  assert found.devices is None  # the only one on its host has all devices
  environment(SLURM)
  assert launch.find("a:1", 2, 0).coordinator == "a:1"  # flags first


def test_slurm(environment):
  """Oracle: as above."""
  environment(SLURM)
  found = launch.find()
  assert (found.coordinator.split(":")[0], found.processes, found.process) == ("node07", 4, 3)
  assert found.devices == (1,)
  assert launch.find(processes=1) is None
  environment({"SLURM_STEP_TASKS_PER_NODE": "1(x4)"})
  assert launch.find().devices is None
  environment({"SLURM_NTASKS": "1", "SLURM_PROCID": "0"})
  assert launch.find() is None
  environment({"SLURM_NTASKS": "many"})
  with pytest.raises(ConfigError, match="--processes=1 to train in this process alone"):
    launch.find()


def test_nobody_there_and_somebody_else_there():
  """Oracle: the address in the message: of a port without a listener, of one that is taken."""
  with socket.socket() as taken:
    taken.bind(("", 0))
    taken.listen()
    port = taken.getsockname()[1]
    with (pytest.raises(launch.ProcessError, match=f"cannot listen at port {port}"),
          launch.join(launch.Launch(f"127.0.0.1:{port}", 2, 0))):
      pass
  with (pytest.raises(launch.ProcessError, match=f"1 of 2 could not reach.*127.0.0.1:{port}"),
        launch.join(launch.Launch(f"127.0.0.1:{port}", 2, 1, start_timeout=0.5))):
    pass
