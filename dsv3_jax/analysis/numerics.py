"""Tables and figures of FP8 numerics, from the JSON values of `train.numerics.measure`."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import ticker
from matplotlib.figure import Figure

from dsv3_jax import files
from dsv3_jax.analysis import plots
from dsv3_jax.analysis.workdir import Run

NAME = "numerics"
OPERANDS, GEMMS = ("x", "w", "dy"), ("fprop", "dgrad", "wgrad")
HEAD = ("operator", "recipe", "largest x", "w", "dy", "lost % x", "w", "dy", "cut % x", "w", "dy",
        "error % fprop", "dgrad", "wgrad")
WIDTH = 160  # characters that a table of `rows` takes
NOTE = ("largest: magnitude of the operand. lost: nonzero values that became zero. cut: values "
        "beyond the largest code. error: of one matmul against fp32, Frobenius norms.")


def rows(measured: dict[str, Any]) -> list[tuple[str, ...]]:
  """The cells under `HEAD`: a row for each operator and recipe."""
  found = []
  for operator in measured["operators"]:
    largest = [f"{operator['amax'][k]['largest']:.2g}" for k in OPERANDS]
    for i, (recipe, stats) in enumerate(operator["recipes"].items()):
      first = [operator["name"], recipe, *largest] if i == 0 else ["", recipe, "", "", ""]
      found.append((*first, *(_percent(stats[part][k]) for part, keys in (
          ("underflow", OPERANDS), ("saturation", OPERANDS), ("error", GEMMS)) for k in keys)))
  return found


def summary(measured: dict[str, Any]) -> list[tuple[str, ...]]:
  """(recipe, what, mean, worst, operator of the worst) over the operators."""
  found = []
  for recipe in measured["recipes"]:
    for part, keys in (("error", GEMMS), ("underflow", OPERANDS), ("saturation", OPERANDS)):
      for key in keys:
        values = [o["recipes"][recipe][part][key] for o in measured["operators"]]
        worst = int(np.argmax(np.nan_to_num(values)))
        found.append((recipe, f"{part} {key}", _percent(float(np.mean(values))),
                      _percent(values[worst]),
                      measured["operators"][worst]["name"] if values[worst] else "-"))
  return found


def markdown(measured: dict[str, Any], title: str) -> str:
  """Everything as Markdown tables."""
  table = lambda head, body: [_row(head), _row(["---"] * len(head)), *map(_row, body)]
  return "\n".join([
      f"# FP8 numerics: {title}", "", f"![errors]({NAME}_errors.svg)", "",
      f"![distributions]({NAME}_amax.svg)", "", "In per cent, over the operators.", "",
      *table(("recipe", "what", "mean", "worst", "where"), summary(measured)), "", NOTE, "",
      *table(HEAD, rows(measured)), ""])


def write(measured: dict[str, Any], out: str | Path, title: str) -> Path:
  """Writes numerics.json, .md and two figures into `out`; returns the path of the .md."""
  out = Path(out)
  out.mkdir(parents=True, exist_ok=True)
  files.write_atomic(out / f"{NAME}.json", json.dumps(measured) + "\n")
  files.write_atomic(out / f"{NAME}_errors.svg", plots.to_svg(errors(measured)))
  files.write_atomic(out / f"{NAME}_amax.svg", plots.to_svg(distributions(measured)))
  return files.write_atomic(out / f"{NAME}.md", markdown(measured, title))


def errors(measured: dict[str, Any]) -> Figure:
  """One panel a matmul: relative error of each operator, one line a recipe."""
  figure = plots.new_figure(plots.WIDE, 3.8)
  names = [o["name"] for o in measured["operators"]]
  panels = figure.subplots(1, 3, sharey=True)
  for axes, gemm in zip(panels, GEMMS, strict=True):
    plots.style(axes)
    for i, recipe in enumerate(measured["recipes"]):
      values = [100 * o["recipes"][recipe]["error"][gemm] for o in measured["operators"]]
      axes.plot(values, color=plots.SERIES[i % len(plots.SERIES)], marker="o", markersize=2.5,
                linewidth=1.1, linestyle=("-", "--")[i // len(plots.SERIES) % 2], label=recipe)
    step = max(1, len(names) // 26)
    axes.set_xticks(range(0, len(names), step), names[::step], rotation=90, fontsize=6)
    axes.set_title(gemm, loc="left", fontsize=9.5, color=plots.TEXT)
  panels[0].set_ylim(bottom=0)  # shared; set once all panels have their lines
  panels[0].set_ylabel("relative error (%)", color=plots.TEXT)
  panels[0].legend(frameon=False, fontsize=8, labelcolor=plots.TEXT)
  return figure


def distributions(measured: dict[str, Any]) -> Figure:
  """One panel an operand: where the tile maxima of each operator lie, as a heat map."""
  operators = measured["operators"]
  figure = plots.new_figure(plots.WIDE, min(1.6 + 0.13 * len(operators), 11))
  for axes, key in zip(figure.subplots(1, 3, sharey=True), OPERANDS, strict=True):
    counts = np.array([o["amax"][key]["histogram"] for o in operators], np.float64)
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    used = np.flatnonzero(counts.sum(0))
    low, high = (used[0], used[-1] + 1) if used.size else (0, 1)
    plots.style(axes, grid=False)
    axes.pcolormesh(np.arange(low, high + 1) + measured["exponents"][0],
                    np.arange(len(operators) + 1), share[:, low:high], cmap="Blues", vmin=0,
                    vmax=1, rasterized=True)
    axes.set_title(f"largest magnitude of a tile of {key}", loc="left", fontsize=9.5,
                   color=plots.TEXT)
    axes.set_xlabel("power of two", color=plots.TEXT)
    axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
    step = max(1, len(operators) // 60)
    axes.set_yticks(np.arange(0, len(operators), step) + 0.5,
                    [o["name"] for o in operators[::step]], fontsize=6)
  axes.invert_yaxis()
  return figure


def over_time(run: Run) -> Figure | None:
  """Statistics logged during training: errors of the matmuls, and values lost to underflow."""
  if not run.numerics:
    return None
  figure = plots.new_figure()
  panels = figure.subplots(1, 2)
  tokens = plots.column(run.numerics, "tokens")
  for axes, part, keys, title in (
      (panels[0], "error", GEMMS, "relative error (%)"),
      (panels[1], "underflow", OPERANDS, "values lost to zero (%)")):
    plots.style(axes)
    for key, colour in zip(keys, plots.SERIES, strict=False):
      values = [[v for v in row.get(part, {}).get(key, []) if v is not None] or [np.nan]
                for row in run.numerics]
      axes.plot(tokens, [100 * np.mean(v) for v in values], color=colour, linewidth=1.6, label=key,
                marker="o", markersize=3)
      axes.plot(tokens, [100 * np.max(v) for v in values], color=colour, linewidth=0.9, alpha=0.5)
    axes.set_title(title, loc="left", fontsize=9.5, color=plots.TEXT)
    axes.set_xlabel("tokens", color=plots.TEXT)
    axes.xaxis.set_major_formatter(plots.tokens_formatter())
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=8, labelcolor=plots.TEXT)
  return figure


def _percent(value: float) -> str:
  if value is None or not np.isfinite(value):
    return "-"
  return "0" if value == 0 else f"{100 * value:.2g}"


def _row(cells: Any) -> str:
  return f"| {' | '.join(map(str, cells))} |"
