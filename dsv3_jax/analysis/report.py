"""The report of one run: `report.md`, `report.html` and `plots/*.svg` in its workdir.

Everything is read from the workdir's own files, so the report of a run can be made again anywhere,
at any time, also while the run is going. The page is one file without scripts, fonts or links to
fetch: it opens offline. Equal files give an equal report.
"""

import dataclasses
import datetime
import html
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from dsv3_jax import files
from dsv3_jax.analysis import numerics, plots
from dsv3_jax.analysis import workdir as workdir_lib
from dsv3_jax.analysis.workdir import Run


@dataclasses.dataclass(frozen=True)
class _Plot:
  """One figure of the report; `wide` gives it a row of its own on the page."""

  name: str
  title: str
  draw: Callable[[Run], Figure | None]
  caption: str
  wide: bool = False


_PLOTS = (
    _Plot("loss", "Loss", plots.loss,
          "Main next-token loss. Validation batches are the same at every evaluation.", wide=True),
    _Plot("bits_per_byte", "Compression of the validation text", plots.compression,
          "Bits per byte, so that tokenizers do not matter; gzip and xz compress the same bytes."),
    _Plot("mtp_loss", "Multi-token prediction", plots.mtp_loss,
          "Depth k predicts the token k places beyond the next one."),
    _Plot("schedules", "Schedules", plots.schedules,
          "All are functions of the tokens seen."),
    _Plot("grad_norm", "Gradient norm", plots.gradient_norm,
          "Global norm over all parameters, before clipping."),
    _Plot("throughput", "Speed", plots.throughput,
          "Wall-clock tokens per second of each optimizer step."),
    _Plot("max_vio", "Balance over time", plots.max_violation,
          "How far the busiest expert of a layer is above its share, over the global batch."),
    _Plot("expert_load", "Expert load", plots.expert_load,
          "Relative load of each routed expert at the last evaluation; 1 is perfect balance.",
          wide=True),
    _Plot("numerics", "FP8 numerics", numerics.over_time,
          "Of the linear layers' matmuls and operands under the run's recipe (v3 where it has "
          "none): means over the operators, and faint the worst."),
)


def write(workdir: str | Path) -> Path:
  """Writes report.md, report.html and plots/*.svg into `workdir`.

  Returns:
    The path of report.html.

  Raises:
    ConfigError: `workdir` is not a folder, or no run was ever started in it.
    OSError: the workdir cannot be written to.
  """
  run = workdir_lib.read(workdir)
  (run.workdir / "plots").mkdir(exist_ok=True)
  pictures = {}
  for plot in _PLOTS:
    figure = plot.draw(run)
    path = run.workdir / "plots" / f"{plot.name}.svg"
    if figure is None:
      path.unlink(missing_ok=True)  # of an earlier run in this folder
    else:
      pictures[plot.name] = plots.to_svg(figure)
      files.write_atomic(path, pictures[plot.name])
  files.write_atomic(run.workdir / "report.md", _markdown(run, pictures))
  return files.write_atomic(run.workdir / "report.html", _page(run, pictures))


# --- what the report says -----------------------------------------------------------------------


def _title(run: Run) -> str:
  return f"Training run: {run.workdir.resolve().name}"


def _status(run: Run) -> tuple[str, str]:
  """(state, sentence): state is "done", "partial" or "empty"."""
  if not run.train:
    return "empty", "No training step has been logged yet."
  last = run.train[-1]
  planned = run.config.get("train", {}).get("tokens")
  done = f"{last['step']:,} steps, {_tokens(last.get('tokens', 0))} tokens"
  if run.finished:
    return "done", f"Finished: {done}."
  if not planned:
    return "partial", f"{done}; how many were planned is unknown (config.json is missing)."
  share = last.get("tokens", 0) / planned
  return "partial", (f"Not finished: {done}, {share:.0%} of the {_tokens(planned)} planned. The "
                     "same command goes on from the last checkpoint.")


def _gaps(run: Run) -> list[str]:
  """What this report cannot show, and why."""
  gaps = list(run.notes)
  if run.train and not run.evals:
    gaps.append("No evaluation has run yet (train.eval_every): validation loss, bits per byte and "
                "expert load are missing.")
  if run.train and not run.summary:
    gaps.append("summary.json is not there yet (it is written when a run ends): baselines, samples "
                "and versions are missing.")
  return gaps


def _facts(run: Run) -> list[tuple[str, str]]:
  """The header: what ran, from what, on what, when."""
  summary, model = run.summary, run.config.get("model", {})
  rows = []
  if run.command:
    rows.append(("command", run.command))
  if model:
    moe, layers = model.get("moe", {}), model.get("layers", 0)
    rows.append(("model", f"{layers} layers ({model.get('dense_layers', 0)} dense), width "
                 f"{model.get('dim')}, {moe.get('active')} of {moe.get('experts')} routed experts "
                 f"+ {moe.get('shared')} shared, MTP depth {model.get('mtp_depth')}, vocabulary "
                 f"{model.get('vocab_size', 0):,}"))
  if summary.get("parameters"):
    text = _count(summary["parameters"])
    if summary.get("activated_parameters"):
      text += f", {_count(summary['activated_parameters'])} activated a token"
    rows.append(("parameters", text))
  data = run.config.get("data", {})
  if data:
    rows.append(("data", f"{', '.join(map(str, data.get('sources', [])))}; sequences of "
                 f"{data.get('sequence_length')} tokens, {data.get('batch_size')} a step"))
  rows += _parallelism(run.config.get("runtime", {}), summary.get("state_bytes") or {})
  for key in ("commit", "config_hash", "device"):
    if summary.get(key):
      rows.append((key.replace("_", " "), str(summary[key])))
  versions = summary.get("versions")
  if isinstance(versions, dict) and versions:
    rows.append(("versions", ", ".join(f"{k} {v}" for k, v in versions.items())))
  seconds = summary.get("wall_s") or _last(plots.timing(run, "elapsed_s"))
  if seconds:
    rows.append(("wall-clock time", _duration(seconds)))
  metrics = run.workdir / "metrics.jsonl"
  if metrics.exists():
    last = datetime.datetime.fromtimestamp(metrics.stat().st_mtime, datetime.UTC)
    rows.append(("last metrics", f"{last:%Y-%m-%d %H:%M} UTC"))
  return rows


def _parallelism(runtime: dict[str, Any], state: dict[str, int]) -> list[tuple[str, str]]:
  """How the run was cut over devices; nothing of a run on one device in its compute dtype."""
  rows = []
  mesh = {axis: n for axis, n in runtime.get("mesh", {}).items() if n > 1}
  schedule = runtime.get("pipeline", {}).get("schedule", "auto")
  if schedule == "auto":
    schedule = "dualpipe_v" if "pipe" in mesh else "none"
  if mesh or schedule != "none":
    parts = [" x ".join(f"{axis} {n}" for axis, n in mesh.items()) or "one device"]
    parts += [f"{schedule} pipeline"] if schedule != "none" else []
    if {"node", "gpu"} & mesh.keys():
      form = runtime.get("dispatch", {}).get("form", "?").replace("_", "-")
      parts.append(f"{'flat' if form == 'two-hop' and 'node' not in mesh else form} dispatch")
    parts += ["ZeRO-1"] if runtime.get("zero") else []
    rows.append(("mesh", ", ".join(parts)))
  if mesh and state:
    rows.append(("weights and moments", f"{state['device'] / 2**20:,.1f} MiB a device, "
                 f"{state['whole'] / 2**20:,.1f} MiB in all"))
  if runtime.get("recipe", "none") != "none":
    rows.append(("recipe", f"{runtime['recipe']}, {runtime.get('compute_dtype')} between layers"))
  return rows


def _numbers(run: Run) -> list[tuple[str, str, str]]:
  """Key numbers: (name, value, what it is)."""
  rows = []

  def add(name: str, value: float | None, form: str, note: str) -> None:
    if value is not None and np.isfinite(value):
      rows.append((name, form.format(value), note))

  def recent(values_N: np.ndarray) -> float | None:
    """The mean of the last steps."""
    finite = values_N[np.isfinite(values_N)][-window:]
    return float(finite.mean()) if finite.size else None

  window = plots.smoothing_window(len(run.train))
  over = f", mean of the last {window} steps" if window > 1 else ""
  evaluated = plots.column(run.evals, "loss")
  compressed = [v for name, v in plots.bits_per_byte(run) if name == "this model"]
  baselines = run.summary.get("baselines") or {}
  add("validation bits per byte", compressed[-1] if compressed else None, "{:.3f}",
      ", ".join(f"{k} {v:.3f}" for k, v in baselines.items() if isinstance(v, int | float)))
  best = np.nanmin(evaluated) if np.isfinite(evaluated).any() else None
  add("validation loss", _last(evaluated), "{:.3f}",
      "nats per token" if best is None else f"nats per token; best {best:.3f}")
  add("training loss", recent(plots.column(run.train, "loss")), "{:.3f}", f"nats per token{over}")
  add("next-token accuracy", recent(100 * plots.column(run.train, "accuracy")), "{:.1f} %",
      f"training, top 1{over}")
  for depth, value in enumerate(plots.matrix(run.train, "mtp_loss").T):
    add(f"MTP loss, depth {depth + 1}", recent(value), "{:.3f}",
        f"nats per token, training{over}")
  add("MaxVio", recent(plots.column(run.train, "max_vio")), "{:.3f}",
      f"worst layer, 0 is balanced{over}")
  speed, mfu = plots.timing(run, "tokens_per_s"), plots.timing(run, "mfu")
  if np.isfinite(speed).any():
    share = f"; MFU {np.nanmedian(mfu):.1%}" if np.isfinite(mfu).any() else ""
    add("tokens per second", float(np.nanmedian(speed)), "{:,.0f}", f"median of the steps{share}")
  if run.train:
    bad = _last(plots.column(run.train, "skipped"))
    if bad is not None:
      add("skipped steps", bad, "{:.0f}", "gradient was NaN or infinite")
  return rows


def _samples(run: Run) -> list[dict[str, str]]:
  """The summary's samples; "title" says how each was drawn."""
  rows = []
  for sample in run.summary.get("samples") or []:
    if isinstance(sample, dict):
      row = {k: str(sample.get(k) or "") for k in ("prompt", "suffix", "text", "reference")}
      temperature = sample.get("temperature")
      drawn = ("" if temperature is None else ", greedy" if temperature == 0 else
               f", temperature {temperature}")
      rows.append(row | {"title": f"{sample.get('kind') or 'sample'}{drawn}"})
  return rows


# --- Markdown -----------------------------------------------------------------------------------


def _markdown(run: Run, pictures: dict[str, str]) -> str:
  parts = [f"# {_one_line(_title(run))}", _status(run)[1]]
  parts += [f"> {gap}" for gap in _gaps(run)]
  parts.append(_markdown_table(("", ""), _facts(run)))
  numbers = _numbers(run)
  if numbers:
    parts += ["## Key numbers", _markdown_table(("", "value", ""), numbers)]
  rates = plots.bits_per_byte(run)
  for plot in _PLOTS:
    if plot.name in pictures:
      parts += [f"## {plot.title}", f"![{plot.title}](plots/{plot.name}.svg)", plot.caption]
      if plot.name == "bits_per_byte":
        parts.append(_markdown_table(("text model", "bits per byte"),
                                     [(n, f"{v:.4f}") for n, v in rates]))
  samples = _samples(run)
  if samples:
    parts.append("## Samples")
    for i, sample in enumerate(samples, 1):
      parts.append(f"### {i}. {_one_line(sample['title'])}")
      for key, name in (("prompt", "Given"), ("text", "Written by the model"),
                        ("suffix", "Given, after the gap"), ("reference", "In the original")):
        if sample[key]:
          parts += [f"{name}:", _fenced(sample[key])]
  if run.config:
    parts += ["## Config", _fenced(_config_text(run), "json")]
  return "\n\n".join(part for part in parts if part) + "\n"


def _markdown_table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
  if not rows:
    return ""
  lines = [head, ("---",) * len(head), *rows]
  return "\n".join(f"| {' | '.join(_markdown_cell(cell) for cell in line)} |" for line in lines)


def _markdown_cell(text: str) -> str:
  return _one_line(text).replace("|", "\\|")


def _one_line(text: str) -> str:
  """Text that cannot end its line, nor start HTML."""
  return " ".join(text.replace("\\", "\\\\").replace("<", "&lt;").split())


def _fenced(text: str, language: str = "") -> str:
  """A code block whose fence is longer than any run of backticks in the text."""
  longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
  fence = "`" * max(3, longest + 1)
  return f"{fence}{language}\n{text}\n{fence}"


# --- HTML ---------------------------------------------------------------------------------------


def _page(run: Run, pictures: dict[str, str]) -> str:
  state, sentence = _status(run)
  body = [f'<header><h1>{_escape(_title(run))}</h1>'
          f'<p class="status {state}"><span aria-hidden="true"></span>{_escape(sentence)}</p>'
          '</header>']
  gaps = _gaps(run)
  if gaps:
    body.append('<ul class="gaps">' + "".join(f"<li>{_escape(g)}</li>" for g in gaps) + "</ul>")
  numbers = _numbers(run)
  if numbers:
    cards = "".join(f"<div><dt>{_escape(n)}</dt><dd>{_escape(v)}</dd><p>{_escape(note)}</p></div>"
                    for n, v, note in numbers)
    body.append(f'<section><h2>Key numbers</h2><dl class="numbers">{cards}</dl></section>')
  facts = _facts(run)
  if facts:
    rows = "".join(f"<tr><th>{_escape(k)}</th><td>{_fact_html(k, v)}</td></tr>" for k, v in facts)
    body.append(f'<section><h2>The run</h2><div class="card scroll"><table class="facts">{rows}'
                '</table></div></section>')
  drawn = "".join(_plot_html(run, plot, pictures[plot.name]) for plot in _PLOTS
                  if plot.name in pictures)
  if drawn:
    body.append(f'<section><h2>Curves</h2><div class="plots">{drawn}</div></section>')
  samples = _samples(run)
  if samples:
    body.append('<section><h2>Samples</h2><p class="hint">Given text is plain, the model\'s is '
                f'<mark>marked</mark>.</p>{"".join(map(_sample_html, samples))}</section>')
  if run.config:
    body.append('<section><h2>Config</h2><details class="card"><summary>config.json</summary>'
                f"<pre>{_escape(_config_text(run))}</pre></details></section>")
  return _HTML.format(title=_escape(_title(run)), style=_CSS, body="\n".join(body))


def _plot_html(run: Run, plot: _Plot, svg: str) -> str:
  picture = plots.to_inline(svg, plot.title, plot.name)
  table = ""
  if plot.name == "bits_per_byte":
    rows = "".join(f"<tr><td>{_escape(n)}</td><td>{v:.4f}</td></tr>"
                   for n, v in plots.bits_per_byte(run))
    table = f'<table class="rates"><tr><th></th><th>bits per byte</th></tr>{rows}</table>'
  return (f'<figure class="card{" wide" if plot.wide else ""}"><h3>{_escape(plot.title)}</h3>'
          f'<div class="picture">{picture}</div>{table}'
          f"<figcaption>{_escape(plot.caption)}</figcaption></figure>")


def _sample_html(sample: dict[str, str]) -> str:
  text = (f"{_escape(sample['prompt'])}<mark>{_escape(sample['text']) or '&nbsp;'}</mark>"
          f"{_escape(sample['suffix'])}")
  reference = ""
  if sample["reference"]:
    reference = ("<details><summary>in the original</summary>"
                 f"<pre>{_escape(sample['reference'])}</pre></details>")
  return (f'<article class="card sample"><h3>{_escape(sample["title"])}</h3>'
          f"<pre>{text}</pre>{reference}</article>")


def _fact_html(name: str, value: str) -> str:
  text = _escape(value)
  return f"<code>{text}</code>" if name in ("command", "commit", "config hash") else text


def _escape(text: str) -> str:
  return html.escape(text, quote=True)


_HTML = """<!doctype html>
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


# --- words and numbers --------------------------------------------------------------------------


def _config_text(run: Run) -> str:
  return json.dumps(run.config, indent=2, sort_keys=True)


def _last(values_N: np.ndarray) -> float | None:
  finite = values_N[np.isfinite(values_N)]
  return float(finite[-1]) if finite.size else None


def _count(value: Any) -> str:
  return f"{value:,}" if isinstance(value, int) else str(value)


def _tokens(value: float) -> str:
  for size, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
    if value >= size:
      return f"{value / size:.3g}{suffix}"
  return f"{value:.0f}"


def _duration(seconds: float) -> str:
  whole = int(round(seconds))
  hours, minutes, rest = whole // 3600, whole % 3600 // 60, whole % 60
  if hours:
    return f"{hours} h {minutes:02d} min"
  return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
