"""Attention of sequences cut over devices, alone; the whole model is in train/test_context.py."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from dsv3_jax.parallel import context
from pallas_kernels import reference
from tests.oracles.tolerance import assert_close
from tests.quick import jit

B, H, N, R, U, C = 2, 2, 3, 2, 4, 5
SHARDS = 4


def spread(f):
  """`f` on devices that have all arguments whole; results [B, T / 4, ...] one after another."""
  mesh = jax.make_mesh((SHARDS,), ("context",), axis_types=(jax.sharding.AxisType.Auto,),
                       devices=jax.devices()[:SHARDS])
  return jax.shard_map(f, mesh=mesh, in_specs=PartitionSpec(),
                       out_specs=PartitionSpec(None, "context"))


def held(length):
  """Tokens of each device, one device after another."""
  chunks = np.arange(length).reshape(2 * SHARDS, -1)
  return np.concatenate([chunks[[d, 2 * SHARDS - 1 - d]].ravel() for d in range(SHARDS)])


def expand(w_CHW, fixed, latents):
  del fixed
  c_BTC, k_BTR = latents
  kv_BTHW = jnp.einsum("btc,chw->bthw", c_BTC, w_CHW)
  shared_BTHR = jnp.broadcast_to(k_BTR[:, :, None], (*kv_BTHW.shape[:3], R))
  return jnp.concatenate([kv_BTHW[..., :N], shared_BTHR], -1), kv_BTHW[..., N:]


def test_who_has_which_tokens():
  """Oracle: a list by hand; and a causal mask, of which all devices' queries see as many keys."""
  def three(x_BT):
    cut = context.cut(16, ("context",))
    mine = cut.own(x_BT)
    whole = cut.whole(mine)
    return mine, whole, cut.summed(whole * (1 + jax.lax.axis_index("context")))

  x_BT = jnp.arange(16.0)[None]
  mine, whole, summed = jit(spread(three))(x_BT)
  order = [0, 1, 14, 15, 2, 3, 12, 13, 4, 5, 10, 11, 6, 7, 8, 9]
  assert mine[0].tolist() == order == held(16).tolist()
  np.testing.assert_array_equal(whole.reshape(SHARDS, 16), np.tile(np.arange(16), (SHARDS, 1)))
  np.testing.assert_array_equal(summed, mine * 10)  # 1 + 2 + 3 + 4
  seen = np.asarray(order).reshape(SHARDS, -1) + 1
  assert len(set(seen.sum(1).tolist())) == 1
  with pytest.raises(ValueError, match="choose a multiple of 8"):
    jax.eval_shape(spread(lambda x: context.cut(12, ("context",)).own(x)), x_BT[:, :12])


def test_attention_and_its_gradients():
  """Oracle: attention on one device to keys and values of all heads; chunks are no whole blocks."""
  rng, length, block = np.random.default_rng(0), 40, 2  # chunks of 5
  shapes = (B, length, H, N + R), (B, length, C), (B, length, R), (C, H, N + U)
  q_BTHK, c_BTC, k_BTR, w_CHW = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in shapes)
  segments = np.sort(rng.integers(-1, 2, (B, length)).astype(np.int32))
  do_BTHU = jnp.asarray(rng.normal(size=(B, length, H, U)), jnp.float32)
  scale = 0.7

  def one(q_BTHK, latents, w_CHW):
    k_BTHK, v_BTHU = expand(w_CHW, None, latents)
    return reference.attention(q_BTHK, k_BTHK, v_BTHU, scale=scale, segments_BT=segments)

  def local(q_BTHK, latents, w_CHW):
    cut = context.cut(length, ("context",))
    return context.attend(cut.own(q_BTHK), jax.tree.map(cut.own, latents), expand, w_CHW, segments,
                          cut, scale=scale, block=block)

  def both(f, do_BTHU, *args):
    o_BTHU, pull = jax.vjp(f, *args)
    return o_BTHU, pull(do_BTHU)

  args = q_BTHK, (c_BTC, k_BTR), w_CHW
  expected, expected_grads = jit(functools.partial(both, one))(do_BTHU, *args)
  order = held(length)
  got, grads = jit(functools.partial(both, spread(local)))(do_BTHU[:, order], *args)
  assert_close(got, expected[:, order])
  for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(expected_grads), strict=True):
    assert_close(a, b)
