"""Several processes: real ones over loopback, and the parts of their group apart."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading

import pytest

from dsv3_jax import config as config_lib
from dsv3_jax.train import checkpoint, processes
from tests.train import fakes, runs

CHANGES = {"optim.ema_decay": 0.9, "optim.ema_every": 2, "runtime.mesh.data": 4}


class _Helper:
  """Runs jobs; see `tests.train.several`."""

  def __init__(self, cache_dir):
    self._child = subprocess.Popen([sys.executable, "-m", "tests.train.several", str(cache_dir)],
                                   stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    self._jobs = 0

  def __call__(self, config, folder, processes, devices, end=None) -> dict:
    self._jobs += 1
    job = {"id": self._jobs, "workdir": str(folder), "config": config_lib.to_json(config),
           "processes": processes, "devices": devices, "end": end}
    self._child.stdin.write(json.dumps(job) + "\n")
    self._child.stdin.flush()
    while True:  # answers to a test that was timed out come before
      answer = json.loads(self._child.stdout.readline())
      if answer["id"] == self._jobs:
        return answer

  def close(self) -> None:
    self._child.communicate()


@pytest.fixture(scope="module")
def helper(cache_dir):
  made = _Helper(cache_dir)
  yield made
  made.close()


@pytest.fixture(scope="module")
def config():
  return fakes.small_config(**CHANGES)


@pytest.fixture(scope="module")
def alone(config, tmp_path_factory, cache_dir):
  """The workdir of one process with four devices."""
  folder = tmp_path_factory.mktemp("alone")
  assert runs.run(config, folder).finished
  return folder


def _assert_same_curve(a, b) -> None:
  """Everything in metrics.jsonl, 1e-6, and the counts exactly."""
  rows_a, rows_b = ([r for r in runs.records(f) if r["kind"] != "config"] for f in (a, b))
  assert [(r["kind"], r["step"]) for r in rows_a] == [(r["kind"], r["step"]) for r in rows_b]
  for x, y in zip(rows_a, rows_b, strict=True):
    assert x.get("load_LE") == y.get("load_LE") and x.get("max_vio_L") == y.get("max_vio_L")
    for key in x.keys() & {"loss", "mtp_loss", "grad_norm", "balance", "accuracy"}:
      assert y[key] == pytest.approx(x[key], rel=1e-6, abs=1e-6), (x["step"], key)


@pytest.fixture(scope="module")
def lost(helper, config, tmp_path_factory):
  """A run of two processes of which one got kill -9 at a random step: its folder, its job."""
  folder, step = tmp_path_factory.mktemp("lost") / "run", random.randint(5, 10)
  return folder, helper(config, folder, 2, 2, [1, step, signal.SIGKILL])


def test_a_lost_process_ends_the_others(lost, config, alone, tmp_path):
  """Oracle: the words of the process that is left; then one process goes on as one did alone."""
  folder, made = lost
  assert made["codes"] == [1, -signal.SIGKILL] and made["seconds"] < 30, made
  assert ("process 0 of 2 ends: lost process 1, which gave no sign of life for 4 seconds. Run the "
          "same command to go on from the newest checkpoint.") in made["texts"][0]
  assert not (folder / "summary.json").exists()
  shutil.copytree(folder, tmp_path / "one")
  assert runs.run(config, tmp_path / "one").finished
  _assert_same_curve(alone, tmp_path / "one")


@pytest.mark.timeout(300)  # four processes' worth of start-up
def test_four_go_on_where_two_were(lost, helper, config, alone, tmp_path):
  """Oracle: one process from the beginning: curve, final numbers, iterator state."""
  folder = tmp_path / "four"
  shutil.copytree(lost[0], folder)
  made = helper(config, folder, 4, 1)
  assert made["codes"] == [0] * 4, made
  assert all(text.endswith("result 12\n") for text in made["texts"])
  _assert_same_curve(alone, folder)
  ours, theirs = (json.loads((f / "summary.json").read_text())["final"] for f in (folder, alone))
  assert ours.pop("mtp_loss") == pytest.approx(theirs.pop("mtp_loss"), rel=1e-6)
  assert ours == pytest.approx(theirs, rel=1e-6)
  assert sorted(os.listdir(folder / "checkpoints")) == sorted(os.listdir(alone / "checkpoints"))
  ours, theirs = (checkpoint.load_params(str(f))[2]["iterator"] for f in (folder, alone))
  assert ours == theirs and list(ours["lanes"]) == list("0123")  # all processes' rows


@pytest.mark.timeout(300)  # five; 20 s
def test_a_signal_to_one_saves_in_all(helper, config, alone, tmp_path):
  """Oracle: one process, after kill -9 of process 0, SIGTERM to process 1 on other axes of the
  mesh with ZeRO-1, and a last part of one process; the words of the process that is left."""
  made = helper(config, tmp_path, 2, 2, [0, 5, signal.SIGKILL])
  assert made["codes"][0] == -signal.SIGKILL and made["codes"][1] not in (0, None)
  assert made["seconds"] < 30
  assert "process 0, which coordinates at 127.0.0.1" in made["texts"][1].splitlines()[-1]
  experts = config_lib.replace(config, **{
      "runtime.mesh.data": 1, "runtime.mesh.node": 2, "runtime.mesh.gpu": 2, "runtime.zero": 1})
  made = helper(experts, tmp_path, 2, 2, [1, 6, signal.SIGTERM])
  assert made["codes"] == [143, 143], made
  steps = {text.splitlines()[-1] for text in made["texts"]}
  step = checkpoint.load_params(str(tmp_path))[2]["step"]
  assert steps == {f"result {step}"} and 6 <= step < 12
  assert "SIGTERM: finishing the step and saving" in made["texts"][0]
  assert runs.run(config, tmp_path).finished
  _assert_same_curve(alone, tmp_path)


def test_the_others_say_why_process_0_ended(helper, config, tmp_path):
  """Oracle: the error of a workdir that is a file, which process 0 alone looks at."""
  (tmp_path / "file").write_text("")
  made = helper(config, tmp_path / "file", 2, 2)
  assert made["codes"] == [1, 1] and made["seconds"] < 10, made
  assert made["texts"][0].startswith("WorkdirError: cannot write to workdir")
  assert ("process 1 of 2 ends: process 0 ended: WorkdirError: cannot write to workdir "
          f"{tmp_path / 'file'}: it is a file") in made["texts"][1]


# --- the group apart ------------------------------------------------------------------------------


class _Store:
  """jax.distributed's key-value store, in memory."""

  def __init__(self):
    self.values, self.condition = {}, threading.Condition()

  def key_value_set(self, key, value, allow_overwrite=False):
    with self.condition:
      assert allow_overwrite or key not in self.values, key
      self.values[key] = value
      self.condition.notify_all()

  def key_value_dir_get(self, key):
    with self.condition:
      return [(k, v) for k, v in self.values.items() if k.startswith(key)]

  def key_value_delete(self, key):
    with self.condition:
      self.values = {k: v for k, v in self.values.items() if not k.startswith(key)}

  def blocking_key_value_get(self, key, timeout_ms):
    with self.condition:
      self.condition.wait_for(lambda: key in self.values)
      return self.values[key]


class _Silent(processes.LastWords):

  def __init__(self):
    pass

  def set(self, text):
    pass

  def forget(self):
    pass


def _groups(count, patience=1.0):
  store = _Store()
  return [processes.Group(store, i, count, "127.0.0.1:1", patience, _Silent())
          for i in range(count)]


@pytest.mark.parametrize("seed", range(3))
def test_all_stop_at_one_step(seed):
  """Law: processes that can be one step apart, two with signals, begin the same steps, and end
  before the last."""
  draw = random.Random(seed)
  groups, ends = _groups(4), {}
  begun, moved = [0] * 4, threading.Condition()

  def work(group):
    me, rng, received = group.index, random.Random(seed * 10 + group.index), None
    at = draw.randint(20, 60) if me in (1, 2) else None
    step = 0
    while step < 5000 and not group.stop(step, received):
      step += 1
      with moved:  # a step's collectives end when all have begun it
        begun[me] = step
        moved.notify_all()
        moved.wait_for(lambda: min(begun) >= begun[me] - 1)
      threading.Event().wait(rng.random() * 1e-3)
      if step == at:
        received = signal.SIGTERM if me == 1 else signal.SIGINT
    ends[me] = step, group.received

  threads = [threading.Thread(target=work, args=(g,)) for g in groups]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join(timeout=30)
  assert len(set(ends.values())) == 1 and len(ends) == 4, ends
  assert 20 <= ends[0][0] < 5000 and ends[0][1] in (signal.SIGTERM, signal.SIGINT)
  enders = [threading.Thread(target=g.end) for g in groups]
  for thread in enders:
    thread.start()
  for thread in enders:
    thread.join(timeout=10)
    assert not thread.is_alive()


def test_values_go_to_one_and_to_all():
  """Oracle: the values that were given, in the order of the processes."""
  groups, found = _groups(3), {}

  def work(group):
    found[group.index] = (group.share("a", "said" if group.first else None),
                          group.gather("b/8", f"value {group.index}"))
    group.end()

  threads = [threading.Thread(target=work, args=(g,)) for g in reversed(groups)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join(timeout=10)
  assert found == {0: ("said", ["value 0", "value 1", "value 2"]), 1: ("said", []), 2: ("said", [])}


def test_the_last_word_is_said_for_a_process_that_was_killed():
  """Oracle: the words given last; none after a farewell."""
  program = ("import os, sys; from dsv3_jax.train import processes; w = processes.LastWords(); "
             "w.set('first'); w.set('it\\'s %s $over'); w.forget() if sys.argv[1:] else None; "
             "os.kill(os.getpid(), 9)")
  for farewell, expected in (([], "it's %s $over\n"), (["farewell"], "")):
    done = subprocess.run([sys.executable, "-c", program, *farewell], capture_output=True,
                          text=True, timeout=60)
    assert done.returncode == -9 and done.stderr == expected
