"""Grouped-query attention (arXiv 2305.13245): what latent attention is compared with (V2, table 9).

J key-value heads serve H query heads, J = H being multi-head and J = 1 multi-query attention. A
cache keeps J (K + U) numbers a token. Heads are as in `mla`: N dimensions without position and R
rotated ones (all of them where N is 0), values of U.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from dsv3_jax import config
from dsv3_jax.fp8 import weights
from dsv3_jax.fp8.recipe import resolve
from dsv3_jax.model import attention, layers, rope


class GQA(nnx.Module):
  """Attention parameters and the computation."""

  def __init__(self, cfg: config.Model, *, rngs: nnx.Rngs, dtype=jnp.float32):
    a, D, std = cfg.attention, cfg.dim, cfg.init_std
    H, K, U = a.heads, a.qk_dim, a.v_dim
    J = a.kv_heads or H
    self.cfg = a
    self.w_q_DHK = layers.normal_param(rngs, (D, H, K), std, dtype)
    self.w_k_DJK = layers.normal_param(rngs, (D, J, K), std, dtype)
    self.w_v_DJU = layers.normal_param(rngs, (D, J, U), std, dtype)
    self.w_o_HUD = layers.normal_param(rngs, (H, U, D), std, dtype)

  @property
  def held(self) -> bool:
    """Whether the weights are quantized ones, prepared for a recipe or loaded as such."""
    return isinstance(self.w_o_HUD[...], weights.Weight)

  def __call__(self, x_BTD: jax.Array, cos: jax.Array, sin: jax.Array,
               segments_BT: jax.Array | None, runtime: config.Runtime, context: None = None
               ) -> jax.Array:
    """Causal self-attention; arguments and result as those of `mla.MLA`, but for `context`."""
    if context is not None:
      raise ValueError("grouped-query attention has no latents to send along context; use kind mla")
    a, recipe = self.cfg, resolve(runtime, self.held)
    N, shared = a.nope_dim, a.heads // (a.kv_heads or a.heads)

    def turned(x):
      return jnp.concatenate([x[..., :N], rope.apply_rope(x[..., N:], cos, sin)], axis=-1)

    with jax.named_scope("gqa_project"):
      q_BTHK, k_BTJK, v_BTJU = attention.projected(
          x_BTD, (self.w_q_DHK[...], self.w_k_DJK[...], self.w_v_DJU[...]), (N, N, a.v_dim), recipe)
      k_BTHK = jnp.repeat(turned(k_BTJK), shared, axis=2)
      v_BTHU = jnp.repeat(v_BTJU, shared, axis=2)
      q_BTHK = turned(q_BTHK)
    return attention.attend(q_BTHK, k_BTHK, v_BTHU, self.w_o_HUD[...], segments_BT, a, runtime,
                            recipe)
