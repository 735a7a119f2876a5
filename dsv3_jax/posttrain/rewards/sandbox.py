"""Runs code that a model wrote: it can do nothing but compute, and cannot forge its verdict.

    run = sandbox.run([sandbox.Job(code, [sandbox.script("3 4")])])[0][0]
    run.stdout, run.ended

Two principles carry this. What a program could do is taken from it by the kernel (`jail.walls`),
never by Python: a blocked module or an audit hook is no protection against code in the same
interpreter, and none is used here. And what is expected of a program never enters its process: it
gets inputs and gives outputs, which are compared elsewhere. No trick with the interpreter (patched
builtins, frames of callers, sys.exit, os._exit, lines that look like test results) can then make a
wrong output right.

What every machine gives differs: `protections()` says it. Linux is needed; namespaces for processes
and network, or the kernel's filter of system calls (seccomp); and a root of its own or a user id of
its own. With less nothing is run. All six walls stand for root, and for a user where user
namespaces are permitted; many containers permit root another user id and the filter alone. Memory
is limited for each process, so a program has at most `memory * processes`.
"""

import concurrent.futures
import dataclasses
import functools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dsv3_jax.config import ConfigError
from dsv3_jax.posttrain.rewards.jail import values, walls

_START = ("import sys; sys.path.insert(0, {!r}); from jail import supervisor; sys.path.pop(0); "
          "supervisor.main()")
_GRACE = 20.0  # seconds beyond all runs' own, for a busy machine, until a supervisor is ended


@dataclasses.dataclass(frozen=True)
class Limits:
  """Of one run.

  Attributes:
    seconds: by the clock.
    cpu: seconds of computing, of each process.
    memory: bytes of address space, of each process, the interpreter's 30 MB included.
    processes: and threads, at a time.
    output: bytes to standard output, to standard error, and of results, each.
    files: bytes of a file, and of all together where the files' wall stands.
  """

  seconds: float = 10.0
  cpu: int = 4
  memory: int = 512 * 2**20
  processes: int = 8
  output: int = 2**20
  files: int = 8 * 2**20

  def __post_init__(self):
    for field in dataclasses.fields(self):
      if getattr(self, field.name) <= 0:
        raise ConfigError(f"limits.{field.name}={getattr(self, field.name)} must be positive")
    if self.memory < 2**26:
      raise ConfigError(f"limits.memory={self.memory} must be at least {2**26}, for Python itself")


@dataclasses.dataclass(frozen=True)
class Run:
  """How a run ended.

  Attributes:
    ended: "exit", "signal", or by which limit: "time", "cpu", "output".
    status: exit status, or a signal's number, negative.
    stdout, stderr: as text, undecodable bytes replaced.
    results: lines of a run of kind calls.
    seconds: by the clock.
  """

  ended: str
  status: int
  stdout: str
  stderr: str
  results: str
  seconds: float

  @property
  def ok(self) -> bool:
    """Whether it ended by itself, with status 0."""
    return self.ended == "exit" and self.status == 0


@dataclasses.dataclass(frozen=True)
class Job:
  """Code with the runs it is put through.

  Attributes:
    code: Python; the standard library is there, nothing else.
    runs: of `script`, `calls`, `tested`.
  """

  code: str
  runs: Sequence[dict[str, Any]]


def script(stdin: str = "") -> dict[str, Any]:
  """The code as a program."""
  return {"kind": "script", "stdin": stdin}


def calls(wanted: Sequence[tuple[str, Sequence[Any], dict[str, Any]]]) -> dict[str, Any]:
  """Functions of the code, called in turn in one process; `replies` reads what they gave."""
  return {"kind": "calls", "calls": [[name, values.dumps(tuple(args)), values.dumps(kwargs)]
                                     for name, args, kwargs in wanted]}


def tested(tests: str, entry: dict[str, str]) -> dict[str, Any]:
  """Tests that call functions of the code; its `Run` is that of the tests, not of the code.

  Args:
    tests: Python; they pass if they exit with 0.
    entry: names in the tests, and which function of the code each stands for.
  """
  return {"kind": "serve", "tests": tests, "entry": entry}


def replies(run: Run) -> list[tuple[bool, Any]]:
  """Of each call, as far as they came: (True, its value) or (False, what went wrong)."""
  found: list[tuple[bool, Any]] = []
  for line in run.results.split("\n")[:-1]:
    try:
      reply = json.loads(line)
      found.append((True, values.loads(reply["value"])) if "value" in reply else
                   (False, f"{reply['raised']}: {reply['text']}"))
    except (ValueError, KeyError, TypeError, RecursionError):
      found.append((False, "no readable reply"))
  return found


def run(jobs: Sequence[Job], limits: Limits = Limits(), workers: int = 0) -> list[list[Run]]:
  """Puts each job's code through its runs; jobs side by side, a job's runs in turn.

  Args:
    jobs: code and runs.
    limits: of each run.
    workers: jobs at a time; 0: as many as there are processors.

  Raises:
    ConfigError: this machine has no way to keep a program in.
    RuntimeError: a wall that stood before cannot be built now, or a supervisor ended.
  """
  behind = protections().walls
  count = workers or len(os.sched_getaffinity(0))
  with concurrent.futures.ThreadPoolExecutor(max(1, min(count, len(jobs)))) as pool:
    return list(pool.map(lambda job: _job(job, limits, behind), jobs))


def _job(job: Job, limits: Limits, behind: Sequence[str]) -> list[Run]:
  plain = [r for r in job.runs if r["kind"] != "serve"]
  served = [r for r in job.runs if r["kind"] == "serve"]
  done = iter(_supervised([{**r, "code": job.code} for r in plain], limits, behind)
              if plain else [])
  judged = iter(_tested(job.code, served, limits, behind) if served else [])
  return [next(judged if r["kind"] == "serve" else done) for r in job.runs]


def _tested(code: str, served: list[dict], limits: Limits, behind: Sequence[str]) -> list[Run]:
  """Two supervisors, one of the code and one of its tests, with pipes between their runs."""
  to_code, to_tests = [os.pipe() for _ in served], [os.pipe() for _ in served]
  ours = [end for pair in (*to_code, *to_tests) for end in pair]
  try:
    code_runs = [{"kind": "serve", "code": code} for _ in served]
    test_runs = [{"kind": "tests", "code": r["tests"], "entry": r["entry"]} for r in served]
    with _Supervisor(code_runs, limits, behind,
                     [[a[0], b[1]] for a, b in zip(to_code, to_tests, strict=True)]) as answer, \
         _Supervisor(test_runs, limits, behind,
                     [[b[0], a[1]] for a, b in zip(to_code, to_tests, strict=True)]) as judge:
      while ours:  # an end left open here would keep a reader waiting
        os.close(ours.pop())
      # The answer's supervisor writes less than a pipe holds only by luck: both are read at once.
      with concurrent.futures.ThreadPoolExecutor(1) as pool:
        other = pool.submit(answer.runs)
        try:
          return judge.runs()
        finally:
          other.result()
  finally:
    for end in ours:
      os.close(end)


def _supervised(runs: list[dict], limits: Limits, behind: Sequence[str]) -> list[Run]:
  with _Supervisor(runs, limits, behind, [[] for _ in runs]) as supervisor:
    return supervisor.runs()


class _Supervisor:
  """A bare interpreter with a temporary folder; both are gone at the end."""

  def __init__(self, runs: list[dict], limits: Limits, behind: Sequence[str],
               wires: list[list[int]], probe: bool = False):
    self._folder = tempfile.TemporaryDirectory(prefix=f"answer-{os.getpid()}-",
                                               ignore_cleanup_errors=True)
    os.chmod(self._folder.name, 0o711)  # the program is another user
    folders = [os.path.join(self._folder.name, str(i)) for i in range(max(1, len(runs)))]
    for folder in folders:
      os.mkdir(folder)
    job = {"limits": dataclasses.asdict(limits), "walls": list(behind), "runs": runs,
           "folders": folders, "wires": wires, **({"probe": True} if probe else {})}
    self._count = len(runs)
    self._seconds = limits.seconds * max(1, len(runs)) + _GRACE
    self._text = json.dumps(job).encode()
    self._process = subprocess.Popen(
        [os.path.realpath(getattr(sys, "_base_executable", sys.executable)), "-I", "-S", "-c",
         _START.format(str(Path(__file__).parent)),
         self._folder.name],  # read by nobody; in a list of processes it says whose this one is
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={}, cwd="/",
        pass_fds=[end for wire in wires for end in wire], start_new_session=True)

  def __enter__(self) -> "_Supervisor":
    return self

  def __exit__(self, *_) -> None:
    self._process.kill()  # its monitor and program end with it
    self._process.communicate()
    self._folder.cleanup()

  def lines(self) -> list[dict]:
    try:
      out, errors = self._process.communicate(self._text, timeout=self._seconds)
    except subprocess.TimeoutExpired:
      raise RuntimeError(f"a supervisor of programs did not end in {self._seconds:.0f} s") from None
    if self._process.returncode:
      raise RuntimeError("a supervisor of programs ended with status "
                         f"{self._process.returncode}: {errors.decode(errors='replace')[-2000:]}")
    return [json.loads(line) for line in out.splitlines()]

  def runs(self) -> list[Run]:
    records = self.lines()
    for record in records:
      if "broken" in record:
        raise RuntimeError(f"a program's sandbox could not be built: {record['broken']}; nothing "
                           f"was run. {protections()}")
    if len(records) != self._count:
      raise RuntimeError(f"{len(records)} of {self._count} runs were reported; was a monitor "
                         "killed, for memory perhaps?")
    return [Run(**record) for record in records]


_SAID = {
    "user": ("another user id, or a user namespace: limits on processes hold, no file and process "
             "of the user's is its own",
             "the user's own id: programs may read what the user may read"),
    "processes": ("a pid namespace: all that a program started ends with it",
                  "no pid namespace: programs may start no process and send no signal"),
    "network": ("a network namespace without interfaces",
                "no network namespace: the filter of system calls refuses every socket"),
    "files": ("a root of its own in memory: no other file can be named",
              "no root of its own: programs may read what everybody may read"),
    "ipc": ("shared memory of its own", "shared memory: the filter of system calls refuses it"),
    "calls": ("a filter of system calls (seccomp)",
              "no filter of system calls: what namespaces do not cover is open"),
}


@dataclasses.dataclass(frozen=True)
class Protections:
  """What keeps programs in on this machine, beside the limits.

  Attributes:
    walls: names, of user, processes, network, files, ipc, calls.
  """

  walls: tuple[str, ...]

  @property
  def enough(self) -> bool:
    """Whether a program can neither reach the network, nor outlive its run, nor read and change
    what its user may.
    """
    held = "calls" in self.walls or {"processes", "network"} <= set(self.walls)
    return held and ("files" in self.walls or "user" in self.walls and bool(walls.spare_user()))

  def __str__(self) -> str:
    lines = [f"  {'+' if n in self.walls else '-'} {n}: {_SAID[n][n not in self.walls]}"
             for n in _SAID]
    return "Programs run behind:\n" + "\n".join(lines)


@functools.cache
def protections() -> Protections:
  """Tries each once (a tenth of a second).

  Raises:
    ConfigError: not Linux, or too little to run code that nobody trusts.
  """
  if not sys.platform.startswith("linux"):
    raise ConfigError(f"code rewards need Linux, this is {sys.platform}: namespaces or seccomp "
                      "must keep programs in; use a container or virtual machine with Linux")
  with _Supervisor([], Limits(), (), [], probe=True) as supervisor:
    found = Protections(tuple(supervisor.lines()[0]["walls"]))
  if not found.enough:
    raise ConfigError("code rewards are refused here: programs could reach the network, outlive "
                      "their run, or read and change the user's files. Permit user namespaces "
                      "(sysctl user.max_user_namespaces, kernel.apparmor_restrict_unprivileged_"
                      f"userns=0), or be root in a container or virtual machine. {found}")
  return found
