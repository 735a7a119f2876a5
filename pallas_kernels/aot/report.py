"""What the assembler and the machine code say about a compiled kernel."""

import collections
import dataclasses
import re

COUNTED = ("QGMMA", "HGMMA", "FFMA", "UTMALDG", "UTMASTG", "LDL", "STL")
_OPCODE = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)", re.MULTILINE)


@dataclasses.dataclass(frozen=True)
class Report:
  """One compiled module; numbers are 0 where `error` is set.

  Attributes:
    registers: a thread's, at launch (kernels that set them per warpgroup start from it).
    spill_stores, spill_loads, stack: bytes a thread.
    shared: bytes of dynamic shared memory a block.
    instructions: occurrences in the machine code by name without modifiers; empty where there was
      no disassembler.
    warnings: of the assembler, such as a serialized wgmma.
    error: why there is no machine code.
  """

  registers: int = 0
  spill_stores: int = 0
  spill_loads: int = 0
  stack: int = 0
  shared: int = 0
  instructions: dict[str, int] = dataclasses.field(default_factory=dict)
  warnings: tuple[str, ...] = ()
  error: str = ""

  @property
  def spills(self) -> int:
    """Bytes spilled, stored and loaded."""
    return self.spill_stores + self.spill_loads


def _number(pattern: str, text: str) -> int:
  return sum(map(int, re.findall(pattern, text)))


def parse(ptxas: str, sass: str = "", shared: int = 0) -> Report:
  """A Report from `ptxas -v` output and `nvdisasm -c` output."""
  if "Used " not in ptxas:
    return Report(error=f"no report of the assembler: {ptxas.strip()[-400:]}")
  return Report(
      registers=max(map(int, re.findall(r"Used (\d+) registers", ptxas))),
      # The summary's line; a warning may have said the same numbers before.
      spill_stores=_number(r"stack frame, (\d+) bytes spill stores", ptxas),
      spill_loads=_number(r"stack frame, \d+ bytes spill stores, (\d+) bytes spill loads", ptxas),
      stack=_number(r"(\d+) bytes stack frame", ptxas),
      shared=shared,
      instructions=dict(collections.Counter(_OPCODE.findall(sass))),
      warnings=tuple(w.strip() for w in re.findall(r"(?:warning|Potential).*", ptxas)))


def combine(reports: list[Report]) -> Report:
  """The kernels of one function as one: the worst of each resource, sums of spills and counts."""
  if not reports:
    return Report(error="no Mosaic GPU kernel in the program")
  failed = next((r for r in reports if r.error), None)
  if failed:
    return failed
  instructions = sum((collections.Counter(r.instructions) for r in reports), collections.Counter())
  return Report(
      registers=max(r.registers for r in reports),
      spill_stores=sum(r.spill_stores for r in reports),
      spill_loads=sum(r.spill_loads for r in reports),
      stack=max(r.stack for r in reports),
      shared=max(r.shared for r in reports),
      instructions=dict(instructions),
      warnings=tuple(w for r in reports for w in r.warnings))
