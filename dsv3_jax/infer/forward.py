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

import jax
import jax.numpy as jnp

from dsv3_jax import config, ops
from dsv3_jax.infer import cache as cache_lib
from dsv3_jax.infer import matmul
from dsv3_jax.infer.cache import Cache
from dsv3_jax.infer.parameters import FFN, Attention, Experts, Layer, Parameters
from dsv3_jax.model import layers, moe, rope, routing


def forward(weights: Parameters, cache: Cache, tokens_BT: jax.Array, new_B: jax.Array,
            cfg: config.Model, runtime: config.Runtime = config.Runtime(), fresh: bool = False
            ) -> tuple[jax.Array, jax.Array, Cache]:
  """The main model over new tokens.

  Args:
    weights: of `parameters.prepare`; their dtype is the computation's.
    cache: the past. Layers of MTP modules are passed through.
    tokens_BT: int; row b's first new_B[b] tokens are new, the rest anything in the vocabulary.
    new_B: int32, from 0 to T, at most what the cache has room for.
    cfg: the model.
    runtime: implementations.
    fresh: static; the cache is empty: attention is computed expanded.

  Returns:
    h [B, T, D] before the final norm; fp32 [MoE layers, E], tokens that each expert got; and the
    cache, its lengths advanced by new_B.
  """
  T = tokens_BT.shape[1]
  position_BT = cache.lengths_B[:, None] + jnp.arange(T, dtype=jnp.int32)
  turns = rope.rope_table(cfg.attention, position_BT)
  valid_P = (jnp.arange(T) < new_B[:, None]).reshape(-1)
  x_BTD = jnp.take(weights.embedding_VD, tokens_BT, axis=0)
  kept, counts = list(cache.layers), []
  for i, layer in enumerate(weights.layers):
    with jax.named_scope(f"layer_{i}"):
      x_BTD, kept[i], expert_PA = block(x_BTD, layer, kept[i], cache, turns, new_B, cfg, runtime,
                                        fresh)
    if expert_PA is not None:
      counts.append(routing.expert_counts(expert_PA, cfg.moe.experts, valid_P))
  counts_LE = jnp.stack(counts) if counts else jnp.zeros((0, cfg.moe.experts))
  return x_BTD, counts_LE, Cache(tuple(kept), cache.lengths_B + new_B, cache.pages_BN)


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
    y_PD, expert_PA = _experts(h_PD, w.ffn, cfg.moe, runtime)
  else:
    y_PD, expert_PA = _swiglu(h_PD, w.ffn, runtime), None
  return x_BTD + y_PD.reshape(x_BTD.shape), cached, expert_PA


def _attention(x_BTD, w: Attention, cached, cache: Cache, turns, new_B, cfg: config.Attention,
               runtime: config.Runtime, fresh: bool):
  """[B, T, D] and the layer of the cache with the new entries."""
  N, C, scale = cfg.nope_dim, cfg.kv_rank, rope.softmax_scale(cfg)
  y = x_BTD
  if w.w_dq_DQ is not None:
    y = layers.rms_norm(matmul.linear(x_BTD, w.w_dq_DQ, runtime), w.q_norm_Q, cfg.latent_norm_eps)
  q_BTHK = matmul.linear(y, w.w_q_YHK, runtime)
  q_BTHN, q_BTHR = q_BTHK[..., :N], rope.apply_rope(q_BTHK[..., N:], *turns)
  z_BTZ = matmul.linear(x_BTD, w.w_dkv_DZ, runtime)
  c_BTC = layers.rms_norm(z_BTZ[..., :C], w.kv_norm_C, cfg.latent_norm_eps)
  k_BTR = rope.apply_rope(z_BTZ[..., C:], *turns)
  cached = cache_lib.write(cached, cache_lib.entries(c_BTC, k_BTR, cached), cache.lengths_B, new_B,
                           cache.pages_BN)
  if fresh:
    k_BTHN, v_BTHU = matmul.expand(c_BTC, w)
    k_BTHR = jnp.broadcast_to(k_BTR[:, :, None], q_BTHR.shape)
    o_BTHU = ops.attention(
        jnp.concatenate([q_BTHN, q_BTHR], -1), jnp.concatenate([k_BTHN, k_BTHR], -1), v_BTHU,
        scale=scale, impl=runtime.attention, block=runtime.attention_block)
  else:
    q_BTHZ = jnp.concatenate([matmul.absorb(q_BTHN, w), q_BTHR], -1)
    unused_B = x_BTD.shape[1] - new_B
    o_BTHC = ops.mla_decode(_later(q_BTHZ, unused_B), cached, cache.lengths_B + new_B, scale=scale,
                            pages_BN=cache.pages_BN, kv_rank=C)
    o_BTHU = matmul.values(_later(o_BTHC, -unused_B), w)
  return matmul.linear(o_BTHU, w.w_o_HUD, runtime, 2), cached


def _later(x: jax.Array, by_B: jax.Array) -> jax.Array:
  """Rows of [B, T, ...] moved along T, so that unused positions come first, as `mla_decode` wants
  them; what comes in at the end is anything."""
  T = x.shape[1]
  if T == 1:
    return x
  where_BT = jnp.clip(jnp.arange(T) - by_B[:, None], 0, T - 1)
  return jnp.take_along_axis(x, where_BT[:, :, None, None], axis=1)


def _swiglu(x_PD: jax.Array, w: FFN, runtime: config.Runtime) -> jax.Array:
  gate, up = matmul.split_gate(matmul.linear(x_PD, w.w_in_DF, runtime))
  return matmul.linear(layers.swiglu(gate, up), w.w_out_FD, runtime)


def _experts(x_PD: jax.Array, w: Experts, cfg: config.MoE, runtime: config.Runtime
             ) -> tuple[jax.Array, jax.Array]:
  """[P, D], and the experts of each token, int32 [P, A]."""
  routed = routing.route(x_PD, w.w_router_DE, w.bias_E, cfg)
  p = moe.plan(routed.expert_PA, cfg.experts, matmul.block_rows(
      routed.expert_PA.size, cfg.experts, runtime))
  gate, up = matmul.split_gate(matmul.grouped(moe.spread(x_PD, p), w.w_in_EDF, p, runtime))
  gate_M = moe.spread_gates(routed.gate_PA, p).astype(x_PD.dtype)
  y_MD = matmul.grouped(layers.swiglu(gate, up) * gate_M[:, None], w.w_out_EFD, p, runtime)
  y_PD = moe.collect(y_MD, p)
  return (y_PD if w.shared is None else y_PD + _swiglu(x_PD, w.shared, runtime)), routed.expert_PA
