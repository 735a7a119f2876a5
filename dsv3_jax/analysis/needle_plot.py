"""Heat maps of needles in haystacks, from plain numbers."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dsv3_jax import files
from dsv3_jax.analysis import plots

DPI = 160
_MAPS = (("recall", "value written (recall)", "viridis", "{:.0%}"),
         ("bits", "bits of the value", "viridis_r", "{:.1f}"))


def draw(models: Sequence[tuple[str, Mapping[str, Any]]], trained: int = 0,
         how: str = "trained to see") -> Figure:
  """Recall and bits over length (to the right) and depth (down): a row of two maps a model.

  Args:
    models: name of each and what `evals.needle.summary` gave; all of the same lengths and depths.
    trained: tokens that the models were trained to see: a dashed line after them; 0: none.
    how: what is said of these tokens.
  """
  lengths, depths = models[0][1]["lengths"], models[0][1]["depths"]
  wide = 1.9 + 0.62 * len(lengths)
  figure = plots.new_figure(max(2 * wide, 7.5), 0.5 + len(models) * (1.3 + 0.34 * len(depths)))
  grid = figure.subplots(len(models), 2, squeeze=False)
  most = max(np.max(values["grid"]["bits"]) for _, values in models)
  for (name, values), row in zip(models, grid, strict=True):
    for axes, (key, title, colours, form) in zip(row, _MAPS, strict=True):
      top = 1.0 if key == "recall" else max(most, 1e-6)
      _map(axes, np.array(values["grid"][key]).T, top, colours, form)
      _label(axes, lengths, depths, trained, how)
      axes.set_title(f"{name}: {title}" if name else title, loc="left", fontsize=9.5,
                     color=plots.TEXT)
  return figure


def write(figure: Figure, path: str | Path) -> Path:
  """Writes the picture as PNG."""
  buffer = io.BytesIO()
  figure.savefig(buffer, format="png", dpi=DPI)
  return files.write_atomic(path, buffer.getvalue())


def _map(axes: Axes, values_YX: np.ndarray, top: float, colours: str, form: str) -> None:
  plots.style(axes, grid=False)
  image = axes.pcolormesh(values_YX, cmap=colours, vmin=0, vmax=top, edgecolors=plots.PAPER,
                          linewidth=0.6)
  axes.invert_yaxis()
  for (y, x), value in np.ndenumerate(values_YX):
    red, green, blue, _ = image.cmap(image.norm(value))
    light = 0.3 * red + 0.59 * green + 0.11 * blue > 0.5
    axes.text(x + 0.5, y + 0.5, form.format(value), ha="center", va="center", fontsize=8,
              color="#222222" if light else "#ffffff")
  bar = axes.figure.colorbar(image, ax=axes, pad=0.02, fraction=0.05, aspect=18)
  if form.endswith("%}"):
    bar.ax.yaxis.set_major_formatter(ticker.PercentFormatter(1.0))
  bar.ax.tick_params(colors=plots.MUTED, labelsize=8)
  bar.outline.set_visible(False)


def _label(axes: Axes, lengths: Sequence[int], depths: Sequence[float], trained: int,
           how: str) -> None:
  axes.set_xticks(np.arange(len(lengths)) + 0.5, [f"{n:,}" for n in lengths],
                  rotation=30 if len(lengths) > 6 else 0)
  axes.set_yticks(np.arange(len(depths)) + 0.5, [f"{100 * d:.3g} %" for d in depths])
  axes.tick_params(length=0)
  axes.set_ylabel("depth of the needle", color=plots.TEXT)
  within, words = sum(n <= trained for n in lengths), "tokens"
  if 0 < within < len(lengths):
    words = f"tokens ({how} {trained:,}: dashed)"
    axes.axvline(within, color=plots.TEXT, linewidth=1.4, linestyle=(0, (4, 2)))
  axes.set_xlabel(words, color=plots.TEXT)
