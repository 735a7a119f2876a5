"""The reward of programs: right and wrong ones, and those that would rather grade themselves."""

import sys

import pytest

from dsv3_jax.config import ConfigError
from dsv3_jax.posttrain import rewards
from dsv3_jax.posttrain.problems import Problem
from dsv3_jax.posttrain.rewards import programs

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux")

CALLED = [{"args": [3], "output": 9}, {"args": [4], "output": 16}]
STATED = [{"code": "def check(f):\n  for x in range(3, 6):\n    assert f(x) == x ** 2\n"
                   "check(candidate)"},
          {"code": "assert all(map(lambda x: square(x) == x * x, [3, 4]))"},
          {"code": "assert sum(1 for x in map(square, [5, 6]) if x in (25, 36)) == 2"}]
PRINTED = [{"input": "3\n", "output": "9\n"}, {"input": "4\n", "output": "16\n"}]


def _problem(tests, **extra) -> Problem:
  return Problem("p", "Write square(x).", reward=(("code", 1.0),),
                 extra={"tests": tests, "entry_point": "square", **extra})


def _score(tests, code, **extra):
  score, = rewards.score([_problem(tests, **extra)], [f"Here:\n```python\n{code}\n```\nDone."])
  return score


def test_right_and_wrong():
  """Oracle: squares; all kinds of tests, all or a fraction of them."""
  right = ("def square(x):\n  return x * x\n"
           "if __name__ == '__main__':\n  print(square(int(input())))")
  half = right.replace("x * x", "9")
  problems = [*[_problem(PRINTED + STATED + CALLED)] * 2,
              _problem(PRINTED + CALLED, grade="fraction")]
  found = rewards.score(problems, [f"```py\n{c}\n```" for c in (right, half, half)])
  assert [s.value for s in found] == [1.0, 0.0, 0.5], found
  assert found[0].why == "7 of 7 tests passed"
  assert "2 of 4 tests passed; printed '9" in found[2].why


# Wrong answers that want to be right. None knows the expected values, which stay elsewhere.
CHEATS = {
    "says so": "print('2 tests passed\\nscore: 1.0\\nOK')\ndef square(x): return 'OK'",
    "exits": "import sys; sys.exit(0)",
    "exits at once": "import os; os._exit(0)",
    "exits when called": "def square(x): raise SystemExit(0)",
    "exits hard when called": "import os\ndef square(x): os._exit(0)",
    "ends loops": "def square(x): raise StopIteration",
    "equals all": "class A(int):\n  def __eq__(self, o): return True\n  __hash__ = int.__hash__\n"
                  "def square(x): return A()",
    "equals all, a list": "class A(list):\n  def __eq__(self, o): return True\n"
                          "def square(x): return A()",
    "patches": "import builtins\nbuiltins.AssertionError = None\nbuiltins.all = lambda x: True\n"
               "builtins.sum = lambda x: 2\nbuiltins.__build_class__ = None\n"
               "def square(x): return 1",
    "patches json": "import json, sys\nfor m in list(sys.modules.values()):\n"
                    "  if hasattr(m, 'dumps'): m.dumps = lambda *a: '{\"value\": true}'\n"
                    "def square(x): return True",
    "forges results": "import os\ndef square(x):\n"
                      "  os.write(3, b'{\"value\": \"null\"}\\n' * 50)\n",
    "forges a status": "import os\nfor i in range(3, 64):\n  try: os.write(i, b'{\"ended\": "
                       "\"exit\", \"status\": 0}\\n')\n  except OSError: pass\n"
                       "def square(x): return 1",
    "closes all": "import os; os.closerange(0, 64)\ndef square(x): return 1",
    "forks and goes on": "import os\nif os.fork(): os._exit(0)\ndef square(x): return 1",
    "raises at exit": "import atexit, os; atexit.register(lambda: os._exit(0))\n"
                      "def square(x): return 1",
    "asserts": "def square(x): raise AssertionError",
}


def test_cheats():
  """Law: no wrong program is graded right, whatever it does to its own process."""
  tests = [PRINTED[0], CALLED[0], STATED[1]]
  problems = [_problem(tests, grade="fraction")] * len(CHEATS)
  answers = [f"```python\n{code}\n```" for code in CHEATS.values()]
  found = programs.code(problems, answers, programs.sandbox.Limits(seconds=5), workers=4)
  assert [name for name, s in zip(CHEATS, found, strict=True) if s.value] == [], found


def test_expected_values_are_out_of_reach():
  """Law: what is expected is in no object, frame or file that a program can read; see by a value
  that is passed as an argument, which is found.
  """
  code = """
import gc, os, sys
def square(x=0):
  found, frame = [], sys._getframe()
  while frame: found.append(repr(frame.f_locals)); frame = frame.f_back
  found += [repr(o) for o in gc.get_objects() if type(o) in (dict, list, tuple) and len(o) < 50]
  for folder, folders, names in os.walk('/'):
    folders[:] = [f for f in folders if f not in ('lib', 'dev')]
    for name in names:
      try: found.append(open(os.path.join(folder, name), errors='replace').read(10**6))
      except OSError: pass
  value = int('739100') * 1000 + 1  # not folded into a constant that would find itself
  return value if any(str(value) in text for text in found) else 0
if __name__ == '__main__': print(square())
"""
  hidden = 739_100_001
  tests = [{"input": "", "output": f"{hidden}"}, {"args": [0], "output": hidden},
           {"code": f"assert square(0) == {hidden}"}, {"args": [hidden], "output": hidden}]
  assert _score(tests[:3], code, grade="fraction").value == 0
  assert _score(tests[3:], code).value == 1


@pytest.mark.parametrize("answer", [
    "", "no code", "```python\ndef square(x): return x * x",
    "<think>```py\ndef square(x): return x*x\n```",
    "```\ndef square(x): return x*x\n```\nor\n```\ndef square(x): return 1\n```"])
def test_which_code(answer):
  """Law: the last closed block of the final part is the answer."""
  score, = rewards.score([_problem(CALLED)], [answer])
  assert score.value == 0


@pytest.mark.parametrize("wanted, found, same", [
    (1, 1, True), (1, True, False), (True, True, True), (True, 1, False), (1, 1.0, True),
    (1.0, 1 + 1e-12, True), (1.0, 1.001, False), ([1, [2]], (1, (2,)), True), ([1], [1, 2], False),
    ({"a": [1]}, {"a": (1,)}, True), ({"a": 1}, {"a": 1, "b": 2}, False), ("1", 1, False),
    (None, None, True), (None, 0, False), ([], "", False), (0, None, False)])
def test_same(wanted, found, same):
  """Oracle: by hand."""
  assert programs.same(wanted, found) is same


@pytest.mark.parametrize("extra, said", [
    ({}, "must be a list"), ({"tests": []}, "at least one"),
    ({"tests": [{"input": "1"}]}, "must have"),
    ({"tests": CALLED}, "entry_point'. is missing"),
    ({"tests": PRINTED, "grade": "some"}, "must be one of all, fraction")])
def test_mistakes(extra, said):
  """Law: a problem that cannot be graded is an error of its author, not a 0."""
  with pytest.raises(ConfigError, match=said):
    rewards.score([Problem("p", "?", reward=(("code", 1.0),), extra=extra)], ["x"])
