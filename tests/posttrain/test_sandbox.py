"""Attacks on the sandbox, for real, and what must still work in it. Every run has a hard limit."""

import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from dsv3_jax.config import ConfigError
from dsv3_jax.posttrain.rewards import sandbox
from dsv3_jax.posttrain.rewards.jail import values
from dsv3_jax.posttrain.rewards.sandbox import Job, Limits, Protections, calls, script

LIMITS = Limits(seconds=2.0, cpu=1, memory=2**27, processes=4, output=100_000, files=2**20)
ALL = ("user", "processes", "network", "files", "ipc", "calls")

pytestmark = [
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the sandbox needs Linux"),
    pytest.mark.timeout(60)]

FORKS = """
import os, time
made = 0
try:
  for _ in range(20):
    if os.fork() == 0:
      time.sleep(60)
      os._exit(0)
    made += 1
except OSError as error:
  print(made, type(error).__name__)
"""
DAEMON = """
import os, time
if os.fork() == 0:
  if os.fork() == 0:
    while True:
      time.sleep(60)
  os._exit(0)
print("done")
"""
# name: code, how it must end, text that its output must have
ATTACKS = {
    "infinite loop": ("while True: pass", ("cpu", "time"), ""),
    "asleep": ("import time; time.sleep(60)", ("time",), ""),
    "processes": (FORKS, ("exit",), "BlockingIOError"),
    "threads": ("import threading, time\n"
                "try:\n  while True:\n    threading.Thread(target=time.sleep, args=(60,), "
                "daemon=True).start()\nexcept RuntimeError as e: print(e)", ("exit",),
                "can't start new thread"),
    "daemon": (DAEMON, ("exit",), "done"),
    "memory at once": ("x = bytearray(10**10)", ("exit",), "MemoryError"),
    "memory in steps": ("x = []\nwhile True: x.append(bytes(10**6))", ("exit",), "MemoryError"),
    "memory behind the limit": ("import os; os.memfd_create('x')", ("exit",), "PermissionError"),
    "output": ("while True: print('x' * 10_000)", ("output",), "xxx"),
    "errors": ("import sys\nwhile True: sys.stderr.write('x' * 10_000)", ("output",), "xxx"),
    "results": ("import os\nwhile True: os.write(3, b'x' * 10_000)", ("output",), ""),
    "a large file": ("open('x', 'wb').write(bytes(10**7))", ("exit",), "File too large"),
    "many files": ("for i in range(40): open(str(i), 'wb').write(bytes(10**5))", ("exit",),
                   "No space left"),
    "users": ("open('/etc/passwd')", ("exit",), "FileNotFoundError"),
    "other processes": ("import os; os.listdir('/proc')", ("exit",), "FileNotFoundError"),
    "the library": ("import os; open(os.__file__, 'a')", ("exit",), "Error"),
    "a shell": ("import os; os.execv('/bin/sh', ['sh'])", ("exit",), "FileNotFoundError"),
    "kill all": ("import os\nfor p in (-1, 1, os.getppid()):\n  try: os.kill(p, 9)\n"
                 "  except OSError: pass\nprint('alive')", ("exit", "signal"), ""),
    "namespaces": ("import ctypes; c = ctypes.CDLL(None); print(c.unshare(0x10000000), "
                   "c.prctl(1, 0, 0, 0, 0), c.setsid(), c.ptrace(16, 1, 0, 0))", ("exit",),
                   "-1 -1 -1 -1"),
    "environment": ("import os; print(sorted(set(os.environ) - {'LC_CTYPE'}), "
                    "os.getpid() == 1, os.getuid() not in (0,))", ("exit",), "[] True"),
    "descriptors": ("import os\nfor i in range(4, 64):\n  try: print(i, os.fstat(i))\n"
                    "  except OSError: pass\nprint('none')", ("exit",), "none"),
}


def _survivors(pid: int) -> list[str]:
  """Command lines of processes that a process's sandboxes have left."""
  mark, found = f"answer-{pid}-", []
  for path in Path("/proc").glob("[0-9]*/cmdline"):
    try:
      text = path.read_bytes().decode(errors="replace")
    except OSError:
      continue
    if mark in text:
      found.append(f"{path} {text[-80:]!r}")
  return found


def _clean(pid: int) -> bool:
  until = time.monotonic() + 10
  while time.monotonic() < until and _survivors(pid):
    time.sleep(0.05)
  return not _survivors(pid) and not list(Path(tempfile.gettempdir()).glob(f"answer-{pid}-*"))


def _one(code: str, limits: Limits = LIMITS) -> sandbox.Run:
  return sandbox.run([Job(code, [script()])], limits)[0][0]


@pytest.fixture(scope="module")
def listener():
  with socket.create_server(("127.0.0.1", 0)) as server:
    server.settimeout(0.05)
    yield server


def _reached(server: socket.socket) -> bool:
  try:
    server.accept()[0].close()
    return True
  except TimeoutError:
    return False


def _connect(server: socket.socket) -> str:
  return f"import socket; socket.create_connection({server.getsockname()}, 1); print('reached')"


def _needs(*walls: str) -> None:
  if missing := set(walls) - set(sandbox.protections().walls):
    pytest.skip(f"this machine does not permit: {', '.join(sorted(missing))}")


@pytest.fixture(scope="module")
def attacked(listener):
  """All attacks, four at a time."""
  _needs(*ALL)
  codes = {name: code for name, (code, _, _) in ATTACKS.items()}
  codes["a socket"] = _connect(listener)
  began = time.monotonic()
  runs = sandbox.run([Job(code, [script()]) for code in codes.values()], LIMITS, workers=4)
  return {name: r for name, (r,) in zip(codes, runs, strict=True)}, time.monotonic() - began


@pytest.mark.parametrize("name", ATTACKS)
def test_attack(attacked, name):
  """Law: an attack ends within its limits, and gets an error in place of what it wanted."""
  run = attacked[0][name]
  _, ended, text = ATTACKS[name]
  assert run.ended in ended and text in run.stdout + run.stderr, run
  assert run.seconds < LIMITS.seconds + 5
  assert max(len(run.stdout), len(run.stderr), len(run.results)) <= LIMITS.output


def test_no_attack_reaches_a_listener_or_survives(attacked, listener):
  """Oracle: a listener on this machine's loopback, the kernel's list of processes, /tmp."""
  assert not _reached(listener) and attacked[0]["a socket"].status == 1
  assert int(attacked[0]["processes"].stdout.split()[0]) < LIMITS.processes
  assert _clean(os.getpid())


@pytest.mark.parametrize("walls", [
    pytest.param(ALL[:5], id="without the filter"),
    pytest.param(("calls",), id="the filter alone")])
def test_walls_stand_in_for_each_other(monkeypatch, listener, walls):
  """Law: namespaces alone, and the filter alone, each keep network and processes out of reach."""
  _needs(*walls)
  monkeypatch.setattr(sandbox, "protections", lambda: Protections(walls))
  codes = [_connect(listener), DAEMON, FORKS, "print(sum(range(5)))"]
  found = [r for (r,) in sandbox.run([Job(c, [script()]) for c in codes], LIMITS, workers=4)]
  assert found[0].status == 1 and not _reached(listener)
  assert ("done" in found[1].stdout) == ("processes" in walls)
  assert int(found[2].stdout.split()[0]) < LIMITS.processes and "BlockingIOError" in found[2].stdout
  assert found[3].stdout == "10\n" and _clean(os.getpid())


def test_fork_bomb():
  """Law: with the limit on processes seen to hold, a bomb fills it, burns its time, and is gone."""
  _needs("user", "processes")
  few = Limits(seconds=1.0, cpu=1, memory=2**27, processes=3)
  assert int(_one(FORKS, few).stdout.split()[0]) < 3  # before the bomb: does the limit hold?
  bomb = "import os\nwhile True:\n  try: os.fork()\n  except OSError: pass"
  assert _one(bomb, few).ended in ("time", "cpu") and _clean(os.getpid())


def test_nothing_survives_a_killed_trainer():
  """Law: SIGKILL to the process that asked ends supervisor, monitor, program and daemon."""
  _needs("processes")
  code = ("from dsv3_jax.posttrain.rewards import sandbox as s\n"
          f"s.run([s.Job({DAEMON + 'time.sleep(60)'!r}, [s.script()])], s.Limits(seconds=60))")
  trainer = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[2])
  try:
    until = time.monotonic() + 30
    while len(_survivors(trainer.pid)) < 4 and time.monotonic() < until:
      time.sleep(0.02)
    assert len(_survivors(trainer.pid)) == 4  # supervisor, monitor, program, daemon
  finally:
    trainer.kill()
    trainer.wait()
  until = time.monotonic() + 10
  while _survivors(trainer.pid) and time.monotonic() < until:
    time.sleep(0.02)
  assert not _survivors(trainer.pid)
  for folder in Path(tempfile.gettempdir()).glob(f"answer-{trainer.pid}-*"):
    for inner in [*folder.iterdir(), folder]:
      inner.rmdir()  # empty: what the program wrote was in memory


def test_ordinary_programs():
  """Oracle: what Python itself prints for these, in and out, with files, threads and modules."""
  codes = {
      "print(sum(map(int, input().split())))": "7\n",
      "import sys\nfor line in sys.stdin: print(line[::-1].strip())": "4 3\n",
      "open('x', 'w').write('y'); print(open('x').read())": "y\n",
      "import threading as t\nt.Thread(target=lambda: print('late')).start()": "late\n",
      "import atexit, os; atexit.register(print, 'bye'); os.getcwd()": "bye\n",
      "import collections, decimal, re, json, random, math, heapq, zlib; print('ä')": "ä\n",
      "if __name__ == '__main__': print(__name__)": "__main__\n",
      "import subprocess, os\npid = os.fork()\nif not pid: os._exit(3)\n"
      "print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))": "3\n"}
  _needs("processes")
  runs = sandbox.run([Job(code, [script("3 4\n")]) for code in codes], workers=4)
  assert [r.stdout for (r,) in runs] == list(codes.values()), runs
  assert all(r.ok for (r,) in runs)


def test_endings_and_order():
  """Law: runs of one job do not see each other, come in order, and say how they ended."""
  job = Job("import os, sys\nn = input()\nprint(n, os.listdir('.'))\nopen('left', 'w')\n"
            "if n == '2': sys.exit(5)\nif n == '3': raise ValueError('no')\n"
            "if n == '4': import ctypes; ctypes.string_at(0)\nif n == '5': os._exit(0)",
            [script(str(n)) for n in range(1, 6)])
  runs, = sandbox.run([job])
  assert [r.stdout.strip() for r in runs[:3]] == ["1 []", "2 []", "3 []"]
  assert [r.status for r in runs[:3]] == [0, 5, 1] and "ValueError: no" in runs[2].stderr
  assert runs[3].ended == "signal" and runs[4].ok and runs[4].stdout == ""  # never flushed


def test_calls_and_stated_tests():
  """Law: functions give plain values, errors by name; a test's statements see the same."""
  code = ("def f(a, b=1): print('noise'); return a, [b]\ndef g(): raise KeyError('k')\n"
          "def h(): return object()\ndef k(): raise SystemExit(0)")
  wanted = [("f", [2**70], {"b": float("inf")}), ("g", [], {}), ("h", [], {}), ("no", [], {}),
            ("k", [], {}), ("f", [1], {})]
  stated = ["assert f(1) == (1, [1]) and candidate((2,), b={3})[1] == [{3}]", "assert f(1) == 1",
            "try: g()\nexcept KeyError as e: pass\nelse: assert False",
            "try: k()\nexcept Exception: pass"]
  (run, *tests), = sandbox.run([Job(code, [
      calls(wanted), *(sandbox.tested(t, {"f": "f", "g": "g", "k": "k", "candidate": "f"})
                       for t in stated)])])
  found = sandbox.replies(run)
  assert found[0] == (True, (2**70, [float("inf")])) and found[1] == (False, "KeyError: 'k'")
  assert "cannot be judged" in found[2][1] and "defines no no" in found[3][1]
  assert len(found) == 4  # the process ended in the fifth
  assert [t.ok for t in tests] == [True, False, True, False]
  assert {t.ended for t in tests} == {"exit"}  # none waited for an answer's process that is gone


@pytest.mark.parametrize("value", [
    None, True, 1e300, float("-inf"), 2**200, "ä\ud800\n", b"\0", 1j, (), [[]], {1: {"a": ()}},
    {(1, 2)}, frozenset({1}), {"tuple": [1]}])
def test_values(value):
  """Law: what is written is read again, of the same type."""
  back = values.loads(values.dumps(value))
  assert back == value and type(back) is type(value) and "\n" not in values.dumps(value)


@pytest.mark.parametrize("text", ['{"tuple": 1}', '{"a": []}', "{}", '{"int": "z"}', "[" * 10**5,
                                  '{"set": [[]]}', "x", '{"list": [], "set": []}'])
def test_values_that_are_none(text):
  """Law: what cannot have been written raises ValueError alone."""
  with pytest.raises(ValueError):
    values.loads(text)


def test_limits_and_protections(monkeypatch):
  """Law: mistakes and machines that permit too little are refused in words."""
  with pytest.raises(ConfigError, match=r"limits\.seconds=0 must be positive"):
    Limits(seconds=0)
  with pytest.raises(ConfigError, match=r"limits\.memory=1000 must be at least"):
    Limits(memory=1000)
  assert not Protections(("user", "processes")).enough and not Protections(("calls",)).enough
  assert Protections(ALL[:5]).enough and Protections(("files", "calls")).enough
  assert "- files: no root of its own" in str(Protections(("calls",)))
  monkeypatch.setattr(sys, "platform", "darwin")
  with pytest.raises(ConfigError, match="need Linux, this is darwin"):
    sandbox.protections.__wrapped__()


def test_a_wall_that_cannot_be_built_runs_nothing(monkeypatch):
  """Law: closed when in doubt; a sandbox that fails to stand raises and runs no code."""
  _needs("files")
  monkeypatch.setattr(sandbox.walls, "NAMES", ())
  monkeypatch.setattr(sandbox, "_START", sandbox._START.replace(
      "supervisor.main()", "supervisor.walls._LIBRARIES = ('/dev/../proc',); "
      "supervisor.walls._DEVICES = ('no such',); supervisor.main()"))
  with pytest.raises(RuntimeError, match="could not be built.*nothing was run"):
    _one("print(1)")
