"""`dsv3 numerics`: what FP8 recipes do to each linear layer."""

import argparse
import difflib
import sys
from pathlib import Path
from typing import Any

from dsv3_jax import config as config_lib
from dsv3_jax.cli.configs import OVERRIDE, load_config
from dsv3_jax.config import Config, ConfigError

SUMMARY = "what FP8 recipes do to each linear layer"
DESCRIPTION = (
    "For every linear layer of a model, on one batch: how large its operands are, which share\n"
    "underflows or saturates, and the error of its three matmuls against fp32, recipe beside\n"
    "recipe. Prints tables and writes numerics.json, numerics.md and figures. With --study: how\n"
    "a tensor core's accumulator of few bits errs, by its width, the promotion interval and K.")
EXAMPLES = (
    "  dsv3 numerics runs/tiny --out=numerics\n"
    "  dsv3 numerics runs/tiny --recipes=v3,per_tensor_current,hybrid_e5m2,block_gradients\n"
    "  dsv3 numerics exported-model --rows=1\n"
    "  dsv3 numerics --config=experiments/tiny.py\n"
    "  dsv3 numerics --study=accumulation --out=study")
OVERRIDABLE = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """The command's options."""
  parser.add_argument("source", nargs="?", metavar="SOURCE",
                      help="workdir of a run, or Hugging Face folder")
  parser.add_argument("--config", metavar="FILE[:ARG]",
                      help="experiment file: its model, not trained")
  parser.add_argument("--config.KEY", metavar="VALUE", dest="ignored",
                      help="override one value of --config")
  parser.add_argument("--recipes", default="v3", metavar="A,B,...",
                      help="FP8 recipes to compare (default: %(default)s)")
  parser.add_argument("--out", default="numerics", metavar="DIR",
                      help="folder for the files (default: %(default)s)")
  parser.add_argument("--rows", type=int, default=4, metavar="N",
                      help="sequences in the batch (default: %(default)s)")
  parser.add_argument("--step", type=int, metavar="N", help="checkpoint (default: the last)")
  parser.add_argument("--ema", action="store_true", help="the averaged parameters")
  parser.add_argument("--study", choices=("accumulation",),
                      help="a study of its own instead of a model")


def run(args: argparse.Namespace) -> int:
  """Runs the command."""
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
