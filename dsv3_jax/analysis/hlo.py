"""Reads the text of a compiled program: XLA's HLO, as `compiled.as_text()` or a dump has it.

A scheduled module lists the instructions of every computation in the order in which they are
issued. An asynchronous one stands there twice, as start and as done; what lies between runs
meanwhile.
"""

import math
import re
from typing import NamedTuple

import numpy as np

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z0-9\-]*)\((.*)$")
_CALLED = re.compile(
    r"\b(?:calls|body|condition|to_apply|called_computation|true_computation|false_computation)="
    r"%?([\w.\-]+)|\b(?:branch_computations|called_computations)=\{([^}]*)\}")
_ARRAY = re.compile(r"\b(pred|bf16|[a-z]+(\d+)[a-z0-9]*)\[([\d,]*)\]")
_SCOPE = re.compile(r'op_name="([^"]*)"')
_AXES = re.compile(r"'([^']+)'=(\d+)")
_NAME = re.compile(r"%([\w.\-]+)")


class Instruction(NamedTuple):
  """One line of a computation.

  Attributes:
    name, opcode: as printed.
    result: type of the result, as printed.
    operands: names.
    calls: names of the computations that it runs.
    scope: jax's scopes and the operation's name, joined by "/"; "" where there are none.
    text: the line from its opcode's arguments on.
  """

  name: str
  opcode: str
  result: str
  operands: tuple[str, ...]
  calls: tuple[str, ...]
  scope: str
  text: str


class Program(NamedTuple):
  """Attributes:
    entry: name of the main computation.
    computations: name -> instructions in the order of their issue.
  """

  entry: str
  computations: dict[str, tuple[Instruction, ...]]


def parse(text: str) -> Program:
  """A program's computations.

  Raises:
    ValueError: the text is no HLO module, or one that is not scheduled.
  """
  head = text[:text.find("\n")]
  if not head.startswith("HloModule"):
    raise ValueError(f"no HLO module: it begins with {head[:40]!r}; give compiled.as_text()")
  if "is_scheduled=true" not in head:
    raise ValueError("the HLO module is not scheduled, so its order means nothing; give what the "
                     "compiler returned (compiled.as_text(), or the dump after optimizations)")
  computations, entry, lines = {}, "", None
  for line in text.splitlines():
    if lines is None:
      found = _COMPUTATION.match(line)
      if found:
        lines = []
        entry = found[2] if found[1] else entry
        name = found[2]
    elif line.startswith("}"):
      computations[name], lines = tuple(lines), None
    elif found := _INSTRUCTION.match(line):
      lines.append(_instruction(*found.groups()))
  return Program(entry, computations)


def _instruction(name: str, result: str, opcode: str, rest: str) -> Instruction:
  calls = []
  for one, several in _CALLED.findall(rest):
    calls += [one] if one else [n.strip().lstrip("%") for n in several.split(",")]
  arguments = rest[:rest.find(")")]
  operands = _NAME.findall(arguments) or [a.strip() for a in arguments.split(",") if a.strip()]
  scope = _SCOPE.search(rest)
  return Instruction(name, opcode, result, tuple(operands), tuple(calls),
                     scope[1] if scope else "", rest)


def size(result: str) -> int:
  """Bytes of all arrays of a type, such as "(bf16[8,4]{1,0}, s32[])"."""
  return sum(math.prod(int(n) for n in dims.split(",") if n) * _bits(kind, bits) // 8
             for kind, bits, dims in _ARRAY.findall(result))


def _bits(kind: str, bits: str) -> int:
  return 8 if kind == "pred" else 16 if kind == "bf16" else int(bits)


def groups(instruction: Instruction) -> tuple[tuple[int, ...], ...]:
  """The devices that exchange with each other, by their place in the mesh; () where it is not said.

  XLA writes them as lists, as an array that is reshaped and transposed, or as axes of a mesh.
  """
  found = re.search(r"replica_groups=(\{\{.*?\}\}|\[[^ ]*|mesh\[.*?\] \{.*?\})", instruction.text)
  if not found:
    return ()
  text = found[1]
  if text.startswith("{"):
    return tuple(tuple(int(n) for n in g.split(",")) for g in re.findall(r"\{([\d,]+)\}", text))
  if text.startswith("["):
    shape, dims, turn = re.match(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text).groups()
    dims = [int(n) for n in dims.split(",")]
    devices = np.arange(math.prod(dims)).reshape(dims)
    devices = devices.transpose([int(n) for n in turn.split(",")]) if turn else devices
    return tuple(map(tuple, devices.reshape([int(n) for n in shape.split(",")]).tolist()))
  mesh, over = text[5:].split("] {")
  sizes = {name: int(n) for name, n in _AXES.findall(mesh)}
  over = [list(sizes).index(axis) for axis in re.findall(r"'([^']+)'", over)]
  devices = np.arange(math.prod(sizes.values())).reshape(list(sizes.values()))
  rest = [i for i in range(len(sizes)) if i not in over]
  width = math.prod(devices.shape[i] for i in over)
  return tuple(map(tuple, devices.transpose(rest + over).reshape(-1, width).tolist()))
