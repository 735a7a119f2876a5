"""`dsv3 report`: a run's report again."""

import argparse

SUMMARY = "write a run's report again"
DESCRIPTION = (
    "Write report.md, report.html and plots/ from the files of a workdir, also while the run is\n"
    "going or after it was killed. The page opens offline.")
EXAMPLES = (
    "  dsv3 report runs/tiny")


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """The command's options."""
  parser.add_argument("workdir", metavar="WORKDIR")


def run(args: argparse.Namespace) -> int:
  """Runs the command."""
  from dsv3_jax.analysis import report

  print(report.write(args.workdir))
  return 0
