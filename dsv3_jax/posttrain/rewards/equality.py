"""The reward `math`: is the box the same mathematics as the answer? Judged by math-verify.

Parsing and simplifying what a model wrote can take for ever and any memory, also inside of C code
that no alarm interrupts. So it happens in processes that are killed after some seconds and started
again. Answers that are the same text, or two whole numbers, need none of it.
"""

import atexit
import concurrent.futures
import functools
import importlib.util
import json
import os
import queue
import re
import select
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from dsv3_jax.config import ConfigError
from dsv3_jax.posttrain.problems import Problem, Score
from dsv3_jax.posttrain.rewards import final
from dsv3_jax.posttrain.rewards.registry import register

_SECONDS = 5.0  # for one comparison
_START_SECONDS = 120.0  # for importing sympy on a busy machine
_LONGEST = 1000  # characters of a box
# One number, fraction or name: a question may well offer it as an answer.
_PLAIN = re.compile(r"-?(\d+/\d+|\\[dt]?frac\{?-?\d+\}?\{?\d+\}?|\\?[\w.,%]*)")
_INTEGER = re.compile(r"[-+]?\d{1,400}")


@register("math")
def same(problems: Sequence[Problem], answers: Sequence[str]) -> list[Score]:
  r"""1 where the last \boxed{...} of the final part equals the problem's answer as mathematics.

  Only the last box counts. It has none of these: a box of its own; two formulas ($ within); an
  equation of more than a name with a value, unless the answer is one; the question copied (equal to
  the answer as that may be). Equal does not mean simplified: where the form matters, take "exact".

  Raises:
    ConfigError: math-verify is not installed.
  """
  found = [_quick(p, a) for p, a in zip(problems, answers, strict=True)]
  hard = [i for i, score in enumerate(found) if isinstance(score, str)]
  if hard:
    pool = _judges()
    with concurrent.futures.ThreadPoolExecutor(min(len(hard), pool.count)) as threads:
      done = threads.map(lambda i: pool.judge(problems[i].answer, found[i]), hard)
      for i, score in zip(hard, done, strict=True):
        found[i] = score
  return found


def _quick(problem: Problem, answer: str) -> Score | str:
  """The score where it is plain, else the box for math-verify."""
  box = final.box(final.part(answer, problem.prompt))
  if box is None:
    return Score(0.0, "no box, or an empty or open one")
  text, wanted = final.normal(box), final.normal(problem.answer)
  if text == wanted:
    return Score(1.0)
  if _INTEGER.fullmatch(text) and _INTEGER.fullmatch(wanted):
    return Score(1.0) if int(text) == int(wanted) else Score(0.0, f"{text} is not {wanted}")
  if len(text) > _LONGEST:
    return Score(0.0, f"a box of {len(text):,} characters, more than {_LONGEST:,}")
  if "$" in text or "\\boxed" in text:
    return Score(0.0, "several formulas in the box")
  name, *values = text.split("=")
  if values and "=" not in wanted and (
      len(values) > 1 or not re.fullmatch(r"\s*(\\?[A-Za-z]\w*(\([A-Za-z]\))?)\s*", name)):
    return Score(0.0, "an equation in the box where a value is asked for")
  bare = re.sub(r"\s", "", text)
  if not _PLAIN.fullmatch(bare) and bare in re.sub(r"\s", "", problem.prompt):
    return Score(0.0, "the box copies the question")
  return text


class _Judge:
  """One process that compares, one pair at a time."""

  def __init__(self):
    self._process: subprocess.Popen | None = None

  def compare(self, wanted: str, text: str) -> str:
    """What the process says: "right", "wrong", ..., or "" where it was killed."""
    if self._process is None or self._process.poll() is not None:
      self._start()
    try:
      self._process.stdin.write(json.dumps([wanted, text]).encode() + b"\n")
      self._process.stdin.flush()
    except OSError:
      self.stop()
      return ""
    return self._line(_SECONDS)

  def _start(self) -> None:
    # The folder alone, not the package: the process needs nothing else of it.
    start = (f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); "
             "import jail.compare; sys.path.pop(0); jail.compare.main()")
    self._process = subprocess.Popen(
        [sys.executable, "-I", "-c", start], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, env={}, cwd="/", start_new_session=True)
    if self._line(_START_SECONDS) != "ready":
      raise RuntimeError("the process that runs math-verify did not start; does "
                         "`python -c 'import math_verify'` work?")

  def _line(self, seconds: float) -> str:
    """The next line; "" and the end of the process where none comes in time."""
    descriptor, data = self._process.stdout.fileno(), b""
    deadline = time.monotonic() + seconds
    while not data.endswith(b"\n"):
      left = max(0.0, deadline - time.monotonic())
      block = os.read(descriptor, 4096) if select.select([descriptor], [], [], left)[0] else b""
      if not block:
        self.stop()
        return ""
      data += block
    return data.decode().strip()

  def stop(self) -> None:
    if self._process is not None:
      self._process.kill()
      self._process.communicate()
      self._process = None


class _Judges:
  """As many processes as processors, started when they are needed."""

  def __init__(self):
    self.count = max(1, min(8, len(os.sched_getaffinity(0))))
    self._free: queue.LifoQueue[_Judge] = queue.LifoQueue()
    self._all = [_Judge() for _ in range(self.count)]
    for judge in self._all:
      self._free.put(judge)
    atexit.register(self.stop)

  def judge(self, wanted: str, text: str) -> Score:
    judge = self._free.get()
    try:
      said = judge.compare(wanted, text)
    finally:
      self._free.put(judge)
    if said == "right":
      return Score(1.0)
    return Score(0.0, said or f"not compared in {_SECONDS:g} s")

  def stop(self) -> None:
    for judge in self._all:
      judge.stop()


@functools.cache
def _judges() -> _Judges:
  if importlib.util.find_spec("math_verify") is None:
    raise ConfigError("the reward 'math' needs math-verify; install it: "
                      "pip install 'dsv3-jax[posttrain]'")
  return _Judges()
