"""Units of work, ops, and which op waits for which."""

from collections.abc import Iterator
from typing import NamedTuple

# What an op completes, by kind: forward, backward for the input, backward for the weights.
COMPLETES = {"F": "F", "I": "I", "W": "W", "B": "IW", "FB": "FIW"}
LETTERS = {"F": "F", "I": "b", "W": "w", "B": "B", "FB": "X"}  # of a rank's string

Route = tuple[tuple[int, int], ...]  # stage -> (rank, chunk)


class Unit(NamedTuple):
  """One micro-batch on one stage.

  Attributes:
    microbatch: 0 to M-1; over both directions of dualpipe, the first half taking direction 0.
    stage: of the model, 0 to S-1, which is the place along the route.
    chunk: which of its rank's stages that is: 0, or 1 for the second.
    direction: index of the route.
  """

  microbatch: int
  stage: int
  chunk: int = 0
  direction: int = 0


class Op(NamedTuple):
  """What a rank does at a time.

  Attributes:
    kind: "F" forward; "I" backward for the input; "W" backward for the weights; "B" both of these;
      "FB" the forward of one unit overlapped with B of another.
    forward: the unit that goes forward; None unless kind is F or FB.
    backward: the unit that goes backward; None if kind is F.
  """

  kind: str
  forward: Unit | None = None
  backward: Unit | None = None

  def __str__(self) -> str:
    name = lambda unit: f"{unit.microbatch}@{unit.stage}"
    if self.kind == "FB":
      return f"F{name(self.forward)}&B{name(self.backward)}"
    return f"{self.kind}{name(self.forward or self.backward)}"


Event = tuple[str, int, int]  # "F", "I" or "W" of (stage, micro-batch), done


def completes(op: Op) -> Iterator[Event]:
  """The events that come to pass when `op` ends."""
  for part in COMPLETES[op.kind]:
    unit = op.forward if part == "F" else op.backward
    yield part, unit.stage, unit.microbatch


def waits_for(op: Op, stages: int) -> Iterator[Event]:
  """The events that must have come to pass before `op` starts.

  A forward needs the stage before; a backward for the input its own forward and the stage after;
  a backward for the weights needs its own backward for the input, where not part of the same op.
  """
  if op.forward is not None and op.forward.stage > 0:
    yield "F", op.forward.stage - 1, op.forward.microbatch
  if op.backward is None:
    return
  stage, microbatch = op.backward.stage, op.backward.microbatch
  if op.kind == "W":
    yield "I", stage, microbatch
    return
  yield "F", stage, microbatch
  if stage < stages - 1:
    yield "I", stage + 1, microbatch
