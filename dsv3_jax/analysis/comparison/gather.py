"""Finds the runs that a comparison is of: in workdirs, sweeps' pools and folders of records.

All become records (`records.record`) at once, so that a comparison of workdirs and one of the
records that were kept of them are the same.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dsv3_jax import config as config_lib
from dsv3_jax.analysis import records
from dsv3_jax.config import ConfigError


@dataclasses.dataclass(frozen=True)
class Planned:
  """A run that a sweep consists of; runs of one name differ in the seed alone."""

  name: str
  seed: int
  id: str  # fingerprint of its config


@dataclasses.dataclass(frozen=True)
class Plan:
  """A sweep: what it asks and which runs it consists of. The first one's name is the baseline."""

  name: str
  experiment: str  # path of its file
  question: str
  text: str  # of the experiment's description, after the question
  arms: tuple[Planned, ...]


@dataclasses.dataclass(frozen=True)
class Found:
  """A run's record and where it was found; `named` if it was asked for by itself."""

  record: dict[str, Any]
  where: str
  named: bool

  @property
  def id(self) -> str:
    return self.record["id"]

  @property
  def seed(self) -> int:
    return self.record.get("seed") or 0


@dataclasses.dataclass(frozen=True)
class Runs:
  """What `collect` found.

  Attributes:
    plans: of the sweeps.
    found: at most one for an id, unless `named` ones have one config at several commits.
    states: id -> how it stands, in words, of runs that were planned and are not found or not
      finished.
    notes: what could not be read, and what was found twice.
  """

  plans: tuple[Plan, ...]
  found: tuple[Found, ...]
  states: dict[str, str]
  notes: tuple[str, ...]


def is_workdir(path: str | Path) -> bool:
  """Whether a run was started there."""
  return any((Path(path) / name).is_file() for name in ("config.json", "metrics.jsonl"))


def is_pool(path: str | Path) -> bool:
  """Whether it is the folder of sweeps."""
  return any((Path(path) / name).is_dir() for name in ("sweeps", "arms"))


def plans(pool: str | Path, notes: list[str] | None = None) -> dict[str, Plan]:
  """The sweeps of a pool, by the names of their files without ".json".

  Args:
    pool: the folder.
    notes: gets a sentence for each file that cannot be read.
  """
  found = {}
  for path in sorted((Path(pool) / "sweeps").glob("*.json")):
    try:
      found[path.stem] = _plan(path)
    except (OSError, ValueError, KeyError, TypeError) as error:
      if notes is not None:
        notes.append(f"{path} could not be read: {type(error).__name__}: {error}.")
  return found


def _plan(path: Path) -> Plan:
  values = json.loads(path.read_text(encoding="utf-8"))
  arms = [Planned(str(a["name"]), int(a["seed"]), str(a["id"])) for a in values["arms"]]
  baseline = values.get("baseline")
  arms.sort(key=lambda a: a.name != baseline if baseline else False)  # stable: it comes first
  return Plan(path.stem, str(values.get("experiment") or ""), str(values.get("question") or ""),
              "", tuple(arms))


def collect(sources: Sequence[str | Path], plan: Plan | None = None) -> Runs:
  """The runs of all sources.

  Args:
    sources: workdirs, pools, folders of records, records' files, in any mixture.
    plan: of the one sweep that is meant; otherwise the pools' own plans count. Where there is a
      plan, runs that it has not are left out unless they were named themselves.

  Raises:
    ConfigError: a source is none of these, or there is nothing at all.
  """
  notes: list[str] = []
  found: list[Found] = []
  states: dict[str, str] = {}
  known: list[Plan] = [plan] if plan else []
  for source in map(Path, sources):
    if is_workdir(source):
      found.append(Found(records.record(source), str(source), True))
    elif is_pool(source):
      if plan is None:
        known += plans(source, notes).values()
      found += _arms(source, states, notes)
    elif source.is_file():
      found.append(Found(_one(source), str(source), True))
    elif source.is_dir() and any(source.glob("*.json")):
      made = records.read(source, notes)
      found += [Found(r, str(source / f"{r['id']}.json"), False) for r in made]
    else:
      what = "holds no run, sweep or record" if source.is_dir() else "is not there"
      raise ConfigError(f"{source} {what}; give the workdir of a run or of a sweep, or a folder of "
                        "records (experiments/results)")
  found = [dataclasses.replace(f, record=f.record | {"config": _today(f.record["config"])})
           for f in found]
  for f in found:
    notes += [f"{f.where}: {note}" for note in f.record["notes"]]
  wanted = {a.id for p in known for a in p.arms}
  found = [f for f in found if not wanted or f.named or f.id in wanted]
  found = _newest(found, notes)
  if not found and not wanted:
    raise ConfigError(f"no run was found in {', '.join(map(str, sources))}")
  return Runs(tuple(known), tuple(found), {k: v for k, v in states.items() if k in wanted or not
                                           wanted}, tuple(notes))


def _one(path: Path) -> dict[str, Any]:
  try:
    found = records.load(path)
  except ValueError as error:
    raise ConfigError(f"{path} could not be read: {error}") from error
  if found is None:
    raise ConfigError(f"{path} is no record of a run")
  return found


def _arms(pool: Path, states: dict[str, str], notes: list[str]) -> list[Found]:
  """The runs of a pool; those that have not finished leave a word in `states`."""
  found = []
  for folder in sorted((pool / "arms").glob("*")):
    if not folder.is_dir():
      continue
    arm = {}
    try:
      arm = json.loads((folder / "arm.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
      notes.append(f"{folder / 'arm.json'} could not be read: {error}.")
    id = str(arm.get("id") or folder.name.rpartition("-")[2])
    made = records.record(folder) if is_workdir(folder) else None
    if made is not None:
      found.append(Found(made, str(folder), False))
      id = made["id"]
    if made is None or not made["finished"]:
      states[id] = _state(arm, made)
  return found


def _state(arm: dict[str, Any], made: dict[str, Any] | None) -> str:
  """How an arm that has not finished stands."""
  state = str(arm.get("state") or "unknown")
  if state == "done":
    state = "said to be done, but without its whole result"
  error = arm.get("error") or ""
  last = (error if isinstance(error, str) else "\n".join(map(str, error))).strip().splitlines()
  at = f" at step {made['steps']:,}" if made and made["steps"] else ""
  return f"{state}{at}" + (f": {last[-1]}" if last else "")


def _today(values: dict[str, Any]) -> dict[str, Any]:
  """A config of an earlier version with today's new keys; as it is where it cannot be read."""
  try:
    return records.plain(config_lib.to_dict(config_lib.from_dict(values))) if values else {}
  except ConfigError:
    return values


def _newest(found: list[Found], notes: list[str]) -> list[Found]:
  """One run for each config: a finished one, of these the newest. Says which others there were.

  Runs that were named themselves are kept apart where their commits differ: comparing two versions
  of the code is what their having one config is for.
  """
  by_id: dict[str, list[Found]] = {}
  for f in found:
    by_id.setdefault(f.id, []).append(f)
  kept = []
  for id, several in by_id.items():
    if all(f.named for f in several) and len({f.record["commit"] for f in several}) == len(several):
      kept += several
      continue
    several = sorted(several, key=lambda f: (f.record["finished"], f.record["ended"]))
    best = several.pop()
    kept.append(best)
    for other in several:
      if _essence(other.record) != _essence(best.record):
        notes.append(f"{id} was found more than once: {best.where} (ended {best.record['ended']}) "
                     f"counts, {other.where} (ended {other.record['ended']}) does not.")
  return kept


def _essence(record: dict[str, Any]) -> dict[str, Any]:
  return {k: v for k, v in record.items() if k not in ("folder", "arm", "notes")}
