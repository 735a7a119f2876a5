"""What pages and Markdown files of reports share: a page that fetches nothing, and safe text.

A page is one file without scripts, fonts or links to fetch, in the reader's light or dark scheme.
Pictures are inline SVG in the page's colours (`plots.to_inline`).
"""

import html
import re
from collections.abc import Sequence
from typing import Any


def document(title: str, body: list[str], style: str = "") -> str:
  """A whole page: `title` as plain text, `body` as HTML, `style` as CSS that is added."""
  return _PAGE.format(title=escape(title), style=_CSS + style, body="\n".join(body))


def figure(title: str, picture: str, caption: str, wide: bool = False, below: str = "") -> str:
  """A card with a picture: `picture` and `below` as HTML, the rest as plain text."""
  return (f'<figure class="card{" wide" if wide else ""}"><h3>{escape(title)}</h3>'
          f'<div class="picture">{picture}</div>{below}'
          f"<figcaption>{escape(caption)}</figcaption></figure>")


def escape(text: str) -> str:
  return html.escape(text, quote=True)


# --- Markdown -------------------------------------------------------------------------------------


def markdown_table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
  """Plain text cells as a table; "" where there are no rows."""
  if not rows:
    return ""
  lines = [head, ("---",) * len(head), *rows]
  return "\n".join(f"| {' | '.join(markdown_cell(cell) for cell in line)} |" for line in lines)


def markdown_cell(text: str) -> str:
  return one_line(text).replace("|", "\\|")


def one_line(text: str) -> str:
  """Text that cannot end its line, nor start HTML."""
  return " ".join(text.replace("\\", "\\\\").replace("<", "&lt;").split())


def fenced(text: str, language: str = "") -> str:
  """A code block whose fence is longer than any run of backticks in the text."""
  longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
  fence = "`" * max(3, longest + 1)
  return f"{fence}{language}\n{text}\n{fence}"


# --- numbers --------------------------------------------------------------------------------------


def count(value: Any) -> str:
  return f"{value:,}" if isinstance(value, int) else str(value)


def tokens(value: float) -> str:
  for size, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
    if value >= size:
      return f"{value / size:.3g}{suffix}"
  return f"{value:.0f}"


def duration(seconds: float) -> str:
  whole = int(round(seconds))
  hours, minutes, rest = whole // 3600, whole % 3600 // 60, whole % 60
  if hours:
    return f"{hours} h {minutes:02d} min"
  return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def some(values: Sequence[str], most: int = 6) -> str:
  """A list in words, cut where it is long."""
  rest = len(values) - most
  return ", ".join([*values[:most], *([f"and {rest} more"] if rest > 0 else [])])


# --- the page -------------------------------------------------------------------------------------

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""

_CSS = """
:root { --text: #1c2128; --muted: #69707a; --grid: #dde1e6; --card: #ffffff; --page: #f4f5f7;
  --edge: #e2e5e9; --mark: #dcebff; --mark-text: #0b3d82; --done: #2c9f6b; --partial: #d98a1f; }
@media (prefers-color-scheme: dark) { :root { --text: #e4e7eb; --muted: #98a1ad; --grid: #333a44;
  --card: #1b2027; --page: #12161b; --edge: #2a313a; --mark: #1d3a60; --mark-text: #cfe3ff; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text); line-height: 1.5;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1240px; margin: 0 auto; padding: 28px clamp(12px, 3vw, 32px) 60px; }
h1 { font-size: 1.65rem; line-height: 1.25; margin: 0 0 6px; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 34px 0 12px; }
h3 { font-size: .98rem; margin: 0 0 8px; }
.status { margin: 0; display: flex; gap: 9px; align-items: baseline; color: var(--muted); }
.status span { flex: none; width: 10px; height: 10px; border-radius: 50%;
  background: var(--muted); }
.status.done span { background: var(--done); }
.status.partial span { background: var(--partial); }
.gaps { margin: 16px 0 0; padding: 10px 14px 10px 30px; background: var(--card);
  border-left: 4px solid var(--partial); border-radius: 4px; font-size: .92rem; }
.card { background: var(--card); border: 1px solid var(--edge); border-radius: 10px;
  padding: 14px 16px; }
.scroll { overflow-x: auto; }
.numbers { display: grid; gap: 12px; margin: 0;
  grid-template-columns: repeat(auto-fill, minmax(190px, 1fr)); }
.numbers div { background: var(--card); border: 1px solid var(--edge); border-radius: 10px;
  padding: 12px 14px; }
.numbers dt { color: var(--muted); font-size: .84rem; }
.numbers dd { margin: 2px 0; font-size: 1.55rem; font-weight: 600;
  font-variant-numeric: tabular-nums; }
.numbers p { margin: 0; color: var(--muted); font-size: .8rem; }
table { border-collapse: collapse; font-size: .92rem; }
.facts { width: 100%; }
.facts th { text-align: left; font-weight: 500; color: var(--muted); white-space: nowrap;
  vertical-align: top; padding: 4px 20px 4px 0; }
.facts td { padding: 4px 0; overflow-wrap: anywhere; }
.rates { margin: 4px 0 0; width: 100%; }
.rates th, .rates td { padding: 3px 0; border-top: 1px solid var(--edge); text-align: left; }
.rates th { font-weight: 500; color: var(--muted); border-top: 0; }
.rates td:last-child, .rates th:last-child { text-align: right;
  font-variant-numeric: tabular-nums; }
.plots { display: grid; gap: 16px; grid-template-columns: repeat(2, minmax(0, 1fr)); }
figure { margin: 0; display: flex; flex-direction: column; }
.wide { grid-column: 1 / -1; }
.picture { overflow-x: auto; }
.picture svg { display: block; width: 100%; height: auto; }
.picture svg text { font-family: inherit !important; }
figcaption { margin-top: auto; padding-top: 8px; color: var(--muted); font-size: .85rem; }
pre { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; tab-size: 4; font-size: .84rem;
  font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
code { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace;
  font-size: .88em; overflow-wrap: anywhere; }
.hint { margin: -6px 0 12px; color: var(--muted); font-size: .9rem; }
.sample { margin-bottom: 12px; }
mark { background: var(--mark); color: var(--mark-text); border-radius: 3px;
  box-decoration-break: clone; -webkit-box-decoration-break: clone; }
details { margin-top: 10px; }
details.card { margin-top: 0; }
summary { cursor: pointer; color: var(--muted); font-size: .88rem; }
details[open] summary { margin-bottom: 8px; }
@media (max-width: 760px) {
  .plots { grid-template-columns: minmax(0, 1fr); }
  .card { padding: 12px; }
  .picture svg { min-width: 400px; }
  .wide .picture svg { min-width: 640px; }
  .numbers { grid-template-columns: repeat(auto-fill, minmax(148px, 1fr)); }
  .facts th, .facts td { display: block; padding: 0; }
  .facts td { padding-bottom: 10px; }
}
@media print { body { background: none; } .card { break-inside: avoid; } }
"""
