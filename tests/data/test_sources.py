import collections
import gzip
import json
import os
import random
import sys
import sysconfig
import types

import pytest

from dsv3_jax.config import ConfigError
from dsv3_jax.data import sources

LIMIT = 10_000


def read(spec, limit=LIMIT, text_key="text", **kwargs):
  source = sources.resolve(str(spec), limit)
  return list(sources.documents(source, text_key, limit, **kwargs))


def test_a_folder_is_read_in_order_without_hidden_binary_bad_and_empty_files(tmp_path):
  """Oracle: the files written here; what is left out is counted by reason."""
  (tmp_path / "b").mkdir()
  (tmp_path / ".git").mkdir()
  contents = {"b/z.txt": b"zed\r\nline", "a.md": "naïve 東京\n".encode(),
              "bin.dat": b"\x7fELF\0\0", "bad.txt": b"caf\xe9", "empty.py": b"", ".hidden": b"no",
              ".git/config": b"no"}
  for name, data in contents.items():
    (tmp_path / name).write_bytes(data)
  (tmp_path / "c.txt.gz").write_bytes(gzip.compress("packed é".encode()))
  (tmp_path / "huge.bin").write_bytes(b"\0" * (LIMIT + 1))
  skipped = collections.Counter()
  found = [(os.path.relpath(d.name, tmp_path), d.text) for d in read(tmp_path, skipped=skipped)]
  assert found == [("a.md", "naïve 東京\n"), ("c.txt.gz", "packed é"), ("b/z.txt", "zed\r\nline")]
  assert skipped == {"binary": 2, "badly encoded": 1, "empty": 1}
  assert {os.path.relpath(d.name, tmp_path) for d in read(tmp_path / "**" / "*.txt")} == {"b/z.txt"}
  mixed = read(tmp_path, mixed=True)
  assert sorted(d.text for d in mixed) == sorted(t for _, t in found)


def test_records_of_json_lines_are_documents(tmp_path):
  """Oracle: json.dumps of known texts, plain and gzipped."""
  texts = ["one\ntwo", "", "東京 \u2028", "x" * 3000]
  lines = "\n".join(json.dumps({"id": i, "body": t}) for i, t in enumerate(texts)).encode()
  (tmp_path / "a.jsonl").write_bytes(lines + b"\n\n")
  (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines))
  skipped = collections.Counter()
  wanted = [t for t in texts if t]
  assert [d.text for d in read(tmp_path / "a.jsonl", text_key="body", skipped=skipped)] == wanted
  assert [d.text for d in read(tmp_path / "b.jsonl.gz", text_key="body")] == wanted
  assert skipped == {"empty": 1}


def test_null_text_is_an_empty_document(tmp_path):
  """Law: a missing text is left out alike in every kind of record."""
  (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": null}\n')
  skipped = collections.Counter()
  assert [d.text for d in read(tmp_path / "a.jsonl", skipped=skipped)] == ["a"]
  assert skipped == {"empty": 1}


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_compressed_files_of_several_parts_are_read_to_their_end(tmp_path, suffix):
  """Oracle: the text before it was compressed in three parts; then damage of three kinds."""
  if suffix == "zst":
    zstandard = pytest.importorskip("zstandard")
    compress = zstandard.ZstdCompressor(write_checksum=True).compress
  else:
    compress = gzip.compress
  rng = random.Random(0)
  lines = [json.dumps({"text": f"{i} {rng.getrandbits(800):x}"}) + "\n" for i in range(900)]
  data = b"".join(compress("".join(lines[i:i + 300]).encode()) for i in range(0, 900, 300))
  text, jsonl = tmp_path / f"a.txt.{suffix}", tmp_path / f"a.jsonl.{suffix}"
  text.write_bytes(data)
  jsonl.write_bytes(data)
  assert read(text, limit=10**6)[0].text == "".join(lines)
  assert [d.text for d in read(jsonl)] == [json.loads(line)["text"] for line in lines]
  turned = bytearray(data)
  turned[len(data) // 2] ^= 0x55
  for damaged in (data[:-20], bytes(turned), b"\x28plain text"):
    for path in (text, jsonl):
      path.write_bytes(damaged)
      with pytest.raises(ConfigError, match=f"{path.name} cannot be read"):
        read(path, limit=10**6)


def test_the_standard_library_is_a_source():
  """Oracle: sysconfig's folder and `json/decoder.py` in it, which every Python has."""
  source = sources.resolve("stdlib", 64 * 2**20)
  root = sysconfig.get_paths()["stdlib"]
  paths = [f.path for f in source.files]
  assert os.path.join(root, "json", "decoder.py") in paths and len(paths) > 300
  assert not any("site-packages" in p or not p.endswith(".py") for p in paths)
  assert paths == [f.path for f in sources.resolve("stdlib", 64 * 2**20).files]


def test_a_function_of_a_file_is_a_source(tmp_path):
  """Law: documents are what the function yields; a changed file is another source."""
  path = tmp_path / "made.py"
  path.write_text("def texts(n='2'):\n  for i in range(int(n)):\n    yield 'abc' * i\n"
                  "def numbers(): return [1]\n")
  read = lambda spec: [d.text for d in sources.documents(
      sources.resolve(f"python:{path}:{spec}", LIMIT), "", LIMIT)]
  assert read("texts") == ["abc"] and read("texts:4") == ["abc", "abcabc", "abcabcabc"]
  source = sources.resolve(f"python:{path}:texts", LIMIT)
  assert source.size == 0 and source.fingerprint() != sources.resolve(
      f"python:{path}:texts:4", LIMIT).fingerprint()
  path.write_text(path.read_text() + "\n")
  assert source.fingerprint() != sources.resolve(f"python:{path}:texts", LIMIT).fingerprint()
  for spec, message in (("numbers", "gave int, not text"), ("other", "has no function other"),
                        ("texts:99999", "has 10,002 bytes")):
    with pytest.raises(ConfigError, match=message):
      read(spec)


def test_a_hugging_face_dataset_is_streamed(monkeypatch):
  """Oracle: a stand-in for the datasets package that records its call."""
  calls = []

  def load_dataset(name, config, split, streaming):
    calls.append((name, config, split, streaming))
    return [{"text": "a"}, {"text": ""}, {"text": "b"}]

  monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
  assert [d.text for d in read("hf:own/set:en@validation")] == ["a", "b"]
  assert [d.text for d in read("hf:set")] == ["a", "b"]
  assert calls == [("own/set", "en", "validation", True), ("set", None, "train", True)]


@pytest.mark.parametrize("good, words", [
    (0, "cannot be opened"), (2, "cannot be read after row 1")])
def test_a_hugging_face_dataset_that_fails_says_what_to_do(monkeypatch, good, words):
  """Oracle: the library's first line, and the remedies; before and within the stream."""
  def load_dataset(*args, **kwargs):
    def records():
      yield from [{"text": "a"}] * good
      raise ConnectionError("Couldn't reach the hub\nlong traceback")
    return records()

  monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
  with pytest.raises(ConfigError) as error:
    read("hf:own/set")
  assert f"'hf:own/set' {words}: Couldn't reach the hub; check the name" in str(error.value)
  assert "Without a network" in str(error.value) and "\n" not in str(error.value)


def test_a_folder_of_a_packages_name_is_not_the_package(tmp_path, monkeypatch):
  """Oracle: the message of a missing package, in a folder that has a folder `datasets`."""
  (tmp_path / "datasets").mkdir()
  monkeypatch.delitem(sys.modules, "datasets", raising=False)
  monkeypatch.setattr(sys, "path", [str(tmp_path)])
  with pytest.raises(ConfigError, match="needs the package datasets, which is not installed"):
    sources.resolve("hf:x", LIMIT)


def test_parquet_rows_are_documents(tmp_path):
  """Oracle: pyarrow's writer."""
  parquet = pytest.importorskip("pyarrow.parquet")
  import pyarrow

  path = tmp_path / "a.parquet"
  parquet.write_table(pyarrow.table({"id": [1, 2, 3], "text": ["a", None, "é"]}), path)
  assert [d.text for d in read(path)] == ["a", "é"]
  with pytest.raises(ConfigError, match="no column data.text_key='body'; its columns are id, text"):
    read(path, text_key="body")
  path.write_bytes(b"not parquet")
  with pytest.raises(ConfigError, match="a.parquet is no readable Parquet file"):
    read(path)


@pytest.mark.parametrize("name, data, message", [
    ("empty.txt", b"", r"empty.txt is empty"),
    ("a.bin", b"\x7fELF\0\1\2", r"a.bin is binary"),
    ("utf16.txt", "one".encode("utf-16"), r"utf16.txt is UTF-16, not UTF-8; convert it"),
    ("latin.txt", b"one\ntwo caf\xe9\n", r"latin.txt is not UTF-8: byte 0xe9 at offset 11, line 2"),
    ("long.txt", b"x" * 10_001, r"long.txt has 10,001 bytes, more than data.max_document_bytes="
                                r"10,000; raise that key, or split"),
    ("bomb.txt.gz", gzip.compress(b"x" * 10_001, mtime=0),  # an id must not hold the time
     r"bomb.txt.gz has more than 10,000 bytes"),
    ("cut.txt.gz", gzip.compress(os.urandom(500), mtime=0)[:200], r"cut.txt.gz cannot be read"),
    ("a.jsonl", b'{"text": "ok"}\n{"text": oops}\n', r"a.jsonl:2 is not a JSON record"),
    ("b.jsonl", b'{"text": "caf\xe9"}\n', r"b.jsonl:1 is not a JSON record in UTF-8"),
    ("c.jsonl", b'{"body": "a", "id": 1}\n', r"c.jsonl:1 has no field data.text_key='text'; its "
                                             r"fields are 'body', 'id'"),
    ("d.jsonl", b'{"text": 3}\n', r"d.jsonl:1: field 'text' has type int"),
    ("e.jsonl", b'[1]\n', r"e.jsonl:1: a record must be an object, not list"),
    ("f.jsonl", b'{"text": "\\ud800"}\n', r"f.jsonl:1: field 'text' is no valid Unicode"),
    ("g.jsonl", json.dumps({"text": "x" * 10_001}).encode(), r"g.jsonl:1 has 10,001 bytes"),
    ("h.jsonl", b'{"text": "' + b"x" * 200_000, r"h.jsonl:1 has more than .* bytes as JSON"),
])
def test_a_bad_named_file_ends_in_one_clear_error(tmp_path, name, data, message):
  """Oracle: the message a user needs: file, place, what is wrong."""
  path = tmp_path / name
  path.write_bytes(data)
  with pytest.raises(ConfigError, match=message):
    read(path)


def test_a_long_document_is_an_error_in_a_folder_too(tmp_path):
  """Oracle: issue 2, 'a document longer than memory'; found before anything is read."""
  (tmp_path / "a.txt").write_text("short")
  (tmp_path / "b.txt").write_text("x" * (LIMIT + 1))
  with pytest.raises(ConfigError, match="b.txt has 10,001 bytes"):
    sources.resolve(str(tmp_path), LIMIT)


@pytest.mark.parametrize("spec, message", [
    ("absent.txt", r"'absent.txt' does not exist; give stdlib, a file, a folder, a glob"),
    ("*.nothing", r"no file matches '\*.nothing'"),
    ("shards:absent", r"'shards:absent' has no index.json"),
    ("hf:", r"'hf:' names no dataset"),
    ("python:absent.py:f", r"there is no file 'absent.py'"),
    ("python:absent.py", r"names no function; write python:FILE.py:NAME"),
    ("", r"the folder '' has no files"),
])
def test_a_missing_source_ends_in_one_clear_error(tmp_path, monkeypatch, spec, message):
  """Oracle: the message a user needs: the entry of data.sources and what would be right."""
  monkeypatch.chdir(tmp_path)
  with pytest.raises(ConfigError, match=message):
    sources.resolve(spec, LIMIT)


def test_a_folder_without_text_is_an_error(tmp_path):
  """Oracle: issue 2: an empty source is one clear error."""
  (tmp_path / "empty.txt").touch()
  with pytest.raises(ConfigError, match="has no text: its 1 files are empty"):
    sources.resolve(str(tmp_path), LIMIT)


@pytest.mark.parametrize("package, spec", [("datasets", "hf:x"), ("pyarrow", "x.parquet"),
                                           ("zstandard", "x.txt.zst")])
def test_a_missing_package_is_named_before_any_work(tmp_path, monkeypatch, package, spec):
  """Oracle: the packages' names; find_spec is made to find nothing."""
  monkeypatch.chdir(tmp_path)
  (tmp_path / "x.parquet").write_bytes(b"PAR1")
  (tmp_path / "x.txt.zst").write_bytes(b"data")
  monkeypatch.delitem(sys.modules, package, raising=False)
  monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: None)
  with pytest.raises(ConfigError, match=f"needs the package {package}, which is not installed"):
    sources.resolve(spec, LIMIT)
