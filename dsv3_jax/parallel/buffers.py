"""How tokens reach their experts: the choices, and the sizes of buffers that follow from them."""

import dataclasses

from dsv3_jax.parallel import hops, payload

FORMS = ("two_hop", "flat", "gather")
OVERFLOWS = ("rounds", "drop")


@dataclasses.dataclass(frozen=True)
class Settings:
  """How experts are cut and tokens reach them; static.

  Attributes:
    axes: mesh axes that cut the experts, slowest first: for two hops the one between nodes and the
      one within.
    form: two_hop, flat or gather.
    transport: dense (all-to-all of whole buffers) or ragged (of their filled parts, where the
      platform has it).
    factor: room in buffers over the mean share; 0: for the worst case.
    overflow: what finds no room goes in further rounds, or is dropped and counted.
    limit: most nodes a token's experts lie on, as the router promises; 0: no promise. Only sizes
      buffers.
    block: rows of a block of the experts' matmuls; 0: the layer chooses.
    wire: formats of what travels.
  """

  axes: tuple[str, ...] = ("node", "gpu")
  form: str = "two_hop"
  transport: str = "dense"
  factor: float = 0.0
  overflow: str = "rounds"
  limit: int = 0
  block: int = 0
  wire: payload.Wire = payload.Wire()

  def __post_init__(self):
    for name, known in (("form", FORMS), ("transport", hops.TRANSPORTS), ("overflow", OVERFLOWS)):
      if getattr(self, name) not in known:
        raise ValueError(f"{name}={getattr(self, name)!r} must be one of {', '.join(known)}")
    if self.form == "two_hop" and len(self.axes) != 2:
      raise ValueError(f"form='two_hop' needs two axes, between nodes and within one, not "
                       f"{self.axes}; use form='flat'")
    if self.form == "gather" and self.transport == "ragged":
      raise ValueError("form='gather' sends whole arrays; use transport='dense'")
    if min(self.factor, self.limit, self.block) < 0:
      raise ValueError(f"factor={self.factor}, limit={self.limit} and block={self.block} must not "
                       "be negative")


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


def room(tokens: int, active: int, local: int, sizes: tuple[int, ...], settings: Settings) -> Room:
  """Sizes of the buffers of a device.

  Args:
    tokens: P of one device.
    active: A.
    local: e, experts of one device.
    sizes: devices along `settings.axes`.
    settings: form, factor and limit are read.
  """
  P, A, W, factor = tokens, active, 1, settings.factor
  for n in sizes:
    W *= n

  def slots(rows: int, sent: int, devices: int) -> int:
    """Of a buffer for `rows` rows that send `sent` copies in the mean."""
    return min(rows, max(-(-int(factor * sent) // devices), 1)) if factor else rows

  if settings.form == "gather":
    each, arrived = (0,), W * P
  elif settings.form == "flat":
    each = (slots(P, P * min(A, W), W),)
    arrived = W * each[0]
  else:
    nodes, gpus = sizes
    visited = min(A, nodes, settings.limit or nodes)
    first = slots(P, P * visited, nodes)
    second = slots(nodes * first, P * min(A, visited * gpus), gpus)
    each, arrived = (first, second), gpus * second
  worst = arrived * min(A, local)
  pairs = min(worst, max(int(factor * P * A), 1)) if factor else worst
  full = dataclasses.replace(settings, factor=0.0)
  return Room(each, pairs, not factor or (each, pairs) == (
      (r := room(P, A, local, sizes, full)).slots, r.pairs))
