"""Arms of an experiment: runs that differ in their seed alone, with a name, and their metrics."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from typing import Any

from dsv3_jax.analysis import statistics
from dsv3_jax.analysis.comparison.gather import Found, Planned, Runs

SEED = "train.seed"
_SEEDS = (SEED, "data.seed")  # of a sweep's arm, both may change from run to run
_LABEL_KEYS = 3  # in an arm's name that is made of what differs


@dataclasses.dataclass(frozen=True)
class Metric:
  """A number of a run; `form` prints it, `wide` says it whole with its unit."""

  short: str
  wide: str
  form: str
  of: Callable[[dict[str, Any]], Any]


def _final(key: str) -> Callable[[dict[str, Any]], Any]:
  return lambda record: record["final"].get(key)


METRICS = {
    "loss": Metric("validation loss", "validation loss (nats per token)", ".4f", _final("loss")),
    "bits_per_byte": Metric("bits per byte", "bits per byte of the validation text", ".4f",
                            _final("bits_per_byte")),
    "smoothed": Metric("training loss, smoothed", "training loss, smoothed (nats per token)",
                       ".4f", _final("train_smoothed")),
    "train": Metric("training loss, last step", "training loss of the last step (nats per token)",
                    ".4f", _final("train_loss")),
    "max_vio": Metric("MaxVio, validation", "MaxVio of the worst layer over the validation batches",
                      ".3f", _final("max_vio")),
    "train_max_vio": Metric("MaxVio, training", "MaxVio of the worst layer over a training batch, "
                            "smoothed", ".3f", _final("train_max_vio")),
    "tokens_per_s": Metric("tokens/s", "tokens per second, median of the steps", ",.0f",
                           lambda record: record["tokens_per_s"])}
RANKED = ("loss", "bits_per_byte", "smoothed")


@dataclasses.dataclass(frozen=True)
class Arm:
  """Runs that differ in their seed alone.

  Attributes:
    name: unlike any other's.
    runs: seed -> run, those that count: the finished ones, or where none finished, all there are.
    unfinished: seed -> how the run stands, of those that do not count and those planned.
  """

  name: str
  runs: dict[int, Found]
  unfinished: dict[int, str]

  @property
  def finished(self) -> bool:
    return any(f.record["finished"] for f in self.runs.values())

  @property
  def first(self) -> dict[str, Any] | None:
    """The record of the lowest seed."""
    return self.runs[min(self.runs)].record if self.runs else None

  def values(self, metric: str) -> dict[int, float]:
    """A metric by seed, where it was measured."""
    found = {seed: METRICS[metric].of(f.record) for seed, f in sorted(self.runs.items())}
    return {seed: v for seed, v in found.items() if isinstance(v, int | float)}

  def without(self, metric: str) -> list[int]:
    """Seeds of runs that finished without the metric: they diverged, or were not evaluated."""
    has = self.values(metric)
    return [s for s, f in self.runs.items() if f.record["finished"] and s not in has]

  def spread(self, metric: str) -> tuple[int, float | None, float | None]:
    """(n, mean, standard deviation) over the seeds."""
    return statistics.spread(list(self.values(metric).values()))


def tokenizers(arms: Sequence[Arm]) -> set[str]:
  """What tells the arms' tokenizers apart; one element where they are the same."""
  found = set()
  for arm in arms:
    for f in arm.runs.values():
      config = f.record["config"]
      found.add(f.record["corpus"].get("tokenizer") or json.dumps([
          config.get("model", {}).get("vocab_size"), config.get("data", {}).get("tokenizer")]))
  return found


# --- grouping -----------------------------------------------------------------------------------


def flat(config: Any, prefix: str = "") -> dict[str, Any]:
  """Dotted keys and values of a config's dictionary."""
  if not isinstance(config, dict):
    return {prefix: config}
  return {k: v for name, value in config.items()
          for k, v in flat(value, f"{prefix}.{name}" if prefix else name).items()}


def differing(configs: Sequence[dict[str, Any]]) -> list[str]:
  """Dotted keys, the seed's left out, whose values are not the same in all configs."""
  flats = [flat(c) for c in configs]
  keys = dict.fromkeys(k for f in flats for k in f)
  return [k for k in keys if k != SEED and len({json.dumps(f.get(k)) for f in flats}) > 1]


def group(runs: Runs) -> list[Arm]:
  """Runs as arms: by the plans' names, and by their configs without the seed.

  Arms of several plans, or runs without one, are one arm where nothing but the seed differs; runs
  that a plan has under one name are several where more differs.
  """
  by_id: dict[str, list[Found]] = {}
  for f in runs.found:
    by_id.setdefault(f.id, []).append(f)
  groups: dict[str, _Group] = {}
  planned = {a.id for p in runs.plans for a in p.arms}
  for plan in runs.plans:
    for name in dict.fromkeys(a.name for a in plan.arms):
      mine = [a for a in plan.arms if a.name == name]
      parts: dict[str, list[Planned]] = {}
      for a in sorted(mine, key=lambda a: a.id not in by_id):  # those found come first
        has = by_id.get(a.id)
        parts.setdefault(_key(has[0], _SEEDS) if has else next(iter(parts), ""), []).append(a)
      for part in parts.values():
        found = [f for a in part for f in by_id.get(a.id, [])[:1]]
        made = groups.setdefault(_key(found[0]) if found else f"{plan.name} {name}", _Group(name))
        made.found += found
        made.states |= {a.seed: runs.states.get(a.id, "not found") for a in part}
  for several in by_id.values():
    for f in several[1 if several[0].id in planned else 0:]:
      key = _key(f) + (f" at {f.record['commit']}" if len(several) > 1 else "")
      made = groups.setdefault(key, _Group(None))
      made.found.append(f)
      made.states.setdefault(f.seed, runs.states.get(f.id, _progress(f)))
  _name(list(groups.values()))
  arms = []
  for made in groups.values():
    seeds = {f.seed: f for f in made.found}
    done = {s: f for s, f in seeds.items() if f.record["finished"]}
    counted = done or seeds
    arms.append(Arm(made.name, dict(sorted(counted.items())), {
        s: state for s, state in sorted(made.states.items()) if s not in done}))
  return arms


@dataclasses.dataclass
class _Group:
  """An arm in the making."""

  name: str | None
  found: list[Found] = dataclasses.field(default_factory=list)
  states: dict[int, str] = dataclasses.field(default_factory=dict)


def _key(f: Found, without: Sequence[str] = (SEED,)) -> str:
  values = {k: v for k, v in flat(f.record["config"]).items() if k not in without}
  return json.dumps(values, sort_keys=True) if values else f.where


def _progress(f: Found) -> str:
  return f"not finished, at step {f.record['steps']:,}"


def _name(groups: list[_Group]) -> None:
  """Names those that have none, and tells apart those of one name."""
  for made in groups:
    names = {f.record["arm"].get("name") for f in made.found}
    if made.name is None and len(names) == 1:
      made.name = names.pop()
  unnamed = [made for made in groups if made.name is None]
  for made, label in zip(unnamed, _labels(unnamed), strict=True):
    made.name = label
  for name in [n for n in dict.fromkeys(m.name for m in groups)]:
    same = [made for made in groups if made.name == name]
    if len(same) > 1:
      for i, (made, label) in enumerate(zip(same, _labels(same), strict=True), 1):
        made.name = f"{name} ({label or i})"
  taken: set[str] = set()
  for made in groups:  # whatever still has another's name
    name, i = made.name, 2
    while made.name in taken:
      made.name, i = f"{name} #{i}", i + 1
    taken.add(made.name)


def _labels(groups: list[_Group]) -> list[str]:
  """What tells groups apart: values that differ, else the commits, else the folders."""
  configs = [made.found[0].record["config"] if made.found else {} for made in groups]
  keys = differing(configs)
  labels = []
  for made, config in zip(groups, configs, strict=True):
    values = flat(config)
    parts = [f"{short(k, keys)}={text(values.get(k))}" for k in keys[:_LABEL_KEYS]]
    parts += [f"and {len(keys) - _LABEL_KEYS} more"] if len(keys) > _LABEL_KEYS else []
    if not keys and made.found:
      commits = {m.found[0].record["commit"] for m in groups if m.found}
      parts = [f"at {made.found[0].record['commit']}"] if len(commits) == len(groups) > 1 else [
          made.found[0].record["folder"]]
    labels.append(" ".join(parts))
  return labels


def short(key: str, keys: Sequence[str]) -> str:
  """The last part of a dotted key, or the whole where another of `keys` ends like it."""
  last = key.rpartition(".")[2]
  return last if sum(k.rpartition(".")[2] == last for k in keys) == 1 else key


def text(value: Any) -> str:
  """A config's value for a person."""
  if isinstance(value, list | tuple):
    return ",".join(map(text, value)) or "none"
  if isinstance(value, bool) or value is None:
    return {True: "yes", False: "no", None: "-"}[value]
  return f"{value:g}" if isinstance(value, float) else str(value) or '""'
