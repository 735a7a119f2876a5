"""Run as a program: trains the fake corpus in child processes, each of which kills itself.

    python -m tests.train.killed WORKDIR CACHE_DIR STEP...

Each STEP is one attempt: a fresh process goes on with the workdir and is ended by SIGKILL from a
thread a moment after the numbers of that step appeared, wherever the run is by then. The parent
has imported everything and started no backend, so that a child costs no imports.
"""

import functools
import os
import random
import signal
import sys
import threading

import jax

from dsv3_jax import config, train
from dsv3_jax.train import metrics
from tests import quick
from tests.train import fakes


class Killer(metrics.Silent):

  def __init__(self, step: int, delay: float):
    self._step, self._delay = step, delay

  def progress(self, line: str, done: float) -> None:
    if line.startswith(f"step {self._step}/"):
      kill = functools.partial(os.kill, os.getpid(), signal.SIGKILL)
      threading.Timer(self._delay, kill).start()


def attempt(workdir: str, cache_dir: str, step: int, delay: float) -> None:
  jax.config.update("jax_compilation_cache_dir", cache_dir)
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
  jax.jit = functools.partial(jax.jit, compiler_options=quick.options())
  with open(os.path.join(workdir, "..", "config.json")) as f:
    cfg = config.from_json(f.read())
  train.run(cfg, workdir, ui=Killer(step, delay), corpus=fakes.FakeCorpus(cfg))


def main() -> None:
  workdir, cache_dir, *steps = sys.argv[1:]
  for step in map(int, steps):
    delay = random.choice([0.0, 0.001, 0.01, 0.03])
    child = os.fork()
    if child == 0:
      attempt(workdir, cache_dir, step, delay)
      os._exit(0)
    _, status = os.waitpid(child, 0)
    ended = signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else "exit"
    print(step, delay, ended, flush=True)


if __name__ == "__main__":
  main()
