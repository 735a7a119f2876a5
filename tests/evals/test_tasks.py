"""Records, grading, estimates and windows: all that needs no model."""

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest

from dsv3_jax.config import ConfigError
from dsv3_jax.data import tokenizer as tokenizer_lib
from dsv3_jax.evals import generation, needle, pairs, report, spread, tasks, text

EXAMPLES = Path(__file__).parents[2] / "experiments" / "tasks" / "small.jsonl"


@pytest.fixture(scope="module")
def tokenizer():
  """One that joins digits and words over the borders of texts."""
  return tokenizer_lib.train(["def main(argv):\n  print(argv)\n 123 123 12 3 is 456\n" * 9], 320)


def test_examples_are_records():
  """Oracle: the file's own JSON, field by field."""
  found = tasks.read(EXAMPLES)
  for record, line in zip(found, EXAMPLES.read_text().splitlines(), strict=True):
    values = json.loads(line)
    assert record.task == values["task"]
    if isinstance(record, tasks.Choice):
      assert record.choices == tuple(values["choices"]) and record.answer == values["answer"]
      assert record.delimiter == values.get("delimiter", " ")
    else:
      assert record.prompt == values["prompt"] and record.max_tokens == values["max_tokens"]
      assert bool(record.answers) == ("answer" in values)
  assert {type(r) for r in found} == {tasks.Choice, tasks.Generation}
  assert found[8].ignore == ("space", "case") and found[8].stop == (" ", "\n")


@pytest.mark.parametrize("record, words", [
    ('{"prompt": "a"', "not a JSON object"), ("[1]", "an object, not a list"),
    ({}, "neither choices .* nor prompt"), ({"kind": "essay"}, "kind='essay'"),
    ({"prompt": "a", "answer": "b", "max_token": 3}, "did you mean 'max_tokens'"),
    ({"prompt": "a"}, "answer or regex"), ({"prompt": 3, "answer": "b"}, "prompt must be a text"),
    ({"prompt": "a", "answer": []}, "answer must be a text or a list of texts, not an empty list"),
    ({"prompt": "a", "answer": "b", "stop": ""}, "stop has an empty text"),
    ({"prompt": "a", "regex": "("}, "regex='\\('"),
    ({"prompt": "a", "answer": "b", "max_tokens": 0}, "max_tokens=0"),
    ({"prompt": "a", "answer": "b", "ignore": ["spaces"]}, "ignore has 'spaces'"),
    ({"choices": ["a", "b"], "answer": 0}, "one of question and context"),
    ({"question": "", "choices": ["a"], "answer": 0}, "choices has 1"),
    ({"question": "", "choices": ["a", "a"], "answer": 0}, "'a' twice"),
    ({"question": "", "choices": ["a", "b"], "answer": 2}, "answer=2 .* from 0 to 1"),
    ({"question": "", "choices": ["a", "b"], "answer": True}, "answer=True"),
    ({"question": "\ud800", "choices": ["a", "b"], "answer": 0}, "no valid Unicode")])
def test_bad_records_are_named_by_their_line(tmp_path, record, words):
  """Law: the error has file, line and what is wrong; blank lines count."""
  path = tmp_path / "some.jsonl"
  line = record if isinstance(record, str) else json.dumps(record)
  path.write_text(f'\n{{"prompt": "a", "answer": "b"}}\n{line}\n')
  with pytest.raises(ConfigError, match=f"some.jsonl:3: .*{words}"):
    tasks.read(path)


def test_bad_files(tmp_path):
  """Law: all bad lines at once, up to a limit; a file without records is an error."""
  path = tmp_path / "some.jsonl"
  path.write_text("{}\n" * 10)
  with pytest.raises(ConfigError, match=r"(?s):1: .*:8: .*and 2 more lines"):
    tasks.read(path)
  path.write_text("\n")
  with pytest.raises(ConfigError, match="no records"):
    tasks.read(path)
  with pytest.raises(ConfigError, match="No such file"):
    tasks.read(tmp_path / "other.jsonl")


@pytest.mark.parametrize("written, right, fields", [
    ("  a\n b ", True, {"answers": ("a b",)}), ("a B", False, {"answers": ("a b",)}),
    (" A b", True, {"answers": ("x", "a  b"), "ignore": ("space", "case")}),
    ("a-b!", True, {"answers": ("ab",), "ignore": ("punctuation",)}),
    ("ab ", False, {"answers": ("ab",), "ignore": ()}),
    ("e\u0301", True, {"answers": ("\u00e9",)}),
    ("so it is 12.", True, {"regex": r"\d+"}), ("none", False, {"regex": r"\d+"}),
    ("1 then 2", True, {"regex": r"\d", "answers": ("2",)}),
    ("1 then 2", False, {"regex": r"\d", "answers": ("1",)}),
    ("#### 72 ", True, {"regex": r"####(.*)", "answers": ("72",)}),
    ("none", False, {"regex": r"(\d)", "answers": ("",)})])
def test_grading(written, right, fields):
  """Oracle: judged by hand."""
  assert generation.correct(tasks.Generation("x:1", "x", "", **fields), written) == right


def test_pass_at_k():
  """Oracle: all subsets of k samples, counted."""
  for n, k in ((1, 1), (4, 2), (5, 3), (6, 6)):
    for c in range(n + 1):
      subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
      assert generation.pass_at(n, c, k) == pytest.approx(np.mean([any(s) for s in subsets]))
  assert generation.check(4, 1.0) == (1, 4) and generation.check(4, 1.0, (2,)) == (2,)
  for samples, temperature, ks in ((0, 1, ()), (2, 0.0, ()), (2, 1.0, (3,)), (2, 1.0, (0,))):
    with pytest.raises(ConfigError):
      generation.check(samples, temperature, ks)


def test_spread():
  """Oracle: numpy for the mean; for the ratio, the scatter of many draws of documents."""
  values = [0.0, 1.0, 1.0, 1.0]
  assert spread.mean(values) == (0.75, pytest.approx(np.std(values, ddof=1) / 2))
  assert spread.mean([3.0]) == (3.0, None) and spread.ratio([6.0], [2.0]) == (3.0, None)
  rng = np.random.default_rng(0)
  sizes = rng.integers(50, 150, (2000, 40))
  bits = sizes * rng.normal(2.0, 0.3, sizes.shape)
  found = [spread.ratio(b, s) for b, s in zip(bits, sizes, strict=True)]
  assert np.mean([e for _, e in found]) == pytest.approx(np.std([r for r, _ in found]), rel=0.05)


def test_windows():
  """Law: each token but the first is predicted once, and after the first window from at least
  window - stride before it."""
  for tokens, window, stride in itertools.product((1, 2, 5, 8, 9, 30), (2, 5, 8), (1, 3, 4, 7)):
    if stride >= window:
      with pytest.raises(ConfigError, match="--stride"):
        text.spans(tokens, window, stride)
      continue
    found = text.spans(tokens, window, stride)
    assert [i for _, first, end in found for i in range(first, end)] == list(range(1, tokens))
    for begin, first, end in found:
      assert end - begin <= window and (begin == 0 or first - begin >= window - stride)
      assert begin > 0 or first == 1 or end <= window


def test_borders(tokenizer):
  """Law: what is common and what is left are the tokens of the whole, where a token reaches over
  the border too."""
  cut = 0
  for context, rests in (("def main", ["(argv)", "!"]), ("12", ["3", "4"]), ("", ["a", "b"]),
                         ("main", ["(argv", " is"]), ("x 12", ["3 is", "3", " 3"])):
    common, found = pairs.encode(tokenizer, context, rests)
    for rest, ids in zip(rests, found, strict=True):
      assert [*common, *ids] == [tokenizer.bos, *tokenizer.encode(context + rest)] and ids
    assert context.startswith(tokenizer.decode(common[1:]))
    cut += tokenizer.decode(common[1:]) != context
  assert cut  # "12" and "3"
  assert pairs.fit([1, 2, 3, 4], 3, 5, "x:1") == [3, 4]
  with pytest.raises(ConfigError, match="x:1: 5 tokens"):
    pairs.fit([1, 2], 5, 5, "x:1")


def test_haystacks(tokenizer):
  """Law: by construction: length, one needle at its depth, the question at the end; depths of one
  number differ by place alone; a seed repeats."""
  filler = needle.Filler(tokenizer)
  assert sum(map(len, filler.lines)) == len(tokenizer.encode(needle.plain_filler()))
  made = needle.make(filler, 400, (0, 0.5, 1), number=2, seed=7)
  assert made == needle.make(filler, 400, (0, 0.5, 1), number=2, seed=7)
  assert made[0].value != needle.make(filler, 400, (0,), number=3, seed=7)[0].value
  for depth, h in zip((0, 0.5, 1), made, strict=True):
    words = tokenizer.decode(h.prompt[1:])
    sentence = f"The magic number of {h.key} is {h.value}.\n"
    assert len(h.prompt) + len(h.answer) == h.length == 400 and h.prompt[0] == tokenizer.bos
    assert words.count(h.key) == 2 and words.count(h.value) == 1 and words.count(sentence) == 1
    assert words.endswith(f"\nThe magic number of {h.key} is")
    assert tokenizer.decode(h.answer) == f" {h.value}" and len(h.value) == 5
    assert abs(h.place - depth) < 0.15
    assert sorted(h.prompt) == sorted(made[0].prompt) and (h.key, h.value) == (
        made[0].key, made[0].value)
  assert [made[0].place, made[2].place] == [0, 1]
  more, = needle.make(filler, 500, (1,), number=2, seed=7)
  assert (more.key, more.value) == (made[0].key, made[0].value)
  assert more.prompt[-300:] == made[2].prompt[-300:]
  short = needle.Filler(tokenizer, ["one\n\n \ntwo"])
  assert [tokenizer.decode(line) for line in short.lines] == ["one\n\n \n", "two\n"]
  code, = needle.make(short, 90, (0.5,), template="{key} = {value}", digits=2)
  assert f"\n{code.key} = {code.value}\n" in tokenizer.decode(code.prompt)
  word, = needle.make(short, 90, (0.5,), values=("red", "blue"))
  assert word.value in ("red", "blue") and tokenizer.decode(word.answer) == f" {word.value}"
  named, = needle.make(short, 90, (0.5,), keys=("ant", "bee"), seed=3)
  assert named.key in ("ant", "bee")
  assert f"number of {named.key} is" in tokenizer.decode(named.prompt)
  for wrong in (dict(values=("a", "a")), dict(keys=("a",)), dict(length=20), dict(depths=(2,)),
                dict(depths=()), dict(template="{value} {key}"), dict(digits=0)):
    with pytest.raises(ConfigError):
      needle.make(filler, **{"length": 400, "depths": (0,), **wrong})


def test_recall():
  """Oracle: judged by hand."""
  for written, right in ((" 48213.\n", True), ("48213", True), ("482134", False),
                         ("48213th", False), ("4821", False), ("is 48213", False),
                         ("\n 48213 and", True)):
    assert needle.recalled(" 48213", written) == right


def test_means_of_needles():
  """Oracle: numpy over an array [length, number, depth]."""
  rng = np.random.default_rng(0)
  recall, bits = rng.integers(0, 2, (2, 3, 4)), rng.random((2, 3, 4))
  found = [{"length": (64, 128)[x], "number": n, "depth": y / 3, "recall": bool(recall[x, n, y]),
            "forced": True, "bits": bits[x, n, y], "gain": 0.0}
           for x, n, y in np.ndindex(2, 3, 4)]
  made = needle.summary(found)
  np.testing.assert_allclose(made["grid"]["recall"], recall.mean(1))
  np.testing.assert_allclose(made["grid"]["bits"], bits.mean(1))
  assert made["recall"] == pytest.approx(recall.mean())
  assert made["by_length"][1]["recall_error"] == pytest.approx(
      recall[1].mean(1).std(ddof=1) / math.sqrt(3))
  (_, head, rows), *_ = report.tables({"needle": made})
  assert head == ("depth", "64", "128") and rows[0][1] == f"{recall.mean(1)[0, 0]:.0%}"
