"""Domains: which text falls where."""

import ast
import json
import sysconfig
import warnings

import numpy as np
import pytest

from dsv3_jax.config import ConfigError
from dsv3_jax.data import domains, packing, shards

MODULE = '''\
#!/usr/bin/env python
"""Printed example.

  Below.
    Indented.
"""

# A comment of its own line.


import os  # why


class A:
  """Of A."""

  x = """text
# no comment


"""  # but this is

  # between

  def f(self):
    """Of f."""

  def g(self): "of g"; return "# no"

  async def é(self): """Of é."""


def h():
  ("of "
   "h")
  return '#'
'''
CODE = '''\
import os


class A:

  x = """text
# no comment


"""


  def f(self):
    pass

  def g(self): pass; return "# no"

  async def é(self): pass


def h():
  return '#'
'''
DOCSTRINGS = '''\
Printed example.

Below.
  Indented.

Of A.

Of f.

of g

Of é.

of h
'''
TABLE = "names = {\n" + "".join(f"  {i}: 'name {i}',\n" for i in range(40)) + "}\n"


def keep_all(hashes):
  return np.ones(len(hashes), bool)


def test_a_printed_module():
  """Oracle: the parts written out by hand above."""
  assert domains.code(MODULE) == CODE
  assert domains.docstrings(MODULE) == DOCSTRINGS
  assert domains.split("a.py", "\ufeff" + MODULE.replace("\n", "\r\n")) == {
      "code": CODE, "docstrings": DOCSTRINGS}
  assert domains.split("a.py", "x = 1\n") == {"code": "x = 1\n"}
  assert domains.split("a.py", '"""Only."""\n# text\n') == {"docstrings": "Only.\n"}


class _WithoutDocstrings(ast.NodeTransformer):

  def generic_visit(self, node):
    super().generic_visit(node)
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and (
        ast.get_docstring(node, clean=False) is not None):
      node.body = node.body[1:] or ([] if isinstance(node, ast.Module) else [ast.Pass()])
    return node


@pytest.mark.parametrize("module", ["argparse", "ast", "dataclasses", "enum", "heapq"])
def test_code_is_the_same_program(module):
  """Oracle: Python's own syntax tree of the standard library's modules, docstrings taken out."""
  with open(f"{sysconfig.get_paths()['stdlib']}/{module}.py", encoding="utf-8") as f:
    text = f.read()
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    expected = ast.dump(_WithoutDocstrings().visit(ast.parse(text)))
    made = domains.code(text)
    assert ast.dump(ast.parse(made)) == expected
  assert len(made) < len(text)
  assert all(line in text for line in made.splitlines() if line.strip() != "pass")


def test_tables_tests_and_text():
  """Oracle: modules of the standard library that everyone knows to be one or the other."""
  def read(name):
    with open(f"{sysconfig.get_paths()['stdlib']}/{name}.py", encoding="utf-8") as f:
      return f.read()

  for name in ("html/entities", "encodings/cp1252", "encodings/aliases", "stringprep", "keyword"):
    assert domains.is_table(read(name)), name
  for name in ("argparse", "heapq", "encodings/utf_8", "pydoc_data/topics", "__future__"):
    assert not domains.is_table(read(name)), name
  assert domains.split("pydoc_data/topics.py", read("pydoc_data/topics")) == {}
  assert domains.is_table(TABLE) and not domains.is_table(TABLE[:144] + "}\n")  # too few entries
  assert domains.is_table('"""' + "prose " * 1000 + '"""\n' + TABLE)  # docstrings do not count
  assert domains.split("encodings/x.py", TABLE) == {"tables": TABLE}
  assert domains.split("x/test/data/bad.py", "def (\n") == {"tests": "def (\n"}
  assert domains.split("x/bad.py", "def (\n") == {} == domains.split("x.py", "x = '\0'")
  assert domains.split("test.py", "x = 1\n") == {"code": "x = 1\n"}  # a module, not a folder


@pytest.fixture
def library(tmp_path, monkeypatch):
  """A small standard library: 30 modules, 30 tests, 4 tables."""
  root = tmp_path / "lib"
  (root / "test").mkdir(parents=True)
  for i in range(30):
    (root / f"m{i}.py").write_text(f'"""Module {i}."""\nx = {i}\n')
    (root / "test" / f"test_{i}.py").write_text(f"assert {i}\n")
  for i in range(4):
    (root / f"t{i}.py").write_text(TABLE + f"# {i}\n")
  monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(root)})
  return root


def test_held_out_files_come_first(library):
  """Oracle: which files were kept, recounted from their names and texts."""
  kept = {shards.content_hash(p.read_bytes()) for p in library.rglob("*[02468].py")
          if not p.name.startswith("t")} | {
              shards.content_hash(p.read_bytes()) for p in library.glob("test/*[02468].py")}

  def keep(hashes):
    return np.array([int(h) in kept for h in hashes])

  found = {d.name: d for d in domains.default(domains.DEFAULT, keep)}
  assert list(found) == list(domains.DEFAULT)
  assert sorted(d.text for d in found["code"].documents) == sorted(
      f"x = {i}\n" for i in range(0, 30, 2))
  assert sorted(d.text for d in found["docstrings"].documents) == sorted(
      f"Module {i}.\n" for i in range(0, 30, 2))
  assert len(found["tests"].documents) == 15 and found["tests"].held_out == 1
  assert found["tables"].documents == () and found["tables"].held_out == 0
  assert [d.text for d in found["code"].documents] != sorted(
      d.text for d in found["code"].documents)  # by hash, not by name

  size = len(TABLE)
  filled = {d.name: d for d in domains.default(("tables", "tests"), keep, least=150, enough=200)}
  assert list(filled) == ["tables", "tests"] and filled["tables"].held_out == 0
  assert 1 == len(filled["tables"].documents) and size > 200  # enough with the first
  tests = filled["tests"].documents
  assert 200 <= sum(len(d.text) for d in tests) < 215 and len(tests) > 15
  held = sum(len(d.text) for d in tests if shards.content_hash(d.text.encode()) in kept)
  assert filled["tests"].held_out == pytest.approx(held / sum(len(d.text) for d in tests))


def test_ones_own_text(tmp_path):
  """Oracle: the files, and the records of JSONL; the share of bytes that was held out by hand."""
  (tmp_path / "a").mkdir()
  (tmp_path / "a" / "one.txt").write_text("one é")
  (tmp_path / "a" / "two.txt").write_text("two")
  first = shards.content_hash("one é".encode())
  found = domains.own("mine", str(tmp_path / "a"), lambda h: h == np.uint64(first))
  assert sorted(d.text for d in found.documents) == ["one é", "two"]
  assert found.held_out == pytest.approx(6 / 9)
  (tmp_path / "b.jsonl").write_text("".join(
      json.dumps({"body": f"line {i}"}) + "\n" for i in range(5)))
  found = domains.own("mine", str(tmp_path / "*.jsonl"), keep_all, enough=7, text_key="body")
  assert sorted(d.text for d in found.documents) == ["line 0", "line 1"]


def test_mistakes_name_the_domain(tmp_path):
  """Oracle: the words a person needs."""
  (tmp_path / "empty").mkdir()
  (tmp_path / "blank.txt").write_text("")
  (tmp_path / "blank.jsonl").write_text("\n")
  for path, words in (("empty", "has no files"), ("blank.txt", "is empty"),
                      ("blank.jsonl", "there is no text in it"), ("gone", "does not exist")):
    with pytest.raises(ConfigError, match=f"^--domain=mine=.*{path}: .*{words}") as error:
      domains.own("mine", str(tmp_path / path), keep_all)
    assert "data.sources" not in str(error.value)
  with pytest.raises(ConfigError, match="no domain 'docstring'.* did you mean 'docstrings'"):
    domains.default(("code", "docstring"), keep_all)


def test_parts_are_the_documents(tokenizer, texts):
  """Oracle: the tokenizer: parts of all documents, joined by their bos and eos, are the text."""
  documents = [domains.Document(str(i), text) for i, text in enumerate(texts[:20])]
  found = domains.parts(documents, tokenizer, 50, 0)
  assert max(map(len, found)) <= 50
  whole = [[tokenizer.bos, *tokenizer.encode(d.text), tokenizer.eos] for d in documents]
  assert sum(map(len, found)) == sum(map(len, whole))
  assert sorted(t for part in found for t in part.tolist()) == sorted(t for w in whole for t in w)
  assert sum(part[0] == tokenizer.bos for part in found) == len(documents)
  assert all(any(part.tolist() == w[i:i + len(part)] for w in whole for i in range(len(w)))
             for part in found[:5])
  first = {i for part in found[:10] for i, w in enumerate(whole)
           if any(part.tolist() == w[j:j + len(part)] for j in range(len(w)))}
  assert len(first) > 5 and first != set(range(len(first)))  # of many documents
  less = domains.parts(documents, tokenizer, 50, 333)
  assert sum(map(len, less)) == 333
  assert all(np.array_equal(a, b) for a, b in zip(less[:-1], found, strict=False))


def test_fixed_batches_meet_each_token_once(tokenizer):
  """Oracle: the stream itself, recounted from masks."""
  documents = [np.arange(10 * i, 10 * i + n, dtype=np.int32) for i, n in enumerate((7, 1, 9, 4))]
  batches = packing.fixed_batches(documents.__getitem__, 4, length=6, isolate=False, pad=99,
                                  batch_size=3)
  tokens = np.concatenate([b["tokens"] for b in batches])
  mask = np.concatenate([b["mask"] for b in batches])
  assert tokens[mask == 1].tolist() == np.concatenate(documents)[1:].tolist()
  assert [b["tokens"].shape for b in batches] == [(3, 6)] * 2
  assert (tokens[np.concatenate([b["valid"] for b in batches]) == 0] == 99).all()
  assert len(packing.fixed_batches(documents.__getitem__, 4, length=6, isolate=False, pad=99,
                                   batch_size=3, limit=1)) == 1
  assert packing.fixed_batches(documents.__getitem__, 0, length=6, isolate=False, pad=99,
                               batch_size=3) == []
