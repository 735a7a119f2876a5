"""What a schedule must satisfy to compute the gradient of the batch."""

import collections
from typing import TYPE_CHECKING

from dsv3_jax.parallel.schedules import simulate
from dsv3_jax.parallel.schedules.ops import COMPLETES, Event, Op, completes, waits_for

if TYPE_CHECKING:
  from dsv3_jax.parallel.schedules.schedule import Schedule


def validate(schedule: "Schedule") -> None:
  """Checks a schedule, one that `make` made or any other.

  - Routes are of one length, go from a rank to itself or a neighbour, and a chunk of a rank is one
    stage.
  - Each op's kind fits its units, and each unit's stage, chunk, direction and rank its route.
  - Each micro-batch goes forward and backward, for its input and for the weights, exactly once a
    stage.
  - On a rank, no backward comes before its forward, no weights before the input (so activations
    live from F to W, and none is left at the end).
  - No rank waits forever for another.

  Raises:
    ValueError: the first of these that fails, naming rank, op and what was expected.
  """
  _check_routes(schedule)
  counts: collections.Counter[Event] = collections.Counter()
  for rank, order in enumerate(schedule.orders):
    past: set[Event] = set()
    for i, op in enumerate(order):
      where = f"{schedule.name}: rank {rank}, op {i} ({op})"
      _check_op(schedule, rank, op, where)
      past.update(completes(op))
      counts.update(completes(op))
      for event in waits_for(op, schedule.stages):
        part, stage, microbatch = event
        if schedule.place(stage, microbatch)[0] == rank and event not in past:
          raise ValueError(f"{where} comes before the {part} of micro-batch {microbatch} on stage "
                           f"{stage}, which it needs; swap them")
  for part in "FIW":
    for stage in range(schedule.stages):
      for microbatch in range(schedule.microbatches):
        found = counts[part, stage, microbatch]
        if found != 1:
          raise ValueError(f"{schedule.name}: {part} of micro-batch {microbatch} on stage {stage} "
                           f"stands {found} times in the orders; it must stand once")
  simulate.simulate(schedule, simulate.Costs())


def _check_routes(schedule: "Schedule") -> None:
  if len(schedule.orders) != schedule.ranks:
    raise ValueError(f"{schedule.name}: {len(schedule.orders)} orders for {schedule.ranks} ranks; "
                     "give one a rank")
  if schedule.microbatches % len(schedule.routes):
    raise ValueError(f"{schedule.name}: {schedule.microbatches} micro-batches cannot be shared out "
                     f"over {len(schedule.routes)} directions; take a multiple")
  places = [place for route in schedule.routes for place in route]
  for direction, route in enumerate(schedule.routes):
    ranks = [rank for rank, _ in route]
    if len(route) != schedule.stages or any(abs(a - b) > 1 for a, b in zip(ranks, ranks[1:])):
      raise ValueError(f"{schedule.name}: route {direction} visits ranks {ranks}; it must have "
                       f"{schedule.stages} stages and go to neighbours alone")
  if len(set(places)) != len(places) or not {rank for rank, _ in places} <= set(
      range(schedule.ranks)):
    raise ValueError(f"{schedule.name}: the routes' (rank, chunk) pairs must differ and lie on "
                     f"ranks 0 to {schedule.ranks - 1}; they are {places}")


def _check_op(schedule: "Schedule", rank: int, op: Op, where: str) -> None:
  if op.kind not in COMPLETES:
    raise ValueError(f"{schedule.name}: rank {rank} has an op of kind {op.kind!r}; kinds are "
                     f"{', '.join(COMPLETES)}")
  for part, unit, wanted in (("forward", op.forward, "F" in op.kind),
                             ("backward", op.backward, op.kind != "F")):
    if (unit is not None) != wanted:
      raise ValueError(f"{schedule.name}: rank {rank} has an op of kind {op.kind!r} "
                       f"{'without' if wanted else 'with'} a {part} unit: {tuple(op)}")
    if unit is None:
      continue
    if not (0 <= unit.microbatch < schedule.microbatches and 0 <= unit.stage < schedule.stages):
      raise ValueError(f"{where}: there are {schedule.microbatches} micro-batches and "
                       f"{schedule.stages} stages, counted from 0")
    place = (rank, unit.chunk, unit.direction)
    expected = (*schedule.place(unit.stage, unit.microbatch), schedule.direction(unit.microbatch))
    if place != expected:
      raise ValueError(f"{where}: (rank, chunk, direction) is {place}, and the micro-batch visits "
                       f"that stage on {expected}")
