"""Loading a DeepseekV3ForCausalLM folder: checked from headers, then read tensor by tensor."""

import pathlib
import re
import warnings
from collections.abc import Iterable
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx, traverse_util

from dsv3_jax import config
from dsv3_jax.config import ConfigError
from dsv3_jax.fp8 import weights
from dsv3_jax.interop import fp8_blocks, hf_config, names, safetensors_files
from dsv3_jax.interop.parameters import PathLike, abstract, flat, param_dtype
from dsv3_jax.interop.safetensors_files import Stored
from dsv3_jax.model.transformer import Transformer

_FLOAT8 = safetensors_files.DTYPES["F8_E4M3"]


class NotKept(ValueError):
  """FP8 weights that cannot be held as they are; `why` says what stands against it."""

  def __init__(self, why: str):
    super().__init__(f"{why}; load the folder with quantized=\"dequantize\"")
    self.why = why


def _listing(items: Iterable[str], most: int = 8) -> str:
  items = list(items)
  more = f" and {len(items) - most} more" if len(items) > most else ""
  return ", ".join(items[:most]) + more


def _mtp_depth(values: dict[str, Any], stored: dict[str, Stored], file: pathlib.Path) -> int:
  """Multi-token prediction layers to load: announced by the config and present in the files."""
  announced, layers = hf_config.mtp_depth(values), values.get("num_hidden_layers")
  if not isinstance(layers, int):
    return 0  # from_hf names the bad key
  numbers = (re.match(r"model\.layers\.(\d+)\.", name) for name in stored)
  extra = {int(number[1]) for number in numbers if number and int(number[1]) >= layers}
  if announced is None:
    return max(extra, default=layers - 1) - layers + 1
  if announced and not extra:
    warnings.warn(f"{file} announces num_nextn_predict_layers={announced}, but the folder has no "
                  f"tensor of layer {layers} or later; the model is loaded without multi-token "
                  "prediction", stacklevel=3)
    return 0
  return announced


def _check_tensors(folder: pathlib.Path, cfg: config.Model, slots: list[names.Slot],
                   stored: dict[str, Stored], block: fp8_blocks.Block | None, *, tied: bool
                   ) -> None:
  """Every expected tensor is there with its shape, and there is no other."""
  expected = {slot.name: slot.shape for slot in slots}
  optional = {name: expected[main] for name, main in names.duplicates(cfg).items()
              if main in expected}
  optional |= names.empty_tensors(cfg)
  if tied:
    embedding = expected["model.embed_tokens.weight"]
    optional["lm_head.weight"] = embedding
    optional |= {name: embedding for name in names.duplicates(cfg)}
  for name, entry in stored.items():
    if entry.dtype != _FLOAT8:
      continue
    shape = expected.get(name, optional.get(name))
    if shape is None:
      continue  # reported below as unknown
    if len(shape) != 2:
      raise ValueError(f"{entry.file}: tensor {name!r} is float8; only matrices may be")
    if block is None:
      raise ValueError(f"{entry.file}: tensor {name!r} is float8, but config.json has no "
                       "quantization_config with weight_block_size")
    scales = expected if name in expected else optional
    scales[name + fp8_blocks.SUFFIX] = fp8_blocks.scale_shape(shape, block)
  missing = [name for name in expected if name not in stored]
  unknown = [name for name in stored if name not in expected and name not in optional
             and not name.endswith("rotary_emb.inv_freq")]
  if missing or unknown:
    parts = [f"missing tensors ({len(missing)}): {_listing(missing)}"] if missing else []
    parts += [f"unknown tensors ({len(unknown)}): {_listing(unknown)}"] if unknown else []
    raise ValueError(f"{folder} does not hold the model that its config.json describes "
                     f"({cfg.layers} layers, {cfg.dense_layers} of them dense, {cfg.mtp_depth} "
                     f"for multi-token prediction): {'; '.join(parts)}")
  for name, shape in (optional | expected).items():
    if name in stored and stored[name].shape != shape:
      raise ValueError(f"{stored[name].file}: tensor {name!r} has shape "
                       f"{list(stored[name].shape)}; config.json implies {list(shape)}")


def _check_kept(values: dict[str, Any], slots: list[names.Slot], stored: dict[str, Stored]
                ) -> None:
  """FP8 tensors are those that the release has in FP8, so that the model can hold them as such."""
  why = None
  quantized = {slot.name for slot in slots if slot.quantized}
  for name, entry in stored.items():
    if entry.dtype == _FLOAT8 and name not in quantized:
      why = f"{entry.file}: tensor {name!r} is float8, which it is not in the released layout"
    elif entry.dtype != _FLOAT8 and name in quantized:
      why = f"{entry.file}: tensor {name!r} is {entry.dtype.name}, but others are float8"
    elif name.endswith(fp8_blocks.SUFFIX) and entry.dtype != np.float32:
      why = f"{entry.file}: tensor {name!r} is {entry.dtype.name}; scales must be float32"
  if values.get("rope_interleave") is False:
    why = "rope_interleave=false stores the rotated columns in an order that has other blocks here"
  if why:
    raise NotKept(why)


def _read(name: str, stored: dict[str, Stored], block: fp8_blocks.Block | None) -> np.ndarray:
  """One tensor; FP8 comes back as fp32."""
  array = stored[name].read()
  if array.dtype == _FLOAT8:
    array = fp8_blocks.dequantize(array, stored[name + fp8_blocks.SUFFIX].read(), block)
  return array


def _check_duplicates(cfg: config.Model, stored: dict[str, Stored],
                      block: fp8_blocks.Block | None) -> None:
  """Warns where a module's own embedding or head differs from the main model's."""
  for name, main in names.duplicates(cfg).items():
    main = main if main in stored else "model.embed_tokens.weight"
    if name in stored and not np.array_equal(_read(name, stored, block),
                                             _read(main, stored, block)):
      warnings.warn(f"{stored[name].file}: {name!r} differs from {main!r}; the model shares one "
                    "and uses the latter", stacklevel=3)


def load(path: PathLike, dtype: str | None = None, *, quantized: str = "dequantize"
         ) -> Transformer:
  """The model in a Hugging Face folder of a DeepseekV3ForCausalLM.

  Args:
    path: folder with `config.json` and `model.safetensors`, or shards with their index. Tensors may
      be fp32, bf16, fp16 or FP8 e4m3 with `weight_scale_inv`.
    dtype: of the parameters; router biases are fp32 always. None: "float32", or with
      quantized="keep" as the files have it.
    quantized: what becomes of FP8 weights: "dequantize", or "keep" for parameters of one byte a
      weight (`fp8.weights.Weight`), from which the model computes as they are. Such a model can be
      run, evaluated, sampled from and saved (bit for bit), not trained.

  Returns:
    A `Transformer`; `model(tokens_BT).logits_BTV` are the logits, `model.cfg` its configuration.

  Raises:
    ConfigError: a config key is missing, malformed or not supported; the message names it.
    NotKept: a ValueError; FP8 weights are in another layout than the released one, and to be kept.
    ValueError: a file is missing, truncated or damaged, or a tensor is unknown, missing or has
      another shape than the config implies; the message names file and tensor.
  """
  folder = pathlib.Path(path)
  file = folder / "config.json"
  values = hf_config.read_json(file)
  if quantized not in ("dequantize", "keep"):
    raise ValueError(f"quantized={quantized!r} must be \"dequantize\" or \"keep\"")
  as_stored = dtype is None and quantized == "keep"
  wanted = param_dtype(dtype or "float32")
  try:
    block = fp8_blocks.block_size(values)
    hf_config.check_supported(values)
  except ConfigError as error:
    raise ConfigError(f"{file}: {error}") from error
  stored = safetensors_files.scan(folder)
  try:
    cfg = hf_config.from_hf(values, mtp=_mtp_depth(values, stored, file))
  except ConfigError as error:
    raise ConfigError(f"{file}: {error}") from error
  tied = bool(values.get("tie_word_embeddings", False))
  slots = [slot for slot in names.slots(cfg) if not (tied and slot.name == "lm_head.weight")]
  _check_tensors(folder, cfg, slots, stored, block, tied=tied)
  keep = quantized == "keep" and any(entry.dtype == _FLOAT8 for entry in stored.values())
  if keep:
    _check_kept(values, slots, stored)

  graphdef, state = abstract(cfg, wanted)
  shapes = flat(state)
  kept: dict[names.Path, fp8_blocks.Builder] = {}
  dtypes: dict[names.Path, Any] = {}
  for slot in slots:
    for part in slot.parts:
      if keep and slot.quantized:
        if part.path not in kept:
          kept[part.path] = fp8_blocks.Builder(shapes[part.path].shape, len(part.index),
                                               weights.axes(part.path[-1])[0], block)
      elif as_stored and not slot.float32:
        found = stored[slot.name].dtype
        dtypes[part.path] = jnp.promote_types(dtypes.get(part.path, found), found)
  arrays = {key: np.empty(leaf.shape, dtypes.get(key, leaf.dtype))
            for key, leaf in shapes.items() if key not in kept}
  half_split = values.get("rope_interleave") is False
  by_name = {slot.name: slot for slot in slots}
  for name in stored:  # file by file
    slot = by_name.get(name)
    if slot is None:
      continue
    if keep and slot.quantized:
      kept[slot.parts[0].path].put(slot.parts[0].index, stored[name].read(),
                                   stored[name + fp8_blocks.SUFFIX].read())
    else:
      slot.read(_read(name, stored, block),
                [arrays[part.path][part.index] for part in slot.parts], half_split=half_split)
  if tied:
    arrays[("head_DV",)][...] = arrays[("embedding_VD",)].T
  _check_duplicates(cfg, stored, block)
  on_device = {key: jnp.asarray(arrays.pop(key)) for key in list(arrays)}
  try:
    pow2 = fp8_blocks.pow2_scales(values)
    on_device |= {key: kept.pop(key).build(pow2=pow2) for key in list(kept)}
  except ValueError as error:
    raise NotKept(f"{file}: quantization_config: {error}") from error
  nnx.replace_by_pure_dict(state, traverse_util.unflatten_dict(on_device))
  return nnx.merge(graphdef, state)
