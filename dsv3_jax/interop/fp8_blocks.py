"""FP8 weights with one scale a block, as the release stores them (facts 6.1).

A Linear's `weight` is float8_e4m3fn [out, in]; `weight_scale_inv` is fp32, one number for each
block of 128 rows and 128 columns, ragged at the edges. Despite its name it multiplies:
weight = codes * scale. Here a weight is the transpose, [in, out], with its stacking axes before
that, and codes and scales together are a `QTensor` whose tile is the block turned round. A model
that computes from them has `fp8.weights.Weight`s without masters for parameters.

The embedding, the head, norms, routers and the projection that joins the two inputs of a
multi-token prediction module are not quantized (`names.Slot.quantized`).
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from dsv3_jax.config import ConfigError
from dsv3_jax.fp8 import formats
from dsv3_jax.fp8.qtensor import QTensor
from dsv3_jax.fp8.quantize import quantize as quantize_tiles
from dsv3_jax.fp8.weights import Weight

Block = tuple[int, int]  # rows (outputs) and columns (inputs) of a torch Linear that share a scale
BLOCK: Block = (128, 128)
SUFFIX = "_scale_inv"


# --- config.json ----------------------------------------------------------------------------------


def block_size(values: dict[str, Any]) -> Block | None:
  """Block of the `quantization_config` of a parsed config.json; None without one.

  Raises:
    ConfigError: another method or format, or no block size.
  """
  quantization = values.get("quantization_config")
  if quantization is None:
    return None
  if not isinstance(quantization, dict):
    raise ConfigError(f"quantization_config={quantization!r} must be an object")
  method, fmt = quantization.get("quant_method"), quantization.get("fmt", "e4m3")
  if method != "fp8" or fmt != "e4m3":
    raise ConfigError(f"quantization_config.quant_method={method!r} with fmt={fmt!r} is not "
                      "supported; only fp8 in e4m3 with block scales can be loaded")
  block = quantization.get("weight_block_size")
  if not (isinstance(block, list) and len(block) == 2
          and all(type(size) is int and size > 0 for size in block)):
    raise ConfigError(f"quantization_config.weight_block_size={block!r} must be two positive "
                      "integers")
  return block[0], block[1]


def pow2_scales(values: dict[str, Any]) -> bool:
  """Whether config.json promises scales that are powers of two (the release of V3.1)."""
  return (values.get("quantization_config") or {}).get("scale_fmt") == "ue8m0"


def quantization_config(block: Block, *, pow2: bool) -> dict[str, Any]:
  """The `quantization_config` of a folder in the released layout."""
  entry = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
           "weight_block_size": list(block)}
  return entry | ({"scale_fmt": "ue8m0"} if pow2 else {})


# --- arrays ---------------------------------------------------------------------------------------


def scale_shape(shape: tuple[int, int], block: Block) -> tuple[int, int]:
  """Blocks along each axis of a weight [out, in]; the last one of an axis may be ragged."""
  return -(-shape[0] // block[0]), -(-shape[1] // block[1])


def dequantize(codes: np.ndarray, scale: np.ndarray, block: Block) -> np.ndarray:
  """The fp32 weight [out, in].

  Args:
    codes: float8_e4m3fn, [out, in].
    scale: fp32, `scale_shape(codes.shape, block)`.
    block: rows and columns that share a scale.
  """
  decode = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
  weight = decode[codes.view(np.uint8)]  # a table is far quicker than a cast
  columns = np.repeat(scale.astype(np.float32), block[1], axis=1)[:, :codes.shape[1]]
  for row in range(scale.shape[0]):  # one strip of blocks at a time: no full-size scale array
    weight[row * block[0]:(row + 1) * block[0]] *= columns[row]
  return weight


class Builder:
  """A `Weight` without master, filled one checkpoint tensor at a time.

  Args:
    shape: of the parameter that it stands for, [*lead, *inputs, *outputs].
    lead: number of stacking axes (layers, or layers and experts).
    inputs: number of axes that the weight contracts.
    block: rows and columns of the checkpoint's tensors that share a scale.
  """

  def __init__(self, shape: tuple[int, ...], lead: int, inputs: int, block: Block):
    self._block = block
    self._inputs, self._outputs = shape[lead:lead + inputs], shape[lead + inputs:]
    matrix = math.prod(self._inputs), math.prod(self._outputs)
    self._codes = np.empty((*shape[:lead], *matrix), np.uint8)
    self._scales = np.empty((*shape[:lead], *scale_shape(matrix, block[::-1])), np.float32)

  def put(self, index: tuple[int, ...], codes: np.ndarray, scale: np.ndarray) -> None:
    """Takes codes [out, in] and their scales as a file holds them."""
    self._codes[index] = codes.view(np.uint8).T
    self._scales[index] = scale.T

  def build(self, *, pow2: bool) -> Weight:
    """The weight on the device.

    Raises:
      ValueError: `pow2`, and a scale is no power of two.
    """
    scales = self._scales
    if pow2:
      mantissa, exponent = np.frexp(scales)
      if not (mantissa == 0.5).all():
        raise ValueError("a scale is not a power of two, as scale_fmt='ue8m0' promises")
      scales = (exponent - 1 + 127).astype(np.uint8)
    codes = jnp.asarray(self._codes.view(ml_dtypes.float8_e4m3fn))
    held = QTensor(codes, jnp.asarray(scales), formats.E4M3, self._block[::-1], codes.shape[-1])
    return Weight(None, held.validate(), None, None, self._inputs, self._outputs)


@functools.partial(jax.jit, static_argnums=(1, 2))
def quantize(weight: jax.Array, shape: tuple[int, ...], block: Block) -> QTensor:
  """A weight of any layout as codes and block scales of `shape` [..., in, out].

  The scales and codes are those that training under the recipe `v3` computes with.
  """
  return quantize_tiles(weight.reshape(shape), formats.E4M3, block[::-1])


def held(parameter: Any) -> Any:
  """The quantized form of a `Weight`; another parameter as it is."""
  return parameter.fprop if isinstance(parameter, Weight) else parameter


def block_of(weights: list[QTensor]) -> tuple[Block, bool]:
  """Block and kind of scale (powers of two?) that the weights of a model share.

  Raises:
    ValueError: they differ, or the format is not E4M3.
  """
  kinds = {(w.format.name, w.tile[::-1], w.pow2) for w in weights}
  if len(kinds) > 1 or next(iter(kinds))[0] != formats.E4M3.name:
    raise ValueError(f"the model's weights are quantized as {sorted(kinds)}; a folder holds one "
                     "block size in e4m3. Save with quantization=\"none\"")
  _, block, pow2 = kinds.pop()
  return block, pow2
