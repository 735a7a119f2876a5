"""What the training loop adds to the compiled step, and how soon a run takes its first step.

Overhead: the loop of `dsv3 train` (data, transfers, schedules, metrics to JSONL and TensorBoard,
host EMA, progress) against the bare compiled step on a batch that lies ready, turn about, in one
process, on experiments/tiny.py.

First step: from starting the command to the first line of metrics.jsonl, with a compilation cache
that an earlier run filled: in a workdir whose data are prepared, and in a new one, where a
tokenizer is trained and the text is tokenized too.

    python -m benchmarks.loop_overhead
"""

import importlib.util
import os
import pathlib
import signal
import statistics
import subprocess
import sys
import tempfile
import time

from benchmarks import common

OVERHEAD_TARGET, START_TARGET = 1.03, 25.0
ROOT = pathlib.Path(__file__).parent.parent
EXPERIMENT = ROOT / "experiments" / "tiny.py"


class _StopAt:
  """Stands for the loop's signals: asks it to end at a step."""

  def __init__(self, trainer, step: int):
    self._trainer, self._step = trainer, step

  @property
  def received(self):
    return signal.SIGTERM if self._trainer.step >= self._step else None


def overhead(steps: int, rounds: int) -> common.Line:
  """Seconds a step in the loop and bare."""
  import jax
  import numpy as np

  from dsv3_jax import config as config_lib
  from dsv3_jax.data import pipeline
  from dsv3_jax.train import loop, metrics, processes, state
  from dsv3_jax.train.workdir import Workdir

  spec = importlib.util.spec_from_file_location("experiment", EXPERIMENT)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  cfg = config_lib.replace(module.get_config(), **{
      "train.eval_every": 0, "train.checkpoint_every": 10**9, "train.tokens": 1e9})
  loop.use_compilation_cache()
  with tempfile.TemporaryDirectory() as folder, Workdir(folder, cfg) as workdir, \
      open(os.devnull, "w") as nowhere:
    corpus = pipeline.prepare(cfg.data, cfg.model.vocab_size, folder)
    trainer = loop._Trainer(cfg, workdir, corpus, metrics.Lines(0.0, nowhere), processes.Alone())
    trainer.save = lambda: None
    tokens_ABS = jax.device_put(next(corpus.train_iterator(trainer.schedule))["tokens"])
    hyper = jax.device_put(state.Hyper(*map(np.float32, (1e-4, 1e-3, 0.3))))

    def looped():
      trainer.train(_StopAt(trainer, trainer.step + steps))

    def bare():
      for _ in range(steps):
        trainer.state, found = trainer.train_step(trainer.state, {"tokens": tokens_ABS}, hyper)
      jax.block_until_ready((trainer.state, found))

    times = common.alternate({"bare": bare, "loop": looped}, rounds)
    trainer.close()
  times = {name: [t / steps for t in found] for name, found in times.items()}
  ratio = common.paired(times["loop"], times["bare"])
  return common.Line(
      "training loop / bare compiled step", common.times_text(times["bare"]),
      common.times_text(times["loop"]), ratio, "under 1.03x", ratio < OVERHEAD_TARGET,
      {name: common.summary(found) for name, found in times.items()})


def first_step(workdir: str, cache: str) -> float:
  """Seconds from the command to the first line of metrics; the run is killed then."""
  lines = pathlib.Path(workdir) / "metrics.jsonl"
  lines.unlink(missing_ok=True)
  environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": cache, "PYTHONPATH": str(ROOT)}
  command = [sys.executable, "-m", "dsv3_jax.cli", "train", f"--config={EXPERIMENT}",
             f"--workdir={workdir}"]
  start = time.perf_counter()
  process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL,
                             start_new_session=True)
  try:
    while not (lines.exists() and lines.stat().st_size):
      if process.poll() is not None:
        raise RuntimeError(f"{' '.join(command)} ended with status {process.returncode}")
      time.sleep(0.02)
    return time.perf_counter() - start
  finally:
    if process.poll() is None:
      os.killpg(process.pid, signal.SIGKILL)  # with the workers that read its data
    process.wait()


def starts(rounds: int) -> list[common.Line]:
  """Times to the first step."""
  with tempfile.TemporaryDirectory() as folder:
    cache = os.path.join(folder, "cache")
    cold = first_step(os.path.join(folder, "cold"), cache)
    again = [first_step(os.path.join(folder, "cold"), cache) for _ in range(rounds)]
    new = [first_step(os.path.join(folder, f"new{i}"), cache) for i in range(rounds)]
  lines = []
  for name, times in (("prepared data", again), ("new workdir", new)):
    median = statistics.median(times)
    lines.append(common.Line(
        f"command to first step, warm cache, {name}", f"cold cache {cold:.3g} s",
        common.times_text(times), cold / median, "under 25 s", median < START_TARGET,
        {"cold_s": cold, "warm": common.summary(times)}))
  return lines


def main(argv: list[str] | None = None) -> None:
  p = common.parser(__doc__, rounds=6)
  p.add_argument("--steps", type=int, default=10, help="steps of one turn")
  p.add_argument("--starts", type=int, default=2, help="starts of each kind")
  args = p.parse_args(argv)
  os.environ.setdefault("JAX_PLATFORMS", "cpu")
  lines = starts(args.starts) if args.starts else []
  lines.append(overhead(args.steps, args.rounds))
  common.report("loop_overhead", lines, args.save)


if __name__ == "__main__":
  main()
