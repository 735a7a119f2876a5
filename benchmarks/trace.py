"""Where a compiled CPU program's time goes, from `jax.profiler`'s trace.

XLA:CPU runs a program as a graph of thunks on a thread pool. A trace holds an event where a thunk
starts, and an event `end: ...` that points back to it where its last task is done. Between the two
a thunk is active. Several can be active at once, so every moment is divided among the active
thunks (loops and calls apart, which merely contain others): the shares add up to the wall-clock
time of the program.
"""

import collections
import contextlib
import dataclasses
import glob
import re
import tempfile
from collections.abc import Iterator

import jax

_CONTAINERS = ("while", "call", "conditional")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.-]+) = (\((?:[^=]|index=)*?\)|\S+) ([\w-]+)\(")
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_OPERAND = re.compile(r"\(%?([\w.-]+)")


@dataclasses.dataclass(frozen=True)
class Event:
  """One execution of a thunk."""

  name: str
  start_ns: float
  end_ns: float


@dataclasses.dataclass
class Captured:
  """A trace; `events` may be called when its `capture` has ended."""

  folder: str
  found: list[Event] = dataclasses.field(default_factory=list)

  def events(self) -> list[Event]:
    return self.found


@contextlib.contextmanager
def capture() -> Iterator[Captured]:
  """Traces what runs inside the block."""
  with tempfile.TemporaryDirectory() as folder:
    captured = Captured(folder)
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with jax.profiler.trace(folder, profiler_options=options):
      yield captured
    files = glob.glob(f"{folder}/**/*.xplane.pb", recursive=True)
    captured.found = [e for f in files for e in read(f)]


def read(path: str) -> list[Event]:
  """Thunk executions in an xplane file, in no particular order."""
  started, ended = [], {}
  for plane in jax.profiler.ProfileData.from_file(path).planes:
    for line in plane.lines:
      for event in line.events:
        stats = dict(event.stats)
        if event.name.startswith("end: "):
          ended[stats.get("_c")] = event.start_ns
        elif "hlo_op" in stats:
          started.append((event.name, event.start_ns, event.duration_ns, stats.get("_p")))
  return [Event(name, start, max(ended.get(key, 0), start + duration))
          for name, start, duration, key in started]


def instructions(hlo: str) -> dict[str, tuple[str, str, str]]:
  """Name of each instruction in HLO text to its shape, opcode and op_name.

  Copies that the compiler put in have no op_name; theirs says what they copy.
  """
  found = {}
  for line in hlo.splitlines():
    match = _INSTRUCTION.match(line)
    if match:
      op_name, operand = _OP_NAME.search(line), _OPERAND.search(line, match.end() - 1)
      text = op_name[1] if op_name else ""
      if match[3] == "copy" and operand and not text:
        text = f"copy of {re.sub(r'[.][.0-9]*$', '', operand[1])}"
      found[match[1]] = (match[2], match[3], text)
  return found


def shares(events: list[Event], is_container) -> tuple[dict[str, float], dict[str, int], float]:
  """Nanoseconds of wall-clock time and executions of each thunk name, and time with none active.

  Args:
    events: of `read`.
    is_container: whether a name contains others and gets no time itself.
  """
  events = [e for e in events if not is_container(e.name)]
  edges = sorted([(e.start_ns, 1, e.name) for e in events]
                 + [(e.end_ns, -1, e.name) for e in events])
  time_of: dict[str, float] = collections.Counter()
  active: dict[str, int] = collections.Counter()
  idle, previous = 0.0, edges[0][0] if edges else 0.0
  for now, step, name in edges:
    if now > previous:
      total = sum(active.values())
      for other, count in active.items():
        time_of[other] += (now - previous) * count / total
      idle += (now - previous) if not total else 0
      previous = now
    active[name] += step
    if not active[name]:
      del active[name]
  return time_of, collections.Counter(e.name for e in events), idle


def _scope(op_name: str) -> str:
  """The informative end of an op_name: no jit and jvp wrappers, at most 60 characters."""
  parts = [p for p in op_name.split("/") if not p.startswith("jit(")]
  return "/".join(parts)[-60:]


def table(events: list[Event], hlo: str, steps: int, top: int) -> str:
  """The `top` operations by wall-clock time a step, and totals by opcode and by named scope."""
  if not events:
    return "the trace holds no operation: this backend does not record them"
  known = instructions(hlo)

  def is_container(name: str) -> bool:
    opcode = known[name][1] if name in known else re.sub(r"[.\d]+$", "", name)
    return opcode in _CONTAINERS

  time_of, count_of, idle = shares(events, is_container)
  total = sum(time_of.values()) + idle
  out = [f"{total / steps / 1e6:.1f} ms a step traced, {idle / steps / 1e6:.1f} of them with no "
         "operation active",
         f"{'ms/step':>8} {'share':>6} {'runs':>6} {'us/run':>8}  operation  shape  scope"]
  kinds: dict[str, float] = collections.Counter()
  scopes: dict[str, float] = collections.Counter()
  for name, ns in sorted(time_of.items(), key=lambda item: -item[1]):
    shape, opcode, op_name = known.get(name, ("?", re.sub(r"[.\d]+$", "", name), ""))
    kind = re.sub(r"[.\d]+$", "", name) if opcode == "fusion" else opcode
    kinds["fusion" if kind.endswith("fusion") and "ynn" not in kind else kind] += ns
    scopes[_phase(op_name)] += ns
    if len(out) < top + 2:
      out.append(f"{ns / steps / 1e6:8.2f} {ns / total:6.1%} {count_of[name] / steps:6.0f} "
                 f"{ns / count_of[name] / 1e3:8.1f}  {name}  {shape[:60]}  {_scope(op_name)}")
  for title, totals in (("by kind", kinds), ("by scope", scopes)):
    out.append(f"{title}:")
    out += [f"{ns / steps / 1e6:8.2f} {ns / total:6.1%}  {name}"
            for name, ns in sorted(totals.items(), key=lambda item: -item[1])[:16]]
  return "\n".join(out)


_SCOPES = ("optimizer", "head_loss", "router", "dispatch", "experts", "combine", "dense_ffn",
           "mla_project", "mla_output", "mtp_combine")


def _phase(op_name: str) -> str:
  """Named scope and direction of an operation."""
  if op_name.startswith("copy of "):
    return re.sub(r"_(mu|nu|params)_.*", r" \1", op_name)
  scope = next((s for s in _SCOPES if re.search(rf"\b{s}\b", op_name)), "")
  if not scope:
    scope = "attention or norm in a block" if "closed_call" in op_name else "other"
  return f"{scope}, backward" if "transpose(" in op_name else scope
