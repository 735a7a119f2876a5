"""One arm of a sweep: a config with a name, and how arms are made from axes."""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from dsv3_jax import config as config_lib
from dsv3_jax.config import Config, ConfigError

SEED = "train.seed"
_SEEDS = (SEED, "data.seed")  # runs of one arm may see the data in other orders, too


@dataclasses.dataclass(frozen=True)
class Arm:
  """One run of a sweep. Arms of one name differ in their seeds alone."""

  name: str
  seed: int
  overrides: dict[str, Any]  # dotted keys, as the experiment's sweep() yielded them
  config: Config
  id: str  # config.fingerprint of the config: by it the run is found again


@dataclasses.dataclass(frozen=True)
class Sweep:
  """An ablation's arms.

  Attributes:
    experiment: path of the file.
    arg: of its functions.
    text: the file's docstring, whose first line is the question.
    arms: those to run: all, or some of them, or with other seeds.
    baseline: name of the first arm that the file yields, whether it is to run or not.
    kinds: name -> `kind`, of all arms that the file yields, in their order.
  """

  experiment: str
  arg: str | None
  text: str
  arms: tuple[Arm, ...]
  baseline: str
  kinds: dict[str, str]


def make(experiment: str, arg: str | None, text: str, arms: Iterable[Arm]) -> Sweep:
  """A sweep of all arms of its file, the first one's name being the baseline.

  Raises:
    ConfigError: arms cannot be told apart, or there are none (`check`).
  """
  arms = tuple(arms)
  check(arms, experiment)
  kinds = {arm.name: kind(arm.config) for arm in reversed(arms)}
  return Sweep(experiment, arg, text, arms, arms[0].name,
               {arm.name: kinds[arm.name] for arm in arms})


def kind(config: Config) -> str:
  """16 hex digits: equal for configs that differ in their seeds alone."""
  return config_lib.fingerprint(config_lib.replace(config, **dict.fromkeys(_SEEDS, 0)))


def seeds(arms: dict[str, dict[str, Any]], count: int | Sequence[int] = 3
          ) -> Iterator[dict[str, Any]]:
  """What an experiment's `sweep` returns: every named arm with every seed.

  All arms of one seed come before those of the next, so that a sweep that is stopped half-way has
  compared each arm with the baseline.

  Args:
    arms: name -> {dotted key: value}; the first is the baseline.
    count: how many seeds, from 0, or which ones.
  """
  for seed in range(count) if isinstance(count, int) else count:
    for name, changes in arms.items():
      yield {"arm": name, **changes, SEED: seed}


def label(overrides: dict[str, Any]) -> str:
  """A name from what an arm changes: last parts of the keys with their values, without the seed."""
  parts = [f"{key.rpartition('.')[2]}={value}" for key, value in overrides.items() if key != SEED]
  return " ".join(parts) or "base"


def check(arms: Iterable[Arm], where: str) -> None:
  """Raises ConfigError where arms cannot be told apart, or there are none."""
  by_id: dict[str, Arm] = {}
  by_name: dict[tuple[str, int], Arm] = {}
  kinds: dict[str, str] = {}
  for arm in arms:
    if arm.id in by_id:
      raise ConfigError(f"--config={where}: arms {by_id[arm.id].name!r} and {arm.name!r} of seed "
                        f"{arm.seed} have one config; each must differ from the others")
    if (arm.name, arm.seed) in by_name:
      raise ConfigError(f"--config={where}: two configs are called {arm.name!r} with seed "
                        f"{arm.seed}; give one of them another \"arm\"")
    if kinds.setdefault(arm.name, kind(arm.config)) != kind(arm.config):
      raise ConfigError(f"--config={where}: configs called {arm.name!r} differ in more than their "
                        "seeds; give one of them another \"arm\"")
    by_id[arm.id] = by_name[arm.name, arm.seed] = arm
  if not by_id:
    raise ConfigError(f"--config={where}: sweep() yields no arms")
