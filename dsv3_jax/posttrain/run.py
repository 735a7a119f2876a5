"""One run of any kind, by the one training loop: `kind` decides batches and loss alone."""

import glob
import hashlib
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dsv3_jax import config, files, train
from dsv3_jax.config import ConfigError
from dsv3_jax.data.tokenizer import Tokenizer
from dsv3_jax.posttrain import exam, messages, tasks
from dsv3_jax.posttrain.problems import Problem
from dsv3_jax.posttrain.samples import Samples
from dsv3_jax.posttrain.tasks import records
from dsv3_jax.train import begin


def run(cfg: config.Config, workdir: str, **how: Any) -> train.RunResult:
  """`train.run` of a config of any kind; the same arguments and errors besides.

  Raises:
    ConfigError: files that cannot be read, problems that do not exist, a tokenizer that is not the
      workdir's.
  """
  exam.check(cfg.exam)
  result = _run(cfg, workdir, how)
  if result.finished and result.first and cfg.exam.problems:
    exam.take(cfg.exam, workdir, cfg.data.seed)
  return result


def _run(cfg: config.Config, workdir: str, how: dict[str, Any]) -> train.RunResult:
  if cfg.kind == "pretrain":
    return train.run(cfg, workdir, **how)
  cfg = begin.with_tokenizer(cfg)
  tokenizer = _tokenizer(cfg, workdir)
  if cfg.kind == "sft":
    corpus = conversations(cfg, tokenizer)
    steps = math.ceil(cfg.sft.epochs * corpus.rows / cfg.data.batch_size)
    return train.run(_of_steps(cfg, steps), workdir, corpus=corpus, **how)
  if cfg.runtime.mesh.devices > 1 or cfg.runtime.schedule != "none":
    raise ConfigError("kind='grpo' draws and learns on one device; leave runtime.mesh and "
                      "runtime.schedule as they are by default")
  from dsv3_jax.posttrain import grpo  # jax and the engine start here

  cfg = _of_steps(cfg, cfg.grpo.rollouts * cfg.grpo.micro_steps)
  corpus = grpo.Policy(cfg, tokenizer, asked(cfg.grpo, cfg.data.seed), workdir)
  return train.run(cfg, workdir, corpus=corpus, loss_fn=grpo.loss_fn(cfg), **how)


def conversations(cfg: config.Config, tokenizer: Tokenizer) -> Samples:
  """The conversations that `cfg.sft` names.

  Held out are those whose tokens' hash falls into `data.validation_fraction`, so that which they
  are does not depend on the others.

  Raises:
    ConfigError: see `messages.read`, `tasks.make`; nothing fits a sequence.
  """
  found: list[messages.Conversation] = []
  for path in _paths(cfg.sft.files, "sft.files"):
    found += messages.read(path)
  generated = tasks.named(cfg.sft.problems, cfg.data.seed, "sft.problems")
  found += messages.from_problems(generated, cfg.sft.style)
  alone = tasks.named(cfg.sft.answers, cfg.data.seed, "sft.answers")
  found += messages.from_problems(alone, "answer")
  encoded = messages.encode_all(found, tokenizer, cfg.data.sequence_length + 1)
  held, kept = [], []
  for sample in encoded.samples:
    number = int.from_bytes(hashlib.blake2b(sample.tokens.tobytes(), digest_size=8).digest(), "big")
    (held if number < cfg.data.validation_fraction * 2**64 else kept).append(sample)
  said = [f"{n:,} {what}" for n, what in ((encoded.cut, "cut at a turn"),
                                          (encoded.dropped, "too long and left out")) if n]
  return Samples(kept, held, tokenizer, cfg.data.sequence_length, cfg.data.micro_batch,
                 cfg.data.seed, ", ".join(said))


def asked(cfg: config.GRPO, seed: int) -> list[Problem]:
  """The problems that `cfg` names; errors as of `records.read` and `tasks.make`."""
  found = [p for path in _paths(cfg.files, "grpo.files") for p in records.read(path)]
  return found + tasks.named(cfg.problems, seed, "grpo.problems")


def _paths(named: Sequence[str], key: str) -> list[Path]:
  found = []
  for text in named:
    paths = sorted(map(Path, glob.glob(text, recursive=True)))
    if not paths:
      raise ConfigError(f"{key}: {text!r} matches no file")
    found += paths
  return found


def _tokenizer(cfg: config.Config, workdir: str) -> Tokenizer:
  """The tokenizer, of which the workdir gets a copy."""
  tokenizer = Tokenizer.load(cfg.data.tokenizer, cfg.model.vocab_size)
  path = os.path.join(workdir, "tokenizer.json")
  if os.path.exists(path):
    if Tokenizer.load(path, cfg.model.vocab_size).hash != tokenizer.hash:
      raise ConfigError(f"{path} differs from data.tokenizer={cfg.data.tokenizer!r}; take another "
                        "workdir")
  else:
    os.makedirs(workdir, exist_ok=True)
    files.write_atomic(path, tokenizer.to_json())
  return tokenizer


def _of_steps(cfg: config.Config, steps: int) -> config.Config:
  """The config with the tokens of so many steps, however few of them are targets."""
  if cfg.data.batch_start:
    raise ConfigError(f"kind={cfg.kind!r} has no batch ramp; set data.batch_start=0")
  tokens = float(np.float64(steps) * cfg.data.batch_size * cfg.data.sequence_length)
  return config.replace(cfg, **{"train.tokens": tokens})
