"""`dsv3 simulate`: placement policies of redundant experts under loads over time. Without jax."""

import argparse
import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  import numpy as np

  from dsv3_jax.infer import simulate

SUMMARY = "expert placement under load: max/mean load over time for each policy"
DESCRIPTION = (
    "How unevenly experts load their GPUs over time, and what it costs to keep that down. Each\n"
    "policy places experts from the tokens of a window of steps, every so many steps; what counts\n"
    "is the load of the steps that follow. A step takes as long as its busiest GPU, so max / mean\n"
    "load is how many times longer than if balanced.\n\n"
    "  none     no redundant experts, in order\n"
    "  static   the published placement (EPLB) of the first window, for ever\n"
    "  eplb     the published placement, each time\n"
    "  ours     one never worse than that for the window; GPUs keep what they can\n"
    "  steady   near the placement before: gives up 1 % of balance to fetch fewer experts\n"
    "  limited  at most --moves experts fetched in a layer each time\n\n"
    "GPUs have equally many slots: the least that hold all experts and the redundant ones. Loads\n"
    "are recorded, or made up: domains of text, each with Zipf's popularity of experts, which\n"
    "drifts, and a mixture of domains that shifts.")
EXAMPLES = (
    "  dsv3 simulate --plot=placement.svg\n"
    "  dsv3 simulate --load=runs/tiny --ranks=8 --gpus_per_node=4\n"
    "  dsv3 simulate --load=counts.npy --ranks=32,320 --window=100 --every=50\n"
    "  dsv3 simulate --ranks=144 --skew=1 --drift=0.1 --seed=3 --json")
HEAD = ("policy", "mean", "worst step", "worst layer", "experts fetched", "CPU ms")
MADE_UP = {"steps": 200, "layers": 8, "experts": 256, "tokens": 16384, "active": 8, "skew": 0.6,
           "drift": 0.02, "domains": 4, "shift": 100, "seed": 0}


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """The command's options."""
  number = lambda name, default, help, kind=int: parser.add_argument(
      f"--{name}", type=kind, default=default, metavar="X" if kind is float else "N",
      help=help if default is None else f"{help} (default: %(default)s)")
  parser.add_argument("--ranks", default="32,64,144,320", metavar="N,...",
                      help="GPUs that share the experts, one cluster each (default: %(default)s)")
  number("gpus_per_node", 8, "of a node")
  number("groups", None, "expert groups of the router, whole on a node if there are enough "
                         "(default: 8, or 1 where that does not divide the experts)")
  number("redundant", None, "redundant experts at least (default: an eighth of the experts)")
  parser.add_argument("--policies", default="none,static,eplb,ours,steady,limited",
                      metavar="NAME,...", help="default: %(default)s")
  number("moves", 8, "of limited: experts fetched in a layer at most")
  number("window", None, "steps whose load a policy sees (default: a tenth of all)")
  number("every", None, "steps between rebalancings (default: a tenth of all)")
  parser.add_argument("--load", metavar="PATH",
                      help="recorded load: a workdir or its metrics.jsonl, or a .npy or .json file "
                           "of [step, layer, expert]")
  # None tells what was asked for from what was not: neither goes with --load.
  for name, what in (("steps", "steps"), ("layers", "MoE layers"), ("experts", "experts a layer"),
                     ("tokens", "tokens a step"), ("active", "experts a token"),
                     ("skew", "Zipf's exponent"), ("drift", "spread of a step of log popularity"),
                     ("domains", "domains of text"), ("shift", "steps between shifts of domains"),
                     ("seed", "of the random numbers")):
    parser.add_argument(f"--{name}", type=type(MADE_UP[name]), metavar="N",
                        help=f"made-up load: {what} (default: {MADE_UP[name]})")
  parser.add_argument("--plot", metavar="FILE", help="picture to write: .svg, .png or .pdf")
  parser.add_argument("--json", action="store_true", help="print everything, each step, as JSON")


def run(args: argparse.Namespace) -> int:
  """Runs the command.

  Raises:
    ConfigError: no such load.
    ValueError: sizes that do not fit, an unknown policy, a bad file name.
  """
  from dsv3_jax.infer import simulate

  if args.plot:
    from dsv3_jax.analysis import schedule_plot
    schedule_plot.check_suffix(args.plot)
  load_SLE, about = _load(args)
  steps, layers, experts = load_SLE.shape
  window = max(steps // 10, 1) if args.window is None else args.window
  every = max(steps // 10, 1) if args.every is None else args.every
  groups = (8 if experts % 8 == 0 else 1) if args.groups is None else args.groups
  redundant = experts // 8 if args.redundant is None else args.redundant
  clusters = [simulate.cluster(ranks, experts, groups, args.gpus_per_node, redundant)
              for ranks in _ranks(args.ranks)]
  policies = list(dict.fromkeys(args.policies.split(",")))
  if not args.json:
    print(f"{about}: {steps} steps, {layers} layers, {experts} experts; rebalanced every {every} "
          f"from the last {window}")
  found = []
  for on in clusters:
    found.append(simulate.run(load_SLE, on, policies, window, every, args.moves))
    if not args.json:
      print(_table(on, experts, found[-1]))
  if args.plot:
    _plot(args.plot, [_title(on, experts) for on in clusters], found, window, every)
  if args.json:
    print(json.dumps({
        "load": about, "steps": steps, "layers": layers, "experts": experts, "window": window,
        "every": every, "clusters": [_as_json(on, outcomes) for on, outcomes in
                                     zip(clusters, found, strict=True)]}))
  else:
    print("\nmax / mean load of the GPUs: mean over steps, of the worst step (summed over layers), "
          "of the\nworst layer at any step; experts fetched by all GPUs and layers, and time to "
          "decide, a rebalancing")
    if args.plot:
      print(args.plot)
  return 0


def _load(args: argparse.Namespace) -> tuple["np.ndarray", str]:
  """The load, float64 [S, L, E], and what it is."""
  from dsv3_jax.analysis import recorded_load
  from dsv3_jax.infer import simulate

  asked = {name: getattr(args, name) for name in MADE_UP if getattr(args, name) is not None}
  if args.load is None:
    wanted = {**MADE_UP, **asked}
    return simulate.synthetic(**wanted), f"made-up load, seed {wanted['seed']}"
  if asked:
    name, value = next(iter(asked.items()))
    raise ValueError(f"--{name}={value} is of made-up load, and --load={args.load} gives a "
                     "recorded one; give one of the two")
  return recorded_load.read(args.load), args.load


def _ranks(text: str) -> list[int]:
  try:
    return list(dict.fromkeys(int(word) for word in text.split(",")))
  except ValueError:
    raise ValueError(f"--ranks={text}: give whole numbers, such as 32,144") from None


def _title(on: "simulate.Cluster", experts: int) -> str:
  return (f"{on.gpus} GPUs, {on.slots} slots, {on.slots - experts} redundant experts, "
          f"{'hierarchical' if on.hierarchical else 'global'}")


def _table(on: "simulate.Cluster", experts: int, outcomes: "list[simulate.Outcome]") -> str:
  rows = [HEAD]
  for o in outcomes:
    moved = f"{sum(o.moved) / len(o.moved):,.0f}" if o.moved else "-"
    rows.append((o.policy, f"{o.ratio_S.mean():.4f}", f"{o.ratio_S.max():.4f}", f"{o.worst:.3f}",
                 moved, f"{1e3 * sum(o.seconds) / len(o.seconds):.1f}"))
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  lines = ["  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in
                                                 zip(row[1:], widths[1:], strict=True))])
           for row in rows]
  return "\n".join(["", _title(on, experts), *(f"  {line}" for line in lines)])


def _plot(path: str, titles: list[str], found: "list[list[simulate.Outcome]]", window: int,
          every: int) -> None:
  from dsv3_jax.analysis import placement_plot, schedule_plot

  panels = [(title, {o.policy: o.ratio_S for o in outcomes})
            for title, outcomes in zip(titles, found, strict=True)]
  schedule_plot.write(placement_plot.draw(panels, window, every), path)


def _as_json(on: "simulate.Cluster", outcomes: "list[simulate.Outcome]") -> dict[str, Any]:
  return {"gpus": on.gpus, "nodes": on.nodes, "groups": on.groups, "slots": on.slots,
          "hierarchical": on.hierarchical, "policies": [
              {"policy": o.policy, "mean": float(o.ratio_S.mean()),
               "worst_step": float(o.ratio_S.max()), "worst_layer": o.worst, "moved": o.moved,
               "milliseconds": [1e3 * s for s in o.seconds], "ratio": o.ratio_S.tolist()}
              for o in outcomes]}
