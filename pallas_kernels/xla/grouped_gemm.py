"""Grouped matmul whose cost does not grow with the number of groups, on any platform.

Rows are sorted by group and each group is padded to whole blocks, so that every block of rows meets
one weight matrix. A loop visits the blocks in use: the trip count is dynamic, hence the spare
capacity that worst-case routing needs costs memory but no time. `lax.ragged_dot` lowers to a dense
product over all groups on a CPU, G times the work.
"""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import vma


def _rows(x_MK: jax.Array, i: jax.Array, block: int) -> jax.Array:
  return lax.dynamic_slice_in_dim(x_MK, i * block, block)


def _start(shape, dtype, *like: jax.Array) -> jax.Array:
  """Zeros of this loop's own: equal constants are merged, and then copied for each loop."""
  return lax.optimization_barrier(vma.zeros(shape, dtype, *like))


def _forward(x_MK, w_GKN, group_m, used, transpose: bool):
  block = x_MK.shape[0] // group_m.shape[0]
  width = w_GKN.shape[1] if transpose else w_GKN.shape[2]
  contract = ((1,), (1,)) if transpose else ((1,), (0,))

  def body(i, y_MN):
    w_KN = lax.dynamic_index_in_dim(w_GKN, group_m[i], keepdims=False)
    y = lax.dot_general(_rows(x_MK, i, block), w_KN, (contract, ((), ())),
                        preferred_element_type=jnp.float32)
    return lax.dynamic_update_slice_in_dim(y_MN, y.astype(y_MN.dtype), i * block, 0)

  return lax.fori_loop(0, used, body, _start((x_MK.shape[0], width), x_MK.dtype,
                                             x_MK, w_GKN, group_m))


def _weight_gradient(x_MK, dy_MN, group_m, used, groups: int):
  block = x_MK.shape[0] // group_m.shape[0]

  def body(i, dw_GKN):
    g = group_m[i]
    # A transpose of its own is faster on a CPU than a product over the rows of both operands.
    x_KM = lax.optimization_barrier(_rows(x_MK, i, block).T)
    dw_KN = lax.dot_general(x_KM, _rows(dy_MN, i, block), (((1,), (0,)), ((), ())),
                            preferred_element_type=jnp.float32)
    return lax.dynamic_update_index_in_dim(dw_GKN, dw_GKN[g] + dw_KN, g, 0)

  shape = (groups, x_MK.shape[1], dy_MN.shape[1])
  return lax.fori_loop(0, used, body, _start(shape, jnp.float32, x_MK, dy_MN, group_m))


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
