"""Picture of placement policies over time, from plain numbers."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import ticker
from matplotlib.figure import Figure

from dsv3_jax.analysis import plots

COLOURS = {"none": plots.MUTED, "static": plots.PURPLE, "eplb": plots.ORANGE, "ours": plots.BLUE,
           "steady": plots.GREEN, "limited": plots.RED}
LEAST = 1e-3  # what is nearer to balance is drawn there


def draw(panels: Sequence[tuple[str, Mapping[str, np.ndarray]]], first: int, every: int) -> Figure:
  """Max / mean load over the steps: a panel for each cluster, a curve for each policy.

  The axis is logarithmic in what exceeds 1, so that policies near balance can be told apart.

  Args:
    panels: title of each, and the values of each policy, [S].
    first: the number of the first step drawn.
    every: steps between rebalancings, which a mark on the lower edge shows.
  """
  columns = min(2, len(panels))
  rows = -(-len(panels) // columns)
  figure = plots.new_figure(5.9 * columns, 2.7 * rows + 0.4)
  grid = figure.subplots(rows, columns, squeeze=False)
  for axes, (title, curves) in zip(grid.flat, panels, strict=False):
    plots.style(axes)
    for name, ratio_S in curves.items():
      step_S = first + np.arange(len(ratio_S))
      axes.plot(step_S, np.maximum(ratio_S - 1, LEAST), color=COLOURS[name], linewidth=1.4,
                label=name, marker="o" if len(ratio_S) == 1 else None, markersize=4,
                linestyle=(0, (4, 2)) if name in ("steady", "limited") else "-")
    axes.plot(step_S[::every], np.zeros(len(step_S[::every])), "|", color=plots.MUTED,
              markersize=7, transform=axes.get_xaxis_transform(), clip_on=False)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda excess, _: f"{1 + excess:g}"))
    axes.yaxis.set_minor_locator(ticker.NullLocator())
    axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
    axes.set_title(title, loc="left", fontsize=9.5, color=plots.TEXT)
    axes.set_ylabel("max / mean load", color=plots.TEXT)
    axes.set_xlabel("step", color=plots.TEXT)
  for axes in grid.flat[len(panels):]:
    axes.set_visible(False)
  handles, labels = grid.flat[0].get_legend_handles_labels()
  figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False,
                fontsize=9, labelcolor=plots.TEXT)
  return figure
