"""Decoding over a latent cache: absorbed attention, chunks, ragged batches, pages."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax import config
from dsv3_jax.config import ConfigError
from dsv3_jax.infer import cache as cache_lib
from dsv3_jax.infer import forward, parameters
from tests.model import small
from tests.oracles.tolerance import assert_close
from tests.quick import jit

CFG = small.BASE
T = 12


@functools.cache
def weights(q_rank=CFG.attention.q_rank, shared=CFG.moe.shared):
  """(model, its parameters for decoding)."""
  cfg = config.replace(CFG, **{"attention.q_rank": q_rank, "moe.shared": shared})
  model = small.build(cfg, seed=3)
  _, params, buffers = small.split(model)
  return model, parameters.prepare(params, buffers, cfg), cfg


@functools.cache
def compiled(cfg, fresh):
  def run(w, cache, tokens_BT, new_B):
    h_BTD, counts_LE, cache = forward.forward(w, cache, tokens_BT, new_B, cfg, small.RUNTIME, fresh)
    return forward.readout(w, h_BTD, cfg), counts_LE, cache
  return jit(run)


def step(w, cache, tokens_BT, new_B, cfg, fresh=False):
  return compiled(cfg, fresh)(w, cache, tokens_BT, new_B)


def expected(model, tokens_BT):
  return np.asarray(small.forward(model, tokens_BT).logits_BTV)


@pytest.mark.parametrize("q_rank, shared", [(6, 1), (0, 0)])
@pytest.mark.parametrize("chunks", [(12,), (5, 4, 1, 1, 1)])
def test_chunks_equal_the_whole(q_rank, shared, chunks):
  """Law: logits over a cache, chunk by chunk, are those of one expanded forward pass."""
  model, w, cfg = weights(q_rank, shared)
  tokens = small.tokens(batch=2, length=T)
  for fresh in (False, True):
    cache, found = cache_lib.make(cfg, 2, T + 3), []
    for start, size in zip(np.cumsum((0, *chunks)), chunks):
      logits, _, cache = step(w, cache, tokens[:, start:start + size], np.full(2, size, np.int32),
                              cfg, fresh and start == 0)
      found.append(np.asarray(logits))
    assert_close(np.concatenate(found, 1), expected(model, tokens), "float32")
    assert cache.lengths_B.tolist() == [T, T]


@pytest.mark.parametrize("fresh", [True, False])
def test_ragged_rows_are_independent(fresh):
  """Law: a row of a batch has its solo logits, whatever stands beside it or pads it."""
  model, w, cfg = weights()
  lengths, rng = [7, 1, 12, 0], np.random.default_rng(1)
  tokens = rng.integers(0, cfg.vocab_size, (4, T)).astype(np.int32)
  cache = cache_lib.make(cfg, 4, T + 1)
  logits, counts_LE, cache = step(w, cache, tokens, np.array(lengths, np.int32), cfg, fresh)
  whole = expected(model, tokens)
  for b, n in enumerate(lengths):
    assert_close(logits[b, :n], whole[b, :n], "float32")
  assert cache.lengths_B.tolist() == lengths
  assert (np.asarray(counts_LE).sum(1) == sum(lengths) * cfg.moe.active).all()
  follow = rng.integers(0, cfg.vocab_size, (4, 1)).astype(np.int32)
  logits, _, cache = step(w, cache, follow, np.array([1, 1, 0, 1], np.int32), cfg)
  assert cache.lengths_B.tolist() == [8, 2, 12, 1]
  for b in (0, 1, 3):
    n = lengths[b]
    solo = np.concatenate([tokens[b:b + 1, :n], follow[b:b + 1]], 1)
    assert_close(logits[b], expected(model, solo)[0, -1:], "float32")


def test_pages_equal_contiguous():
  """Law: a paged cache gives what a contiguous one does, scattered and full of NaN as it may be."""
  _, w, cfg = weights()
  tokens = small.tokens(batch=2, length=T)
  plain, paged = cache_lib.make(cfg, 2, 12), cache_lib.make_paged(cfg, 2, 9, 4, 3)
  assert plain.capacity == paged.capacity == 12
  pages = jnp.asarray([[7, 2, 5], [1, 8, 0]], jnp.int32)
  paged = cache_lib.Cache(tuple(jnp.full_like(x, jnp.nan) for x in paged.layers), paged.lengths_B,
                          pages)
  plain = cache_lib.Cache(tuple(jnp.full_like(x, jnp.nan) for x in plain.layers), plain.lengths_B)
  for start, end, new in ((0, 6, [6, 5]), (6, 7, [1, 1]), (7, 12, [5, 4])):
    new = np.array(new, np.int32)
    a, _, plain = step(w, plain, tokens[:, start:end], new, cfg)
    b, _, paged = step(w, paged, tokens[:, start:end], new, cfg)
    for row in range(2):
      n = new[row]
      assert np.isfinite(a[row, :n]).all()
      assert_close(a[row, :n], b[row, :n], "float32")
  used = np.asarray(pages).reshape(-1)
  untouched = np.setdiff1d(np.arange(9), used)
  assert np.isnan(paged.layers[0][untouched]).all()


def test_bytes():
  """Oracle: facts 1.4: 70,272 bytes a token; FlashMLA's record of 656."""
  v3 = config.preset("v3_671b")
  assert cache_lib.bytes_per_token(v3) == 70_272
  assert cache_lib.bytes_per_token(v3, "fp8") == 61 * 656
  assert cache_lib.bytes_per_token(v3, mtp=True) == 62 * 576 * 2
  cache = cache_lib.make(CFG, 2, 10)
  held = sum(x.nbytes for x in cache.layers)
  assert held == 20 * cache_lib.bytes_per_token(CFG, "float32", mtp=True)


def test_errors():
  """Law: what cannot be is said."""
  with pytest.raises(ConfigError, match="latent"):
    parameters.prepare({}, {}, config.replace(CFG, **{"attention.kind": "gqa"}))
  with pytest.raises(ConfigError, match="float32, bfloat16, fp8"):
    cache_lib.make(CFG, 1, 4, "int8")
  with pytest.raises(ValueError, match="512 \\+ 64"):
    cache_lib.make(CFG, 1, 4, "fp8")
