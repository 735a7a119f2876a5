"""What a sweep's arms have come to: from their folders, or from the records of finished ones."""

import contextlib
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dsv3_jax import config as config_lib
from dsv3_jax import host
from dsv3_jax.sweep.arm import Arm, Sweep
from dsv3_jax.sweep.pool import AGAIN, Pool
from dsv3_jax.sweep.progress import RUNNING, Follower, Progress


@dataclasses.dataclass
class Row:
  """An arm of the sweep as it stands.

  Attributes:
    stale: it finished with other training code than today's.
    recorded: its record is there, and not to be replaced.
    held: why it is not started again in this sweep, or "".
  """

  arm: Arm
  folder: Path
  follower: Follower
  progress: Progress
  stale: bool = False
  recorded: bool = False
  held: str = ""

  @property
  def note(self) -> str:
    """For the table's last column."""
    p = self.progress
    if p.state == "failed":
      return ((p.arm.get("error") or ["?"])[-1])[:120]
    if self.held:
      return self.held
    if p.state == "done":
      parts = ["from its record"] if self.recorded and not p.arm.get("state") else []
      return ", ".join(parts + [f"stale: trained at {p.arm.get('commit') or 'another commit'}"]
                       * self.stale)
    return ""

  @property
  def shown(self) -> tuple[str, int, Progress, str]:
    return self.arm.name, self.arm.seed, self.progress, self.note


def look(sweep: Sweep, pool: Pool, records: str | None = None, code: str | None = None
         ) -> list[Row]:
  """The arms with what is there of each; makes nothing.

  Args:
    sweep: of `cli.configs.load_sweep`.
    pool: its folder.
    records: folder of records (analysis.records): an arm whose record is there is done.
    code: of today's training (`host.code`), by which finished arms are stale or not.

  Raises:
    ConfigError: a folder holds another config than its arm's.
  """
  code = host.code() if code is None else code
  found = []
  for arm in sweep.arms:
    folder = pool.arm(arm)
    pool.check(arm)
    follower = Follower(folder)
    row = Row(arm, folder, follower, follower.read())
    # The old record of an arm that --rerun starts anew is no result of it.
    known = _record(records, arm) if records and not row.progress.arm.get(AGAIN) else None
    row.recorded = known is not None
    if known is not None and row.progress.state != "done":
      row.progress = _from_record(known, folder)
      trained_by = known.get("arm", {}).get("code")
    else:
      trained_by = row.progress.arm.get("code")
    row.stale = row.progress.state == "done" and bool(trained_by) and trained_by != code
    found.append(row)
  return found


def _record(folder: str, arm: Arm) -> dict[str, Any] | None:
  """An arm's record, if it is of the very same config."""
  from dsv3_jax.analysis import records

  found = records.find(folder, arm.id)
  if found is None:
    return None
  with contextlib.suppress(config_lib.ConfigError, KeyError):
    if config_lib.from_dict(found["config"]) == arm.config:
      return found
  return None


def _from_record(known: dict[str, Any], folder: Path) -> Progress:
  final, curve = known.get("final", {}), known.get("curve", {})
  points = tuple((s, v) for s, v in zip(curve.get("step", ()), curve.get("loss", ()), strict=False)
                 if v is not None)
  return Progress(folder, "done", known.get("steps", 0), known.get("steps"), points,
                  final.get("train_loss"), final.get("loss"), final.get("max_vio"),
                  known.get("tokens_per_s"), None, known.get("seconds"),
                  arm={"commit": known.get("commit")})


def again(found: Sequence[Row], which: str) -> list[Row]:
  """Those rows that --rerun=WHICH repeats."""
  def wanted(row: Row) -> bool:
    state = row.progress.state
    return {"": False, "failed": state == "failed", "stale": row.stale,
            "all": state not in RUNNING and state != "waiting"}[which]

  return [row for row in found if wanted(row)]
