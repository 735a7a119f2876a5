"""One forward pass over new tokens of sequences whose past is in the cache.

Absorbed attention (report 2.1.1; arXiv 2405.04434, section 2.1.2). A head's score is

    q . k = (W_UK^T q_C) . c + q_R . k_R        and its output        o = W_UV (sum_s p_s c_s)

with c the latent and k_R the rotary key of a past token: W_UK is absorbed into the query and W_UV
into what comes out, so that attention runs on what the cache holds. A step reads C + R numbers a
token in place of H (K + U), and all heads share them. A score costs C + R multiplications in place
of K, though, so where nothing is cached yet (a fresh prompt) keys and values are expanded, as in
training.

Rows may have different numbers of new tokens: of row b the first `new_B[b]` of T count. The others
are computed with and thrown away; they reach neither the cache nor other rows.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dsv3_jax import config, ops
from dsv3_jax.infer import cache as cache_lib
from dsv3_jax.infer import ffn, matmul
from dsv3_jax.infer.cache import Cache
from dsv3_jax.infer.parameters import Attention, Experts, Layer, Parameters
from dsv3_jax.model import layers, rope, routing
from dsv3_jax.parallel import interleave


def forward(weights: Parameters, cache: Cache, tokens_BT: jax.Array, new_B: jax.Array,
            cfg: config.Model, runtime: config.Runtime = config.Runtime(), fresh: bool = False,
            halves: bool = False) -> tuple[jax.Array, jax.Array, Cache]:
  """The main model over new tokens.

  Args:
    weights: of `parameters.prepare`, or `slots.place`; their dtype is the computation's.
    cache: the past. Layers of MTP modules are passed through.
    tokens_BT: int; row b's first new_B[b] tokens are new, the rest anything in the vocabulary.
    new_B: int32, from 0 to T, at most what the cache has room for.
    cfg: the model.
    runtime: implementations.
    fresh: static; the cache is empty: attention is computed expanded.
    halves: static; two micro-batches, one's tokens on their way to experts and back while the
      other computes (report 3.4). The cache is paged.

  Returns:
    h [B, T, D] before the final norm; fp32 [MoE layers, E], tokens that each expert got; and the
    cache, its lengths advanced by new_B.
  """
  def run(weights, cache, tokens_BT, new_B):
    return _layers(weights, cache, tokens_BT, new_B, cfg, runtime, fresh, halves)

  if halves:
    # Micro-batches of equal work, each with as few matmuls as all-to-alls: one behind each.
    run = interleave.interleaved(run, in_order=True, travel=1)
  return run(weights, cache, tokens_BT, new_B)


def _layers(weights, cache, tokens_BT, new_B, cfg, runtime, fresh: bool, halves: bool):
  parts, axis = [_Part(tokens_BT, new_B, cache, fresh)], 0
  if halves and tokens_BT.size > 1:
    parts, axis = _halves(tokens_BT, new_B, cache, fresh)
  x = [jnp.take(weights.embedding_VD, part.tokens_BT, axis=0) for part in parts]
  turns = [rope.rope_table(cfg.attention, part.cache.lengths_B[:, None]
                           + jnp.arange(part.tokens_BT.shape[1], dtype=jnp.int32))
           for part in parts]
  kept, counts = list(cache.layers), []
  for i, layer in enumerate(weights.layers):
    count_E = []
    with jax.named_scope(f"layer_{i}"):
      for j, part in enumerate(parts):
        x[j], kept[i], expert_PA = block(x[j], layer, kept[i], part.cache, turns[j], part.new_B,
                                         cfg, runtime, part.fresh)
        if expert_PA is not None:
          valid_P = _valid(part.new_B, part.tokens_BT.shape[1])
          count_E.append(routing.expert_counts(expert_PA, cfg.moe.experts, valid_P))
    if count_E:
      counts.append(sum(count_E))
  counts_LE = jnp.stack(counts) if counts else jnp.zeros((0, cfg.moe.experts))
  return (jnp.concatenate(x, axis), counts_LE,
          Cache(tuple(kept), cache.lengths_B + new_B, cache.pages_BN))


class _Part(NamedTuple):
  """A micro-batch; of its cache, lengths and pages are read."""

  tokens_BT: jax.Array
  new_B: jax.Array
  cache: Cache
  fresh: bool


def _halves(tokens_BT, new_B, cache: Cache, fresh: bool) -> tuple[list[_Part], int]:
  """Two micro-batches, and the axis that was cut: the rows if there are several, or the tokens, of
  which the later ones find the earlier ones in the cache."""
  assert cache.pages_BN is not None
  B, T = tokens_BT.shape
  if B > 1:
    return [_Part(tokens_BT[at], new_B[at],
                  Cache(cache.layers, cache.lengths_B[at], cache.pages_BN[at]), fresh)
            for at in (slice(None, B // 2), slice(B // 2, None))], 0
  first_B = jnp.minimum(new_B, T // 2)
  later = Cache(cache.layers, cache.lengths_B + first_B, cache.pages_BN)
  return [_Part(tokens_BT[:, :T // 2], first_B, cache, fresh),
          _Part(tokens_BT[:, T // 2:], new_B - first_B, later, False)], 1


def readout(weights: Parameters, h: jax.Array, cfg: config.Model) -> jax.Array:
  """fp32 logits [..., V] of representations [..., D] before the final norm."""
  h = layers.rms_norm(h, weights.final_norm_D, cfg.norm_eps)
  return jnp.einsum("...d,dv->...v", h, weights.head_DV, preferred_element_type=jnp.float32)


def last(h_BTD: jax.Array, new_B: jax.Array) -> jax.Array:
  """Each row's representation of its last new token, [B, D]."""
  where_B11 = jnp.maximum(new_B - 1, 0)[:, None, None]
  return jnp.take_along_axis(h_BTD, where_B11, axis=1)[:, 0]


def block(x_BTD: jax.Array, w: Layer, cached: jax.Array, cache: Cache,
          turns: tuple[jax.Array, jax.Array], new_B: jax.Array, cfg: config.Model,
          runtime: config.Runtime, fresh: bool
          ) -> tuple[jax.Array, jax.Array, jax.Array | None]:
  """One Transformer block: [B, T, D], its layer of the cache, and the tokens' experts [P, A].

  Args:
    x_BTD: residual stream.
    w: the layer's parameters.
    cached: its layer of the cache.
    cache: lengths and pages are read.
    turns: cos and sin, [B, T, R/2] each.
    new_B, cfg, runtime, fresh: see `forward`.
  """
  h_BTD = layers.rms_norm(x_BTD, w.attn_norm_D, cfg.norm_eps)
  y_BTD, cached = _attention(h_BTD, w.attn, cached, cache, turns, new_B, cfg.attention, runtime,
                             fresh)
  x_BTD = x_BTD + y_BTD
  h_PD = layers.rms_norm(x_BTD, w.ffn_norm_D, cfg.norm_eps).reshape(-1, x_BTD.shape[-1])
  if isinstance(w.ffn, Experts):
    y_PD, expert_PA = ffn.experts(h_PD, w.ffn, _valid(new_B, x_BTD.shape[1]), cfg.moe, runtime)
  else:
    y_PD, expert_PA = ffn.swiglu(h_PD, w.ffn, runtime), None
  return x_BTD + y_PD.reshape(x_BTD.shape), cached, expert_PA


def _valid(new_B: jax.Array, T: int) -> jax.Array:
  """Which positions are new tokens, bool [P]."""
  return (jnp.arange(T) < new_B[:, None]).reshape(-1)


def _attention(x_BTD, w: Attention, cached, cache: Cache, turns, new_B, cfg: config.Attention,
               runtime: config.Runtime, fresh: bool):
  """[B, T, D] and the layer of the cache with the new entries."""
  N, C, scale = cfg.nope_dim, cfg.kv_rank, rope.softmax_scale(cfg)
  y = x_BTD
  if w.w_dq_DQ is not None:
    y = layers.rms_norm(matmul.linear(x_BTD, w.w_dq_DQ, runtime), w.q_norm_Q, cfg.latent_norm_eps)
  q_BTHK = matmul.rotary(y, w.w_q_YHK, N, runtime)
  q_BTHN, q_BTHR = q_BTHK[..., :N], rope.apply_rope(q_BTHK[..., N:], *turns)
  z_BTZ = matmul.rotary(x_BTD, w.w_dkv_DZ, C, runtime)
  c_BTC = layers.rms_norm(z_BTZ[..., :C], w.kv_norm_C, cfg.latent_norm_eps)
  k_BTR = rope.apply_rope(z_BTZ[..., C:], *turns)
  cached = cache_lib.write(cached, cache_lib.entries(c_BTC, k_BTR, cached), cache.lengths_B, new_B,
                           cache.pages_BN)
  if fresh:
    k_BTHN, v_BTHU = matmul.expand(c_BTC, w, N, runtime)
    k_BTHR = jnp.broadcast_to(k_BTR[:, :, None], q_BTHR.shape)
    o_BTHU = ops.attention(
        jnp.concatenate([q_BTHN, q_BTHR], -1), jnp.concatenate([k_BTHN, k_BTHR], -1), v_BTHU,
        scale=scale, impl=runtime.attention, block=runtime.attention_block)
  else:
    q_BTHZ = jnp.concatenate([matmul.absorb(q_BTHN, w), q_BTHR], -1)
    unused_B = x_BTD.shape[1] - new_B
    o_BTHC = ops.mla_decode(_later(q_BTHZ, unused_B), cached, cache.lengths_B + new_B, scale=scale,
                            pages_BN=cache.pages_BN, kv_rank=C)
    o_BTHU = matmul.values(_later(o_BTHC, -unused_B), w, N)
  return matmul.linear(o_BTHU, w.w_o_HUD, runtime, 2), cached


def _later(x: jax.Array, by_B: jax.Array) -> jax.Array:
  """Rows of [B, T, ...] moved along T, so that unused positions come first, as `mla_decode` wants
  them; what comes in at the end is anything."""
  T = x.shape[1]
  if T == 1:
    return x
  where_BT = jnp.clip(jnp.arange(T) - by_B[:, None], 0, T - 1)
  return jnp.take_along_axis(x, where_BT[:, :, None, None], axis=1)
