"""The recipes as tables (what each is: recipe.py); without jax."""

import dataclasses
import re

from dsv3_jax import config


def _uniform(operand: str) -> config.FP8:
  """The same for every operand."""
  operands = {f.name: operand for f in dataclasses.fields(config.FP8)
              if f.name not in _NUMBERS}
  return config.FP8(**operands, **_NUMBERS)


_NUMBERS = dict(interval=128, bits=0, floor=1e-4, gradient_floor=1e-30, history=16)
_V3 = config.FP8(
    fprop_x="e4m3 1x128 fp32", fprop_w="e4m3 128x128 fp32",
    dgrad_dy="e4m3 1x128 fp32", dgrad_w="e4m3 128x128 fp32",
    wgrad_x="e4m3 128x1 fp32", wgrad_dy="e4m3 128x1 fp32",
    output_x="e4m3 1x128 pow2", output_cache="e5m6 1x128 pow2",
    dispatch_x="e4m3 1x128 pow2", dispatch_dy="e4m3 1x128 pow2",
    swiglu_cache="e4m3 1x128 fp32", **_NUMBERS)


def _pow2(recipe: config.FP8) -> config.FP8:
  values = {name: re.sub("fp32$", "pow2", value) if isinstance(value, str) else value
            for name, value in dataclasses.asdict(recipe).items()}
  return config.FP8(**values)


_TENSOR = "e4m3 tensor fp32"
_DELAYED = dict.fromkeys(("fprop_x", "output_x", "dispatch_x", "dgrad_dy", "dispatch_dy"),
                         _TENSOR + " delayed")

RECIPES: dict[str, config.FP8] = {
    "fp32": _uniform("fp32"),
    "bf16": _uniform("bf16"),
    "v3": _V3,
    "v3_pow2": _pow2(_V3),
    "per_tensor_current": _uniform(_TENSOR),
    "per_tensor_delayed": dataclasses.replace(_uniform(_TENSOR), **_DELAYED),
    "hybrid_e5m2": dataclasses.replace(
        _V3, dgrad_dy="e5m2 1x128 fp32", wgrad_dy="e5m2 128x1 fp32", dispatch_dy="e5m2 1x128 pow2"),
    "block_gradients": dataclasses.replace(
        _V3, dgrad_dy="e4m3 128x128 fp32", wgrad_dy="e4m3 128x128 fp32",
        dispatch_dy="e4m3 128x128 pow2"),
    "no_promotion": dataclasses.replace(_V3, interval=0, bits=14),
}


def for_inference(pow2: bool = False) -> dict[str, object]:
  """What the released inference code quantizes, as fields of `config.Runtime`.

  All activations alike: a token at a time in 1x128 tiles, with fp32 scales, or with powers of two
  where the weights' scales are such (`pow2`).
  """
  if pow2:
    return {"recipe": "v3_pow2"}
  operand = _V3.fprop_x
  return {"recipe": "v3", "fp8": config.FP8(output_x=operand, dispatch_x=operand)}


def merged(runtime: config.Runtime) -> config.FP8:
  """The run's recipe as its operands' texts, overrides applied; all "compute" without one."""
  named = _uniform("compute") if runtime.recipe == "none" else RECIPES[runtime.recipe]
  changes = {k: v for k, v in dataclasses.asdict(runtime.fp8).items() if v is not None}
  return dataclasses.replace(named, **changes)
