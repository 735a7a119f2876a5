"""Arms as jobs: submitit with a false sbatch and with its own local cluster, Ray's client faked."""

import os
import re
import signal
import subprocess
import sys
import time
import types

import pytest

from dsv3_jax import cli
from dsv3_jax.config import ConfigError
from dsv3_jax.sweep import local, pool, ray_jobs, runner, slurm, table
from tests.sweep import sweeping
from tests.sweep.sweeping import arm, sweep


@pytest.fixture(autouse=True)
def _without_text():
  put_back = sweeping.no_text()
  yield
  put_back()


@pytest.fixture
def sbatch(tmp_path, monkeypatch):
  """A false SLURM: keeps what is submitted in batches/, and takes jobs in alive for alive."""
  pytest.importorskip("submitit")
  programs, batches = tmp_path / "bin", tmp_path / "batches"
  programs.mkdir()
  batches.mkdir()
  (tmp_path / "alive").write_text("")
  for name, text in {
      "sbatch": f'n=$(ls {batches} | wc -l); cp "$1" {batches}/$n.sh; '
                'echo "Submitted batch job 7$n"',
      "squeue": f'grep -x "$3" {tmp_path}/alive && echo RUNNING; true', "srun": "true"}.items():
    (programs / name).write_text(f"#!/bin/sh\n{text}\n")
    (programs / name).chmod(0o755)
  monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
  return batches


def _submit(folder, launcher, its, **options):
  return runner.submit(its, pool.Pool(folder), launcher, ui=table.Lines(stream=sys.stderr),
                       **options)


def test_what_slurm_is_told(tmp_path, sbatch):
  """Oracle: sbatch's options as SLURM's manual has them; srun runs submitit in every task."""
  its = sweep(arm("a", optim_lr=0.1), arm("b", optim_lr=0.2))
  launcher = slurm.Slurm(
      tmp_path / "pool", nodes=2, tasks_per_node=8, gpus_per_node=8, partition="long",
      account="lab", time="1-12:30:00", options={
          "qos": "high", "constraint": "h100", "switches": "1", "setup": "module load cuda",
          "reboot": "true"})
  outcome = _submit(tmp_path / "pool", launcher, its)
  assert [r.progress.state for r in outcome.rows] == ["queued", "queued"]
  assert [r.progress.arm["job"] for r in outcome.rows] == ["70", "71"]
  text = (sbatch / "0.sh").read_text()
  told = dict(re.findall(r"#SBATCH --([\w-]+)=?(.*)", text))
  for key, value in {"nodes": "2", "ntasks-per-node": "8", "gpus-per-node": "8", "time": "2190",
                     "partition": "long", "account": "lab", "qos": "high", "constraint": "h100",
                     "switches": "1", "signal": "USR2@90", "open-mode": "append"}.items():
    assert told[key] == value, key
  assert "reboot" in told and told["job-name"].startswith("dsv3-a-s0-")
  assert "\nmodule load cuda\n" in text
  assert re.search(r"^srun .* -m submitit.core._submit ", text, re.M)


def test_slurm_is_asked_before_an_arm_is_submitted_again(tmp_path, sbatch):
  """Law: a queued arm is not queued twice, one whose job is gone is."""
  its = sweep(arm("a", optim_lr=0.1), arm("b", optim_lr=0.2))
  _submit(tmp_path / "pool", slurm.Slurm(tmp_path / "pool"), its)
  (tmp_path / "alive").write_text("71\n")
  outcome = _submit(tmp_path / "pool", slurm.Slurm(tmp_path / "pool"), its)
  assert [r.progress.arm["job"] for r in outcome.rows] == ["72", "71"]
  assert len(list(sbatch.iterdir())) == 3


def test_some_at_once_are_a_job_array(tmp_path, sbatch):
  """Oracle: sbatch's --array=FIRST-LAST%AT_ONCE."""
  its = sweep(*(arm(str(i), optim_lr=i / 10) for i in range(1, 4)))
  outcome = _submit(tmp_path / "pool", slurm.Slurm(tmp_path / "pool", jobs=2), its)
  assert "#SBATCH --array=0-2%2\n" in (sbatch / "0.sh").read_text()
  assert [r.progress.arm["job"] for r in outcome.rows] == ["70_0", "70_1", "70_2"]


@pytest.mark.parametrize("text, minutes", [
    ("90", 90), ("90:30", 91), ("2:00:00", 120), ("1-0", 1440), ("1-12:30", 2190),
    ("0-01:00:01", 61)])
def test_time_limits(text, minutes):
  """Oracle: the forms that sbatch's manual lists."""
  assert slurm.minutes(text) == minutes


def test_slurm_refuses_what_cannot_be(tmp_path, monkeypatch):
  """Law: a machine without SLURM, and a time limit of no form, are said at once."""
  pytest.importorskip("submitit")
  monkeypatch.setenv("PATH", str(tmp_path))
  with pytest.raises(ConfigError, match="no sbatch on this machine"):
    slurm.Slurm(tmp_path)
  with pytest.raises(ConfigError, match="--time=soon: MINUTES"):
    slurm.Slurm(tmp_path, time="soon", cluster="local")
  monkeypatch.setattr(slurm.importlib.util, "find_spec", lambda name: None)
  with pytest.raises(ConfigError, match="pip install submitit"):
    slurm.Slurm(tmp_path)


def test_warned_job_saves_and_its_arm_goes_on(tmp_path, monkeypatch):
  """Oracle: the undisturbed run. submitit's own processes, with its signal of a job whose time is
  up: the training saves, the job is queued again and takes it to the same end."""
  pytest.importorskip("submitit")
  monkeypatch.setenv("PYTHONPATH", os.pathsep.join(p for p in sys.path if p))
  its = sweep(arm("a", optim_lr=0.1))
  undisturbed = sweeping.run(tmp_path / "a", its).rows[0].progress
  launcher = slurm.Slurm(tmp_path / "b", cluster="local", command=sweeping.command(0.05))
  row = _submit(tmp_path / "b", launcher, its).rows[0]
  end = time.monotonic() + 20
  while not (row.folder / "saved").exists():
    assert time.monotonic() < end
    time.sleep(0.02)
  os.kill(pool.read_arm(row.folder)["pid"], signal.SIGUSR2)
  assert launcher.submitted[0].result() == 0  # of the job's second start
  found = row.follower.read()
  assert found.state == "done" and found.arm["launcher"] == "slurm"
  assert (found.step, found.loss, found.losses) == (
      undisturbed.step, undisturbed.loss, undisturbed.losses)
  starts = [int(line.split()[2]) for line in (row.folder / "starts").read_text().splitlines()]
  assert len(starts) == 2 and starts[0] == 0 < starts[1] < sweeping.STEPS
  assert found.arm["seconds"] > sweeping.STEPS * 0.05


class _Client:
  """What is used of ray.job_submission.JobSubmissionClient; runs what is submitted."""

  def __init__(self):
    self.jobs = {}

  def submit_job(self, *, entrypoint, submission_id, runtime_env, metadata, entrypoint_num_cpus,
                 entrypoint_num_gpus=None):
    if submission_id in self.jobs:
      raise RuntimeError(f"Job with submission_id {submission_id} already exists")
    self.jobs[submission_id] = subprocess.Popen(
        entrypoint, shell=True, env=os.environ | runtime_env["env_vars"])
    return submission_id

  def get_job_status(self, job_id):
    if job_id not in self.jobs:
      raise RuntimeError(f"Job {job_id} does not exist.")
    code = self.jobs[job_id].wait()
    return "SUCCEEDED" if code == 0 else "FAILED"


def test_ray_runs_arms(tmp_path):
  """Oracle: the same sweep on this machine; a failed arm is submitted again only when asked for."""
  its = sweep(arm("good", optim_lr=0.5), arm("bad", optim_lr=0.666))
  client = _Client()
  launcher = ray_jobs.Ray(client=client, gpus=1, command=sweeping.command())
  first = _submit(tmp_path, launcher, its)
  names = [r.progress.arm["job"] for r in first.rows]
  assert names == list(client.jobs)
  assert all(r.folder.name in name for r, name in zip(first.rows, names, strict=True))
  assert not any(launcher.alive(name) for name in [*names, "unknown"])
  second = _submit(tmp_path, launcher, its)
  assert [r.progress.state for r in second.rows] == ["done", "failed"] and len(client.jobs) == 2
  here = sweeping.run(tmp_path / "here", its)
  assert [r.progress.losses for r in second.rows] == [r.progress.losses for r in here.rows]
  again = _submit(tmp_path, launcher, its, rerun="failed")
  assert list(client.jobs)[2:] == [again.rows[1].progress.arm["job"]]
  launcher.alive(list(client.jobs)[2])


def test_ray_as_it_is_typed(tmp_path, monkeypatch, capsys):
  """Law: the command plans, submits, and leaves with 0; what is asked for reaches the cluster."""
  made = []

  class Client(_Client):
    def __init__(self, address):
      super().__init__()
      made.append(self)

    def submit_job(self, *, submission_id, **given):
      self.jobs[submission_id] = given
      return submission_id

  monkeypatch.setitem(sys.modules, "ray", types.ModuleType("ray"))
  monkeypatch.setitem(sys.modules, "ray.job_submission", types.SimpleNamespace(
      JobSubmissionClient=Client))
  path = tmp_path / "ablate_x.py"
  path.write_text('"""x?"""\nfrom dsv3_jax.config import Config\n\nget_config = lambda: Config()\n'
                  "def sweep():\n  yield {'optim.lr': 0.1}\n  yield {'optim.lr': 0.2}\n")
  assert cli.run(["sweep", f"--config={path}", f"--workdir={tmp_path / 'pool'}", "--launcher=ray",
                  "--gpus-per-node=2", "--address=http://x:1"]) == 0
  assert [job["entrypoint_num_gpus"] for job in made[0].jobs.values()] == [2, 2]
  assert "2 queued" in capsys.readouterr().out


def test_ray_that_is_not_there(monkeypatch):
  """Law: without ray the message says what to install."""
  monkeypatch.setitem(sys.modules, "ray.job_submission", None)
  with pytest.raises(ConfigError, match=r"pip install 'ray\[default\]'"):
    ray_jobs.Ray("http://localhost:8265")


@pytest.mark.parametrize("things, parts, expected", [
    ([0, 1, 2, 3], 2, [[0, 1], [2, 3]]), ([0, 1, 2], 2, [[0], [1, 2]]),
    ([0, 1], 3, [[0], [1], [0]]), ([], 2, [[], []])])
def test_division_of_cores(things, parts, expected):
  """Oracle: by hand."""
  assert local.divide(things, parts) == expected


def test_gpus_are_divided(monkeypatch):
  """Law: arms at once have their own GPUs, and more arms than GPUs are refused."""
  monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")
  assert [devices for _, devices in local.Local(2).slots] == ["4", "5,6"]
  assert local.Local(1).slots == [([], None)]
  with pytest.raises(ConfigError, match="--jobs=4: there are 3 GPUs"):
    local.Local(4)
