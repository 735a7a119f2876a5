"""`dsv3 sweep`: the arms of an experiment, run one after another or several at once."""

import argparse
import dataclasses
import difflib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dsv3_jax import config as config_lib
from dsv3_jax.cli.configs import default_workdir, load_sweep
from dsv3_jax.config import Config, ConfigError
from dsv3_jax.sweep.arm import SEED, Sweep

SUMMARY = "run the arms of an ablation"
DESCRIPTION = (
    "Train every arm that the experiment file's sweep(arg) yields, each in a workdir of its own\n"
    "under WORKDIR/arms. The plan with its estimated time comes first. Arms that are finished are\n"
    "skipped, interrupted ones go on from their checkpoints, and one that fails does not stop the\n"
    "others. Ctrl-C (or SIGTERM) saves before leaving; the same command goes on. Several sweeps\n"
    "may share a WORKDIR, at once too: an arm that they have in common is trained once.\n\n"
    "Follow it elsewhere with `dsv3 watch WORKDIR`, compare the arms with `dsv3 report WORKDIR`.\n"
    "Exit code 1: an arm failed or could not be run; why stands at the end, and in the arm's\n"
    "output.log.")
EXAMPLES = (
    "  dsv3 sweep --config=experiments/ablate_mtp.py:cpu --workdir=runs/ablations --dry-run\n"
    "  dsv3 sweep --config=experiments/ablate_mtp.py:cpu --workdir=runs/ablations\n"
    "  dsv3 sweep --config=experiments/ablate_mtp.py:cpu --workdir=runs/ablations --jobs=2 \\\n"
    "    --seeds=0,1 --only='no MTP,depth 1' --config.optim.lr=3e-4\n"
    "  dsv3 sweep --config=experiments/ablate_mtp.py:cpu --workdir=runs/ablations --rerun=failed\n"
    "  dsv3 sweep --config=experiments/ablate_mtp.py:gpu --hardware=h100 --price=2 --dry-run\n"
    "  dsv3 sweep --config=experiments/ablate_mtp.py:gpu --workdir=shared/mtp --launcher=slurm \\\n"
    "    --gpus-per-node=1 --partition=gpu --time=8:00:00 --slurm.qos=high\n"
    "  dsv3 sweep --config=experiments/ablate_mtp.py:gpu --workdir=shared/mtp --launcher=ray \\\n"
    "    --gpus-per-node=1 --address=http://10.0.0.1:8265")
OVERRIDABLE = True
FREE = ("--slurm.",)


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
  parser.add_argument("--hardware", metavar="NAME",
                      help="estimate the plan by the cost model for these devices (a name or file "
                           "of `dsv3 cost`), instead of by what is measured here")
  parser.add_argument("--price", type=float, metavar="DOLLARS",
                      help="of a device an hour (default: that of --hardware)")
  parser.add_argument("--launcher", choices=("local", "slurm", "ray"), default="local",
                      help="where arms run: on this machine, or as jobs of a cluster, which the "
                           "command submits and leaves; the same command shows their table, keeps "
                           "records, and submits again what was lost (default: %(default)s)")
  cluster = parser.add_argument_group(
      "clusters", "The workdir must be on a file system that all nodes see. SLURM needs submitit, "
      "Ray its job submission client.")
  cluster.add_argument("--nodes", type=int, metavar="N", help="of an arm (slurm; default: 1)")
  cluster.add_argument("--tasks-per-node", type=int, metavar="N",
                       help="processes of an arm on each node (slurm; default: 1)")
  cluster.add_argument("--gpus-per-node", type=int, metavar="N",
                       help="of an arm on each node (slurm), or of an arm (ray)")
  cluster.add_argument("--cpus-per-task", type=int, metavar="N",
                       help="cores of each process of an arm")
  cluster.add_argument("--partition", metavar="NAME", help="slurm's")
  cluster.add_argument("--account", metavar="NAME", help="slurm's")
  cluster.add_argument("--time", metavar="LIMIT",
                       help="of a job, as sbatch's; when it is over the arm saves, is queued again "
                            "and goes on (slurm; default: 1-00:00:00)")
  cluster.add_argument("--slurm.KEY", metavar="VALUE", dest="ignored_slurm",
                       help="any other option of sbatch: --slurm.qos=high --slurm.constraint=h100; "
                            "setup: a shell line before the arm; srun_args: options of srun")
  cluster.add_argument("--address", metavar="URL",
                       help="of Ray's dashboard, http://HOST:8265 (default: RAY_ADDRESS)")


def run(args: argparse.Namespace) -> int:
  """Runs the command."""
  from dsv3_jax import host
  from dsv3_jax.sweep import estimate, rows, runner, table
  from dsv3_jax.sweep.pool import Pool

  sweep = select(load_sweep(args.config, args.overrides), args.seeds, args.only)
  folder = args.workdir or default_workdir(args.config)
  pool = Pool(folder, write=not args.dry_run)
  launcher = _launcher(args, pool.folder)
  found = rows.look(sweep, pool, args.records, host.code())
  estimator = estimate.Estimator(pool, launcher.jobs, **_costs(args))
  for row in found:
    if row.progress.state == "done":
      estimator.learn(row.arm.config, row.progress)
  print(plan(sweep, found, estimator, rows.again(found, args.rerun), str(folder)))
  if args.dry_run:
    return 0
  keep = dict(records=args.records, rerun=args.rerun, drop_checkpoints=args.drop_checkpoints)
  if args.launcher == "local":
    outcome = runner.run(sweep, pool, launcher, found, estimator=estimator,
                         calibrate=args.hardware is None, **keep)
  else:
    outcome = runner.submit(sweep, pool, launcher, found, ui=table.Lines(), **keep)
  print(table.render(table.arms([row.shown for row in outcome.rows])))
  print(table.counts([row.progress for row in outcome.rows]))
  for row in outcome.failed:
    print(f"\n{row.arm.name}, seed {row.arm.seed}: {row.held or row.progress.state}; "
          f"{row.folder / 'output.log'} ends with:", file=sys.stderr)
    for line in row.progress.arm.get("error", [])[-8:]:
      print(f"  {line}", file=sys.stderr)
  if outcome.received:
    print("interrupted; the same command goes on" +
          (f" (without --rerun={args.rerun})" if args.rerun == "all" else ""))
  elif outcome.failed:
    print("--rerun=failed tries the failed arms again", file=sys.stderr)
  elif args.launcher != "local":
    print(f"follow them with: dsv3 watch {folder}")
  return outcome.exit_code


# Options of clusters, and which launchers take them.
_CLUSTER = {"nodes": "slurm", "tasks_per_node": "slurm", "gpus_per_node": "slurm ray",
            "cpus_per_task": "slurm ray", "partition": "slurm", "account": "slurm",
            "time": "slurm", "address": "ray", "jobs": "local slurm"}


def _launcher(args: argparse.Namespace, folder: Path) -> Any:
  """What --launcher and its options say.

  Raises:
    ConfigError: an option of another launcher, or one that cannot be.
  """
  given = {key: getattr(args, key) for key in _CLUSTER if getattr(args, key) is not None}
  for key in given:
    if args.launcher not in _CLUSTER[key].split():
      raise ConfigError(f"--{key.replace('_', '-')} goes with --launcher="
                        f"{_CLUSTER[key].replace(' ', ' or ')}")
  for key in ("nodes", "tasks_per_node", "gpus_per_node", "cpus_per_task", "jobs"):
    if given.get(key, 1) < 1:
      raise ConfigError(f"--{key.replace('_', '-')}={given[key]} must be positive")
  options = {}
  for word in args.options:
    key, equals, value = word.removeprefix(FREE[0]).partition("=")
    if not key or not equals:
      raise ConfigError(f"{word}: --slurm.KEY=VALUE is expected")
    options[key] = value
  if options and args.launcher != "slurm":
    raise ConfigError(f"{args.options[0]} goes with --launcher=slurm")
  if args.launcher == "slurm":
    from dsv3_jax.sweep import slurm

    return slurm.Slurm(folder, options=options, **given)
  if args.launcher == "ray":
    from dsv3_jax.sweep import ray_jobs

    return ray_jobs.Ray(args.address, gpus=args.gpus_per_node or 0, cpus=args.cpus_per_task or 1)
  from dsv3_jax.sweep import local

  return local.Local(args.jobs or 1)


def _costs(args: argparse.Namespace) -> dict[str, Any]:
  """The cost model's part of an `estimate.Estimator`: for --hardware, or for what is here."""
  from dsv3_jax.cost import budget, hardware
  from dsv3_jax.sweep import local

  if args.price is not None and args.price < 0:
    raise ConfigError(f"--price={args.price:g} must not be negative")
  here = args.launcher == "local" and args.hardware is None
  if args.hardware is None and (not here or local.gpus()):
    return {"price": args.price or 0.0, "here": here}
  known = hardware.get(args.hardware or "cpu")
  price = known.price if args.price is None else args.price

  def model(config: Config) -> float | None:
    try:
      return budget.pretraining(config, known).seconds
    except ConfigError:  # something that the model of costs does not know
      return None

  return {"price": price, "here": here, "where": known.name, "model": model}


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
    names = list(dict.fromkeys(arm.name for arm in arms))
    wanted = _listed(only, names)
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


def _listed(only: str, names: Sequence[str]) -> list[str]:
  """Which names "a,b" lists; a name may itself hold commas."""
  split = lambda text: [part.strip() for part in text.split(",")]
  known = {tuple(split(name)): name for name in names}
  parts, wanted = split(only), []
  while parts:
    fits = [n for n in range(len(parts), 0, -1) if tuple(parts[:n]) in known]
    if not fits:
      near = difflib.get_close_matches(parts[0], names, n=1)
      raise ConfigError(f"--only={only}: no arm is called {parts[0]!r}; " +
                        (f"did you mean {near[0]!r}?" if near else f"arms: {'; '.join(names)}"))
    wanted.append(known[tuple(parts[:fits[0]])])
    del parts[:fits[0]]
  return wanted


def _seeded(arm: Any, seed: int) -> Any:
  config = config_lib.replace(arm.config, **{SEED: seed})
  return dataclasses.replace(arm, seed=seed, config=config, id=config_lib.fingerprint(config),
                             overrides=arm.overrides | {SEED: seed})


def plan(sweep: Sweep, found: Sequence[Any], estimator: Any, repeated: Sequence[Any],
         folder: str) -> str:
  """What there is to do, as text.

  Args:
    sweep, found: as `runner.run`'s.
    estimator: of how long it takes.
    repeated: rows that --rerun starts again.
    folder: as it is to be called.
  """
  from rich.table import Table
  from rich.text import Text

  from dsv3_jax.sweep import table

  question = (sweep.text.strip().splitlines() or [""])[0]
  title = f"{sweep.experiment}{f':{sweep.arg}' if sweep.arg else ''}: {question}"
  shown = Table()
  for name in ("arm", "changes", "seeds", "finished", "to do", "time each"):
    shown.add_column(name, justify="left" if name in ("arm", "changes") else "right",
                     overflow="fold")
  again, todo = {id(row) for row in repeated}, []
  for name in dict.fromkeys(row.arm.name for row in found):
    rows = [row for row in found if row.arm.name == name]
    left = [row for row in rows if row.progress.state != "done" or id(row) in again]
    todo += [row.arm.config for row in left]
    stale = sum(row.stale for row in rows)
    changes = " ".join(f"{k}={_short(v)}" for k, v in rows[0].arm.overrides.items() if k != SEED)
    shown.add_row(Text(name), Text(changes or "-"), ",".join(str(row.arm.seed) for row in rows),
                  f"{len(rows) - len(left)}" + (f" ({stale} stale)" if stale else ""),
                  str(len(left)), table.duration(estimator.seconds(rows[0].arm.config)))
  states = table.counts([row.progress for row in found])
  last = f"{len(found)} arms in {folder}: {states}; {len(todo)} to do"
  costs = estimator.describe(todo)
  return "\n".join([title, table.render(shown), last + (f", {costs}" if costs else "")])


def _short(value: Any) -> str:
  return value if isinstance(value, str) else json.dumps(value, default=str)
