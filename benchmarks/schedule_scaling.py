"""How the pipeline schedules scale on paper: 8 to 4,096 ranks, under the report's measured times.

    python -m benchmarks.schedule_scaling               tables; half a minute of one core
    python -m benchmarks.schedule_scaling --save        and results/schedule_scaling.{json,svg}

Costs. Of a step of 19.926 s on 2,048 GPUs, the authors (arXiv 2505.09343, table 4) give F 1.13 s,
B 1.99 s, W 0.48 s, F&B overlapped 13.95 s, optimizer 0.29 s, bubble 2.06 s. Divided by how many of
each a rank does on average in dualpipe with 16 ranks and 120 micro-batches, these are the durations
of one stage (some four layers, one sequence of 4,096 tokens). A hop between ranks takes
4096 x 7168 BF16 values at 50 GB/s. F, B and W were measured where nothing overlaps them, so they
hold their exposed all-to-alls, and are what schedules without F&B pay throughout.

Two questions. (1) A deeper model, each rank holding as much as before, and M / R micro-batches a
rank: what share of a rank's time is idle, and what does a micro-batch take? dualpipe_v's stages are
halves, so that all hold the same model. (2) The report's model and batch of 15,360 sequences on
16 pipeline ranks x as many data-parallel ones as there are GPUs: fewer micro-batches a pipeline,
the more GPUs.

Up to 64 ranks every number is simulated, event by event. Beyond, it lies on the straight line
through 32 and 64 ranks at the same M / R: what a schedule does at its ends grows with R, what it
does between with M, and so both with R. `check` simulates 128 ranks and says how far off the line
is: nothing but rounding.

Not in it: unequal stages, memory, links shared with other traffic, stragglers.
"""

import argparse
import collections
import dataclasses
import json
import pathlib
import statistics

from benchmarks import common
from dsv3_jax import files
from dsv3_jax.parallel import schedules

MEASURED = {"F": 1.13, "B": 1.99, "W": 0.48, "FB": 13.95}  # s a step
STEP, BUBBLE, OPTIMIZER = 19.926, 2.06, 0.29
REPORT = ("dualpipe", 16, 120)  # schedule, ranks, micro-batches
SEQUENCES = 15360
HOP = 4096 * 7168 * 2 / 50e9
RANKS = tuple(2**n for n in range(3, 13))
RATIOS = (2, 8, 32)  # M / R; the report's is 7.5
GPUS = tuple(2**n for n in range(8, 13))
LINE = (32, 64)  # ranks


@dataclasses.dataclass(frozen=True)
class Point:
  """Attributes:
    makespan: seconds.
    idle: seconds, mean over ranks.
  """

  makespan: float
  idle: float


def stage_costs() -> dict[str, float]:
  """Seconds of F, I, W and F&B of one of 16 stages, from the measured sums."""
  plan = schedules.make(*REPORT)
  counts = collections.Counter(op.kind for order in plan.orders for op in order)
  mean = {kind: n / plan.ranks for kind, n in counts.items()}
  weight = MEASURED["W"] / mean["W"]
  # The sum of the Bs holds whole ones, W included, and those whose W is put off.
  return {"forward": MEASURED["F"] / mean["F"], "backward_weight": weight,
          "backward_input": (MEASURED["B"] - mean["B"] * weight) / (mean["B"] + mean["I"]),
          "overlapped": MEASURED["FB"] / mean["FB"]}


def simulate(name: str, ranks: int, microbatches: int, costs: dict[str, float]) -> Point:
  """One simulation, a rank holding the layers that `costs` are for."""
  part = 2 if name == "dualpipe_v" else 1
  found = schedules.make(name, ranks, microbatches).simulate(
      **{k: v / part for k, v in costs.items()}, comm=HOP)
  return Point(found.makespan, statistics.fmean(found.bubble))


def deeper(name: str, ratio: int, costs: dict[str, float]) -> dict[int, Point]:
  """Ranks -> point, `ratio` micro-batches a rank; simulated up to LINE's end."""
  points = {r: simulate(name, r, ratio * r, costs) for r in RANKS if r <= LINE[1]}
  return {r: points[r] if r in points else line(points, r) for r in RANKS}


def line(points: dict[int, Point], ranks: int) -> Point:
  """The straight line through LINE's two points."""
  low, high = (dataclasses.astuple(points[r]) for r in LINE)
  share = (ranks - LINE[0]) / (LINE[1] - LINE[0])
  return Point(*(a + share * (b - a) for a, b in zip(low, high)))


def check(found: dict[str, dict[int, dict[int, Point]]], costs: dict[str, float]) -> float:
  """Largest relative error of the line's makespans at twice its end, all schedules, M = 2 R."""
  ranks, ratio, errors = 2 * LINE[1], RATIOS[0], []
  for name in schedules.NAMES:
    exact = simulate(name, ranks, ratio * ranks, costs)
    errors.append(abs(found[name][ratio][ranks].makespan / exact.makespan - 1))
  return max(errors)


def draw(found: dict, wider: dict):
  """Left: time a micro-batch in a deeper pipeline. Right: GPU-hours a step on more GPUs."""
  from dsv3_jax.analysis import plots

  figure = plots.new_figure(plots.WIDE, 4.0)
  left, right = figure.subplots(1, 2)
  for axes, x_label, y_label in (
      (left, "pipeline ranks", "ms a micro-batch and rank"),
      (right, "GPUs (16 pipeline ranks)", "GPU-hours a step of 15,360 sequences")):
    plots.style(axes)
    axes.set_xscale("log", base=2)
    axes.set_xlabel(x_label, color=plots.TEXT)
    axes.set_ylabel(y_label, color=plots.TEXT)
  for name, colour in zip(schedules.NAMES, plots.SERIES, strict=True):
    for ratio, dash in zip(RATIOS, (":", "-", "--"), strict=True):
      points = found[name][ratio]
      values = [1e3 * p.makespan / (ratio * r) for r, p in points.items()]
      simulated = sum(r <= LINE[1] for r in points)
      left.plot(list(points), values, color=colour, linestyle=dash, linewidth=1.3, marker="o",
                markersize=3.5, markevery=range(simulated),
                label=name if ratio == RATIOS[1] else None)
    hours = [n * (p.makespan + OPTIMIZER) / 3600 for n, p in wider[name].items()]
    right.plot(list(wider[name]), hours, color=colour, linewidth=1.6, marker="o", markersize=3.5,
               label=name)
  right.plot(2048, 2048 * STEP / 3600, marker="*", markersize=11, color=plots.TEXT,
             linestyle="none", label="measured")
  ratios = ", ".join(f"{text} {r}" for text, r in zip(("dotted", "solid", "dashed"), RATIOS))
  left.set_title(f"micro-batches a rank: {ratios}; dots: simulated", loc="left", fontsize=9.5,
                 color=plots.TEXT)
  right.set_title("the report's model and batch", loc="left", fontsize=9.5, color=plots.TEXT)
  for axes in (left, right):
    ticks = RANKS if axes is left else GPUS
    axes.set_xticks(ticks, [f"{t:,}" for t in ticks])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
  right.legend(frameon=False, fontsize=8.5, labelcolor=plots.TEXT)
  return figure


def main(argv: list[str] | None = None) -> None:
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawTextHelpFormatter)
  parser.add_argument("--save", action="store_true",
                      help="write benchmarks/results/schedule_scaling.json and .svg")
  parser.add_argument("--plot", metavar="FILE", help="the figure alone: .svg, .png or .pdf")
  args = parser.parse_args(argv)
  costs = stage_costs()
  whole = sum(v for k, v in costs.items() if k != "overlapped")
  print("ms of a stage: " + ", ".join(f"{k} {1e3 * v:.1f}" for k, v in costs.items())
        + f" (F + I + W {1e3 * whole:.1f}), hop {1e3 * HOP:.2f}")
  report = simulate(*REPORT, costs)
  print(f"the report's step: simulated {report.makespan + OPTIMIZER:.2f} s, bubble "
        f"{report.idle:.2f} s; measured {STEP} s, bubble {BUBBLE} s\n")
  found = {name: {k: deeper(name, k, costs) for k in RATIOS} for name in schedules.NAMES}
  error = check(found, costs)
  cell = lambda p, m: f"{p.idle / p.makespan:.1%} / {1e3 * p.makespan / m:.1f}"
  head = " | ".join(schedules.NAMES)
  print("1. Deeper: share of time idle / ms a micro-batch. Above "
        f"{LINE[1]} ranks: the line (at {2 * LINE[1]} ranks {error:.1e} off)\n\n"
        f"| M / R | ranks | {head} |\n|{'---|' * (2 + len(found))}")
  for k in RATIOS:
    for r in RANKS:
      print(f"| {k} | {r} | " + " | ".join(cell(found[n][k][r], k * r) for n in found) + " |")
  wider = {name: {n: simulate(name, 16, SEQUENCES * 16 // n, costs) for n in GPUS}
           for name in schedules.NAMES}
  print(f"\n2. The report's batch on 16 pipeline ranks: share of time idle / s a step\n\n"
        f"| GPUs | micro-batches | {head} |\n|{'---|' * (2 + len(found))}")
  for n in GPUS:
    cells = (f"{wider[name][n].idle / wider[name][n].makespan:.1%} / "
             f"{wider[name][n].makespan + OPTIMIZER:.2f}" for name in wider)
    print(f"| {n} | {SEQUENCES * 16 // n} | " + " | ".join(cells) + " |")
  if args.save or args.plot:
    from dsv3_jax.analysis import schedule_plot

    figure = draw(found, wider)
    for path in [common.RESULTS / "schedule_scaling.svg"] * args.save + [args.plot] * bool(
        args.plot):
      print(schedule_plot.write(figure, pathlib.Path(path)))
  if args.save:
    points = lambda by: {str(k): dataclasses.asdict(p) for k, p in by.items()}
    content = {"costs_s": costs, "hop_s": HOP, "line_error": error,
               "deeper": {n: {str(k): points(by) for k, by in ks.items()}
                          for n, ks in found.items()},
               "wider": {n: points(by) for n, by in wider.items()}}
    print(files.write_atomic(common.RESULTS / "schedule_scaling.json",
                             json.dumps(content, indent=1) + "\n"))


if __name__ == "__main__":
  main()
