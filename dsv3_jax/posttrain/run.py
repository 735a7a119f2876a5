"""One run of any kind, by the one training loop: `kind` decides batches and loss alone."""

import glob
import math
import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dsv3_jax import config, files, train, trained
from dsv3_jax.config import ConfigError
from dsv3_jax.data.tokenizer import Tokenizer
from dsv3_jax.posttrain import exam, experts, messages, reward_model, samples, tasks
from dsv3_jax.posttrain.problems import Problem
from dsv3_jax.posttrain.samples import Samples
from dsv3_jax.posttrain.tasks import records
from dsv3_jax.train import begin, metrics


def run(cfg: config.Config, workdir: str, **how: Any) -> train.RunResult:
  """`train.run` of a config of any kind; the same arguments and errors besides.

  Raises:
    ConfigError: files that cannot be read, problems that do not exist, a tokenizer that is not the
      workdir's.
  """
  check(cfg)
  result = _run(cfg, workdir, how)
  if result.finished and not result.exit_code and result.first and cfg.exam.problems:
    exam.take(cfg.exam, workdir, cfg.data.seed)
  return result


def check(cfg: config.Config, coming: Collection[str] = ()) -> None:
  """Raises ConfigError for files, problems and models that a run names and that are not there.

  Args:
    cfg: of any kind.
    coming: workdirs that will be there when it begins: of earlier stages.
  """
  exam.check(cfg.exam)
  init = cfg.train.init
  if init and init not in coming and not os.path.isdir(init):
    raise ConfigError(f"train.init={init!r} is no folder; name the workdir of a run")
  if cfg.kind in ("sft", "distill"):
    _named(cfg)
  if cfg.kind == "grpo":
    asked(cfg.grpo, cfg.data.seed)
    if cfg.reward.model and cfg.reward.model not in coming:
      trained.check(cfg.reward.model)
  if cfg.kind == "reward":
    _paths(cfg.reward.files, "reward.files")
    tasks.named(cfg.reward.problems, cfg.data.seed, "reward.problems")
  for text in cfg.distill.experts if cfg.kind == "distill" else ():
    experts.entry(text, cfg.data.seed, coming)


def _run(cfg: config.Config, workdir: str, how: dict[str, Any]) -> train.RunResult:
  if cfg.kind == "pretrain":
    return train.run(cfg, workdir, **how)
  cfg = begin.with_tokenizer(cfg)
  tokenizer = _tokenizer(cfg, workdir)
  if cfg.kind == "sft":
    corpus = conversations(cfg, tokenizer)
    steps = math.ceil(cfg.sft.epochs * corpus.rows / cfg.data.batch_size)
    return train.run(_of_steps(cfg, steps), workdir, corpus=corpus, **how)
  if cfg.kind == "distill":
    return _distill(cfg, workdir, tokenizer, how)
  if cfg.kind == "reward":
    return _reward(cfg, workdir, tokenizer, how)
  if cfg.runtime.mesh.devices > 1 or cfg.runtime.schedule != "none":
    raise ConfigError("kind='grpo' draws and learns on one device; leave runtime.mesh and "
                      "runtime.schedule as they are by default")
  from dsv3_jax.posttrain import grpo  # jax and the engine start here

  cfg = _of_steps(cfg, cfg.grpo.rollouts * cfg.grpo.micro_steps)
  problems = reward_model.of_problems(asked(cfg.grpo, cfg.data.seed), cfg.reward)
  corpus = grpo.Policy(cfg, tokenizer, problems, workdir)
  return train.run(cfg, workdir, corpus=corpus, loss_fn=grpo.loss_fn(cfg), **how)


def _reward(cfg: config.Config, workdir: str, tokenizer: Tokenizer, how: dict[str, Any]
            ) -> train.RunResult:
  reward_model.check(cfg)
  if cfg.reward.samples and how.get("launch"):
    raise ConfigError("reward.samples draws answers in one process; run it alone, or give what it "
                      f"made ({reward_model.SAMPLED}) in reward.files")
  ui = how.get("ui") or metrics.terminal()
  try:
    found = reward_model.gather(cfg, tokenizer, workdir, _paths(cfg.reward.files, "reward.files"),
                                ui)
  finally:
    if "ui" not in how:
      ui.close()
  corpus = reward_model.corpus(cfg, tokenizer, found)
  cfg = _of_steps(cfg, math.ceil(cfg.reward.epochs * corpus.rows / cfg.data.batch_size))
  result = train.run(cfg, workdir, corpus=corpus, **reward_model.losses(cfg, tokenizer), **how)
  if result.finished and not result.exit_code and result.first and not os.path.exists(
      os.path.join(workdir, reward_model.NAME)):
    measured = reward_model.measure(cfg, workdir, found)
    (how.get("ui") or metrics.Lines()).note(reward_model.said(measured))
  return result


def _distill(cfg: config.Config, workdir: str, tokenizer: Tokenizer, how: dict[str, Any]
             ) -> train.RunResult:
  from dsv3_jax.posttrain import distill, draw  # jax and the engine start here

  if how.get("launch") and not distill.complete(cfg, workdir):
    raise ConfigError("kind='distill' has its experts answer in one process; run the same command "
                      "with --processes=1 until it learns, then with all")
  ui = how.get("ui") or metrics.terminal()
  try:
    corpus = distill.corpus(cfg, workdir, tokenizer, lambda: _named(cfg), ui)
  except draw.Stopped as stopped:
    return train.RunResult(workdir, 0, 0, False, 128 + stopped.args[0], {})
  finally:
    if "ui" not in how:
      ui.close()
  cfg = _of_steps(cfg, math.ceil(cfg.sft.epochs * corpus.rows / cfg.data.batch_size))
  return train.run(cfg, workdir, corpus=corpus, **distill.losses(cfg), **how)


def conversations(cfg: config.Config, tokenizer: Tokenizer) -> Samples:
  """The conversations that `cfg.sft` names.

  Held out are those that `samples.split` says.

  Raises:
    ConfigError: see `messages.read`, `tasks.make`; nothing fits a sequence.
  """
  encoded = messages.encode_all(_named(cfg), tokenizer, cfg.data.sequence_length + 1)
  said = [f"{n:,} {what}" for n, what in ((encoded.cut, "cut at a turn"),
                                          (encoded.dropped, "too long and left out")) if n]
  return Samples(*samples.split(encoded.samples, cfg.data.validation_fraction), tokenizer,
                 cfg.data.sequence_length, cfg.data.micro_batch, cfg.data.seed, ", ".join(said))


def _named(cfg: config.Config) -> list[messages.Conversation]:
  found: list[messages.Conversation] = []
  for path in _paths(cfg.sft.files, "sft.files"):
    found += messages.read(path)
  generated = tasks.named(cfg.sft.problems, cfg.data.seed, "sft.problems")
  found += messages.from_problems(generated, cfg.sft.style)
  alone = tasks.named(cfg.sft.answers, cfg.data.seed, "sft.answers")
  found += messages.from_problems(alone, "answer")
  return found


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
  tokens = float(np.float64(steps) * cfg.data.batch_size * cfg.data.sequence_length)
  return config.replace(cfg, **{"train.tokens": tokens})
