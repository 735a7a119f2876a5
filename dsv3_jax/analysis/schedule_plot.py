"""Pictures of pipeline schedules, in the manner of the report's figure 5, from plain numbers."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from dsv3_jax import files
from dsv3_jax.analysis import plots

SUFFIXES = (".svg", ".png", ".pdf")
NAMES = {"F": "forward", "B": "backward", "I": "backward for the input",
         "W": "backward for the weights"}
# One direction (or the way down of a V), and the other: the same hue, deeper.
COLOURS = {"F": ("#f7c873", "#dd9433"), "B": ("#a9cdf0", "#5b93cf"), "I": ("#bfe3d5", "#6bb79a"),
           "W": ("#d9d4ea", "#a79ccb")}
INCHES = (20.0, 16.0)  # largest picture
CELL = 0.21  # inches of the shortest op, and of half a row, where there is room
LABEL = 0.10  # inches that a digit's cell needs at least


class Bar(NamedTuple):
  """An op of a rank.

  Attributes:
    start, end: times.
    parts: (kind, micro-batch, direction) of what is done: one, or the two of an overlapped pair;
      kind is a key of NAMES, direction 0 or 1.
  """

  start: float
  end: float
  parts: tuple[tuple[str, int, int], ...]


def bars(plan: Any, found: Any) -> list[list[Bar]]:
  """The rows of `draw`, from a `parallel.schedules.Schedule` and its `Simulation`."""
  rows = []
  for order, starts, ends in zip(plan.orders, found.starts, found.ends, strict=True):
    rows.append([])
    for op, start, end in zip(order, starts, ends, strict=True):
      # The way back of a V counts as the other direction.
      parts = [(kind, unit.microbatch, max(unit.direction, unit.chunk)) for kind, unit in (
          ("F", op.forward), ("B" if op.kind == "FB" else op.kind, op.backward)) if unit]
      rows[-1].append(Bar(start, end, tuple(parts)))
  return rows


def draw(ranks: Sequence[Sequence[Bar]], title: str) -> Figure:
  """One row a rank, time to the right, white where a rank idles; numbers are micro-batches.

  An overlapped pair's forward lies above its backward. Where cells get too small the numbers are
  left out.
  """
  makespan = max(bar.end for bars in ranks for bar in bars)
  shortest = min((bar.end - bar.start for bars in ranks for bar in bars if bar.end > bar.start),
                 default=1.0)
  width = min(max(6.8, CELL * makespan / shortest + 0.8), INCHES[0])
  height = min(max(2.0, 2 * CELL * len(ranks) + 1.3), INCHES[1])
  figure = plots.new_figure(width, height)
  axes = figure.subplots()
  plots.style(axes, grid=False)
  inch = (width - 0.8) / max(makespan, 1e-30)  # per unit of time
  row = (height - 1.3) / len(ranks)
  digits = len(str(max(part[1] for bars in ranks for bar in bars for part in bar.parts)))
  cells: dict[tuple[str, int], list[list[tuple[float, float]]]] = {}
  for rank, bars in enumerate(ranks):
    for bar in bars:
      for i, (kind, microbatch, direction) in enumerate(bar.parts):
        low, high = rank + i / len(bar.parts), rank + (i + 1) / len(bar.parts)
        cells.setdefault((kind, direction), []).append(
            [(bar.start, low), (bar.end, low), (bar.end, high), (bar.start, high)])
        room = min((bar.end - bar.start) * inch / digits, row / len(bar.parts))
        if room >= LABEL:
          axes.text((bar.start + bar.end) / 2, (low + high) / 2, str(microbatch), ha="center",
                    va="center_baseline", fontsize=min(72 * room * 0.85, 8), color=plots.TEXT)
  edge = 0.5 if row > LABEL else 0.0
  for (kind, direction), corners in sorted(cells.items()):
    axes.add_collection(PolyCollection(corners, facecolor=COLOURS[kind][direction],
                                       edgecolor=plots.PAPER, linewidth=edge))
  # A frame tells a pair from two ops after one another.
  pairs = [[(b.start, rank), (b.end, rank), (b.end, rank + 1), (b.start, rank + 1)]
           for rank, bars in enumerate(ranks) for b in bars if len(b.parts) > 1]
  if pairs and edge:
    axes.add_collection(PolyCollection(pairs, facecolor="none", edgecolor=plots.TEXT,
                                       linewidth=edge))
  axes.set_xlim(0, makespan or 1)
  axes.set_ylim(len(ranks), 0)
  step = max(1, round(0.15 / row))
  axes.set_yticks([r + 0.5 for r in range(0, len(ranks), step)],
                  [f"{r}" for r in range(0, len(ranks), step)])
  axes.tick_params(length=0)
  axes.set_ylabel("rank", color=plots.TEXT)
  axes.set_xlabel("time", color=plots.TEXT)
  axes.set_title(title, loc="left", fontsize=9.5, color=plots.TEXT)
  both = len({direction for _, direction in cells}) > 1
  figure.legend(handles=[
      Patch(facecolor=COLOURS[kind][direction],
            label=name + (("", ", other direction")[direction] if both else ""))
      for kind, name in NAMES.items() for direction in (0, 1) if (kind, direction) in cells],
      loc="outside lower center", ncols=4 if width > 8 else 2, frameon=False, fontsize=8,
      labelcolor=plots.TEXT)
  return figure


def write(figure: Figure, path: str | Path) -> Path:
  """Saves as the file's suffix says: one of SUFFIXES.

  Raises:
    ValueError: another suffix.
    OSError: the folder does not exist or cannot be written to.
  """
  path = Path(path)
  check_suffix(path)
  if path.suffix == ".svg":
    return files.write_atomic(path, plots.to_svg(figure))
  buffer = io.BytesIO()
  figure.savefig(buffer, format=path.suffix[1:], dpi=150)
  return files.write_atomic(path, buffer.getvalue())


def check_suffix(path: str | Path) -> None:
  """Raises ValueError where `write` would."""
  if Path(path).suffix not in SUFFIXES:
    raise ValueError(f"{path}: a picture's file ends in {', '.join(SUFFIXES)}")
