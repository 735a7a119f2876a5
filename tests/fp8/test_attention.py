"""Attention joined with its projection: one E5M6 copy of the output serves both backward passes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax import config
from dsv3_jax.fp8 import attention
from dsv3_jax.fp8 import recipe as recipe_lib
from tests.fp8 import oracle
from tests.quick import jit

B, T, H, K, U, D = 2, 70, 2, 24, 96, 40  # tiles of 128 reach over heads; T is no multiple of a tile
SCALE = K**-0.5
RECIPE = recipe_lib.resolve(config.Runtime(recipe="v3"))


def draw(seed=0):
  rng = np.random.default_rng(seed)
  shapes = (B, T, H, K), (B, T, H, K), (B, T, H, U), (H, U, D), (B, T, D)
  return [rng.normal(size=s).astype(np.float32) for s in shapes]


def held(x, name, tile, scale, floor):
  codes, s = oracle.quantize(x.astype(np.float32), name, tile, scale, floor)
  return (codes * oracle.spread_scales(s, x.shape, tile)).astype(np.float64)


def transcription(q, k, v, w, dy, segments=None):
  """Equations in float64, with the operands quantized where the report does."""
  q, k, v = (z.astype(np.float64) for z in (q, k, v))
  allowed = np.tril(np.ones((T, T), bool))[None, None]
  if segments is not None:
    allowed = allowed & (segments[:, None, :, None] == segments[:, None, None, :])
  s = np.where(allowed, np.einsum("bthk,bshk->bhts", q, k) * SCALE, -np.inf)
  p = np.exp(s - s.max(-1, keepdims=True))
  p /= p.sum(-1, keepdims=True)
  o = np.einsum("bhts,bshu->bthu", p, v).reshape(B * T, H * U)
  dy = dy.reshape(B * T, D)
  w_q = held(w.reshape(H * U, D), "e4m3", (128, 128), "fp32", 1e-4)
  y = held(o, "e4m3", (1, 128), "pow2", 1e-4) @ w_q
  kept = held(o, "e5m6", (1, 128), "pow2", 1e-4)
  do = (held(dy, "e4m3", (1, 128), "fp32", 1e-30) @ w_q.T).reshape(B, T, H, U)
  dw = held(kept, "e4m3", (128, 1), "fp32", 1e-4).T @ held(dy, "e4m3", (128, 1), "fp32", 1e-30)
  delta = np.sum(do * kept.reshape(B, T, H, U), -1).transpose(0, 2, 1)
  ds = p * (np.einsum("bthu,bshu->bhts", do, v) - delta[..., None]) * SCALE
  return (y.reshape(B, T, D), np.einsum("bhts,bshk->bthk", ds, k),
          np.einsum("bhts,bthk->bshk", ds, q), np.einsum("bhts,bthu->bshu", p, do),
          dw.reshape(H, U, D))


@pytest.mark.parametrize("packed", [False, True])
def test_forward_and_gradients(packed):
  """Oracle: numpy float64 transcription with quantized operands, output kept in E5M6."""
  q, k, v, w, dy = draw()
  segments = np.sort(np.random.default_rng(3).integers(0, 3, (B, T))) if packed else None

  def run(q, k, v, w, dy):
    y, pull = jax.vjp(lambda *z: attention.attend(*z, segments, RECIPE, scale=SCALE), q, k, v, w)
    return y, *pull(dy)

  for got, want in zip(jit(run)(q, k, v, w, dy), transcription(q, k, v, w, dy, segments),
                       strict=True):
    # A rounding of o in fp32 may move a code; one of E4M3's steps in a few thousand products.
    assert np.linalg.norm(got - want) < 5e-4 * np.linalg.norm(want)


def test_the_output_is_kept_once_in_twelve_bits():
  """Oracle: bytes by hand. Kept of o: 12 bits an element and a scale byte a tile, nothing else."""
  q, k, v, w, _ = (jnp.asarray(z, jnp.bfloat16) for z in draw())
  _, pull = jax.eval_shape(
      lambda *z: jax.vjp(lambda *a: attention.attend(*a, None, RECIPE, scale=SCALE), *z),
      q, k, v, w)
  sizes = sorted((x.shape, str(x.dtype)) for x in jax.tree.leaves(pull))
  codes, tiles = (B * T, 3 * H * U // 2), (B * T, -(-H * U // 128))
  assert sizes.count((codes, "uint8")) == 1 and sizes.count((tiles, "uint8")) == 1
  assert not [s for s in sizes if s[0] in ((B, T, H, U), (B, H, T, U), (B * T, H * U))
              and s != ((B, T, H, U), "bfloat16")]
  assert sizes.count(((B, T, H, U), "bfloat16")) == 1  # the values


def test_choice():
  """Law: joined only where the recipe keeps the output in E5M6 and attention comes in halves."""
  w = jnp.zeros((H, U, D))
  assert attention.joined(RECIPE, w, "auto", w) and attention.joined(RECIPE, w, "xla", w)
  assert not attention.joined(RECIPE, w, "reference", w)
  for name in ("bf16", "per_tensor_delayed"):  # E4M3 is too little for attention's own backward
    assert not attention.joined(recipe_lib.resolve(config.Runtime(recipe=name)), w, "auto", w)
  assert not attention.joined(None, w, "auto", w)
