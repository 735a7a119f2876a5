"""The schedule itself, and the doors to what can be asked of it."""

import dataclasses

from dsv3_jax.parallel.schedules import lockstep, simulate, validate
from dsv3_jax.parallel.schedules.ops import LETTERS, Op, Route


@dataclasses.dataclass(frozen=True)
class Schedule:
  """Op lists of all ranks.

  Attributes:
    name: what made it.
    ranks, microbatches: R and M.
    routes: direction -> stage -> (rank, chunk); micro-batches are shared out evenly, the first ones
      taking direction 0.
    orders: rank -> ops, in the order in which the rank does them.
  """

  name: str
  ranks: int
  microbatches: int
  routes: tuple[Route, ...]
  orders: tuple[tuple[Op, ...], ...]

  @property
  def stages(self) -> int:
    """Stages of the model, S."""
    return len(self.routes[0])

  @property
  def chunks(self) -> int:
    """Stages that a rank holds."""
    return 1 + max(chunk for route in self.routes for _, chunk in route)

  def direction(self, microbatch: int) -> int:
    """The route of a micro-batch."""
    return microbatch * len(self.routes) // self.microbatches

  def place(self, stage: int, microbatch: int) -> tuple[int, int]:
    """(rank, chunk) of a stage on a micro-batch's way."""
    return self.routes[self.direction(microbatch)][stage]

  def string(self, rank: int) -> str:
    """A letter for each op: F, b for I, w for W, B, and X for FB."""
    return "".join(LETTERS[op.kind] for op in self.orders[rank])

  def validate(self) -> None:
    """Raises ValueError where the orders do not train the model; see validate.py."""
    validate.validate(self)

  def simulate(self, forward: float = 1.0, backward_input: float = 1.0,
               backward_weight: float = 1.0, overlapped: float | None = None,
               comm: float = 0.0) -> simulate.Simulation:
    """Runs the orders under a cost model, each rank on its own clock.

    Args:
      forward, backward_input, backward_weight: duration of F, I and W of one stage; B takes I + W.
      overlapped: duration of FB; the sum of the three where None, so that nothing is gained.
      comm: from the end of an op until a neighbouring rank can use what it sent. Links have no
        queue, and sending takes no time of the rank.

    Returns:
      A Simulation: makespan, bubble and peak_activations, the last two one number a rank.

    Raises:
      ValueError: a duration is negative or not finite; the ranks wait for each other forever.
    """
    return simulate.simulate(self, simulate.Costs(forward, backward_input, backward_weight,
                                                  overlapped, comm))

  def ticks(self, unit: bool = False) -> lockstep.Ticks:
    """The orders in lockstep: one op, or none, a rank and tick; messages between the ticks.

    Args:
      unit: cut ops into F, I and W, a tick each; otherwise an op is a tick. FB pays only whole, the
        others lose less time to waiting when cut.

    Raises:
      ValueError: the ranks wait for each other forever.
    """
    return lockstep.ticks(self, unit)
