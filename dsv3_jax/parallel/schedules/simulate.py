"""Event simulation: each rank does its ops in order, as soon as their inputs are there."""

import collections
import dataclasses
import math
import numbers
from collections.abc import Callable
from typing import TYPE_CHECKING

from dsv3_jax.parallel.schedules.ops import COMPLETES, Event, Op, completes, waits_for

if TYPE_CHECKING:
  from dsv3_jax.parallel.schedules.schedule import Schedule


@dataclasses.dataclass(frozen=True)
class Costs:
  """Durations in one unit of time; see Schedule.simulate."""

  forward: float = 1.0
  backward_input: float = 1.0
  backward_weight: float = 1.0
  overlapped: float | None = None
  comm: float = 0.0

  def __post_init__(self):
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if value is None and field.name == "overlapped":
        continue
      if not isinstance(value, numbers.Real) or not math.isfinite(value) or value < 0:
        raise ValueError(f"{field.name}={value!r} must be a duration: finite, not negative")

  def table(self) -> dict[str, float]:
    """Duration by kind of op."""
    forward, inputs, weights = map(float, (
        self.forward, self.backward_input, self.backward_weight))
    both = inputs + weights
    return {"F": forward, "I": inputs, "W": weights, "B": both,
            "FB": forward + both if self.overlapped is None else float(self.overlapped)}


@dataclasses.dataclass(frozen=True)
class Simulation:
  """What came out.

  Attributes:
    makespan: when the last rank ends, the first one having started at 0.
    bubble: makespan less the time that a rank works; one number a rank.
    peak_activations: most units alive at once, from their forward to their weights' gradient; one
      number a rank. A stage's activations for one micro-batch count 1.
    starts: rank -> when each of its ops starts.
    ends: rank -> when each of its ops ends.
  """

  makespan: float
  bubble: tuple[float, ...]
  peak_activations: tuple[int, ...]
  starts: tuple[tuple[float, ...], ...]
  ends: tuple[tuple[float, ...], ...]


def simulate(schedule: "Schedule", costs: Costs) -> Simulation:
  """See Schedule.simulate."""
  durations = costs.table()
  return run(schedule, lambda op: durations[op.kind], costs.comm)


def run(schedule: "Schedule", duration: Callable[[Op], float], comm: float = 0.0) -> Simulation:
  """`simulate` with a duration for each op, so that stages may differ.

  Takes time linear in the number of ops. `comm`: as in Schedule.simulate.
  """
  starts: list[list[float]] = [[] for _ in range(schedule.ranks)]
  ends: list[list[float]] = [[] for _ in range(schedule.ranks)]
  done: dict[Event, tuple[float, int]] = {}  # when and on which rank
  waiting: dict[Event, list[int]] = collections.defaultdict(list)  # ranks
  inputs = [[tuple(waits_for(op, schedule.stages)) for op in order] for order in schedule.orders]
  free = [0.0] * schedule.ranks
  runnable = list(range(schedule.ranks))
  while runnable:
    rank = runnable.pop()
    order = schedule.orders[rank]
    for i in range(len(ends[rank]), len(order)):
      start, missing = free[rank], None
      for event in inputs[rank][i]:
        found = done.get(event)
        if found is None:
          missing = event
          break
        start = max(start, found[0] if found[1] == rank else found[0] + comm)
      if missing is not None:
        waiting[missing].append(rank)
        break
      free[rank] = end = start + duration(order[i])
      starts[rank].append(start)
      ends[rank].append(end)
      for event in completes(order[i]):
        done[event] = (end, rank)
        if event in waiting:
          runnable += waiting.pop(event)
  stuck = {rank: order[len(ends[rank])] for rank, order in enumerate(schedule.orders)
           if len(ends[rank]) < len(order)}
  if stuck:
    raise ValueError(f"{schedule.name}: no rank can go on; "
                     + ", ".join(f"rank {rank} waits to do {op}" for rank, op in stuck.items()))
  makespan = max(free)
  work = [math.fsum(map(duration, order)) for order in schedule.orders]
  return Simulation(makespan, tuple(makespan - w for w in work),
                    tuple(peak_activations(order) for order in schedule.orders),
                    tuple(map(tuple, starts)), tuple(map(tuple, ends)))


def peak_activations(order: tuple[Op, ...]) -> int:
  """Most units alive at once on a rank.

  A unit's activations live from its forward until its weights' gradient; during an FB both of its
  units are alive. Only the order matters, not when the ops happen.
  """
  alive = peak = 0
  for op in order:
    alive += op.forward is not None
    peak = max(peak, alive)
    alive -= "W" in COMPLETES[op.kind]
  return peak
