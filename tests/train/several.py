"""Run as a program: trains the fake corpus in several processes, as often as asked.

    python -m tests.train.several CACHE_DIR

Each line of stdin is a job in JSON: id, workdir, config (its JSON text), processes, devices (of
each), and end (null, or [process, step, signal]: that process gets the signal a moment after the
numbers of that step appeared). The answer, a line too: id, codes and texts of the processes, and
seconds from the first one's end to the last one's. This process has imported everything and started
no backend, so that its children cost no imports.
"""

import functools
import json
import os
import random
import sys
import tempfile
import threading
import time

import jax

from dsv3_jax import config, rehearsal, train
from dsv3_jax.train import launch, metrics
from tests import quick
from tests.train import fakes

PATIENCE = 4.0


class Ui(metrics.Silent):
  """Prints notes; ends this process's run as asked."""

  def __init__(self, end):
    self._end = end

  def note(self, text: str) -> None:
    print(text, flush=True)

  def progress(self, line: str, done: float) -> None:
    if self._end is not None and line.startswith(f"step {self._end[0]}/"):
      kill = functools.partial(os.kill, os.getpid(), self._end[1])
      threading.Timer(random.choice([0.0, 0.001, 0.01, 0.03]), kill).start()


def child(job: dict, index: int, port: int, cache_dir: str, output: int) -> None:
  os.dup2(output, 1)
  os.dup2(output, 2)
  jax.config.update("jax_compilation_cache_dir", cache_dir)
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
  jax.config.update("jax_num_cpu_devices", job["devices"])
  found = launch.Launch(f"127.0.0.1:{port}", job["processes"], index, patience=PATIENCE,
                        start_timeout=40)
  end = job["end"][1:] if job["end"] and job["end"][0] == index else None
  original = launch._initialize

  def initialize(*args):
    original(*args)
    jax.jit = functools.partial(jax.jit, compiler_options=quick.options())  # asks for a device

  launch._initialize = initialize
  code = 1
  try:
    cfg = config.from_json(job["config"])
    result = train.run(cfg, job["workdir"], ui=Ui(end), corpus=fakes.FakeCorpus(cfg),
                       launch=found)
    print("result", result.step, flush=True)
    code = result.exit_code
  except Exception as e:
    print(f"{type(e).__name__}: {e}", flush=True)
  os._exit(code)


def run(job: dict, cache_dir: str) -> dict:
  port, outputs, pids = rehearsal.free_port(), [], {}
  for index in range(job["processes"]):
    outputs.append(tempfile.TemporaryFile())
    pid = os.fork()
    if pid == 0:
      child(job, index, port, cache_dir, outputs[-1].fileno())
    pids[pid] = index
  codes, ends = {}, []
  while len(codes) < len(pids):
    pid, status = os.wait()
    codes[pids[pid]] = os.waitstatus_to_exitcode(status)
    ends.append(time.monotonic())
  time.sleep(0.2)  # last words come after the end
  for output in outputs:
    output.seek(0)
  return {"id": job["id"], "codes": [codes[i] for i in range(len(pids))],
          "seconds": ends[-1] - ends[0],
          "texts": [o.read().decode(errors="replace") for o in outputs]}


def main() -> None:
  os.environ.pop("XLA_FLAGS", None)
  for line in sys.stdin:
    print(json.dumps(run(json.loads(line), sys.argv[1])), flush=True)


if __name__ == "__main__":
  main()
