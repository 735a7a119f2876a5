"""Records, one JSON object a line, with errors that say the line."""

import difflib
import gzip
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from dsv3_jax.config import ConfigError
from dsv3_jax.data import compressed
from dsv3_jax.files import write_atomic

SHOWN = 8  # errors of one file that are told at once

T = TypeVar("T")


def read(path: str | Path, make: Callable[[dict[str, Any]], T]) -> list[T]:
  """What `make` makes of each record of a file; empty lines are passed over.

  Args:
    path: of UTF-8 text; `.gz` and `.zst` (with the package zstandard) are read through.
    make: raises ConfigError for what is wrong; file and line are put before it.

  Raises:
    ConfigError: no such file, a damaged one, no record, or bad records: each is named by its line.
  """
  found, errors, number = [], [], 0
  try:
    with compressed.open_binary(str(path)) as file:
      for number, line in enumerate(file, 1):
        if not line.strip():
          continue
        try:
          found.append(make(_record(line)))
        except ConfigError as error:
          errors.append(f"{path}:{number}: {error}")
  except ImportError:
    raise ConfigError(f"{path} needs the package zstandard, which is not installed; pip install "
                      "zstandard") from None
  except compressed.ERRORS as error:
    raise ConfigError(f"{path} cannot be read after line {number}: {error}") from None
  if errors:
    more = [f"and {len(errors) - SHOWN} more lines"] if len(errors) > SHOWN else []
    raise ConfigError("\n".join([*errors[:SHOWN], *more]))
  if not found:
    raise ConfigError(f"{path} has no records; write one JSON object a line")
  return found


def write(path: str | Path, records: Iterable[dict[str, Any]]) -> Path:
  """Writes records; `.gz` is compressed, the same bytes for the same records.

  Raises:
    ConfigError: a suffix that `read` would take for another compression.
    OSError: as of `files.write_atomic`.
  """
  text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
  if str(path).endswith(".zst"):
    raise ConfigError(f"{path}: only .jsonl and .jsonl.gz are written")
  compress = str(path).endswith(".gz")
  return write_atomic(path, gzip.compress(text.encode(), mtime=0) if compress else text)


def _record(line: bytes) -> dict[str, Any]:
  try:
    record = json.loads(line.decode("utf-8"))
  except (ValueError, RecursionError) as error:  # UnicodeDecodeError too
    raise ConfigError(f"not a JSON object in UTF-8: {error}") from None
  if not isinstance(record, dict):
    raise ConfigError(f"a record is an object, not {type(record).__name__}")
  return record


def known(record: dict[str, Any], keys: tuple[str, ...]) -> None:
  """Raises ConfigError for a key that is none of `keys`: a misspelt one would be lost."""
  for key in record:
    if key not in keys:
      near = difflib.get_close_matches(key, keys, n=1)
      raise ConfigError(f"unknown key {key!r}; there are {', '.join(keys)}"
                        f"{f'; did you mean {near[0]!r}?' if near else ''}")


def text(value: Any, name: str) -> str:
  """The value, which must be text that UTF-8 can express.

  Raises:
    ConfigError: it is not; the message has `name`.
  """
  if not isinstance(value, str):
    raise ConfigError(f"{name} is {type(value).__name__}, not text")
  try:
    value.encode()
  except UnicodeEncodeError as error:
    raise ConfigError(f"{name} is no valid Unicode: {error.reason} at character "
                      f"{error.start}") from None
  return value
