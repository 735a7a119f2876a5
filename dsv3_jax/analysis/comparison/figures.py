"""Figures of a comparison.

An arm has one colour and line in all of them: the baseline the colour of the text, the others hues
that colour-blind readers tell apart too (Okabe and Ito's), solid and then dashed. Names stand
beside the axes and never on data. Text can be read where a figure is as wide as a paper's column.
"""

import math
import textwrap

import numpy as np
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from dsv3_jax.analysis import plots
from dsv3_jax.analysis.comparison import curves as curves_lib
from dsv3_jax.analysis.comparison.arms import METRICS
from dsv3_jax.analysis.comparison.compare import Comparison
from dsv3_jax.analysis.comparison.curves import Curve

COLUMN, WIDE = 4.4, 8.8  # inches: of a figure beside another, and of one alone in its row
_LABEL, _TICK = 8.5, 8  # points
_HUES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_LINES = ("-", (0, (4, 1.6)), (0, (1.2, 1.2)), (0, (6, 1.5, 1.2, 1.5)))
_SKIPPED = 0.25  # share of the tokens whose losses, high in all arms, do not scale the axis
_BANDS = (0.16, 0.07)  # opacity where there are few arms, and many


def styles(c: Comparison) -> dict[str, tuple[str, object]]:
  """Arm -> (colour, line style)."""
  others = [arm.name for arm in c.arms if arm.name != c.baseline]
  found: dict[str, tuple[str, object]] = {c.baseline: (plots.TEXT, "-")}
  for i, name in enumerate(others):
    found[name] = (_HUES[i % len(_HUES)], _LINES[i // len(_HUES) % len(_LINES)])
  return found


# --- figures ------------------------------------------------------------------------------------


def forest(c: Comparison) -> Figure | None:
  """Difference of each arm to the baseline with its interval; small rings are single seeds."""
  found = {name: d for name, d in c.differences.items() if d.mean is not None}
  if not found:
    return None
  names = sorted(found, key=lambda name: found[name].mean)
  labels = [wrap(name, 18) for name in names]
  lines = sum(max(label.count("\n") + 1, 1.6) for label in labels)
  figure = plots.new_figure(COLUMN, max(1.9, 0.75 + 0.17 * lines))
  axes = figure.subplots()
  _style(axes)
  axes.grid(axis="y", visible=False)
  axes.axvline(0, color=plots.TEXT, linewidth=1.2)
  look = styles(c)
  for y, name in enumerate(names):
    d, colour = found[name], look[name][0]
    axes.plot(d.values, [y] * len(d.values), "o", markersize=4, markerfacecolor="none",
              markeredgecolor=colour, markeredgewidth=0.9, alpha=0.75)
    if d.low is not None:
      axes.plot([d.low, d.high], [y, y], color=colour, linewidth=2, solid_capstyle="butt")
    axes.plot(d.mean, y, "D", markersize=5.5, color=colour)
  axes.set_yticks(range(len(names)), labels)
  axes.set_ylim(len(names) - 0.4, -0.6)
  axes.tick_params(axis="y", length=0, labelcolor=plots.TEXT)
  axes.xaxis.set_major_locator(ticker.MaxNLocator(4))
  _labels(axes, wrap(f"{METRICS[c.metric].short}, less {_cut(c.baseline)}'s", 44), "")
  return figure


def loss(c: Comparison) -> Figure | None:
  """Smoothed training loss over tokens."""
  return _over_tokens(c, {arm.name: curves_lib.curve(arm, "loss") for arm in c.shown},
                      "training loss (nats per token)")


def loss_difference(c: Comparison) -> Figure | None:
  """Smoothed training loss less the baseline's, seed by seed, over tokens."""
  base = c.arm(c.baseline)
  curves = {arm.name: curves_lib.difference(arm, base) for arm in c.shown if arm != base}
  return _over_tokens(c, curves, wrap(f"training loss, less {_cut(c.baseline)}'s", 34), zero=True)


def validation(c: Comparison) -> Figure | None:
  """Validation loss at each evaluation, or bits per byte where losses cannot be compared."""
  key = "bits_per_byte" if c.metric == "bits_per_byte" else "loss"
  return _over_tokens(c, {arm.name: curves_lib.evaluations(arm, key) for arm in c.shown},
                      "validation, bits per byte" if key == "bits_per_byte" else METRICS[key].wide,
                      marker="o")


def compute(c: Comparison) -> Figure | None:
  """Smoothed training loss over the FLOPs spent."""
  per_token = {arm.name: arm.first["flops_per_token"] for arm in c.shown}
  curves = {arm.name: curves_lib.curve(arm, "loss") for arm in c.shown if per_token[arm.name]}
  curves = {name: (x[0] * per_token[name], *x[1:]) for name, x in curves.items() if x is not None}
  return _against(c, curves, "training compute", (
      (1e21, "ZFLOP"), (1e18, "EFLOP"), (1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP")))


def wall_time(c: Comparison) -> Figure | None:
  """Smoothed training loss over wall-clock time, means over the seeds."""
  curves = {}
  for arm in c.shown:
    found, seconds = curves_lib.curve(arm, "loss"), curves_lib.curve(arm, "seconds")
    if found is not None and seconds is not None:
      curves[arm.name] = (np.interp(found[0], *seconds[:2]), *found[1:])
  return _against(c, curves, "wall-clock time", ((7200, "h"), (120, "min"), (0, "s")),
                  {"h": 3600, "min": 60, "s": 1})


def max_violation(c: Comparison) -> Figure | None:
  """Smoothed MaxVio of the worst layer over tokens."""
  figure = _over_tokens(c, {arm.name: curves_lib.curve(arm, "max_vio") for arm in c.shown},
                        "MaxVio (max load / mean load − 1)")
  if figure is not None:
    figure.axes[0].autoscale(axis="y")
    figure.axes[0].set_ylim(bottom=0)
  return figure


def expert_load(c: Comparison) -> Figure | None:
  """Relative load of each layer's experts, one heat map an arm on one scale, as in figure 9."""
  found = [(arm, arm.first) for arm in c.shown if arm.first["load_LE"]]
  if not found:
    return None
  columns = min(3 if len(found) > 4 else 2, len(found))
  rows = -(-len(found) // columns)
  loads = [np.array(record["load_LE"], np.float64) for _, record in found]
  layers = max(load.shape[0] for load in loads)
  top = min(10, max(2, math.ceil(max(float(np.nanmax(load)) for load in loads))))
  titles = [wrap(arm.name, 66 // columns) for arm, _ in found]
  height = rows * (min(0.5 + 0.19 * layers, 3.4) + 0.16 * max(t.count("\n") + 1 for t in titles))
  figure = plots.new_figure(WIDE, min(height + 0.5, 14))
  grid = figure.subplots(rows, columns, squeeze=False)
  for axes, load_LE, title, (_, record) in zip(grid.flat, loads, titles, found, strict=False):
    _style(axes, grid=False)
    experts = load_LE.shape[1]
    image = axes.pcolormesh(load_LE, cmap="Blues", vmin=0, vmax=top, rasterized=load_LE.size > 2000,
                            edgecolors=plots.PAPER if experts <= 64 else "none", linewidth=0.5)
    axes.invert_yaxis()
    step = max(1, -(-load_LE.shape[0] // 12))
    ticks = range(0, load_LE.shape[0], step)
    axes.set_yticks([i + 0.5 for i in ticks], [record["rows"][i] for i in ticks])
    axes.xaxis.set_major_locator(ticker.MaxNLocator(6, integer=True))
    axes.tick_params(length=0)
    axes.set_title(title, loc="left", fontsize=_LABEL, color=plots.TEXT)
  for axes in grid.flat[len(found):]:
    axes.set_visible(False)
  for axes in grid.flat[max(len(found) - columns, 0):len(found)]:
    axes.set_xlabel("routed expert", color=plots.TEXT, fontsize=_LABEL)
  bar = figure.colorbar(image, ax=grid, extend="max" if any(
      float(np.nanmax(load)) > top for load in loads) else "neither", fraction=0.03, pad=0.02,
      aspect=12 * rows)
  bar.set_label("load / mean load", color=plots.TEXT, fontsize=_LABEL)
  bar.ax.tick_params(colors=plots.MUTED, labelsize=_TICK)
  bar.outline.set_visible(False)
  return figure


# --- drawing ------------------------------------------------------------------------------------


def wrap(name: str, width: int, lines: int = 3) -> str:
  """A name on at most `lines` lines, as matplotlib shows it as it is written; a middle that does
  not fit is left out."""
  most = width * lines - lines
  if len(name) > most:
    name = f"{name[:2 * most // 3]} … {name[-(most // 3 - 3):]}"
  # Between two dollars matplotlib would read a formula.
  return "\n".join(textwrap.wrap(name, width) or [name]).replace("$", r"\$")


def _cut(name: str) -> str:
  return name if len(name) <= 30 else name[:29] + "…"


def _figure(c: Comparison, names: list[str]) -> Figure:
  """With the arms' names above."""
  look = styles(c)
  names = names if len(c.shown) > 1 else []
  longest = max(map(len, names), default=0)
  columns = 1 if longest > 50 else 2 if longest > 14 else 3
  labels = [wrap(name, 62 // columns - 4, 2) for name in names]
  lines = sum(max(label.count("\n") + 1 for label in labels[i:i + columns])
              for i in range(0, len(labels), columns))
  figure = plots.new_figure(COLUMN, 2.6 + 0.16 * lines)
  if names:
    handles = [Line2D([], [], color=look[name][0], linestyle=look[name][1], linewidth=1.8)
               for name in names]
    # A legend is filled column by column, and read by rows.
    order = [i for column in range(columns) for i in range(column, len(names), columns)]
    figure.legend([handles[i] for i in order], [labels[i] for i in order], ncols=columns,
                  loc="outside upper left", frameon=False, fontsize=_TICK, labelcolor=plots.TEXT,
                  handlelength=2.0, labelspacing=0.4, borderaxespad=0.1)
  return figure


def _style(axes: Axes, grid: bool = True) -> None:
  plots.style(axes, grid)
  axes.tick_params(labelsize=_TICK, which="both")


def _draw(c: Comparison, curves: dict[str, Curve], marker: str | None = None) -> Axes:
  """A figure's axes with a line and a band for each arm."""
  axes = _figure(c, list(curves)).subplots()
  _style(axes)
  look = styles(c)
  for name, (x_N, mean_N, deviation_N) in curves.items():
    colour, line = look[name]
    if deviation_N is not None:
      axes.fill_between(x_N, mean_N - deviation_N, mean_N + deviation_N, color=colour,
                        alpha=_BANDS[len(curves) > 5], linewidth=0)
    axes.plot(x_N, mean_N, color=colour, linestyle=line, linewidth=1.5, marker=marker,
              markersize=3.5, zorder=3 if name == c.baseline else 2.5)
  axes.xaxis.set_major_locator(ticker.MaxNLocator(5))
  return axes


def _labels(axes: Axes, x: str, y: str) -> None:
  axes.set_xlabel(x, color=plots.TEXT, fontsize=_LABEL)
  axes.set_ylabel(y, color=plots.TEXT, fontsize=_LABEL)


def _over_tokens(c: Comparison, curves: dict[str, Curve | None], y: str, zero: bool = False,
                 marker: str | None = None) -> Figure | None:
  """None where no arm has the curve; with `zero` a line for the baseline."""
  found = {name: x for name, x in curves.items() if x is not None}
  if not found:
    return None
  axes = _draw(c, found, marker)
  if zero:
    axes.axhline(0, color=plots.TEXT, linewidth=1.2)
  axes.xaxis.set_major_formatter(plots.tokens_formatter())
  _labels(axes, "tokens", y)
  _limit(axes, found, zero)
  return axes.figure


def _limit(axes: Axes, curves: dict[str, Curve], zero: bool = False) -> None:
  """Scales the axis by what comes after the first fall of the loss."""
  parts = []
  for x_N, mean_N, deviation_N in curves.values():
    late_N = x_N >= x_N[0] + _SKIPPED * (x_N[-1] - x_N[0])
    late_N |= late_N.sum() < 3
    spread_N = 0 if deviation_N is None else np.nan_to_num(deviation_N)
    parts += [(mean_N - spread_N)[late_N], (mean_N + spread_N)[late_N]]
  values = np.concatenate(parts) if parts else np.zeros(0)
  values = values[np.isfinite(values)]
  if values.size:
    low, high = float(values.min()), float(values.max())
    low, high = (min(low, 0), max(high, 0)) if zero else (low, high)
    room = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    axes.set_ylim(low - room, high + room)


def _against(c: Comparison, curves: dict[str, Curve], what: str,
             units: tuple[tuple[float, str], ...], sizes: dict[str, float] | None = None
             ) -> Figure | None:
  """Training loss over something else than tokens, in the unit that fits its range."""
  if not curves:
    return None
  most = max(float(x[0][-1]) for x in curves.values())
  least, unit = next((u for u in units if most >= u[0]), units[-1])
  size = sizes[unit] if sizes else least
  curves = {name: (x[0] / size, *x[1:]) for name, x in curves.items()}
  axes = _draw(c, curves)
  _labels(axes, f"{what} ({unit})", "training loss (nats per token)")
  _limit(axes, curves)
  axes.set_xlim(left=0)
  return axes.figure
