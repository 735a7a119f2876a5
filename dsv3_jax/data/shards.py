"""Pre-tokenized corpora: memory-mapped token files that exceed memory without harm.

A folder holds

    index.json         format, tokenizer hash, dtype, counts, fingerprint of what it was made from
    tokenizer.json     the tokenizer itself
    documents.bin      one record a document: start, length (tokens), bytes (UTF-8), hash
    tokens-00000.bin   ids of whole documents, without bos and eos, uint16 or uint32, little endian

Documents keep the order in which they were read. `hash` is taken from the text, so that the split
into training and validation does not depend on order or place, and copies of a text fall together.
The folder is written under another name and renamed when it is complete.
"""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterable
from typing import Any

import numpy as np

from dsv3_jax import files
from dsv3_jax.config import ConfigError
from dsv3_jax.data.tokenizer import Tokenizer

FORMAT = 1
SHARD_TOKENS = 2**28  # a token file is closed once it has this many
RECORD = np.dtype([("start", "<i8"), ("length", "<i8"), ("bytes", "<i8"), ("hash", "<u8")])


def content_hash(data: bytes) -> int:
  """64 bits that identify a document's text."""
  return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


class Writer:
  """Writes a shard folder document by document; a context manager that leaves all or nothing."""

  def __init__(self, folder: str, tokenizer: Tokenizer, shard_tokens: int = SHARD_TOKENS):
    """Args:
      folder: must not exist, or be empty.
      tokenizer: made the ids.
      shard_tokens: size at which a token file is closed.

    Raises:
      ConfigError: the folder has contents or cannot be made.
    """
    self._folder, self._tokenizer, self._shard_tokens = folder, tokenizer, shard_tokens
    if os.path.isdir(folder) and os.listdir(folder):
      raise ConfigError(f"{folder} is not empty; name another folder or remove it")
    self._temporary = f"{folder.rstrip(os.sep)}.{uuid.uuid4().hex}.tmp"
    self._dtype = np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")
    self._sizes: list[int] = []  # tokens of each token file
    self._documents = self._bytes = 0
    self._content = hashlib.sha256()
    try:
      os.makedirs(self._temporary)
    except OSError as error:
      raise ConfigError(f"{folder} cannot be written: {error.strerror}") from None
    self._records = open(os.path.join(self._temporary, "documents.bin"), "wb")
    self._tokens = None

  def __enter__(self) -> "Writer":
    return self

  def __exit__(self, kind, *rest) -> None:
    for f in (self._records, self._tokens):
      if f is not None:
        f.close()
    shutil.rmtree(self._temporary, ignore_errors=True)  # gone already where `finish` ran

  def add(self, tokens: Iterable[int], text: bytes) -> None:
    """Appends one document: its ids and its UTF-8 text, of which size and hash are kept."""
    tokens = np.asarray(tokens, self._dtype)
    if self._tokens is None or self._sizes[-1] >= self._shard_tokens:
      self._close_tokens()
      name = f"tokens-{len(self._sizes):05d}.bin"
      self._tokens = open(os.path.join(self._temporary, name), "wb")
      self._sizes.append(0)
    record = np.array([(sum(self._sizes), len(tokens), len(text), content_hash(text))], RECORD)
    self._tokens.write(tokens.tobytes())
    self._records.write(record.tobytes())
    self._content.update(record[["length", "hash"]].tobytes())
    self._sizes[-1] += len(tokens)
    self._documents += 1
    self._bytes += len(text)

  def finish(self, **extra: Any) -> "Shards":
    """Completes the folder; `extra` goes into index.json."""
    self._close_tokens()
    _sync_close(self._records)
    index = {"format": FORMAT, "tokenizer": self._tokenizer.hash, "dtype": self._dtype.str,
             "shards": self._sizes, "documents": self._documents, "tokens": sum(self._sizes),
             "bytes": self._bytes, "content": self._content.hexdigest()[:16], **extra}
    files.write_atomic(os.path.join(self._temporary, "tokenizer.json"), self._tokenizer.to_json())
    files.write_atomic(os.path.join(self._temporary, "index.json"), json.dumps(index, indent=2))
    try:
      os.replace(self._temporary, self._folder)
    except OSError:
      # Another process was faster with the same contents; any other folder is refused by `Shards`.
      if not os.path.exists(os.path.join(self._folder, "index.json")):
        raise
    return Shards(self._folder)

  def _close_tokens(self) -> None:
    if self._tokens is not None:
      _sync_close(self._tokens)
    self._tokens = None


def _sync_close(f) -> None:
  f.flush()
  os.fsync(f.fileno())
  f.close()


class Shards:
  """A shard folder opened for reading; arrays are memory-mapped.

  Attributes:
    index: contents of index.json.
    records: [documents] of dtype RECORD.
  """

  def __init__(self, folder: str):
    """Raises ConfigError for a folder that is no complete shard folder of this format."""
    self.folder = folder
    try:
      with open(os.path.join(folder, "index.json"), encoding="utf-8") as f:
        self.index = json.load(f)
      if self.index["format"] != FORMAT:
        raise ConfigError(f"{folder} has shard format {self.index['format']}; this version reads "
                          f"{FORMAT}: write it anew with `dsv3 tokenize`")
      self.records = self._map("documents.bin", RECORD, self.index["documents"])
      dtype = np.dtype(self.index["dtype"])
      self._shards = [self._map(f"tokens-{i:05d}.bin", dtype, size)
                      for i, size in enumerate(self.index["shards"])]
    except (OSError, KeyError, TypeError, ValueError) as error:
      if isinstance(error, ConfigError):
        raise
      raise ConfigError(f"{folder} is not a complete shard folder: {error}; write it anew with "
                        "`dsv3 tokenize`") from None
    self._starts = np.concatenate([[0], np.cumsum(self.index["shards"])]).astype(np.int64)

  def _map(self, name: str, dtype: np.dtype, size: int) -> np.ndarray:
    path = os.path.join(self.folder, name)
    found = os.path.getsize(path)
    if found != size * dtype.itemsize:
      raise ValueError(f"{name} has {found:,} bytes instead of {size * dtype.itemsize:,}")
    return np.memmap(path, dtype, "r") if size else np.zeros(0, dtype)

  def __len__(self) -> int:
    return len(self.records)

  def tokens(self, document: int, start: int = 0, length: int | None = None) -> np.ndarray:
    """Ids of a document, int32 [n]: all, or `length` of them from `start` on."""
    first, total = (int(self.records[document][k]) for k in ("start", "length"))
    length = total - start if length is None else length
    shard = int(np.searchsorted(self._starts, first, side="right")) - 1
    offset = first - int(self._starts[shard]) + start
    return np.asarray(self._shards[shard][offset:offset + length], np.int32)

  def tokenizer(self, vocab_size: int = 0) -> Tokenizer:
    """The tokenizer that made the ids."""
    return Tokenizer.load(os.path.join(self.folder, "tokenizer.json"), vocab_size)

  def check_tokenizer(self, tokenizer: Tokenizer) -> None:
    """Refuses ids of another tokenizer."""
    if self.index["tokenizer"] != tokenizer.hash:
      raise ConfigError(
          f"{self.folder} was tokenized with another tokenizer ({self.index['tokenizer']}, this "
          f"one is {tokenizer.hash}); set data.tokenizer to {self.folder}/tokenizer.json, or "
          "tokenize the text anew")
