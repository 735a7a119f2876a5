"""`dsv3 cost`: what a run costs, from its config. Without jax."""

import argparse
import dataclasses
import json
import sys
from typing import TYPE_CHECKING, Any

from dsv3_jax.cli.configs import load_config
from dsv3_jax.config import Config, ConfigError
from dsv3_jax.readable import duration, size

if TYPE_CHECKING:
  from rich.console import Console

SUMMARY = "what a run costs: FLOPs, memory, traffic, step time, GPU-hours"
DESCRIPTION = (
    "Computes what one step of a config costs on a device and a mesh, and what the whole run\n"
    "does: parameters, FLOPs a token, memory of a device by component, bytes between devices, the\n"
    "step's time split as the report's authors measured it, GPU-hours and dollars. The mesh,\n"
    "schedule, recipe and remat are the config's (runtime.mesh, runtime.pipeline, ...); --gpus=N\n"
    "changes the number of data-parallel parts.\n\n"
    "The time is a prediction from data sheets and published measurements of single kernels\n"
    "(dsv3_jax/cost/hardware.py says which); no whole step was fitted. Kernel launches are not\n"
    "counted: models of a few million parameters come out too fast on a GPU. For the report's\n"
    "model the report's numbers stand beside ours, with the error and its reasons.\n\n"
    "--hardware: h800, h100, h200, b200, v5p, ironwood; cpu, measured here in a moment; or a JSON\n"
    "file with the fields of dsv3_jax/cost/hardware.py, all or those that differ from a \"base\":\n"
    "  {\"base\": \"h100\", \"name\": \"ours\", \"slow\": 25e9, \"price\": 1.8}\n\n"
    "--what-if:\n"
    "  slow=FACTOR, fast=FACTOR   links between or within nodes so many times as fast\n"
    "  sms=N                      processors given to communication (0: a co-processor does it)\n"
    "  native_scales              block scales and fp32 sums in the matrix units; an upper bound\n"
    "  accumulation               wider sums alone\n"
    "  fused_cast                 FP8 casts on the way into the chip\n"
    "  transposed_reads           operands read transposed\n"
    "  unified                    fast links between all devices")
EXAMPLES = (
    "  dsv3 cost --config=experiments/v3_671b.py\n"
    "  dsv3 cost --config=experiments/v3_671b.py --gpus=2048 --hardware=h100 --price=2.5\n"
    "  dsv3 cost --config=experiments/v3_671b.py --what-if\n"
    "  dsv3 cost --config=experiments/v3_671b.py --what-if=slow=2,sms=0,fused_cast\n"
    "  dsv3 cost --config=experiments/tiny.py --hardware=cpu\n"
    "  dsv3 cost --config=experiments/moe_16b.py --hardware=mine.json --json\n"
    "  dsv3 cost --config=experiments/v3_671b.py --plot=cost.svg \\\n"
    "    --config.runtime.pipeline.schedule=zb1p --config.runtime.pipeline.layers='()'")
OVERRIDABLE = True
WIDTH = 118


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """The command's options."""
  parser.add_argument("--config", required=True, metavar="FILE[:ARG]",
                      help="experiment file; ARG goes to its get_config(arg)")
  parser.add_argument("--config.KEY", metavar="VALUE", dest="ignored",
                      help="override one value, for example --config.runtime.mesh.pipe=8")
  parser.add_argument("--hardware", default="", metavar="NAME|FILE",
                      help="device (default: h800, the report's; cpu where the config is for one "
                           "device and computes in float32)")
  parser.add_argument("--gpus", type=int, metavar="N",
                      help="devices (default: those of runtime.mesh)")
  parser.add_argument("--price", type=float, metavar="DOLLARS",
                      help="of a device and hour (default: $2 for h800, else not stated)")
  parser.add_argument("--what-if", action="append", nargs="?", const="", metavar="CHANGE,...",
                      dest="what_if",
                      help="also the step's time after changes of the hardware, each alone and all "
                           "together (see above); without a value the report's suggestions")
  parser.add_argument("--check", action="store_true",
                      help="the comparison with the report alone (its model only)")
  parser.add_argument("--json", action="store_true", help="print everything as JSON")
  parser.add_argument("--plot", metavar="FILE",
                      help="picture to write (.svg, .png or .pdf): step time, memory, cost against "
                           "the number of devices")


def run(args: argparse.Namespace) -> int:
  """Runs the command.

  Raises:
    ConfigError: a config that cannot run, or hardware, devices or changes that there are not.
  """
  from dsv3_jax import cost
  from dsv3_jax.cost import check, cluster, whatif

  cfg = load_config(args.config, args.overrides)
  if args.check and not check.is_reported(cfg.model):
    raise ConfigError(f"--check compares with the report's model; {args.config} is another")
  hw = _hardware(args, cfg)
  given = cfg
  if args.gpus is not None:
    cfg = cluster.on(cfg, args.gpus)
  texts = _texts(args.what_if)
  for text in texts:
    whatif.apply(text, hw)  # complains now, not after the rest
  if args.plot:
    from dsv3_jax.analysis import schedule_plot

    schedule_plot.check_suffix(args.plot)
  try:
    found = cost.estimate(cfg, hw)
  except ConfigError:
    raise
  except ValueError as error:  # schedules and stages name what they miss, not the keys
    raise ConfigError(f"runtime.pipeline and runtime.mesh.pipe: {error}") from error
  content = _content(args, cfg, found, texts, whatif) | {"notes": cluster.notes(given, cfg)}
  if args.plot:
    content["scaling"] = _scaling(cfg, hw)
    from dsv3_jax.analysis import cost_plot

    cost_plot.write(content, args.plot)
  if args.json:
    print(json.dumps(content, indent=1))
    return 0
  _print(args, content)
  if args.plot:
    print(args.plot)
  return 0


def _hardware(args: argparse.Namespace, cfg: Config) -> Any:
  from dsv3_jax.cost import hardware

  alone = cfg.runtime.mesh.devices == 1 and cfg.runtime.compute_dtype == "float32"
  hw = hardware.get(args.hardware or ("cpu" if alone and args.gpus in (None, 1) else "h800"))
  return hw if args.price is None else dataclasses.replace(hw, price=args.price)


def _texts(given: list[str] | None) -> tuple[str, ...]:
  """The changes asked for; `--what-if` alone means the suggested ones."""
  from dsv3_jax.cost import whatif

  texts: list[str] = []
  for value in given or ():
    texts += [t.strip() for t in value.split(",") if t.strip()] if value else whatif.SUGGESTED
  return tuple(dict.fromkeys(texts))


def _content(args: argparse.Namespace, cfg: Config, found: Any, texts: tuple[str, ...],
             whatif: Any) -> dict[str, Any]:
  """All that is printed, as plain data."""
  from dsv3_jax import config, counts
  from dsv3_jax.cost import budget, check, memory, needed

  hw, reported = found.hardware, check.is_reported(cfg.model)
  parameters, active = counts.parameters(cfg.model), counts.activated_parameters(cfg.model)
  mesh, runtime = cfg.runtime.mesh, cfg.runtime
  rows = check.rows() if reported else []
  return {
      "config": args.config, "overrides": [list(pair) for pair in args.overrides],
      "fingerprint": config.fingerprint(cfg),
      "model": {"parameters": parameters, "activated": active,
                "cache_bytes_per_token": memory.cache_bytes(cfg.model, 1)},
      "mesh": dataclasses.asdict(mesh), "recipe": runtime.recipe, "remat": runtime.remat,
      "sequence_length": cfg.data.sequence_length, "batch_size": cfg.data.batch_size,
      **found.to_dict(),
      "memory": memory.estimate(cfg, "cpu" if hw.name.lower().startswith("cpu") else "gpu"
                                ).to_dict(),
      "memory_needed": needed.estimate(cfg).to_dict(),
      "budget": [dataclasses.asdict(p) for p in budget.training(cfg, hw, extended=reported)],
      "what_if": [c._asdict() for c in (whatif.changes(cfg, hw, texts) if texts else ())],
      "report": [dataclasses.asdict(r) | {"error": r.error, "within": r.within} for r in rows]}


def _scaling(cfg: Config, hw: Any) -> list[dict[str, Any]]:
  """Pre-training on a quarter to four times as many devices, where that can run."""
  from dsv3_jax.cost import budget, cluster

  points = []
  for factor in (0.25, 0.5, 1, 2, 4):
    devices = cfg.runtime.mesh.devices * factor
    try:
      phase = budget.pretraining(cluster.on(cfg, int(devices)), hw)
    except ValueError:
      continue
    points.append({"devices": devices, "gpu_hours": phase.gpu_hours, "seconds": phase.seconds,
                   "time": duration(phase.seconds)})
  return points


# --- printing -----------------------------------------------------------------------------------


def _print(args: argparse.Namespace, content: dict[str, Any]) -> None:
  from rich.console import Console

  console = Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False, markup=False)
  if not args.check:
    _head(console, content)
    _flops(console, content)
    _memory(console, content)
    _traffic(console, content)
    _step(console, content)
    _budget(console, content)
    _what_if(console, content)
  _report(console, content)


def _table(console: "Console", title: str, head: tuple[str, ...], rows: list[tuple[str, ...]],
           note: str = "", left: tuple[int, ...] = (0,)) -> None:
  from rich import box
  from rich.table import Table

  table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
  for i, name in enumerate(head):
    table.add_column(name, justify="left" if i in left else "right",
                     overflow="fold" if i in left else "ellipsis", no_wrap=i not in left)
  for row in rows:
    table.add_row(*row)
  console.print(title, style="bold")
  console.print(table)
  console.print(f"{note}\n" if note else "")


def _head(console: "Console", c: dict[str, Any]) -> None:
  from rich.text import Text

  mesh = " x ".join(f"{axis} {n}" for axis, n in c["mesh"].items() if n > 1) or "one device"
  pipeline, model = c["pipeline"], c["model"]
  console.print(Text.assemble(
      (c["config"], "bold"), f" on {c['devices']:,} {c['hardware']['name']}: {mesh}; "
      f"schedule {pipeline['schedule']}, {pipeline['microbatches']} micro-batches, "
      f"recipe {c['recipe']}, remat {c['remat']}"))
  if c["hardware"]["note"]:
    console.print(f"{c['hardware']['name']}: {c['hardware']['note']}")
  for note in c["notes"]:
    console.print(f"Note: {note}")
  mtp = model["parameters"]["mtp"]
  console.print(f"{model['parameters']['main']:,} parameters, {model['activated']['main']:,} "
                f"activated a token" + (f"; MTP {mtp:,} more" if mtp else "")
                + f"; cache {model['cache_bytes_per_token']:,} bytes a token in bf16\n")


def _flops(console: "Console", c: dict[str, Any]) -> None:
  flops = c["flops_per_token"]
  parts = flops["by_component_causal_with_mtp"]
  total = sum(parts.values())
  rows = [(name, size(value, "FLOP"), f"{value / total:.1%}")
          for name, value in sorted(parts.items(), key=lambda item: -item[1]) if value]
  rows.append(("all", size(total, "FLOP"), ""))
  _table(console, "Training FLOPs a token, causal, with MTP", ("component", "", "share"), rows,
         f"Without MTP, as the report counts: {size(flops['causal'], 'FLOP')} causal, "
         f"{size(flops['noncausal'], 'FLOP')} non-causal. Recomputed besides: "
         f"{size(flops['recomputed'], 'FLOP')}.")


def _memory(console: "Console", c: dict[str, Any]) -> None:
  held, names = c["hardware"]["memory"], {"memory": "this code's program"}
  if c["devices"] > 1:  # fixed buffers and one program for all ranks cost there
    names = {"memory_needed": "the plan needs"} | names
  worst = {key: max(c[key]["ranks"], key=lambda r: r["total"]) for key in names}
  first = next(iter(worst.values()))
  rows = [(part, *(size(rank["parts"].get(part, 0)) for rank in worst.values()))
          for part in first["parts"] if any(rank["parts"].get(part) for rank in worst.values())]
  rows.append(("all", *(size(rank["total"]) for rank in worst.values())))
  rows.append((f"of {size(held)}", *(f"{rank['total'] / held:.1%}" for rank in worst.values())))
  over = [names[key] for key, rank in worst.items() if rank["total"] > held]
  note = (f"Does not fit: {' and '.join(over)}. Try runtime.remat, a smaller data.microbatch or "
          "another mesh." if over else "")
  if c["devices"] > 1:
    note = ("What the plan needs at least, and what this code's one program for all ranks holds "
            "(dsv3_jax/cost/memory.py). " + note)
  _table(console, "Memory of the fullest device", ("component", *names.values()), rows, note)


def _traffic(console: "Console", c: dict[str, Any]) -> None:
  rows = [(name.replace("_", " "), size(e["slow"]), size(e["fast"]), duration(e["seconds"]))
          for name, e in c["layer_all_to_all"].items() if e["seconds"]]
  if rows:
    _table(console, "All-to-alls of an MoE layer and micro-batch, sent by each device",
           ("", "slow links", "fast links", "time alone"), rows,
           "combine back: gradients sent out, as a dispatch; dispatch back: sums, as a combine.")


def _step(console: "Console", c: dict[str, Any]) -> None:
  names = {"1F": "1F: forward, not overlapped", "1B": "1B: backward, not overlapped",
           "1W": "1W: weights' gradients apart", "1F1B": "1F1B: overlapped pairs",
           "bubble": "bubble: idle", "optimizer": "optimizer: reduce, update, gather"}
  rows = [(names[name], duration(value), f"{value / c['step_s']:.1%}")
          for name, value in c["breakdown_s"].items() if value > 1e-9 * c["step_s"]]
  rows.append(("step", duration(c["step_s"]), ""))
  mfu, rate = c["mfu"], c["flops_per_second_per_device"]
  day = 86400 / c["step_s"] * c["tokens_per_step"]
  formula, bubble = c["pipeline"]["formula_bubble_s"], c["breakdown_s"]["bubble"]
  idle = ""
  if c["pipeline"]["ranks"] > 1:
    idle = f" Table 2's bubble, for equal stages: {duration(formula)}."
    if bubble > 1.5 * formula:
      idle += (" The stages are far from equal (the last one has MTP and the heads): "
               "runtime.pipeline.layers can shift layers.")
  _table(console, f"A step of {c['tokens_per_step']:,} tokens, mean over pipeline ranks",
         ("", "time", "share"), rows,
         f"{c['tokens_per_second_per_device']:,.0f} tokens/s a device, {day:,.4g} tokens a day in "
         f"all. Causal {size(rate['causal'], 'FLOP/s')}, MFU {mfu['causal']:.2%}; non-causal "
         f"{size(rate['noncausal'], 'FLOP/s')}, {mfu['noncausal']:.2%} (without MTP, as the report "
         f"counts; {mfu['causal_with_mtp']:.2%} causal with it).{idle}")


def _budget(console: "Console", c: dict[str, Any]) -> None:
  rows, hours, dollars = [], 0.0, 0.0
  for p in c["budget"]:
    hours, dollars = hours + p["gpu_hours"], dollars + (p["dollars"] or 0)
    rows.append((p["name"], f"{p['tokens']:.4g}" if p["tokens"] else "",
                 f"{p['steps']:,.0f}" if p["steps"] else "", duration(p["seconds"]),
                 f"{p['gpu_hours']:,.4g}" if p["gpu_hours"] < 1e3 else f"{p['gpu_hours']:,.0f}",
                 f"{p['dollars']:,.0f}" if p["dollars"] is not None else "-", p["note"]))
  price = c["hardware"]["price"]
  if len(rows) > 1:
    rows.append(("all", "", "", "", f"{hours:,.0f}", f"{dollars:,.0f}" if price else "-", ""))
  _table(console, "Whole training", ("", "tokens", "steps", "time", "device-hours", "dollars",
                                     "note"), rows,
         f"${price:g} a device and hour." if price else "--price=DOLLARS an hour gives dollars.",
         left=(0, 6))


def _what_if(console: "Console", c: dict[str, Any]) -> None:
  if c["what_if"]:
    share = lambda w: f"{-w['gain'] / c['step_s']:+.1%}"
    rows = [(w["name"], duration(w["step"]), f"{-w['gain']:+.4g}", share(w), w["meaning"])
            for w in c["what_if"]]
    _table(console, f"What if (step now: {duration(c['step_s'])})",
           ("change", "step", "seconds", "", "meaning"), rows, left=(0, 4))


def _report(console: "Console", c: dict[str, Any]) -> None:
  if not c["report"]:
    return
  rows = [(f"{r['what']}, {r['unit']}", f"{r['report']:,.5g}", f"{r['ours']:,.5g}",
           "given" if r["given"] else f"{r['error']:+.1%}", f"{r['bound']:.2g}", r["why"])
          for r in c["report"]]
  _table(console, "The report's plan: 2,048 H800, DualPipe on 16 ranks, experts over 64",
         ("", "report", "ours", "error", "bound", "why"), rows,
         "Nothing is fitted to the step or to the hours. Shares of the peaks come from published "
         "measurements of single kernels, some of them in the trace of a pair of 4 layers: "
         "dsv3_jax/cost/hardware.py. Overrides do not change this table.", left=(0, 5))
