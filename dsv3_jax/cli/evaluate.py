"""`dsv3 eval`: a checkpoint on held-out text, any text, tasks and needles; experts by domain."""

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dsv3_jax.cli import measure
from dsv3_jax.config import ConfigError

SUMMARY = "validation loss, bits per byte, tasks, needles of a model; expert load by domain"
DESCRIPTION = (
    "Validation loss and bits per byte of a run's checkpoint, on the run's own held-out text,\n"
    "as one line of JSON.\n\n"
    "With --text, --tasks or --needle: of a run or a Hugging Face folder,\n"
    "  --text    bits per byte of any text. A document longer than the window is read in windows:\n"
    "            each after the first predicts the next --stride tokens and shows those before\n"
    "  --tasks   multiple choice by perplexity (accuracy, and by the probability per byte), and\n"
    "            texts to be written (exact match after normalisation, pass@k)\n"
    "  --needle  recall of a value told once in a long text, over length and depth\n"
    "as tables, or one line of JSON with --json; --out=DIR gets results.json with each sample,\n"
    "and the heat map of the needles.\n\n"
    "With --domains or --domain: loss and the load of each expert on several kinds of text, of\n"
    "one run or of several side by side (the report's figure 9: trained with an auxiliary loss,\n"
    "and without). Prints tables and writes domains.json, a page and heat maps. The default\n"
    "domains come from Python's standard library: code (without docstrings and comments),\n"
    "docstrings, tests, and tables (modules that are mostly literals); only files that no run\n"
    "compared was trained on, unless those are too few.")
EXAMPLES = (
    "  dsv3 eval runs/tiny\n"
    "  dsv3 eval runs/tiny --ema --batches=0\n"
    "  dsv3 eval runs/tiny --text=README.md --text='books/*.txt' --stride=64\n"
    "  dsv3 eval exported --tasks=experiments/tasks/small.jsonl --out=results\n"
    "  dsv3 eval runs/tiny --tasks=sums.jsonl --samples=20 --temperature=0.8 --pass-at=1,10\n"
    "  dsv3 eval runs/tiny --needle --lengths=128,256,512 --filler=stdlib --out=needles\n"
    "  dsv3 eval runs/tiny --domains\n"
    "  dsv3 eval runs/auxiliary runs/loss-free --domains=code,docstrings --out=figure9\n"
    "  dsv3 eval runs/tiny --domain=poems='texts/poems/*.txt' --domain=chats=chats.jsonl\n"
    "  dsv3 eval runs/*/domains/domains.json --out=joined        # what was measured, side by side")


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """The command's options."""
  parser.add_argument("workdir", nargs="*", metavar="WORKDIR",
                      help="of a run; with --domains several, or their domains.json; with --text, "
                           "--tasks or --needle also a Hugging Face folder")
  parser.add_argument("--step", type=int, metavar="N", help="checkpoint (default: the last)")
  parser.add_argument("--ema", action="store_true", help="the averaged parameters")
  parser.add_argument("--batches", type=int, metavar="N",
                      help="validation batches, 0 for all (default: the run's)")
  apart = parser.add_argument_group("by domain")
  apart.add_argument("--domains", nargs="?", const="all", metavar="A,B,...",
                     help="of the default corpus: code, docstrings, tests, tables (alone: all)")
  apart.add_argument("--domain", action="append", default=[], metavar="NAME=PATH",
                     help="a domain of your own: a file, folder or glob of text, .jsonl or "
                          ".parquet (may be repeated)")
  apart.add_argument("--tokens", type=int, metavar="N",
                     help="of each domain (default: 65536) or --text (default: all); 0 for all")
  apart.add_argument("--layers", metavar="L,M,...",
                     help="MoE layers to draw large, by number or name (default: two)")
  apart.add_argument("--out", metavar="DIR",
                     help="folder for the files (default, by domain: WORKDIR/domains of a single "
                          "run)")
  measure.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
  """Runs the command.

  Raises:
    ConfigError: unusable workdirs, options that do not go together, domains without text.
  """
  if not args.workdir:
    raise ConfigError("give the workdir of a run, before --domains (what follows that, unless it "
                      "begins with --, is taken for its value)")
  wanted = measure.asked(args)
  if wanted:
    if args.domains is not None or args.domain:
      raise ConfigError(f"--{wanted[0]} and domains are measured apart; leave one out")
    return measure.run(args, wanted)
  joined = all(os.path.isfile(path) for path in args.workdir)
  for path in args.workdir if not joined else ():
    if not (Path(path) / "checkpoints").is_dir():
      why = "holds no checkpoints/" if Path(path).is_dir() else "is not a folder"
      pool = f", as those in {Path(path) / 'arms'}" if (Path(path) / "arms").is_dir() else ""
      raise ConfigError(f"{path} {why}; give the workdir of a run{pool}")
  if args.domains is not None or args.domain or joined:
    return _by_domain(args, joined)
  for name in ("tokens", "layers", "out"):
    if getattr(args, name) is not None:
      others = {"tokens": ", --text", "out": ", --text, --tasks, --needle"}.get(name, "")
      raise ConfigError(f"--{name} goes with --domains or --domain{others}")
  if len(args.workdir) > 1:
    raise ConfigError("several runs are compared by domain: add --domains")
  return _validation(args)


def _validation(args: argparse.Namespace) -> int:
  from dsv3_jax.train import evaluate, loop

  loop.use_compilation_cache()
  found = evaluate.find(args.workdir[0], args.step)
  data = found.config.data
  limit = found.config.train.eval_batches if args.batches is None else args.batches
  batches = found.corpus.validation_batches(data.micro_batch, limit)
  size = sum(evaluate.target_bytes(b, found.corpus.tokenizer.token_bytes_V) for b in batches)
  if not size:
    raise ConfigError(f"{found.workdir}: no text is held out (data.validation_fraction="
                      f"{data.validation_fraction:g}), so there is nothing to evaluate on")
  values = evaluate.evaluate(*evaluate.load(found, args.ema), batches, size)
  del values["counts_LE"]
  print(json.dumps({"step": found.meta["step"], "ema": args.ema, "bytes": size, **values}))
  return 0


# --- by domain ----------------------------------------------------------------------------------


def _by_domain(args: argparse.Namespace, joined: bool) -> int:
  names, own = _domains(args)
  if joined and (names or own or args.step is not None or args.ema or args.tokens is not None):
    raise ConfigError("what is in a domains.json was measured already; give workdirs to measure "
                      "anew, or --out and --layers alone")
  if not (names or own or joined):
    raise ConfigError("--domains= names no domain; leave the value out for all")
  if args.batches is not None:
    raise ConfigError("--batches counts validation batches; --tokens says how much of a domain")
  if args.tokens is not None and args.tokens < 0:
    raise ConfigError(f"--tokens={args.tokens} must not be negative; 0 takes all")
  if not args.out and (joined or len(args.workdir) > 1):
    raise ConfigError("several runs: say with --out=DIR where their comparison goes")
  from dsv3_jax.analysis import expert_load, expert_load_plots

  layers = [name for name in (args.layers or "").split(",") if name]
  if joined:
    runs = [r for path in args.workdir for r in expert_load.read(path)]
  else:
    check = lambda names: expert_load_plots.choose(names, layers)
    runs = [expert_load.numbers(m) for m in _measure(args, names, own, check)]
  values = expert_load.join(runs)
  out = Path(args.out) if args.out else Path(args.workdir[0]) / expert_load_plots.NAME
  _print(values)
  print(expert_load_plots.write(values, out, layers))
  return 0


def _domains(args: argparse.Namespace) -> tuple[list[str], list[tuple[str, str]]]:
  """Names of default domains, and (name, path) of a person's own."""
  from dsv3_jax.data import domains as domains_lib

  names = [name for name in (args.domains or "").split(",") if name]
  names = list(domains_lib.DEFAULT) if names == ["all"] else names
  try:
    domains_lib.check_names(names)
  except ConfigError as error:
    raise ConfigError(f"--domains={args.domains}: {error} (your own text: --domain=NAME=PATH; a "
                      "workdir stands before --domains)") from None
  own = []
  for text in args.domain:
    name, equals, path = text.partition("=")
    if not (name and equals and path):
      raise ConfigError(f"--domain={text}: write NAME=PATH")
    own.append((name, path))
  every = names + [name for name, _ in own]
  twice = sorted({name for name in every if every.count(name) > 1})
  if twice:
    raise ConfigError(f"two domains are called {twice[0]!r}; name one of them otherwise")
  return names, own


def _measure(args: argparse.Namespace, names: list[str], own: list[tuple[str, str]],
             check: Callable[[list[list[str]]], Any]) -> list[dict[str, Any]]:
  """`domains.measure` of each run; `check` is called with their layers before the work begins."""
  from dsv3_jax.train import domains, evaluate, loop

  loop.use_compilation_cache()  # the arms of a sweep are one program
  tokens = domains.TOKENS if args.tokens is None else args.tokens
  tty = sys.stderr.isatty()

  def say(line: str) -> None:
    print(f"\r{line:<70}" if tty else line, end="" if tty else "\n", file=sys.stderr, flush=True)

  runs = [evaluate.find(path, args.step) for path in args.workdir]
  check([domains.layer_names(run.config.model) for run in runs])
  say("looking for the domains' text")
  found = domains.collect(runs, names, own, tokens)
  for domain in found:
    if not domain.documents:
      say("")
      print(f"{domain.name}: skipped, this Python's library has no such files", file=sys.stderr)
  found = [domain for domain in found if domain.documents]
  if not found:
    raise ConfigError("no domain has any text; give text of your own: --domain=NAME=PATH")
  measured = [domains.measure(r, found, tokens, args.ema,
                              lambda name, r=r: say(f"{r.workdir}: {name}")) for r in runs]
  if tty:
    say("")
    print("\r", end="", file=sys.stderr)
  return measured


def _print(values: dict[str, Any]) -> None:
  from rich import box
  from rich.console import Console
  from rich.table import Table

  from dsv3_jax.analysis import expert_load

  console = Console(width=None if sys.stdout.isatty() else 120)
  tables = [(run["name"], expert_load.HEAD, expert_load.rows(run)) for run in values["runs"]]
  tables.append(("all domains", expert_load.COMPARISON, expert_load.comparison(values)))
  for title, head, rows in tables:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for i, name in enumerate(head):
      wide = i == 0 or name == expert_load.HEAD[-1]
      table.add_column(name, justify="left" if wide else "right", overflow="fold")
    for cells in rows:
      table.add_row(*cells)
    console.print(table)
  for text in expert_load.warnings(values):
    console.print(f"! {text}", highlight=False, markup=False)
