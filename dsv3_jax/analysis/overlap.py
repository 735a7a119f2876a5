"""Which all-to-alls of a compiled program hide behind matmuls (report 3.2.1).

    python -m dsv3_jax.analysis.overlap MODULE.txt

MODULE.txt is a scheduled HLO module (`compiled.as_text()`, or what XLA_FLAGS=--xla_dump_to=FOLDER
leaves of a run as *after_optimizations.txt). It prints the order of each computation that
exchanges with all-to-all, in these signs:

    G       a matmul: GEMM, grouped matmul, kernel
    (G)     a loop of them
    .       any other operation that takes time (.16: sixteen of them)
    [a1     all-to-all number 1 starts; a1] is awaited
    a1!     one that nothing can hide, since it was not split into the two

and of every one how many matmuls lie between start and done. Those with none are exposed: the
device waits for the network. The status is 1 where a branch that does the forward of one
micro-batch and the backward of another (an op FB of a pipeline, `parallel/pipeline.py`) has one.

Matmuls in between are what a schedule can give; whether they take as long as the exchange is for a
profile to say. `benchmarks/overlap.py` makes such modules without a GPU.
"""

import argparse
import pathlib
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from dsv3_jax.analysis import hlo

EXCHANGES = ("all-to-all", "ragged-all-to-all")
# Loads of a GPU's vendor libraries, and kernels, that multiply matrices.
_LIBRARIES = re.compile(r"cublas|cudnn|cutlass|gemm|matmul|mosaic|triton|fmha", re.IGNORECASE)
_TARGET = re.compile(r'custom_call_target="([^"]*)"')
# These take no time, or are asynchronous and looked at on their own.
_FREE = frozenset({"parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all",
                   "partition-id", "replica-id", "opt-barrier"})
# A branch of the executor, and the op that it does.
_OP = re.compile(r"branch_(\d+)(?:_fun)?/(FB|F|B|I|W)\b")


class Exchange(NamedTuple):
  """An all-to-all.

  Attributes:
    name: of its instruction.
    size: bytes that one device sends, its own share included.
    groups: see `hlo.groups`.
    split: whether it has a start and a done.
    matmuls: between the two, loops of matmuls counting once.
  """

  name: str
  size: int
  groups: tuple[tuple[int, ...], ...]
  split: bool
  matmuls: int

  @property
  def exposed(self) -> bool:
    return not self.matmuls

  def crossing(self, node: int) -> int:
    """Bytes that a device sends to other nodes of `node` devices each, as places in the mesh go."""
    group = self.groups[0]
    away = sum(device // node != group[0] // node for device in group)
    return self.size // len(group) * away


class Order(NamedTuple):
  """What a computation does, in order.

  Attributes:
    computation: its name.
    scope: jax's scope of its exchanges: the branch of the executor, if it is one, and its op.
    signs: see the module docstring.
    exchanges: in the order of their starts.
  """

  computation: str
  scope: str
  signs: tuple[str, ...]
  exchanges: tuple[Exchange, ...]

  @property
  def exposed(self) -> tuple[Exchange, ...]:
    return tuple(e for e in self.exchanges if e.exposed)

  @property
  def op(self) -> str:
    """F, B, FB, I or W where it is a branch of the executor, else ""."""
    found = _OP.search(self.scope)
    return found[2] if found else ""

  @property
  def title(self) -> str:
    found = _OP.search(self.scope)
    return f"branch {found[1]}, {found[2]}" if found else self.scope or self.computation

  def __str__(self) -> str:
    found, run = [], 0
    for sign in (*self.signs, ""):
      if sign == ".":
        run += 1
        continue
      if run:
        found.append("." if run == 1 else f".{run}")
      found.append(sign)
      run = 0
    return " ".join(found).strip()


def _matmul(program: hlo.Program) -> Callable[[hlo.Instruction], bool]:
  """Whether an instruction multiplies matrices, itself or in what it calls."""
  known: dict[str, bool] = {}

  def inside(name: str) -> bool:
    if name not in known:
      known[name] = any(map(one, program.computations.get(name, ())))
    return known[name]

  def one(instruction: hlo.Instruction) -> bool:
    if instruction.opcode == "dot" or instruction.opcode == "ragged-dot":
      return True
    target = _TARGET.search(instruction.text) if instruction.opcode == "custom-call" else None
    return bool(target and _LIBRARIES.search(target[1])) or any(map(inside, instruction.calls))

  return one


def _exchange(program: hlo.Program, instruction: hlo.Instruction) -> bool:
  """Whether it is an all-to-all, or starts one; the older form wraps it in a computation."""
  if instruction.opcode == "async-start":
    inner = [i for name in instruction.calls for i in program.computations.get(name, ())]
    return any(i.opcode in EXCHANGES for i in inner)
  return instruction.opcode.removesuffix("-start") in EXCHANGES


def order(program: hlo.Program, computation: str) -> Order:
  """The order of one computation."""
  is_matmul = _matmul(program)
  signs, started, exchanges, scopes = [], {}, [], []
  for at in program.computations[computation]:
    if _exchange(program, at):
      scopes.append(at.scope)
      number = len(exchanges) + 1
      split = at.opcode.endswith("-start")
      inner = [i for name in at.calls for i in program.computations.get(name, ())]
      said = next((i for i in inner if i.opcode in EXCHANGES), at)
      exchanges.append(Exchange(at.name, hlo.size(at.result), hlo.groups(said), split, 0))
      started[at.name] = number, sum("G" in s for s in signs)
      signs.append(f"[a{number}" if split else f"a{number}!")
    elif at.opcode.endswith("-done") and at.operands and at.operands[0] in started:
      number, before = started[at.operands[0]]
      between = sum("G" in s for s in signs) - before
      exchanges[number - 1] = exchanges[number - 1]._replace(
          size=hlo.size(at.result), matmuls=between)
      signs.append(f"a{number}]")
    elif at.opcode in _FREE or at.opcode.endswith(("-start", "-done", "-update")):
      continue
    elif is_matmul(at):
      signs.append("(G)" if at.opcode == "while" else "G")
    else:
      signs.append(".")
  return Order(computation, _scope(scopes), tuple(signs), tuple(exchanges))


def _scope(scopes: Iterable[str]) -> str:
  """What the scopes begin with alike."""
  parts = [s.split("/") for s in scopes if s]
  same = []
  for names in zip(*parts, strict=False):
    if len(set(names)) > 1:
      break
    same.append(names[0])
  return "/".join(same)


def orders(program: hlo.Program) -> list[Order]:
  """Of all computations with an all-to-all of their own, in the order of the text."""
  found = [name for name, instructions in program.computations.items()
           if not name.startswith("async")
           and any(_exchange(program, i) for i in instructions)]
  return [order(program, name) for name in found]


def report(orders: Sequence[Order]) -> tuple[str, bool]:
  """What is to be printed, and whether all is well: no FB has an exposed all-to-all."""
  lines, wrong = [], 0
  for found in orders:
    exposed = len(found.exposed)
    lines += [f"{found.title}: {exposed} of {len(found.exchanges)} all-to-alls exposed",
              f"    {found}"]
    if found.op == "FB":
      wrong += exposed
      lines += [f"    exposed: {e.name}, {e.size:,} bytes" for e in found.exposed]
  paired = [o for o in orders if o.op == "FB"]
  total = sum(len(o.exchanges) for o in paired)
  if paired:
    lines.append(f"FB: {total - wrong} of {total} all-to-alls in {len(paired)} branches have "
                 "matmuls between start and done")
  return "\n".join(lines), not wrong


def main(argv: list[str] | None = None) -> int:
  p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
  p.add_argument("module", type=pathlib.Path, help="a scheduled HLO module, text")
  args = p.parse_args(argv)
  try:
    found = orders(hlo.parse(args.module.read_text()))
  except (OSError, ValueError) as error:
    print(f"overlap: {args.module}: {error}")
    return 2
  text, good = report(found)
  print(text or "no all-to-alls")
  return int(not good)


if __name__ == "__main__":
  sys.exit(main())
