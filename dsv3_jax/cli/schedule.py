"""`dsv3 schedule`: a pipeline schedule as orders, numbers and a picture. Without jax."""

import argparse
import json
import shutil
import sys
from typing import Any

COSTS = ("forward", "backward_input", "backward_weight", "overlapped", "comm")
SUMMARY = "a pipeline schedule: order, bubble, activations, picture"
DESCRIPTION = (
    "What each rank of a pipeline does, and how long it idles under a cost model: durations of a\n"
    "stage's forward, backward for the input, backward for the weights, and of a forward that is\n"
    "overlapped with a whole backward of another micro-batch. Also how long the same takes in\n"
    "lockstep, as one program on all ranks runs it.")
EXAMPLES = (
    "  dsv3 schedule --name=dualpipe --ranks=8 --microbatches=20 --plot=dualpipe.svg\n"
    "  dsv3 schedule --name=zb1p --ranks=16 --microbatches=64 --backward_input=1.2 \\\n"
    "    --backward_weight=0.8 --comm=0.05\n"
    "  dsv3 schedule --name=dualpipe_v --ranks=8 --microbatches=40 --overlapped=2.4 --json")


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """The command's options; the defaults draw the report's figure 5."""
  parser.add_argument("--name", default="dualpipe", metavar="NAME",
                      help="gpipe, 1f1b, zb1p, dualpipe or dualpipe_v (default: %(default)s)")
  parser.add_argument("--ranks", type=int, default=8, metavar="R",
                      help="of the pipeline (default: %(default)s)")
  parser.add_argument("--microbatches", type=int, default=20, metavar="M",
                      help="of the whole batch (default: %(default)s)")
  for name, what in (("forward", "of F"), ("backward_input", "of the backward for the input"),
                     ("backward_weight", "of the backward for the weights")):
    parser.add_argument(f"--{name}", type=float, default=1.0, metavar="T",
                        help=f"duration {what} (default: %(default)s)")
  parser.add_argument("--overlapped", type=float, metavar="T",
                      help="duration of F and B overlapped (default: the sum of the three)")
  parser.add_argument("--comm", type=float, default=0.0, metavar="T",
                      help="latency between neighbouring ranks (default: %(default)s)")
  parser.add_argument("--plot", metavar="FILE", help="picture to write: .svg, .png or .pdf")
  parser.add_argument("--json", action="store_true",
                      help="print everything, each op's times included, as JSON")


def run(args: argparse.Namespace) -> int:
  """Runs the command.

  Raises:
    ValueError: no such schedule, sizes that it has no order for, a bad duration or file name.
  """
  from dsv3_jax.parallel import schedules
  from dsv3_jax.parallel.schedules import formulas

  costs = {name: getattr(args, name) for name in COSTS}
  plan = schedules.make(args.name, args.ranks, args.microbatches)
  found = plan.simulate(**costs)
  durations = {name: cost for name, cost in costs.items() if name != "comm"}
  formula = formulas.row(plan.name, plan.ranks, plan.microbatches, **durations)
  lockstep = {}
  for name, unit in (("ops", False), ("unit", True)):
    ticks = plan.ticks(unit)
    lockstep[name] = {"ticks": len(ticks.rows), "makespan": ticks.simulate(**costs).makespan}
  if args.plot:
    _plot(plan, found, args.plot)
  if args.json:
    print(json.dumps(_as_json(plan, found, formula.bubble, costs, lockstep)))
    return 0
  print(f"{plan.name}: {plan.ranks} ranks, {plan.microbatches} micro-batches, "
        f"{plan.stages} stages\n")
  room = shutil.get_terminal_size().columns - 30 if sys.stdout.isatty() else sys.maxsize
  print("rank  bubble  activations  order")
  for rank in range(plan.ranks):
    order = plan.string(rank)
    order = order if len(order) <= room else order[:max(room - 3, 0)] + "..."
    print(f"{rank:4}  {found.bubble[rank]:6.4g}  {found.peak_activations[rank]:11}  {order}")
  worst = max(found.bubble)
  share = worst / found.makespan if found.makespan else 0.0
  print(f"\nF forward, b backward for the input, w for the weights, B both, X F and B overlapped\n"
        f"makespan {found.makespan:.6g}, of which the rank that idles most idles {worst:.6g} "
        f"({share:.1%}); table 2's formula: {formula.bubble:.6g}\n"
        f"in lockstep {lockstep['ops']['makespan']:.6g} ({lockstep['ops']['ticks']} ticks), "
        f"with ops cut into F, b, w {lockstep['unit']['makespan']:.6g} "
        f"({lockstep['unit']['ticks']} ticks)")
  if args.plot:
    print(args.plot)
  return 0


def _plot(plan: Any, found: Any, path: str) -> None:
  from dsv3_jax.analysis import schedule_plot

  schedule_plot.check_suffix(path)
  title = (f"{plan.name}, {plan.ranks} ranks, {plan.microbatches} micro-batches: makespan "
           f"{found.makespan:.4g}, bubble {max(found.bubble):.4g}, at most "
           f"{max(found.peak_activations)} activations a rank")
  schedule_plot.write(schedule_plot.draw(schedule_plot.bars(plan, found), title), path)


def _as_json(plan: Any, found: Any, formula: float, costs: dict[str, float | None],
             lockstep: dict[str, Any]) -> dict[str, Any]:
  """Everything; ops as {kind, forward, backward, start, end}."""
  unit = lambda u: None if u is None else u._asdict()
  orders = [[{"kind": op.kind, "forward": unit(op.forward), "backward": unit(op.backward),
              "start": start, "end": end} for op, start, end in zip(*rows, strict=True)]
            for rows in zip(plan.orders, found.starts, found.ends, strict=True)]
  return {"name": plan.name, "ranks": plan.ranks, "microbatches": plan.microbatches,
          "stages": plan.stages, "routes": plan.routes, "costs": costs,
          "makespan": found.makespan, "bubble": found.bubble,
          "peak_activations": found.peak_activations, "formula": formula, "lockstep": lockstep,
          "strings": [plan.string(rank) for rank in range(plan.ranks)], "orders": orders}
