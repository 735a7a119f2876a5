"""Table and figure of the accumulator study (`fp8.study.accumulation`), from its JSON values."""

import json
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.figure import Figure

from dsv3_jax import files
from dsv3_jax.analysis import plots

NAME = "accumulation"


def write(study: dict[str, Any], out: str | Path) -> Path:
  """Writes accumulation.json, .md and .svg into `out`; returns the path of the .md."""
  out = Path(out)
  out.mkdir(parents=True, exist_ok=True)
  files.write_atomic(out / f"{NAME}.json", json.dumps(study, indent=1) + "\n")
  files.write_atomic(out / f"{NAME}.svg", plots.to_svg(figure(study)))
  return files.write_atomic(out / f"{NAME}.md", markdown(study))


def markdown(study: dict[str, Any]) -> str:
  """The study as Markdown tables."""
  bits = sorted({row["bits"] for row in study["grid"]})
  cells = {(row["K"], row["interval"], row["bits"]): row for row in study["grid"]}
  lines = ["# Accumulation in a tensor core of limited width", "",
           f"![error by promotion interval]({NAME}.svg)", "",
           f"Products of {study['rows']} x K and K x {study['rows']} matrices of normal numbers in "
           "E4M3, emulated with magnitudes cut to `bits`, against the exact product of the same "
           "codes. Entries: largest error over the root mean square of the product.", "",
           _row("K", "promotion every", *(f"{b} bits" for b in bits)),
           _row(*["---"] * (2 + len(bits)))]
  for K, interval in dict.fromkeys((row["K"], row["interval"]) for row in study["grid"]):
    lines.append(_row(f"{K:,}", interval or "never", *(
        _percent(cells[K, interval, b]["max_over_rms"]) for b in bits)))
  first = study["report"][0]
  lines += ["", f"## K = {first['K']:,} at {first['bits']} bits, other draws and definitions", "",
            f"The report: nearly 2 %. Products of {study['report_rows']} x {first['K']:,} and its "
            "transpose's shape. Elements' own relative errors have no bound where products cancel.",
            "", _row("draw", "cut towards", "promotion every", "largest / RMS",
                     "largest / largest", "norm / norm", "largest of elements' own"),
            _row(*["---"] * 7)]
  directions = {"zero": "zero", "floor": "minus infinity"}
  for row in study["report"]:
    lines.append(_row(row["draw"], directions[row["truncation"]], row["interval"] or "never",
                      *(_percent(row[k]) for k in ("max_over_rms", "max_over_max", "norm",
                                                   "max_of_ratios"))))
  draws = list(dict.fromkeys(row["draw"] for row in study["exact"]))
  exact = {(row["draw"], row["bits"]): row for row in study["exact"]}
  lines += ["", "## Sums of 32 products that come out exact", "",
            "Error: the largest, over the largest product of its sum. \"codes\": every finite E4M3 "
            "value equally likely.", "",
            _row("bits", *(f"{d}: {what}" for d in draws for what in ("exact", "error"))),
            _row(*["---"] * (1 + 2 * len(draws)))]
  for width in dict.fromkeys(row["bits"] for row in study["exact"]):
    lines.append(_row(width, *(text for d in draws for text in (
        f"{100 * exact[d, width]['share']:.2f} %", f"{exact[d, width]['max_error']:.1e}"))))
  return "\n".join(lines) + "\n"


def figure(study: dict[str, Any]) -> Figure:
  """Error over the promotion interval, one panel a K and one line a width; then exact sums."""
  sizes = list(dict.fromkeys(row["K"] for row in study["grid"]))
  bits = sorted({row["bits"] for row in study["grid"]})
  colours = dict(zip(bits, colormaps["viridis"]([0.05 + 0.85 * i / max(len(bits) - 1, 1)
                                                 for i in range(len(bits))]), strict=True))
  found = plots.new_figure(plots.WIDE, 3.6)
  panels = found.subplots(1, len(sizes) + 1, squeeze=False)[0]
  for panel in panels[1:-1]:
    panel.sharey(panels[0])
  for axes, K in zip(panels, sizes, strict=False):
    plots.style(axes)
    for width in bits:
      rows = sorted((row["interval"] or K, row["max_over_rms"]) for row in study["grid"]
                    if (row["K"], row["bits"]) == (K, width))
      axes.plot(*zip(*rows, strict=True), color=colours[width], marker="o", markersize=3.5,
                linewidth=1.6, label=f"{width} bits")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    ticks = sorted({row["interval"] or K for row in study["grid"] if row["K"] == K})
    axes.set_xticks(ticks, [f"{t:,}" if t < K else "never" for t in ticks], rotation=45)
    axes.minorticks_off()
    axes.set_title(f"K = {K:,}", loc="left", fontsize=9.5, color=plots.TEXT)
    axes.set_xlabel("promotion every", color=plots.TEXT)
  panels[0].set_ylabel("largest error / RMS of product", color=plots.TEXT)
  panels[0].legend(frameon=False, fontsize=8, labelcolor=plots.TEXT, ncols=2, loc="lower right")
  last = panels[-1]
  plots.style(last)
  draws = dict.fromkeys(row["draw"] for row in study["exact"])
  for draw, colour in zip(draws, plots.SERIES, strict=False):
    rows = [(row["bits"], 100 * row["share"]) for row in study["exact"] if row["draw"] == draw]
    last.plot(*zip(*rows, strict=True), color=colour, marker="o", markersize=3.5, linewidth=1.6,
              label={"codes": "all codes alike"}.get(draw, draw))
  last.set_title("32 products added exactly (%)", loc="left", fontsize=9.5, color=plots.TEXT)
  last.set_xlabel("bits", color=plots.TEXT)
  last.legend(frameon=False, fontsize=8, labelcolor=plots.TEXT)
  return found


def _row(*cells: Any) -> str:
  return f"| {' | '.join(map(str, cells))} |"


def _percent(value: float) -> str:
  return f"{100 * value:.2g} %"
