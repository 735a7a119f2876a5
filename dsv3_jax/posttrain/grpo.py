"""GRPO as a run of the training loop: what stands in the place of a corpus, and the loss."""

import functools
import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dsv3_jax import config
from dsv3_jax.data.tokenizer import Tokenizer
from dsv3_jax.posttrain import objective, reward_model, rewards
from dsv3_jax.posttrain.problems import Problem
from dsv3_jax.posttrain.rollout import Rollouts


def loss_fn(cfg: config.Config) -> Callable:
  """The training step's loss."""
  return functools.partial(objective.loss_fn, cfg=cfg.grpo)


class Policy:
  """Problems, as `train.run` takes a corpus; nothing is held out, `accuracy` measures.

  Args:
    cfg: the run.
    tokenizer: the model's.
    problems: to draw outputs for.
    workdir: of the run.
  """

  folders: tuple[str, ...] = ()

  def __init__(self, cfg: config.Config, tokenizer: Tokenizer, problems: Sequence[Problem],
               workdir: str):
    self.tokenizer, self._cfg, self._workdir = tokenizer, cfg, workdir
    self._problems = tuple(problems)
    digest = hashlib.sha256(tokenizer.hash.encode())
    for problem in problems:
      digest.update(repr((problem.id, problem.prompt, problem.answer, problem.reward)).encode())
    self.fingerprint = digest.hexdigest()[:16]
    self.summary = {"documents": len(problems), "tokens": 0, "note": ""}

  def describe(self) -> str:
    """One line."""
    g = self._cfg.grpo
    return (f"{len(self._problems):,} problems, {g.prompts} of them a rollout, {g.group} outputs "
            "each")

  def train_iterator(self, schedule: Callable[[int], int], rows: Any = None) -> Rollouts:
    """Batches of rollouts."""
    del schedule, rows  # grpo.prompts says how many; one process has all
    reward = rewards.score
    if self._cfg.reward.model:
      reward = functools.partial(reward, rewards=reward_model.load(self._cfg.reward))
    return Rollouts(self._cfg, self.tokenizer, self._problems, reward, self._workdir,
                    self.fingerprint)

  def validation_batches(self, batch_size: int, limit: int = 0) -> list[dict[str, np.ndarray]]:
    """None."""
    return []

  def validation_text(self, limit_bytes: int = 0) -> bytes:
    """None."""
    return b""
