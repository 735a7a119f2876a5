"""`dsv3 report`: the report of a run again, or of several side by side. Without jax."""

import argparse
import ast
import dataclasses
import inspect
import json
import sys
from pathlib import Path
from typing import Any

from dsv3_jax.cli import configs
from dsv3_jax.config import ConfigError

SUMMARY = "write the report of a run, of a sweep, or of several runs side by side"
DESCRIPTION = (
    "One run: report.md, report.html and plots/ in its workdir, also while it is going or after\n"
    "it was killed.\n\n"
    "Several: a comparison. SOURCE is the workdir of a run or of a sweep, or a folder of records\n"
    "(what `dsv3 sweep --records` keeps), in any mixture. Runs that differ in their seed alone\n"
    "are one arm: means and deviations over seeds, differences to the baseline with a paired\n"
    "test, curves, expert load, and what there is to doubt. Every page opens offline.")
EXAMPLES = (
    "  dsv3 report runs/tiny\n"
    "  dsv3 report runs/tiny runs/slow --out=report\n"
    "  dsv3 report runs/ablations --sweep=experiments/ablate_mtp.py:cpu --format=pdf\n"
    "  dsv3 report experiments/results --sweep=experiments/ablate_mtp.py:cpu --markdown\n"
    "  dsv3 report runs/before runs/after --baseline=before --json")


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """The command's options."""
  parser.add_argument("source", metavar="SOURCE", nargs="+",
                      help="workdir of a run or of a sweep, or a folder of records")
  parser.add_argument("--sweep", metavar="FILE[:ARG]",
                      help="the experiment whose arms are meant (default: a report for each sweep "
                           "of SOURCE)")
  parser.add_argument("--baseline", metavar="NAME",
                      help="arm that the others are compared with (default: the first)")
  parser.add_argument("--metric", choices=("loss", "bits_per_byte", "smoothed"),
                      help="what arms are ranked and tested by: validation loss, its bits per "
                           "byte, or the smoothed training loss (default: loss; bits_per_byte "
                           "where tokenizers differ)")
  parser.add_argument("--out", metavar="DIR",
                      help="folder of the comparison (default: SWEEP/reports/NAME, or report)")
  parser.add_argument("--format", metavar="A,B", default="svg",
                      help="of the figures, beside SVG: pdf, png")
  parser.add_argument("--markdown", action="store_true",
                      help="print the table of arms and write nothing")
  parser.add_argument("--json", action="store_true", help="print the numbers and write nothing")


def run(args: argparse.Namespace) -> int:
  """Runs the command.

  Raises:
    ConfigError: a source that holds nothing, no such sweep, arm, metric or format.
    OSError: the folder cannot be written to.
  """
  from dsv3_jax.analysis.comparison import gather

  options = (args.sweep, args.baseline, args.metric, args.out, args.markdown, args.json,
             args.format != "svg")
  alone = len(args.source) == 1
  if alone and not any(options) and not gather.is_pool(args.source[0]) and (
      gather.is_workdir(args.source[0]) or not _holds_json(args.source[0])):
    from dsv3_jax.analysis import report

    print(report.write(args.source[0]))
    return 0
  if args.markdown and args.json:
    raise ConfigError("give --markdown or --json, not both")

  from dsv3_jax.analysis.comparison import compare, document

  made = []
  several = len(asked := _plans(args)) > 1
  for name, plan in asked.items():
    found = compare.make(gather.collect(args.source, plan), args.baseline, args.metric)
    if args.json:
      made.append(compare.to_json(found))
    elif args.markdown:
      made.append((f"## {name}\n\n" if several else "") + document.table(found))
    else:
      formats = [f for f in args.format.split(",") if f]
      print(document.write(found, _out(args, name), formats, args.command_line), flush=True)
  if args.json:
    print(json.dumps(made[0] if len(made) == 1 else made))
  elif made:
    print("\n".join(made), end="")
  return 0


def _plans(args: argparse.Namespace) -> dict[str, Any]:
  """Name -> plan, a report each. One without a plan is of all that the sources hold."""
  from dsv3_jax.analysis.comparison import gather

  notes: list[str] = []
  known: dict[str, Any] = {}
  for source in args.source:
    if gather.is_pool(source) and not gather.is_workdir(source):
      known = gather.plans(source, notes) | known
  for note in notes:
    print(f"dsv3: {note}", file=sys.stderr)
  if args.sweep:
    name, plan = _asked(args.sweep, known)
    return {name: plan}
  if len(known) > 1 and (args.out or len(args.source) > 1):
    raise ConfigError(f"{len(known)} sweeps are in {', '.join(args.source)}; give the one that is "
                      f"meant with --sweep: {', '.join(map(_spec, known.values()))}")
  if len(args.source) == 1 and known:
    return {name: _described(plan) for name, plan in known.items()}
  return {"report": None}


def _asked(spec: str, known: dict[str, Any]) -> tuple[str, Any]:
  """Name and plan of --sweep: as it was run in a pool, else as its file makes it today."""
  from dsv3_jax.sweep import pool

  path, arg = configs.split_spec(spec)
  name = Path(path).stem + (f"-{pool.slug(arg)}" if arg else "")
  return name, _described(known[name]) if name in known else planned(spec, name)


def planned(spec: str, name: str) -> Any:
  """The `gather.Plan` of an experiment's sweep as its file makes it today."""
  from dsv3_jax.analysis.comparison import gather

  sweep = configs.load_sweep(spec)
  question, _, text = sweep.text.partition("\n")
  arms = tuple(gather.Planned(a.name, a.seed, a.id) for a in sweep.arms)
  return gather.Plan(name, sweep.experiment, question, text.strip(), arms)


def _described(plan: Any) -> Any:
  """With the text of the experiment's file, where that is still there; nothing of it is run."""
  try:
    module = ast.parse(Path(plan.experiment).read_text(encoding="utf-8"))
  except (OSError, ValueError, SyntaxError):
    return plan
  text = inspect.cleandoc(ast.get_docstring(module) or "").partition("\n")[2]
  return dataclasses.replace(plan, text=text.strip())


def _out(args: argparse.Namespace, name: str) -> Path:
  from dsv3_jax.analysis.comparison import gather

  if args.out:
    return Path(args.out)
  if len(args.source) == 1 and gather.is_pool(args.source[0]):
    return Path(args.source[0]) / "reports" / name
  return Path("report")


def _holds_json(source: str) -> bool:
  return Path(source).is_file() or any(Path(source).glob("*.json"))


def _spec(plan: Any) -> str:
  """What --sweep is for a plan."""
  arg = plan.name.removeprefix(Path(plan.experiment).stem).removeprefix("-")
  return plan.experiment + (f":{arg}" if arg else "")
