"""How many rows cross between nodes: counted from routings (what probability predicts:
odds.py)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dsv3_jax.parallel.odds import expected, expected_units

__all__ = ["Crossings", "count", "expected", "expected_units"]


class Crossings(NamedTuple):
  """Rows that one device's tokens send to other nodes in one dispatch, int32.

  Combine and the backward passes send as many.
  """

  two_hop: jax.Array  # once to each other node
  flat: jax.Array  # once to each device there
  naive: jax.Array  # once to each expert there


def count(expert_PA: jax.Array, experts: int, nodes: int, gpus: int, node: jax.Array | int
          ) -> Crossings:
  """Crossings of tokens that lie on `node`.

  Args:
    expert_PA: int32, distinct in each row.
    experts: E, cut over nodes * gpus devices, node by node.
    nodes, gpus: sizes of the mesh axes.
    node: where the tokens are.
  """
  per_device = experts // (nodes * gpus)
  device_PA = expert_PA // per_device
  away_PA = device_PA // gpus != node

  def distinct(to_PA, count):
    reached = ((to_PA[:, :, None] == jnp.arange(count)) & away_PA[:, :, None]).any(1)
    return reached.sum(dtype=jnp.int32)

  return Crossings(distinct(device_PA // gpus, nodes), distinct(device_PA, nodes * gpus),
                   away_PA.sum(dtype=jnp.int32))
