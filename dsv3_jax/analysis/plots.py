"""Figures of one run, as SVG text.

Each function takes a `Run` and returns a matplotlib `Figure`, or None where the run has nothing to
show yet. Figures are made without pyplot, so there is no global state and no display. Colours that
belong to the page (text, lines, background) are fixed values that `to_inline` swaps for CSS
variables: the same picture then follows the reader's light or dark scheme.
"""

import io
import re
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib import colormaps, ticker
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from dsv3_jax.analysis.workdir import Run

TEXT, MUTED, GRID, PAPER = "#1c2128", "#69707a", "#dde1e6", "#fefefe"
PAGE_COLOURS = {TEXT: "var(--text)", MUTED: "var(--muted)", GRID: "var(--grid)",
                PAPER: "var(--card)"}
BLUE, ORANGE, GREEN, RED, PURPLE = "#3a7bd5", "#e07a2f", "#2c9f6b", "#d64550", "#8b68c9"
SERIES = (BLUE, ORANGE, GREEN, PURPLE, RED)
WIDE = 12.0  # inches, of a figure that has a row of the page to itself
MAX_POINTS = 1500  # a curve; more cannot be told apart on a page, and only make the file heavy


def smooth(values_N: np.ndarray, window: int) -> np.ndarray:
  """Mean over `window` points around each, fewer at the ends; NaN is skipped. float64 [N].

  Centred, so that the curve does not lag behind a loss that falls fast.
  """
  finite_N = np.isfinite(values_N)
  sums = np.cumsum(np.append(0.0, np.where(finite_N, values_N, 0.0)))
  counts = np.cumsum(np.append(0, finite_N))
  index_N = np.arange(len(values_N))
  low_N = np.maximum(index_N - window // 2, 0)
  high_N = np.minimum(index_N + (window + 1) // 2, len(values_N))
  count_N = counts[high_N] - counts[low_N]
  return np.where(count_N > 0, (sums[high_N] - sums[low_N]) / np.maximum(count_N, 1), np.nan)


def smoothing_window(steps: int) -> int:
  """Points that a smoothed curve averages over: an eightieth of the run, at most 200."""
  return max(1, min(steps // 80, 200))


def column(rows: Sequence[dict[str, Any]], key: str) -> np.ndarray:
  """A metric over the rows as float64 [N]; NaN where it is absent or not a number."""
  values = (row.get(key) for row in rows)
  return np.array([v if isinstance(v, int | float) else np.nan for v in values], dtype=np.float64)


def matrix(rows: Sequence[dict[str, Any]], key: str) -> np.ndarray:
  """A list-valued metric as float64 [N, width]; width 0 where no row has it."""
  lists = [row.get(key) or [] for row in rows]
  width = max(map(len, lists), default=0)
  out = np.full((len(lists), width), np.nan)
  for i, values in enumerate(lists):
    out[i, :len(values)] = values
  return out


def layer_names(run: Run, rows: int) -> list[str]:
  """Names of the rows of max_vio_L and load_LE: MoE layers by their number, then MTP modules."""
  model = run.config.get("model", {})
  depth = min(int(model.get("mtp_depth", 0)), rows)
  first = int(model.get("dense_layers", 0))
  return [*(f"layer {first + i}" for i in range(rows - depth)),
          *(f"MTP {i + 1}" for i in range(depth))]


# --- figures ------------------------------------------------------------------------------------


def loss(run: Run) -> Figure | None:
  """Training loss raw and smoothed, and validation loss, over tokens."""
  if not run.train:
    return None
  figure, axes = new_axes("tokens", "cross-entropy (nats per token)", WIDE)
  _curve(axes, run.train, column(run.train, "loss"), BLUE, "training")
  evals = column(run.evals, "loss")
  if np.isfinite(evals).any():
    axes.plot(column(run.evals, "tokens"), evals, color=ORANGE, marker="o", markersize=4.5,
              linewidth=1.4, label="validation")
  return finish(axes)


def mtp_loss(run: Run) -> Figure | None:
  """Loss of each multi-token prediction depth, training and validation."""
  train, evals = matrix(run.train, "mtp_loss"), matrix(run.evals, "mtp_loss")
  if not train.size:
    return None
  figure, axes = new_axes("tokens", "cross-entropy (nats per token)")
  for depth in range(train.shape[1]):
    colour = SERIES[(depth + 3) % len(SERIES)]
    _curve(axes, run.train, train[:, depth], colour, f"depth {depth + 1}, training")
    if depth < evals.shape[1]:
      axes.plot(column(run.evals, "tokens"), evals[:, depth], color=colour, marker="o",
                markersize=4.5, linewidth=0, label=f"depth {depth + 1}, validation")
  return finish(axes)


def schedules(run: Run) -> Figure | None:
  """Learning rate, batch size, bias speed and MTP weight, one small panel each."""
  panels = [("lr", "learning rate"), ("batch_size", "batch (sequences)"),
            ("bias_speed", "bias speed γ"), ("mtp_weight", "MTP weight λ")]
  panels = [(k, name) for k, name in panels if np.isfinite(column(run.train, k)).any()]
  if not panels:
    return None
  figure = new_figure()
  rows = (len(panels) + 1) // 2
  grid = np.atleast_2d(figure.subplots(rows, min(len(panels), 2), sharex=True, squeeze=False))
  for axes, (key, name) in zip(grid.flat, panels, strict=False):
    style(axes)
    values = column(run.train, key)
    axes.plot(*_thin(column(run.train, "tokens"), values), color=BLUE, linewidth=1.6)
    axes.set_ylim(0, max(np.nanmax(values) * 1.12, 1e-12))
    axes.set_title(name, loc="left", fontsize=9.5, color=TEXT)
    if key in ("lr", "bias_speed"):
      axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3), useMathText=True)
      axes.yaxis.get_offset_text().set(color=MUTED, fontsize=8)
      axes.yaxis.get_offset_text().set_horizontalalignment("right")
  for axes in grid.flat[len(panels):]:
    axes.set_visible(False)
  for axes in grid[-1]:
    axes.set_xlabel("tokens", color=TEXT)
    axes.xaxis.set_major_formatter(tokens_formatter())
  return figure


def gradient_norm(run: Run) -> Figure | None:
  """Global gradient norm before clipping, on a logarithmic axis, with the clipping threshold."""
  values = column(run.train, "grad_norm")
  values = np.where(values > 0, values, np.nan)  # 0 and NaN (skipped steps) have no logarithm
  if not np.isfinite(values).any():
    return None
  figure, axes = new_axes("tokens", "global gradient norm")
  axes.set_yscale("log")
  _curve(axes, run.train, values, GREEN, "before clipping")
  clip = run.config.get("optim", {}).get("clip_norm", 0)
  if clip:
    axes.axhline(clip, color=RED, linewidth=1.2, linestyle=(0, (4, 3)),
                 label=f"clipped at {clip:g}")
  axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
  axes.yaxis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
  axes.yaxis.set_minor_formatter(ticker.NullFormatter())
  return finish(axes)


def throughput(run: Run) -> Figure | None:
  """Tokens per second of each step, with the run's median."""
  values = timing(run, "tokens_per_s")
  if not np.isfinite(values).any():
    return None
  figure, axes = new_axes("tokens", "tokens per second")
  _curve(axes, run.train, values, PURPLE, "a step")
  median = float(np.nanmedian(values))
  axes.axhline(median, color=MUTED, linewidth=1.2, linestyle=(0, (4, 3)),
               label=f"median {median:,.0f}")
  # One slow or instant step (a compilation, a resume) would flatten all the others.
  axes.set_ylim(0, min(float(np.nanmax(values)), 2 * median) * 1.1)
  axes.yaxis.set_major_formatter(ticker.StrMethodFormatter("{x:,.0f}"))
  return finish(axes)


def max_violation(run: Run) -> Figure | None:
  """MaxVio of each MoE layer over the run: the busiest expert's load above the mean, relative."""
  values = matrix(run.train, "max_vio_L")
  if not values.size:
    return None
  figure, axes = new_axes("tokens", "MaxVio (max load / mean load − 1)")
  names = layer_names(run, values.shape[1])
  window = smoothing_window(len(run.train))
  few = len(names) <= len(SERIES)
  colours = SERIES if few else colormaps["viridis"](np.linspace(0.05, 0.9, len(names)))
  tokens = column(run.train, "tokens")
  for i, name in enumerate(names):
    axes.plot(*_thin(tokens, smooth(values[:, i], window)), color=colours[i], linewidth=1.5,
              label=name if few or i in (0, len(names) - 1) else None)
  top = np.nanmax(values) if np.isfinite(values).any() else 1
  axes.set_ylim(0, max(top * 1.05, 0.1))
  return finish(axes)


def expert_load(run: Run) -> Figure | None:
  """Heat map of the last measured relative expert load: one row a layer, 1 is balanced."""
  load = [row for row in run.loads if row.get("load_LE")]
  if not load:
    return None
  load_LE = np.array(load[-1]["load_LE"], dtype=np.float64)
  layers, experts = load_LE.shape
  figure = new_figure(WIDE, min(1.2 + 0.34 * layers, 9))
  axes = figure.subplots()
  style(axes, grid=False)
  image = axes.pcolormesh(load_LE, cmap="RdBu_r", vmin=0, vmax=2,
                          rasterized=layers * experts > 4000,
                          edgecolors=PAPER if experts <= 64 else "none", linewidth=0.6)
  axes.invert_yaxis()
  step = max(1, -(-layers // 24))
  rows = range(0, layers, step)
  names = layer_names(run, layers)
  axes.set_yticks([i + 0.5 for i in rows], [names[i] for i in rows])
  step = next(s for s in (1, 2, 4, 8, 16, 32, 64, 128) if experts / s <= 20 or s == 128)
  axes.set_xticks([i + 0.5 for i in range(0, experts, step)], range(0, experts, step))
  axes.tick_params(length=0)
  axes.set_xlabel("routed expert", color=TEXT)
  if experts <= 32 and layers <= 16:
    for i, j in np.ndindex(layers, experts):
      axes.text(j + 0.5, i + 0.5, f"{load_LE[i, j]:.2f}", ha="center", va="center",
                fontsize=7 if experts > 16 else 9,
                color="#ffffff" if abs(load_LE[i, j] - 1) > 0.6 else "#222222")
  bar = figure.colorbar(image, ax=axes, extend="max", pad=0.02, fraction=0.04, aspect=14)
  bar.set_label("load / mean load", color=TEXT)
  bar.ax.tick_params(colors=MUTED, labelsize=8.5)
  bar.outline.set_visible(False)
  return figure


def compression(run: Run) -> Figure | None:
  """Validation bits per byte of the model beside the baselines', as bars; shorter is better."""
  rows = bits_per_byte(run)
  if len(rows) < 2:
    return None
  figure = new_figure(height=0.7 + 0.3 * len(rows))
  axes = figure.subplots()
  style(axes)
  axes.grid(axis="y", visible=False)
  names, values = zip(*rows, strict=True)
  bars = axes.barh(names, values, color=[BLUE] + [MUTED] * (len(rows) - 1), height=0.62)
  axes.bar_label(bars, fmt="%.3f", padding=4, color=TEXT, fontsize=9.5)
  axes.set_xlim(0, max(values) * 1.15)
  axes.invert_yaxis()
  axes.tick_params(axis="y", length=0, labelcolor=TEXT)
  axes.set_xlabel("bits per byte of the validation text", color=TEXT)
  return figure


# --- numbers shared with the tables -------------------------------------------------------------


def timing(run: Run, key: str) -> np.ndarray:
  """A wall-clock metric over the training rows, float64 [N]."""
  return column([row.get("time") or {} for row in run.train], key)


def bits_per_byte(run: Run) -> list[tuple[str, float]]:
  """(name, bits per byte) of the model and of each baseline that was measured, the model first."""
  measured = [row["bits_per_byte"] for row in run.evals
              if isinstance(row.get("bits_per_byte"), int | float)]
  baselines = run.summary.get("baselines") or {}
  rows = [("this model", float(measured[-1]))] if measured else []
  return rows + [(name, float(value)) for name, value in baselines.items()
                 if isinstance(value, int | float)]


# --- SVG ----------------------------------------------------------------------------------------


def to_svg(figure: Figure) -> str:
  """The figure as an SVG document; equal figures give equal text."""
  buffer = io.StringIO()
  settings = {"svg.hashsalt": "dsv3", "svg.fonttype": "none"}
  with matplotlib.rc_context(settings):
    FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None})
  return buffer.getvalue()


def to_inline(svg: str, label: str, prefix: str) -> str:
  """An SVG document as an element of a page: no prologue, page colours, ids of its own.

  Args:
    svg: what `to_svg` gave.
    label: what the picture shows, for readers who cannot see it; plain text without quotes.
    prefix: unique on the page, so that one picture's clip paths are not another's.
  """
  svg = svg[svg.index("<svg"):]
  svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
  svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}-", svg)
  for colour, variable in PAGE_COLOURS.items():
    svg = svg.replace(colour, variable)
  svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
  svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
  return svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)


# --- drawing ------------------------------------------------------------------------------------


def new_figure(width: float = 6.8, height: float = 3.3) -> Figure:
  return Figure(figsize=(width, height), layout="constrained", facecolor=PAPER)


def new_axes(x_label: str, y_label: str, width: float = 6.8) -> tuple[Figure, Axes]:
  figure = new_figure(width)
  axes = figure.subplots()
  style(axes)
  axes.set_xlabel(x_label, color=TEXT)
  axes.set_ylabel(y_label, color=TEXT)
  axes.xaxis.set_major_formatter(tokens_formatter())
  return figure, axes


def style(axes: Axes, grid: bool = True) -> None:
  axes.set_facecolor("none")
  for side, spine in axes.spines.items():
    spine.set_visible(grid and side in ("left", "bottom"))
    spine.set_color(GRID)
  if grid:
    axes.grid(color=GRID, linewidth=0.8)
  axes.set_axisbelow(True)
  axes.tick_params(colors=MUTED, labelsize=9, which="both")
  axes.margins(x=0.02)


def finish(axes: Axes) -> Figure:
  legend = axes.legend(frameon=False, fontsize=9, labelcolor=TEXT)
  legend.set_zorder(5)
  return axes.figure


def _curve(axes: Axes, rows: Sequence[dict[str, Any]], values_N: np.ndarray, colour: str,
           label: str) -> None:
  """Raw values faint, and their moving average over them."""
  tokens = column(rows, "tokens")
  window = smoothing_window(len(rows))
  if window > 1:
    axes.plot(*_thin(tokens, values_N), color=colour, linewidth=0.8, alpha=0.3)
    axes.plot(*_thin(tokens, smooth(values_N, window)), color=colour, linewidth=1.8,
              label=f"{label} (mean of {window} steps)")
  else:
    axes.plot(tokens, values_N, color=colour, linewidth=1.6, label=label,
              marker="o" if len(rows) == 1 else None, markersize=4)


def _thin(x_N: np.ndarray, y_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """At most about MAX_POINTS points, evenly chosen, the last one among them."""
  stride = -(-len(x_N) // MAX_POINTS) if len(x_N) > MAX_POINTS else 1
  keep = np.unique(np.append(np.arange(0, len(x_N), stride), len(x_N) - 1))
  return x_N[keep], y_N[keep]


def tokens_formatter() -> ticker.Formatter:
  suffixes = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K"))

  def text(value: float, _: Any) -> str:
    for size, suffix in suffixes:
      if abs(value) >= size:
        return f"{value / size:g}{suffix}"
    return f"{value:g}"

  return ticker.FuncFormatter(text)
