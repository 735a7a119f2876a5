"""Sources: where documents come from.

| spec | documents |
|---|---|
| `stdlib` | the Python standard library's source on this machine, one a file |
| file, folder or glob | `.jsonl` and `.parquet`: one a record; any other: one a file, UTF-8 |
| `hf:NAME[:CONFIG][@SPLIT]` | one a record of a Hugging Face dataset, streamed |
| `python:FILE.py:NAME[:ARG]` | generated: what the function NAME of a file yields, each a string |
| `shards:DIR` | a corpus that `dsv3 tokenize` wrote (see shards.py) |

Files ending in `.gz` (and `.zst`, with the package zstandard) are read through. `resolve`
checks what can be checked before any work: existence, emptiness, size, missing packages.

A file that was named must be readable text; in a folder or glob, files that are binary, badly
encoded or empty are left out and counted. A document is read only up to the size limit, so that
one longer than memory ends in an error and not in a crash.

A corpus is known by its files' sizes and times, a generated one by what its FILE.py says; what that
imports is not looked at.
"""

import codecs
import collections
import dataclasses
import glob
import hashlib
import importlib.util
import json
import os
import sys
import sysconfig
import types
from collections.abc import Iterator
from typing import Any, NamedTuple

from dsv3_jax.config import ConfigError
from dsv3_jax.data import compressed

RECORDS = (".jsonl", ".ndjson", ".parquet")
_SNIFF = 8192  # bytes looked at to tell binary from text


class Document(NamedTuple):
  name: str  # file, and line or row in it
  text: str


@dataclasses.dataclass(frozen=True)
class File:
  path: str
  size: int  # bytes on disk
  mtime_ns: int  # of a python: source a hash of the file
  named: bool  # given by its own name, so that an unreadable one is an error

  @property
  def kind(self) -> str:
    """Suffix without compression: `.jsonl`, `.py`, ..."""
    return os.path.splitext(_uncompressed(self.path))[1].lower()


@dataclasses.dataclass(frozen=True)
class Source:
  spec: str
  kind: str  # files, hf, python or shards
  files: tuple[File, ...] = ()
  left_out: tuple[tuple[str, int], ...] = ()  # reason and number of files that are not in `files`

  @property
  def size(self) -> int:
    """Bytes of text on disk; 0 where unknown."""
    return 0 if self.kind == "python" else sum(f.size for f in self.files)

  def fingerprint(self) -> Any:
    """What identifies the contents without reading them; JSON-able."""
    return [self.kind, self.spec if self.kind != "files" else "",
            [[f.path, f.size, f.mtime_ns] for f in self.files]]


def resolve(spec: str, max_document_bytes: int) -> Source:
  """Finds what a `data.sources` entry names, without reading it.

  Raises:
    ConfigError: nothing there, nothing but empty or binary files, a text file longer than
      `max_document_bytes`, or a package that is not installed.
  """
  if spec.startswith("hf:"):
    _hf_name(spec)
    _need("datasets", spec)
    return Source(spec, "hf")
  if spec.startswith("python:"):
    path = os.path.abspath(_python_name(spec)[0])
    with open(path, "rb") as file:  # what it says, not when it was written
      digest = hashlib.sha256(file.read()).digest()
    return Source(spec, "python", (File(path, 0, int.from_bytes(digest[:7], "big"), True),))
  if spec.startswith("shards:"):
    path = os.path.abspath(os.path.expanduser(spec.removeprefix("shards:")))
    if not os.path.isfile(os.path.join(path, "index.json")):
      raise ConfigError(f"data.sources: {spec!r} has no index.json; write shards with "
                        "`dsv3 tokenize`, or correct the path")
    return Source("shards:" + path, "shards")

  named = False
  if spec == "stdlib":
    paths = list(_walk(sysconfig.get_paths()["stdlib"], only=".py"))
  else:
    path = os.path.abspath(os.path.expanduser(spec))
    if os.path.isdir(path):
      paths = list(_walk(path))
      if not paths:
        raise ConfigError(f"data.sources: the folder {spec!r} has no files")
    elif os.path.exists(path):
      paths, named = [path], True
    elif glob.has_magic(spec):
      paths = sorted(p for p in glob.glob(path, recursive=True) if os.path.isfile(p))
      if not paths:
        raise ConfigError(f"data.sources: no file matches {spec!r}")
    else:
      raise ConfigError(f"data.sources: {spec!r} does not exist; give stdlib, a file, a folder, a "
                        "glob, hf:NAME, python:FILE.py:NAME or shards:DIR")
  files = []
  for path in paths:
    stat = os.stat(path)
    files.append(File(path, stat.st_size, stat.st_mtime_ns, named))
  unusable = [_unusable(f, max_document_bytes) for f in files]
  files = tuple(f for f, reason in zip(files, unusable, strict=True) if not reason)
  if not files:
    raise ConfigError(f"data.sources: {spec!r} has no text: its {len(paths)} files are empty or "
                      "binary")
  left_out = collections.Counter(reason for reason in unusable if reason)
  return Source(spec, "files", files, tuple(sorted(left_out.items())))


def documents(source: Source, text_key: str, max_document_bytes: int,
              skipped: collections.Counter | None = None, mixed: bool = False
              ) -> Iterator[Document]:
  """Reads a source's documents one after another.

  Args:
    source: not of kind shards.
    text_key: field of a record that holds its text.
    max_document_bytes: limit of one document.
    skipped: counts what was left out, by reason.
    mixed: files in an order that mixes folders, for a sample of the first ones to be a fair one;
      otherwise sorted by path.

  Raises:
    ConfigError: a bad record, a named file that is no UTF-8 text, a document over the limit.
  """
  skipped = collections.Counter() if skipped is None else skipped
  skipped.update(dict(source.left_out))
  if source.kind == "hf":
    yield from _hf_documents(source.spec, text_key, max_document_bytes, skipped)
    return
  if source.kind == "python":
    yield from _python_documents(source.spec, max_document_bytes, skipped)
    return
  files = source.files
  if mixed:
    files = sorted(files, key=lambda f: hashlib.sha256(os.path.basename(f.path).encode()).digest())
  for file in files:
    if file.kind == ".parquet":
      records = _parquet_documents(file, text_key)
    elif file.kind in RECORDS:
      records = _jsonl_documents(file, text_key, max_document_bytes)
    else:
      records = _text_document(file, max_document_bytes, skipped)
    for document in records:
      if document.text:
        _check_length(document, max_document_bytes)
        yield document
      else:
        skipped["empty"] += 1


def _walk(root: str, only: str = "") -> Iterator[str]:
  """Files under `root` in a fixed order; hidden ones and installed packages left out."""
  leave_out = {"__pycache__", "site-packages", "dist-packages"} if only else set()
  for folder, folders, names in os.walk(root):
    folders[:] = sorted(f for f in folders if not f.startswith(".") and f not in leave_out)
    for name in sorted(names):
      path = os.path.join(folder, name)
      if not name.startswith(".") and name.endswith(only) and os.path.isfile(path):
        yield path


def _uncompressed(path: str) -> str:
  root, suffix = os.path.splitext(path)
  return root if suffix in compressed.SUFFIXES else path


def _need(package: str, what: str) -> None:
  if package in sys.modules:  # it may have no spec, for which find_spec would raise
    return
  spec = importlib.util.find_spec(package)
  if spec is None or spec.origin is None:  # a folder of that name that happens to lie here
    raise ConfigError(f"data.sources: {what!r} needs the package {package}, which is not "
                      f"installed; pip install {package}")


def _unusable(file: File, max_document_bytes: int) -> str:
  """Why a file need not be read, or ""; errors for what must not be passed over."""
  if file.size == 0:
    if file.named:
      raise ConfigError(f"data.sources: {file.path} is empty")
    return "empty"
  if file.kind == ".parquet":
    _need("pyarrow", file.path)
    return ""
  if file.path.endswith(".zst"):
    _need("zstandard", file.path)
  if file.kind in RECORDS or _uncompressed(file.path) != file.path:
    return ""
  if file.size <= max_document_bytes:
    return ""
  try:
    with open(file.path, "rb") as f:
      head = f.read(_SNIFF)
  except OSError as error:
    raise ConfigError(f"data.sources: {file.path} cannot be read: {error}") from None
  if b"\0" in head and not file.named:
    return "binary"
  raise _too_long(file.path, f"{file.size:,} bytes", max_document_bytes)


def _too_long(name: str, size: str, limit: int) -> ConfigError:
  return ConfigError(f"data.sources: the document {name} has {size}, more than "
                     f"data.max_document_bytes={limit:,}; raise that key, or split the document "
                     "(in a .jsonl file each line is a document)")


def _check_length(document: Document, limit: int) -> None:
  if 4 * len(document.text) > limit:  # UTF-8 takes at most 4 bytes a character
    size = len(document.text.encode("utf-8", errors="replace"))
    if size > limit:
      raise _too_long(document.name, f"{size:,} bytes", limit)


def _text_document(file: File, limit: int, skipped: collections.Counter) -> Iterator[Document]:
  try:
    with compressed.open_binary(file.path) as f:
      data = f.read(limit + 1)
  except compressed.ERRORS as error:
    raise ConfigError(f"data.sources: {file.path} cannot be read: {error}") from None
  if b"\0" in data[:_SNIFF]:
    if file.named:
      if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ConfigError(f"data.sources: {file.path} is UTF-16, not UTF-8; convert it, for "
                          "example with iconv -f UTF-16 -t UTF-8")
      raise ConfigError(f"data.sources: {file.path} is binary, not text; name a UTF-8 text, .jsonl "
                        "or .parquet file")
    skipped["binary"] += 1
    return
  if len(data) > limit:
    raise _too_long(file.path, f"more than {limit:,} bytes", limit)
  try:
    yield Document(file.path, data.decode("utf-8"))
  except UnicodeDecodeError as error:
    if file.named:
      line = data.count(b"\n", 0, error.start) + 1
      raise ConfigError(f"data.sources: {file.path} is not UTF-8: byte 0x{data[error.start]:02x} "
                        f"at offset {error.start}, line {line}; convert it, for example with "
                        "iconv -f LATIN1 -t UTF-8") from None
    skipped["badly encoded"] += 1


def _record(record: Any, name: str, text_key: str) -> Document:
  """One record's document."""
  if not isinstance(record, dict):
    raise ConfigError(f"{name}: a record must be an object, not {type(record).__name__}")
  if text_key not in record:
    raise ConfigError(f"{name} has no field data.text_key={text_key!r}; its fields are "
                      f"{', '.join(map(repr, record)) or 'none'}")
  text = "" if record[text_key] is None else record[text_key]
  if not isinstance(text, str):
    raise ConfigError(f"{name}: field {text_key!r} has type {type(text).__name__}; text is "
                      "expected")
  try:
    text.encode("utf-8")
  except UnicodeEncodeError as error:
    raise ConfigError(f"{name}: field {text_key!r} is no valid Unicode: {error.reason} at "
                      f"character {error.start}") from None
  return Document(name, text)


def _jsonl_documents(file: File, text_key: str, limit: int) -> Iterator[Document]:
  # JSON may spell a character in 6 bytes (\uXXXX) or 12; a line gets room for that and its fields.
  line_limit = 12 * limit + 2**16
  number = 0
  try:
    with compressed.open_binary(file.path) as f:
      while line := f.readline(line_limit + 1):
        number += 1
        name = f"{file.path}:{number}"
        if len(line) > line_limit:
          raise _too_long(name, f"more than {line_limit:,} bytes as JSON", limit)
        if not line.strip():
          continue
        try:
          record = json.loads(line)
        except ValueError as error:  # UnicodeDecodeError too
          raise ConfigError(f"{name} is not a JSON record in UTF-8: {error}") from None
        yield _record(record, name, text_key)
  except compressed.ERRORS as error:
    raise ConfigError(f"data.sources: {file.path} cannot be read after line {number}: "
                      f"{error}") from None


def _parquet_documents(file: File, text_key: str) -> Iterator[Document]:
  import pyarrow
  from pyarrow import parquet

  try:
    table = parquet.ParquetFile(file.path, buffer_size=2**20)  # streams; 0 reads a row group
    if text_key not in table.schema_arrow.names:
      raise ConfigError(f"{file.path} has no column data.text_key={text_key!r}; its columns are "
                        f"{', '.join(table.schema_arrow.names)}")
    row = 0
    for batch in table.iter_batches(batch_size=256, columns=[text_key]):
      for text in batch.column(0).to_pylist():
        yield _record({text_key: text}, f"{file.path} row {row}", text_key)
        row += 1
  except (pyarrow.ArrowException, OSError) as error:
    raise ConfigError(f"data.sources: {file.path} is no readable Parquet file: {error}") from None


def _hf_name(spec: str) -> tuple[str, str | None, str]:
  name, _, split = spec.removeprefix("hf:").partition("@")
  name, _, config = name.partition(":")
  if not name:
    raise ConfigError(f"data.sources: {spec!r} names no dataset; write hf:NAME[:CONFIG][@SPLIT]")
  return name, config or None, split or "train"


def _hf_documents(spec: str, text_key: str, limit: int, skipped: collections.Counter
                  ) -> Iterator[Document]:
  import datasets

  name, config, split = _hf_name(spec)
  row = -1
  try:
    records = datasets.load_dataset(name, config, split=split, streaming=True)
    for row, record in enumerate(records):
      document = _record(record, f"{spec} row {row}", text_key)
      if document.text:
        _check_length(document, limit)
        yield document
      else:
        skipped["empty"] += 1
  except ConfigError:
    raise
  except Exception as error:  # network, names, splits: the library raises many kinds
    where = "cannot be opened" if row < 0 else f"cannot be read after row {row:,}"
    first_line = str(error).partition("\n")[0] or type(error).__name__
    raise ConfigError(
        f"data.sources: the dataset {spec!r} {where}: {first_line}; check the name, the "
        "configuration, the split and the network. Without a network, name files instead: the "
        "dataset's .parquet or .jsonl, or shards that `dsv3 tokenize` made where it is online"
    ) from error


def _python_name(spec: str) -> tuple[str, str, tuple[str, ...]]:
  """File, function and its arguments, none or one."""
  path, _, rest = spec.removeprefix("python:").partition(":")
  name, *arguments = rest.split(":", 1)
  if not name.isidentifier():
    raise ConfigError(f"data.sources: {spec!r} names no function; write python:FILE.py:NAME[:ARG]")
  if not os.path.isfile(path):
    raise ConfigError(f"data.sources: {spec!r}: there is no file {path!r}")
  return path, name, tuple(arguments)


def _python_documents(spec: str, limit: int, skipped: collections.Counter) -> Iterator[Document]:
  path, name, arguments = _python_name(spec)
  module = types.ModuleType("documents")
  module.__file__ = path
  with open(path, encoding="utf-8") as f:
    exec(compile(f.read(), path, "exec"), module.__dict__)
  function = getattr(module, name, None)
  if not callable(function):
    raise ConfigError(f"data.sources: {spec!r}: {path} has no function {name}")
  for i, text in enumerate(function(*arguments)):
    if not isinstance(text, str):
      raise ConfigError(f"data.sources: {spec!r} gave {type(text).__name__}, not text, as its "
                        f"document {i}")
    document = Document(f"{spec}:{i}", text)
    if text:
      _check_length(document, limit)
      yield document
    else:
      skipped["empty"] += 1
