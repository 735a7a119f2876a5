"""`dsv3 eval`: a checkpoint on held-out text."""

import argparse
import json
from pathlib import Path

from dsv3_jax import config as config_lib
from dsv3_jax.config import ConfigError

SUMMARY = "validation loss of a checkpoint"
DESCRIPTION = (
    "Validation loss and bits per byte of a run's checkpoint, on the run's own held-out text,\n"
    "as one line of JSON.")
EXAMPLES = (
    "  dsv3 eval runs/tiny\n"
    "  dsv3 eval runs/tiny --ema --batches=0")


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """The command's options."""
  parser.add_argument("workdir", metavar="WORKDIR")
  parser.add_argument("--step", type=int, metavar="N", help="checkpoint (default: the last)")
  parser.add_argument("--ema", action="store_true", help="the averaged parameters")
  parser.add_argument("--batches", type=int, metavar="N",
                      help="validation batches, 0 for all (default: the run's)")


def run(args: argparse.Namespace) -> int:
  """Runs the command."""
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
