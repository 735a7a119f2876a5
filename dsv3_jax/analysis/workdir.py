"""The files of a workdir, read tolerantly: a run may still be going, or have been killed.

Layout and metric names are those that `dsv3_jax.train` writes; nothing here imports it, so that a
report can be made on a machine that has only the files.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

from dsv3_jax import config as config_lib


@dataclasses.dataclass(frozen=True)
class Run:
  """What one workdir holds. Lists are in step order; anything absent is empty."""

  workdir: Path
  config: dict[str, Any]
  train: list[dict[str, Any]]  # a line of metrics.jsonl each, kind "train"
  evals: list[dict[str, Any]]
  loads: list[dict[str, Any]]
  numerics: list[dict[str, Any]]
  summary: dict[str, Any]  # summary.json, written when a run ends
  command: str  # the command line that made it
  notes: tuple[str, ...]  # what was missing or unreadable, for the reader of the report

  @property
  def finished(self) -> bool:
    """Whether the run trained all its tokens."""
    tokens = self.config.get("train", {}).get("tokens")
    return bool(self.train and tokens and self.train[-1].get("tokens", 0) >= tokens)


def read(workdir: str | Path) -> Run:
  """Reads a workdir.

  Raises:
    ConfigError: the folder does not exist, or no run was ever started in it.
  """
  workdir = Path(workdir)
  if not workdir.is_dir():
    raise config_lib.ConfigError(f"{workdir} is not a folder; give the workdir of a run")
  config_file, metrics_file = workdir / "config.json", workdir / "metrics.jsonl"
  if not config_file.exists() and not metrics_file.exists():
    raise config_lib.ConfigError(
        f"{workdir} holds neither config.json nor metrics.jsonl; no run was started there")
  notes: list[str] = []
  config = _read_json(config_file, notes)
  summary = _read_json(workdir / "summary.json", notes)
  by_kind: dict[str, dict[int, dict[str, Any]]] = {"train": {}, "eval": {}, "load": {},
                                                  "numerics": {}}
  broken = 0
  if metrics_file.exists():
    with metrics_file.open(encoding="utf-8", errors="replace") as lines:
      for line in lines:
        row = _parse(line)
        if row is None:
          broken += bool(line.strip())
        elif row.get("kind") in by_kind:
          by_kind[row["kind"]][row["step"]] = row  # a step that was repeated counts once, as last
  else:
    notes.append("metrics.jsonl is missing: the run stopped before its first step.")
  if broken:
    notes.append(f"{broken} line{'s' * (broken > 1)} of metrics.jsonl could not be read "
                 "(a line half written when the run was killed is normal).")
  rows = {kind: [steps[s] for s in sorted(steps)] for kind, steps in by_kind.items()}
  command_file = workdir / "command.txt"
  command = (command_file.read_text(encoding="utf-8", errors="replace").strip()
             if command_file.exists() else "")
  return Run(workdir, config, rows["train"], rows["eval"], rows["load"], rows["numerics"], summary,
             command, tuple(notes))


def _read_json(path: Path, notes: list[str]) -> dict[str, Any]:
  if not path.exists():
    return {}
  try:
    values = json.loads(path.read_text(encoding="utf-8"))
  except (OSError, ValueError) as error:
    notes.append(f"{path.name} could not be read: {error}.")
    return {}
  if not isinstance(values, dict):
    notes.append(f"{path.name} holds no object.")
    return {}
  return values


def _parse(line: str) -> dict[str, Any] | None:
  """A metrics line, or None where it is not a complete object with a step."""
  try:
    row = json.loads(line)
  except ValueError:
    return None
  return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None
