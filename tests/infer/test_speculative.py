"""Speculative decoding: what modules draft, what is kept of it, and that nothing else changes."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from dsv3_jax import config
from dsv3_jax.config import ConfigError
from dsv3_jax.infer import cache as cache_lib
from dsv3_jax.infer import draft, forward, generate, parameters, sampler, verify
from dsv3_jax.infer.sampler import Sampling
from tests.model import small
from tests.oracles import deepseek_v3 as oracle
from tests.oracles.tolerance import assert_close
from tests.quick import jit

V = 5  # few tokens: drafts are often right
CFG = config.replace(small.BASE, vocab_size=V, layers=2)


def built(depth, **changes):
  """(config, model, generator)."""
  cfg = config.replace(CFG, mtp_depth=depth, **changes)
  model = small.build(cfg, seed=depth + 10)
  _, params, buffers = small.split(model)
  return cfg, model, generate.Generator(cfg, params, buffers, small.RUNTIME)


def expected_drafts(params, biases, cfg, tokens, drafts):
  """Logits [K, V] of the drafts after `tokens`, in float64 and over the whole sequence."""
  n, modules, inputs, found = len(tokens) - 1, min(cfg.mtp_depth, len(drafts)), None, []
  all, x, segments = np.array([*tokens, *drafts]), params["embedding_VD"], np.zeros(99, int)
  h = x[all[:n]]
  for i in range(cfg.dense_layers):
    h, _ = oracle.block(h, oracle.layer(params["dense"], i), None, cfg, segments[:n])
  for i in range(cfg.moe_layers):
    h, _ = oracle.block(h, oracle.layer(params["moe"], i), biases["moe"][i], cfg, segments[:n])
  if cfg.mtp_input == "normed":
    h = oracle.rms_norm(h, params["final_norm_D"], cfg.norm_eps)
  for k in range(1, len(drafts) + 1):
    depth = min(k, modules)
    p = oracle.layer(params["mtp"], depth - 1)
    norm = lambda x, name, p=p: oracle.rms_norm(x, p[name], cfg.norm_eps)
    inputs = h if k <= modules else np.concatenate([inputs, h[-1:]])
    h = (norm(x[all[depth:depth + len(inputs)]], "embed_norm_D") @ p["w_embed_DD"]
         + norm(inputs, "hidden_norm_D") @ p["w_hidden_DD"])
    h, _ = oracle.block(h, p["block"], biases["mtp"][depth - 1], cfg, segments[:len(inputs)])
    found.append(norm(h[-1], "out_norm_D") @ params["head_DV"])
  return np.stack(found)


@pytest.mark.parametrize("depth, drafts, paged", [(1, 3, True), (3, 3, False), (2, 4, True)])
def test_drafts_are_the_modules(depth, drafts, paged):
  """Oracle: the training equations in numpy over the whole sequence each round, whatever was kept
  of the rounds before; ragged prompts, one of a single token."""
  cfg = config.replace(CFG, mtp_depth=depth, mtp_input="normed" if depth == 1 else "raw")
  model = small.build(cfg, seed=depth + 10)
  params, biases = small.for_oracle(model)
  _, p, b = small.split(model)
  w = parameters.prepare(p, b, cfg)
  rng = np.random.default_rng(drafts)
  B, K = 3, drafts
  lengths = np.array([1, 6, 3], np.int32)
  text_BS = rng.integers(0, V, (B, 40)).astype(np.int32)  # what is kept follows this, not p
  chosen_BK = rng.integers(0, V, (B, K)).astype(np.int32)  # drafts, whatever their logits
  prompt_BT = np.where(np.arange(8) < lengths[:, None], text_BS[:, :8], 1).astype(np.int32)
  rows = np.arange(B)

  def start(cache, token_B):
    h_BTD, _, cache = forward.forward(w, cache, prompt_BT, lengths, cfg, small.RUNTIME, True)
    return draft.prefill(w, cache, h_BTD, prompt_BT, token_B, K, cfg, small.RUNTIME)

  def propose(cache, tail):
    logits = []
    def draw(k, x_BV):
      logits.append(x_BV)
      return jnp.asarray(chosen_BK[:, k])
    _, kept, cache = draft.propose(w, cache, tail, np.ones(B, bool), K, draw, cfg, small.RUNTIME)
    return jnp.stack(logits, 1), kept, cache

  def check(cache, tail, newest_B, count_B, next_BT):
    tokens_BT = jnp.concatenate([newest_B[:, None], chosen_BK], 1)
    h_BTD, _, after = forward.forward(w, cache, tokens_BT, np.full(B, K + 1, np.int32), cfg,
                                      small.RUNTIME)
    # What was kept is what stands in the text: only those positions' representations are read.
    cache = cache_lib.Cache(after.layers, cache.lengths_B + count_B, cache.pages_BN)
    return cache, draft.Tail(draft.main_input(w, h_BTD, cfg), next_BT, count_B, tail)

  start, propose, check = jit(start), jit(propose), jit(check)
  if paged:
    cache = cache_lib.make_paged(cfg, B, 3 * 12, 4, 12)
    cache = cache_lib.Cache(cache.layers, cache.lengths_B,
                            jnp.asarray(rng.permutation(36).reshape(3, 12), jnp.int32))
  else:
    cache = cache_lib.make(cfg, B, 48)
  tail, cache = start(cache, text_BS[rows, lengths])
  at_B = lengths.copy()  # of the newest tokens
  for count_B in ([1, K + 1, 2], [K + 1, 1, K + 1], [2, 2, 1]):
    count_B = np.array(count_B, np.int32)
    logits, kept, cache = propose(cache, tail)
    for row in range(B):
      expected = expected_drafts(params, biases, cfg, text_BS[row, :at_B[row] + 1], chosen_BK[row])
      assert_close(logits[row], expected, "float32")
    for row in range(B):  # as many drafts as are kept are right
      text_BS[row, at_B[row] + 1:at_B[row] + count_B[row]] = chosen_BK[row, :count_B[row] - 1]
    next_BT = text_BS[rows[:, None], at_B[:, None] + 1 + np.arange(K + 1)]
    cache, tail = check(cache, kept, text_BS[rows, at_B], count_B, next_BT)
    at_B += count_B


@pytest.mark.parametrize("depth, drafts", [(1, 1), (2, 3)])
def test_greedy_is_plain_greedy(depth, drafts):
  """Law: drafts change nothing but the number of rounds, with a bias and a stop token, and beside
  a row that has a penalty."""
  _, _, generator = built(depth)
  prompts, steps = [[3, 1, 4, 1], [2], [2, 4, 3, 3, 0, 1, 2]], 20
  settings = [Sampling(), Sampling(repetition_penalty=1.4), Sampling()]
  bias_V = np.array([0, 0, 0.7, 0, -np.inf], np.float32)
  plain = generator(prompts, steps, settings, stop=(0,), bias_V=bias_V)
  found = generator(prompts, steps, settings, stop=(0,), bias_V=bias_V, drafts=drafts)
  assert sum(f.accepted[0] for f in found) > 0  # some drafts were right
  for a, b in zip(plain, found):
    assert (a.tokens, a.finish) == (b.tokens, b.finish)
    np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5)
    assert list(b.accepted) == sorted(b.accepted, reverse=True)
    kept, drawn = b.rounds + sum(b.accepted), len(b.tokens) - 1 + (b.finish == "stop")
    assert kept - drafts <= drawn <= kept  # the last round may draw more than was asked for


def test_sampled_tokens_have_their_distribution():
  """Oracle: a chi-square test of three drawn tokens against the product of whole forward passes,
  with drafts drawn under top-k; p above 1e-4. Law: a row's draws depend on nothing but itself."""
  _, model, generator = built(1)
  n, prompt, setting = 2000, [3, 1, 4], dict(temperature=1.7, top_k=4)
  drawn = generator([prompt] * n, 3, [Sampling(seed=i, **setting) for i in range(n)], drafts=2)
  assert sum(f.accepted[1] for f in drawn) > n / 10  # and not by rejecting everything
  for i in (3, 4):
    alone, = generator([prompt], 3, Sampling(seed=i, **setting), drafts=2)
    assert (alone.tokens, alone.rounds) == (drawn[i].tokens, drawn[i].rounds)
  r = sampler.rows([Sampling(**setting)] * V**2)
  whole = np.array([[*prompt, a, b] for a, b in itertools.product(range(V), repeat=2)], np.int32)
  logits = np.asarray(small.forward(model, whole).logits_BTV)[:, len(prompt) - 1:]
  p = np.exp(np.stack([sampler.scores(logits[:, i], r) for i in range(3)], 1).astype(np.float64))
  p = p.reshape(V, V, 3, V)
  joint = p[0, 0, 0][:, None, None] * p[:, 0, 1][:, :, None] * p[:, :, 2]
  counts = np.zeros((V, V, V))
  for f in drawn:
    counts[tuple(f.tokens)] += 1
  assert counts[joint == 0].sum() == 0
  likely = n * joint >= 5
  rest = (joint > 0) & ~likely
  found, expected = counts[likely].tolist(), (n * joint[likely]).tolist()
  if rest.any():
    found, expected = [*found, counts[rest].sum()], [*expected, n * joint[rest].sum()]
  expected = np.array(expected) * n / np.sum(expected)
  assert stats.chisquare(found, expected).pvalue > 1e-4


def test_kept_and_replaced():
  """Oracle: the probabilities of the rule by hand, p = (.5, .3, .2), q = (.2, .2, .6)."""
  n, p, q = 20_000, np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.2, 0.6])
  scores = np.log(np.broadcast_to(p, (n, 2, 3))).astype(np.float32)
  draft_scores = np.log(np.broadcast_to(q, (n, 1, 3))).astype(np.float32)
  seeds, place = np.arange(n, dtype=np.uint32), np.full(n, 7, np.int32)
  drafts = jit(sampler.draw)(draft_scores[:, 0], seeds, place)[:, None]
  tokens, count = map(np.asarray, jit(verify.accept)(drafts, draft_scores, scores, seeds, place))
  kept = count == 2
  assert stats.binomtest(int(kept.sum()), n, np.minimum(p, q).sum()).pvalue > 1e-4
  assert stats.chisquare(np.bincount(tokens[:, 0], minlength=3), n * p).pvalue > 1e-4
  bonus = np.bincount(tokens[kept, 1], minlength=3)  # independent of the draft
  assert stats.chisquare(bonus, kept.sum() * p).pvalue > 1e-4
  assert (tokens[kept, 0] == np.asarray(drafts)[kept, 0]).all()
  assert set(tokens[~kept, 0].tolist()) == {0, 1}  # where p > q


def test_errors():
  """Law: drafts need a module."""
  _, _, generator = built(0)
  with pytest.raises(ConfigError, match="mtp_depth=0"):
    generator([[1]], 2, drafts=1)
  with pytest.raises(ConfigError, match="drafts=-1"):
    generator([[1]], 2, drafts=-1)
