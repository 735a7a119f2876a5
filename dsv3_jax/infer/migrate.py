"""Moving experts between devices while a model serves.

A change of a layer's placement is carried out in rounds, each one short compiled function that may
run between two steps of decoding, while requests use the weights as they were:

    first   every device copies, from its own slots, what it has already
    then    a round for each distance d that an expert has to go, repeated where a device sends
            several that far: device w sends one expert to device w + d

and when the last round was called, new weights and tables take the old ones' place together. So two
copies of a single layer's experts exist meanwhile. A round moves one expert's bytes over each link,
whatever the number of devices, and distances are data: nothing is compiled while serving. (A
distance is a sum of powers of two, and each power is a permutation of its own; those that it lacks
are skipped.)
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec

from dsv3_jax.parallel import mesh as mesh_lib


class Round(NamedTuple):
  """One exchange; slots are numbers within a device.

  Attributes:
    distance: d, from 1 to W - 1.
    from_W: int32, the slot that each device sends.
    to_W: int32, the slot that it puts what arrives in; the number of slots: nowhere.
  """

  distance: int
  from_W: np.ndarray
  to_W: np.ndarray


def plan(old_I: np.ndarray, new_I: np.ndarray, devices: int) -> tuple[np.ndarray, list[Round]]:
  """How one layer gets from a placement to another.

  Each missing expert comes from the device that is least busy with sending among those that have
  it, of these the nearest before it.

  Args:
    old_I, new_I: the expert of each slot.
    devices: W, divides I.

  Returns:
    int32 [W, i], for each slot one of the same device to copy from at first, itself where nothing
    there will do; and the rounds.
  """
  old_Wi, new_Wi = old_I.reshape(devices, -1), new_I.reshape(devices, -1)
  slots = old_Wi.shape[1]
  own_Wi = np.tile(np.arange(slots, dtype=np.int32), (devices, 1))
  holders: dict[int, list[tuple[int, int]]] = {}
  for w, i in np.ndindex(old_Wi.shape):
    holders.setdefault(int(old_Wi[w, i]), []).append((w, i))
  sends = np.zeros((devices, devices), int)  # of each device over each distance
  needed: dict[int, list[list[tuple[int, int, int]]]] = {}  # distance: rounds of (sender, from, to)
  for w, i in np.argwhere(old_Wi != new_Wi):
    here = np.flatnonzero(old_Wi[w] == new_Wi[w, i])
    if here.size:
      own_Wi[w, i] = here[0]
      continue
    _, _, d, source, at = min(
        (sends[s, (w - s) % devices], sends[s].sum(), (w - s) % devices, s, at)
        for s, at in holders[int(new_Wi[w, i])])
    rounds = needed.setdefault(d, [])
    if sends[source, d] == len(rounds):
      rounds.append([])
    rounds[sends[source, d]].append((source, at, int(i)))
    sends[source, d] += 1
  made = []
  for d in sorted(needed):
    for moves in needed[d]:
      from_W = np.zeros(devices, np.int32)
      to_W = np.full(devices, slots, np.int32)
      for source, at, to in moves:
        from_W[source], to_W[(source + d) % devices] = at, to
      made.append(Round(d, from_W, to_W))
  return own_Wi, made


@functools.partial(jax.jit, static_argnames=("mesh",))
def begin(old: Any, own_Wi: jax.Array, *, mesh: jax.sharding.Mesh) -> Any:
  """A layer's experts as far as their own devices have them.

  Args:
    old: arrays [I, ...], cut over `node` and `gpu`.
    own_Wi: of `plan`, cut likewise (`put`).
    mesh: the devices.
  """
  def local(old, own_1i):
    return jax.tree.map(lambda w: jnp.take(w, own_1i[0], axis=0, mode="clip"), old)

  cut = PartitionSpec(mesh_lib.EXPERTS)
  return jax.shard_map(local, mesh=mesh, in_specs=(cut, cut), out_specs=cut)(old, own_Wi)


@functools.partial(jax.jit, static_argnames=("mesh",), donate_argnames=("new",))
def exchange(new: Any, old: Any, from_W: jax.Array, to_W: jax.Array, distance: jax.Array, *,
             mesh: jax.sharding.Mesh) -> Any:
  """One round: `new` (donated) with what arrives from the devices `distance` before."""
  axes, W = mesh_lib.EXPERTS, mesh.shape[mesh_lib.NODE] * mesh.shape[mesh_lib.GPU]

  def local(new, old, from_1, to_1, distance):
    moving = jax.tree.map(lambda w: lax.dynamic_index_in_dim(w, from_1[0], keepdims=False), old)
    for bit in range((W - 1).bit_length()):
      there = [(w, (w + 2**bit) % W) for w in range(W)]
      # All devices are told the same distance, so all take the same branch.
      moving = lax.cond(distance >> bit & 1, functools.partial(_sent, there, axes), lambda x: x,
                        moving)
    return jax.tree.map(lambda w, x: w.at[to_1[0]].set(x, mode="drop"), new, moving)

  cut, same = PartitionSpec(axes), PartitionSpec()
  return jax.shard_map(local, mesh=mesh, in_specs=(cut, cut, cut, cut, same), out_specs=cut)(
      new, old, from_W, to_W, distance)


def _sent(there, axes, tree):
  return jax.tree.map(lambda x: lax.ppermute(x, axes, there), tree)


def put(x: np.ndarray, mesh: jax.sharding.Mesh, cut: bool = False) -> jax.Array:
  """A small array on all devices, the whole of it, or cut like experts."""
  where = mesh_lib.cut(mesh, mesh_lib.EXPERTS if cut else ())
  return jax.make_array_from_callback(x.shape, where, x.__getitem__)
