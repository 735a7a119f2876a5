"""Which output tiles an FP8 GEMM has, and where each one's operands lie, by kind of product."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.mosaic.config import BLOCK, GemmConfig


class Spot(NamedTuple):
  """One tile of work. All are scalars, Python's or traced.

  Attributes:
    row, column: of the output; `row` is also A's.
    group: leading index of an output of several matrices.
    a_scale: where A's scales begin, if not at (0, row).
    b_row: first row of B, all groups counted.
    scale_row: first row of B's block scales of this group.
    first, last: range of k in blocks; one block at least.
    keep: whether the sum counts; otherwise the tile is zero.
    shared: whether a cluster that shares B may (its two tiles belong to one group).
  """

  row: jax.Array
  column: jax.Array
  group: jax.Array | int = 0
  a_scale: tuple[jax.Array, jax.Array] | None = None
  b_row: jax.Array | int = 0
  scale_row: jax.Array | int = 0
  first: jax.Array | int = 0
  last: jax.Array | int = 0
  keep: jax.Array | bool = True
  shared: jax.Array | bool = True


class Schedule(NamedTuple):
  """Which tiles there are: `size` (of the grid) and `spot(m_tile, n_tile, matrix)`.

  `m_tile` counts tiles; blocks of a cluster call `spot` with theirs.
  """

  size: tuple[jax.Array | int, ...]
  spot: Callable[..., Spot]


def _at_least_one(first, last):
  return first, jnp.maximum(last, first + 1), last > first


def schedule(kind: str, config: GemmConfig, rows: int, columns: int, steps: int, groups: int,
             tables: tuple, scale_rows: int) -> Schedule:
  """Tiles of a product of `rows` by `columns`, both of one group where B or out has several.

  Args:
    tables: references; grouped: group of each 128 rows, number of those in use; masked: group and
      row of each tile, number of tiles with products, number of tiles; grouped_wgrad: [G, 2].
    scale_rows: rows of B's block scales of one group.
  """
  tm, tn = config.tile_m, config.tile_n
  m_tiles, n_tiles = -(-rows // tm), -(-columns // tn)
  if kind in ("dense", "wgrad"):
    def spot(mi, ni, _):
      return Spot(mi * tm, ni * tn, b_row=ni * tn, last=steps)

    return Schedule((m_tiles, n_tiles), spot)
  if kind == "grouped_wgrad":
    bounds, = tables

    def spot(mi, ni, g):
      first, last, keep = _at_least_one(bounds[g, 0], bounds[g, 1])
      # An empty group may start behind the last token; it still copies a block.
      start = jnp.minimum(first, steps - 1)
      return Spot(mi * tm, ni * tn, group=g, b_row=ni * tn, first=start,
                  last=start + (last - first), keep=keep)

    return Schedule((m_tiles, n_tiles), spot)
  if kind == "grouped":
    group_m, used = tables

    def group_of(mi):
      block = jnp.minimum(mi * tm // BLOCK, rows // BLOCK - 1)
      return jnp.clip(group_m[block], 0, groups - 1)

    def spot(mi, ni, _):
      g, in_use = group_of(mi), used[0]
      first_of_pair, shared = mi, True
      if config.cluster == "m":  # both blocks run the same range, whatever is in use
        first_of_pair = mi // 2 * 2
        shared = group_of(first_of_pair) == group_of(first_of_pair + 1)
      runs = first_of_pair * tm // BLOCK < in_use
      return Spot(mi * tm, ni * tn, b_row=g * columns + ni * tn, scale_row=g * scale_rows,
                  last=jnp.where(runs, steps, 1), keep=mi * tm // BLOCK < in_use, shared=shared)

    return Schedule((m_tiles, n_tiles), spot)
  group_t, row_t, used, visited = tables
  in_group = rows // groups

  def spot(mi, ni, _):
    g, row, keep = group_t[mi], pl.multiple_of(row_t[mi], tm), mi < used[0]
    return Spot(row, ni * tn, a_scale=(g * steps, row - g * in_group), b_row=g * columns + ni * tn,
                scale_row=g * scale_rows, last=jnp.where(keep, steps, 1), keep=keep)

  return Schedule((visited[0], n_tiles), spot)
