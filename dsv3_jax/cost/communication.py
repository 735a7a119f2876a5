"""Bytes between devices and how long they take (report 3.2.2, ZeRO-1).

Links: *fast* ones within a domain (NVLink, ICI), *slow* ones between domains (InfiniBand, DCN). All
figures are what one device sends; it receives as much at the same time.

Dispatch in two hops sends a token once to each node that holds some of its experts, to the device
with the same place there, which hands it on to the devices that own them. With group-limited
routing a token's A experts lie on at most M nodes. How many that are on average under uniform
routing is `parallel.odds`. Both hops run at once, so the slower one counts.
"""

import dataclasses

from dsv3_jax import config
from dsv3_jax.cost.hardware import Hardware
from dsv3_jax.cost.operations import Numerics
from dsv3_jax.parallel import odds


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


def rows(moe: config.MoE, mesh: config.Mesh, form: str = "two_hop", domains: int | None = None
         ) -> Rows:
  """Rows of a dispatch or a combine under uniform routing, nothing sent in vain.

  Args:
    moe: experts, active ones, groups.
    mesh: node and gpu cut the experts.
    form: as runtime.dispatch.form.
    domains: fast domains that the experts lie on; None: mesh.node.
  """
  nodes = mesh.node if domains is None else domains
  devices = mesh.node * mesh.gpu
  gpus = devices // nodes
  args = moe.experts, moe.active, moe.groups, moe.active_groups
  arrive = odds.expected_units(*args, devices)
  if form == "gather":
    return Rows(float(devices - gpus), float(gpus - 1), float(devices))
  if form == "flat" or nodes == 1:
    return Rows(arrive * (1 - 1 / nodes), arrive * (gpus - 1) / devices, arrive)
  return Rows(odds.expected_units(*args, nodes) * (1 - 1 / nodes), arrive * (1 - 1 / gpus), arrive)


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


def domains(mesh: config.Mesh, hw: Hardware) -> int:
  """Fast domains that one layer's experts lie on."""
  return 1 if mesh.node * mesh.gpu <= hw.fast_devices else mesh.node


def padding(dispatch: config.Dispatch) -> float:
  """Bytes sent over bytes needed: dense transport sends whole buffers.

  The worst case's room (factor 0) is not known in advance to be a multiple of the mean; it counts
  as 1 here.
  """
  return max(dispatch.factor, 1.0) if dispatch.transport == "dense" else 1.0


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
  sent = rows(cfg.moe, runtime.mesh, runtime.dispatch.form, domains(runtime.mesh, hw))
  pad = padding(runtime.dispatch)

  def exchange(width: float) -> Exchange:
    slow, fast = (pad * tokens * cfg.dim * width * r for r in (sent.slow, sent.fast))
    return Exchange(slow, fast, max(over(slow, hw, "slow"), over(hw.hops * fast, hw, "fast")))

  out, back, gradient = (exchange(w) for w in (n.dispatch, n.combine, n.gradient))
  return {"dispatch": out, "combine": back, "combine_back": gradient, "dispatch_back": back}


def over(sent: float, hw: Hardware, link: str) -> float:
  """Seconds that `sent` bytes take over a device's "fast" or "slow" link.

  Raises:
    ConfigError: the device has no such link.
  """
  if sent == 0:
    return 0.0
  rate = getattr(hw, link)
  if not rate:
    raise config.ConfigError(
        f"{hw.name} has no {link} link (hardware.{link}=0), but runtime.mesh lays devices across "
        "one; choose another --hardware, or set every runtime.mesh axis to 1")
  return sent / (rate * getattr(hw.shares, link))


def hop(cfg: config.Model, tokens: float, n: Numerics, mesh: config.Mesh, hw: Hardware) -> float:
  """Seconds of one micro-batch's activations to the next pipeline rank."""
  if mesh.pipe == 1:
    return 0.0
  link = "fast" if mesh.devices <= hw.fast_devices else "slow"
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
  sent = total * (group.size - 1) / group.size
  within = over(sent, hw, "fast") if group.together > 1 else 0.0
  across = over(sent / group.together, hw, "slow") if group.size > group.together else 0.0
  return max(within, across)
