"""The report of several runs: `report.md`, `report.html` and plots/ in a folder of its own."""

import dataclasses
import io
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from dsv3_jax import files
from dsv3_jax.analysis import page, plots
from dsv3_jax.analysis.comparison import doubts, figures, tables
from dsv3_jax.analysis.comparison.arms import METRICS
from dsv3_jax.analysis.comparison.compare import Comparison
from dsv3_jax.analysis.page import escape
from dsv3_jax.config import ConfigError

FORMATS = ("svg", "pdf", "png")


@dataclasses.dataclass(frozen=True)
class _Plot:
  """One figure; `wide` gives it a row of its own."""

  name: str
  title: str
  draw: Callable[[Comparison], Figure | None]
  caption: str
  wide: bool = False


_DIFFERENCES = (
    _Plot("differences", "At the end", figures.forest,
          "Left is better. Diamond: mean over seeds. Bar: 95 % confidence interval (paired t "
          "test). Rings: single seeds."),
    _Plot("loss_difference", "Over the run", figures.loss_difference,
          "Smoothed training loss less the baseline's of the same seed; mean over seeds and a band "
          "of one standard deviation. Below the line is better."))
_CURVES = (
    _Plot("loss", "Training loss", figures.loss,
          "Exponential moving average of coefficient 0.9 a step, as in the report's figures; mean "
          "over seeds and a band of one standard deviation. The first quarter of the run does not "
          "scale the axis."),
    _Plot("validation", "Validation", figures.validation,
          "At each evaluation, on held-out text; mean and one standard deviation over seeds."),
    _Plot("compute", "Training loss against compute", figures.compute,
          "FLOPs of the model's matmuls and causal attention, forward and backward, MTP "
          "included."),
    _Plot("wall_time", "Training loss against wall time", figures.wall_time,
          "Compilation and evaluations included. Depends on the machine, and on what else ran on "
          "it."),
    _Plot("max_vio", "Balance over time", figures.max_violation,
          "How far the busiest expert of the worst layer is above its share, over a training "
          "batch; 0 is balanced. Smoothed like the loss."),
    _Plot("expert_load", "Expert load", figures.expert_load,
          "Relative load of each routed expert over the validation batches at the end, of the "
          "lowest seed (experts of different seeds have nothing to do with each other); 1 is "
          "balanced. One scale for all.", wide=True))


def write(c: Comparison, out: str | Path, formats: Sequence[str] = (), command: str = "") -> Path:
  """Writes report.md, report.html and plots/*.svg.

  Args:
    c: what `compare.make` made.
    out: the folder; made if need be.
    formats: in which figures are written beside SVG: of FORMATS.
    command: that this report is made by, for the reader.

  Returns:
    The path of report.html.

  Raises:
    ConfigError: no such format.
    OSError: the folder cannot be written to.
  """
  for name in formats:
    if name not in FORMATS:
      raise ConfigError(f"--format={name}: choose from {', '.join(FORMATS)}")
  out = Path(out)
  (out / "plots").mkdir(parents=True, exist_ok=True)
  pictures = {}
  for plot in (*_DIFFERENCES, *_CURVES):
    figure = plot.draw(c)
    for suffix in FORMATS:
      path = out / "plots" / f"{plot.name}.{suffix}"
      if figure is None or suffix not in ("svg", *formats):
        path.unlink(missing_ok=True)  # of an earlier report in this folder
      elif suffix == "svg":
        pictures[plot.name] = plots.to_svg(figure)
        files.write_atomic(path, pictures[plot.name])
      else:
        files.write_atomic(path, render(figure, suffix))
  files.write_atomic(out / "report.md", markdown(c, pictures, command))
  return files.write_atomic(out / "report.html", html(c, pictures, command))


def render(figure: Figure, suffix: str) -> bytes:
  """A figure as PDF, with text as text, or as PNG of 200 dots an inch; equal ones give equal bytes.
  """
  buffer = io.BytesIO()
  with matplotlib.rc_context({"pdf.fonttype": 42}):
    figure.savefig(buffer, format=suffix, dpi=200,
                   metadata={"CreationDate": None} if suffix == "pdf" else None)
  return buffer.getvalue()


def table(c: Comparison) -> str:
  """The compact Markdown table of arms."""
  return _markdown_table(tables.compact(c)) + "\n"


# --- Markdown -----------------------------------------------------------------------------------


def markdown(c: Comparison, pictures: dict[str, str], command: str = "") -> str:
  """The report as Markdown; `pictures` has the names of the figures that there are."""
  draw = lambda plot: ([f"## {plot.title}", f"![{plot.title}](plots/{plot.name}.svg)",
                        plot.caption] if plot.name in pictures else [])
  parts = [f"# {page.one_line(c.title)}", page.one_line(c.question),
           page.fenced(c.text) if c.text else "", page.one_line(tables.verdict(c)),
           "## Arms", "Mean ± standard deviation over seeds. Lower is better, except of tokens/s.",
           _markdown_table(tables.arms(c))]
  if c.differences:
    parts += ["## Differences to the baseline",
              f"{METRICS[c.metric].wide} less that of {page.one_line(c.baseline)}.",
              _markdown_table(tables.differences(c))]
  for plot in (*_DIFFERENCES, *_CURVES):
    parts += draw(plot)
  parts.append("## To believe or doubt")
  parts.append("\n".join(f"- {'**' if d.level == doubts.WARN else ''}{d.about}"
                         f"{'**' if d.level == doubts.WARN else ''}: {page.one_line(d.text)}"
                         for d in doubts.find(c)))
  for title, made in _below(c):
    parts += [f"### {title}", _markdown_table(made)]
  parts += ["Made by", page.fenced(command)] if command else []
  return "\n\n".join(part for part in parts if part) + "\n"


def _below(c: Comparison) -> list[tuple[str, tables.Table]]:
  """(title, table) of what stands at the end."""
  found = [("What each arm is", tables.sizes(c)),
           ("Where the configs differ", doubts.config_table(c)),
           ("Where each number is from", doubts.trace_table(c))]
  return [(title, made) for title, made in found if made[1]]


def _markdown_table(made: tables.Table) -> str:
  head, rows = made
  return page.markdown_table(tuple(head), [tuple(row) for row in rows])


# --- HTML ---------------------------------------------------------------------------------------


def html(c: Comparison, pictures: dict[str, str], command: str = "") -> str:
  """The report as a page that fetches nothing; `pictures` are figures as SVG, by name."""
  draw = lambda plot: page.figure(
      plot.title, plots.to_inline(pictures[plot.name], plot.title, plot.name), plot.caption,
      plot.wide) if plot.name in pictures else ""
  body = [f"<header><h1>{escape(c.title)}</h1>"]
  body += [f'<p class="question">{escape(c.question)}</p>'] if c.question else []
  body += ["</header>"]
  if c.text:
    body.append('<details class="card about"><summary>The experiment</summary>'
                f"<pre>{escape(c.text)}</pre></details>")
  said = tables.verdict(c)
  body += [f'<p class="verdict">{escape(said)}</p>'] if said else []
  body.append('<section><h2>Arms</h2><p class="hint">Mean ± standard deviation over seeds. Lower '
              f"is better, except of tokens/s.</p>{_table(c, tables.arms(c))}</section>")
  if c.differences:
    body.append(
        '<section><h2>Differences to the baseline</h2><p class="hint">'
        f"{escape(METRICS[c.metric].wide)} less that of {escape(c.baseline)}.</p>"
        f'<div class="plots">{"".join(map(draw, _DIFFERENCES))}</div>'
        f"{_table(c, tables.differences(c))}</section>")
  drawn = "".join(map(draw, _CURVES))
  if drawn:
    body.append(f'<section><h2>Curves</h2><div class="plots">{drawn}</div></section>')
  listed = "".join(f'<li class="{d.level}"><b>{escape(d.about)}</b> {escape(d.text)}</li>'
                   for d in doubts.find(c))
  body.append(f'<section><h2>To believe or doubt</h2><ul class="doubts">{listed}</ul>')
  body += [f"<h3>{escape(title)}</h3>{_table(c, made)}" for title, made in _below(c)]
  body.append("</section>")
  if command:
    body.append(f'<footer class="hint">Made by <code>{escape(command)}</code></footer>')
  return page.document(c.title, body, _CSS)


def _table(c: Comparison, made: tables.Table) -> str:
  """Arms in the first column have their colour before them."""
  head, rows = made
  cells = "".join(f"<th>{_breakable(h)}</th>" for h in head)
  lines = []
  for row in rows:
    line = "".join(f"<td>{_breakable(value)}</td>" for value in row[1:])
    lines.append(f"<tr><th>{_swatch(c, row[0])}{_breakable(row[0])}</th>{line}</tr>")
  return (f'<div class="card scroll"><table class="arms"><thead><tr>{cells}</tr></thead><tbody>'
          f"{''.join(lines)}</tbody></table></div>")


def _swatch(c: Comparison, title: str) -> str:
  """A piece of the arm's line."""
  for name, (colour, line) in figures.styles(c).items():
    if title == name or title.startswith(f"{name} ("):
      dashes = "" if line == "-" else f' stroke-dasharray="{" ".join(str(2 * n) for n in line[1])}"'
      colour = plots.PAGE_COLOURS.get(colour, colour)
      return ('<svg class="swatch" viewBox="0 0 22 4" aria-hidden="true"><line x1="0" y1="2" '
              f'x2="22" y2="2" stroke="{colour}" stroke-width="3.5"{dashes}/></svg>')
  return ""


def _breakable(text: str) -> str:
  """Plain text; a long word may break at dots, strokes and underscores."""
  text = escape(text)
  if len(text) > 20 and " " not in text:
    for sign in (".", "/", "_"):
      text = text.replace(sign, f"{sign}<wbr>")
  return text


_CSS = """
.question { margin: 0; font-size: 1.08rem; color: var(--muted); }
details.card.about { margin-top: 14px; }
.verdict { margin: 16px 0 0; padding: 10px 14px; background: var(--card);
  border-left: 4px solid var(--done); border-radius: 4px; }
.scroll:has(> .arms) { padding: 8px 0; }
.arms { width: 100%; font-variant-numeric: tabular-nums; font-size: .88rem; }
.arms th, .arms td { padding: 5px 10px 5px 0; text-align: left; vertical-align: top;
  border-top: 1px solid var(--edge); }
.arms thead th { border-top: 0; color: var(--muted); font-weight: 500; vertical-align: bottom;
  min-width: 56px; max-width: 200px; }
.arms tbody th { font-weight: 500; min-width: 168px; max-width: 280px; overflow-wrap: anywhere; }
.arms th:first-child { position: sticky; left: 0; padding-left: 16px; background: var(--card); }
.arms td:last-child, .arms th:last-child { padding-right: 16px; }
.arms td { white-space: nowrap; }
.arms td:has(wbr) { white-space: normal; min-width: 300px; overflow-wrap: anywhere; }
.swatch { width: 22px; height: 4px; margin-right: 8px; vertical-align: middle; }
section > h3 { margin: 24px 0 8px; }
.plots + .scroll { margin-top: 16px; }
.doubts { list-style: none; margin: 0; padding: 0; display: grid; gap: 8px; }
.doubts li { padding: 8px 14px; background: var(--card); border-radius: 4px; font-size: .92rem;
  border-left: 4px solid var(--edge); overflow-wrap: anywhere; }
.doubts li.good { border-left-color: var(--done); }
.doubts li.warn { border-left-color: var(--partial); }
.doubts b { display: inline-block; font-weight: 600; margin-right: 6px; }
.doubts b::first-letter { text-transform: uppercase; }
footer { margin-top: 30px; }
@media (max-width: 760px) { .card:not(.wide) > .picture svg { min-width: 0; } }
"""
