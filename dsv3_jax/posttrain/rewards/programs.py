"""The reward `code`: an answer's program, by tests in a sandbox.

    extra = {"tests": [...], "entry_point": "f", "grade": "all"}

A test is one of
 - {"input": "3 4\\n", "output": "7\\n"}: the program reads the one and must print the other (but
   for space at lines' ends and empty lines at the end), and exit with 0;
 - {"args": [3, 4], "kwargs": {}, "output": 7}: `entry_point` must return it; as JSON has no tuples,
   a tuple counts as a list, and floats may differ by 1e-9 of their size;
 - {"code": "assert f(3, 4) == 7"}: tests as statements, which call `entry_point` (a name or a list
   of names; "candidate" stands for the first). They pass if no exception leaves them.

No test's expected value enters the tested process. Statements run in a process of their own, where
the entry points are stand-ins whose arguments and results travel as plain values: what they return
cannot bring its own `__eq__`, and what is changed in place in an argument stays behind. Classes as
entry points cannot be tested so.

"grade": "all" (the default) gives 1 if all tests pass, else 0; "fraction" the share that pass.
"""

import math
from collections.abc import Sequence
from typing import Any

from dsv3_jax.config import ConfigError
from dsv3_jax.posttrain.problems import Problem, Score
from dsv3_jax.posttrain.rewards import final, sandbox
from dsv3_jax.posttrain.rewards.registry import register

_GRADES = ("all", "fraction")
_LIMITS = sandbox.Limits()


@register("code")
def code(problems: Sequence[Problem], answers: Sequence[str],
         limits: sandbox.Limits = _LIMITS, workers: int = 0) -> list[Score]:
  """By each problem's tests, of the last block of code in an answer (all of it, without blocks).

  Args:
    problems, answers: as of every reward.
    limits: of each test's run.
    workers: programs at a time; 0: as many as there are processors.

  Raises:
    ConfigError: a problem without tests, a test that is none, or a machine without a sandbox.
  """
  wanted = [_tests(p) for p in problems]
  jobs, places = [], []
  for i, (problem, answer) in enumerate(zip(problems, answers, strict=True)):
    text = final.code(final.part(answer, problem.prompt))
    if text is not None:
      jobs.append(sandbox.Job(text, _runs(problem, wanted[i])))
      places.append(i)
  scores = [Score(0.0, "no block of code, or an open one")] * len(problems)
  for i, runs in zip(places, sandbox.run(jobs, limits, workers) if jobs else [], strict=True):
    scores[i] = _graded(problems[i], _verdicts(wanted[i], runs))
  return scores


def _tests(problem: Problem) -> list[dict[str, Any]]:
  """In the order of their kinds: printed, returned, stated; checked."""
  where = f"problem {problem.id!r}: extra"
  tests = problem.extra.get("tests")
  if not isinstance(tests, list) or not tests:
    raise ConfigError(f"{where}['tests']={tests!r} must be a list with at least one test")
  if problem.extra.get("grade", "all") not in _GRADES:
    raise ConfigError(f"{where}['grade']={problem.extra['grade']!r} must be one of "
                      f"{', '.join(_GRADES)}")
  for i, test in enumerate(tests):
    kind = _kind(test)
    if not kind:
      raise ConfigError(f"{where}['tests'][{i}]={test!r} must have input and output (texts), args "
                        "and output, or code")
    if kind != "input" and not _entry(problem):
      raise ConfigError(f"{where}['entry_point'] is missing; tests[{i}] calls a function")
  return [t for kind in ("input", "args", "code") for t in tests if _kind(t) == kind]


def _kind(test: Any) -> str:
  if not isinstance(test, dict):
    return ""
  if isinstance(test.get("input"), str) and isinstance(test.get("output"), str):
    return "input"
  if isinstance(test.get("args"), list) and isinstance(test.get("kwargs", {}), dict) and \
      "output" in test:
    return "args"
  return "code" if isinstance(test.get("code"), str) else ""


def _entry(problem: Problem) -> list[str]:
  names = problem.extra.get("entry_point", [])
  return [names] if isinstance(names, str) else list(names)


def _runs(problem: Problem, tests: list[dict[str, Any]]) -> list[dict[str, Any]]:
  entry = _entry(problem)
  called = [(entry[0], t["args"], t.get("kwargs", {})) for t in tests if _kind(t) == "args"]
  return [*(sandbox.script(t["input"]) for t in tests if _kind(t) == "input"),
          *([sandbox.calls(called)] if called else []),
          *(sandbox.tested(t["code"], {"candidate": entry[0], **{name: name for name in entry}})
            for t in tests if _kind(t) == "code")]


def _verdicts(tests: list[dict[str, Any]], runs: list[sandbox.Run]) -> list[str]:
  """Of each test: "" where it passed, else why not."""
  said, rest = [], iter(runs)
  for test in tests:
    if _kind(test) == "input":
      run = next(rest)
      right = run.ok and _lines(run.stdout) == _lines(test["output"])
      said.append("" if right else _ending(run) or f"printed {run.stdout[:60]!r}")
  if called := [t for t in tests if _kind(t) == "args"]:
    run = next(rest)
    replies = sandbox.replies(run)[:len(called)]
    replies += [(False, _ending(run) or "no reply")] * (len(called) - len(replies))
    said += [("" if same(t["output"], value) else f"returned {value!r}"[:80]) if fine else value
             for t, (fine, value) in zip(called, replies, strict=True)]
  return said + ["" if run.ok else _ending(run) for run in rest]


def _ending(run: sandbox.Run) -> str:
  if run.ended == "exit":
    last = run.stderr.strip().rpartition("\n")[2]
    return f"exit status {run.status}: {last[:80]}" if run.status else ""
  return f"signal {-run.status}" if run.ended == "signal" else f"over the limit: {run.ended}"


def _graded(problem: Problem, verdicts: list[str]) -> Score:
  passed = sum(not v for v in verdicts)
  value = passed / len(verdicts)
  if problem.extra.get("grade", "all") == "all":
    value = float(passed == len(verdicts))
  first = next((f"; {v}" for v in verdicts if v), "")
  return Score(value, f"{passed} of {len(verdicts)} tests passed{first}")


def _lines(text: str) -> list[str]:
  return [line.rstrip() for line in text.rstrip().split("\n")]


def same(wanted: Any, found: Any) -> bool:
  """Whether a returned value is a JSON value."""
  if isinstance(wanted, bool) or isinstance(found, bool):
    return wanted is found
  if isinstance(wanted, float) and isinstance(found, (int, float)):
    return found == wanted or math.isclose(wanted, found, rel_tol=1e-9)
  if isinstance(wanted, list):
    return (isinstance(found, (list, tuple)) and len(wanted) == len(found)
            and all(map(same, wanted, found)))
  if isinstance(wanted, dict):
    return (isinstance(found, dict) and wanted.keys() == found.keys()
            and all(same(value, found[key]) for key, value in wanted.items()))
  return type(wanted) is type(found) and wanted == found or (
      isinstance(wanted, int) and isinstance(found, float) and wanted == found)
