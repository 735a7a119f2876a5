"""Runs code that nobody trusts, or tests of it, in a process that has given up everything.

Four kinds of run:
 - script: the code as `__main__`; the verdict is on its standard output.
 - calls: the code as a module, some of its functions called; a line for each goes to descriptor 3.
 - serve: as calls, but they arrive one by one on descriptor 4, from a run of kind tests.
 - tests: code of the problem's author, in which each name of an entry point is a stand-in that
   sends its arguments to a run of kind serve and returns what it answers. The tested code is in
   another process, in other namespaces; it never sees the tests.

Descriptor 3 can be written by the tested code as well. That is no way to cheat: whatever it writes
counts as its functions' answers, and what they are compared with is elsewhere.
"""

import atexit
import builtins
import json
import os
import sys
import threading
import traceback
import types

from . import values

RESULTS, CALLS = 3, 4


def main(run: dict) -> int:
  """Runs; returns the exit status, for `os._exit`."""
  sys.argv = ["answer.py"]
  sys.path[:] = [path for path in sys.path if os.path.exists(path)]
  try:
    _KINDS[run["kind"]](run)
    status = 0
  except SystemExit as error:
    status = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
  except BaseException:
    traceback.print_exc()
    status = 1
  try:
    threading._shutdown()  # threads of the code end first, as they do at an interpreter's end
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
  except BaseException:
    status = status or 1
  return status & 0xFF


def _module(code: str, name: str, file: str, **names) -> dict:
  module = types.ModuleType(name)
  sys.modules[name] = module
  module.__dict__.update(names)
  exec(compile(code, file, "exec"), module.__dict__)
  return module.__dict__


def _script(run: dict) -> None:
  _module(run["code"], "__main__", "answer.py")


def _calls(run: dict) -> None:
  names = _module(run["code"], "answer", "answer.py")
  for call in run["calls"]:
    _write(RESULTS, _answer(names, call))


def _serve(run: dict) -> None:
  names = _module(run["code"], "answer", "answer.py")
  with open(CALLS, encoding="ascii") as calls:
    for line in calls:
      _write(RESULTS, _answer(names, json.loads(line)))


def _answer(names: dict, call: list) -> str:
  """One line: {"value": ..} or {"raised": name, "text": ..}."""
  name, args, kwargs = call
  try:
    if name not in names:
      raise NameError(f"the answer defines no {name}")
    value = names[name](*values.loads(args), **values.loads(kwargs))
    return json.dumps({"value": values.dumps(value)})
  except Exception as error:
    return json.dumps({"raised": type(error).__name__, "text": str(error)[:1000]})


def _tests(run: dict) -> None:
  with open(CALLS, encoding="utf-8") as replies:
    def stand_in(name: str):
      def call(*args, **kwargs):
        _write(RESULTS, json.dumps([name, values.dumps(args), values.dumps(kwargs)]))
        return _taken(replies.readline())
      return call

    # Run as a module, whose asserts stand alone: `python -O` is not in use.
    names = {name: stand_in(there) for name, there in run["entry"].items()}
    _module(run["code"], "tests", "tests.py", **names)


class ProgramEnded(BaseException):
  """The answer's process is no more. No test's `except Exception` takes it for an answer."""


def _taken(line: str):
  try:
    reply = json.loads(line)
    if "value" in reply:
      return values.loads(reply["value"])
    name, text = str(reply["raised"]), str(reply["text"])
  except (ValueError, KeyError, TypeError, RecursionError):
    raise ProgramEnded(f"no readable reply: {line[:80]!r}") from None
  kind = getattr(builtins, name, None)
  # StopIteration would end a test's `all(map(..))` early, as if all had been right.
  if (not (isinstance(kind, type) and issubclass(kind, Exception))
      or issubclass(kind, (StopIteration, StopAsyncIteration, Warning))):
    kind = RuntimeError
  raise kind(text)


def _write(descriptor: int, line: str) -> None:
  data = line.encode() + b"\n"
  while data:
    data = data[os.write(descriptor, data):]


_KINDS = {"script": _script, "calls": _calls, "serve": _serve, "tests": _tests}
