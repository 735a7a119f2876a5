"""One hop: rows go to other devices over mesh axes, and what became of them comes back, summed.

A hop is a linear map from P rows on each device to Z = W * C slots on each, W devices with C slots
from every sender: slot w * C + c of the buffer that a device fills goes to device w, where it
arrives in place (sender) * C + c. `back` is its transpose: it reads the same slots in the other
direction. Both are gathers; what stands where was decided once, in `plan`.

A row goes to each device at most once, whatever number of its experts lie there. Rows take slots
in their order; those beyond a buffer's C wait for the next round (`rounds.py`), which is the same
hop with another window on the same places, or are lost where the caller stops.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax

TRANSPORTS = ("dense", "ragged")


def size(axes: tuple[str, ...]) -> int:
  """Devices along mesh axes, inside `shard_map`."""
  total = 1
  for axis in axes:
    total *= lax.axis_size(axis)
  return total


def require_ragged() -> None:
  """Raises NotImplementedError where the platform lacks `ragged_all_to_all`."""
  if jax.default_backend() == "cpu":
    raise NotImplementedError(
        "transport='ragged' needs lax.ragged_all_to_all, which XLA does not have on a CPU; "
        "use transport='dense' there")


@functools.partial(jax.tree_util.register_dataclass,
                   data_fields=["source_Z", "slot_PK", "sent_W", "arriving_W"],
                   meta_fields=["axes", "transport"])
@dataclasses.dataclass(frozen=True)
class Hop:
  """Where rows go.

  Attributes:
    source_Z: int32, the row in each slot to be sent; P marks an empty one.
    slot_PK: int32, the slots of each row; Z marks none. K = min(A, W).
    sent_W: int32, rows sent to each device (its filled slots, which come first).
    arriving_W: int32, rows that come from each device; None for the dense transport.
    axes: mesh axes, slowest first.
    transport: dense or ragged.
  """

  source_Z: jax.Array
  slot_PK: jax.Array
  sent_W: jax.Array
  arriving_W: jax.Array | None
  axes: tuple[str, ...]
  transport: str

  def send(self, x_P: jax.Array) -> jax.Array:
    """[P, ...] to the [Z, ...] that arrived; empty slots are zero."""
    # An all-to-all takes one array for each receiver on a CPU: a gather for each saves a copy.
    pieces = self.sent_W.shape[0] if jax.default_backend() == "cpu" else 1
    with jax.named_scope("gather"):
      x_Z = jnp.concatenate([jnp.take(x_P, source_C, axis=0, mode="fill", fill_value=0)
                             for source_C in jnp.split(self.source_Z, pieces)])
    return self._exchange(x_Z, self.sent_W, self.arriving_W)

  def back(self, y_Z: jax.Array) -> jax.Array:
    """Transpose of `send`: each row's slots summed, fp32 [P, ...]."""
    y_Z = self._exchange(y_Z, self.arriving_W, self.sent_W)
    # Choice after choice: XLA makes one loop of it, where [P, K, ...] would be written and read.
    W, columns = self.sent_W.shape[0], list(self.slot_PK.T)
    with jax.named_scope("sums"):
      pieces = [y_Z] * len(columns)
      if len(columns) == W:  # one a device, each with slots of that device's piece alone
        pieces = jnp.split(y_Z, W)
        columns = [slot_P - w * pieces[w].shape[0] for w, slot_P in enumerate(columns)]
      return sum(jnp.take(y, slot_P, axis=0, mode="fill", fill_value=0).astype(jnp.float32)
                 for y, slot_P in zip(pieces, columns, strict=True))

  def _exchange(self, x_Z, sent_W, arriving_W):
    if self.transport == "dense":
      return lax.all_to_all(x_Z, self.axes, 0, 0, tiled=True)
    # The same places on both sides; only the filled part of each device's C slots moves.
    W = sent_W.shape[0]
    start_W = jnp.arange(W, dtype=jnp.int32) * (x_Z.shape[0] // W)
    mine_W = jnp.full((W,), x_Z.shape[0] // W, jnp.int32) * lax.axis_index(self.axes)
    return lax.ragged_all_to_all(x_Z, jnp.zeros_like(x_Z), start_W, sent_W, mine_W, arriving_W,
                                 axis_name=self.axes)


@functools.partial(jax.tree_util.register_dataclass, data_fields=[], meta_fields=["axes"])
@dataclasses.dataclass(frozen=True)
class Gather:
  """The hop that sends every row everywhere: no plan, few large messages, W times the rows."""

  axes: tuple[str, ...]

  def send(self, x_P: jax.Array) -> jax.Array:
    return lax.all_gather(x_P, self.axes, axis=0, tiled=True)

  def back(self, y_Z: jax.Array) -> jax.Array:
    # A reduce-scatter would add in the wire's dtype; this moves as much and adds in fp32.
    y_Z = lax.all_to_all(y_Z, self.axes, 0, 0, tiled=True)
    return y_Z.reshape(size(self.axes), -1, *y_Z.shape[1:]).astype(jnp.float32).sum(0)


@jax.named_scope("plan")
def plan(to_PA: jax.Array, axes: tuple[str, ...], capacity: int, turn: jax.Array | int = 0,
         transport: str = "dense") -> tuple[Hop, jax.Array, jax.Array]:
  """Gives every row slots at the devices it has to reach.

  Args:
    to_PA: int32, the device along `axes` of each of a row's experts; W or more: none. Devices may
      repeat in a row.
    axes: mesh axes, slowest first.
    capacity: C, slots for each pair of sender and receiver.
    turn: rows whose place at a device is in [turn * C, turn * C + C) go.
    transport: dense or ragged.

  Returns:
    The hop; the turns that this device's rows need, int32; and of the choices that are not none,
    how many do not go in this turn.
  """
  (P, A), W, C = to_PA.shape, size(axes), capacity
  wanted_PW = (to_PA[:, :, None] == jnp.arange(W, dtype=to_PA.dtype)).any(1)
  # Counting gives every row its place without a sort, which a CPU is slow at.
  place_PW = jnp.cumsum(wanted_PW, axis=0, dtype=jnp.int32) - 1
  turns = jnp.max(-(-(place_PW[-1] + 1) // C))
  place_PW = place_PW - turn * C
  going_PW = wanted_PW & (place_PW >= 0) & (place_PW < C)
  slot_PW = jnp.where(going_PW, place_PW + jnp.arange(W, dtype=jnp.int32) * C, W * C)
  of_PA = jnp.minimum(to_PA, W - 1)
  slot_PA = jnp.where(to_PA < W, jnp.take_along_axis(slot_PW, of_PA, axis=1), W * C)
  waiting = ((slot_PA == W * C) & (to_PA < W)).sum(dtype=jnp.int32)
  if A < W:
    earlier_AA = jnp.tril(jnp.ones((A, A), bool), -1)
    again_PA = ((to_PA[:, :, None] == to_PA[:, None, :]) & earlier_AA).any(-1)
    slot_PK = jnp.where(again_PA, W * C, slot_PA)
  else:
    slot_PK = slot_PW
  rows_PK = jnp.broadcast_to(jnp.arange(P, dtype=jnp.int32)[:, None], slot_PK.shape)
  source_Z = jnp.full((W * C,), P, jnp.int32).at[slot_PK.reshape(-1)].set(
      rows_PK.reshape(-1), mode="drop")
  sent_W = going_PW.sum(0, dtype=jnp.int32)
  arriving_W = None
  if transport == "ragged":
    require_ragged()
    arriving_W = lax.all_to_all(sent_W, axes, 0, 0, tiled=True)
  return Hop(source_Z, slot_PK, sent_W, arriving_W, axes, transport), turns, waiting
