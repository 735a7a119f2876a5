"""Sets of problems: drawn by a seed, without repeats, from one split."""

import difflib
import math
from collections.abc import Iterator, Mapping, Sequence

from dsv3_jax.config import ConfigError
from dsv3_jax.posttrain.problems import Problem
from dsv3_jax.posttrain.tasks import arithmetic, expressions, lists, recall, symbolic
from dsv3_jax.posttrain.tasks.statements import SPLITS, Choices, Family, Random, every, split_of

_MISSES = 4000  # draws in a row that gave nothing new, after which a level's problems are counted
_WAYS = 300_000  # series of choices that are gone through to count them

_FAMILIES = {family.name: family for module in (arithmetic, symbolic, lists, expressions, recall)
             for family in module.FAMILIES}


def families() -> tuple[str, ...]:
  """Names of the families."""
  return tuple(_FAMILIES)


def family(name: str) -> Family:
  """The family of that name; its `levels` say what each level is.

  Raises:
    ConfigError: there is none (the nearest is named).
  """
  if name not in _FAMILIES:
    near = difflib.get_close_matches(str(name), _FAMILIES, n=1)
    raise ConfigError(f"no family of tasks {name!r}; there are {', '.join(_FAMILIES)}"
                      f"{f'; did you mean {near[0]!r}?' if near else ''}")
  return _FAMILIES[name]


def make(name: str, level: int, count: int, seed: int, split: str = "train") -> list[Problem]:
  """Different problems of one level.

  The first problems of a larger set with the same seed are those of the smaller one.

  Args:
    name: of `families`.
    level: from 0 on.
    count: how many.
    seed: which.
    split: train or test; no problem is in both, whatever the seeds (see statements.py).

  Raises:
    ConfigError: an unknown name, level or split, or more problems than there are.
  """
  own = _checked(name, level, split)
  if count < 0:
    raise ConfigError(f"{count} problems of {name}:{level}; the number must not be negative")
  drawn = _drawn(own, level, seed, split)
  found = [problem for problem, _ in zip(drawn, range(count), strict=False)]
  if len(found) < count:
    raise ConfigError(
        f"{count:,} problems of {name}:{level} ({own.levels[level]}), but its {split} split has "
        f"{len(found):,}; ask for at most as many, or mix in another level")
  return found


def named(texts: Sequence[str], seed: int, key: str, split: str = "train") -> list[Problem]:
  """Problems of several `FAMILY:LEVEL:COUNT`, one after another.

  Args:
    texts: of them.
    seed, split: as of `make`.
    key: of the config, for messages.

  Raises:
    ConfigError: a text of another form, or as of `make`.
  """
  found = []
  for text in texts:
    name, *rest = text.split(":")
    if len(rest) != 2 or not all(x.isdecimal() for x in rest):
      raise ConfigError(f"{key}: {text!r} must be FAMILY:LEVEL:COUNT, such as add:0:1000")
    found += make(name, int(rest[0]), int(rest[1]), seed, split)
  return found


def mixture(parts: Mapping[str, float], count: int, seed: int, split: str = "train"
            ) -> list[Problem]:
  """Problems of several families and levels, shuffled.

  Args:
    parts: "family:level" -> weight; {"add:0": 2, "sort:1": 1}.
    count: of all; each part gets its share, rounded so that they add up.
    seed, split: as of `make`.

  Raises:
    ConfigError: as of `make`, or no part, or a weight that is none.
  """
  if not parts:
    raise ConfigError("a mixture of tasks needs a part, such as {'add:0': 1}")
  named = [_part(name) for name in parts]
  for name, weight in parts.items():
    if not (isinstance(weight, (int, float)) and 0 < weight < math.inf):
      raise ConfigError(f"the weight of {name} is {weight!r}; it must be a positive number")
  share = [count * weight / sum(parts.values()) for weight in parts.values()]
  counts = [int(s) for s in share]
  by_rest = sorted(range(len(share)), key=lambda i: counts[i] - share[i])
  for i in by_rest[:count - sum(counts)]:
    counts[i] += 1
  found = [problem for (name, level), n in zip(named, counts, strict=True)
           for problem in make(name, level, n, seed, split)]
  return Random(f"mixture {seed}").some(found, len(found))


def _part(text: str) -> tuple[str, int]:
  name, _, level = text.partition(":")
  family(name)
  if not level.isdecimal():
    raise ConfigError(f"{text!r} must be a family and a level, such as {name}:0")
  return name, int(level)


def _checked(name: str, level: int, split: str) -> Family:
  own = family(name)
  if not 0 <= level < len(own.levels):
    raise ConfigError(f"{name}:{level}: its levels are 0 ({own.levels[0]}) to "
                      f"{len(own.levels) - 1} ({own.levels[-1]})")
  if split not in SPLITS:
    raise ConfigError(f"split={split!r} must be one of {', '.join(SPLITS)}")
  return own


def _drawn(own: Family, level: int, seed: int, split: str) -> Iterator[Problem]:
  """Different problems by chance, then, where a level has few, those that chance left out."""
  choices = Random(f"{own.name} {level} {split} {seed}")
  seen: set[str] = set()
  misses = 0
  while misses < _MISSES:
    problem = _new(own, level, split, own.draw(level, choices), seen)
    misses = 0 if problem else misses + 1
    if problem:
      yield problem
  left = list(_rest(own, level, split, seen))
  yield from choices.some(left, len(left))


def _rest(own: Family, level: int, split: str, seen: set[str]) -> Iterator[Problem]:
  """All problems of a level that were not yet seen."""
  ways = every(lambda choices: own.draw(level, choices))
  for _, statement in zip(range(_WAYS), ways, strict=False):
    if problem := _new(own, level, split, statement, seen):
      yield problem


def _new(own: Family, level: int, split: str, statement: object, seen: set[str]
         ) -> Problem | None:
  """The problem of a statement, if it is one, of this split, and not yet seen."""
  if statement is None:
    return None
  digest = own.digest(statement)
  if digest in seen or split_of(digest) != split:
    return None
  seen.add(digest)
  solution = own.solve(statement)
  return Problem(
      id=f"{own.name}-{level}-{digest}", prompt=solution.prompt, answer=solution.answer,
      reward=own.reward, worked=solution.short, worked_long=solution.long, family=own.name,
      level=level)


def count(name: str, level: int, split: str = "train", limit: int = 10_000) -> int:
  """How many problems a level has in a split: exactly, or `limit` where it has as many or more.

  Errors as of `make`.
  """
  own = _checked(name, level, split)
  found: set[str] = set()
  choices: Choices = Random("count")
  misses = 0
  while misses < _MISSES:  # most levels have so many that chance finds them at once
    before = len(found)
    _note(own, own.draw(level, choices), split, found)
    misses = 0 if len(found) > before else misses + 1
    if len(found) >= limit:
      return limit
  for _, statement in zip(range(_WAYS), every(lambda c: own.draw(level, c)), strict=False):
    _note(own, statement, split, found)
    if len(found) >= limit:
      return limit
  return len(found)


def _note(own: Family, statement: object, split: str, found: set[str]) -> None:
  if statement is not None and split_of(digest := own.digest(statement)) == split:
    found.add(digest)


def describe(samples: int = 16) -> str:
  """A Markdown table of all families and levels: what is hard, and how long texts are.

  Args:
    samples: problems of which the means of characters are taken.
  """
  lines = ["| task | level | characters of the prompt | worked short | long | example |",
           "|---|---|---|---|---|---|"]
  for name, own in _FAMILIES.items():
    for level, words in enumerate(own.levels):
      found = make(name, level, samples, 0)
      prompt, short, long = (
          f"{round(sum(map(len, texts)) / len(found)):,}" for texts in zip(
              *((p.prompt, p.worked, p.worked_long) for p in found), strict=True))
      example = found[0].prompt.replace("\n", " / ").replace("|", "\\|")
      example = example if len(example) <= 60 else f"{example[:57]}..."
      lines.append(f"| {name}:{level} | {words} | {prompt} | {short} | {long} | {example} |")
  return "\n".join(lines) + "\n"
