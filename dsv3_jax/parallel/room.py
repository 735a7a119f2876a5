"""Sizes of the buffers that dispatch fills, from numbers alone; without jax."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Room:
  """Sizes of buffers.

  Attributes:
    slots: for each hop, slots for each pair of sender and receiver; 0 where all rows are gathered.
    pairs: (row, local expert) pairs of one device.
    complete: whether they hold the worst case.
  """

  slots: tuple[int, ...]
  pairs: int
  complete: bool


def room(tokens: int, active: int, local: int, sizes: tuple[int, ...], form: str,
         factor: float = 0.0, limit: int = 0) -> Room:
  """Sizes of the buffers of a device.

  Args:
    tokens: P of one device.
    active: A.
    local: e, experts of one device.
    sizes: devices along the mesh axes that cut the experts.
    form, factor, limit: of `buffers.Settings`.
  """
  P, A, W = tokens, active, 1
  for n in sizes:
    W *= n

  def slots(rows: int, sent: int, devices: int) -> int:
    """Of a buffer for `rows` rows that send `sent` copies in the mean."""
    return min(rows, max(-(-int(factor * sent) // devices), 1)) if factor else rows

  if form == "gather":
    each, arrived = (0,), W * P
  elif form == "flat":
    each = (slots(P, P * min(A, W), W),)
    arrived = W * each[0]
  else:
    nodes, gpus = sizes
    visited = min(A, nodes, limit or nodes)
    first = slots(P, P * visited, nodes)
    second = slots(nodes * first, P * min(A, visited * gpus), gpus)
    each, arrived = (first, second), gpus * second
  worst = arrived * min(A, local)
  pairs = min(worst, max(int(factor * P * A), 1)) if factor else worst
  complete = not factor or (each, pairs) == (
      (r := room(P, A, local, sizes, form, 0.0, limit)).slots, r.pairs)
  return Room(each, pairs, complete)
