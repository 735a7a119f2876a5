"""The `dsv3` command.

This file alone turns what a person types into a `Config`: an experiment's `get_config(arg)` gives a
locked ConfigDict, `--config.key=value` overrides it, and `config.from_dict` checks the whole. All
of that happens before jax is imported, so a mistake costs no start-up time.

Exit codes: 0 done; 2 bad input and 1 a run that cannot go on, both with a message that says what to
do; 130 or 143 interrupted by SIGINT or SIGTERM (training saves a checkpoint first). Anything
unexpected keeps its traceback (and Python's exit code 1).
"""

import argparse
import ast
import dataclasses
import difflib
import importlib.util
import inspect
import json
import os
import re
import shlex
import sys
import types
import typing
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from dsv3_jax import __version__, cli_schedule
from dsv3_jax import config as config_lib
from dsv3_jax.config import Config, ConfigError

OVERRIDE = "--config."


def main(argv: Sequence[str] | None = None) -> None:
  """Entry point of the console script; leaves with the exit code."""
  sys.exit(run(sys.argv[1:] if argv is None else argv))


def run(argv: Sequence[str]) -> int:
  """Runs one command line and returns its exit code; see the file's docstring for the codes.

  Raises:
    SystemExit: from argparse, for --help (0) and for an unknown command or option (2).
  """
  parser = _parser()
  _refuse_misspelt(parser, argv)
  args, rest = parser.parse_known_args(argv)
  if rest and not (args.overridable and rest[0].startswith(OVERRIDE)):
    args.parser.error(f"unknown argument {rest[0]!r}")
  try:
    if args.overridable:
      args.overrides = _pair_overrides(rest)
    args.command_line = shlex.join(["dsv3", *argv])
    return args.run(args)
  except KeyboardInterrupt:
    print("dsv3: interrupted", file=sys.stderr)
    return 130
  except BrokenPipeError:  # `dsv3 ... | head`
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the flush at exit has a place
    return 141
  except Exception as error:
    if not _is_for_user(error):
      raise
    print(f"dsv3: error: {_message(error)}", file=sys.stderr)
    return 2 if isinstance(error, ValueError | OSError) else 1


def _is_for_user(error: Exception) -> bool:
  """Whether the message says all: an error class of this package, or a file's trouble.

  A plain ValueError is for the user (CONTRIBUTING.md) where this package raised it; one that comes
  from inside jax or numpy is a fault of ours, whose traceback is needed.
  """
  if type(error).__module__.startswith("dsv3_jax."):
    return True
  if isinstance(error, OSError):
    return error.filename is not None
  trace = error.__traceback__
  while trace is not None and trace.tb_next is not None:
    trace = trace.tb_next
  module = trace.tb_frame.f_globals.get("__name__", "") if trace is not None else ""
  return isinstance(error, ValueError) and module.startswith("dsv3_jax.")


def _message(error: Exception) -> str:
  return f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else str(error)


# --- commands -----------------------------------------------------------------------------------


def _train(args: argparse.Namespace) -> int:
  config = load_config(args.config, args.overrides)
  if args.print_config:
    print(config_lib.to_json(config))
    return 0
  workdir = Path(args.workdir) if args.workdir else default_workdir(args.config)
  from dsv3_jax import files, train  # jax starts here
  from dsv3_jax.analysis import report
  from dsv3_jax.train import launch

  found = launch.find(args.coordinator, args.processes, args.process, patience=args.patience,
                      start_timeout=args.start_timeout)
  result = train.run(config, str(workdir), **({"launch": found} if found else {}))
  if result.first:
    files.write_atomic(workdir / "command.txt", args.command_line + "\n")
    print(f"report: {report.write(workdir)}")
  return result.exit_code


def _eval(args: argparse.Namespace) -> int:
  if not (Path(args.workdir) / "checkpoints").is_dir():
    why = "holds no checkpoints/" if Path(args.workdir).is_dir() else "is not a folder"
    raise ConfigError(f"{args.workdir} {why}; give the workdir of a run")
  from flax import nnx

  from dsv3_jax.data import pipeline
  from dsv3_jax.train import checkpoint, evaluate, state

  params, buffers, meta = checkpoint.load_params(args.workdir, args.step, args.ema)
  config = config_lib.from_dict(meta["config"])
  limit = config.train.eval_batches if args.batches is None else args.batches
  corpus = pipeline.prepare(config.data, config.model.vocab_size, args.workdir)
  trained_on = (meta["iterator"] or {}).get("corpus", corpus.fingerprint)
  if corpus.fingerprint != trained_on:
    raise ConfigError(f"{args.workdir} was trained on corpus {trained_on}, its data now give "
                      f"{corpus.fingerprint}: the files of data.sources or the tokenizer changed, "
                      "so that held-out text may have been trained on; bring them back")
  rows = config.data.microbatch or config.data.batch_size
  batches = corpus.validation_batches(rows, limit)
  size = sum(evaluate.target_bytes(b, corpus.tokenizer.token_bytes_V) for b in batches)
  if not size:
    raise ConfigError(f"{args.workdir}: no text is held out (data.validation_fraction="
                      f"{config.data.validation_fraction:g}), so there is nothing to evaluate on")
  graphdef = state.split(nnx.eval_shape(lambda: state.build_model(config.model, seed=0)))[0]
  sums = evaluate.make_evaluate(graphdef, config)
  found = evaluate.evaluate(sums, params, buffers, batches, size)
  del found["counts_LE"]
  print(json.dumps({"step": meta["step"], "ema": args.ema, "bytes": size, **found}))
  return 0


def _report(args: argparse.Namespace) -> int:
  from dsv3_jax.analysis import report

  print(report.write(args.workdir))
  return 0


def _tokenize(args: argparse.Namespace) -> int:
  from dsv3_jax.data import tokenize

  last = [""]

  def progress(stage: str, done: int, total: int) -> None:
    share = f"{done / total:4.0%} of {total / 1e6:,.1f} MB" if total else f"{done / 1e6:,.1f} MB"
    if sys.stderr.isatty():
      print(f"\r{stage}: {share}   ", end="", file=sys.stderr, flush=True)
    elif stage != last[0]:
      print(f"{stage} ...", file=sys.stderr)
    last[0] = stage

  made = tokenize.tokenize(args.source, args.tokenizer, args.out, text_key=args.text_key,
                           max_document_bytes=args.max_document_bytes,
                           vocab_size=args.vocab_size, progress=progress)
  if sys.stderr.isatty() and last[0]:
    print(file=sys.stderr)
  tokens = sum(made.index["shards"])
  if made.index.get("skipped"):
    print(f"left out: {tokenize.counts(made.index['skipped'])}")
  print(f"{args.out}: {len(made):,} documents, {tokens:,} tokens; use it with "
        f"--config.data.sources=shards:{args.out}")
  return 0


def _convert(args: argparse.Namespace) -> int:
  source, target = Path(args.source), Path(args.target)
  is_run = (source / "checkpoints").is_dir()
  if not is_run and not (source / "config.json").is_file():
    raise ConfigError(f"{source} holds neither checkpoints/ nor config.json; give the workdir of a "
                      "run or a Hugging Face model folder")
  to = args.to or ("hf" if is_run else "workdir")
  if is_run and to == "workdir":
    raise ConfigError(f"{source} is a workdir already; --to=hf exports it")
  if not is_run and (args.step is not None or args.ema):
    raise ConfigError(f"--step and --ema choose a checkpoint; {source} is a model folder")
  if to == "workdir" and args.dtype not in (None, "float32"):
    raise ConfigError(f"--dtype={args.dtype}: the parameters of a workdir are float32")
  if to == "workdir" and args.quantization == "fp8":
    raise ConfigError("--quantization=fp8: the parameters of a workdir are float32; runtime.recipe "
                      "makes a run compute in FP8")
  if to == "hf" and args.config is not None:
    raise ConfigError("--config goes with --to=workdir")
  (_export if is_run else _rewrite if to == "hf" else _import)(source, target, args)
  return 0


def _export(workdir: Path, target: Path, args: argparse.Namespace) -> None:
  """A run's checkpoint as a Hugging Face folder, with its tokenizer."""
  from flax import nnx

  from dsv3_jax.data.tokenizer import Tokenizer
  from dsv3_jax.interop import huggingface
  from dsv3_jax.train import checkpoint, state

  params, buffers, meta = checkpoint.load_params(str(workdir), args.step, args.ema)
  config = config_lib.from_dict(meta["config"])
  graphdef = state.split(nnx.eval_shape(lambda: state.build_model(config.model, seed=0)))[0]
  model = nnx.merge(graphdef, params, buffers)
  file = workdir / "tokenizer.json"
  tokens = {}
  if file.is_file():
    tokenizer = Tokenizer.load(str(file))
    tokens = dict(tokenizer=file, bos_token_id=tokenizer.bos, eos_token_id=tokenizer.eos)
  huggingface.save(model, target, args.dtype, quantization=args.quantization, **tokens)
  print(target)


def _rewrite(source: Path, target: Path, args: argparse.Namespace) -> None:
  """A Hugging Face folder in another dtype, quantized or dequantized."""
  from dsv3_jax.interop import hf_config, huggingface, safetensors_files

  # One dtype that loses nothing; the tensors that are fp32 in any case have no say.
  found = {stored.dtype.name for name, stored in safetensors_files.scan(source).items()
           if not name.endswith(("_scale_inv", "e_score_correction_bias"))} - {"float8_e4m3fn"}
  dtype = found.pop() if found in ({"bfloat16"}, {"float16"}) else "float32"
  if args.quantization == "fp8":  # weights that are FP8 already keep every bit
    model, dtype = huggingface.load(source, quantized="keep"), args.dtype
  else:
    model, dtype = huggingface.load(source, args.dtype or dtype), None
  values = hf_config.read_json(source / "config.json")
  file = source / "tokenizer.json"
  huggingface.save(model, target, dtype, quantization=args.quantization,
                   tokenizer=file if file.is_file() else None,
                   bos_token_id=values.get("bos_token_id"), eos_token_id=values.get("eos_token_id"))
  print(target)


def _import(source: Path, target: Path, args: argparse.Namespace) -> None:
  """A Hugging Face folder as a workdir whose checkpoint of step 0 holds its parameters."""
  config = load_config(args.config) if args.config else Config()
  if target.exists() and (not target.is_dir() or any(target.iterdir())):
    raise ConfigError(f"{target} exists already; remove it or choose another folder")

  from dsv3_jax.interop import huggingface
  from dsv3_jax.train import checkpoint, optim, state
  from dsv3_jax.train.workdir import Workdir

  model = huggingface.load(source, "float32")
  changes: dict[str, Any] = {"model": model.cfg}
  tokenizer = source / "tokenizer.json"
  if tokenizer.is_file() and not config.data.tokenizer:
    changes["data.tokenizer"] = str(tokenizer.resolve())
  config = config_lib.replace(config, **changes)
  _, params, buffers = state.split(model)
  fresh = state.make_state(params, buffers, optim.make_optimizer(config.optim))
  with Workdir(str(target), config):
    saver = checkpoint.Checkpoints(str(target))
    saver.save(fresh, {"step": 0, "tokens": 0, "elapsed_s": 0.0, "val_loss": None,
                       "iterator": None, "config": config_lib.to_dict(config)})
    saver.close()
  print(f"{target}; train it with: dsv3 train --config={target / 'config.json'} "
        f"--workdir={target}")


def _numerics(args: argparse.Namespace) -> int:
  out = Path(args.out)
  say = lambda line: print(f"\r{line:<60}", end="", file=sys.stderr, flush=True)
  if not sys.stderr.isatty():
    say = lambda line: None
  if args.study:
    if args.source or args.config:
      raise ConfigError(f"--study={args.study} draws its own matrices; give no model")
    from dsv3_jax.analysis import accumulation
    from dsv3_jax.fp8 import study

    path = accumulation.write(study.accumulation(say=say), out)
    print(f"\r{path.read_text(encoding='utf-8')}\n{path}")
    return 0
  if bool(args.source) == bool(args.config):
    raise ConfigError("give a run's workdir or a model folder, or --config=FILE for a fresh model")
  if args.overrides and not args.config:
    raise ConfigError(f"{OVERRIDE}{args.overrides[0][0]} changes the config of --config=FILE; "
                      f"{args.source} has its own")
  if args.rows < 1:
    raise ConfigError(f"--rows={args.rows} must be positive")
  names = tuple(name for name in args.recipes.split(",") if name)
  known = config_lib.RECIPES
  for name in names or ("",):
    if name not in known or name == "none":
      near = difflib.get_close_matches(name, known, n=1)
      hint = f"; did you mean {near[0]!r}?" if near else ""
      raise ConfigError(f"--recipes={args.recipes}: {name!r} is none of "
                        f"{', '.join(k for k in known if k != 'none')}{hint}")

  import jax
  import numpy as np
  from rich.console import Console
  from rich.table import Table

  from dsv3_jax.analysis import numerics as tables
  from dsv3_jax.train import numerics

  title, config, graphdef, params, buffers, tokens_BS = _model_and_tokens(args)
  tokens_BS = jax.numpy.asarray(np.asarray(tokens_BS)[:args.rows], jax.numpy.int32)
  taps = numerics.make_capture(graphdef, config)(params, buffers, {"tokens": tokens_BS},
                                                 np.float32(config.loss.mtp_weight))
  operators = numerics.operators(params, taps, config.model)
  measured = numerics.measure(operators, names, say=say) | {"source": title}
  path = tables.write(measured, out, title)
  console = Console(width=None if sys.stdout.isatty() else tables.WIDTH)
  summary = (("recipe", "what (%)", "mean", "worst", "where"), tables.summary(measured),
             "Over the operators.")
  whole = (tables.HEAD, tables.rows(measured), tables.NOTE)
  for head, body, note in ([whole] if console.width >= tables.WIDTH else []) + [summary]:
    table = Table(title=title, caption=note)
    for i, name in enumerate(head):
      table.add_column(name, justify="left" if i < 2 else "right", overflow="fold")
    for cells in body:
      table.add_row(*cells)
    console.print(table)
  print(path)
  return 0


def _model_and_tokens(args: argparse.Namespace) -> tuple[Any, ...]:
  """(title, config, graph definition, params, buffers, tokens [B, T+1]) of `dsv3 numerics`.

  A run is shown its own validation text; other models see random tokens.
  """
  import numpy as np
  from flax import nnx

  from dsv3_jax.train import state

  source = Path(args.source) if args.source else None
  if source is not None and (source / "checkpoints").is_dir():
    from dsv3_jax.data import pipeline
    from dsv3_jax.train import checkpoint

    params, buffers, meta = checkpoint.load_params(str(source), args.step, args.ema)
    config = config_lib.from_dict(meta["config"])
    corpus = pipeline.prepare(config.data, config.model.vocab_size, str(source))
    batches = corpus.validation_batches(args.rows, 1)
    if not batches:
      raise ConfigError(f"{source}: no text is held out (data.validation_fraction) to measure on")
    graphdef = state.split(nnx.eval_shape(lambda: state.build_model(config.model, seed=0)))[0]
    return (f"{source.name}, step {meta['step']}", config, graphdef, params, buffers,
            batches[0]["tokens"])
  if args.step is not None or args.ema:
    raise ConfigError("--step and --ema choose a checkpoint of a run; "
                      f"{args.source or args.config} is none")
  if source is not None:
    from dsv3_jax.interop import huggingface

    model = huggingface.load(source, "float32")
    config = config_lib.replace(Config(), model=model.cfg)
    graphdef, params, buffers = state.split(model)
    title = f"{source.name}, random tokens"
  else:
    from dsv3_jax.train import optim

    config = load_config(args.config, args.overrides)
    graphdef, _, init = state.initializer(
        lambda: state.build_model(config.model, config.train.seed),
        optim.make_optimizer(config.optim))
    fresh = init()
    params, buffers, title = fresh.params, fresh.buffers, f"{args.config}, untrained, random tokens"
  shape = (args.rows, config.data.sequence_length + 1)
  tokens_BS = np.random.default_rng(0).integers(0, config.model.vocab_size, shape)
  return title, config, graphdef, params, buffers, tokens_BS


# --- configs ------------------------------------------------------------------------------------


def load_config(spec: str, overrides: Sequence[tuple[str, str]] = ()) -> Config:
  """The validated Config of an experiment file with overrides applied.

  Args:
    spec: path of a Python file that defines `get_config`, with an optional ":arg" for it; or of
      a config.json, as a run writes it.
    overrides: (dotted key, text) pairs, later ones winning.

  Raises:
    ConfigError: no such file, no `get_config`, an unknown key (the nearest is named), a value of
      the wrong type, or a combination that cannot run.
  """
  from ml_collections import config_dict  # here, so that --help does not wait for it

  path, arg = _split_spec(spec)
  returned = _read_json(path) if path.suffix == ".json" else _get_config(path, arg)
  if isinstance(returned, config_dict.ConfigDict):
    returned = returned.to_dict()
  if not isinstance(returned, Config | dict):
    raise ConfigError(f"--config={path}: a dsv3_jax.config.Config or a ConfigDict is expected, not "
                      f"a {type(returned).__name__}")
  given = config_lib.to_dict(returned) if isinstance(returned, Config) else returned
  tree = config_dict.ConfigDict(config_lib.to_dict(Config()))
  tree.lock()
  for key, value in _flatten(given):
    config_lib.field_type(key)
    _assign(tree, key, value)
  for key, text in overrides:
    _assign(tree, key, parse_value(key, text))
  return config_lib.from_dict(tree.to_dict())


def parse_value(key: str, text: str) -> Any:
  """The text of `--config.key=text` as the type of that key.

  Numbers may be written 3e-4, 1e6 (also for integers) and 1_000; booleans true or false; tuples as
  a,b or as a Python tuple or list; where a key may be None, none.

  Raises:
    ConfigError: no such key, a section instead of a value, or text of another type.
  """
  hint = config_lib.field_type(key)
  if dataclasses.is_dataclass(hint):
    names = ", ".join(f"{key}.{field.name}" for field in dataclasses.fields(hint))
    raise ConfigError(f"{OVERRIDE}{key}={text}: {key!r} is a section; set one of {names}")
  if hint != (hint := config_lib.optional(hint)) and text.lower() == "none":
    return None
  try:
    if typing.get_origin(hint) is tuple:
      return _parse_tuple(typing.get_args(hint)[0], text)
    return _parse_scalar(hint, text)
  except (ValueError, SyntaxError) as error:
    name = {int: "a whole number", float: "a number", bool: "true or false"}.get(
        hint, f"a value of type {hint}")
    raise ConfigError(f"{OVERRIDE}{key}={text}: {name} is expected") from error


def default_workdir(spec: str) -> Path:
  """runs/<experiment>, or runs/<experiment>-<arg>."""
  path, arg = _split_spec(spec)
  name = path.stem if arg is None else f"{path.stem}-{re.sub(r'[^A-Za-z0-9_.=-]+', '_', arg)}"
  return Path("runs") / name


def _parse_scalar(hint: type, text: str) -> Any:
  if hint is str:
    return text
  if hint is bool:
    truth = {"true": True, "1": True, "false": False, "0": False}
    if text.lower() not in truth:
      raise ValueError(text)
    return truth[text.lower()]
  if hint is float:
    return float(text)
  try:
    return int(text)
  except ValueError:
    number = float(text)  # 1e6
    if not number.is_integer():
      raise
    return int(number)


def _parse_tuple(hint: type, text: str) -> tuple[Any, ...]:
  literal = text[:1] in ("(", "[")
  parts = ast.literal_eval(text) if literal else [p.strip() for p in text.split(",") if p.strip()]
  return tuple(_parse_scalar(hint, str(part)) for part in parts)


def _split_spec(spec: str) -> tuple[Path, str | None]:
  path, _, arg = spec.partition(":")
  return Path(path), arg or None


def _require_file(path: Path) -> None:
  if path.is_file():
    return
  files = [str(p) for p in sorted(path.parent.glob(f"*{path.suffix or '.py'}"))]
  near = difflib.get_close_matches(str(path.with_suffix(path.suffix or ".py")), files, n=1)
  hint = f"; did you mean {near[0]}?" if near else ""
  raise ConfigError(f"--config={path}: no such file{hint}")


def _read_json(path: Path) -> Any:
  _require_file(path)
  try:
    return json.loads(path.read_text(encoding="utf-8"))
  except ValueError as error:
    raise ConfigError(f"--config={path}: not JSON: {error}") from error


def _get_config(path: Path, arg: str | None) -> Any:
  """What the experiment file's `get_config` returns; its own exceptions pass through."""
  _require_file(path)
  spec = importlib.util.spec_from_file_location(f"dsv3_experiment_{path.stem}", path)
  if spec is None or spec.loader is None:
    raise ConfigError(f"--config={path}: not a Python file")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  get_config = getattr(module, "get_config", None)
  if not isinstance(get_config, types.FunctionType):
    raise ConfigError(f"--config={path}: the file defines no function get_config(arg=None)")
  if arg is None:
    return get_config()
  if not inspect.signature(get_config).parameters:
    raise ConfigError(f"--config={path}:{arg}: get_config of this file takes no argument")
  return get_config(arg)


def _flatten(values: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
  """(dotted key, value) of every leaf."""
  leaves = []
  for name, value in values.items():
    key = f"{prefix}{name}"
    leaves += _flatten(value, f"{key}.") if isinstance(value, dict) else [(key, value)]
  return leaves


def _assign(tree: Any, key: str, value: Any) -> None:
  """Sets a leaf of the locked ConfigDict."""
  *parents, last = key.split(".")
  for parent in parents:
    tree = tree[parent]
  with tree.ignore_type():  # from_dict checks types, with the key's full name
    tree[last] = value


def _pair_overrides(rest: Sequence[str]) -> list[tuple[str, str]]:
  """`--config.key=value` and `--config.key value` as (key, value) pairs."""
  pairs, words = [], list(rest)
  while words:
    word = words.pop(0)
    if not word.startswith(OVERRIDE):
      raise ConfigError(f"unknown argument {word!r}")
    key, equals, value = word.removeprefix(OVERRIDE).partition("=")
    if not equals:
      config_lib.field_type(key)  # a misspelt key is the likelier mistake
      if not words:
        raise ConfigError(f"{word} needs a value: {word}=VALUE")
      value = words.pop(0)
    pairs.append((key, value))
  return pairs


# --- the command line ---------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
      prog="dsv3", allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
      description="DeepSeek-V3 in JAX: train, look at, and convert models.",
      epilog="examples:\n"
             "  dsv3 train --config=experiments/tiny.py --workdir=runs/tiny\n"
             "  dsv3 report runs/tiny\n"
             "  dsv3 convert runs/tiny exported-model\n\n"
             "`dsv3 COMMAND --help` has more.")
  parser.add_argument("--version", action="version", version=f"dsv3 {__version__}")
  commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

  train = _command(
      commands, "train", _train, "train a model, or go on with a run",
      "Train the model of an experiment file. Where the workdir holds a checkpoint of the same\n"
      "config, training goes on from it. Ctrl-C (or SIGTERM) saves before leaving; the same\n"
      "command resumes. At the end report.md and report.html are in the workdir.\n\n"
      "--config.train.profile_from=N captures train.profile_steps steps from step N on with\n"
      "jax.profiler into WORKDIR/profile. TensorBoard's files are in WORKDIR/tensorboard; where\n"
      "WANDB_PROJECT is set and wandb is installed, the same numbers go to Weights & Biases.",
      "  dsv3 train --config=experiments/tiny.py\n"
      "  dsv3 train --config=experiments/tiny.py:smoke --workdir=/tmp/smoke\n"
      "  dsv3 train --config=experiments/tiny.py --config.optim.lr=3e-4 \\\n"
      "    --config.data.fim_rate=0 --workdir=runs/nofim\n"
      "  dsv3 train --config=experiments/tiny.py --config.data.sources='texts/*.txt,notes' \\\n"
      "    --workdir=runs/notes\n"
      "  dsv3 train --config=experiments/tiny.py --config.train.profile_from=50 \\\n"
      "    --workdir=runs/profiled\n"
      "  dsv3 train --config=experiments/v3_671b.py --print-config")
  train.set_defaults(overridable=True)
  train.add_argument("--config", required=True, metavar="FILE[:ARG]",
                     help="experiment file; ARG goes to its get_config(arg)")
  train.add_argument("--config.KEY", metavar="VALUE", dest="ignored",
                     help="override one value, for example --config.optim.lr=3e-4; see "
                          "dsv3_jax/config.py, or --print-config, for the keys")
  train.add_argument("--workdir", metavar="DIR",
                     help="folder of this run (default: runs/EXPERIMENT or runs/EXPERIMENT-ARG)")
  train.add_argument("--print-config", action="store_true",
                     help="print the resulting config as JSON and leave")
  several = train.add_argument_group(
      "several processes", "Each host runs the same command. Under SLURM, Open MPI, Kubernetes or "
      "on a TPU pod they find each other; elsewhere say where:")
  several.add_argument("--coordinator", metavar="HOST:PORT",
                       help="where process 0 listens, any free port of its host")
  several.add_argument("--processes", type=int, metavar="N",
                       help="how many there are; 1: this one is alone, whatever the environment")
  several.add_argument("--process", type=int, metavar="I", help="number of this one, from 0")
  several.add_argument("--patience", type=float, default=30.0, metavar="SECONDS",
                       help="without a sign of life for so long a process counts as lost, and the "
                            "others end (default: %(default)g)")
  several.add_argument("--start-timeout", type=float, default=300.0, metavar="SECONDS",
                       help="how long processes wait for each other at the start (default: "
                            "%(default)g)")

  report = _command(
      commands, "report", _report, "write a run's report again",
      "Write report.md, report.html and plots/ from the files of a workdir, also while the run is\n"
      "going or after it was killed. The page opens offline.",
      "  dsv3 report runs/tiny")
  report.add_argument("workdir", metavar="WORKDIR")

  evaluate = _command(
      commands, "eval", _eval, "validation loss of a checkpoint",
      "Validation loss and bits per byte of a run's checkpoint, on the run's own held-out text,\n"
      "as one line of JSON.",
      "  dsv3 eval runs/tiny\n"
      "  dsv3 eval runs/tiny --ema --batches=0")
  evaluate.add_argument("workdir", metavar="WORKDIR")
  evaluate.add_argument("--step", type=int, metavar="N", help="checkpoint (default: the last)")
  evaluate.add_argument("--ema", action="store_true", help="the averaged parameters")
  evaluate.add_argument("--batches", type=int, metavar="N",
                        help="validation batches, 0 for all (default: the run's)")

  numerics = _command(
      commands, "numerics", _numerics, "what FP8 recipes do to each linear layer",
      "For every linear layer of a model, on one batch: how large its operands are, which share\n"
      "underflows or saturates, and the error of its three matmuls against fp32, recipe beside\n"
      "recipe. Prints tables and writes numerics.json, numerics.md and figures. With --study: how\n"
      "a tensor core's accumulator of few bits errs, by its width, the promotion interval and K.",
      "  dsv3 numerics runs/tiny --out=numerics\n"
      "  dsv3 numerics runs/tiny --recipes=v3,per_tensor_current,hybrid_e5m2,block_gradients\n"
      "  dsv3 numerics exported-model --rows=1\n"
      "  dsv3 numerics --config=experiments/tiny.py\n"
      "  dsv3 numerics --study=accumulation --out=study")
  numerics.set_defaults(overridable=True)
  numerics.add_argument("source", nargs="?", metavar="SOURCE",
                        help="workdir of a run, or Hugging Face folder")
  numerics.add_argument("--config", metavar="FILE[:ARG]",
                        help="experiment file: its model, not trained")
  numerics.add_argument("--config.KEY", metavar="VALUE", dest="ignored",
                        help="override one value of --config")
  numerics.add_argument("--recipes", default="v3", metavar="A,B,...",
                        help="FP8 recipes to compare (default: %(default)s)")
  numerics.add_argument("--out", default="numerics", metavar="DIR",
                        help="folder for the files (default: %(default)s)")
  numerics.add_argument("--rows", type=int, default=4, metavar="N",
                        help="sequences in the batch (default: %(default)s)")
  numerics.add_argument("--step", type=int, metavar="N", help="checkpoint (default: the last)")
  numerics.add_argument("--ema", action="store_true", help="the averaged parameters")
  numerics.add_argument("--study", choices=("accumulation",),
                        help="a study of its own instead of a model")

  cli_schedule.add_arguments(_command(
      commands, "schedule", cli_schedule.run, cli_schedule.SUMMARY, cli_schedule.DESCRIPTION,
      cli_schedule.EXAMPLES))

  tokenize = _command(
      commands, "tokenize", _tokenize, "turn text into shards that training maps into memory",
      "Tokenize text once, for corpora that exceed memory or serve many runs. Memory use does not\n"
      "grow with the corpus. The folder appears under its name when it is complete.",
      "  dsv3 tokenize --out=corpus 'texts/**/*.txt'\n"
      "  dsv3 tokenize --out=web --tokenizer=tokenizer.json --text-key=content web.jsonl.gz\n"
      "  dsv3 train --config=experiments/tiny.py --config.data.sources=shards:corpus \\\n"
      "    --workdir=runs/corpus")
  tokenize.add_argument("source", nargs="+", metavar="SOURCE",
                        help="file, folder, glob, hf:NAME, or stdlib, as in data.sources")
  tokenize.add_argument("--out", required=True, metavar="DIR", help="folder to make")
  tokenize.add_argument("--tokenizer", default="", metavar="FILE",
                        help="a tokenizer.json (default: train one on the sources)")
  defaults = config_lib.Data()
  tokenize.add_argument("--vocab-size", type=int, default=config_lib.Model().vocab_size,
                        metavar="N", help="of a tokenizer to be trained (default: %(default)s)")
  tokenize.add_argument("--text-key", default=defaults.text_key, metavar="KEY",
                        help="field of JSONL and Parquet records (default: %(default)s)")
  tokenize.add_argument("--max-document-bytes", type=int, default=defaults.max_document_bytes,
                        metavar="N", help="longest document taken (default: %(default)s)")

  convert = _command(
      commands, "convert", _convert, "to and from Hugging Face folders",
      "A run's workdir becomes a folder that transformers loads (DeepseekV3ForCausalLM). A\n"
      "Hugging Face folder becomes a workdir, to be trained on, or with --to=hf a folder of\n"
      "another dtype, dequantized or in FP8.",
      "  dsv3 convert runs/tiny exported\n"
      "  dsv3 convert runs/tiny exported --step=600 --ema --dtype=bfloat16\n"
      "  dsv3 convert runs/tiny exported --quantization=fp8\n"
      "  dsv3 convert DeepSeek-V3 runs/v3 --config=experiments/v3_671b.py\n"
      "  dsv3 convert DeepSeek-V3 DeepSeek-V3-bf16 --to=hf --dtype=bfloat16")
  convert.add_argument("source", metavar="SOURCE", help="workdir of a run, or Hugging Face folder")
  convert.add_argument("target", metavar="TARGET", help="folder to make")
  convert.add_argument("--to", choices=("hf", "workdir"),
                       help="what to make (default: the other kind than SOURCE)")
  convert.add_argument("--config", metavar="FILE[:ARG]",
                       help="experiment file for all but the model of a workdir that is made")
  convert.add_argument("--dtype", choices=("float32", "bfloat16", "float16"),
                       help="of the tensors in a Hugging Face folder that are not FP8 (default: as "
                            "in SOURCE; bfloat16 beside weights that --quantization=fp8 makes FP8)")
  convert.add_argument("--quantization", choices=("fp8", "none"), default="none",
                       help="fp8: linear layers in FP8 with a scale for each 128 x 128 block, as "
                            "released (default: %(default)s, which dequantizes)")
  convert.add_argument("--step", type=int, metavar="N",
                       help="checkpoint of the run to take (default: the last)")
  convert.add_argument("--ema", action="store_true", help="take the averaged parameters")
  return parser


def _command(commands: Any, name: str, function: Any, summary: str, description: str,
             examples: str) -> argparse.ArgumentParser:
  """A subcommand whose help ends in examples."""
  parser = commands.add_parser(
      name, help=summary, description=description, epilog=f"examples:\n{examples}",
      allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.set_defaults(run=function, parser=parser, overridable=False)
  return parser


def _refuse_misspelt(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
  """Names the nearest command or option before argparse complains of what it would have given."""
  commands = next(action.choices for action in parser._actions
                  if isinstance(action, argparse._SubParsersAction))
  if not argv or argv[0].startswith("-"):
    return
  if argv[0] not in commands:
    parser.error(f"unknown command {argv[0]!r}{_nearest(argv[0], commands)} (commands: "
                 f"{', '.join(commands)})")
  parser = commands[argv[0]]
  for word in argv[1:]:
    name = word.partition("=")[0]
    overrides = parser.get_default("overridable") and word.startswith(OVERRIDE)
    if word.startswith("--") and name not in parser._option_string_actions and not overrides:
      parser.error(f"unknown argument {word!r}{_nearest(name, parser._option_string_actions)}")


def _nearest(word: str, choices: Iterable[str]) -> str:
  near = difflib.get_close_matches(word, choices, n=1)
  return f"; did you mean {near[0]}?" if near else ""


if __name__ == "__main__":
  main()
