"""Finds the runs under some folders, and shows how they stand."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dsv3_jax.sweep import pool, table
from dsv3_jax.sweep.progress import OVER, RUNNING, Follower, Progress

_DEPTH = 3  # folders below one that is neither a run nor a pool


def is_run(folder: Path) -> bool:
  """Whether a folder is the workdir of a run, or is to be."""
  if any((folder / name).is_file() for name in ("metrics.jsonl", pool.ARM)):
    return True
  try:  # a run that starts; an exported model has another config.json
    return "optim" in json.loads((folder / "config.json").read_text(encoding="utf-8"))
  except (OSError, ValueError):
    return False


def is_pool(folder: Path) -> bool:
  """Whether a folder is one of `dsv3 sweep`."""
  return (folder / "sweeps").is_dir() and (folder / "arms").is_dir()


def find(folder: Path, depth: int = _DEPTH) -> list[Path]:
  """Workdirs in a folder, itself perhaps, in the order of their names; arms of a pool in the order
  of its plans."""
  if is_run(folder):
    return [folder]
  if is_pool(folder):
    planned = {folder / arm["folder"]: None for plan in plans(folder) for arm in plan["arms"]}
    there = sorted(p for p in (folder / "arms").iterdir() if is_run(p))
    return [*planned, *(p for p in there if p not in planned)]
  if depth == 0:
    return []
  try:
    below = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
  except OSError:
    return []
  return [run for p in below for run in find(p, depth - 1)]


def plans(folder: Path) -> list[dict[str, Any]]:
  """What the sweeps of a pool wrote down; what cannot be read is passed by."""
  found = []
  for path in sorted((folder / "sweeps").glob("*.json")):
    try:
      plan = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
      continue
    arms = plan.get("arms") if isinstance(plan, dict) else None
    if isinstance(arms, list) and all(
        isinstance(a, dict) and isinstance(a.get("folder"), str) for a in arms):
      found.append(plan)
  return found


class Watch:
  """Follows all runs under some folders; new ones join when they appear.

  Args:
    folders: workdirs, pools, or folders that hold them.
  """

  def __init__(self, folders: Sequence[str | Path]):
    self.folders = [Path(folder) for folder in folders]
    self._followers: dict[Path, Follower] = {}
    self._over: dict[Path, Progress] = {}

  def read(self) -> list[tuple[str, Progress]]:
    """(name, progress) of each run as it stands."""
    runs = list(dict.fromkeys(run for folder in self.folders for run in find(folder)))
    names = _names(runs)
    return [(names[run], self._progress(run)) for run in runs]

  def _progress(self, run: Path) -> Progress:
    kept = self._over.get(run)
    if kept is not None and pool.read_arm(run) == kept.arm and kept.arm:
      return kept  # a finished arm is read once
    found = self._followers.setdefault(run, Follower(run)).read()
    if found.state in OVER:
      self._over[run] = found
    return found

  def tensorboard(self) -> str:
    """The command that shows the same runs' curves."""
    if len(self.folders) == 1:
      return f"tensorboard --logdir={self.folders[0]}"
    names = _names(self.folders)
    return "tensorboard --logdir_spec=" + ",".join(
        f"{names[f].replace(':', '_')}:{f}" for f in self.folders)


def _names(paths: Sequence[Path]) -> dict[Path, str]:
  """Shortest names that tell paths apart: what they have in common in front is left out."""
  if len(paths) < 2:
    return {p: _short(p.name or str(p)) for p in paths}
  common = os.path.commonpath([os.path.abspath(p) for p in paths])
  return {p: _short(os.path.relpath(os.path.abspath(p), common)) for p in paths}


def _short(name: str) -> str:
  """An arm's folder without arms/ and its id."""
  head, dash, tail = name.replace("/arms/", "/").rpartition("-")
  return head if len(tail) == 16 and not tail.strip("0123456789abcdef") else head + dash + tail


# What is left out first where the terminal is narrow.
_DISPENSABLE = ("MaxVio", "saved", "validation", "tokens/s", "curve", "last line", "loss")


def render(rows: Sequence[tuple[str, Progress]], caption: str = "", room: int = 0,
           width: int = 160) -> Any:
  """A rich table of runs.

  Args:
    rows: of `Watch.read`.
    caption: below.
    room: rows at most; what runs comes first.
    width: of the terminal, in characters; what does not fit is left out, column by column.
  """
  from rich.table import Table
  from rich.text import Text

  columns = {
      "run": lambda n, p: n,
      "state": lambda n, p: p.state,
      "step": lambda n, p: table.steps(p),
      "loss": lambda n, p: table.number(p.loss),
      "curve": lambda n, p: table.sparkline(p.losses),
      "validation": lambda n, p: table.number(p.validation),
      "MaxVio": lambda n, p: table.number(p.max_vio, ".2f"),
      "tokens/s": lambda n, p: table.number(p.tokens_per_s, ",.0f"),
      "ETA": lambda n, p: table.duration(p.eta_s) if p.state in RUNNING else "-",
      "saved": lambda n, p: "-" if p.checkpoint is None else f"{p.checkpoint:,}",
      "last line": lambda n, p: "-" if p.age_s is None else f"{table.duration(p.age_s)} ago"}
  fitting = table.fitting([(name, 0, p, "") for name, p in rows], room)
  cells = {name: [cell(n, p) for n, _, p, _ in fitting] for name, cell in columns.items()}
  for name in _DISPENSABLE:
    if 1 + sum(3 + max(map(len, [k, *column])) for k, column in cells.items()) > width:
      del cells[name]
  caption = "; ".join(filter(None, [table.counts([p for _, p in rows]), caption]))
  shown = Table(caption=Text(caption), caption_justify="left")
  for name in cells:
    left = name in ("run", "state", "curve")
    shown.add_column(name, justify="left" if left else "right", overflow="fold",
                     no_wrap=name != "run")
  for i in range(len(fitting)):
    shown.add_row(*(Text(column[i], style=table.COLORS.get(column[i], "") if name == "state"
                         else "") for name, column in cells.items()))
  if len(fitting) < len(rows):
    shown.add_row(f"{len(rows) - len(fitting)} more", *[""] * (len(cells) - 1))
  return shown
