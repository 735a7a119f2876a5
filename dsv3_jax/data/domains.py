"""Domains: kinds of text apart, for looking at which experts serve which (report 4.5.3, figure 9).

The default corpus, Python's standard library, is cut into four domains that share no text:

| domain | text |
|---|---|
| `code` | modules without their docstrings and comments; the rest stands as it was written |
| `docstrings` | the docstrings of those modules, without indentation, a blank line between two |
| `tests` | files of test suites (`is_test`), whole; not every Python has them |
| `tables` | modules that are mostly literals (`is_table`), whole: character sets, op codes |

A module that is mostly long strings (documentation in Python's clothes) belongs to none of them.
Other domains are a person's own files, folders and globs, whole.

A domain should be measured on text that was not trained on. That is decided for a file, by the
hash of its text, before anything is taken out of it, as in units.py. Where too few files of a
domain were held out (a share of 5 % may miss all tables), others fill it up, and `Domain.held_out`
says so.
"""

import ast
import dataclasses
import difflib
import io
import os
import platform
import sysconfig
import tokenize
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from dsv3_jax.config import ConfigError
from dsv3_jax.data import sources
from dsv3_jax.data.shards import content_hash
from dsv3_jax.data.sources import Document
from dsv3_jax.data.tokenizer import Tokenizer

DEFAULT = ("code", "docstrings", "tests", "tables")
SUITES = frozenset(("test", "tests", "idle_test"))
SHORT = 32  # characters of a string literal, quotes included, that may be an entry of a table
FEWEST = 32  # such literals in a table
BYTES_PER_TOKEN = 6  # text that is enough for a token, of most tokenizers

Keep = Callable[[np.ndarray], np.ndarray]  # uint64 [n] content hashes -> bool [n]


@dataclasses.dataclass(frozen=True)
class Domain:
  """Text of one kind.

  Attributes:
    name: what to call it.
    source: where the text is from.
    documents: it, in an order that mixes files.
    held_out: share of the bytes of `documents` whose file was held out.
  """

  name: str
  source: str
  documents: tuple[Document, ...]
  held_out: float


def default(names: Sequence[str], keep: Keep, least: int = 0, enough: int = 0,
            max_document_bytes: int = 64 * 2**20) -> list[Domain]:
  """Domains of the standard library on this machine, of held-out files where there are enough.

  Args:
    names: of `DEFAULT`.
    keep: which files, by the hash of their text, were held out.
    least: a domain whose held-out files have fewer UTF-8 bytes takes others too.
    enough: UTF-8 bytes after which a domain takes no more documents; 0 for all.
    max_document_bytes: limit of one file.

  Returns:
    As named; a domain that this Python has no files of has no documents.

  Raises:
    ConfigError: an unknown name (the nearest is named).
  """
  check_names(names)
  root = sysconfig.get_paths()["stdlib"]
  documents, hashes = _in_order(list(sources.documents(
      sources.resolve("stdlib", max_document_bytes), "", max_document_bytes)))
  kept = keep(hashes)
  taken: dict[str, list[Document]] = {name: [] for name in names}
  sizes = dict.fromkeys(names, 0)

  def take(chosen: np.ndarray, open_names: list[str]) -> None:
    for i in np.flatnonzero(chosen):
      wanted = [n for n in open_names if not enough or sizes[n] < enough]
      if not wanted:
        return
      path = os.path.relpath(documents[i].name, root)
      if not any((name == "tests") == is_test(path) for name in wanted):
        continue  # without parsing it
      for name, text in split(path, documents[i].text).items():
        if name in wanted:
          taken[name].append(Document(documents[i].name, text))
          sizes[name] += len(text.encode())

  take(kept, list(names))
  fresh = dict(sizes)
  take(~kept, [name for name in names if sizes[name] < least])
  source = f"standard library of Python {platform.python_version()}"
  return [Domain(name, source, tuple(taken[name]), fresh[name] / max(sizes[name], 1))
          for name in names]


def own(name: str, spec: str, keep: Keep, enough: int = 0, text_key: str = "text",
        max_document_bytes: int = 64 * 2**20) -> Domain:
  """A domain of a person's own text: all of it, held out or not.

  Args:
    name: what to call it.
    spec: a file, folder, glob or hf:NAME, as in `data.sources`.
    keep: which documents count as held out.
    enough: UTF-8 bytes after which no more is read; 0 for all.
    text_key: field of records that holds the text.
    max_document_bytes: limit of one document.

  Raises:
    ConfigError: nothing there, or no text.
  """
  try:
    documents = read(spec, enough, text_key, max_document_bytes)
  except ConfigError as error:
    raise ConfigError(f"--domain={name}={spec}: {error}") from None
  documents, hashes = _in_order(documents)
  sizes = np.array([len(document.text.encode()) for document in documents])
  return Domain(name, spec, tuple(documents), float(sizes[keep(hashes)].sum() / sizes.sum()))


def read(spec: str, enough: int = 0, text_key: str = "text",
         max_document_bytes: int = 64 * 2**20) -> list[Document]:
  """A person's own text; arguments as of `own`.

  Raises:
    ConfigError: nothing there, or no text.
  """
  documents, size = [], 0
  try:
    source = sources.resolve(spec, max_document_bytes)
    if source.kind == "shards":
      raise ConfigError("shards hold no text; name the files that they were made from")
    for document in sources.documents(source, text_key, max_document_bytes, mixed=True):
      documents.append(document)
      size += len(document.text.encode())
      if enough and size >= enough:
        break
  except ConfigError as error:
    raise ConfigError(str(error).removeprefix("data.sources: ")) from None
  if not documents:
    raise ConfigError("there is no text in it")
  return documents


def check_names(names: Iterable[str]) -> None:
  """Raises ConfigError for a name that is none of `DEFAULT`."""
  for name in names:
    if name not in DEFAULT:
      near = difflib.get_close_matches(name, DEFAULT, n=1)
      raise ConfigError(f"no domain {name!r} in the default corpus; it has {', '.join(DEFAULT)}"
                        f"{f'; did you mean {near[0]!r}?' if near else ''}")


def parts(documents: Sequence[Document], tokenizer: Tokenizer, longest: int, tokens: int
          ) -> list[np.ndarray]:
  """Documents as ids, in parts of at most `longest` tokens whose order mixes the documents.

  Measured are a few sequences of many documents then, not many of a few. A part that begins a
  document has bos in front, one that ends it has eos behind.

  Args:
    documents: text.
    tokenizer: encodes it.
    longest: tokens of a part.
    tokens: how many to take in all, bos and eos included; 0 for all.

  Returns:
    int32 arrays.
  """
  found = []
  for document in documents:
    ids = np.asarray(tokenizer.encode(document.text), np.int32)
    ids = np.concatenate([[tokenizer.bos], ids, [tokenizer.eos]]).astype(np.int32)
    count = -(-len(ids) // longest)
    found += [ids[len(ids) * i // count:len(ids) * (i + 1) // count] for i in range(count)]
  found.sort(key=lambda part: content_hash(part.tobytes()))
  if not tokens:
    return found
  ends = np.cumsum([len(part) for part in found])
  taken = found[:int(np.searchsorted(ends, tokens)) + 1]
  if len(taken) and ends[len(taken) - 1] > tokens:
    taken[-1] = taken[-1][:len(taken[-1]) - int(ends[len(taken) - 1] - tokens)]
  return taken


# --- one file -----------------------------------------------------------------------------------


def is_test(path: str) -> bool:
  """Whether a path below the library's root is in a folder test, tests or idle_test."""
  return not SUITES.isdisjoint(path.split(os.sep)[:-1])


def split(path: str, text: str) -> dict[str, str]:
  """One file's text by domain; empty for what is no Python or belongs to none.

  Args:
    path: of the file, relative to the library's root.
    text: its contents.
  """
  if is_test(path):
    return {"tests": text}
  text = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
  try:
    module = _parse(text)
  except (SyntaxError, ValueError, RecursionError, tokenize.TokenError):
    return {}
  table, prose = _shares(module)
  if table >= 0.5:
    return {"tables": text}
  if prose >= 0.75:
    return {}
  made = {"code": _code(module), "docstrings": _docstrings(module)}
  return {name: part for name, part in made.items() if part.strip()}


def is_table(text: str) -> bool:
  """Whether a module is mostly literals.

  It is where at least half of the characters of its names, numbers and strings stand in numbers and
  in strings of at most `SHORT` characters, and those are `FEWEST` or more. Docstrings, comments and
  punctuation do not count.

  Raises:
    SyntaxError, ValueError, tokenize.TokenError: no Python.
  """
  return _shares(_parse(text))[0] >= 0.5


def code(text: str) -> str:
  """A module without docstrings and comments, and otherwise as it was written.

  Lines that are left blank by that go; of blank lines in a row two stay. A body that was a
  docstring alone gets `pass`, so that the result is the same program but for `__doc__`.

  Raises:
    SyntaxError, ValueError, tokenize.TokenError: no Python.
  """
  return _code(_parse(text))


def docstrings(text: str) -> str:
  """A module's docstrings in the order of the text, without indentation; "" where it has none.

  Raises:
    SyntaxError, ValueError, tokenize.TokenError: no Python.
  """
  return _docstrings(_parse(text))


class _Module(NamedTuple):
  lines: list[str]  # with their ends
  tokens: list[tokenize.TokenInfo]
  owners: list[ast.AST]  # modules, classes, functions with a docstring, in the order of the text


_Span = tuple[tuple[int, int], tuple[int, int]]  # start and end as (row from 1, character)


def _parse(text: str) -> _Module:
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of escapes that will be errors one day
    tree = ast.parse(text)
  owners = [node for node in ast.walk(tree)
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
            and ast.get_docstring(node, clean=False) is not None]
  owners.sort(key=lambda node: (node.body[0].lineno, node.body[0].col_offset))
  lines = io.StringIO(text).readlines()
  return _Module(lines, list(tokenize.generate_tokens(iter(lines).__next__)), owners)


def _span(module: _Module, node: ast.AST) -> _Span:
  """Where a docstring stands, counted in characters as tokenize does."""
  def place(row: int, offset: int) -> tuple[int, int]:
    return row, len(module.lines[row - 1].encode()[:offset].decode())

  first = node.body[0]
  return (place(first.lineno, first.col_offset), place(first.end_lineno, first.end_col_offset))


def _shares(module: _Module) -> tuple[float, float]:
  """Shares of literals that may be a table's, and of long strings; see `is_table`."""
  spans = iter([_span(module, node) for node in module.owners] + [((2**62, 0), (2**62, 0))])
  (start, end), short, long, names, entries = next(spans), 0, 0, 0, 0
  strings = {tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", -1)}
  for token in module.tokens:
    while token.start >= end:
      start, end = next(spans)
    if token.start >= start:
      continue
    size = len(token.string)
    if token.type == tokenize.NAME:
      names += size
    elif token.type in strings and size > SHORT:
      long += size
    elif token.type == tokenize.NUMBER or token.type in strings:
      short, entries = short + size, entries + 1
  whole = max(short + long + names, 1)
  return short / whole if entries >= FEWEST else 0.0, long / whole


def _code(module: _Module) -> str:
  cuts: list[tuple[_Span, str]] = [((token.start, token.end), "") for token in module.tokens
                                   if token.type == tokenize.COMMENT]
  for node in module.owners:
    span = _span(module, node)
    row, column = span[1]
    shared = module.lines[row - 1][column:].lstrip().startswith(";")
    needed = shared or (len(node.body) == 1 and not isinstance(node, ast.Module))
    cuts.append((span, "pass" if needed else ""))
  blank = {token.start[0] for token in module.tokens
           if token.type == tokenize.NL and not module.lines[token.start[0] - 1].strip()}
  lines: list[str | None] = list(module.lines)
  for ((row, column), (last, end)), text in sorted(cuts, reverse=True):  # from the end, so that
    left = lines[row - 1][:column] + text + lines[last - 1][end:].rstrip("\n")  # places stay true
    lines[row - 1:last] = [left.rstrip() + "\n" if left.strip() else None] + [None] * (last - row)
  kept, run = [], 2  # none at the top
  for row, line in enumerate(lines, 1):
    if line is None:
      continue
    run = run + 1 if row in blank else 0
    if run <= 2:
      kept.append(line)
  return "".join(kept)


def _docstrings(module: _Module) -> str:
  found = [ast.get_docstring(node).strip() for node in module.owners]
  text = "".join(f"{doc}\n\n" for doc in found if doc)
  return text.removesuffix("\n").encode("utf-8", "replace").decode()  # an escape may be half a pair


def _in_order(documents: Sequence[Document]) -> tuple[list[Document], np.ndarray]:
  """Documents by the hash of their text, and those hashes, uint64 [n]."""
  pairs = sorted(((content_hash(d.text.encode()), i) for i, d in enumerate(documents)))
  return [documents[i] for _, i in pairs], np.array([h for h, _ in pairs], np.uint64)
