"""Several runs in a row, each beginning with an earlier one: pretraining, fine-tuning, GRPO.

A stage is a run with a workdir of its own, WORKDIR/1-pretrain, WORKDIR/2-sft, ... The same command
goes on where it was stopped: a finished stage returns at once, an interrupted one goes on.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from dsv3_jax import config
from dsv3_jax.config import ConfigError


class Stage(NamedTuple):
  """A run of a chain."""

  name: str
  folder: str
  config: config.Config


def run(stages: Sequence[Stage], one: Callable[[config.Config, str], Any],
        say: Callable[[str], Any] = print) -> Any:
  """Runs all stages; returns the result of the last one that ran.

  Args:
    stages: in their order; each but the first has an earlier one's folder in `train.init`.
    one: runs one, as `posttrain.run.run`.
    say: hears which stage begins.
  """
  if not stages:
    raise ConfigError("the experiment has no stage")
  result = None
  for i, stage in enumerate(stages):
    say(f"stage {i + 1} of {len(stages)}: {stage.name} ({stage.config.kind}), {stage.folder}")
    result = one(stage.config, stage.folder)
    if not result.finished or result.exit_code:
      break
  return result
