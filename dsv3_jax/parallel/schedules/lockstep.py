"""Orders in lockstep: what one program that runs on all ranks at once needs.

An SPMD program has one clock. At a tick each rank does one op or idles; after it, all take part in
the same few permutes, each of which moves at most one message a rank to its neighbour. There are
four, one for each direction and kind: "FR", "FL" carry a stage's output to the rank on the right or
left, where it is the next stage's input; "BR", "BL" carry the gradient of a stage's input. What is
sent after tick t can be used at tick t + 1. Between two stages of one rank (the turn of dualpipe_v)
nothing travels.

The tick of an op is the first one at which its rank is free and its inputs are there. A tick lasts
as long as its longest op, so ops of like duration should meet: hence `unit` ticks for schedules
without FB.
"""

import collections
import dataclasses
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from dsv3_jax.parallel.schedules import simulate
from dsv3_jax.parallel.schedules import tables as tables_lib
from dsv3_jax.parallel.schedules.ops import Event, Op, Unit, completes, waits_for

if TYPE_CHECKING:
  from dsv3_jax.parallel.schedules.schedule import Schedule

CHANNELS = ("FR", "FL", "BR", "BL")


class Message(NamedTuple):
  """An array that travels after a tick.

  Attributes:
    channel: one of CHANNELS.
    source, target: ranks, neighbours.
    unit: whose input (F) or output's gradient (B) it is, on the target.
  """

  channel: str
  source: int
  target: int
  unit: Unit


@dataclasses.dataclass(frozen=True)
class Ticks:
  """Attributes:
    schedule: what was put in lockstep, cut into unit ops where that was asked for.
    rows: tick -> rank -> op, None where the rank idles.
    messages: tick -> what travels after it.
  """

  schedule: "Schedule"
  rows: tuple[tuple[Op | None, ...], ...]
  messages: tuple[tuple[Message, ...], ...]

  def validate(self) -> None:
    """Checks that the table does the schedule's ops, with every input there in time.

    Raises:
      ValueError: an op of a rank is missing or out of order; two messages of a channel leave or
        reach a rank after one tick; an op's input has not arrived, or what arrived is not read.
    """
    for rank, order in enumerate(self.schedule.orders):
      if tuple(row[rank] for row in self.rows if row[rank] is not None) != order:
        raise ValueError(f"rank {rank}: the ticks' ops are not the schedule's")
    inbox: list[set[tuple[str, Unit]]] = [set() for _ in range(self.schedule.ranks)]
    for tick, (row, messages) in enumerate(zip(self.rows, self.messages, strict=True)):
      for rank, op in enumerate(row):
        for item in _read(self.schedule, rank, op):
          if item not in inbox[rank]:
            raise ValueError(f"tick {tick}, rank {rank}: {op} has not got its input")
          inbox[rank].remove(item)
      for end in ("source", "target"):
        ends = [(m.channel, getattr(m, end)) for m in messages]
        if len(set(ends)) != len(ends):
          raise ValueError(f"tick {tick}: two messages share a channel's {end}: {messages}")
      for message in messages:
        inbox[message.target].add((message.channel[0], message.unit))
    if any(inbox):
      raise ValueError(f"messages never read: {inbox}")

  def simulate(self, forward: float = 1.0, backward_input: float = 1.0,
               backward_weight: float = 1.0, overlapped: float | None = None,
               comm: float = 0.0) -> simulate.Simulation:
    """Runs the table, every tick as long as its longest op, and `comm` after each but the last.

    Arguments, result and errors are Schedule.simulate's.
    """
    costs = simulate.Costs(forward, backward_input, backward_weight, overlapped, comm)
    durations = costs.table()
    ranks = range(self.schedule.ranks)
    starts, ends = ([[] for _ in ranks] for _ in range(2))
    clock = 0.0
    for row in self.rows:
      for rank, op in enumerate(row):
        if op is not None:
          starts[rank].append(clock)
          ends[rank].append(clock + durations[op.kind])
      clock += max(durations[op.kind] for op in row if op is not None) + comm
    makespan = clock - comm
    bubble = []
    for order in self.schedule.orders:
      kinds = collections.Counter(op.kind for op in order)
      bubble.append(makespan - sum(durations[kind] * n for kind, n in kinds.items()))
    return simulate.Simulation(
        makespan, tuple(bubble), tuple(map(simulate.peak_activations, self.schedule.orders)),
        tuple(map(tuple, starts)), tuple(map(tuple, ends)))


  def tables(self, types: Sequence[Hashable] | None = None) -> tables_lib.Tables:
    """The ticks as arrays for an executor: opcodes, micro-batches, and slots of its buffers.

    Args:
      types: of each stage, to give stages with other layers opcodes of their own; None: all alike.

    Raises:
      ValueError: the number of types is not that of the stages.
    """
    return tables_lib.tables(self, types)


def ticks(schedule: "Schedule", unit: bool = False) -> Ticks:
  """See Schedule.ticks."""
  if unit:
    schedule = dataclasses.replace(schedule, orders=tuple(
        tuple(part for op in order for part in cut(op)) for order in schedule.orders))
  done: dict[Event, int] = {}  # the tick
  position = [0] * schedule.ranks
  rows, messages = [], []
  while any(i < len(order) for i, order in zip(position, schedule.orders)):
    row: list[Op | None] = []
    for rank, order in enumerate(schedule.orders):
      op = order[position[rank]] if position[rank] < len(order) else None
      ready = op is not None and all(e in done for e in waits_for(op, schedule.stages))
      row.append(op if ready else None)
    if not any(row):
      raise ValueError(f"{schedule.name}: no rank can go on at tick {len(rows)}")
    for rank, op in enumerate(row):
      if op is not None:
        position[rank] += 1
        done.update((event, len(rows)) for event in completes(op))
    rows.append(tuple(row))
    messages.append(tuple(m for rank, op in enumerate(row) if op is not None
                          for m in sends(schedule, rank, op)))
  return Ticks(schedule, tuple(rows), tuple(messages))


def cut(op: Op) -> tuple[Op, ...]:
  """An op as F, I and W."""
  forward = (Op("F", forward=op.forward),) if op.forward is not None else ()
  if op.kind in ("B", "FB"):
    return (*forward, Op("I", backward=op.backward), Op("W", backward=op.backward))
  return (op,)


def sends(schedule: "Schedule", rank: int, op: Op) -> list[Message]:
  """What other ranks get from an op."""
  found = []
  for part, unit, step in (("F", op.forward, 1), ("B", op.backward, -1)):
    if unit is None or part == "B" and op.kind == "W" or not (
        0 <= unit.stage + step < schedule.stages):
      continue
    target, chunk = schedule.place(unit.stage + step, unit.microbatch)
    if target != rank:
      found.append(Message(part + ("R" if target > rank else "L"), rank, target,
                           unit._replace(stage=unit.stage + step, chunk=chunk)))
  return found


def _read(schedule: "Schedule", rank: int, op: Op | None) -> list[tuple[str, Unit]]:
  """What an op takes from its rank's inbox: (first letter of the channel, its own unit)."""
  found = []
  if op is None:
    return found
  for part, unit, step in (("F", op.forward, -1), ("B", op.backward, 1)):
    if unit is None or part == "B" and op.kind == "W" or not (
        0 <= unit.stage + step < schedule.stages):
      continue
    if schedule.place(unit.stage + step, unit.microbatch)[0] != rank:
      found.append((part, unit))
  return found
