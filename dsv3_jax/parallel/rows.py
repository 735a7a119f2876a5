"""Arrived rows in the order of the local experts, padded to whole blocks, without a sort.

Most slots of a buffer are empty and most of a row's experts live elsewhere, so sorting all (row,
choice) pairs would sort mostly nothing. A device has few experts: a running count for each gives
every pair its place.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Rows(NamedTuple):
  """Where every (row, local choice) pair stands among M rows; reads as `model.moe.Plan` does.

  Row M - 1 is padding under any load, and zero like all padding: pairs that are not here point to
  it. (M is reached only where every expert's last block is partly filled.)
  """

  pair_M: jax.Array  # int32, row * K + choice; Z * K marks padding
  row_PA: jax.Array  # int32 [Z, K]
  group_m: jax.Array  # int32 [blocks], local expert of each block
  used: jax.Array  # int32, blocks that hold rows


@jax.named_scope("rows")
def plan(local_ZA: jax.Array, experts: int, block: int, capacity: int,
         turn: jax.Array | int = 0) -> tuple[Rows, jax.Array, jax.Array]:
  """Rows of a device's experts; see `hops.plan` for `turn` and what is returned.

  Args:
    local_ZA: int32, local number of each choice, distinct in a row; `experts` or more: elsewhere.
    experts: e, of this device.
    block: rows of a block.
    capacity: pairs that go in one turn.
    turn: pairs number [turn * capacity, ...) go, in the order of rows, then experts.
  """
  (Z, A), e = local_ZA.shape, experts
  wanted_Ze = (local_ZA[:, :, None] == jnp.arange(e, dtype=local_ZA.dtype)).any(1)
  going_Ze, turns, waiting = wanted_Ze, jnp.ones((), jnp.int32), jnp.zeros((), jnp.int32)
  if capacity < Z * min(A, e):
    place = jnp.cumsum(wanted_Ze.reshape(-1), dtype=jnp.int32).reshape(Z, e) - 1
    turns = -(-(place[-1, -1] + 1) // capacity)
    going_Ze = wanted_Ze & (place // capacity == turn)
    waiting = (wanted_Ze & ~going_Ze).sum(dtype=jnp.int32)
  blocks = capacity // block + min(e, capacity)
  M = blocks * block
  seen_Ze = jnp.cumsum(going_Ze, axis=0, dtype=jnp.int32)
  end_block_e = jnp.cumsum(-(-seen_Ze[-1] // block), dtype=jnp.int32)
  first_row_e = jnp.concatenate([jnp.zeros_like(end_block_e[:1]), end_block_e[:-1]]) * block
  row_ZK = jnp.where(going_Ze, first_row_e + seen_Ze - 1, M)
  if A < e:
    row_ZK = jnp.where(local_ZA < e, jnp.take_along_axis(
        row_ZK, jnp.minimum(local_ZA, e - 1), axis=1), M)
  pairs = row_ZK.size
  pair_M = jnp.full((M,), pairs, jnp.int32).at[row_ZK.reshape(-1)].set(
      jnp.arange(pairs, dtype=jnp.int32), mode="drop")
  group_m = jnp.searchsorted(end_block_e, jnp.arange(blocks), side="right")
  group_m = jnp.minimum(group_m, e - 1).astype(jnp.int32)
  return Rows(pair_M, jnp.minimum(row_ZK, M - 1), group_m, end_block_e[-1]), turns, waiting


@jax.named_scope("rows")
def gates(gate_ZA: jax.Array, local_ZA: jax.Array, experts: int) -> jax.Array:
  """Routing weights of the pairs of `plan`, [Z, K]; those of other devices' experts are 0."""
  if local_ZA.shape[1] < experts:
    return jnp.where(local_ZA < experts, gate_ZA, 0)
  here_ZAe = local_ZA[:, :, None] == jnp.arange(experts, dtype=local_ZA.dtype)
  return jnp.where(here_ZAe, gate_ZA[:, :, None], 0).sum(1)
