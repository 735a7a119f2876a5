"""Saving a DeepseekV3ForCausalLM folder, one shard in memory at a time."""

import json
import os
import pathlib
import secrets
import shutil
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
from flax import nnx

from dsv3_jax import config
from dsv3_jax.fp8.qtensor import QTensor
from dsv3_jax.interop import fp8_blocks, hf_config, names, safetensors_files
from dsv3_jax.interop.parameters import PathLike, flat, param_dtype
from dsv3_jax.model.transformer import Transformer

SHARD_BYTES = 5 * 10**9


def _tensors(cfg: config.Model, arrays: dict[names.Path, jax.Array | QTensor],
             dtype: np.dtype | None, block: fp8_blocks.Block | None
             ) -> Iterable[tuple[str, int, Callable[[], np.ndarray]]]:
  """(name, bytes, maker) of every tensor to write; linear layers in FP8 where there is a block."""
  kept: dict[names.Path, tuple[tuple[int, ...], Any]] = {}

  def fetch(slot: names.Slot, path: names.Path, layer: tuple[int, ...]) -> Any:
    """One layer of a stack on the host: an array, or codes and scales."""
    leaf = arrays[path][layer]
    if block and slot.quantized and not isinstance(leaf, QTensor):
      lead = leaf.shape[:len(slot.parts[0].index) - 1]
      leaf = fp8_blocks.quantize(leaf, (*lead, *slot.shape[::-1]), block)
    if isinstance(leaf, QTensor):
      return np.asarray(leaf.codes), np.asarray(leaf.scale_values())
    return np.asarray(leaf)

  def host(slot: names.Slot, part: names.Part) -> Any:
    layer, rest = part.index[:1], part.index[1:]
    if part.path not in kept or kept[part.path][0] != layer:
      kept[part.path] = layer, fetch(slot, part.path, layer)
    found = kept[part.path][1]
    return tuple(x[rest] for x in found) if isinstance(found, tuple) else found[rest]

  def stored_dtype(slot: names.Slot) -> np.dtype:
    if slot.float32:
      return np.dtype(np.float32)
    leaf = arrays[slot.parts[0].path]
    return dtype or np.dtype((arrays[("embedding_VD",)] if isinstance(leaf, QTensor) else leaf
                              ).dtype)

  def quantized(slot: names.Slot, which: int) -> np.ndarray:
    return np.ascontiguousarray(host(slot, slot.parts[0])[which].T)

  def make(slot: names.Slot) -> np.ndarray:
    leaf = arrays[slot.parts[0].path]
    if isinstance(leaf, QTensor):
      weight = fp8_blocks.dequantize(quantized(slot, 0), quantized(slot, 1), leaf.tile[::-1])
      return weight.astype(stored_dtype(slot))
    return slot.write([host(slot, part).astype(stored_dtype(slot)) for part in slot.parts])

  slots = {slot.name: slot for slot in names.slots(cfg)}
  for name, main in [*((name, name) for name in slots), *names.duplicates(cfg).items()]:
    slot = slots[main]
    count = int(np.prod(slot.shape, dtype=np.int64))
    if not (block and slot.quantized):
      yield name, count * stored_dtype(slot).itemsize, lambda slot=slot: make(slot)
      continue
    yield name, count, lambda slot=slot: quantized(slot, 0)
    scales = int(np.prod(fp8_blocks.scale_shape(slot.shape, block)))
    yield name + fp8_blocks.SUFFIX, 4 * scales, lambda slot=slot: quantized(slot, 1)
  empty = dtype or np.dtype(arrays[("embedding_VD",)].dtype)
  for name, shape in names.empty_tensors(cfg).items():
    yield name, 0, lambda shape=shape: np.zeros(shape, empty)


def _block_to_write(arrays: dict[names.Path, jax.Array | QTensor], quantization: str | None,
                    block: fp8_blocks.Block | None) -> tuple[fp8_blocks.Block | None, bool]:
  """Block of the FP8 weights to write (None: none are) and whether their scales are powers of 2."""
  if quantization not in (None, "fp8", "none"):
    raise ValueError(f"quantization={quantization!r} must be \"fp8\" or \"none\"")
  if block is not None and not (isinstance(block, (tuple, list)) and len(block) == 2
                               and all(type(b) is int and b > 0 for b in block)):
    raise ValueError(f"block={block!r} must be two positive integers")
  held = [x for x in arrays.values() if isinstance(x, QTensor)]
  if quantization == "none" or (quantization is None and not held):
    if block is not None:
      raise ValueError(f"block={block} goes with quantization=\"fp8\"")
    return None, False
  if not held:
    return block or fp8_blocks.BLOCK, False
  found, pow2 = fp8_blocks.block_of(held)
  if block not in (None, found):
    raise ValueError(f"block={block}: the model's weights are quantized in blocks of {found} "
                     "already; load them with quantized=\"dequantize\" for other blocks")
  return found, pow2


def save(model: Transformer, path: PathLike, dtype: str | None = None, *,
         quantization: str | None = None, block: fp8_blocks.Block | None = None,
         max_shard_bytes: int = SHARD_BYTES, tokenizer: PathLike | None = None,
         bos_token_id: int | None = None, eos_token_id: int | None = None) -> None:
  """Writes a folder that transformers' `DeepseekV3ForCausalLM.from_pretrained` loads.

  The folder appears under its name complete or not at all.

  Args:
    model: the model; its `cfg` becomes `config.json`.
    path: the folder to make; it must not exist, or be empty.
    dtype: of the tensors that are not FP8; None keeps the parameters', except that weights which
      are quantized here leave the others in bfloat16, as released. Router biases are fp32 always.
    quantization: "fp8" writes the linear layers in FP8 with `weight_scale_inv`, and "none" does not
      (FP8 weights are dequantized); None: as the model has them.
    block: outputs and inputs that share an FP8 scale; None: the model's, or 128 x 128.
    max_shard_bytes: largest shard, unless one tensor alone exceeds it.
    tokenizer: a `tokenizer.json` to copy into the folder.
    bos_token_id, eos_token_id: for `config.json`.

  Raises:
    ConfigError: `model.cfg` computes something that DeepseekV3ForCausalLM cannot.
    ValueError: `path` is taken, a dtype, quantization or block cannot be, or the tokenizer file is
      missing.
  """
  folder = pathlib.Path(path)
  if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
    raise ValueError(f"{folder} exists already; remove it or choose another path")
  if tokenizer is not None and not pathlib.Path(tokenizer).is_file():
    raise ValueError(f"tokenizer={str(tokenizer)!r} is not a file")
  if max_shard_bytes <= 0:
    raise ValueError(f"max_shard_bytes={max_shard_bytes} must be positive")
  arrays = {key: fp8_blocks.held(x) for key, x in flat(nnx.state(model)).items()}
  block, pow2 = _block_to_write(arrays, quantization, block)
  plain = not any(isinstance(x, QTensor) for x in arrays.values())
  if dtype is None and block and plain:
    dtype = "bfloat16"
  target = None if dtype is None else param_dtype(dtype)
  name = (target or arrays[("embedding_VD",)].dtype).name
  values = hf_config.to_hf(model.cfg, dtype=name, bos_token_id=bos_token_id,
                           eos_token_id=eos_token_id)
  if block:
    values["quantization_config"] = fp8_blocks.quantization_config(block, pow2=pow2)
  folder.parent.mkdir(parents=True, exist_ok=True)
  partial = folder.parent / f".{folder.name}.{secrets.token_hex(4)}.tmp"
  partial.mkdir()
  try:
    safetensors_files.write(partial, _tensors(model.cfg, arrays, target, block), max_shard_bytes)
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
