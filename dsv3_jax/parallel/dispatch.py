"""Dispatch and combine over the expert axes (report 3.2.2): tokens travel to experts and back.

Experts are cut over two mesh axes: `node`, joined by slow links, and `gpu`, within a node, by fast
ones. Device w = node * gpus + gpu holds experts [w * e, w * e + e). A token of 8 experts that went
to each of them by itself would cross the slow links up to 8 times. The router lets it choose among
4 nodes at most, and two hops make use of that:

    hop 1, `node`   the token crosses once to each of its nodes, to the device that has the same
                    number there as the token's own device has here
    hop 2, `gpu`    that device passes it on, once to each device of its node that it needs
    rows            there it is copied to its local experts' rows, in whole blocks for the matmuls

The flat form is a single hop over both axes: once to each device. It crosses as often as the token
has devices on other nodes, where two hops cross as often as it has other nodes. The third form
gathers all tokens everywhere, which is best where nearly all devices need nearly all tokens.

Every hop is a linear map with a plan made once from integers (`hops.py`). Its transpose takes the
same path back and adds up where the paths join: in the node, before anything crosses again. So

    dispatch = send          its backward pass = add up on the way back
    combine  = add up        its backward pass = send

and both directions are gathers and all-to-alls, without a scatter-add or a second plan. Expert
numbers and routing weights go ahead of the rows, both in one int32 message, so that a device plans
its matmuls while the rows are under way. The weight multiplies before the down-projection (`moe`).

Formats: `payload.Wire` says how rows are written; the report sends activations forward and
gradients backward in FP8 with power-of-two scales, and what is added up in BF16. Sums are taken in
fp32.

Buffers: XLA wants their size beforehand, and in the worst case one device is every token's choice.
`factor` 0 has room for that. Any other gives `factor` times the mean share. Then what finds no
room waits: the layer runs again for those that waited, as many turns as the fullest device anywhere
needs, and adds up (`rounds.py`). Nothing is lost, an overflow costs time. overflow="drop" stops
after the first turn and counts what it lost.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from dsv3_jax.parallel import hops, payload, rows, sharding
from dsv3_jax.parallel.buffers import Settings, room


@functools.partial(jax.tree_util.register_dataclass,
                   data_fields=["hops", "rows", "local_ZA", "gate_ZA"],
                   meta_fields=["experts", "wire", "first"])
@dataclasses.dataclass(frozen=True)
class Route:
  """Where the tokens of one turn go; all that dispatch, combine and their derivatives need.

  Attributes:
    hops: in the order of dispatch.
    rows: of the local experts, as `model.moe.Plan`.
    local_ZA: int32, local numbers of the experts of each arrived row; `experts`: elsewhere.
    gate_ZA: fp32, routing weights that arrived with them.
    experts: e, of this device.
    wire: formats.
    first: whether this is the first turn.
  """

  hops: tuple[hops.Hop | hops.Gather, ...]
  rows: rows.Rows
  local_ZA: jax.Array
  gate_ZA: jax.Array
  experts: int
  wire: payload.Wire
  first: bool

  def send(self, tree: Any) -> Any:
    """Moves a tree of rows [P, ...] to [Z, ...]. Not differentiable; see `dispatch`."""
    packed, unpack = payload.pack(tree)
    for hop in self.hops:
      packed = [hop.send(x) for x in packed]
    return unpack(packed)

  def back(self, y_Z: jax.Array, combine: str | None = None) -> jax.Array:
    """Transpose of `send` for one array: [Z, ...] to sums [P, ...] in its dtype.

    `combine` takes the place of the wire's.
    """
    dtype = y_Z.dtype
    for hop in reversed(self.hops):
      y_Z = hop.back(y_Z.astype((self.wire.combine if combine is None else combine) or dtype))
    return y_Z.astype(dtype)


def crossing_rows(route: Route, settings: Settings) -> jax.Array:
  """Rows that this device sends to other nodes in the route's turn, int32 (`crossings.Crossings`).

  The first of `settings.axes` is between nodes. Where all rows are gathered, each goes to every
  device of every other node.
  """
  nodes = lax.axis_size(settings.axes[0])
  if isinstance(route.hops[0], hops.Gather):
    W = hops.size(settings.axes)
    return jnp.asarray(route.gate_ZA.shape[0] // W * (W - W // nodes), jnp.int32)
  sent = route.hops[0].sent_W.reshape(nodes, -1).sum(1)
  return jnp.where(jnp.arange(nodes) == lax.axis_index(settings.axes[0]), 0, sent).sum()


def route(expert_PA: jax.Array, gate_PA: jax.Array, experts: int, block: int, settings: Settings,
          turn: jax.Array | None = None) -> tuple[Route, jax.Array, jax.Array]:
  """Plans a turn and sends expert numbers and routing weights ahead.

  Args:
    expert_PA: int32, distinct in each row, this device's tokens.
    gate_PA: fp32.
    experts: E of all devices.
    block: rows of a block.
    settings: how.
    turn: int32, one number for each hop and one for the rows; None: the first of each.

  Returns:
    The route; the turns needed by the fullest device anywhere, int32 like `turn` (those of later
    steps are as seen in this turn); and how many of the (token, expert) pairs that this device
    held at some step did not go on in this turn, int32.

  Raises:
    ValueError: E is no multiple of the devices.
    NotImplementedError: the platform lacks the transport.
  """
  P, A = expert_PA.shape
  sizes = tuple(lax.axis_size(axis) for axis in settings.axes)
  W = hops.size(settings.axes)
  if experts % W:
    raise ValueError(f"{experts} experts cannot be cut over {W} devices {settings.axes}; choose "
                     "axes whose product divides them")
  e = experts // W
  space = room(P, A, e, sizes, settings)
  turns = [0] * (len(space.slots) + 1) if turn is None else list(turn)
  expert_PA, gate_PA = sharding.varying((expert_PA, lax.stop_gradient(gate_PA)), settings.axes)
  # A row of int32: numbers of experts, the bits of their weights. Empty slots arrive as zeros, so
  # numbers go up by one and 0 is none.
  message = jnp.concatenate([expert_PA + 1, lax.bitcast_convert_type(gate_PA, jnp.int32)], axis=1)
  steps, needed, waiting = [], [], []

  def through(hop):
    nonlocal message
    steps.append(hop)
    message = hop.send(message)
    return message[:, :A] - 1

  def plan(to_PA, axes, step):
    to_PA = jnp.where(to_PA < 0, hops.size(axes), to_PA)
    hop, most, left = hops.plan(to_PA, axes, space.slots[step], turns[step], settings.transport)
    needed.append(most)
    waiting.append(left)
    return through(hop)

  if settings.form == "gather":
    expert_ZA = through(hops.Gather(settings.axes))
    needed.append(jnp.ones((), jnp.int32))
  elif settings.form == "flat":
    expert_ZA = plan(expert_PA // e, settings.axes, 0)
  else:
    node, gpu = settings.axes
    gpus = sizes[1]
    expert_ZA = plan(expert_PA // (e * gpus), (node,), 0)
    here_ZA = (expert_ZA >= 0) & (expert_ZA // (e * gpus) == lax.axis_index(node))
    expert_ZA = plan(jnp.where(here_ZA, expert_ZA // e % gpus, -1), (gpu,), 1)
  local_ZA = expert_ZA - lax.axis_index(settings.axes) * e
  local_ZA = jnp.where((expert_ZA >= 0) & (local_ZA >= 0) & (local_ZA < e), local_ZA, e)
  planned, most, left = rows.plan(local_ZA, e, block, space.pairs, turns[-1])
  gate_ZA = lax.bitcast_convert_type(message[:, A:], jnp.float32)
  needed = lax.pmax(jnp.stack([*needed, most]), settings.axes)
  made = Route(tuple(steps), planned, local_ZA, gate_ZA, e, settings.wire, turn is None)
  # Named as what arrives, so that a remat policy keeps both and the backward pass asks nobody.
  made, needed = jax.tree.map(lambda x: checkpoint_name(x, "dispatched"),
                              (made, jnp.maximum(needed, 1)))
  return made, needed, sum([*waiting, left])


# --- with derivatives ---------------------------------------------------------------------------


def _sent(x_PD: jax.Array, route: Route, codec: payload.Codec | None) -> jax.Array:
  if codec is None:
    return route.send(x_PD)
  return codec.decode(route.send(codec.encode(x_PD))).astype(x_PD.dtype)


@jax.custom_vjp
def _dispatch(x_PD, route):
  return _sent(x_PD, route, route.wire.activations)


@jax.custom_vjp
def _combine(y_ZD, route):
  return route.back(y_ZD)


_dispatch.defvjp(lambda x_PD, r: (_dispatch(x_PD, r), r), lambda r, dx_ZD: (r.back(dx_ZD), None))
_combine.defvjp(lambda y_ZD, r: (_combine(y_ZD, r), r),
                lambda r, dy_PD: (_sent(dy_PD, r, r.wire.gradients), None))


def _axes(route: Route) -> tuple[str, ...]:
  return tuple(axis for hop in route.hops for axis in hop.axes)


def dispatch(x_PD: jax.Array, route: Route) -> jax.Array:
  """Rows at their experts' devices, [Z, D] in the dtype of `x_PD`; backward: `combine`'s sums."""
  with jax.named_scope("dispatch"):
    return _dispatch(sharding.varying(x_PD, _axes(route)), route)


def combine(y_ZD: jax.Array, route: Route) -> jax.Array:
  """Sums of each token's rows, [P, D] in the dtype of `y_ZD`; backward: `dispatch`'s sends."""
  with jax.named_scope("combine"):
    return _combine(sharding.varying(y_ZD, _axes(route)), route)


@jax.custom_vjp
def _arrived(gate_PA, route):
  return route.gate_ZA


_arrived.defvjp(lambda gate_PA, r: (r.gate_ZA, r),
                lambda r, dgate_ZA: (r.back(dgate_ZA, "float32"), None))


def gates(gate_PA: jax.Array, route: Route) -> jax.Array:
  """Routing weights of the pairs of `route.rows`, fp32 [Z, K], 0 for experts elsewhere.

  They arrived with the plan; the backward pass takes their gradients back to [P, A].
  """
  gate_ZA = _arrived(sharding.varying(gate_PA, _axes(route)), route)
  return rows.gates(gate_ZA, route.local_ZA, route.experts)
