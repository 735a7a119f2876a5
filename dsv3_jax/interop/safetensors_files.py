"""Reading and writing sharded safetensors one tensor at a time.

The `safetensors` package validates each file; the bytes are read here, because its numpy reader
knows no float8 and its memory maps would keep every page of a shard resident.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping

import ml_dtypes
import numpy as np
import safetensors
from safetensors import numpy as safetensors_numpy

from dsv3_jax.interop.hf_config import read_json

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

DTYPES = {
    "F64": np.dtype(np.float64), "F32": np.dtype(np.float32), "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16), "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
}


@dataclasses.dataclass(frozen=True)
class Stored:
  """Where one tensor lies."""

  name: str
  file: pathlib.Path
  offset: int  # bytes from the start of the file
  dtype: np.dtype
  shape: tuple[int, ...]

  def read(self) -> np.ndarray:
    """The tensor, in the memory of this array alone."""
    count = int(np.prod(self.shape, dtype=np.int64))
    array = np.fromfile(self.file, self.dtype, count, offset=self.offset)
    if array.size != count:
      raise ValueError(f"{self.file} ends within tensor {self.name!r}; the file was cut while it "
                       "was being read")
    return array.reshape(self.shape)


def _file_names(folder: pathlib.Path) -> dict[str, set[str] | None]:
  """Files of the folder and the tensors that the index places in each (None: not said)."""
  if (folder / INDEX).exists():
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
      raise ValueError(f"{folder / INDEX} has no weight_map; the index is damaged")
    files: dict[str, set[str] | None] = {}
    for name, file in weight_map.items():
      if not isinstance(file, str) or pathlib.PurePath(file).name != file:
        raise ValueError(f"{folder / INDEX} places {name!r} in {file!r}; a file name within the "
                         "folder is expected")
      files.setdefault(file, set()).add(name)
    return files
  if (folder / SINGLE).exists():
    return {SINGLE: None}
  raise ValueError(f"{folder} has neither {INDEX} nor {SINGLE}")


def _header(file: pathlib.Path) -> Iterator[Stored]:
  try:
    with safetensors.safe_open(file, framework="numpy"):
      pass  # checks that the header is sound and covers the file exactly
    with open(file, "rb") as stream:
      size = int.from_bytes(stream.read(8), "little")
      header = json.loads(stream.read(size))
  except FileNotFoundError:
    raise ValueError(f"{file} is missing, but {INDEX} names it") from None
  except (safetensors.SafetensorError, OSError, ValueError) as error:
    raise ValueError(f"{file} is truncated or damaged ({error}); fetch or write it again"
                     ) from error
  for name, entry in header.items():
    if name == "__metadata__":
      continue
    if entry["dtype"] not in DTYPES:
      raise ValueError(f"{file}: tensor {name!r} has dtype {entry['dtype']}; one of "
                       f"{', '.join(DTYPES)} is expected")
    yield Stored(name, file, 8 + size + entry["data_offsets"][0], DTYPES[entry["dtype"]],
                 tuple(entry["shape"]))


def scan(folder: pathlib.Path) -> dict[str, Stored]:
  """Every tensor of the folder by name, file by file; reads headers only.

  Raises:
    ValueError: no weights, a missing, truncated or damaged file, an unknown dtype, or an index
      that disagrees with its files; the message names the file.
  """
  found: dict[str, Stored] = {}
  for file, listed in sorted(_file_names(folder).items()):
    here = {stored.name: stored for stored in _header(folder / file)}
    absent = sorted((listed or set()) - here.keys())
    if absent:
      raise ValueError(f"{INDEX} places {absent[0]!r} in {file}, which does not hold it"
                       + (f" (nor {len(absent) - 1} more)" if absent[1:] else ""))
    twice = sorted(found.keys() & here.keys())
    if twice:
      raise ValueError(f"tensor {twice[0]!r} is in {found[twice[0]].file} and in {folder / file}")
    found |= here
  return found


def write(folder: pathlib.Path, tensors: Iterable[tuple[str, int, Callable[[], np.ndarray]]],
          max_shard_bytes: int) -> None:
  """Writes safetensors shards and their index into an existing folder.

  Args:
    folder: where to write.
    tensors: (name, bytes, function that gives the contiguous array); an array lives until its
      shard is written.
    max_shard_bytes: a shard is closed before it would exceed this; one larger tensor stands alone.
  """
  shards: list[list[tuple[str, Callable[[], np.ndarray]]]] = [[]]
  total = filled = 0
  for name, size, make in tensors:
    if shards[-1] and filled + size > max_shard_bytes:
      shards.append([])
      filled = 0
    shards[-1].append((name, make))
    filled += size
    total += size
  weight_map: dict[str, str] = {}
  for number, shard in enumerate(shards, 1):
    file = SINGLE if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
    arrays: Mapping[str, np.ndarray] = {name: make() for name, make in shard}
    safetensors_numpy.save_file(dict(arrays), folder / file, metadata={"format": "pt"})
    weight_map |= dict.fromkeys(arrays, file)
    fsync(folder / file)
  if len(shards) > 1:
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2)
    (folder / INDEX).write_text(text + "\n", encoding="utf-8")
    fsync(folder / INDEX)


def fsync(path: pathlib.Path) -> None:
  """Flushes a file or folder to the disk."""
  handle = os.open(path, os.O_RDONLY)
  try:
    os.fsync(handle)
  finally:
    os.close(handle)
