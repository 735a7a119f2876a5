"""How tokens reach their experts: the choices, and the sizes of buffers that follow from them."""

import dataclasses

from dsv3_jax.parallel import hops, payload
from dsv3_jax.parallel.room import Room
from dsv3_jax.parallel.room import room as sizes_of

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


def room(tokens: int, active: int, local: int, sizes: tuple[int, ...], settings: Settings) -> Room:
  """Sizes of the buffers of a device.

  Args:
    tokens: P of one device.
    active: A.
    local: e, experts of one device.
    sizes: devices along `settings.axes`.
    settings: form, factor and limit are read.
  """
  return sizes_of(tokens, active, local, sizes, settings.form, settings.factor, settings.limit)
