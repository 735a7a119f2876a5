"""The folder of a sweep: a pool of arms that several sweeps may share.

    POOL/sweeps/<experiment>-<arg>.json   a sweep's plan: its question and which arms it has
    POOL/arms/<name>-s<seed>-<id>/        a normal workdir of `dsv3 train`, with
      arm-config.json                     what it is to train
      arm.json                            how it stands (below)
      output.log                          what the training printed
    POOL/corpora/<key>/                   tokenizer and shards that arms share (corpus.py)
    POOL/calibration.json                 measured speeds (estimate.py)
    POOL/replaced/                        what --rerun put aside, without checkpoints

An arm is found by its id, whichever sweep made it, so that a baseline is trained once. arm.json
holds state (waiting | running | done | failed), and where known exit_code, error (last lines), pid,
host, cores, owner (the process that started it), launcher and job, started and ended (UTC), seconds
(of all its starts), commit, code (`host.code`), and again (since when --rerun has had it anew and
no record of it was written).

Who runs an arm holds a lock on its .claim, which its training process inherits: while either lives,
no other sweep starts the arm, and when both are gone, however they went, the next one may.
"""

import contextlib
import datetime
import fcntl
import json
import os
import re
import shutil
import time
from pathlib import Path
from typing import Any

from dsv3_jax import config as config_lib
from dsv3_jax import files
from dsv3_jax.config import ConfigError
from dsv3_jax.sweep.arm import Arm, Sweep

ARM, ARM_CONFIG, OUTPUT = "arm.json", "arm-config.json", "output.log"
AGAIN = "again"
_CLAIM = ".claim"


class SweepError(RuntimeError):
  """A sweep that cannot go on; the message says why and what to do."""


def now() -> str:
  """UTC, to the second, as ISO 8601."""
  return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def slug(text: str) -> str:
  """A name as part of a file's name."""
  return re.sub(r"[^A-Za-z0-9_.=,+-]+", "_", text)[:80].strip("._") or "arm"


# --- arms ---------------------------------------------------------------------------------------


def read_arm(folder: str | Path) -> dict[str, Any]:
  """arm.json of an arm; empty where there is none (atomic writes leave no half one)."""
  try:
    values = json.loads((Path(folder) / ARM).read_text(encoding="utf-8"))
  except (OSError, ValueError):
    return {}
  return values if isinstance(values, dict) else {}


def write_arm(folder: str | Path, **changes: Any) -> dict[str, Any]:
  """Changes values of arm.json; None removes one. Only who holds the claim may."""
  values = {k: v for k, v in (read_arm(folder) | changes).items() if v is not None}
  files.write_atomic(Path(folder) / ARM, json.dumps(values, indent=1, sort_keys=True) + "\n")
  return values


def claim(folder: str | Path) -> int | None:
  """The open file whose lock makes the arm ours until it is closed; None where others have it.

  Where the file system has no locks there is nothing to hold, and the arm is taken to be free.
  """
  claimed = os.open(Path(folder) / _CLAIM, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
  for _ in range(5):
    try:
      fcntl.flock(claimed, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      time.sleep(0.02)  # perhaps someone only looks (`is_claimed`)
    except OSError:
      return claimed
    else:
      return claimed
  os.close(claimed)
  return None


def is_claimed(folder: str | Path) -> bool:
  """Whether someone runs the arm now."""
  try:
    looked = os.open(Path(folder) / _CLAIM, os.O_RDONLY | os.O_CLOEXEC)
  except OSError:
    return False
  try:
    fcntl.flock(looked, fcntl.LOCK_SH | fcntl.LOCK_NB)
  except BlockingIOError:
    return True
  except OSError:
    return False
  else:
    return False
  finally:
    os.close(looked)


# --- the pool -----------------------------------------------------------------------------------


class Pool:
  """The folder.

  Args:
    folder: made if need be.
    write: otherwise nothing is made, and it may be absent.

  Raises:
    ConfigError: it cannot be made or written.
  """

  def __init__(self, folder: str | Path, write: bool = True):
    self.folder = Path(os.path.abspath(os.path.expanduser(folder)))
    self._by_id: dict[str, Path] = {}
    if (self.folder / "config.json").is_file():
      raise ConfigError(f"--workdir={folder} is the workdir of one run; a sweep wants a folder of "
                        "its own")
    if not write:
      return
    try:
      for name in ("sweeps", "arms", "corpora"):
        (self.folder / name).mkdir(parents=True, exist_ok=True)
      probe = files.write_atomic(self.folder / ".writable", "")
      probe.unlink(missing_ok=True)  # another sweep may have been as quick
    except OSError as error:
      raise ConfigError(f"--workdir={folder} cannot be written: {error.strerror}; give a folder "
                        "that can be made and written") from error

  def arm(self, arm: Arm) -> Path:
    """The arm's folder, which may not exist yet."""
    if arm.id not in self._by_id:
      found = sorted(self.folder.glob(f"arms/*-{arm.id}"))
      name = f"{slug(arm.name)}-s{arm.seed}-{arm.id}"
      self._by_id[arm.id] = found[0] if found else self.folder / "arms" / name
    return self._by_id[arm.id]

  def check(self, arm: Arm) -> None:
    """Raises ConfigError where the arm's folder is there and holds another config."""
    path = self.arm(arm) / ARM_CONFIG
    try:
      same = config_lib.from_json(path.read_text(encoding="utf-8")) == arm.config
    except FileNotFoundError:
      return
    except ValueError:  # half a file, or a key that there is no more
      same = False
    if not same:
      raise ConfigError(
          f"{path.parent} holds another config under the same identity: a default in config.py "
          "changed since; give another --workdir, or remove that folder")

  def add(self, arm: Arm) -> Path:
    """Makes the arm's folder, with its config and arm.json, where these are not there.

    Raises:
      ConfigError: it is there, with another config.
    """
    folder = self.arm(arm)
    folder.mkdir(parents=True, exist_ok=True)
    self.check(arm)
    if not (folder / ARM_CONFIG).exists():
      files.write_atomic(folder / ARM_CONFIG, config_lib.to_json(arm.config) + "\n")
    if not read_arm(folder):  # also one that was damaged
      held = claim(folder)
      if held is not None:
        if not read_arm(folder):
          write_arm(folder, state="waiting", name=arm.name, seed=arm.seed, id=arm.id)
        os.close(held)
    return folder

  def write_plan(self, sweep: Sweep, commit: str) -> Path:
    """Keeps what the sweep consists of, for reports: its arms in the experiment's order.

    Runs of an earlier plan that this one has not (--only, --seeds) stay listed where their configs
    are, but for the seed, still those of the experiment's arm of that name.
    """
    name = Path(sweep.experiment).stem + (f"-{slug(sweep.arg)}" if sweep.arg else "")
    path = self.folder / "sweeps" / f"{name}.json"
    arms = [{"name": a.name, "seed": a.seed, "id": a.id, "kind": sweep.kinds[a.name],
             "overrides": a.overrides, "folder": str(self.arm(a).relative_to(self.folder))}
            for a in sweep.arms]
    known = {(a["name"], a["seed"]) for a in arms}
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
      arms += [a for a in json.loads(path.read_text(encoding="utf-8"))["arms"]
               if (a["name"], a["seed"]) not in known
               and sweep.kinds.get(a["name"]) == a.get("kind", "")]
    order = list(sweep.kinds)
    arms.sort(key=lambda a: order.index(a["name"]))
    plan = {"experiment": sweep.experiment, "arg": sweep.arg,
            "question": (sweep.text.strip().splitlines() or [""])[0], "commit": commit,
            "date": now(), "baseline": sweep.baseline, "arms": arms}
    return files.write_atomic(path, json.dumps(plan, indent=1) + "\n")

  def replace(self, arm: Arm) -> None:
    """Makes an arm's folder anew; an old one is put aside, without its checkpoints.

    Raises:
      SweepError: it is running.
    """
    folder = self.arm(arm)
    if folder.exists():
      self._put_aside(folder)
    self._by_id.pop(arm.id, None)
    folder = self.add(arm)
    if (held := claim(folder)) is not None:
      write_arm(folder, **{AGAIN: now()})
      os.close(held)

  def _put_aside(self, folder: Path) -> None:
    held = claim(folder)
    if held is None:
      raise SweepError(f"{folder.name} is running and cannot be repeated; wait for it or stop it")
    try:
      shutil.rmtree(folder / "checkpoints", ignore_errors=True)
      aside = self.folder / "replaced"
      aside.mkdir(exist_ok=True)
      number = 1
      while (aside / f"{folder.name}.{number}").exists():
        number += 1
      os.rename(folder, aside / f"{folder.name}.{number}")
    finally:
      os.close(held)
