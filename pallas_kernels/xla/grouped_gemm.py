"""Grouped matmul whose cost does not grow with the number of groups, on any platform.

Rows are sorted by group and each group is padded to whole blocks, so that every block of rows meets
one weight matrix. A loop visits the blocks in use: the trip count is dynamic, hence the spare
capacity that worst-case routing needs costs memory but no time. `lax.ragged_dot` lowers to a dense
product over all groups on a CPU, G times the work.

Where groups are long, neighbouring blocks of one group are taken together, eight, four or two at a
time: small blocks keep the padding small, large products use the cores better.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import vma
from pallas_kernels.scaled import Scaled, dequantize

_LONG = 512  # mean rows of a group from which its blocks are merged, and rows of a merged product


def _rows(x_MK: jax.Array, i: jax.Array, block: int, count: int) -> jax.Array:
  return lax.dynamic_slice_in_dim(x_MK, i * block, block * count)


def _start(shape, dtype, *like: jax.Array) -> jax.Array:
  """Zeros of this loop's own: equal constants are merged, and then copied for each loop."""
  return lax.optimization_barrier(vma.zeros(shape, dtype, *like))


def _merges(rows: int, groups: int, blocks: int) -> tuple[int, ...]:
  """Numbers of blocks taken together, largest first; (1,) where groups are short."""
  if rows < _LONG * groups:
    return (1,)
  most = max(_LONG * blocks // rows, 1)
  return tuple(2**i for i in range(most.bit_length() - 1, -1, -1))


def _visits(group_m: jax.Array, used: jax.Array, merges: tuple[int, ...]):
  """For each number of blocks taken together: the first blocks, padded, and how many there are.

  A run of n blocks of one group is cut into n // merges[0] pieces of that size and the binary
  digits of the rest.
  """
  blocks = group_m.shape[0]
  i = jnp.arange(blocks)
  if merges == (1,):
    return [(1, i, used)]
  starts = jnp.diff(group_m, prepend=-1) != 0
  place = i - lax.cummax(jnp.where(starts, i, 0))
  run = jnp.cumsum(starts) - 1
  length = jnp.zeros((blocks,), jnp.int32).at[run].add(i < used)[run]
  visits = []
  for count in merges:
    if count == merges[0]:
      first = place % count == 0
    else:
      first = (place == length // (2 * count) * (2 * count))
    first &= (i < used) & (place + count <= length)
    where = jnp.nonzero(first, size=max(blocks // count, 1), fill_value=0)[0]
    visits.append((count, where, first.sum()))
  return visits


def _loop(x_MK: jax.Array, groups: int, group_m: jax.Array, used: jax.Array, body: Callable, start):
  """Folds `body(first block, number of blocks, carry)` over the blocks in use."""
  for count, where, trips in _visits(
      group_m, used, _merges(x_MK.shape[0], groups, group_m.shape[0])):
    start = lax.fori_loop(
        0, trips, lambda j, carry, n=count, at=where: body(at[j], n, carry), start)
  return start


def _forward(x_MK, w_GKN: jax.Array | Scaled, group_m, used, transpose: bool):
  block = x_MK.shape[0] // group_m.shape[0]
  held = w_GKN.codes if isinstance(w_GKN, Scaled) else w_GKN
  groups, width = held.shape[0], held.shape[1 if transpose else 2]
  contract = ((1,), (1,)) if transpose else ((1,), (0,))

  def take(x, i):
    return lax.dynamic_index_in_dim(x, group_m[i], keepdims=False)

  def matrix(i):
    if not isinstance(w_GKN, Scaled):
      return take(w_GKN, i)
    # As bytes: XLA would convert floats before the loop, those of all groups.
    codes = take(lax.bitcast_convert_type(held, jnp.uint8), i)
    return dequantize(Scaled(lax.bitcast_convert_type(codes, held.dtype), take(w_GKN.scales, i),
                             w_GKN.tile))

  def body(i, count, y_MN):
    w_KN = matrix(i)
    y = lax.dot_general(_rows(x_MK, i, block, count), w_KN, (contract, ((), ())),
                        preferred_element_type=jnp.float32)
    return lax.dynamic_update_slice_in_dim(y_MN, y.astype(y_MN.dtype), i * block, 0)

  start = _start((x_MK.shape[0], width), x_MK.dtype, x_MK, held, group_m)
  return _loop(x_MK, groups, group_m, used, body, start)


def _weight_gradient(x_MK, dy_MN, group_m, used, groups: int):
  block = x_MK.shape[0] // group_m.shape[0]

  def body(i, count, dw_GKN):
    g = group_m[i]
    # A transpose of its own is faster on a CPU than a product over the rows of both operands.
    x_KM = lax.optimization_barrier(_rows(x_MK, i, block, count).T)
    dw_KN = lax.dot_general(x_KM, _rows(dy_MN, i, block, count), (((1,), (0,)), ((), ())),
                            preferred_element_type=jnp.float32)
    return lax.dynamic_update_index_in_dim(dw_GKN, dw_GKN[g] + dw_KN, g, 0)

  shape = (groups, x_MK.shape[1], dy_MN.shape[1])
  start = _start(shape, jnp.float32, x_MK, dy_MN, group_m)
  return _loop(x_MK, groups, group_m, used, body, start)


@jax.custom_vjp
def grouped_gemm(x_MK: jax.Array, w_GKN: jax.Array, group_m: jax.Array, used: jax.Array
                 ) -> jax.Array:
  """`y[block i] = x[block i] @ w[group_m[i]]` for the first `used` blocks, zeros after.

  Args:
    x_MK: rows, blocks of M / len(group_m) rows each; blocks of one group need not be adjacent.
    w_GKN: one matrix a group; cast it to the dtype of `x_MK` beforehand.
    group_m: int32 [blocks], the group of each block.
    used: int32 scalar, blocks that hold rows.

  Returns:
    [M, N] in the dtype of `x_MK`, products accumulated in fp32. The weight gradient accumulates in
    fp32 and comes back in the dtype of `w_GKN`.
  """
  return _forward(x_MK, w_GKN, group_m, used, transpose=False)


def _fwd(x_MK, w_GKN, group_m, used):
  return grouped_gemm(x_MK, w_GKN, group_m, used), (x_MK, w_GKN, group_m, used)


def _bwd(residuals, dy_MN):
  x_MK, w_GKN, group_m, used = residuals
  dx_MK = _forward(dy_MN, w_GKN, group_m, used, transpose=True)
  dw_GKN = _weight_gradient(x_MK, dy_MN, group_m, used, w_GKN.shape[0])
  return dx_MK, dw_GKN.astype(w_GKN.dtype), None, None


grouped_gemm.defvjp(_fwd, _bwd)


def quantized(x_MK: Scaled, w_GKN: Scaled, group_m: jax.Array, used: jax.Array) -> jax.Array:
  """`grouped_gemm` of quantized operands, fp32; not differentiable.

  Where groups have a block or two, matrices are dequantized as their blocks are met: those of
  groups without rows never, and one at a time. Where they have many, all are beforehand, once.
  """
  x, codes = dequantize(x_MK), w_GKN.scales is not None
  if codes and group_m.shape[0] <= 2 * w_GKN.codes.shape[0]:
    return _forward(x, w_GKN, group_m, used, transpose=False)
  return grouped_gemm(x, dequantize(w_GKN, x if codes else None), group_m, used)
