"""`dsv3 convert`: to and from Hugging Face folders."""

import argparse
from pathlib import Path
from typing import Any

from dsv3_jax import config as config_lib
from dsv3_jax.cli.configs import load_config
from dsv3_jax.config import Config, ConfigError

SUMMARY = "to and from Hugging Face folders"
DESCRIPTION = (
    "A run's workdir becomes a folder that transformers loads (DeepseekV3ForCausalLM). A\n"
    "Hugging Face folder becomes a workdir, to be trained on, or with --to=hf a folder of\n"
    "another dtype, dequantized or in FP8.")
EXAMPLES = (
    "  dsv3 convert runs/tiny exported\n"
    "  dsv3 convert runs/tiny exported --step=600 --ema --dtype=bfloat16\n"
    "  dsv3 convert runs/tiny exported --quantization=fp8\n"
    "  dsv3 convert DeepSeek-V3 runs/v3 --config=experiments/v3_671b.py\n"
    "  dsv3 convert DeepSeek-V3 DeepSeek-V3-bf16 --to=hf --dtype=bfloat16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """The command's options."""
  parser.add_argument("source", metavar="SOURCE", help="workdir of a run, or Hugging Face folder")
  parser.add_argument("target", metavar="TARGET", help="folder to make")
  parser.add_argument("--to", choices=("hf", "workdir"),
                      help="what to make (default: the other kind than SOURCE)")
  parser.add_argument("--config", metavar="FILE[:ARG]",
                      help="experiment file for all but the model of a workdir that is made")
  parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"),
                      help="of the tensors in a Hugging Face folder that are not FP8 (default: as "
                           "in SOURCE; bfloat16 beside weights that --quantization=fp8 makes FP8)")
  parser.add_argument("--quantization", choices=("fp8", "none"), default="none",
                      help="fp8: linear layers in FP8 with a scale for each 128 x 128 block, as "
                           "released (default: %(default)s, which dequantizes)")
  parser.add_argument("--step", type=int, metavar="N",
                      help="checkpoint of the run to take (default: the last)")
  parser.add_argument("--ema", action="store_true", help="take the averaged parameters")


def run(args: argparse.Namespace) -> int:
  """Runs the command."""
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
