"""`dsv3 train`: one run, or its continuation."""

import argparse
from pathlib import Path
from typing import Any

from dsv3_jax import config as config_lib
from dsv3_jax.cli.configs import default_workdir, load_config, load_stages

SUMMARY = "train a model, or go on with a run"
DESCRIPTION = (
    "Train the model of an experiment file. Where the workdir holds a checkpoint of the same\n"
    "config, training goes on from it. Ctrl-C (or SIGTERM) saves before leaving; the same\n"
    "command resumes. At the end report.md and report.html are in the workdir.\n\n"
    "An experiment with stages(arg) is several runs in a row, each in a folder of the workdir and\n"
    "beginning with the one before: pretraining, fine-tuning, GRPO. Where exam.problems are named\n"
    "each model answers them, and stages.md compares.\n\n"
    "--config.train.profile_from=N captures train.profile_steps steps from step N on with\n"
    "jax.profiler into WORKDIR/profile. TensorBoard's files are in WORKDIR/tensorboard; where\n"
    "WANDB_PROJECT is set and wandb is installed, the same numbers go to Weights & Biases.")
EXAMPLES = (
    "  dsv3 train --config=experiments/tiny.py\n"
    "  dsv3 train --config=experiments/tiny.py:smoke --workdir=/tmp/smoke\n"
    "  dsv3 train --config=experiments/tiny.py --config.optim.lr=3e-4 \\\n"
    "    --config.data.fim_rate=0 --workdir=runs/nofim\n"
    "  dsv3 train --config=experiments/tiny.py --config.data.sources='texts/*.txt,notes' \\\n"
    "    --workdir=runs/notes\n"
    "  dsv3 train --config=experiments/tiny.py --config.train.profile_from=50 \\\n"
    "    --workdir=runs/profiled\n"
    "  dsv3 train --config=experiments/v3_671b.py --print-config")
OVERRIDABLE = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """The command's options."""
  parser.add_argument("--config", required=True, metavar="FILE[:ARG]",
                      help="experiment file; ARG goes to its get_config(arg)")
  parser.add_argument("--config.KEY", metavar="VALUE", dest="ignored",
                      help="override one value, for example --config.optim.lr=3e-4; see "
                           "dsv3_jax/config.py, or --print-config, for the keys")
  parser.add_argument("--workdir", metavar="DIR",
                      help="folder of this run (default: runs/EXPERIMENT or runs/EXPERIMENT-ARG)")
  parser.add_argument("--stage", metavar="NAME", default="",
                      help="of an experiment with stages run this one alone; those that it begins "
                           "with must be there")
  parser.add_argument("--print-config", action="store_true",
                      help="print the resulting config as JSON and leave")
  several = parser.add_argument_group(
      "several processes", "Each host runs the same command. Under SLURM, Open MPI, Kubernetes or "
      "on a TPU pod they find each other; elsewhere say where:")
  several.add_argument("--coordinator", metavar="HOST:PORT",
                       help="where process 0 listens, any free port of its host")
  several.add_argument("--processes", type=int, metavar="N",
                       help="how many there are; 1: this one is alone, whatever the environment")
  several.add_argument("--process", type=int, metavar="I", help="number of this one, from 0")
  several.add_argument("--patience", type=float, default=30.0, metavar="SECONDS",
                       help="without a sign of life for so long a process counts as lost, and the "
                            "others end (default: %(default)g)")
  several.add_argument("--start-timeout", type=float, default=300.0, metavar="SECONDS",
                       help="how long processes wait for each other at the start (default: "
                            "%(default)g)")


def run(args: argparse.Namespace) -> int:
  """Runs the command."""
  workdir = Path(args.workdir) if args.workdir else default_workdir(args.config)
  stages = load_stages(args.config, args.overrides, workdir)
  config, own = _chosen(args, stages, workdir)
  if args.print_config:
    print(config_lib.to_json(config))
    return 0
  from dsv3_jax import files  # jax starts here
  from dsv3_jax.analysis import report
  from dsv3_jax.analysis import stages as stages_report
  from dsv3_jax.posttrain import chain
  from dsv3_jax.posttrain import run as kinds
  from dsv3_jax.train import launch

  found = launch.find(args.coordinator, args.processes, args.process, patience=args.patience,
                      start_timeout=args.start_timeout)

  def one(config: config_lib.Config, folder: str) -> Any:
    result = kinds.run(config, folder, **({"launch": found} if found else {}))
    if result.first:
      files.write_atomic(Path(folder) / "command.txt", args.command_line + "\n")
      print(f"report: {report.write(Path(folder))}")
    return result

  if not stages or args.stage:
    return one(config, str(own)).exit_code
  made = [chain.Stage(*stage) for stage in stages]
  if found:
    raise config_lib.ConfigError("several processes run a stage at a time: name it, one after the "
                                 f"other, with --stage={made[0].name} and so on")
  for i, stage in enumerate(made):  # before the first, what only the last would find
    try:
      kinds.check(stage.config, [s.folder for s in made[:i]])
    except config_lib.ConfigError as error:
      raise config_lib.ConfigError(f"stage {stage.name!r}: {error}") from error
  result = chain.run(made, one)
  if result.first:
    ran = [(s.name, s.folder) for s in made if (Path(s.folder) / "config.json").is_file()]
    written = stages_report.write(ran, workdir)
    print(written.with_suffix(".md").read_text(encoding="utf-8"))
    print(f"report of all stages: {written}")
  return result.exit_code


def _chosen(args: argparse.Namespace, stages: list[tuple[str, str, config_lib.Config]],
            workdir: Path) -> tuple[config_lib.Config, Path]:
  """Config and workdir of the one run, or of `--stage`; of all stages the last one's config."""
  if not args.stage:
    return (stages[-1][2] if stages else load_config(args.config, args.overrides)), workdir
  for name, folder, config in stages:
    if name == args.stage:
      return config, Path(folder)
  there = f"the stages {', '.join(s[0] for s in stages)}" if stages else "no stages"
  raise config_lib.ConfigError(f"--stage={args.stage}: {args.config} has {there}")
