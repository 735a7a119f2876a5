"""Ticks as arrays of numbers: what a scan over ticks reads on each rank.

A rank keeps what waits for a later op in five buffers, each an array of slots:

    x   a stage's input, from the stage before until the unit's F
    g   the gradient of a stage's output, from the stage after (or the loss) until its I or B
    i   what F keeps for the backward for the input, until I or B
    w   what F keeps for the backward for the weights, until W or B
    c   what I hands to W: the gradients inside the stage

A slot is free again in the tick of its value's last reading: within a tick all readings come before
all writings. Slots are dealt out in the order of time, lowest free one first, so a buffer has as
many as there are values alive at once on the rank that needs most. x and g have one more, the last,
for what is to be thrown away: a permute brings something on every rank and tick, wanted or not.

What a tick does is one of few opcodes, so that the program has a branch for each and no
decision within one. All that a branch must know at compile time stands in its Opcode; what changes
from tick to tick stands in the columns.
"""

import heapq
from collections.abc import Hashable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from dsv3_jax.parallel.schedules.ops import Op, Unit

if TYPE_CHECKING:
  from dsv3_jax.parallel.schedules.lockstep import Ticks
  from dsv3_jax.parallel.schedules.schedule import Schedule

# Column -> its buffer. FR, FL, BR and BL say where the message goes that arrives by that channel.
READS = {"x_read": "x", "g_read": "g", "i_read": "i", "w_read": "w", "c_read": "c"}
WRITES = {"x_write": "x", "g_write": "g", "i_write": "i", "w_write": "w", "c_write": "c",
          "FR": "x", "FL": "x", "BR": "g", "BL": "g"}
PASSED = ("x", "g")  # buffers into which other ranks send


class Role(NamedTuple):
  """What a unit's stage is to its rank.

  Attributes:
    chunk: which of the rank's stages.
    type: of the stage, as the caller tells stages with other layers apart.
    first: its input is the tokens.
    last: its output goes to the loss. Of a forward alone: a backward finds its gradient in g, the
      loss's as any other, so that this makes no branch of its own.
    local: the next stage (of a forward), or the one before (of a backward), is on the same rank.
  """

  chunk: int
  type: Hashable
  first: bool
  last: bool
  local: bool


class Opcode(NamedTuple):
  """A branch of the program: a kind of op, and the roles of its units; all None where idle."""

  kind: str | None = None
  forward: Role | None = None
  backward: Role | None = None


class Tables(NamedTuple):
  """Attributes:
    opcodes: the branches; 0 is idling.
    columns: name -> int32 [T, R], T ticks and R ranks: "op" (index into opcodes),
      "forward_microbatch" and "backward_microbatch" (0 where the op has none), READS and WRITES
      (slots; where nothing is read or written the last one of x and g, 0 of the others).
    slots: buffer -> number of its slots; 0 where nothing is ever kept in it.
    channels: those of lockstep.CHANNELS that carry something at some tick.
  """

  opcodes: tuple[Opcode, ...]
  columns: dict[str, np.ndarray]
  slots: dict[str, int]
  channels: tuple[str, ...]


def tables(ticks: "Ticks", types: Sequence[Hashable] | None = None) -> Tables:
  """See Ticks.tables."""
  schedule = ticks.schedule
  types = [None] * schedule.stages if types is None else types
  if len(types) != schedule.stages:
    raise ValueError(f"{len(types)} types for {schedule.stages} stages; give one a stage")
  shape = len(ticks.rows), schedule.ranks
  columns = {name: np.full(shape, -1, np.int32) for name in (*READS, *WRITES)}
  columns |= {name: np.zeros(shape, np.int32)
              for name in ("op", "forward_microbatch", "backward_microbatch")}
  opcodes = {Opcode(): 0}
  trains = any(op.backward for order in schedule.orders for op in order)
  buffers = [{name: _Slots() for name in READS.values()} for _ in range(schedule.ranks)]
  for t, (row, messages) in enumerate(zip(ticks.rows, ticks.messages, strict=True)):
    for rank, op in enumerate(row):
      if op is None:
        continue
      columns["op"][t, rank] = opcodes.setdefault(_opcode(schedule, rank, op, types), len(opcodes))
      for part in ("forward", "backward"):
        unit = getattr(op, part)
        if unit is not None:
          columns[f"{part}_microbatch"][t, rank] = unit.microbatch
      for column, unit, last in _reads(op):
        columns[column][t, rank] = buffers[rank][READS[column]].read(unit, last)
      for column, unit in _writes(schedule, rank, op, trains):
        assert columns[column][t, rank] == -1, "two values for one buffer in one tick"
        columns[column][t, rank] = buffers[rank][WRITES[column]].write(unit)
    for message in messages:
      slot = buffers[message.target][WRITES[message.channel]].write(message.unit)
      columns[message.channel][t, message.target] = slot
  slots = {name: max(b[name].count for b in buffers) + (name in PASSED) for name in READS.values()}
  for name, buffer in (READS | WRITES).items():
    columns[name][columns[name] < 0] = slots[buffer] - 1 if buffer in PASSED else 0
  used = {m.channel for messages in ticks.messages for m in messages}
  return Tables(tuple(opcodes), columns, slots, tuple(c for c in WRITES if c in used))


class _Slots:
  """One rank's buffer while slots are dealt out."""

  def __init__(self):
    self.count = 0
    self._free: list[int] = []
    self._held: dict[Unit, int] = {}

  def write(self, unit: Unit) -> int:
    if not self._free:
      self._free.append(self.count)
      self.count += 1
    self._held[unit] = heapq.heappop(self._free)
    return self._held[unit]

  def read(self, unit: Unit, last: bool) -> int:
    slot = self._held.pop(unit) if last else self._held[unit]
    if last:
      heapq.heappush(self._free, slot)
    return slot


def _opcode(schedule: "Schedule", rank: int, op: Op, types: Sequence[Hashable]) -> Opcode:
  roles = []
  for unit, step in ((op.forward, 1), (op.backward, -1)):
    roles.append(None if unit is None else Role(
        unit.chunk, types[unit.stage], unit.stage == 0,
        step == 1 and unit.stage == schedule.stages - 1,
        _neighbour(schedule, rank, unit, step) is not None))
  return Opcode(op.kind, *roles)


def _neighbour(schedule: "Schedule", rank: int, unit: Unit, step: int) -> Unit | None:
  """The unit of the stage before or after, if it is on the same rank."""
  stage = unit.stage + step
  if not 0 <= stage < schedule.stages:
    return None
  place, chunk = schedule.place(stage, unit.microbatch)
  return unit._replace(stage=stage, chunk=chunk) if place == rank else None


def _reads(op: Op) -> Iterator[tuple[str, Unit, bool]]:
  """(column, whose value, whether for the last time)."""
  if op.forward is not None and op.forward.stage > 0:
    yield "x_read", op.forward, True
  if op.kind in ("B", "FB", "I"):
    yield "g_read", op.backward, True
    yield "i_read", op.backward, True
    yield "w_read", op.backward, op.kind != "I"
  if op.kind == "W":
    yield "w_read", op.backward, True
    yield "c_read", op.backward, True


def _writes(schedule: "Schedule", rank: int, op: Op, trains: bool) -> Iterator[tuple[str, Unit]]:
  """(column, whose value) of what stays on the rank."""
  if op.forward is not None:
    if trains:
      yield "i_write", op.forward
      yield "w_write", op.forward
    if op.forward.stage == schedule.stages - 1:
      if trains:
        yield "g_write", op.forward
    elif following := _neighbour(schedule, rank, op.forward, 1):
      yield "x_write", following
  if op.kind == "I":
    yield "c_write", op.backward
  if op.backward is not None and op.kind != "W":
    if before := _neighbour(schedule, rank, op.backward, -1):
      yield "g_write", before
