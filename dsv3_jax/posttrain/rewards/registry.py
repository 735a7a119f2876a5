"""Rewards by name, and their weighted sum."""

import difflib
import math
from collections.abc import Callable, Mapping, Sequence

from dsv3_jax.config import ConfigError
from dsv3_jax.posttrain.problems import Problem, Reward, Score

_REWARDS: dict[str, Reward] = {}


def register(name: str) -> Callable[[Reward], Reward]:
  """Decorates a reward: `score` finds it by this name.

  Raises:
    ConfigError: the name is taken.
  """
  def add(reward: Reward) -> Reward:
    if name in _REWARDS:
      raise ConfigError(f"there is a reward {name!r} already; choose another name")
    _REWARDS[name] = reward
    return reward

  return add


def names() -> tuple[str, ...]:
  """Of all registered rewards."""
  return tuple(sorted(_REWARDS))


def get(name: str, rewards: Mapping[str, Reward] | None = None) -> Reward:
  """The reward of that name.

  Args:
    name: registered, or a key of `rewards`.
    rewards: others, which come first.

  Raises:
    ConfigError: there is none; the nearest is named.
  """
  known = {**_REWARDS, **(rewards or {})}
  if name not in known:
    near = difflib.get_close_matches(str(name), known, n=1)
    raise ConfigError(f"no reward {name!r}; there are {', '.join(sorted(known))}"
                      f"{f'; did you mean {near[0]!r}?' if near else ''}")
  return known[name]


def check(problems: Sequence[Problem], rewards: Mapping[str, Reward] | None = None) -> None:
  """Raises ConfigError where a problem names an unknown reward, none, or a weight that is none."""
  for problem in problems:
    where = f"problem {problem.id!r}"
    if not problem.reward:
      raise ConfigError(f"{where} names no reward; give one, such as (('exact', 1.0),)")
    for name, weight in problem.reward:
      try:
        get(name, rewards)
      except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
      if not (isinstance(weight, (int, float)) and 0 < weight < math.inf):
        raise ConfigError(f"{where}: the weight of reward {name!r} is {weight!r}; it must be a "
                          "positive number")


def score(problems: Sequence[Problem], answers: Sequence[str],
          rewards: Mapping[str, Reward] | None = None) -> list[Score]:
  """Each answer's rewards, as their mean by the problem's weights.

  The weights are divided by their sum, so that a right answer has 1 whatever the weights.

  Args:
    problems: one for each answer.
    answers: what a model wrote after each problem.
    rewards: beside the registered ones, by name; those that use a model.

  Returns:
    A score each; its `why` has a part for each reward, where there are several.

  Raises:
    ConfigError: as of `check`, or another number of answers than problems.
    RuntimeError: a reward broke its word.
  """
  if len(problems) != len(answers):
    raise ConfigError(f"{len(answers)} answers to {len(problems)} problems; give one each")
  check(problems, rewards)
  rows: dict[str, list[int]] = {}
  for i, problem in enumerate(problems):
    for name in dict(problem.reward):
      rows.setdefault(name, []).append(i)
  found: dict[tuple[int, str], Score] = {}
  for name, places in rows.items():
    scores = get(name, rewards)([problems[i] for i in places], [answers[i] for i in places])
    if len(scores) != len(places) or not all(0 <= s.value <= 1 for s in scores):
      raise RuntimeError(f"reward {name!r} gave {len(scores)} scores for {len(places)} answers, or "
                         "one outside of 0 to 1")
    found.update({(i, name): s for i, s in zip(places, scores, strict=True)})
  return [_mean([(name, weight, found[i, name]) for name, weight in problem.reward])
          for i, problem in enumerate(problems)]


def _mean(parts: list[tuple[str, float, Score]]) -> Score:
  if len(parts) == 1:
    return parts[0][2]
  total = sum(weight for _, weight, _ in parts)
  value = sum(weight * s.value for _, weight, s in parts) / total
  said = [f"{name} {s.value:g}{f' ({s.why})' if s.why else ''}" for name, _, s in parts]
  return Score(min(value, 1.0), "; ".join(said))
