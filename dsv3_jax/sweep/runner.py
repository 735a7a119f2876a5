"""Runs the arms of a sweep: what is finished is skipped, what was interrupted goes on.

    found = rows.look(sweep, pool, records)           # what there is to do
    outcome = runner.run(sweep, pool, Local(jobs=2), found, records=records)

All that is known of an arm is in its folder (pool.py), so that any number of sweeps, in any order
and at once, may run over one pool: they look before each start, and an arm's claim decides.
"""

import contextlib
import dataclasses
import errno
import os
import shutil
import signal
import socket
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dsv3_jax import config as config_lib
from dsv3_jax import files, host
from dsv3_jax.sweep import calibrate as calibrate_lib
from dsv3_jax.sweep import corpus, estimate, job, table
from dsv3_jax.sweep import pool as pool_lib
from dsv3_jax.sweep import rows as rows_lib
from dsv3_jax.sweep.arm import Sweep
from dsv3_jax.sweep.pool import Pool, SweepError
from dsv3_jax.sweep.progress import OVER, RUNNING, Follower
from dsv3_jax.sweep.rows import Row

_LOW = 64 * 2**20  # bytes free below which a failed arm is put down to the disk


@dataclasses.dataclass(frozen=True)
class Outcome:
  """How a sweep ended: its rows, the signal that ended it or None, and whether arms that are not
  done yet are jobs of a cluster."""

  rows: list[Row]
  received: int | None
  submitted: bool = False

  @property
  def failed(self) -> list[Row]:
    """Arms that failed, now or before, or that nobody will finish."""
    goes_on = self.received or self.submitted
    return [r for r in self.rows if r.progress.state == "failed" or r.held or
            (r.progress.state != "done" and not goes_on)]

  @property
  def exit_code(self) -> int:
    return 128 + self.received if self.received else 1 if self.failed else 0


class _Signals(host.Signals):
  """Signals are raised as KeyboardInterrupt, and passed on to the arms once some may run."""

  def __init__(self, launcher: Any):
    super().__init__()
    self.running = False
    self._launcher = launcher

  def handle(self, number: int, frame: types.FrameType | None) -> None:
    self.received = number
    if not self.running:
      raise KeyboardInterrupt
    self._launcher.stop(number)


class _Run:
  """A sweep while it goes."""

  def __init__(self, pool: Pool, found: list[Row], launcher: Any, ui: Any,
               estimator: estimate.Estimator, records: str | None, drop_checkpoints: bool):
    self.pool, self.rows, self.launcher, self.ui = pool, found, launcher, ui
    self.estimator, self.records, self.drop = estimator, records, drop_checkpoints
    self.full = ""

  def prepare(self, calibrate: bool) -> None:
    """Folders and texts of the arms that are to run, and how long they will take."""
    corpora: dict[str, Path] = {}
    todo = [row for row in self.rows if row.progress.state not in OVER]
    for row in todo:
      self.pool.add(row.arm)
      key = corpus.key(row.arm.config)
      if key not in corpora:
        self.ui.note(f"preparing the text of {row.arm.name} (once for arms that share it)")
        corpora[key] = corpus.prepare(self.pool.folder / "corpora", row.arm.config)
      corpus.share(corpora[key], row.folder)
    first = next((row for row in todo if self.startable(row)), None)
    if calibrate and first is not None and not self.estimator.known:
      self.calibrate(first, corpora[corpus.key(first.arm.config)])

  def calibrate(self, row: Row, text: Path) -> None:
    """Measures some steps of an arm; a failure is said, and the arm itself will show it again."""
    self.ui.note(f"measuring {calibrate_lib.STEPS} steps of {row.arm.name}")
    cores, devices = self.launcher.slots[0]
    try:
      self.estimator.keep(row.arm.config, *calibrate_lib.measure(
          row.arm.config, self.pool.folder, text, cores, devices, self.launcher.command))
    except SweepError as error:
      self.ui.note(str(error))
      return
    todo = [r.arm.config for r in self.rows if r.progress.state not in OVER]
    self.ui.note(f"{len(todo)} arms to do, {self.estimator.describe(todo)}")

  def loop(self, signals: _Signals, poll_s: float) -> None:
    """Starts and follows arms until none is left that could run."""
    said = False
    while True:
      ended = self.launcher.poll()
      self.look()
      for row in self.rows:
        if row.folder in ended:
          self.settle(row, ended[row.folder], signals)
      if not signals.received and not self.full:
        self.start()
      if signals.received and self.launcher.running and not said:
        said = True
        self.ui.note(f"{signal.Signals(signals.received).name}: the arms that run are saving; a "
                     "second signal ends them at once")
      self.ui.show([row.shown for row in self.rows], self.summary())
      waiting = any(r.progress.state in RUNNING or self.startable(r) for r in self.rows)
      if not self.launcher.running and (signals.received or self.full or not waiting):
        return
      time.sleep(poll_s)

  def look(self) -> None:
    """Reads the arms' files, and keeps the records of those that are done."""
    own = set(getattr(self.launcher, "running", ()))
    for row in self.rows:
      if row.progress.state not in OVER:
        row.progress = row.follower.read()
        if row.folder in own and row.progress.state in ("waiting", "interrupted", "queued"):
          row.progress = dataclasses.replace(row.progress, state="starting")  # not yet claimed
        if row.progress.state == "done":
          self.estimator.learn(row.arm.config, row.progress)
      if row.progress.state == "done" and (row.progress.arm.get("state") or not row.recorded):
        self.keep(row)

  def keep(self, row: Row) -> None:
    """Writes a finished arm's record; drops its checkpoints where that is wanted."""
    if self.records and not row.recorded:
      from dsv3_jax.analysis import records

      row.recorded, where = True, f"{row.arm.name}, seed {row.arm.seed}"
      try:
        self.ui.note(f"{where}: record in {records.write(row.folder, self.records)}")
      except config_lib.ConfigError as error:  # files of its workdir are gone
        self.ui.note(f"{where}: no record: {error}")
      else:
        held = pool_lib.claim(row.folder) if row.progress.arm.get(pool_lib.AGAIN) else None
        if held is not None:
          pool_lib.write_arm(row.folder, **{pool_lib.AGAIN: None})
          os.close(held)
    if self.drop:
      shutil.rmtree(row.folder / "checkpoints", ignore_errors=True)

  def settle(self, row: Row, code: int, signals: _Signals) -> None:
    """Judges an arm whose process ended."""
    state = row.progress.state
    if state == "failed" and shutil.disk_usage(self.pool.folder).free < _LOW:
      self.full = (f"the disk of {self.pool.folder} is full, and {row.arm.name} failed; free some "
                   "space, and the same command with --rerun=failed goes on")
    if state in OVER or state in RUNNING or code == job.BUSY or signals.received:
      return
    said = job.last_lines(row.folder / pool_lib.OUTPUT, count=1)
    row.held = (f"was stopped (exit code {code})" if pool_lib.read_arm(row.folder).get("ended")
                else f"ended unexpectedly (exit code {code}): {' '.join(said)[:120]}")

  def startable(self, row: Row) -> bool:
    # A queued one's job may be gone for long; if it is not, the arm's claim decides who trains.
    return row.progress.state in ("waiting", "interrupted", "queued") and not row.held

  def start(self) -> None:
    """Starts arms while there is room: arms that an ended sweep left running take room too."""
    here, own = socket.gethostname(), set(self.launcher.running)
    orphans = sum(r.progress.state in RUNNING and r.folder not in own
                  and r.progress.arm.get("host") == here
                  and not _alive(r.progress.arm.get("owner")) for r in self.rows)
    room = self.launcher.jobs - len(own) - orphans
    for row in self.rows:
      if room <= 0:
        return
      if self.startable(row) and row.folder not in own and not pool_lib.is_claimed(row.folder):
        self.launcher.start(row.folder)
        row.progress = dataclasses.replace(row.progress, state="starting")
        room -= 1

  def summary(self) -> str:
    left = self.estimator.remaining([(r.arm.config, r.progress) for r in self.rows
                                     if not r.held], self.launcher.jobs)
    text = table.counts([r.progress for r in self.rows])
    return text + (f"; all done in about {table.duration(left)}" if left else "")


def _alive(pid: Any) -> bool:
  try:
    os.kill(int(pid), 0)
  except (ProcessLookupError, TypeError, ValueError):
    return False
  except PermissionError:
    return True
  return True


def run(sweep: Sweep, pool: Pool, launcher: Any, found: list[Row] | None = None, *,
        ui: Any = None, estimator: estimate.Estimator | None = None, records: str | None = None,
        rerun: str = "", drop_checkpoints: bool = False, calibrate: bool = True,
        poll_s: float = 0.5) -> Outcome:
  """Runs what is not finished here, and returns when nothing is left to run or a signal came.

  Args:
    sweep: its arms.
    pool: its folder.
    launcher: `local.Local`.
    found: of `rows.look`; looked up where None.
    ui: `table.Lines` or `table.Live`; that of the terminal where None.
    estimator: for the remaining time.
    records: folder that gets a finished arm's record, and whose records count as finished arms.
    rerun: "failed" (they go on from their checkpoints), "stale" or "all" (those start anew).
    drop_checkpoints: removes a finished arm's checkpoints; its numbers stay.
    calibrate: measure some steps first where no speed is known.
    poll_s: seconds between looks at the arms.

  Raises:
    SweepError: the text of the arms cannot be had, the disk is full, an arm to be repeated runs.
  """
  found = rows_lib.look(sweep, pool, records) if found is None else found
  going = _Run(pool, found, launcher, ui or table.terminal(),
               estimator or estimate.Estimator(pool), records, drop_checkpoints)
  signals = _Signals(launcher)
  try:
    with _whole(pool, going.ui), signals:
      _begin(sweep, going, rerun)
      going.prepare(calibrate)
      signals.running = True
      going.loop(signals, poll_s)
  except KeyboardInterrupt:
    if not signals.received:
      raise
  except BaseException:
    launcher.stop(signal.SIGTERM)  # what runs saves; nobody would follow it
    raise
  if going.full:
    raise SweepError(going.full)
  return Outcome(found, signals.received)


def submit(sweep: Sweep, pool: Pool, launcher: Any, found: list[Row] | None = None, *,
           ui: Any = None, records: str | None = None, rerun: str = "",
           drop_checkpoints: bool = False) -> Outcome:
  """Hands what is neither finished nor queued to a cluster, and returns.

  Called again it does the same with what has failed to run since, and keeps the records of what is
  done. Arguments and errors as `run`'s, with `slurm.Slurm` or `ray_jobs.Ray` as the launcher.
  """
  found = rows_lib.look(sweep, pool, records) if found is None else found
  going = _Run(pool, found, launcher, ui or table.terminal(), estimate.Estimator(pool), records,
               drop_checkpoints)
  with _whole(pool, going.ui):
    _begin(sweep, going, rerun)
    going.look()
    going.prepare(False)
    chosen = []
    for row in found:
      job_id, state = row.progress.arm.get("job"), row.progress.state
      known = job_id and row.progress.arm.get("launcher") == launcher.name
      if state in OVER or state in RUNNING or (known and launcher.alive(job_id)):
        continue
      chosen.append(row)
    for row, job_id in zip(chosen, launcher.submit([r.folder for r in chosen]) if chosen else (),
                           strict=True):
      if (held := pool_lib.claim(row.folder)) is not None:  # otherwise it runs already
        if pool_lib.read_arm(row.folder).get("state") == "waiting":
          pool_lib.write_arm(row.folder, launcher=launcher.name, job=job_id)
        os.close(held)
      row.progress = row.follower.read()
    going.ui.note(f"{len(chosen)} jobs submitted" if chosen else "nothing to submit")
  return Outcome(found, None, submitted=True)


@contextlib.contextmanager
def _whole(pool: Pool, ui: Any) -> Iterator[None]:
  """Closes the table in any case; says what to do about a full disk."""
  try:
    yield
  except OSError as error:
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
      raise
    raise SweepError(f"the disk of {pool.folder} is full; free some space, and the same command "
                     "goes on") from error
  finally:
    ui.close()


def _begin(sweep: Sweep, going: _Run, rerun: str) -> None:
  """Makes those arms wait that are to be repeated, and writes the plan.

  Raises:
    ConfigError: the folder of records cannot be written.
  """
  if going.records:
    try:
      Path(going.records).mkdir(parents=True, exist_ok=True)
      files.write_atomic(Path(going.records) / f".{os.getpid()}", "").unlink()
    except OSError as error:
      raise config_lib.ConfigError(f"--records={going.records} cannot be written: "
                                   f"{error.strerror}") from error
  for row in rows_lib.again(going.rows, rerun):
    _repeat(row, going.pool, anew=rerun != "failed")
  for row in going.rows:
    if row.progress.state == "done":
      going.estimator.learn(row.arm.config, row.progress)
  going.pool.write_plan(sweep, host.commit())


def _repeat(row: Row, pool: Pool, anew: bool) -> None:
  """Makes an arm one that waits: from its start, or from where it failed."""
  if anew:
    pool.replace(row.arm)
  elif (held := pool_lib.claim(row.folder)) is not None:
    pool_lib.write_arm(row.folder, state="waiting", error=None, exit_code=None, job=None)
    os.close(held)
  row.folder, row.recorded, row.stale = pool.arm(row.arm), False, False
  row.follower = Follower(row.folder)
  row.progress = row.follower.read()
