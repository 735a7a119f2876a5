"""Experts cut over devices when a model serves, some of them on several (report 3.4).

Each device has equally many *slots*, which hold an expert each; slot p lies on device
p // (slots / devices). There may be more slots than experts: redundant experts, whose tokens are
shared out among their replicas. `eplb` and `placement` say which expert goes to which slot. Here
is what follows of that for the forward pass: weights in the order of slots, and for a token's
experts the slots that serve it.

Replicas take turns: the one that a token goes to follows from its row and its device. So each gets
an equal share of a batch, as placements assume, and the choice needs no communication. Nothing but
the order of sums depends on where experts lie.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from dsv3_jax.config import ConfigError
from dsv3_jax.infer.parameters import Experts, Parameters
from dsv3_jax.parallel import mesh as mesh_lib


class Slots(NamedTuple):
  """Where the experts of one layer are; the sizes do not depend on the placement.

  Attributes:
    slot_I: int32, the slots of expert 0, then those of expert 1, ...
    first_E: int32, where each expert's begin.
    count_E: int32, how many it has, at least 1.
  """

  slot_I: jax.Array
  first_E: jax.Array
  count_E: jax.Array


def tables(expert_I: np.ndarray, experts: int) -> Slots:
  """The tables (numpy) of one layer's placement.

  Args:
    expert_I: the expert of each slot.
    experts: E.

  Raises:
    ValueError: an expert has no slot, or a slot none of them.
  """
  if expert_I.min() < 0 or expert_I.max() >= experts:
    raise ValueError(f"a slot holds expert {expert_I.min()} or {expert_I.max()}; there are "
                     f"{experts}")
  count_E = np.bincount(expert_I, minlength=experts)
  if not count_E.all():
    raise ValueError(f"expert {count_E.argmin()} has no slot")
  return Slots(np.argsort(expert_I, kind="stable").astype(np.int32),
               (np.cumsum(count_E) - count_E).astype(np.int32), count_E.astype(np.int32))


def choose(expert_PA: jax.Array, slots: Slots, valid_P: jax.Array, turn: jax.Array | int
           ) -> jax.Array:
  """The slot that serves each choice of a token, int32 [P, A].

  Args:
    expert_PA: int32.
    slots: of the layer.
    valid_P: bool; other tokens go nowhere: I, which is no slot.
    turn: int32, shifts which replica a row gets; such as the device's number.
  """
  P = expert_PA.shape[0]
  replica_PA = (jnp.arange(P, dtype=jnp.int32)[:, None] + turn) % slots.count_E[expert_PA]
  slot_PA = slots.slot_I[slots.first_E[expert_PA] + replica_PA]
  return jnp.where(valid_P[:, None], slot_PA, slots.slot_I.shape[0])


def per_device(slots: int, mesh: jax.sharding.Mesh) -> int:
  """Slots of each device.

  Raises:
    ConfigError: they do not divide.
  """
  devices = mesh.shape[mesh_lib.NODE] * mesh.shape[mesh_lib.GPU]
  if slots % devices:
    fits = -(-slots // devices) * devices
    raise ConfigError(f"{slots} slots cannot be cut over {devices} devices; make experts and "
                      f"redundant experts together a multiple, such as {fits}")
  return slots // devices


def specs(weights: Parameters) -> Any:
  """Partition specs of placed weights: experts over `node` and `gpu`, all else everywhere."""
  everywhere, cut = PartitionSpec(), PartitionSpec(mesh_lib.EXPERTS)

  def layer(x: Any) -> Any:
    whole = jax.tree.map(lambda _: everywhere, x)
    if not (isinstance(x.ffn, Experts) and x.ffn.slots is not None):
      return whole
    slotted = jax.tree.map(lambda _: cut, (x.ffn.w_in_EDF, x.ffn.w_out_EFD))
    return whole._replace(ffn=whole.ffn._replace(w_in_EDF=slotted[0], w_out_EFD=slotted[1]))

  whole = jax.tree.map(lambda _: everywhere, weights._replace(layers=()))
  return whole._replace(layers=tuple(map(layer, weights.layers)))


def in_slots(weights: Parameters, expert_LI: np.ndarray,
             order: Callable[[jax.Array, np.ndarray], Any] = lambda w, expert_I: w[expert_I]
             ) -> Parameters:
  """Weights with the main model's experts in slots, without MTP modules: the engine does not draft.

  Args:
    weights: of `parameters.prepare`.
    expert_LI: the expert of each slot of each MoE layer.
    order: gives an array of experts in the order of slots.

  Raises:
    ValueError: another number of MoE layers, or a placement that lacks an expert.
  """
  moe = [i for i, layer in enumerate(weights.layers) if isinstance(layer.ffn, Experts)]
  if len(moe) != len(expert_LI):
    raise ValueError(f"a placement of {len(expert_LI)} layers for {len(moe)} MoE layers")
  placed = list(weights.layers)
  for i, expert_I in zip(moe, expert_LI, strict=True):
    ffn = placed[i].ffn
    w_in, w_out = jax.tree.map(functools.partial(order, expert_I=expert_I),
                               (ffn.w_in_EDF, ffn.w_out_EFD))
    placed[i] = placed[i]._replace(ffn=ffn._replace(
        w_in_EDF=w_in, w_out_EFD=w_out, slots=tables(expert_I, ffn.w_router_DE.shape[1])))
  return weights._replace(layers=tuple(placed), mtp=())


def place(weights: Parameters, expert_LI: np.ndarray, mesh: jax.sharding.Mesh) -> Parameters:
  """`in_slots` on the devices of a mesh.

  Args:
    weights, expert_LI: see there.
    mesh: `node` and `gpu` cut the slots; everything else is on every device.

  Raises:
    ConfigError: the slots do not divide among the devices.
    ValueError: see `in_slots`.
  """
  per_device(expert_LI.shape[1], mesh)
  made = in_slots(weights, expert_LI, _Ordered)
  return jax.tree.map(lambda x, spec: _put(x, mesh_lib.cut(mesh, spec[0] if spec else ())), made,
                      specs(made))


class _Ordered:
  """Expert weights in the order of slots, without a copy of them all."""

  def __init__(self, w_E: jax.Array, expert_I: np.ndarray):
    self._w, self._expert_I = np.asarray(w_E), expert_I
    self.shape = (len(expert_I), *w_E.shape[1:])

  def __getitem__(self, index: Any) -> np.ndarray:
    return self._w[self._expert_I[index[0]]][(slice(None), *index[1:])]


def _put(x: Any, sharding: NamedSharding) -> jax.Array:
  part = x.__getitem__ if isinstance(x, _Ordered) else np.asarray(x).__getitem__
  return jax.make_array_from_callback(x.shape, sharding, part)
