"""Causal attention in memory linear in the sequence length: blockwise softmax (FlashAttention).

Scores exist one tile (a block of queries by a block of keys) at a time. The forward pass keeps a
running maximum and sum a query and rescales the output as larger scores appear; the backward pass
recomputes each tile from the saved log-sum-exp. Tiles above the diagonal are never visited. Key and
value heads may differ in width (192 and 128 in DeepSeek-V3).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels import vma

_UNROLL = 10  # tiles up to which the loop is unrolled: slices are static and fuse


def _tiles(blocks: int) -> tuple[np.ndarray, np.ndarray]:
  """Query and key block of each tile on or below the diagonal, row by row."""
  return np.tril_indices(blocks)


def _loop(rows: np.ndarray, cols: np.ndarray, body, carry):
  """Runs `body(i, j, carry)` over the tiles."""
  if len(rows) <= _UNROLL:
    for i, j in zip(rows.tolist(), cols.tolist(), strict=True):
      carry = body(i, j, carry)
    return carry
  tiles = jnp.asarray(np.stack([rows, cols], 1), jnp.int32)
  return lax.fori_loop(0, len(rows), lambda t, c: body(tiles[t, 0], tiles[t, 1], c), carry)


def _block(x: jax.Array, i, size: int, axis: int = 2) -> jax.Array:
  """Entries [i * size, (i + 1) * size) of an axis."""
  return lax.dynamic_slice_in_dim(x, i * size, size, axis)


def _put(x: jax.Array, update: jax.Array, i, size: int, axis: int = 2) -> jax.Array:
  return lax.dynamic_update_slice_in_dim(x, update, i * size, axis)


def _add(x: jax.Array, update: jax.Array, i, size: int, axis: int = 2) -> jax.Array:
  return _put(x, _block(x, i, size, axis) + update, i, size, axis)


def _dot(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
  """An einsum accumulated in fp32."""
  return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)


def _turn(x: jax.Array) -> jax.Array:
  return jnp.swapaxes(x, 2, 3)


def _allowed(i, j, size: int, segments_BT):
  """Which keys of block j each query of block i may see, [1 or B, 1, size, size]."""
  query = i * size + jnp.arange(size)[:, None]
  key = j * size + jnp.arange(size)[None, :]
  mask = (key <= query)[None, None]
  if segments_BT is None:
    return mask
  seg_q = lax.dynamic_slice_in_dim(segments_BT, i * size, size, axis=1)
  seg_k = lax.dynamic_slice_in_dim(segments_BT, j * size, size, axis=1)
  return mask & (seg_q[:, None, :, None] == seg_k[:, None, None, :])


def _scores(q, k_turned, i, j, size, scale, segments_BT):
  s = _dot("bhtk,bhks->bhts", _block(q, i, size), _block(k_turned, j, size, 3)) * scale
  return jnp.where(_allowed(i, j, size, segments_BT), s, -jnp.inf)


def _forward(q, k, v, segments_BT, scale, size):
  """Output [B, H, T, U] and log-sum-exp [B, H, T] fp32 for T a multiple of `size`."""
  B, H, T, _ = q.shape
  rows, cols = _tiles(T // size)
  k_turned = _turn(k)

  def body(i, j, carry):
    o, m, z = carry  # output so far (unnormalised), running maximum, running sum
    s = _scores(q, k_turned, i, j, size, scale, segments_BT)
    m_old = _block(m, i, size)
    m_new = jnp.maximum(m_old, s.max(-1))
    m_safe = jnp.where(m_new == -jnp.inf, 0.0, m_new)  # no key seen yet: avoid inf - inf
    p = jnp.exp(s - m_safe[..., None])
    shrink = jnp.exp(m_old - m_safe)
    pv = _dot("bhts,bhsu->bhtu", p.astype(v.dtype), _block(v, j, size))
    o = _put(o, _block(o, i, size) * shrink[..., None] + pv, i, size)
    z = _put(z, _block(z, i, size) * shrink + p.sum(-1), i, size)
    return o, _put(m, m_new, i, size), z

  like = (q, k, v) if segments_BT is None else (q, k, v, segments_BT)
  start = (vma.zeros((B, H, T, v.shape[-1]), jnp.float32, *like),
           vma.match(jnp.full((B, H, T), -jnp.inf, jnp.float32), *like),
           vma.zeros((B, H, T), jnp.float32, *like))
  o, m, z = _loop(rows, cols, body, start)
  return (o / z[..., None]).astype(q.dtype), m + jnp.log(z)


def _backward(q, k, v, segments_BT, o, lse, do, scale, size):
  rows, cols = _tiles(q.shape[2] // size)
  delta = jnp.sum(do.astype(jnp.float32) * o.astype(jnp.float32), axis=-1)
  # dk and dv are accumulated transposed: every product then reads the tile as it lies.
  q_turned, k_turned, v_turned, do_turned = (_turn(x) for x in (q, k, v, do))

  def body(i, j, carry):
    dq, dk_turned, dv_turned = carry
    s = _scores(q, k_turned, i, j, size, scale, segments_BT)
    p = jnp.exp(s - _block(lse, i, size)[..., None])
    dp = _dot("bhtu,bhus->bhts", _block(do, i, size), _block(v_turned, j, size, 3))
    ds = (p * (dp - _block(delta, i, size)[..., None]) * scale).astype(q.dtype)
    dv = _dot("bhut,bhts->bhus", _block(do_turned, i, size, 3), p.astype(do.dtype))
    dk = _dot("bhkt,bhts->bhks", _block(q_turned, i, size, 3), ds)
    dq_i = _dot("bhts,bhsk->bhtk", ds, _block(k, j, size))
    return (_add(dq, dq_i, i, size), _add(dk_turned, dk, j, size, 3),
            _add(dv_turned, dv, j, size, 3))

  like = (q, k, v, do) if segments_BT is None else (q, k, v, do, segments_BT)
  start = tuple(vma.zeros(x.shape, jnp.float32, *like) for x in (q, k_turned, v_turned))
  dq, dk_turned, dv_turned = _loop(rows, cols, body, start)
  return dq.astype(q.dtype), _turn(dk_turned).astype(k.dtype), _turn(dv_turned).astype(v.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attention(q, k, v, segments_BT, scale, size):
  return _forward(q, k, v, segments_BT, scale, size)[0]


def _fwd(q, k, v, segments_BT, scale, size):
  o, lse = _forward(q, k, v, segments_BT, scale, size)
  o = checkpoint_name(o, "attention_out")
  lse = checkpoint_name(lse, "attention_lse")
  return o, (q, k, v, segments_BT, o, lse)


def _bwd(scale, size, residuals, do):
  q, k, v, segments_BT, o, lse = residuals
  return *_backward(q, k, v, segments_BT, o, lse, do, scale, size), None


_attention.defvjp(_fwd, _bwd)


def default_block(length: int) -> int:
  """Rows of a tile: four tiles up to 512 tokens, then a sixteenth in whole 128s, 64 to 512.

  Small tiles skip more of the masked half, large ones cost fewer loop steps.
  """
  if length <= 512:
    return int(np.clip(length // 4 // 64 * 64, 64, 128))
  return int(np.clip(length // 16 // 128 * 128, 128, 512))


class _Padded(NamedTuple):
  """Heads-first operands, padded to whole tiles."""

  arrays: tuple[jax.Array, ...]
  segments_BT: jax.Array | None
  size: int


def _padded(arrays, segments_BT, block: int) -> _Padded:
  T = arrays[0].shape[1]
  size = min(block or default_block(T), T)
  pad = -T % size
  if segments_BT is not None:
    segments_BT = jnp.pad(segments_BT, ((0, 0), (0, pad)), constant_values=-1)
  turned = tuple(jnp.pad(x.swapaxes(1, 2), ((0, 0), (0, 0), (0, pad), (0, 0))) for x in arrays)
  return _Padded(turned, segments_BT, size)


def _tokens_first(x: jax.Array, T: int) -> jax.Array:
  return x[:, :, :T].swapaxes(1, 2)


def attention(q_BTHK: jax.Array, k_BTHK: jax.Array, v_BTHU: jax.Array, *, scale: float,
              segments_BT: jax.Array | None = None, block: int = 0) -> jax.Array:
  """Causal softmax attention, exact, with O(B H T block) memory in both directions.

  Args:
    q_BTHK, k_BTHK: queries and keys; v_BTHU: values, U may differ from K.
    scale: factor on the scores.
    segments_BT: int32; a query sees only keys of its own number. None: plain causal.
    block: rows of a tile, 0 for `default_block`; T is padded to a multiple (padded keys lie after
      every real query).

  Returns:
    [B, T, H, U] in the dtype of the queries; softmax in fp32.
  """
  arrays, segments_BT, size = _padded((q_BTHK, k_BTHK, v_BTHU), segments_BT, block)
  return _tokens_first(_attention(*arrays, segments_BT, scale, size), q_BTHK.shape[1])


def forward(q_BTHK: jax.Array, k_BTHK: jax.Array, v_BTHU: jax.Array, *, scale: float,
            segments_BT: jax.Array | None = None, block: int = 0) -> tuple[jax.Array, jax.Array]:
  """`attention` and the log-sum-exp fp32 [B, T, H] of its scores: what `backward` asks for."""
  arrays, segments_BT, size = _padded((q_BTHK, k_BTHK, v_BTHU), segments_BT, block)
  o_BHTU, lse_BHT = _forward(*arrays, segments_BT, scale, size)
  T = q_BTHK.shape[1]
  return _tokens_first(o_BHTU, T), lse_BHT[:, :, :T].swapaxes(1, 2)


def backward(q_BTHK: jax.Array, k_BTHK: jax.Array, v_BTHU: jax.Array, o_BTHU: jax.Array,
             lse_BTH: jax.Array, do_BTHU: jax.Array, *, scale: float,
             segments_BT: jax.Array | None = None, block: int = 0
             ) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Gradients of q, k and v. `o_BTHU` may be an approximation: only its products with `do` enter.

  Args:
    lse_BTH: from `forward`.
    do_BTHU: gradient of the output.
    The rest as in `attention`.
  """
  T = q_BTHK.shape[1]
  arrays, segments_BT, size = _padded(
      (q_BTHK, k_BTHK, v_BTHU, o_BTHU, do_BTHU, lse_BTH[..., None]), segments_BT, block)
  *qkv, o, do, lse = arrays
  found = _backward(*qkv, segments_BT, o, lse[..., 0], do, scale, size)
  return tuple(_tokens_first(d, T) for d in found)
