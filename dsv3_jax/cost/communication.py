"""Bytes between devices and how long they take (report 3.2.2, ZeRO-1).

Links: *fast* ones within a domain (NVLink, ICI), *slow* ones between domains (InfiniBand, DCN). All
figures are what one device sends; it receives as much at the same time.

Dispatch in two hops sends a token once to each node that holds some of its experts, to the device
with the same place there, which hands it on to the devices that own them. With group-limited
routing a token's A experts lie on at most M nodes. How many that are on average under uniform
routing is `parallel.odds`; dense transport sends its buffers whole, which is more. Both hops run at
once, so the slower one counts.
"""

import dataclasses

from dsv3_jax import config
from dsv3_jax.cost.hardware import Hardware
from dsv3_jax.cost.operations import Numerics
from dsv3_jax.parallel import odds, room


@dataclasses.dataclass(frozen=True)
class Rows:
  """Rows that one token becomes on its way to its experts, on average.

  Attributes:
    slow: that leave the fast domain.
    fast: within fast domains, the token's own and others.
    arrive: at devices, all together, the token's own included.
  """

  slow: float
  fast: float
  arrive: float


def near(mesh: config.Mesh, hw: Hardware) -> config.Mesh:
  """The part of the mesh that lies in one fast domain, as devices along each axis.

  Neighbours lie on the last axis (`parallel/mesh.py`): a domain holds a whole `gpu` axis before a
  second place on `node` is in it. Of an axis that does not fit, the largest part that divides it.
  """
  left, found = hw.fast_devices, {}
  for axis in ("gpu", "node", "data", "pipe"):
    size = getattr(mesh, axis)
    part = size if size <= left else next(d for d in range(max(left, 1), 0, -1) if size % d == 0)
    found[axis], left = part, left // size if part == size else 0
  return config.Mesh(**found)


def rows(moe: config.MoE, mesh: config.Mesh, form: str = "two_hop",
         together: config.Mesh | None = None) -> Rows:
  """Rows of a dispatch or a combine under uniform routing, nothing sent in vain.

  Args:
    moe: experts, active ones, groups.
    mesh: node and gpu cut the experts.
    form: as runtime.dispatch.form.
    together: as `near` gives it; None: nodes are the fast domains.
  """
  N, G = mesh.node, mesh.gpu
  n, g = (together.node, together.gpu) if together else (1, G)
  args = moe.experts, moe.active, moe.groups, moe.active_groups
  arrive = odds.expected_units(*args, N * G)
  if form == "gather":
    return Rows(float(N * G - n * g), float(n * g - 1), float(N * G))
  if form == "flat" or N == 1:
    return Rows(arrive * (1 - n * g / (N * G)), arrive * (n * g - 1) / (N * G), arrive)
  visited = odds.expected_units(*args, N)
  return Rows(visited * (1 - n / N) + arrive * (1 - g / G),
              visited * (n - 1) / N + arrive * (g - 1) / G, arrive)


def room_of(moe: config.MoE, runtime: config.Runtime, tokens: int) -> room.Room:
  """Dispatch's buffers on a device of a mesh that cuts the experts, as `parallel` sizes them."""
  mesh, dispatch = runtime.mesh, runtime.dispatch
  sizes = tuple(n for n in (mesh.node, mesh.gpu) if n > 1)
  form = "flat" if dispatch.form == "two_hop" and len(sizes) == 1 else dispatch.form
  limit = moe.active_groups if moe.groups % mesh.node == 0 else 0
  local = moe.experts // (mesh.node * mesh.gpu)
  return room.room(tokens, moe.active, local, sizes, form, dispatch.factor, limit)


def sent(moe: config.MoE, runtime: config.Runtime, tokens: float, hw: Hardware
         ) -> tuple[float, float]:
  """Rows a token that a device sends over slow and over fast links, in a dispatch or a combine.

  Ragged transport sends what is needed. Dense transport sends whole buffers, filled or not: at each
  hop as many slots as there are for each receiver, which with factor 0 is the worst case. Further
  rounds, where a buffer overflows, are not counted.
  """
  mesh, together = runtime.mesh, near(runtime.mesh, hw)
  if runtime.dispatch.transport == "ragged" or runtime.dispatch.form == "gather":
    found = rows(moe, mesh, runtime.dispatch.form, together)
    return found.slow, found.fast
  slots = [s / tokens for s in room_of(moe, runtime, round(tokens)).slots]
  n, g = together.node, together.gpu
  if len(slots) == 1:
    return (mesh.node * mesh.gpu - n * g) * slots[0], (n * g - 1) * slots[0]
  return ((mesh.node - n) * slots[0] + (mesh.gpu - g) * slots[1],
          (n - 1) * slots[0] + (g - 1) * slots[1])


@dataclasses.dataclass(frozen=True)
class Exchange:
  """One all-to-all of a micro-batch in one layer, as one device sees it.

  Attributes:
    slow, fast: bytes sent over these links.
    seconds: time if nothing else runs.
  """

  slow: float
  fast: float
  seconds: float


def exchanges(cfg: config.Model, runtime: config.Runtime, tokens: float, n: Numerics, hw: Hardware
              ) -> dict[str, Exchange]:
  """"dispatch" and "combine" forward, "combine_back" and "dispatch_back" backward.

  The backward of a combine sends gradients out, as a dispatch does; that of a dispatch brings sums
  back, as a combine does.

  Args:
    tokens: of a micro-batch on this device.
  """
  if not cfg.moe_layers + cfg.mtp_depth or runtime.mesh.node * runtime.mesh.gpu == 1:
    return {name: Exchange(0.0, 0.0, 0.0) for name in (
        "dispatch", "combine", "combine_back", "dispatch_back")}
  crossing = sent(cfg.moe, runtime, tokens, hw)

  def exchange(width: float) -> Exchange:
    slow, fast = (tokens * cfg.dim * width * r for r in crossing)
    return Exchange(slow, fast, max(over(slow, hw, "slow"), over(hw.hops * fast, hw, "fast")))

  out, back, gradient = (exchange(w) for w in (n.dispatch, n.combine, n.gradient))
  return {"dispatch": out, "combine": back, "combine_back": gradient, "dispatch_back": back}


def over(count: float, hw: Hardware, link: str) -> float:
  """Seconds that `count` bytes take over a device's "fast" or "slow" link.

  Raises:
    ConfigError: the device has no such link.
  """
  if count == 0:
    return 0.0
  rate = getattr(hw, link)
  if not rate:
    raise config.ConfigError(
        f"{hw.name} has no {link} link (hardware.{link}=0), but runtime.mesh lays devices across "
        "one; choose another --hardware, or set every runtime.mesh axis to 1")
  return count / (rate * getattr(hw.shares, link))


def hop(cfg: config.Model, tokens: float, n: Numerics, mesh: config.Mesh, hw: Hardware) -> float:
  """Seconds of one micro-batch's activations to the next pipeline rank."""
  if mesh.pipe == 1:
    return 0.0
  link = "fast" if near(mesh, hw).pipe == mesh.pipe else "slow"
  return over(tokens * cfg.dim * n.activation, hw, link)


@dataclasses.dataclass(frozen=True)
class Group:
  """Devices that reduce together.

  Attributes:
    size: how many.
    together: of these in one fast domain.
  """

  size: int
  together: int


def ring(total: float, group: Group, hw: Hardware) -> float:
  """Seconds of a reduce-scatter or an all-gather of `total` bytes in rings.

  A device sends (n - 1) / n of them. Where several of a domain take part, each of as many rings
  leaves it over another device's slow link, so that a slow link carries one part in `together`.
  """
  if group.size == 1 or total == 0:
    return 0.0
  passed = total * (group.size - 1) / group.size
  within = over(passed, hw, "fast") if group.together > 1 else 0.0
  across = over(passed / group.together, hw, "slow") if group.size > group.together else 0.0
  return max(within, across)
