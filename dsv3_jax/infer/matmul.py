"""The multiplications by weights of one decoding pass."""

import jax
import jax.numpy as jnp

from dsv3_jax import config, ops
from dsv3_jax.infer.parameters import Attention
from dsv3_jax.model import layers, moe


def linear(x: jax.Array, w: jax.Array, runtime: config.Runtime, inner: int = 1) -> jax.Array:
  """Contracts the last `inner` axes of x with the first of w: [..., *I] and [*I, *O] to [..., *O].

  Result in the dtype of `x`.
  """
  del runtime
  return layers.linear(x, w, inner)


def grouped(x_MD: jax.Array, w: jax.Array, p: moe.Plan, runtime: config.Runtime) -> jax.Array:
  """Rows in blocks of one expert each, times that expert's matrix; zeros beyond the used blocks.

  Args:
    x_MD: see `model.moe.spread`.
    w: [E, D, F].
    p: where the rows of experts are.
    runtime: implementations.
  """
  return ops.grouped_gemm(x_MD, w, p.group_m, p.used, impl=runtime.gemm)


def block_rows(pairs: int, experts: int, runtime: config.Runtime) -> int:
  """Rows of a block of `grouped`, for `moe.plan`."""
  del runtime
  return moe.block_rows(pairs, experts)


def split_gate(both: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Gate and up of what was multiplied by them side by side."""
  gate, up = jnp.split(both, 2, axis=-1)
  return gate, up


def expand(c_BTC: jax.Array, w: Attention) -> tuple[jax.Array, jax.Array]:
  """Keys without position [B, T, H, N] and values [B, T, H, U] of latents."""
  return (jnp.einsum("btc,hnc->bthn", c_BTC, w.w_uk_HNC),
          jnp.einsum("btc,hcu->bthu", c_BTC, w.w_uv_HCU))


def absorb(q_BTHN: jax.Array, w: Attention) -> jax.Array:
  """Queries times W_UK: [B, T, H, C], to be multiplied by latents."""
  return jnp.einsum("bthn,hnc->bthc", q_BTHN, w.w_uk_HNC)


def values(o_BTHC: jax.Array, w: Attention) -> jax.Array:
  """Sums of latents times W_UV: [B, T, H, U]."""
  return jnp.einsum("bthc,hcu->bthu", o_BTHC, w.w_uv_HCU)
