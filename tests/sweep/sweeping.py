"""A small sweep over the stub trainer: python -m tests.sweep.sweeping POOL [seconds a step] [jobs].

Imported for its parts, run as a process where a test kills it.
"""

import sys
from pathlib import Path

from dsv3_jax import config as config_lib
from dsv3_jax.sweep import arm as sweep_arm
from dsv3_jax.sweep import corpus, local, pool, runner, table
from dsv3_jax.sweep.arm import Arm

STEPS = 20
BASE = config_lib.replace(config_lib.Config(), **{
    "data.sequence_length": 8, "data.batch_size": 2, "train.tokens": 16 * STEPS})


def arm(name="base", seed=0, **changes):
  """An arm of BASE; keys with _ for the dot."""
  changes = {key.replace("_", ".", 1): value for key, value in changes.items()}
  config = config_lib.replace(BASE, **changes, **{"train.seed": seed})
  return Arm(name, seed, changes | {"train.seed": seed}, config, config_lib.fingerprint(config))


def sweep(*arms, experiment="experiments/ablate_x.py"):
  arms = arms or tuple(arm(name, seed, optim_lr=lr) for seed in (0, 1)
                       for name, lr in (("base", 0.25), ("more", 0.5)))
  return sweep_arm.make(experiment, "cpu", "Does x help?\n\nMore text.", arms)


def command(pause=0.0):
  stub = str(Path(__file__).with_name("stub.py"))
  return lambda folder: [sys.executable, stub, str(folder), str(pause)]


def no_text():
  """Takes the tokenization out of `corpus.prepare`; returns a function that puts it back."""
  real = corpus.prepare

  def prepare(folder, config, progress=None):
    found = folder / corpus.key(config)
    (found / "data").mkdir(parents=True, exist_ok=True)
    (found / "tokenizer.json").write_text("{}")
    return found

  corpus.prepare = prepare
  return lambda: setattr(corpus, "prepare", real)


def run(folder, its=None, pause=0.0, jobs=1, **options):
  """Runs a sweep (the usual one where None) in a pool; returns its outcome."""
  options = {"ui": table.Lines(stream=options.pop("stream", sys.stderr)), "calibrate": False,
             "poll_s": 0.02, **options}
  return runner.run(its or sweep(), pool.Pool(folder), local.Local(jobs, command(pause)),
                    **options)


if __name__ == "__main__":
  no_text()
  sys.exit(run(sys.argv[1], pause=float(sys.argv[2]), jobs=int(sys.argv[3])).exit_code)
