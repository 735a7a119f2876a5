"""Problems as JSONL, one a line: the fields of `problems.Problem`."""

import dataclasses
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dsv3_jax.config import ConfigError
from dsv3_jax.posttrain import jsonl
from dsv3_jax.posttrain.problems import Problem

_FIELDS = {field.name: field for field in dataclasses.fields(Problem)}
_TEXTS = tuple(name for name, field in _FIELDS.items() if field.type in (str, "str"))
_DEFAULT = Problem("", "")


def write(path: str | Path, problems: Iterable[Problem]) -> Path:
  """Writes problems, without the fields that are as by default; errors as of `jsonl.write`."""
  return jsonl.write(path, ({
      name: getattr(problem, name) for name in _FIELDS
      if name in ("id", "prompt") or getattr(problem, name) != getattr(_DEFAULT, name)}
      for problem in problems))


def read(path: str | Path) -> list[Problem]:
  """Problems of a file, in its order.

  Raises:
    ConfigError: as of `jsonl.read`; or a field that is unknown, missing or of another type, or an
      id that two have.
  """
  seen: set[str] = set()

  def make(record: dict[str, Any]) -> Problem:
    problem = _problem(record)
    if problem.id in seen:
      raise ConfigError(f"id={problem.id!r} was there before; ids must differ")
    seen.add(problem.id)
    return problem

  return jsonl.read(path, make)


def _problem(record: dict[str, Any]) -> Problem:
  jsonl.known(record, tuple(_FIELDS))
  for name in ("id", "prompt"):
    if not record.get(name):
      raise ConfigError(f"{name}={record.get(name)!r} must be a text that is not empty")
  values = dict(record)
  for name in _TEXTS:
    if name in record:
      jsonl.text(record[name], name)
  if "reward" in record:
    values["reward"] = _reward(record["reward"])
  level = record.get("level", 0)
  if type(level) is not int or level < 0:
    raise ConfigError(f"level={level!r} must be a whole number from 0 on")
  if not isinstance(record.get("extra", {}), dict):
    raise ConfigError(f"extra={record['extra']!r} must be an object")
  return Problem(**values)


def _reward(value: Any) -> tuple[tuple[str, float], ...]:
  found = value if isinstance(value, list) else [None]
  for pair in found:
    if not (isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str)
            and type(pair[1]) in (int, float) and math.isfinite(pair[1])):
      raise ConfigError(f"reward={value!r} must be a list of names with weights, such as "
                        '[["exact", 1.0], ["format", 0.1]]')
  return tuple((name, float(weight)) for name, weight in found)
