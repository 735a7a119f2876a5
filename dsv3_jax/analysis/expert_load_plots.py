"""Heat maps of expert load by domain, and the page around them (report figure 9)."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure

from dsv3_jax import files
from dsv3_jax.analysis import expert_load, page, plots
from dsv3_jax.config import ConfigError

NAME = "domains"
NUMBERED = 32  # experts, of a large map whose cells show numbers
ABREAST = 4  # runs side by side
_ALL = ("Every MoE layer", "Rows are domains, columns are experts; one colour scale for all. White "
        "is a balanced load of 1.")
_LARGE = ("Layers one by one", "The same loads with their numbers, where they fit.")
_INDEX = ("Specialisation by layer", "Mean share of a domain's routing that differs from the "
          "average domain's. Dashed: what is left where text is dealt to domains at random.")


def write(values: dict[str, Any], out: str | Path, layers: Sequence[str] = ()) -> Path:
  """Writes domains.json, .md, .html and the figures domains_*.svg into `out`.

  Args:
    values: of `expert_load.join`.
    out: folder; made if need be.
    layers: names of those that are drawn large; see `choose`.

  Returns:
    The path of the page.
  """
  layers = choose([run["layers"] for run in values["runs"]], layers)
  out = Path(out)
  out.mkdir(parents=True, exist_ok=True)
  files.write_atomic(out / f"{NAME}.json", dumps(values))
  figures = [("all", _ALL, every_layer(values)), ("layers", _LARGE, large(values, layers))]
  if len(values["domains"]) > 1:
    figures.append(("index", _INDEX, index(values)))
  pictures = {name: (words, plots.to_svg(figure)) for name, words, figure in figures}
  for name, (_, svg) in pictures.items():
    files.write_atomic(out / f"{NAME}_{name}.svg", svg)
  files.write_atomic(out / f"{NAME}.md", _markdown(values, pictures))
  return files.write_atomic(out / f"{NAME}.html", _page(values, pictures))


def dumps(values: dict[str, Any]) -> str:
  """JSON with a line for each layer's loads, so that versions can be compared."""
  text = json.dumps(values, indent=1, ensure_ascii=False)
  return re.sub(r"\[\n\s*([^\[\]{}]*?)\n\s*\]",
                lambda m: "[" + re.sub(r"\n\s*", " ", m[1]) + "]", text) + "\n"


def choose(layers: Sequence[Sequence[str]], wanted: Sequence[str] = ()) -> list[str]:
  """The layers that are drawn large: those named, by name or number, or two that nobody picked.

  The two lie a third and two thirds of the way up, as 9 and 18 of the report's 26 do.

  Args:
    layers: names of each run's MoE layers.
    wanted: names or numbers.

  Raises:
    ConfigError: a run has no such MoE layer.
  """
  common = [name for name in layers[0] if all(name in names for names in layers)]
  if not common:
    raise ConfigError("the model has no MoE layer" if len(layers) == 1 else
                      "the runs have no MoE layer of one number; compare others")
  if not wanted:
    main = [name for name in common if name.startswith("layer")] or common
    return list(dict.fromkeys(main[-(-len(main) * thirds // 3) - 1] for thirds in (1, 2)))
  found = []
  for name in wanted:
    full = f"layer {name}" if name.isdigit() else name
    if full not in common:
      raise ConfigError(f"--layers: {name!r} is no MoE layer of the run"
                        f"{'s' * (len(layers) > 1)}; there are {', '.join(common)}")
    found.append(full)
  return found


# --- figures ------------------------------------------------------------------------------------


def scale(values: dict[str, Any]) -> Normalize:
  """One colour scale for all runs: as many units of load to either side of 1, at least one."""
  top = max(np.max(load) for run in values["runs"] for load in run["load"].values())
  return Normalize(2 - max(top, 2.0), max(top, 2.0))


def every_layer(values: dict[str, Any]) -> Figure:
  """A row of maps for each layer and a column for each run; many runs in several such bands."""
  runs, domains = values["runs"], values["domains"]
  names = list(dict.fromkeys(name for run in runs for name in run["layers"]))
  bands = -(-len(runs) // ABREAST)
  columns = -(-len(runs) // bands)
  height = 0.24 + 0.15 * len(domains)
  figure = plots.new_figure(plots.WIDE, min(bands * (0.9 + height * len(names)), 60))
  figure.get_layout_engine().set(h_pad=0.02, w_pad=0.04, hspace=0.02)
  panels = figure.subplots(bands * len(names), columns, squeeze=False)
  norm = scale(values)
  for (row, j), axes in np.ndenumerate(panels):
    band, i = divmod(row, len(names))
    at, name = band * columns + j, names[i]
    if at >= len(runs) or name not in runs[at]["layers"]:
      axes.set_axis_off()
      continue
    load_XE = _rows(runs[at], name, domains)
    _map(axes, load_XE, norm)
    _domains(axes, domains if j == 0 else (), 7.5)
    _experts(axes, load_XE.shape[1], i + 1 == len(names), room=20 // columns + 4)
    if j == columns - 1 or at == len(runs) - 1:
      axes.yaxis.set_label_position("right")
      axes.set_ylabel(name, rotation=0, ha="left", va="center", fontsize=8.5, color=plots.TEXT)
    if i == 0:
      axes.set_title(_short(runs[at]["name"], 100 // columns), fontsize=9.5, color=plots.TEXT,
                     pad=6 if band == 0 else 12)
  _bar(figure, list(panels.flat), norm)
  return figure


def large(values: dict[str, Any], layers: Sequence[str]) -> Figure:
  """A map for each of some layers and each run, one below the other."""
  runs, domains = values["runs"], values["domains"]
  figure = plots.new_figure(plots.WIDE, 0.8 + len(layers) * len(runs) * (0.5 + 0.27 * len(domains)))
  panels = figure.subplots(len(layers) * len(runs), 1, squeeze=False)[:, 0]
  norm = scale(values)
  for k, axes in enumerate(panels):
    name, run = layers[k // len(runs)], runs[k % len(runs)]
    load_XE = _rows(run, name, domains)
    _map(axes, load_XE, norm)
    _domains(axes, domains, 9)
    _experts(axes, load_XE.shape[1], k + 1 == len(panels), room=32)
    axes.set_title(f"{name}: {_short(run['name'], 90)}", loc="left", fontsize=9.5,
                   color=plots.TEXT)
    if load_XE.shape[1] <= NUMBERED:
      for (row, column), value in np.ndenumerate(load_XE):
        dark = abs(value - 1) > 0.6 * (norm.vmax - 1)
        axes.text(column + 0.5, row + 0.5, f"{value:.2f}", ha="center", va="center",
                  fontsize=9 if load_XE.shape[1] <= 16 else 7,
                  color="#ffffff" if dark else "#222222")
  _bar(figure, list(panels), norm)
  return figure


def index(values: dict[str, Any]) -> Figure:
  """Specialisation of each layer, one line a run; dashed, what chance gives."""
  figure, axes = plots.new_axes("", "specialisation", plots.WIDE)
  names = list(dict.fromkeys(name for run in values["runs"] for name in run["layers"]))
  for i, run in enumerate(values["runs"]):
    colour = plots.SERIES[i % len(plots.SERIES)]
    where = [names.index(name) for name in run["layers"]]
    axes.plot(where, run["specialisation"]["layers"], color=colour, marker="o", markersize=4.5,
              linewidth=1.6, label=_short(run["name"], 60))
    axes.axhline(run["specialisation"]["by_chance"], color=colour, linewidth=1.1,
                 linestyle=(0, (4, 3)))
  step = max(1, -(-len(names) // 24))
  axes.set_xticks(range(0, len(names), step), names[::step])
  axes.set_ylim(0, None)
  return plots.finish(axes)


def _colours() -> LinearSegmentedColormap:
  """Blue below a load of 1, red above, white at 1."""
  return LinearSegmentedColormap.from_list(
      "load", ("#14397d", "#3a7bd5", "#a9c8f0", "#f7f7f7", "#f6b48f", "#d64550", "#6b0f1f"))


def _rows(run: dict[str, Any], layer: str, domains: Sequence[str]) -> np.ndarray:
  """Relative loads of one layer, [domains, E]."""
  at = run["layers"].index(layer)
  return np.array([run["load"][domain][at] for domain in domains])


def _map(axes: Axes, load_XE: np.ndarray, norm: Normalize) -> None:
  plots.style(axes, grid=False)
  rows, experts = load_XE.shape
  if experts <= 64:
    axes.pcolormesh(load_XE, cmap=_colours(), norm=norm, edgecolors=plots.PAPER, linewidth=0.4)
    axes.set_ylim(rows, 0)
  else:  # a picture of a pixel a cell instead of thousands of shapes
    axes.imshow(load_XE, cmap=_colours(), norm=norm, interpolation="none", aspect="auto",
                extent=(0, experts, rows, 0))
  axes.tick_params(length=0)


def _domains(axes: Axes, names: Sequence[str], size: float) -> None:
  axes.set_yticks([i + 0.5 for i in range(len(names))], names, fontsize=size, color=plots.TEXT)


def _experts(axes: Axes, experts: int, labelled: bool, room: int) -> None:
  if not labelled:
    axes.set_xticks([])
    return
  step = next(s for s in (1, 2, 4, 8, 16, 32, 64, 128) if experts / s <= room or s == 128)
  axes.set_xticks([i + 0.5 for i in range(0, experts, step)], range(0, experts, step))
  axes.set_xlabel("routed expert", color=plots.TEXT)


def _bar(figure: Figure, panels: list[Axes], norm: Normalize) -> None:
  """The colour scale from 0 to the largest load, 1 marked."""
  bar = figure.colorbar(ScalarMappable(norm, _colours()), ax=panels, pad=0.015,
                        fraction=0.025, aspect=30, shrink=min(1.0, 4 / figure.get_figheight()),
                        anchor=(0, 1))
  bar.ax.set_ylim(0, norm.vmax)
  step = max(1, round(norm.vmax / 6))
  ticks = sorted({0, 1, *range(step, int(norm.vmax) + 1, step)})
  bar.set_ticks(ticks, labels=[str(t) if t != 1 else "1: balanced" for t in ticks])
  bar.ax.axhline(1, color="#222222", linewidth=1.2)  # on white, whatever the page
  bar.set_label("load / balanced load", color=plots.TEXT)
  bar.ax.tick_params(colors=plots.MUTED, labelsize=8.5)
  bar.outline.set_visible(False)


def _short(text: str, limit: int) -> str:
  return text if len(text) <= limit else text[:max(limit - 3, 1)] + "..."


# --- pages --------------------------------------------------------------------------------------

_Pictures = dict[str, tuple[tuple[str, str], str]]
_CSS = """
.loads { width: 100%; }
.loads th, .loads td { padding: 4px 0 4px 18px; border-top: 1px solid var(--edge);
  text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.loads th { font-weight: 500; color: var(--muted); border-top: 0; }
.loads th:first-child, .loads td:first-child { padding-left: 0; text-align: left; }
.loads .words { text-align: left; white-space: normal; min-width: 300px; }
"""


def _title(values: dict[str, Any]) -> str:
  names = [run["name"] for run in values["runs"]]
  return "Expert load by domain: " + (" and ".join(names) if len(names) < 4 else
                                      f"{len(names)} runs")


def _facts(run: dict[str, Any]) -> str:
  """Where a run's numbers come from."""
  commit = f", commit {run['commit']}" if run.get("commit") else ""
  return (f"{run['workdir']}: step {run['step']:,}{' (averaged parameters)' * run['ema']}, config "
          f"{run['id']}{commit}; {run['active']} of {run['experts']} experts a token")


def _markdown(values: dict[str, Any], pictures: _Pictures) -> str:
  parts = [f"# {page.one_line(_title(values))}"]
  parts += [f"> {page.one_line(text)}" for text in expert_load.warnings(values)]
  parts.append(page.one_line(expert_load.provenance(values)))
  parts.append(page.markdown_table(expert_load.COMPARISON, expert_load.comparison(values)))
  for name, ((title, caption), _) in pictures.items():
    parts += [f"## {title}", f"![{title}]({NAME}_{name}.svg)", caption]
  for run in values["runs"]:
    parts += [f"## {page.one_line(run['name'])}", page.one_line(_facts(run)),
              page.markdown_table(expert_load.HEAD, expert_load.rows(run))]
  parts += ["## Words", "\n".join(f"- {page.one_line(note)}" for note in expert_load.NOTES)]
  return "\n\n".join(part for part in parts if part) + "\n"


def _page(values: dict[str, Any], pictures: _Pictures) -> str:
  body = [f"<header><h1>{page.escape(_title(values))}</h1></header>"]
  warnings = expert_load.warnings(values)
  if warnings:
    body.append('<ul class="gaps">' + "".join(f"<li>{page.escape(w)}</li>" for w in warnings) +
                "</ul>")
  body.append('<section><h2>Summary</h2><p class="hint">'
              f'{page.escape(expert_load.provenance(values))}</p>' +
              _table(expert_load.COMPARISON, expert_load.comparison(values)) + "</section>")
  drawn = "".join(page.figure(title, plots.to_inline(svg, title, name), caption, wide=True)
                  for name, ((title, caption), svg) in pictures.items())
  body.append(f'<section><h2>Loads</h2><div class="plots">{drawn}</div></section>')
  for run in values["runs"]:
    body.append(f'<section><h2>{page.escape(run["name"])}</h2><p class="hint">'
                f'{page.escape(_facts(run))}</p>'
                f'{_table(expert_load.HEAD, expert_load.rows(run))}</section>')
  notes = "".join(f"<li>{page.escape(note)}</li>" for note in expert_load.NOTES)
  body.append(f"<section><h2>Words</h2><ul>{notes}</ul></section>")
  return page.document(_title(values), body, _CSS)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  def line(tag: str, cells: Sequence[str]) -> str:
    words = ["" if name != expert_load.HEAD[-1] else ' class="words"' for name in head]
    return "<tr>" + "".join(f"<{tag}{w}>{page.escape(cell)}</{tag}>"
                            for w, cell in zip(words, cells, strict=True)) + "</tr>"

  return ('<div class="card scroll"><table class="loads">' + line("th", head) +
          "".join(line("td", cells) for cells in rows) + "</table></div>")
