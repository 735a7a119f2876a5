"""Multi-head latent attention (report 2.1.1, eq. 1-11), expanded form for training.

Keys and values of a token are up-projections of one latent of C numbers, and the position enters
through R further numbers that all heads share. At inference only those Z = C + R numbers a token
are cached. The letters, for one token:

    c_Q  = RMSNorm(x w_dq)                 Q    query latent (absent when q_rank is 0)
    q    = c_Q w_uq                        H K  a head's K = N + R: N without position, R rotated
    z    = x w_dkv                         Z    = C + R
    c_KV = RMSNorm(z[:C])                  C    key-value latent: what a cache keeps, with
    k_R  = RoPE(z[C:])                     R    the shared rotated key
    kv   = c_KV w_ukv                      H W  a head's W = N + U: key without position, value
    o    = softmax(scale q [k; k_R]) v     H U
    y    = o w_o                           D

Two details are not in the equations. The latents are RMS-normalised before their up-projections,
the shared key k_R is not. And the weights are fused as checkpoints store them (w_dkv holds W_DKV
and W_KR, w_ukv holds W_UK and W_UV a head, w_uq holds W_UQ and W_QR a head), which makes larger
matmuls and keeps FP8 blocks whole.

The absorbed form that decoding uses reads the same parameters: fold w_ukv[:, h, :N] into the query
and attention runs against (c_KV, k_R) itself.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from dsv3_jax import config
from dsv3_jax.fp8 import weights
from dsv3_jax.fp8.recipe import Recipe, resolve
from dsv3_jax.model import attention, layers, rope
from dsv3_jax.parallel import context as context_lib


def expand(w_ukv_CHW: jax.Array | weights.Weight, latents: tuple[jax.Array, jax.Array], nope: int,
           recipe: Recipe | None = None) -> tuple[jax.Array, jax.Array]:
  """Keys [B, T, H, K] and values [B, T, H, U] of every head.

  Args:
    w_ukv_CHW: the up-projection.
    latents: of `MLA.latents`.
    nope: N.
    recipe: of the projection.
  """
  c_BTC, k_rope_BTR = latents
  kv_BTHW = layers.linear(c_BTC, w_ukv_CHW, recipe=recipe)
  shared_BTHR = jnp.broadcast_to(k_rope_BTR[:, :, None],
                                 (*kv_BTHW.shape[:3], k_rope_BTR.shape[-1]))
  return jnp.concatenate([kv_BTHW[..., :nope], shared_BTHR], axis=-1), kv_BTHW[..., nope:]


def _expand(params, fixed, latents, nope: int, recipe: Recipe | None):
  """`expand` as `context.attend` takes it: the master apart from its quantized forms."""
  w_ukv_CHW = params if fixed is None else dataclasses.replace(fixed, master=params)
  return expand(w_ukv_CHW, latents, nope, recipe)


class MLA(nnx.Module):
  """Attention parameters and the expanded computation."""

  def __init__(self, cfg: config.Model, *, rngs: nnx.Rngs, dtype=jnp.float32):
    a, D, std = cfg.attention, cfg.dim, cfg.init_std
    H, Q, C, K = a.heads, a.q_rank, a.kv_rank, a.qk_dim
    self.cfg = a
    if Q:
      self.w_dq_DQ = layers.normal_param(rngs, (D, Q), std, dtype)
      self.q_norm_Q = layers.ones_param(Q, dtype)
      self.w_uq_QHK = layers.normal_param(rngs, (Q, H, K), std, dtype)
    else:
      self.w_q_DHK = layers.normal_param(rngs, (D, H, K), std, dtype)
    self.w_dkv_DZ = layers.normal_param(rngs, (D, C + a.rope_dim), std, dtype)
    self.kv_norm_C = layers.ones_param(C, dtype)
    self.w_ukv_CHW = layers.normal_param(rngs, (C, H, a.nope_dim + a.v_dim), std, dtype)
    self.w_o_HUD = layers.normal_param(rngs, (H, a.v_dim, D), std, dtype)

  @property
  def held(self) -> bool:
    """Whether the weights are quantized ones, prepared for a recipe or loaded as such."""
    return isinstance(self.w_o_HUD[...], weights.Weight)

  def down(self, x_BTD: jax.Array, recipe: Recipe | None = None) -> tuple[jax.Array, jax.Array]:
    """What is made of the block's input: query latent [B, T, Q] and key-value latent [B, T, Z].

    Without a query latent the queries [B, T, H, K] are in its place. Rotary columns are in halves.
    """
    a = self.cfg
    w, keep = ((self.w_dq_DQ[...], a.q_rank) if a.q_rank else (self.w_q_DHK[...], a.nope_dim))
    first, z_BTZ = attention.projected(x_BTD, (w, self.w_dkv_DZ[...]), (keep, a.kv_rank), recipe)
    return (checkpoint_name(first, "q_latent") if a.q_rank else first,
            checkpoint_name(z_BTZ, "kv_latent"))

  def queries(self, first: jax.Array, cos: jax.Array, sin: jax.Array,
              recipe: Recipe | None = None) -> jax.Array:
    """Queries [B, T, H, K], the last R of each head rotated, from the first result of `down`."""
    N = self.cfg.nope_dim
    if self.cfg.q_rank:
      c_BTQ = layers.rms_norm(first, self.q_norm_Q[...], self.cfg.latent_norm_eps)
      first, = attention.projected(c_BTQ, (self.w_uq_QHK[...],), (N,), recipe)
    rotated = rope.apply_rope(first[..., N:], cos, sin)
    return jnp.concatenate([first[..., :N], rotated], axis=-1)

  def latents(self, z_BTZ: jax.Array, cos: jax.Array, sin: jax.Array
              ) -> tuple[jax.Array, jax.Array]:
    """Normalised latent [B, T, C] and rotated shared key [B, T, R]: all that a cache stores."""
    C = self.cfg.kv_rank
    c_BTC = layers.rms_norm(z_BTZ[..., :C], self.kv_norm_C[...], self.cfg.latent_norm_eps)
    return c_BTC, rope.apply_rope(z_BTZ[..., C:], cos, sin)

  def __call__(self, x_BTD: jax.Array, cos: jax.Array, sin: jax.Array,
               segments_BT: jax.Array | None, runtime: config.Runtime,
               context: context_lib.Cut | None = None) -> jax.Array:
    """Causal self-attention.

    Args:
      x_BTD: normalised block input.
      cos, sin: [B, T, R/2] from `rope.rope_table`.
      segments_BT: int32; tokens see only their own segment. None: plain causal.
      runtime: chooses the attention implementation.
      context: where sequences are cut over devices; all but `segments_BT` is then of this one's
        tokens.

    Returns:
      [B, T, D].
    """
    recipe = resolve(runtime, self.held)
    with jax.named_scope("mla_project"):
      first, z_BTZ = self.down(x_BTD, recipe)
      q_BTHK = self.queries(first, cos, sin, recipe)
      latents, N, w_ukv_CHW = self.latents(z_BTZ, cos, sin), self.cfg.nope_dim, self.w_ukv_CHW[...]
      if context is not None:
        master, fixed = w_ukv_CHW, None
        if isinstance(w_ukv_CHW, weights.Weight):
          master, fixed = w_ukv_CHW.master, dataclasses.replace(w_ukv_CHW, master=None)
        o_BTHU = context_lib.attend(
            q_BTHK, latents, functools.partial(_expand, nope=N, recipe=recipe), master, segments_BT,
            context, scale=rope.softmax_scale(self.cfg), block=runtime.attention_block, fixed=fixed)
        return attention.output(o_BTHU, self.w_o_HUD[...], recipe)
      k_BTHK, v_BTHU = expand(w_ukv_CHW, latents, N, recipe)
    return attention.attend(q_BTHK, k_BTHK, v_BTHU, self.w_o_HUD[...], segments_BT, self.cfg,
                            runtime, recipe)
