"""Measures a few training steps of an arm, to tell how long the arms will take."""

import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from dsv3_jax import config as config_lib
from dsv3_jax import files
from dsv3_jax.config import Config
from dsv3_jax.sweep import corpus, job, pool
from dsv3_jax.sweep.pool import SweepError
from dsv3_jax.sweep.progress import Follower

STEPS = 8


def shortened(config: Config, steps: int) -> Config:
  """A config whose run is over after some steps, one evaluation and one checkpoint."""
  batch = config.data.batch_size * config.data.sequence_length
  return config_lib.replace(config, **{
      "train.tokens": steps * batch, "data.batch_start": 0, "optim.warmup_steps": 1,
      "train.eval_every": steps if config.train.eval_every else 0, "train.checkpoint_every": steps,
      "train.log_every": 1, "train.sample_tokens": 0, "train.numerics_every": 0,
      "train.profile_from": 0})


def measure(config: Config, folder: Path, corpus_folder: Path, cores: Sequence[int] = (),
            devices: str | None = None, command: Callable[[Path], Sequence[str]] | None = None
            ) -> tuple[float, float]:
  """Trains an arm for some steps in a folder that is removed afterwards.

  Args:
    config: the arm's.
    folder: in which the folder is made.
    corpus_folder: of `corpus.prepare`.
    cores, devices: what the arm may use, as `job.Job`'s.
    command: what trains in a folder; `job.command` where None.

  Returns:
    (tokens a second of the training steps, seconds of the whole arm beside them: starting,
    compiling, evaluating).

  Raises:
    SweepError: the training failed, with the last line of what it said.
  """
  short = shortened(config, STEPS)
  with tempfile.TemporaryDirectory(dir=folder, prefix=".calibration-") as name:
    workdir = Path(name)
    files.write_atomic(workdir / pool.ARM_CONFIG, config_lib.to_json(short) + "\n")
    corpus.share(corpus_folder, workdir)
    run = job.Job(workdir, command and command(workdir), cores, devices)
    began = time.monotonic()
    code = run.train()
    seconds = time.monotonic() - began
    progress = Follower(workdir).read()
    if code or not progress.tokens_per_s:
      said = job.last_lines(workdir / pool.OUTPUT, count=1)
      raise SweepError(f"the measured steps failed: {' '.join(said) or f'exit code {code}'}")
  batch = config.data.batch_size * config.data.sequence_length
  rate = progress.tokens_per_s
  evaluations = (config.train.tokens / batch / config.train.eval_every
                 if config.train.eval_every else 1)
  rows = config.data.micro_batch
  each = config.train.eval_batches * rows * config.data.sequence_length / (3 * rate)  # no backward
  return rate, max(seconds - STEPS * batch / rate, 0.0) + max(evaluations - 1, 0) * each
