"""`load` and `save` for DeepseekV3ForCausalLM folders (config.json and safetensors).

Loading checks every name and shape from the files' headers first, then reads tensor by tensor into
arrays allocated once a parameter: the host holds the model and one tensor. Saving holds one shard.
`hf_config` maps the configuration, `names` the tensors.
"""

import json
import os
import pathlib
import re
import secrets
import shutil
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, traverse_util

from dsv3_jax import config
from dsv3_jax.config import ConfigError
from dsv3_jax.interop import fp8_blocks, hf_config, names, safetensors_files
from dsv3_jax.interop.safetensors_files import Stored
from dsv3_jax.model.transformer import Transformer

PathLike = str | os.PathLike
SHARD_BYTES = 5 * 10**9
_FLOAT8 = safetensors_files.DTYPES["F8_E4M3"]


# --- parameters as a flat dictionary ------------------------------------------------------------


def _abstract(cfg: config.Model, dtype: Any) -> tuple[nnx.GraphDef, nnx.State]:
  """Graph and shapes of the model; nothing is allocated."""
  shape = nnx.eval_shape(lambda: Transformer(cfg, rngs=nnx.Rngs(0), dtype=dtype))
  return nnx.split(shape)


def _flat(state: nnx.State) -> dict[names.Path, Any]:
  """Parameters and buffers by attribute path."""
  return traverse_util.flatten_dict(nnx.to_pure_dict(state))


# --- load ---------------------------------------------------------------------------------------


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


def _block_size(values: dict[str, Any]) -> tuple[int, int] | None:
  """Rows and columns that share an FP8 scale; None without a quantization_config."""
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


def _check_tensors(folder: pathlib.Path, cfg: config.Model, slots: list[names.Slot],
                   stored: dict[str, Stored], block: tuple[int, int] | None, *, tied: bool
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
    scales[f"{name}_scale_inv"] = fp8_blocks.scale_shape(shape, block)
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


def _read(name: str, stored: dict[str, Stored], block: tuple[int, int] | None) -> np.ndarray:
  """One tensor; FP8 comes back as fp32."""
  array = stored[name].read()
  if array.dtype == _FLOAT8:
    array = fp8_blocks.dequantize(array, stored[f"{name}_scale_inv"].read(), block)
  return array


def _check_duplicates(cfg: config.Model, stored: dict[str, Stored],
                      block: tuple[int, int] | None) -> None:
  """Warns where a module's own embedding or head differs from the main model's."""
  for name, main in names.duplicates(cfg).items():
    main = main if main in stored else "model.embed_tokens.weight"
    if name in stored and not np.array_equal(_read(name, stored, block),
                                             _read(main, stored, block)):
      warnings.warn(f"{stored[name].file}: {name!r} differs from {main!r}; the model shares one "
                    "and uses the latter", stacklevel=3)


def load(path: PathLike, dtype: str = "float32") -> Transformer:
  """The model in a Hugging Face folder of a DeepseekV3ForCausalLM.

  Args:
    path: folder with `config.json` and `model.safetensors`, or shards with their index. Tensors may
      be fp32, bf16, fp16 or FP8 e4m3 with `weight_scale_inv`, which is dequantized.
    dtype: of the parameters; router biases are fp32 always.

  Returns:
    A `Transformer`; `model(tokens_BT).logits_BTV` are the logits, `model.cfg` its configuration.

  Raises:
    ConfigError: a config key is missing, malformed or not supported; the message names it.
    ValueError: a file is missing, truncated or damaged, or a tensor is unknown, missing or has
      another shape than the config implies; the message names file and tensor.
  """
  folder = pathlib.Path(path)
  file = folder / "config.json"
  values = hf_config.read_json(file)
  param_dtype = _param_dtype(dtype)
  try:
    block = _block_size(values)
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

  graphdef, state = _abstract(cfg, param_dtype)
  arrays = {key: np.empty(leaf.shape, leaf.dtype) for key, leaf in _flat(state).items()}
  half_split = values.get("rope_interleave") is False
  by_name = {slot.name: slot for slot in slots}
  for name in stored:  # file by file
    if name in by_name:
      slot = by_name[name]
      slot.read(_read(name, stored, block),
                [arrays[part.path][part.index] for part in slot.parts], half_split=half_split)
  if tied:
    arrays[("head_DV",)][...] = arrays[("embedding_VD",)].T
  _check_duplicates(cfg, stored, block)
  on_device = {key: jnp.asarray(arrays.pop(key)) for key in list(arrays)}
  nnx.replace_by_pure_dict(state, traverse_util.unflatten_dict(on_device))
  return nnx.merge(graphdef, state)


def _param_dtype(dtype: Any) -> np.dtype:
  try:
    found = jnp.dtype(dtype)
  except TypeError:
    found = None
  if found not in (jnp.float32, jnp.bfloat16, jnp.float16):
    raise ValueError(f"dtype={dtype!r} must be float32, bfloat16 or float16")
  return found


# --- save ---------------------------------------------------------------------------------------


def _tensors(cfg: config.Model, arrays: dict[names.Path, jax.Array], dtype: np.dtype | None
             ) -> Iterable[tuple[str, int, Callable[[], np.ndarray]]]:
  """(name, bytes, maker) of every tensor to write."""
  kept: dict[names.Path, tuple[tuple[int, ...], np.ndarray]] = {}

  def host(part: names.Part) -> np.ndarray:
    layer = part.index[:1]  # one layer of a stack comes to the host at a time
    if part.path not in kept or kept[part.path][0] != layer:
      kept[part.path] = layer, np.asarray(arrays[part.path][layer])
    return kept[part.path][1][part.index[1:]]

  def stored_dtype(slot: names.Slot) -> np.dtype:
    if slot.float32:
      return np.dtype(np.float32)
    return dtype or np.dtype(arrays[slot.parts[0].path].dtype)

  def make(slot: names.Slot) -> np.ndarray:
    return slot.write([host(part).astype(stored_dtype(slot)) for part in slot.parts])

  slots = {slot.name: slot for slot in names.slots(cfg)}
  for name, main in [*((name, name) for name in slots), *names.duplicates(cfg).items()]:
    slot = slots[main]
    size = int(np.prod(slot.shape, dtype=np.int64)) * stored_dtype(slot).itemsize
    yield name, size, lambda slot=slot: make(slot)
  empty = dtype or np.dtype(arrays[("embedding_VD",)].dtype)
  for name, shape in names.empty_tensors(cfg).items():
    yield name, 0, lambda shape=shape: np.zeros(shape, empty)


def save(model: Transformer, path: PathLike, dtype: str | None = None, *,
         max_shard_bytes: int = SHARD_BYTES, tokenizer: PathLike | None = None,
         bos_token_id: int | None = None, eos_token_id: int | None = None) -> None:
  """Writes a folder that transformers' `DeepseekV3ForCausalLM.from_pretrained` loads.

  The folder appears under its name complete or not at all.

  Args:
    model: the model; its `cfg` becomes `config.json`.
    path: the folder to make; it must not exist, or be empty.
    dtype: of the tensors; None keeps the parameters'. Router biases are fp32 always.
    max_shard_bytes: largest shard, unless one tensor alone exceeds it.
    tokenizer: a `tokenizer.json` to copy into the folder.
    bos_token_id, eos_token_id: for `config.json`.

  Raises:
    ConfigError: `model.cfg` computes something that DeepseekV3ForCausalLM cannot.
    ValueError: `path` is taken, the dtype is unknown, or the tokenizer file is missing.
  """
  folder = pathlib.Path(path)
  if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
    raise ValueError(f"{folder} exists already; remove it or choose another path")
  if tokenizer is not None and not pathlib.Path(tokenizer).is_file():
    raise ValueError(f"tokenizer={str(tokenizer)!r} is not a file")
  if max_shard_bytes <= 0:
    raise ValueError(f"max_shard_bytes={max_shard_bytes} must be positive")
  target = None if dtype is None else _param_dtype(dtype)
  arrays = _flat(nnx.state(model))
  name = (target or arrays[("embedding_VD",)].dtype).name
  values = hf_config.to_hf(model.cfg, dtype=name, bos_token_id=bos_token_id,
                           eos_token_id=eos_token_id)
  folder.parent.mkdir(parents=True, exist_ok=True)
  partial = folder.parent / f".{folder.name}.{secrets.token_hex(4)}.tmp"
  partial.mkdir()
  try:
    safetensors_files.write(partial, _tensors(model.cfg, arrays, target), max_shard_bytes)
    text = json.dumps(values, indent=2) + "\n"
    (partial / "config.json").write_text(text, encoding="utf-8")
    safetensors_files.fsync(partial / "config.json")
    if tokenizer is not None:
      shutil.copyfile(tokenizer, partial / "tokenizer.json")
      safetensors_files.fsync(partial / "tokenizer.json")
    safetensors_files.fsync(partial)
    os.replace(partial, folder)
    safetensors_files.fsync(folder.parent)
  except BaseException:
    shutil.rmtree(partial, ignore_errors=True)
    raise
