"""The report of several runs in a row: `stages.md` and `stages.html` in the folder of all stages.

What each stage's model makes of held-out problems (exam.json), the curves of stages that draw their
own batches, and the same problems answered after every stage. Read from the stages' workdirs alone.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from dsv3_jax import files
from dsv3_jax.analysis import page, plots, policy_plots
from dsv3_jax.analysis import workdir as workdir_lib
from dsv3_jax.analysis.page import escape

NAME = "stages.md"
PAGE = "stages.html"
EXAM = "exam.json"  # of posttrain/exam.py
_ASKED = 2  # problems of each kind whose answers are shown


class Stage(NamedTuple):
  """A stage's name, workdir, and what it left there: its run, and its exam if one was taken."""

  name: str
  folder: Path
  run: workdir_lib.Run
  exam: dict[str, Any]

  @property
  def kind(self) -> str:
    return str(self.run.config.get("kind", "pretrain"))


def read(named: Sequence[tuple[str, str | Path]]) -> list[Stage]:
  """(name, workdir) of each stage, with what it left; ConfigError as of `workdir.read`."""
  found = []
  for name, folder in named:
    path = Path(folder) / EXAM
    exam = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    found.append(Stage(name, Path(folder), workdir_lib.read(folder), exam))
  return found


def write(named: Sequence[tuple[str, str | Path]], workdir: str | Path) -> Path:
  """Writes WORKDIR/stages.md and WORKDIR/stages.html; returns the page's path.

  Args:
    named: (name, workdir) of each stage, in order.
    workdir: of all.
  """
  stages, folder = read(named), Path(workdir)
  files.write_atomic(folder / NAME, markdown(stages))
  return files.write_atomic(folder / PAGE, _page(stages, folder))


def table(stages: Sequence[Stage]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
  """Head and rows: of each stage with an exam, what it solved, tokens an answer, then by kind."""
  taken = [stage for stage in stages if stage.exam]
  parts = _parts(taken)
  rows = []
  for stage in taken:
    exam, cells = stage.exam, []
    for part in parts:
      of = exam["parts"].get(part)
      cells.append(f"{100 * of['solved']:.0f} % ± {100 * of['error']:.0f}" if of else "")
    rows.append((stage.name, f"{100 * exam['solved']:.1f} %", f"{exam['length']:.0f}", *cells))
  return ("stage", "solved", "tokens", *parts), rows


def markdown(stages: Sequence[Stage]) -> str:
  """The table in words."""
  head, rows = table(stages)
  shown = page.markdown_table(head, rows) or "No stage has an exam (`exam.problems`)."
  return f"Held-out problems solved after each stage.\n\n{shown}\n"


# --- figures --------------------------------------------------------------------------------------


def accuracy(stages: Sequence[Stage]) -> Figure | None:
  """Share solved of each kind of problem after each stage, with standard errors."""
  return _bars(stages, "held-out problems solved", lambda of: of["solved"], lambda of: of["error"],
               percent=True)


def lengths(stages: Sequence[Stage]) -> Figure | None:
  """Mean tokens of an answer after each stage."""
  return _bars(stages, "tokens of an answer", lambda of: of["length"], lambda of: 0.0)


def _bars(stages, what, value, error, percent=False) -> Figure | None:
  taken = [stage for stage in stages if stage.exam]
  parts = _parts(taken)
  if not parts:
    return None
  figure = plots.new_figure()
  axes = figure.subplots()
  plots.style(axes)
  axes.grid(axis="x", visible=False)
  width = 0.8 / len(parts)
  for i, part in enumerate(parts):
    at = [(s, stage.exam["parts"][part]) for s, stage in enumerate(taken)
          if part in stage.exam["parts"]]
    scale = 100 if percent else 1
    heights = [scale * value(of) for _, of in at]
    bars = axes.bar([s + (i - (len(parts) - 1) / 2) * width for s, _ in at], heights, width * 0.9,
                    yerr=[scale * error(of) for _, of in at] if percent else None, label=part,
                    color=plots.SERIES[i % len(plots.SERIES)], ecolor=plots.MUTED)
    axes.bar_label(bars, fmt="%.0f", padding=2, color=plots.TEXT, fontsize=8.5)
  axes.set_xticks(np.arange(len(taken)), [stage.name for stage in taken])
  axes.tick_params(axis="x", length=0, labelcolor=plots.TEXT)
  axes.set_ylabel(f"{what} (%)" if percent else what, color=plots.TEXT)
  if percent:
    axes.set_ylim(0, 108)
  return plots.finish(axes)


def _parts(taken: Sequence[Stage]) -> list[str]:
  return list(dict.fromkeys(part for stage in taken for part in stage.exam["parts"]))


# --- the page -------------------------------------------------------------------------------------


def _page(stages: Sequence[Stage], workdir: Path) -> str:
  title = f"Stages: {workdir.resolve().name}"
  body = [f"<header><h1>{escape(title)}</h1></header>"]
  head, rows = table(stages)
  if rows:
    drawn = [_figure("accuracy", "Held-out problems solved", accuracy(stages),
                     "After each stage; bars end at one standard error more and less."),
             _figure("lengths", "Length of answers", lengths(stages),
                     "Tokens, the end token included.")]
    body.append("<section><h2>Held-out problems</h2>"
                f'<div class="card scroll">{_table(head, rows)}</div><br>'
                f'<div class="plots">{"".join(drawn)}</div></section>')
  body.append(f"<section><h2>The stages</h2>{_list(stages, workdir)}</section>")
  for number, stage in enumerate(stages):
    drawn = "".join(_figure(f"{name}-{number}", what, draw(stage.run),
                            policy_plots.CAPTIONS[name])
                    for name, what, draw in policy_plots.ALL)
    if drawn:
      body.append(f"<section><h2>{escape(stage.name)}: the policy</h2>"
                  f'<div class="plots">{drawn}</div></section>')
  answers = _answers(stages)
  if answers:
    body.append('<section><h2>The same problems after each stage</h2><p class="hint">The model\'s '
                f"text is <mark>marked</mark>.</p>{answers}</section>")
  for stage in stages:
    rolled = _rolled(stage)
    if rolled:
      body.append(f"<section><h2>{escape(stage.name)}: outputs it learned from</h2>{rolled}"
                  "</section>")
  return page.document(title, body, _CSS)


def _figure(name: str, title: str, figure: Figure | None, caption: str) -> str:
  if figure is None:
    return ""
  return page.figure(title, plots.to_inline(plots.to_svg(figure), title, name), caption)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  line = lambda tag, cells: "<tr>" + "".join(f"<{tag}>{c}</{tag}>" for c in cells) + "</tr>"
  return (f'<table class="stages">{line("th", map(escape, head))}'
          + "".join(line("td", map(escape, row)) for row in rows) + "</table>")


def _list(stages: Sequence[Stage], workdir: Path) -> str:
  rows = []
  for stage in stages:
    last = stage.run.train[-1] if stage.run.train else {}
    seconds = stage.run.summary.get("wall_s")
    rows.append((stage.name, stage.kind, f"{last.get('step', 0):,} steps",
                 page.duration(seconds) if seconds else "",
                 "finished" if stage.run.finished else "not finished"))
  shown = _table(("stage", "kind", "length", "training took", ""), rows)
  links = ", ".join(
      f'<a href="{escape(stage.folder.resolve().relative_to(workdir.resolve()).as_posix())}'
      f'/report.html">{escape(stage.name)}</a>'
      for stage in stages if stage.folder.resolve().is_relative_to(workdir.resolve()))
  return f'<div class="card scroll">{shown}</div><p class="hint linked">Reports: {links}</p>'


def _answers(stages: Sequence[Stage]) -> str:
  """Some problems with what each stage's model said."""
  said: dict[str, list[tuple[str, dict[str, Any]]]] = {}
  chosen: dict[str, list[str]] = {}
  for stage in stages:
    for answer in stage.exam.get("answers", ()):
      kind = answer["id"].rsplit("-", 1)[0]
      if answer["id"] not in said and len(chosen.setdefault(kind, [])) < _ASKED:
        chosen[kind].append(answer["id"])
      if answer["id"] in chosen[kind]:
        said.setdefault(answer["id"], []).append((stage.name, answer))
  parts = []
  for answers in said.values():
    first = answers[0][1]
    cells = "".join(
        f"<div><h4>{escape(name)}: {'right' if a['solved'] else 'wrong'}</h4>"
        f"<pre><mark>{escape(a['text']) or '&nbsp;'}</mark></pre></div>" for name, a in answers)
    parts.append(f'<article class="card sample"><h3>{escape(first["prompt"])}</h3>'
                 f'<p class="hint">right: {escape(first["answer"])}</p>'
                 f'<div class="beside">{cells}</div></article>')
  return "".join(parts)


def _rolled(stage: Stage) -> str:
  """A problem's outputs in the first rollout and in the last."""
  kept = policy_plots.transcripts(stage.folder)
  parts = []
  for row in (kept[0], kept[-1]) if len(kept) > 1 else kept:
    outputs = "".join(
        f"<div><h4>reward {o['reward']:.2f}</h4><pre><mark>{escape(o['text']) or '&nbsp;'}</mark>"
        "</pre></div>" for o in row["outputs"])
    parts.append(f'<article class="card sample"><h3>rollout {row["rollout"]}: '
                 f'{escape(row["prompt"])}</h3><p class="hint">right: {escape(row["answer"])}</p>'
                 f'<div class="beside">{outputs}</div></article>')
  return "".join(parts)


_CSS = """
.stages { width: 100%; font-variant-numeric: tabular-nums; }
.stages th { text-align: left; font-weight: 500; color: var(--muted); }
.stages th, .stages td { padding: 4px 18px 4px 0; white-space: nowrap; }
.stages td { border-top: 1px solid var(--edge); }
.beside { display: grid; gap: 14px; grid-template-columns: repeat(auto-fill, minmax(190px, 1fr)); }
.beside h4 { margin: 0 0 4px; font-size: .84rem; font-weight: 500; color: var(--muted); }
.sample .hint { margin: -4px 0 8px; }
.linked { margin-top: 10px; }
"""
