"""`dsv3 sweep`: the arms of an experiment, run one after another or several at once."""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dsv3_jax import config as config_lib
from dsv3_jax.cli.configs import default_workdir, load_sweep
from dsv3_jax.config import ConfigError
from dsv3_jax.sweep.arm import SEED, Sweep

SUMMARY = "run the arms of an ablation"
DESCRIPTION = (
    "Train every arm that the experiment file's sweep(arg) yields, each in a workdir of its own\n"
    "under WORKDIR/arms. The plan with its estimated time comes first. Arms that are finished are\n"
    "skipped, interrupted ones go on from their checkpoints, and one that fails does not stop the\n"
    "others. Ctrl-C (or SIGTERM) saves before leaving; the same command goes on. Several sweeps\n"
    "may share a WORKDIR, at once too: an arm that they have in common is trained once.\n\n"
    "Follow it elsewhere with `dsv3 watch WORKDIR`, compare the arms with `dsv3 report WORKDIR`.\n"
    "Exit code 1: an arm failed; why stands at the end, and in the arm's output.log.")
EXAMPLES = (
    "  dsv3 sweep --config=experiments/ablate_mtp.py:cpu --workdir=runs/ablations --dry-run\n"
    "  dsv3 sweep --config=experiments/ablate_mtp.py:cpu --workdir=runs/ablations\n"
    "  dsv3 sweep --config=experiments/ablate_mtp.py:cpu --workdir=runs/ablations --jobs=2 \\\n"
    "    --seeds=0,1 --only='depth 0,depth 1' --config.optim.lr=3e-4\n"
    "  dsv3 sweep --config=experiments/ablate_mtp.py:cpu --workdir=runs/ablations --rerun=failed")
OVERRIDABLE = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """The command's options."""
  parser.add_argument("--config", required=True, metavar="FILE[:ARG]",
                      help="experiment file with get_config(arg) and sweep(arg)")
  parser.add_argument("--config.KEY", metavar="VALUE", dest="ignored",
                      help="override one value in all arms; what an arm itself changes wins")
  parser.add_argument("--workdir", metavar="DIR",
                      help="folder of the arms (default: runs/EXPERIMENT or runs/EXPERIMENT-ARG)")
  parser.add_argument("--records", metavar="DIR",
                      help="keep each finished arm's numbers in DIR/ID.json, a few KB, and skip "
                           "arms whose record is there")
  parser.add_argument("--jobs", type=int, metavar="N",
                      help="arms at once; local ones share the cores and GPUs out (default: 1)")
  parser.add_argument("--seeds", metavar="A,B,...",
                      help="seeds of every arm (default: those that sweep() yields)")
  parser.add_argument("--only", metavar="ARM,...", help="these arms alone, by name")
  parser.add_argument("--rerun", choices=("failed", "stale", "all"), default="",
                      help="failed: go on with arms that failed; stale: start those anew that "
                           "other training code finished; all: start every arm anew")
  parser.add_argument("--drop-checkpoints", action="store_true",
                      help="remove an arm's checkpoints when it is done; its numbers stay")
  parser.add_argument("--dry-run", action="store_true", help="print the plan and leave")


def run(args: argparse.Namespace) -> int:
  """Runs the command."""
  from dsv3_jax import host
  from dsv3_jax.sweep import estimate, local, runner, table
  from dsv3_jax.sweep.pool import Pool

  sweep = select(load_sweep(args.config, args.overrides), args.seeds, args.only)
  folder = args.workdir or default_workdir(args.config)
  pool = Pool(folder, write=not args.dry_run)
  launcher = local.Local(args.jobs or 1)
  found = runner.rows(sweep, pool, args.records, host.code())
  estimator = estimate.Estimator(pool, launcher.jobs)
  repeated = [id(row) for row in runner.again(found, args.rerun)]
  for row in found:
    if row.progress.state == "done":
      estimator.learn(row.arm.config, row.progress)
  print(plan(sweep, found, estimator, repeated, str(folder)))
  if args.dry_run:
    return 0
  outcome = runner.run(sweep, pool, launcher, found, estimator=estimator, records=args.records,
                       rerun=args.rerun, drop_checkpoints=args.drop_checkpoints)
  print(table.render(table.arms([row.shown for row in outcome.rows])))
  print(table.counts([row.progress for row in outcome.rows]))
  for row in outcome.failed:
    print(f"\n{row.arm.name}, seed {row.arm.seed}: {row.held or 'failed'}; "
          f"{row.folder / 'output.log'} ends with:", file=sys.stderr)
    for line in row.progress.arm.get("error", [])[-8:]:
      print(f"  {line}", file=sys.stderr)
  if outcome.received:
    print("interrupted; the same command goes on" +
          (f" (without --rerun={args.rerun})" if args.rerun == "all" else ""))
  elif outcome.failed:
    print("--rerun=failed tries the failed arms again", file=sys.stderr)
  return outcome.exit_code


def select(sweep: Sweep, seeds: str | None, only: str | None) -> Sweep:
  """The sweep with other seeds, or some of its arms.

  Args:
    sweep: with all arms.
    seeds: "0,1,2": each arm with these, or None for its own.
    only: names of arms, or None for all.

  Raises:
    ConfigError: no such arm, seeds that are not whole numbers.
  """
  arms = sweep.arms
  if only is not None:
    wanted = [name.strip() for name in only.split(",") if name.strip()]
    names = list(dict.fromkeys(arm.name for arm in arms))
    for name in wanted:
      if name not in names:
        raise ConfigError(f"--only={only}: no arm is called {name!r}; arms: {', '.join(names)}")
    arms = tuple(arm for arm in arms if arm.name in wanted)
  if seeds is not None:
    try:
      numbers = list(dict.fromkeys(int(s) for s in seeds.split(",") if s.strip()))
    except ValueError as error:
      raise ConfigError(f"--seeds={seeds}: whole numbers are expected, such as 0,1,2") from error
    if not numbers:
      raise ConfigError(f"--seeds={seeds}: name at least one seed")
    first = {arm.name: arm for arm in reversed(arms)}
    names = list(dict.fromkeys(arm.name for arm in arms))
    arms = tuple(_seeded(first[name], seed) for seed in numbers for name in names)
  return dataclasses.replace(sweep, arms=arms)


def _seeded(arm: Any, seed: int) -> Any:
  config = config_lib.replace(arm.config, **{SEED: seed})
  return dataclasses.replace(arm, seed=seed, config=config, id=config_lib.fingerprint(config),
                             overrides=arm.overrides | {SEED: seed})


def plan(sweep: Sweep, found: Sequence[Any], estimator: Any, repeated: Sequence[int],
         folder: str) -> str:
  """What there is to do, as text."""
  from rich.table import Table
  from rich.text import Text

  from dsv3_jax.sweep import table

  question = (sweep.text.strip().splitlines() or [""])[0]
  shown = Table(title=Text(f"{Path(sweep.experiment)}{f':{sweep.arg}' if sweep.arg else ''}: "
                           f"{question}"), title_justify="left")
  for name in ("arm", "changes", "seeds", "finished", "to do", "time each"):
    shown.add_column(name, justify="left" if name in ("arm", "changes") else "right",
                     overflow="fold")
  todo, seconds = 0, []
  for name in dict.fromkeys(row.arm.name for row in found):
    rows = [row for row in found if row.arm.name == name]
    left = [row for row in rows if row.progress.state != "done" or id(row) in repeated]
    stale = sum(row.stale for row in rows)
    each = estimator.seconds(rows[0].arm.config)
    seconds += [each * (1 if id(row) in repeated else 1 - row.progress.share)
                for row in left if each is not None]
    todo += len(left)
    changes = " ".join(f"{k}={_short(v)}" for k, v in rows[0].arm.overrides.items() if k != SEED)
    states = f"{len(rows) - len(left)}" + (f" ({stale} stale)" if stale else "")
    shown.add_row(Text(name), Text(changes or "-"),
                  ",".join(str(row.arm.seed) for row in rows), states, str(len(left)),
                  table.duration(each))
  lines = [table.render(shown), f"{len(found)} arms in {folder}, {todo} to do"]
  if todo and len(seconds) == todo:
    lines[-1] += f", about {table.duration(sum(seconds))} one after another"
  return "\n".join(lines)


def _short(value: Any) -> str:
  return value if isinstance(value, str) else json.dumps(value, default=str)
