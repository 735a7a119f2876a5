"""A run's cost as a picture: time of a step, memory of a device, cost against devices.

Takes what `dsv3 cost --json` prints.
"""

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dsv3_jax.analysis import plots, schedule_plot

COLOURS = ("#3a7bd5", "#e07a2f", "#2c9f6b", "#8b68c9", "#b9bec6", "#c9a227", "#5fb3b3", "#d08bb5",
           "#7a8694")


def draw(content: dict[str, Any]) -> Figure:
  """Three panels; the third is left out where there is one number of devices."""
  scaling = content.get("scaling", [])
  panels = 3 if len(scaling) > 1 else 2
  figure = plots.new_figure(plots.WIDE * panels / 3, 4.2)
  axes = figure.subplots(1, panels)
  parts = {name: value for name, value in content["breakdown_s"].items()
           if value > 1e-9 * content["step_s"]}
  alone = len(parts) and max(parts.values()) < 1
  _stack(axes[0], {k: v * (1e3 if alone else 1) for k, v in parts.items()},
         "ms" if alone else "s", f"a step of {content['tokens_per_step']:,} tokens")
  several = content["devices"] > 1
  rank = max(content["memory_needed" if several else "memory"]["ranks"], key=lambda r: r["total"])
  unit, scale = ("GB", 1e9) if rank["total"] > 1e9 else ("MB", 1e6)
  held = content["hardware"]["memory"] / scale
  _stack(axes[1], {k: v / scale for k, v in rank["parts"].items() if v}, unit,
         f"memory {'needed on' if several else 'of'} the fullest device")
  if rank["total"] / scale > held / 4:  # otherwise the line would squeeze the bar
    axes[1].set_ylim(0, 1.1 * max(held, rank["total"] / scale))
    axes[1].axhline(held, color=plots.RED, linewidth=1.2)
    axes[1].text(0.98, held, f"{content['hardware']['name']} {held:.3g} {unit}", color=plots.RED,
                 fontsize=8.5, ha="right", va="bottom", transform=axes[1].get_yaxis_transform())
  if panels == 3:
    _scaling(axes[2], scaling, content["devices"])
  figure.suptitle(f"{content['config']} on {content['devices']:,} {content['hardware']['name']}",
                  fontsize=10.5, color=plots.TEXT, x=0.01, ha="left")
  return figure


def _stack(axes: Axes, parts: dict[str, float], unit: str, title: str) -> None:
  """One stacked bar, its parts named beside it, largest share at the bottom of the list."""
  plots.style(axes)
  bottom = 0.0
  for (name, value), colour in zip(parts.items(), COLOURS, strict=False):
    axes.bar(0, value, bottom=bottom, width=0.8, color=colour, label=f"{name}  {value:.3g} {unit}")
    bottom += value
  axes.grid(visible=False)
  axes.set_xlim(-0.5, 2.0)
  axes.set_ylim(0, bottom * 1.06)
  axes.set_xticks([])
  axes.set_ylabel(unit, color=plots.TEXT)
  axes.set_title(f"{title}: {bottom:.4g} {unit}", loc="left", fontsize=9.5, color=plots.TEXT)
  handles, labels = axes.get_legend_handles_labels()
  axes.legend(handles[::-1], labels[::-1], frameon=False, fontsize=8.5, labelcolor=plots.TEXT,
              loc="center left", bbox_to_anchor=(0.38, 0.5))


def _scaling(axes: Axes, points: list[dict[str, Any]], here: int) -> None:
  """Device-hours of pre-training, and how long it takes beside each point."""
  plots.style(axes)
  devices = [p["devices"] for p in points]
  hours = [p["gpu_hours"] for p in points]
  scale, unit = (1e3, "thousand ") if max(hours) > 1e4 else (1.0, "")
  axes.plot(devices, [h / scale for h in hours], color=plots.BLUE, marker="o", markersize=4,
            linewidth=1.6)
  for p in points:
    axes.annotate(p["time"], (p["devices"], p["gpu_hours"] / scale), fontsize=8.5,
                  textcoords="offset points", xytext=(0, 9), ha="center", color=plots.TEXT,
                  fontweight="bold" if p["devices"] == here else "normal")
  axes.set_xscale("log", base=2)
  axes.set_xticks(devices, [f"{d:,.0f}" for d in devices])
  axes.minorticks_off()
  axes.margins(x=0.2)
  axes.set_ylim(0, max(hours) / scale * 1.2)
  axes.set_xlabel("devices", color=plots.TEXT)
  axes.set_ylabel(f"{unit}device-hours", color=plots.TEXT)
  axes.set_title("pre-training against devices, same batch", loc="left", fontsize=9.5,
                 color=plots.TEXT)


def write(content: dict[str, Any], path: str) -> Path:
  """Writes the picture; .svg, .png or .pdf."""
  return schedule_plot.write(draw(content), Path(path))
