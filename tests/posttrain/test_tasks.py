"""Generated problems: answers and worked lines by other means, splits, repeats, files."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from fractions import Fraction

import pytest

from dsv3_jax.config import ConfigError
from dsv3_jax.posttrain import rewards, tasks
from dsv3_jax.posttrain.tasks import sets, statements
from tests.posttrain import checkers

LEVELS = [(name, level) for name in tasks.families()
          for level in range(len(tasks.family(name).levels))]


@pytest.mark.parametrize("name", tasks.families())
def test_answers_and_lines(name):
  """Oracle: checkers.py, which reads a problem's text alone and lets Python compute."""
  for level in range(len(tasks.family(name).levels)):
    many, few = (1, 0) if name == "recall" and level > 3 else (150, 20)
    for problem in tasks.make(name, level, many, 7) + tasks.make(name, level, few, 7, "test"):
      for worked in (problem.worked, problem.worked_long):
        checkers.check(problem, worked)
      steps = problem.worked.rpartition("\n")[0]
      assert problem.worked_long.startswith(steps + "\nCheck")


@pytest.mark.parametrize("name, level", [(n, lv) for n, lv in LEVELS if lv < 2])
def test_wrong_is_seen(name, level):
  """Law of the checkers: a digit or letter changed anywhere in a worked solution is noticed."""
  (problem,) = tasks.make(name, level, 1, 3)
  for worked in (problem.worked, problem.worked_long):
    for at, c in enumerate(worked):
      if c.isdigit():
        changed = f"{worked[:at]}{(int(c) + 1) % 10}{worked[at + 1:]}"
        with pytest.raises((AssertionError, ArithmeticError, ValueError)):
          checkers.check(problem, changed)


def test_splits_share_nothing():
  """Law: of tens of thousands of problems, whatever seeds and levels, none is in both splits; the
  same question written in another order is the same problem."""
  test, train = set(), set()
  for name, level in LEVELS:
    if (name == "recall" and level > 1) or (name == "python" and level > 3):
      continue  # slow to make
    own = tasks.family(name)
    choices = statements.Random(f"{name}{level}")
    for _ in range(400):
      statement = own.draw(level, choices)
      if statement is not None:
        digest = own.digest(statement)
        side = statements.split_of(digest)
        (test if side == "test" else train).add(checkers.same(name, own.solve(statement).prompt))
  assert len(test) + len(train) > 20_000 and not test & train
  assert abs(len(test) / (len(test) + len(train)) - statements.TEST_SHARE) < 0.01


@pytest.mark.parametrize("name", tasks.families())
def test_sets(name):
  """Law: no problem comes twice; a larger set begins as the smaller; seeds and splits differ."""
  few, many = (tasks.make(name, 0, n, 5) for n in (40, 80))
  assert many[:40] == few
  assert len({p.id for p in many}) == len({checkers.same(name, p.prompt) for p in many}) == 80
  test = tasks.make(name, 0, 40, 5, "test")
  assert not {p.id for p in test} & {p.id for p in many}
  assert {p.id for p in tasks.make(name, 0, 40, 6)} != {p.id for p in few}
  for p in many:
    assert (p.family, p.level) == (name, 0) and p.id.startswith(f"{name}-0-")
    assert {reward for reward, _ in p.reward} <= {"exact", "math", "format"}


def test_same_in_every_process():
  """Law: another hash seed gives the same problems, of every family, without jax."""
  code = ("import sys; from dsv3_jax.posttrain import tasks; "
          "print([p for n in tasks.families() for p in tasks.make(n, 1, 5, 2)], "
          "'jax' in sys.modules)")
  shown = {subprocess.run([sys.executable, "-c", code], check=True, text=True, capture_output=True,
                          env={**os.environ, "PYTHONHASHSEED": seed}).stdout for seed in "12"}
  here = [p for n in tasks.families() for p in tasks.make(n, 1, 5, 2)]
  assert shown == {f"{here} False\n"}


def test_printed_examples():
  """Oracle: ids and texts as they are documented; they must never change, or splits would leak."""
  (problem,) = tasks.make("add", 0, 1, 0)
  assert problem == dataclasses.replace(
      problem, id="add-0-32474424592f0b4c", prompt="92 + 51 = ?", answer="143",
      worked="9 2+5 1\n2+1+0=0 3\n9+5+0=1 4\n1 4 3\n\\boxed{143}")
  assert [tasks.make(name, 0, 1, 0)[0].id for name in tasks.families()] == [
      "add-0-32474424592f0b4c", "subtract-0-9185b50399c04613", "multiply-0-e1fa0f843d22aa03",
      "polynomial-0-d41971bdf7ae0eab", "equation-0-9636b1543c8202c2",
      "fraction-0-5f71b27e87886d72", "sort-0-b08dfc67e78a6a8d", "program-0-6c9c72b0b7d2cb3f",
      "python-0-3d370154f1c4416d", "recall-0-4e25a14bb4cc4e22"]


def test_all_of_a_small_level():
  """Oracle: counted by hand. Products of 10 ... 99 and 2 ... 9; sums of pairs of 10 ... 99 without
  order. One more than there are is an error that says how many."""
  for name, pairs in (("multiply", 90 * 8), ("add", 90 * 91 // 2)):
    sizes = [tasks.count(name, 0, split) for split in ("train", "test")]
    assert sum(sizes) == pairs
    every = [tasks.make(name, 0, n, 0, split)
             for n, split in zip(sizes, ("train", "test"), strict=True)]
    assert len({p.id for found in every for p in found}) == pairs
    with pytest.raises(ConfigError, match=f"has {sizes[1]};"):
      tasks.make(name, 0, sizes[1] + 1, 1, "test")
  assert tasks.count("sort", 0, limit=100) == 100


def test_what_chance_left_out(monkeypatch):
  """Law: a set is complete also where chance is given up at the first repeat."""
  monkeypatch.setattr(sets, "_MISSES", 1)
  size = tasks.count("multiply", 0, "test")
  found = tasks.make("multiply", 0, size, 0, "test")
  assert size == len({p.id for p in found}) == 84
  assert tasks.make("multiply", 0, 60, 0, "test") == found[:60]


def test_harder():
  """Law: with the level grow question and solution together, for the families whose difficulty is
  size. (Equations and Python expressions change in kind.)"""
  for name in tasks.families():
    sizes = []
    for level in range(len(tasks.family(name).levels[:6])):
      found = tasks.make(name, level, 40, 1)
      sizes.append(sum(len(p.prompt + p.worked) for p in found) / 40)
    if name not in ("equation", "python"):
      assert all(b > a for a, b in zip(sizes, sizes[1:], strict=False)), (name, sizes)
    assert sizes[-1] > 1.3 * sizes[0]


def test_mixture():
  """Law: shares by weight, rounded to the count, in a shuffled order that the seed fixes."""
  parts = {"add:0": 2, "sort:1": 1, "recall:0": 0.5}
  found = tasks.mixture(parts, 100, 3)
  assert [sum(p.family == n for p in found) for n in ("add", "sort", "recall")] == [57, 29, 14]
  assert found == tasks.mixture(parts, 100, 3) != tasks.mixture(parts, 100, 4)
  assert len({p.family for p in found[:20]}) > 1
  assert {p.id for p in found if p.family == "add"} == {p.id for p in tasks.make("add", 0, 57, 3)}


@pytest.mark.parametrize("call, words", [
    (lambda: tasks.make("ad", 0, 1, 0), "'ad'.*did you mean 'add'"),
    (lambda: tasks.make("add", 7, 1, 0), r"add:7: its levels are 0 \(2 digits\) to 6 \(8 digits\)"),
    (lambda: tasks.make("add", -1, 1, 0), "add:-1"),
    (lambda: tasks.make("add", 0, 1, 0, "dev"), "split='dev' must be one of train, test"),
    (lambda: tasks.make("add", 0, -1, 0), "must not be negative"),
    (lambda: tasks.mixture({}, 1, 0), "needs a part"),
    (lambda: tasks.mixture({"add": 1}, 1, 0), "'add' must be a family and a level, such as add:0"),
    (lambda: tasks.mixture({"add:0": 0}, 1, 0), "weight of add:0 is 0;")])
def test_mistakes(call, words):
  """Law: each is named, with what would be right."""
  with pytest.raises(ConfigError, match=words):
    call()


def test_describe():
  """Law: a row for each level, in columns that Markdown reads."""
  rows = tasks.describe(samples=2).splitlines()
  assert len(rows) == 2 + len(LEVELS)
  assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {7}


@pytest.mark.parametrize("name", tasks.families())
def test_rewards_agree(name):
  """Oracle: the registered rewards. Both worked solutions get 1; another problem's, and the
  question in the box, at most what the format is worth."""
  found = tasks.make(name, 1, 12, 4)
  assert {s.value for s in rewards.score(found, [p.worked for p in found])} == {1.0}
  assert {s.value for s in rewards.score(found, [p.worked_long for p in found])} == {1.0}
  if name != "equation":  # math-verify starts processes; its own tests have such
    other = [next(q for q in found if q.answer != p.answer).worked for p in found]
    asked = [f"\\boxed{{{p.prompt}}}" for p in found]
    for answers in (other, asked):
      assert max(s.value for s in rewards.score(found, answers)) <= 0.1 / 1.1 + 1e-9


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz"])
def test_files(tmp_path, suffix):
  """Law: what was written is read; the same problems give the same bytes."""
  found = tasks.mixture({"equation:1": 1, "recall:0": 1}, 6, 0)
  found[0] = dataclasses.replace(found[0], system="Ä", extra={"tests": ["assert 1"]})
  paths = [tasks.write(tmp_path / f"{i}.{suffix}", found) for i in (1, 2)]
  assert tasks.read(paths[0]) == found
  assert paths[0].read_bytes() == paths[1].read_bytes()
  assert suffix == "jsonl" or paths[0].read_bytes()[4:8] == bytes(4)  # gzip's time


@pytest.mark.parametrize("record, words", [
    ({"id": "a"}, "prompt=None must be"), ({"id": "", "prompt": "?"}, "id='' must be"),
    ({"id": "a", "prompt": "?", "anwser": "1"}, "unknown key 'anwser'.*did you mean 'answer'"),
    ({"id": "a", "prompt": "?", "answer": 4}, "answer is int, not text"),
    ({"id": "a", "prompt": "?", "level": True}, "level=True must be a whole number"),
    ({"id": "a", "prompt": "?", "extra": []}, r"extra=\[\] must be an object"),
    ({"id": "a", "prompt": "?", "reward": [["exact"]]}, "reward=.* must be a list of names"),
    ({"id": "0", "prompt": "?"}, "id='0' was there before")])
def test_bad_files(tmp_path, record, words):
  """Law: file and line are said, for several lines at once."""
  path = tmp_path / "problems.jsonl"
  path.write_text('{"id": "0", "prompt": "?"}\n\n' + json.dumps(record) + "\n[]\n")
  with pytest.raises(ConfigError, match=f"problems.jsonl:3: {words}") as caught:
    tasks.read(path)
  assert "problems.jsonl:4: a record is an object, not list" in str(caught.value)


def test_fractions_are_in_lowest_terms():
  """Oracle: the standard library's fractions."""
  for level in range(5):
    for p in tasks.make("fraction", level, 50, 0):
      assert p.answer == str(Fraction(p.answer))
