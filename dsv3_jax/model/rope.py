"""Rotary position embedding of the decoupled dimensions, and YaRN (report 4.3, facts 1.5).

Released checkpoints store weights for rotating adjacent pairs (elements 2i and 2i+1), and so do
ours. Strided pairs are slow on every backend, and a permutation common to queries and keys leaves
their products alone; so the projections' columns are brought into halves (`to_halves`, a few
numbers) and activations rotate element i with i + R/2. Tables are computed inside jit from the
positions, never stored.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax import config


def inverse_frequencies(cfg: config.Attention) -> np.ndarray:
  """Angle per position of each rotated pair, [R/2] float64.

  Without YaRN `theta^(-2i/R)`. With YaRN (factor s > 1) pairs that turn less than `beta_slow` times
  over the original context are slowed s-fold, pairs that turn more than `beta_fast` times are left
  alone, with a linear ramp between.
  """
  half = cfg.rope_dim // 2
  plain = cfg.rope_theta ** (-np.arange(half) * 2.0 / cfg.rope_dim)
  yarn = cfg.yarn
  if yarn.factor == 1:
    return plain

  def pair_turning(turns: float) -> float:
    """Index of the pair that makes `turns` rotations over the original context."""
    wavelengths = yarn.original_length / (turns * 2 * math.pi)
    return cfg.rope_dim * math.log(wavelengths) / (2 * math.log(cfg.rope_theta))

  low = max(math.floor(pair_turning(yarn.beta_fast)), 0)
  high = min(math.ceil(pair_turning(yarn.beta_slow)), cfg.rope_dim - 1)
  width = max(high - low, 1e-3)  # equal ends make a step instead of a ramp
  ramp = np.clip((np.arange(half) - low) / width, 0, 1)
  return plain / yarn.factor * ramp + plain * (1 - ramp)


def mscale(factor: float, weight: float) -> float:
  """YaRN's m(s) = 0.1 * weight * ln s + 1 (arXiv 2309.00071)."""
  return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def softmax_scale(cfg: config.Attention) -> float:
  """Factor on the whole attention score: `K^-1/2`, times `m^2` under YaRN (m = 0.1 ln s + 1)."""
  m = mscale(cfg.yarn.factor, cfg.yarn.mscale_all_dim) if cfg.yarn.mscale_all_dim else 1.0
  return cfg.qk_dim**-0.5 * m * m


def table_scale(cfg: config.Attention) -> float:
  """Factor on cos and sin; 1 when `mscale` equals `mscale_all_dim`, as in the release."""
  yarn = cfg.yarn
  return mscale(yarn.factor, yarn.mscale) / mscale(yarn.factor, yarn.mscale_all_dim)


def rope_table(cfg: config.Attention, positions_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
  """cos and sin of each pair's angle, two [B, T, R/2] fp32 arrays, for int positions [B, T]."""
  frequencies = jnp.asarray(inverse_frequencies(cfg), jnp.float32)
  angles = positions_BT[..., None].astype(jnp.float32) * frequencies
  scale = table_scale(cfg)
  return jnp.cos(angles) * scale, jnp.sin(angles) * scale


def to_halves(w: jax.Array) -> jax.Array:
  """Reorders the last axis from adjacent pairs to halves: 0 2 4 .. 1 3 5 .."""
  return jnp.concatenate([w[..., 0::2], w[..., 1::2]], axis=-1)


def apply_rope(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
  """Rotates element i of the last axis with element i + R/2.

  Args:
    x: [B, T, R] or [B, T, H, R], made by weights that went through `to_halves`.
    cos, sin: [B, T, R/2] from `rope_table`.

  Returns:
    Same shape and dtype as `x`; the rotation is computed in fp32.
  """
  if x.ndim == 4:
    cos, sin = cos[:, :, None], sin[:, :, None]
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  turned = [first * cos - second * sin, first * sin + second * cos]
  return jnp.concatenate(turned, axis=-1).astype(x.dtype)


def positions_from_segments(segments_BT: jax.Array) -> jax.Array:
  """Position of each token within its segment, int32 [B, T]: restarts where the number changes."""
  index_T = jnp.arange(segments_BT.shape[1], dtype=jnp.int32)
  starts = segments_BT[:, 1:] != segments_BT[:, :-1]
  start_BT = jnp.pad(jnp.where(starts, index_T[1:], 0), ((0, 0), (1, 0)))
  return index_T - jax.lax.cummax(start_BT, axis=1)
