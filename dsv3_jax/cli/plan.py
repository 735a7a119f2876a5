"""`dsv3 plan`: the fastest mesh, schedule and micro-batch that fit. Without jax."""

import argparse
import json
import sys
from typing import TYPE_CHECKING

from dsv3_jax.cli.configs import load_config
from dsv3_jax.config import ConfigError
from dsv3_jax.readable import duration

if TYPE_CHECKING:
  from dsv3_jax.cost import plan

SUMMARY = "the fastest plan for a number of devices: mesh, schedule, micro-batch, remat"
DESCRIPTION = (
    "Searches meshes (pipeline, data, node, gpu), schedules, micro-batches, remat and ZeRO for\n"
    "the shortest step of the config's model, recipe and batch that fits the devices' memory, and\n"
    "says why the rest lose. Recipe, dtypes, dispatch and the cut of the vocabulary stay as the\n"
    "config has them, but buffers for the worst case become 1.5 times the mean. Layers are dealt\n"
    "out to stages by their time. The time is the one of `dsv3 cost`; the memory is what the plan\n"
    "needs on the fullest device, with 5 % left free.\n"
    "This code's own program holds more (collected masters, fixed buffers for dispatch, room on\n"
    "every rank for what the fullest needs): the table's last column. With --program that one\n"
    "has to fit.")
EXAMPLES = (
    "  dsv3 plan --gpus=2048 --hardware=h800 --config=experiments/v3_671b.py\n"
    "  dsv3 plan --gpus=64 --hardware=h100 --config=experiments/moe_16b.py --best=3\n"
    "  dsv3 plan --gpus=512 --hardware=h200 --config=experiments/v3_671b.py --json")
OVERRIDABLE = True
WIDTH = 118


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """The command's options."""
  parser.add_argument("--config", required=True, metavar="FILE[:ARG]",
                      help="experiment file; ARG goes to its get_config(arg)")
  parser.add_argument("--config.KEY", metavar="VALUE", dest="ignored",
                      help="override one value, for example --config.data.batch_size=7680")
  parser.add_argument("--gpus", type=int, required=True, metavar="N", help="devices")
  parser.add_argument("--hardware", default="h800", metavar="NAME|FILE",
                      help="device, as for `dsv3 cost` (default: %(default)s)")
  parser.add_argument("--best", type=int, default=8, metavar="N",
                      help="plans in the table (default: %(default)s)")
  parser.add_argument("--reserve", type=float, default=0.05, metavar="SHARE",
                      help="of the memory, to be left free (default: %(default)s)")
  parser.add_argument("--program", action="store_true",
                      help="the memory of this code's own program has to fit")
  parser.add_argument("--json", action="store_true", help="print everything as JSON")


def run(args: argparse.Namespace) -> int:
  """Runs the command.

  Raises:
    ConfigError: a config that cannot run, no such hardware, or nothing that is legal and fits.
  """
  from dsv3_jax.cost import hardware, memory, plan

  for name, ok in (("gpus", args.gpus > 0), ("best", args.best > 0),
                   ("reserve", 0 <= args.reserve < 1)):
    if not ok:
      raise ConfigError(f"--{name}={getattr(args, name)} must be "
                        + ("a share below 1" if name == "reserve" else "positive"))
  cfg = load_config(args.config, args.overrides)
  hw = hardware.get(args.hardware)
  search = plan.Search(cfg, args.gpus, hw, args.reserve, args.program)
  found = search.run(args.best)
  programs = [memory.estimate(p.config, "gpu").total for p in found.best]
  if args.json:
    content = {"devices": args.gpus, "hardware": hw.name, "room": search.room,
               "held_fixed": plan.held(cfg),
               "best": [p.to_dict(cfg) | {"program_memory": n}
                        for p, n in zip(found.best, programs, strict=True)],
               "losers": [{"axis": x.axis, "value": x.value, "reason": x.reason,
                           "step_s": x.best.step if x.best else None,
                           "choice": x.best.choice._asdict() if x.best else None}
                          for x in found.losers], "counted": found.counted}
    json.dump(content, sys.stdout, indent=2)
    print()
    return 0
  _print(cfg, args, search, found, programs)
  return 0


def _print(cfg, args: argparse.Namespace, search: "plan.Search", found: "plan.Found",
           programs: list[int]) -> None:
  from rich.console import Console
  from rich.table import Table
  from rich.text import Text

  from dsv3_jax.cost import plan

  console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else WIDTH)
  n = found.counted
  console.print(f"{args.gpus} x {search.hw.name}, {search.room / 1e9:.0f} GB to use of each; "
                f"{cfg.data.batch_size} sequences of {cfg.data.sequence_length} a step\n"
                f"Held fixed: {plan.held(cfg)}\n"
                f"{n['choices']} choices: {n['illegal']} not legal, {n['too_large']} found too "
                f"large, {n['simulated']} simulated\n")
  table = Table(box=None, pad_edge=False, header_style="bold")
  for name in ("", "pipe", "data", "node x gpu", "schedule", "seqs", "remat", "ZeRO", "step",
               "bubble", "MFU", "needs", "program"):
    table.add_column(name, justify="left" if name in ("schedule", "remat") else "right")
  for i, (p, program) in enumerate(zip(found.best, programs, strict=True), 1):
    c = p.choice
    table.add_row(str(i), str(c.pipe), str(c.data), f"{c.node} x {c.gpu}", c.schedule,
                  str(c.sequences), c.remat, str(c.zero), duration(p.step),
                  f"{max(p.time.breakdown['bubble'], 0) / p.step:.0%}", f"{p.time.mfu():.1%}",
                  f"{p.memory.total / 1e9:.1f} GB", f"{program / 1e9:.1f} GB")
  console.print(table)
  console.print("\nWhy the others lose, each with its best plan against the first:")
  rows = Table(box=None, pad_edge=False, show_header=False)
  rows.add_column(no_wrap=True)
  rows.add_column()
  last = ""
  for x in found.losers:
    if x.axis != last:
      rows.add_row(Text(plan.AXES[x.axis], style="bold"), "")
    last = x.axis
    rows.add_row(f"  {x.value}", x.reason)
  console.print(rows)
  first = found.best[0]
  if first.layers:
    console.print(f"\nLayers of the first plan's stages: {', '.join(map(str, first.layers))}")
  for note in first.notes(cfg):
    console.print(f"Note: {note}")
  lines = " \\\n  ".join([f"dsv3 train --config={args.config}", *first.overrides(cfg)])
  console.print("\nTo run the first:", Text(lines), sep="\n", soft_wrap=True)
