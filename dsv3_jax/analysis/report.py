"""The report of one run: `report.md`, `report.html` and `plots/*.svg` in its workdir.

Everything is read from the workdir's own files, so the report of a run can be made again anywhere,
at any time, also while the run is going. The page is one file without scripts, fonts or links to
fetch: it opens offline. Equal files give an equal report.
"""

import dataclasses
import datetime
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from dsv3_jax import files
from dsv3_jax.analysis import numerics, page, plots, policy_plots
from dsv3_jax.analysis import workdir as workdir_lib
from dsv3_jax.analysis.page import escape
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
    *(_Plot(name, title, draw, policy_plots.CAPTIONS[name])
      for name, title, draw in policy_plots.ALL),
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
  done = f"{last['step']:,} steps, {page.tokens(last.get('tokens', 0))} tokens"
  if run.finished:
    return "done", f"Finished: {done}."
  if not planned:
    return "partial", f"{done}; how many were planned is unknown (config.json is missing)."
  share = last.get("tokens", 0) / planned
  return "partial", (f"Not finished: {done}, {share:.0%} of the {page.tokens(planned)} planned. "
                     "The same command goes on from the last checkpoint.")


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
    text = page.count(summary["parameters"])
    if summary.get("activated_parameters"):
      text += f", {page.count(summary['activated_parameters'])} activated a token"
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
    rows.append(("wall-clock time", page.duration(seconds)))
  metrics = run.workdir / "metrics.jsonl"
  if metrics.exists():
    last = datetime.datetime.fromtimestamp(metrics.stat().st_mtime, datetime.UTC)
    rows.append(("last metrics", f"{last:%Y-%m-%d %H:%M} UTC"))
  return rows


def _parallelism(runtime: dict[str, Any], state: dict[str, int]) -> list[tuple[str, str]]:
  """How the run was cut over devices; nothing of a run on one device in its compute dtype."""
  rows = []
  axes = runtime.get("mesh", {})
  names = ("pipe", "data", "context", "node", "gpu")
  mesh = {axis: axes[axis] for axis in names if axes.get(axis, 1) > 1}
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
  """The summary's samples, then outputs of the first and last rollouts; "title" says how drawn."""
  rows = _rolled(run)
  for sample in run.summary.get("samples") or []:
    if isinstance(sample, dict):
      row = {k: str(sample.get(k) or "") for k in ("prompt", "suffix", "text", "reference")}
      temperature = sample.get("temperature")
      drawn = ("" if temperature is None else ", greedy" if temperature == 0 else
               f", temperature {temperature}")
      rows.append(row | {"title": f"{sample.get('kind') or 'sample'}{drawn}"})
  return rows


def _rolled(run: Run) -> list[dict[str, str]]:
  """A problem's outputs in the first rollout and in the last, best and worst."""
  kept = policy_plots.transcripts(run.workdir)
  rows = []
  for row in (kept[0], kept[-1]) if len(kept) > 1 else kept:
    outputs = sorted(row["outputs"], key=lambda o: -o["reward"])
    for output in (outputs[0], outputs[-1]):
      rows.append({"title": f"rollout {row['rollout']}, {row['id']}: reward {output['reward']:.2f}",
                   "prompt": row["prompt"] + "\n", "text": output["text"], "suffix": "",
                   "reference": row["answer"]})
  return rows


# --- Markdown -----------------------------------------------------------------------------------


def _markdown(run: Run, pictures: dict[str, str]) -> str:
  parts = [f"# {page.one_line(_title(run))}", _status(run)[1]]
  parts += [f"> {gap}" for gap in _gaps(run)]
  parts.append(page.markdown_table(("", ""), _facts(run)))
  numbers = _numbers(run)
  if numbers:
    parts += ["## Key numbers", page.markdown_table(("", "value", ""), numbers)]
  rates = plots.bits_per_byte(run)
  for plot in _PLOTS:
    if plot.name in pictures:
      parts += [f"## {plot.title}", f"![{plot.title}](plots/{plot.name}.svg)", plot.caption]
      if plot.name == "bits_per_byte":
        parts.append(page.markdown_table(("text model", "bits per byte"),
                                         [(n, f"{v:.4f}") for n, v in rates]))
  samples = _samples(run)
  if samples:
    parts.append("## Samples")
    for i, sample in enumerate(samples, 1):
      parts.append(f"### {i}. {page.one_line(sample['title'])}")
      for key, name in (("prompt", "Given"), ("text", "Written by the model"),
                        ("suffix", "Given, after the gap"), ("reference", "In the original")):
        if sample[key]:
          parts += [f"{name}:", page.fenced(sample[key])]
  if run.config:
    parts += ["## Config", page.fenced(_config_text(run), "json")]
  return "\n\n".join(part for part in parts if part) + "\n"


# --- HTML ---------------------------------------------------------------------------------------


def _page(run: Run, pictures: dict[str, str]) -> str:
  state, sentence = _status(run)
  body = [f'<header><h1>{escape(_title(run))}</h1>'
          f'<p class="status {state}"><span aria-hidden="true"></span>{escape(sentence)}</p>'
          '</header>']
  gaps = _gaps(run)
  if gaps:
    body.append('<ul class="gaps">' + "".join(f"<li>{escape(g)}</li>" for g in gaps) + "</ul>")
  numbers = _numbers(run)
  if numbers:
    cards = "".join(f"<div><dt>{escape(n)}</dt><dd>{escape(v)}</dd><p>{escape(note)}</p></div>"
                    for n, v, note in numbers)
    body.append(f'<section><h2>Key numbers</h2><dl class="numbers">{cards}</dl></section>')
  facts = _facts(run)
  if facts:
    rows = "".join(f"<tr><th>{escape(k)}</th><td>{_fact_html(k, v)}</td></tr>" for k, v in facts)
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
                f"<pre>{escape(_config_text(run))}</pre></details></section>")
  return page.document(_title(run), body)


def _plot_html(run: Run, plot: _Plot, svg: str) -> str:
  picture = plots.to_inline(svg, plot.title, plot.name)
  table = ""
  if plot.name == "bits_per_byte":
    rows = "".join(f"<tr><td>{escape(n)}</td><td>{v:.4f}</td></tr>"
                   for n, v in plots.bits_per_byte(run))
    table = f'<table class="rates"><tr><th></th><th>bits per byte</th></tr>{rows}</table>'
  return page.figure(plot.title, picture, plot.caption, plot.wide, table)


def _sample_html(sample: dict[str, str]) -> str:
  text = (f"{escape(sample['prompt'])}<mark>{escape(sample['text']) or '&nbsp;'}</mark>"
          f"{escape(sample['suffix'])}")
  reference = ""
  if sample["reference"]:
    reference = ("<details><summary>in the original</summary>"
                 f"<pre>{escape(sample['reference'])}</pre></details>")
  return (f'<article class="card sample"><h3>{escape(sample["title"])}</h3>'
          f"<pre>{text}</pre>{reference}</article>")


def _fact_html(name: str, value: str) -> str:
  text = escape(value)
  return f"<code>{text}</code>" if name in ("command", "commit", "config hash") else text


# --- words and numbers --------------------------------------------------------------------------


def _config_text(run: Run) -> str:
  return json.dumps(run.config, indent=2, sort_keys=True)


def _last(values_N: np.ndarray) -> float | None:
  finite = values_N[np.isfinite(values_N)]
  return float(finite[-1]) if finite.size else None
