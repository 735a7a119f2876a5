"""A trained model and its tokenizer, from a run's folder or a Hugging Face model folder."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from dsv3_jax import config as config_lib
from dsv3_jax.config import ConfigError

WEIGHTS = ("auto", "fp8", "plain")


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
         cache: str = "", weights: str = "auto", say: Callable[[str], object] = lambda text: None
         ) -> Trained:
  """Reads a model.

  Args:
    source: the folder.
    step: of a run's checkpoint; None: the newest.
    ema: take the averaged parameters.
    dtype: of weights and computation.
    cache: of the latent cache; "": dtype.
    weights: "fp8": linear layers in FP8 as released, a byte a weight, and multiplied as such: those
      of an FP8 folder as they are, others quantized here as `dsv3 convert --quantization=fp8`
      would. Where the device has no FP8 matmuls that is emulated. "plain": in `dtype`, FP8 ones
      dequantized. "auto": as the folder has them, but "plain" where FP8 would be emulated.
    say: takes a line about weights in FP8.

  Raises:
    ConfigError: as for `check`; FP8 weights in another layout than the released one, to be kept.
  """
  is_run = check(source, step, ema)
  if weights not in WEIGHTS:
    raise ConfigError(f"weights={weights!r} must be one of {', '.join(WEIGHTS)}")
  import jax

  from dsv3_jax.data.tokenizer import Tokenizer
  from dsv3_jax.infer import parameters
  from dsv3_jax.infer.generate import Generator
  from dsv3_jax.train import checkpoint, loop, state

  loop.use_compilation_cache()
  if is_run:
    params, buffers, meta = checkpoint.load_params(str(source), step, ema)
    cfg = config_lib.from_dict(meta["config"])
    model, context = cfg.model, cfg.data.sequence_length
  else:
    loaded = _read(Path(source), dtype, weights, say)
    model, (_, params, buffers), context = loaded.cfg, state.split(loaded), 0
  if weights == "fp8":
    params = jax.jit(parameters.quantized)(params)
  yarn = model.attention.yarn
  runtime = config_lib.Runtime(compute_dtype=dtype, **_recipe(params, say))
  if yarn.factor > 1 or not context:  # a model folder's max_position_embeddings
    context = round(yarn.factor * yarn.original_length)
  return Trained(Generator(model, params, buffers, runtime, cache),
                 Tokenizer.load(str(Path(source) / "tokenizer.json"), model.vocab_size), context)


def _read(folder: Path, dtype: str, weights: str, say: Callable[[str], object]) -> Any:
  """The model in a Hugging Face folder."""
  import jax

  from dsv3_jax import ops
  from dsv3_jax.interop import hf_config, huggingface

  keep = weights == "fp8" or (weights == "auto" and ops.fp8_multiplies_transposed())
  why = f"{jax.default_backend()} has no FP8 matmuls (--weights=fp8 emulates them)"
  if keep:
    try:
      return huggingface.load(folder, dtype, quantized="keep")
    except huggingface.NotKept as error:
      if weights == "fp8":
        raise ConfigError(f"--weights=fp8: {error.why}; --weights=plain dequantizes") from error
      why = error.why
  loaded = huggingface.load(folder, dtype)
  if weights == "auto" and "quantization_config" in hf_config.read_json(folder / "config.json"):
    say(f"weights: FP8, dequantized to {dtype}: {why}")
  return loaded


def _recipe(params: Any, say: Callable[[str], object]) -> dict[str, Any]:
  """What of `config.Runtime` FP8 weights want; nothing for others."""
  import jax

  from dsv3_jax import ops
  from dsv3_jax.fp8 import recipes
  from dsv3_jax.fp8.weights import Weight

  is_weight = lambda x: isinstance(x, Weight)
  held = [w.fprop for w in jax.tree.leaves(params, is_leaf=is_weight) if is_weight(w)]
  if not held:
    return {}
  how = "" if ops.fp8_multiplies_transposed() else (
      f"; {jax.default_backend()} has no FP8 matmuls, so they are emulated, slowly "
      "(--weights=plain does without)")
  say(f"weights: FP8, {sum(w.nbytes for w in held):,} bytes in linear layers{how}")
  return recipes.for_inference(held[0].pow2)


# --- on a command line


def to_stderr(text: str) -> None:
  """For `load`'s `say`."""
  print(text, file=sys.stderr, flush=True)


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """SOURCE and how its parameters are taken."""
  parser.add_argument("source", metavar="SOURCE", help="workdir of a run, or Hugging Face folder")
  parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32",
                      help="of weights and computation (default: %(default)s)")
  parser.add_argument("--cache", choices=("float32", "bfloat16", "fp8"), default="",
                      help="of the latent cache (default: --dtype)")
  parser.add_argument("--weights", choices=WEIGHTS, default="auto",
                      help="fp8: linear layers in FP8 as released, a byte a weight (quantized here "
                           "if the files do not have them so); plain: in --dtype; auto: as the "
                           "files have them, but plain where the device has no FP8 matmuls "
                           "(default: %(default)s)")
  parser.add_argument("--step", type=int, metavar="N", help="checkpoint (default: the last)")
  parser.add_argument("--ema", action="store_true", help="the averaged parameters")
