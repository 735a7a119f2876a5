"""A trained model and its tokenizer, from a run's folder or a Hugging Face model folder."""

import argparse
from pathlib import Path
from typing import Any, NamedTuple

from dsv3_jax import config as config_lib
from dsv3_jax.config import ConfigError


class Trained(NamedTuple):
  """A model to write with.

  Attributes:
    generator: `infer.generate.Generator`.
    tokenizer: `data.tokenizer.Tokenizer`.
    context: tokens that it was trained, or extended by YaRN, to see at once.
  """

  generator: Any
  tokenizer: Any
  context: int


def check(source: str | Path, step: int | None = None, ema: bool = False) -> bool:
  """Whether `source` is a run; without starting jax.

  Raises:
    ConfigError: neither a run nor a model folder, without a tokenizer, or a checkpoint chosen of
      what has none.
  """
  source = Path(source)
  is_run = (source / "checkpoints").is_dir()
  if not is_run and not (source / "config.json").is_file():
    raise ConfigError(f"{source} holds neither checkpoints/ nor config.json; give the workdir of a "
                      "run or a Hugging Face model folder")
  if not is_run and (step is not None or ema):
    raise ConfigError(f"--step and --ema choose a checkpoint; {source} is a model folder")
  if not (source / "tokenizer.json").is_file():
    raise ConfigError(f"{source} holds no tokenizer.json, without which there is no text")
  return is_run


def load(source: str | Path, step: int | None = None, ema: bool = False, dtype: str = "float32",
         cache: str = "") -> Trained:
  """Reads a model; errors as for `check`.

  Args:
    source: the folder.
    step: of a run's checkpoint; None: the newest.
    ema: take the averaged parameters.
    dtype: of weights and computation.
    cache: of the latent cache; "": dtype.
  """
  is_run = check(source, step, ema)
  from dsv3_jax.data.tokenizer import Tokenizer
  from dsv3_jax.infer.generate import Generator
  from dsv3_jax.train import checkpoint, loop, state

  loop.use_compilation_cache()
  if is_run:
    params, buffers, meta = checkpoint.load_params(str(source), step, ema)
    cfg = config_lib.from_dict(meta["config"])
    model, context = cfg.model, cfg.data.sequence_length
  else:
    from dsv3_jax.interop import huggingface

    loaded = huggingface.load(Path(source), dtype)
    model, (_, params, buffers), context = loaded.cfg, state.split(loaded), 0
  yarn, runtime = model.attention.yarn, config_lib.Runtime(compute_dtype=dtype)
  if yarn.factor > 1 or not context:  # a model folder's max_position_embeddings
    context = round(yarn.factor * yarn.original_length)
  return Trained(Generator(model, params, buffers, runtime, cache),
                 Tokenizer.load(str(Path(source) / "tokenizer.json"), model.vocab_size), context)


# --- on a command line


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """SOURCE and how its parameters are taken."""
  parser.add_argument("source", metavar="SOURCE", help="workdir of a run, or Hugging Face folder")
  parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32",
                      help="of weights and computation (default: %(default)s)")
  parser.add_argument("--cache", choices=("float32", "bfloat16", "fp8"), default="",
                      help="of the latent cache (default: --dtype)")
  parser.add_argument("--step", type=int, metavar="N", help="checkpoint (default: the last)")
  parser.add_argument("--ema", action="store_true", help="the averaged parameters")
