"""`dsv3 watch`: running experiments in the terminal."""

import argparse
import sys
import time
from pathlib import Path

from dsv3_jax.config import ConfigError

SUMMARY = "follow running experiments in the terminal"
DESCRIPTION = (
    "A table of runs, kept up to date: state, step, loss with its curve, validation loss, MaxVio\n"
    "(how far the fullest expert is above its share), tokens a second, time left, the newest\n"
    "checkpoint, and how long ago the last line was written. Runs may be going, ended or killed.\n"
    "Ctrl-C leaves; it stops no run. The same runs' curves stand in TensorBoard's files, by the\n"
    "command that is printed below the table.")
EXAMPLES = (
    "  dsv3 watch runs/tiny\n"
    "  dsv3 watch runs/ablations           # a sweep's arms\n"
    "  dsv3 watch runs                     # whatever is in there\n"
    "  dsv3 watch runs/a runs/b --once")


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """The command's options."""
  parser.add_argument("workdir", nargs="+", metavar="WORKDIR",
                      help="workdir of a run or of a sweep, or a folder that holds such")
  parser.add_argument("--once", action="store_true",
                      help="print the table once and leave; so it does where there is no terminal")
  parser.add_argument("--interval", type=float, default=2.0, metavar="SECONDS",
                      help="between looks at the files (default: %(default)g)")


def run(args: argparse.Namespace) -> int:
  """Runs the command."""
  from rich.console import Console
  from rich.live import Live

  from dsv3_jax.sweep import table, watch

  if args.interval <= 0:
    raise ConfigError(f"--interval={args.interval:g} must be positive")
  for folder in args.workdir:
    if not Path(folder).is_dir():
      raise ConfigError(f"{folder} is not a folder; give the workdir of a run or of a sweep, or a "
                        "folder that holds such")
  watched = watch.Watch(args.workdir)
  rows = watched.read()
  if args.once or not sys.stdout.isatty():
    if not rows:
      raise ConfigError(f"{', '.join(args.workdir)}: no run was started there")
    width = Console().width if sys.stdout.isatty() else 160
    print(table.render(watch.render(rows, width=width)))
    print(f"curves: {watched.tensorboard()}")
    return 0
  console = Console()

  def shown():
    return watch.render(rows, watched.tensorboard(), max(console.height - 6, 3), console.width)

  try:
    with Live(shown(), console=console, auto_refresh=False) as live:
      while True:
        time.sleep(args.interval)
        rows = watched.read()
        live.update(shown(), refresh=True)
  except KeyboardInterrupt:
    return 0
