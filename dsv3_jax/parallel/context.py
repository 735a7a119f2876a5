"""Context parallelism: a sequence cut over the mesh axis `context`, attention against latents.

All but attention works token by token, so n devices along `context` each hold T / n tokens of the
same sequences and compute as if these were sequences of their own. In attention a query needs the
keys and values of every token before it. Of MLA they are up-projections of one latent and one
rotated key, and those travel, not the heads: 512 + 64 numbers a token in place of 128 (192 + 128).

    forward     all-gather of the latents; of each block of keys in turn, keys and values of all
                heads are expanded, and every query that sees the block adds it to its running
                softmax
    backward    the latents are gathered again, and blocks expanded again; gradients of keys and
                values go through the expansion to the block's latents, whose sum over the devices
                is scattered home: a reduce-scatter

Between the two a device keeps its own tokens' latents, queries, outputs and log-sum-exp. At no
time does it hold keys and values of more than one block.

Which tokens: a causal query in the last part sees n times what one in the first part sees. So T is
cut into 2n chunks, and device d holds d and 2n - 1 - d: together as many pairs of query and key on
every device.

    device      0     1     2     3     3     2     1     0
    tokens    [ 0 ] [ 1 ] [ 2 ] [ 3 ] [ 4 ] [ 5 ] [ 6 ] [ 7 ]

Each device expands all chunks that it sees, 2n - d of them, where without `context` each token is
expanded once. Of these FLOPs all devices together do (3n + 1) / 4 times as many, and device 0 n
times its share; next to attention's own they weigh less the larger T / n is.

What is known of whole sequences without asking anybody (token numbers, targets, positions,
segments) is small, and made of the whole before it is cut (`Cut.own`), so that nobody needs a
neighbour's first tokens.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from dsv3_jax.parallel import mesh as mesh_lib
from dsv3_jax.parallel import sharding


@dataclasses.dataclass(frozen=True)
class Cut:
  """Sequences of `length` tokens over `shards` devices along `axis`; used inside shard_map."""

  length: int
  shards: int
  axis: str = mesh_lib.CONTEXT

  @property
  def chunk(self) -> int:
    """Tokens of a chunk, of which each device has two."""
    return self.length // (2 * self.shards)

  def own(self, x: jax.Array, dim: int = 1) -> jax.Array:
    """This device's tokens of what all devices have whole: T entries of an axis to T / n."""
    x = x.reshape(*x.shape[:dim], 2 * self.shards, self.chunk, *x.shape[dim + 1:])
    d = lax.axis_index(self.axis)
    mine = [lax.dynamic_index_in_dim(x, i, dim, keepdims=False)
            for i in (d, 2 * self.shards - 1 - d)]
    return jnp.concatenate(mine, axis=dim)

  def whole(self, x_BT: jax.Array) -> jax.Array:
    """All devices' tokens in the order of the sequence: [B, T / n, ...] to [B, T, ...]."""
    x = lax.all_gather(x_BT, self.axis, axis=1, tiled=True)
    x = x.reshape(x.shape[0], self.shards, 2, self.chunk, *x.shape[2:])
    x = jnp.concatenate([x[:, :, 0], x[:, ::-1, 1]], axis=1)
    return x.reshape(x.shape[0], self.length, *x.shape[3:])

  def summed(self, x_BT: jax.Array) -> jax.Array:
    """The transpose of `whole`: sums over the devices of this one's tokens."""
    x = x_BT.reshape(x_BT.shape[0], 2, self.shards, self.chunk, *x_BT.shape[2:])
    x = jnp.stack([x[:, 0], x[:, 1, ::-1]], axis=2)
    x = x.reshape(x_BT.shape)
    return lax.psum_scatter(x, self.axis, scatter_dimension=1, tiled=True)


def cut(length: int, axes: tuple[str, ...]) -> Cut | None:
  """The cut of sequences of `length` tokens where `context` is among `axes`, else None."""
  if mesh_lib.CONTEXT not in axes:
    return None
  shards = lax.axis_size(mesh_lib.CONTEXT)
  if length % (2 * shards):
    raise ValueError(f"{length} tokens cannot be cut into two chunks for each of {shards} devices "
                     f"along context; choose a multiple of {2 * shards}")
  return Cut(length, shards)


# --- attention ----------------------------------------------------------------------------------


def default_block(length: int, chunk: int) -> int:
  """Rows of a tile: a sixteenth of the sequence from 64 to 512, at most a chunk."""
  return min(int(np.clip(length // 16 // 64 * 64, 64, 512)), chunk)


def attend(q_BTHK: jax.Array, kept_BT: Any, expand: Callable[[Any, Any, Any], tuple], params: Any,
           segments_BT: jax.Array | None, cut: Cut, *, scale: float, block: int = 0,
           fixed: Any = None) -> jax.Array:
  """Causal attention of this device's queries to all devices' tokens before them.

  Args:
    q_BTHK: queries of this device's T / n tokens.
    kept_BT: what keys and values are made of, a tree of [B, T / n, ...] for the same tokens: this
      is what travels.
    expand: (params, fixed, `kept_BT` of s tokens) to keys [B, s, H, K] and values [B, s, H, U].
    params: its parameters, a tree; differentiated, and each device has its own gradient.
    segments_BT: int32 of whole sequences, [B, T]; a query sees its own segment alone. None: all.
    cut: of the sequences.
    scale: factor on the scores.
    block: rows of a tile; 0: `default_block`.
    fixed: what else `expand` takes, a tree; not differentiated.

  Returns:
    [B, T / n, H, U] in the dtype of the queries; softmax in fp32.
  """
  axes = tuple(sorted(frozenset({cut.axis}).union(
      *map(sharding.varies, jax.tree.leaves((q_BTHK, kept_BT, params, fixed, segments_BT))))))
  given = sharding.varying((q_BTHK, kept_BT, params, fixed, segments_BT), axes)
  how = _How(cut, expand, scale, min(block or default_block(cut.length, cut.chunk), cut.chunk),
             axes)
  with jax.named_scope("context_attention"):
    return _attend(how, *given)


@dataclasses.dataclass(frozen=True)
class _How:
  """What is static, and tiles: each chunk is padded to `m` whole ones of `size` tokens."""

  cut: Cut
  expand: Callable
  scale: float
  size: int
  axes: tuple[str, ...]

  @property
  def m(self) -> int:
    return -(-self.cut.chunk // self.size)

  def tiled(self, x: jax.Array, fill: int = 0) -> jax.Array:
    """Pads the chunks of axis 1."""
    n = self.cut.chunk
    x = x.reshape(x.shape[0], -1, n, *x.shape[2:])
    pad = [(0, 0), (0, 0), (0, self.m * self.size - n)] + [(0, 0)] * (x.ndim - 3)
    x = jnp.pad(x, pad, constant_values=fill)
    return x.reshape(x.shape[0], -1, *x.shape[3:])

  def untiled(self, x: jax.Array) -> jax.Array:
    x = x.reshape(x.shape[0], -1, self.m * self.size, *x.shape[2:])[:, :, :self.cut.chunk]
    return x.reshape(x.shape[0], -1, *x.shape[3:])

  def block(self, x: jax.Array, i, dim: int) -> jax.Array:
    return lax.dynamic_slice_in_dim(x, i * self.size, self.size, dim)

  def put(self, x: jax.Array, update: jax.Array, i, dim: int) -> jax.Array:
    return lax.dynamic_update_slice_in_dim(x, update, i * self.size, dim)

  def zeros(self, shape: tuple[int, ...], value: float = 0.0) -> jax.Array:
    return sharding.varying(jnp.full(shape, value, jnp.float32), self.axes)

  def loop(self, first, last, body: Callable, carry: Any) -> Any:
    """`body(i, carry)`; the bounds may differ from device to device, so nothing in it may
    communicate."""
    first, last = sharding.varying((jnp.asarray(first, jnp.int32), jnp.asarray(last, jnp.int32)),
                                   self.axes)
    return lax.fori_loop(first, last, body, carry)

  def key_blocks(self) -> jax.Array:
    """Blocks of keys that a query here sees: all up to this device's second chunk."""
    return (2 * self.cut.shards - lax.axis_index(self.cut.axis)) * self.m

  def first_query(self, j) -> jax.Array:
    """The first of the 2m blocks of queries here that sees block j of the keys."""
    d, m = lax.axis_index(self.cut.axis), self.m
    far = 2 * self.cut.shards - 1 - d
    return jnp.clip(j - d * m, 0, m) + jnp.clip(j - far * m, 0, m)

  def places(self, segments_BT) -> tuple[jax.Array, jax.Array, jax.Array | None, jax.Array | None]:
    """Place in the sequence and segment of the queries here and of all keys.

    Padding comes after every token: no query sees it, and itself it sees something.
    """
    index = jnp.arange(self.cut.length, dtype=jnp.int32)[None]
    pair = [index, None] if segments_BT is None else [index, segments_BT]
    fill = [self.cut.length, -1]
    keys = [x if x is None else self.tiled(x, f) for x, f in zip(pair, fill, strict=True)]
    queries = [x if x is None else self.tiled(self.cut.own(x), f)
               for x, f in zip(pair, fill, strict=True)]
    return queries[0], keys[0], queries[1], keys[1]

  def expanded(self, params: Any, fixed: Any, keys: Any, j) -> tuple[jax.Array, jax.Array]:
    """Keys [B, H, s, K] and values [B, H, s, U] of block j."""
    k, v = self.expand(params, fixed, jax.tree.map(lambda x: self.block(x, j, 1), keys))
    return k.swapaxes(1, 2), v.swapaxes(1, 2)

  def scores(self, q, k, i, j, places) -> jax.Array:
    """fp32 [B, H, t, s] of block i of the queries and block j of the keys, -inf where unseen."""
    query, key, query_segment, key_segment = places
    see = self.block(query, i, 1)[:, :, None] >= self.block(key, j, 1)[:, None, :]
    if query_segment is not None:
      see &= (self.block(query_segment, i, 1)[:, :, None]
              == self.block(key_segment, j, 1)[:, None, :])
    s = _dot("bhtk,bhsk->bhts", self.block(q, i, 2), k) * self.scale
    return jnp.where(see[:, None], s, -jnp.inf)


def _dot(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
  return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)


def _forward(how: _How, q_BTHK, kept_BT, params, fixed, segments_BT):
  """Output [B, T / n, H, U] and log-sum-exp fp32 [B, H, tiled T / n]."""
  places = how.places(segments_BT)
  keys = jax.tree.map(lambda x: how.tiled(how.cut.whole(x)), kept_BT)
  q = how.tiled(q_BTHK).swapaxes(1, 2)
  B, H, T, _ = q.shape
  U = jax.eval_shape(functools.partial(how.expanded, j=0), params, fixed, keys)[1].shape[-1]

  def over_keys(j, carry):
    k, v = how.expanded(params, fixed, keys, j)

    def over_queries(i, carry):
      o, top, z = carry  # output so far (unnormalised), running maximum, running sum
      s = how.scores(q, k, i, j, places)
      old = how.block(top, i, 2)
      new = jnp.maximum(old, s.max(-1))
      safe = jnp.where(new == -jnp.inf, 0.0, new)  # no key seen yet: avoid inf - inf
      p, shrink = jnp.exp(s - safe[..., None]), jnp.exp(old - safe)
      pv = _dot("bhts,bhsu->bhtu", p.astype(v.dtype), v)
      return (how.put(o, how.block(o, i, 2) * shrink[..., None] + pv, i, 2),
              how.put(top, new, i, 2),
              how.put(z, how.block(z, i, 2) * shrink + p.sum(-1), i, 2))

    return how.loop(how.first_query(j), 2 * how.m, over_queries, carry)

  start = how.zeros((B, H, T, U)), how.zeros((B, H, T), -jnp.inf), how.zeros((B, H, T))
  o, top, z = how.loop(0, how.key_blocks(), over_keys, start)
  o = (o / z[..., None]).astype(q.dtype)
  return how.untiled(o.swapaxes(1, 2)), top + jnp.log(z)


def _backward(how: _How, q_BTHK, kept_BT, params, fixed, segments_BT, o_BTHU, lse, do_BTHU):
  # Or the compiler would keep what the forward pass has gathered, for all layers.
  kept_BT, do_BTHU = lax.optimization_barrier((kept_BT, do_BTHU))
  places = how.places(segments_BT)
  keys = jax.tree.map(lambda x: how.tiled(how.cut.whole(x)), kept_BT)
  q, o, do = (how.tiled(x).swapaxes(1, 2) for x in (q_BTHK, o_BTHU, do_BTHU))
  delta = jnp.sum(do.astype(jnp.float32) * o.astype(jnp.float32), axis=-1)

  def over_keys(j, carry):
    dq, dkeys, dparams = carry
    here = jax.tree.map(lambda x: how.block(x, j, 1), keys)
    (k, v), pull = jax.vjp(lambda params, here: how.expand(params, fixed, here), params, here)
    kinds = k.dtype, v.dtype
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)

    def over_queries(i, carry):
      dq, dk, dv = carry
      p = jnp.exp(how.scores(q, k, i, j, places) - how.block(lse, i, 2)[..., None])
      do_i = how.block(do, i, 2)
      dp = _dot("bhtu,bhsu->bhts", do_i, v)
      ds = (p * (dp - how.block(delta, i, 2)[..., None]) * how.scale).astype(q.dtype)
      dq_i = how.block(dq, i, 2) + _dot("bhts,bhsk->bhtk", ds, k)
      return (how.put(dq, dq_i, i, 2),
              dk + _dot("bhts,bhtk->bhsk", ds, how.block(q, i, 2)),
              dv + _dot("bhts,bhtu->bhsu", p.astype(do.dtype), do_i))

    dq, dk, dv = how.loop(how.first_query(j), 2 * how.m, over_queries,
                          (dq, how.zeros(k.shape), how.zeros(v.shape)))
    found, dhere = pull(tuple(x.swapaxes(1, 2).astype(kind)
                              for x, kind in zip((dk, dv), kinds, strict=True)))
    dparams = jax.tree.map(jnp.add, dparams, _fp32(found))
    return dq, jax.tree.map(lambda x, d: how.put(x, d, j, 1), dkeys, _fp32(dhere)), dparams

  start = (how.zeros(q.shape), *(jax.tree.map(lambda x: how.zeros(x.shape), tree)
                                 for tree in (keys, params)))
  dq, dkeys, dparams = how.loop(0, how.key_blocks(), over_keys, start)
  like = lambda tree, given: jax.tree.map(lambda x, y: x.astype(y.dtype), tree, given)
  dkept = jax.tree.map(lambda x: how.cut.summed(how.untiled(x)), dkeys)
  dq = how.untiled(dq.swapaxes(1, 2))
  return dq.astype(q.dtype), like(dkept, kept_BT), like(dparams, params), None, None


def _fp32(tree: Any) -> Any:
  return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(how, *given):
  return _forward(how, *given)[0]


def _fwd(how, *given):
  o, lse = _forward(how, *given)
  o, lse = checkpoint_name(o, "attention_out"), checkpoint_name(lse, "attention_lse")
  return o, (*given, o, lse)


def _bwd(how, residuals, do):
  return _backward(how, *residuals, do)


_attend.defvjp(_fwd, _bwd)
