"""The orders of the five schedules."""

import dataclasses
import difflib
import numbers
from collections import deque

from dsv3_jax.parallel.schedules.ops import Op, Route, Unit
from dsv3_jax.parallel.schedules.schedule import Schedule


def make(name: str, ranks: int, microbatches: int) -> Schedule:
  """A schedule by its name.

  Args:
    name: gpipe, 1f1b, zb1p, dualpipe or dualpipe_v.
    ranks: of the pipeline; at least 1, for dualpipe even.
    microbatches: of the whole batch; at least 1, for dualpipe (even) and dualpipe_v at least
      2 * ranks.

  Raises:
    ValueError: another name, or numbers that the schedule has no order for.
  """
  if name not in _MAKERS:
    near = difflib.get_close_matches(str(name).lower().replace("-", "_"), NAMES, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"schedule {name!r} is none of {', '.join(NAMES)}{hint}")
  for what, value in (("ranks", ranks), ("microbatches", microbatches)):
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
      raise ValueError(f"{what}={value!r} must be a whole number, at least 1")
  if name == "dualpipe" and ranks % 2:
    raise ValueError(f"dualpipe needs an even number of ranks, and ranks={ranks}; take "
                     f"{ranks + 1}, or dualpipe_v, which runs on any number")
  if name in ("dualpipe", "dualpipe_v") and microbatches < 2 * ranks:
    raise ValueError(f"{name} needs at least 2 * ranks = {2 * ranks} micro-batches, and "
                     f"microbatches={microbatches}; cut the batch finer, or take zb1p, which runs "
                     "on any number")
  if name == "dualpipe" and microbatches % 2:
    raise ValueError(f"dualpipe needs an even number of micro-batches, half for each direction, "
                     f"and microbatches={microbatches}; take {microbatches + 1}, or dualpipe_v, "
                     "which runs on any number")
  return _MAKERS[name](int(ranks), int(microbatches))


def forward(schedule: Schedule) -> Schedule:
  """The forward passes of a schedule alone, for evaluation: its stages where they are, no others.

  A rank does of the units that have arrived the one that is furthest on its way. The result has
  ticks and tables; it does not train a model, so that it does not `validate`.
  """
  done: dict[tuple[int, int], int] = {}  # (stage, micro-batch) -> tick
  share = schedule.microbatches // len(schedule.routes)
  orders: list[list[Op]] = [[] for _ in range(schedule.ranks)]
  counts = {(direction, stage): 0 for direction in range(len(schedule.routes))
            for stage in range(schedule.stages)}
  tick = 0
  while len(done) < schedule.microbatches * schedule.stages:
    free = set(range(schedule.ranks))
    for direction, stage in sorted(counts, key=lambda key: -key[1]):
      rank, chunk = schedule.routes[direction][stage]
      count = counts[direction, stage]
      unit = Unit(direction * share + count, stage, chunk, direction)
      before = done.get((stage - 1, unit.microbatch), tick) if stage else -1
      if rank in free and count < share and before < tick:
        free.remove(rank)
        counts[direction, stage] += 1
        done[stage, unit.microbatch] = tick
        orders[rank].append(Op("F", forward=unit))
    tick += 1
  return dataclasses.replace(schedule, name=f"{schedule.name}, forward",
                             orders=tuple(map(tuple, orders)))


class _Orders:
  """Writes one rank's ops. A phase is a chunk of the rank in its role in the schedule.

  Units of a phase go forward, and backward, in the order of their micro-batches, so the phase alone
  names the unit. Weight gradients put off wait in one queue, first in, first out.
  """

  def __init__(self, *phases: tuple[int, int, int, int]):
    """phases: (first micro-batch, stage, chunk, direction) of each."""
    self.ops: list[Op] = []
    self._phases = phases
    self._forwards = [0] * len(phases)
    self._backwards = [0] * len(phases)
    self._put_off: deque[Unit] = deque()

  def _next(self, counts: list[int], phase: int) -> Unit:
    first, *place = self._phases[phase]
    counts[phase] += 1
    return Unit(first + counts[phase] - 1, *place)

  def forward(self, phase: int = 0) -> None:
    self.ops.append(Op("F", forward=self._next(self._forwards, phase)))

  def backward(self, phase: int = 0, put_off: bool = False) -> None:
    """B; or, with `put_off`, I, whose W is for `weights` to take."""
    unit = self._next(self._backwards, phase)
    self.ops.append(Op("I" if put_off else "B", backward=unit))
    if put_off:
      self._put_off.append(unit)

  def weights(self) -> None:
    self.ops.append(Op("W", backward=self._put_off.popleft()))

  def both(self, forward: int, backward: int) -> None:
    """The forward of one phase overlapped with the backward of the other."""
    self.ops.append(Op("FB", self._next(self._forwards, forward),
                       self._next(self._backwards, backward)))


def _straight(name: str, ranks: int, microbatches: int, write) -> Schedule:
  """One stage a rank, one direction; `write(orders, rank)` says the order."""
  route: Route = tuple((rank, 0) for rank in range(ranks))
  orders = [_Orders((0, rank, 0, 0)) for rank in range(ranks)]
  for rank in range(ranks):
    write(orders[rank], rank)
  return Schedule(name, ranks, microbatches, (route,), tuple(tuple(o.ops) for o in orders))


def _gpipe(ranks: int, microbatches: int) -> Schedule:
  def write(rank_ops: _Orders, rank: int) -> None:
    for _ in range(microbatches):
      rank_ops.forward()
    for _ in range(microbatches):
      rank_ops.backward()

  return _straight("gpipe", ranks, microbatches, write)


def _one_f_one_b(ranks: int, microbatches: int) -> Schedule:
  def write(rank_ops: _Orders, rank: int) -> None:
    ahead = min(ranks - 1 - rank, microbatches)  # forwards before the first backward can arrive
    for _ in range(ahead):
      rank_ops.forward()
    for _ in range(microbatches - ahead):
      rank_ops.forward()
      rank_ops.backward()
    for _ in range(ahead):
      rank_ops.backward()

  return _straight("1f1b", ranks, microbatches, write)


def _zb1p(ranks: int, microbatches: int) -> Schedule:
  """1F1B, with rank r's W's `r` micro-batches behind its I's.

  A later rank holds fewer forwards at a time and gets its backwards sooner, so it can put off more
  weight gradients in the same memory; each rank then has `ranks` units alive.
  """
  def write(rank_ops: _Orders, rank: int) -> None:
    ahead = min(ranks - 1 - rank, microbatches)
    for _ in range(ahead):
      rank_ops.forward()
    for i in range(microbatches):
      if i < microbatches - ahead:
        rank_ops.forward()
      rank_ops.backward(put_off=True)
      if i >= rank:
        rank_ops.weights()
    for _ in range(min(rank, microbatches)):
      rank_ops.weights()

  return _straight("zb1p", ranks, microbatches, write)


def _dual(rank_ops: _Orders, near: int, half: int, count: int) -> None:
  """The eight steps of DualPipe on one rank.

  Args:
    rank_ops: with phase 0 for the chunk whose micro-batches reach this rank first.
    near: ranks between this one and the end that phase 0 enters at.
    half: ranks between the end and the middle, where the two phases meet.
    count: micro-batches of each phase.
  """
  # 1. Fill the pipeline from the near end.
  for _ in range(2 * (half - near - 1)):
    rank_ops.forward(0)
  # 2. The other direction arrives.
  for _ in range(near + 1):
    rank_ops.forward(0)
    rank_ops.forward(1)
  # 3. Its backward is back already. The neighbour waits for I alone; W fills the wait for F.
  for _ in range(half - near - 1):
    rank_ops.backward(1, put_off=True)
    rank_ops.weights()
    rank_ops.forward(1)
  # 4. Both directions are full: every op overlaps two of them.
  for i in range(count - 2 * half + near + 1):
    if i == 0 and near == half - 1:  # the middle: overlapped, its B would end later and all wait
      rank_ops.forward(0)
      rank_ops.backward(1)
    else:
      rank_ops.both(0, 1)
    rank_ops.both(1, 0)
  # 5. The near end has no forwards left.
  for _ in range(half - near - 1):
    rank_ops.backward(1)
    rank_ops.both(1, 0)
  # 6. Drain; from the middle of this step on W is put off, since the neighbours wait for I.
  for i in range(near + 1):
    rank_ops.backward(1, put_off=2 * i > near)
    rank_ops.backward(0, put_off=2 * i >= near)
  # 7. and 8. The W's fill the waits, and the end.
  for _ in range(half - near - 1):
    rank_ops.weights()
    rank_ops.backward(0, put_off=True)
  for _ in range(near + 1):
    rank_ops.weights()


def _dualpipe(ranks: int, microbatches: int) -> Schedule:
  """Chunk 0 is the stage of the model's first half, so that a rank and its mirror image hold the
  same stages in the same chunks and do the same ops, only at other times."""
  half, orders = ranks // 2, []
  down: Route = tuple((stage, stage // half) for stage in range(ranks))
  up: Route = tuple((ranks - 1 - stage, stage // half) for stage in range(ranks))
  for rank in range(ranks):
    phases = [(0, rank, rank // half, 0),
              (microbatches // 2, ranks - 1 - rank, (ranks - 1 - rank) // half, 1)]
    rank_ops = _Orders(*(phases if rank < half else phases[::-1]))
    _dual(rank_ops, min(rank, ranks - 1 - rank), half, microbatches // 2)
    orders.append(tuple(rank_ops.ops))
  return Schedule("dualpipe", ranks, microbatches, (down, up), tuple(orders))


def _dualpipe_v(ranks: int, microbatches: int) -> Schedule:
  """DualPipe's first half of ranks, the micro-batches coming back from the middle one."""
  down: Route = tuple((rank, 0) for rank in range(ranks))
  route = down + tuple((rank, 1) for rank in reversed(range(ranks)))
  orders = []
  for rank in range(ranks):
    rank_ops = _Orders((0, rank, 0, 0), (0, 2 * ranks - 1 - rank, 1, 0))
    _dual(rank_ops, rank, ranks, microbatches)
    orders.append(tuple(rank_ops.ops))
  return Schedule("dualpipe_v", ranks, microbatches, (route,), tuple(orders))


_MAKERS = {"gpipe": _gpipe, "1f1b": _one_f_one_b, "zb1p": _zb1p, "dualpipe": _dualpipe,
           "dualpipe_v": _dualpipe_v}
NAMES = tuple(_MAKERS)
