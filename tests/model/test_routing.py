"""Expert selection, gates, balance losses and the bias update: numpy, laws, hand-made cases."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_jax import config
from dsv3_jax.model import routing
from tests.oracles import deepseek_v3 as oracle
from tests.oracles.tolerance import assert_close
from tests.quick import jit

P, D = 6, 5
MOE = config.MoE(experts=12, active=3, groups=4, active_groups=2, group_top=2)
SHAPES = [
    MOE,
    config.MoE(experts=12, active=1, groups=12, active_groups=3, group_top=1),
    config.MoE(experts=12, active=6, groups=4, active_groups=2, group_top=3, scale=1.0),
    config.MoE(experts=12, active=12, groups=1, active_groups=1),
    config.MoE(experts=12, active=4, groups=3, active_groups=1, group_top=1, gate="softmax"),
    config.MoE(experts=12, active=5, groups=6, active_groups=6, normalize=False),
]
quickly = settings(max_examples=15, deadline=None)
# One number a case: the arrays come from numpy, so that a case is one compiled call.
seeds = st.integers(0, 2**32 - 1)


@functools.cache
def route(cfg):
  return jit(functools.partial(routing.route, cfg=cfg))


@functools.cache
def select(cfg):
  return jit(functools.partial(routing.select, cfg=cfg))


# Compiled once for the two tests that use them; run op by op they take seconds.
sequence_balance = jit(routing.sequence_balance, static_argnums=1)
expert_balance = jit(routing.expert_balance)
batch_balance = jit(routing.batch_balance, static_argnums=1)


def draw(seed, cfg=MOE):
  rng = np.random.default_rng(seed)
  x = rng.normal(size=(P, D)).astype(np.float32)
  w = rng.normal(size=(D, cfg.experts)).astype(np.float32)
  # Biases from useful to overwhelming, of either sign.
  size = rng.choice([0.01, 0.3, 3.0])
  return x, w, (size * rng.normal(size=cfg.experts) + rng.choice([-4, 0, 4])).astype(np.float32)


@pytest.mark.parametrize("cfg", SHAPES, ids=range(len(SHAPES)))
@given(seed=seeds)
@quickly
def test_route(cfg, seed):
  """Oracle: numpy transcription of eq. 13-16 with -inf for the masked groups."""
  x, w, bias = draw(seed, cfg)
  got = route(cfg)(x, w, bias)
  expected = oracle.route(x.astype(float), w.astype(float), bias.astype(float), cfg)
  assert_close(got.affinity_PE, expected.affinity)
  # The order within a token's choices may differ where two biased affinities round alike.
  order, order64 = np.argsort(got.expert_PA, axis=1), np.argsort(expected.chosen, axis=1)
  sort = lambda x, o: np.take_along_axis(np.asarray(x), o, axis=1)
  np.testing.assert_array_equal(sort(got.expert_PA, order), sort(expected.chosen, order64))
  assert_close(sort(got.gate_PA, order), sort(expected.gate, order64))


@pytest.mark.parametrize("cfg", SHAPES, ids=range(len(SHAPES)))
@given(seed=seeds)
@quickly
def test_laws_of_a_selection(cfg, seed):
  """Law: A distinct experts in at most M groups; gates sum to scale if normalised."""
  x, w, bias = draw(seed, cfg)
  expert, gate, _ = map(np.asarray, route(cfg)(x, w, bias))
  assert expert.shape == gate.shape == (P, cfg.active)
  assert expert.min() >= 0 and expert.max() < cfg.experts
  for row in expert:
    assert len(set(row)) == cfg.active
    assert len(set(row // (cfg.experts // cfg.groups))) <= cfg.active_groups
  assert (gate > 0).all()
  if cfg.normalize:
    assert_close(gate.sum(1), np.full(P, cfg.scale))


@given(seed=seeds)
@quickly
def test_bias_moves_the_choice_and_not_the_gate(seed):
  """Law: whatever the biases, a gate is the unbiased affinity over the chosen ones' sum."""
  x, w, bias = draw(seed)
  got, unbiased = route(MOE)(x, w, bias), route(MOE)(x, w, 0 * bias)
  np.testing.assert_array_equal(got.affinity_PE, unbiased.affinity_PE)
  picked = np.take_along_axis(np.asarray(unbiased.affinity_PE, float), np.asarray(got.expert_PA), 1)
  assert_close(got.gate_PA, MOE.scale * picked / picked.sum(1, keepdims=True))


@given(seed=seeds, shift=st.sampled_from([-8.0, -0.5, 0.25, 4.0]))
@quickly
def test_a_constant_on_all_biases_changes_nothing(seed, shift):
  """Law: shift invariance. Masking groups with 0 breaks it once biased affinities are negative."""
  rng = np.random.default_rng(seed)
  # Multiples of 1/64 with no two alike in a row: every sum is exact and nothing ties.
  affinity = np.stack([rng.permutation(64)[:MOE.experts] for _ in range(P)]) / np.float32(64)
  bias = (rng.integers(-64, 64, MOE.experts) / 64 + np.arange(MOE.experts) / 1024)
  affinity, bias = affinity.astype(np.float32), bias.astype(np.float32)
  np.testing.assert_array_equal(select(MOE)(affinity, bias),
                                select(MOE)(affinity, bias + np.float32(shift)))


def test_group_mask_with_negative_affinities():
  """Oracle: by hand. Groups 0 and 1 win; a mask of 0 would let in the experts of 2 and 3."""
  cfg = config.MoE(experts=8, active=3, groups=4, active_groups=2, group_top=2)
  affinity = jnp.array([[.9, .1, .8, .1, .7, .1, .6, .1]], jnp.float32)
  bias = jnp.full((8,), -2.0)
  assert select(cfg)(affinity, bias).tolist() == [[0, 2, 1]]


def test_group_score_sums_the_largest_only():
  """Oracle: by hand. Group 0 has the best single expert, group 1 the best sum of two."""
  affinity = jnp.array([[.9, .0, .0, .6, .5, .0]], jnp.float32)
  for top, expected in ((1, [0, 1]), (2, [3, 4]), (3, [3, 4])):
    cfg = config.MoE(experts=6, active=2, groups=2, active_groups=1, group_top=top)
    assert select(cfg)(affinity, jnp.zeros(6)).tolist() == [expected]


def test_ties_go_to_the_lower_number():
  """Law: equal affinities select the same experts each time, the lowest of the lowest groups."""
  affinity = jnp.full((2, 12), 0.5)
  assert select(MOE)(affinity, jnp.zeros(12)).tolist() == [[0, 1, 2]] * 2


def test_router_works_in_fp32_for_bf16_inputs():
  """Oracle: numpy on the rounded inputs; bf16 logits would be off by a percent."""
  x, w, bias = draw(0)
  x, w = jnp.asarray(x, jnp.bfloat16), jnp.asarray(w, jnp.bfloat16)
  got = route(MOE)(x, w, bias)
  assert got.gate_PA.dtype == got.affinity_PE.dtype == jnp.float32
  expected = oracle.route(*(np.asarray(a.astype(jnp.float32), float) for a in (x, w)),
                          bias.astype(float), MOE)
  assert_close(got.affinity_PE, expected.affinity)


def test_no_gradient_reaches_the_bias():
  """Law: the selection is not differentiated (2.1.2)."""
  x, w, bias = draw(1)
  g = jit(jax.grad(lambda b: (routing.route(x, w, b, MOE).gate_PA ** 2).sum()))(bias)
  assert not np.any(g)


# --- balance ------------------------------------------------------------------------------------


def affinity_of_two_sequences(T=7, seed=0):
  rng = np.random.default_rng(seed)
  return rng.uniform(0.01, 1, (2, T, MOE.experts)).astype(np.float32)


@pytest.mark.parametrize("padded", [0, 3])
def test_balance_losses(padded):
  """Oracle: numpy transcription of eq. 17-20, V2's expert-level and the batch-wise loss."""
  s = affinity_of_two_sequences()
  valid = np.ones(s.shape[:2], np.float32)
  valid[1, 7 - padded:] = 0
  rng = np.random.default_rng(1)
  chosen = np.argsort(rng.normal(size=s.shape))[..., :MOE.active]
  kept = [oracle.Routing(s[b][valid[b] > 0].astype(float), chosen[b][valid[b] > 0], None)
          for b in range(2)]
  A = MOE.active
  assert_close(sequence_balance(s, A, valid),
               np.mean([oracle.sequence_balance(r, MOE) for r in kept]))
  assert_close(expert_balance(s, jnp.asarray(chosen), valid),
               np.mean([oracle.expert_balance(r, MOE) for r in kept]))
  assert_close(batch_balance(s, A, valid), oracle.batch_balance(kept, MOE))


def test_balanced_load_costs_one():
  """Law: equal f and equal P give sum f_i P_i = 1; the factor A is in the count, not the result."""
  s = np.full((1, 12, 12), 0.25, np.float32)
  for t in range(12):
    s[0, t, (t + np.arange(3)) % 12] = 0.5  # each expert is among the top 3 of three tokens
  valid = np.ones((1, 12), np.float32)
  assert_close(sequence_balance(s, 3, valid), 1.0)
  assert_close(batch_balance(s, 3, valid), 1.0)


def test_gradient_flows_through_mean_affinity_alone():
  """Oracle: d/ds of sum f_i P_i with f held, by hand."""
  s = affinity_of_two_sequences(T=4)
  valid = np.ones((2, 4), np.float32)
  got = jit(jax.grad(lambda s: routing.sequence_balance(s, MOE.active, valid)))(s)
  expected = np.zeros(s.shape)
  for b in range(2):
    x = s[b].astype(float)
    f = MOE.experts / (MOE.active * 4) * oracle.unbiased_counts(x, MOE)
    for t in range(4):
      total = x[t].sum()
      expected[b, t] = (f / total - (f @ x[t]) / total**2) / 4 / 2  # 4 tokens, 2 sequences
  assert_close(got, expected)


# --- statistics and the bias --------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bias_follows_the_load(dtype):
  """Oracle: by hand; overloaded falls, underloaded rises, the mean stays (2.1.2). Always fp32."""
  bias = jnp.array([[0.5, 0.5, 0.5, 0.5], [0, 1, 2, 3]], jnp.float32)
  counts = jnp.array([[4, 1, 1, 2], [3, 3, 3, 3]], dtype)
  new = routing.update_bias(bias, counts, 0.001)
  assert new.dtype == jnp.float32
  np.testing.assert_allclose(new, [[.499, .501, .501, .5], [0, 1, 2, 3]], rtol=1e-7)


def test_bias_stays_at_speed_zero():
  """Law: gamma = 0 changes no bit (4.2: the last 500B tokens)."""
  bias = jnp.array([0.1, -0.7, 1e-9], jnp.float32)
  np.testing.assert_array_equal(routing.update_bias(bias, jnp.array([1.0, 5, 9]), 0.0), bias)
  again = routing.update_bias(bias, jnp.array([1.0, 5, 9]), jnp.float32(0))
  np.testing.assert_array_equal(again, bias)


def test_max_vio():
  """Oracle: (largest load - mean) / mean by hand; 0 without tokens."""
  got = routing.max_vio(jnp.array([[6.0, 1, 1, 0], [2, 2, 2, 2], [0, 0, 0, 0]]))
  np.testing.assert_allclose(got, [2, 0, 0])


def test_expert_counts():
  """Oracle: numpy bincount; a token that is not valid counts nowhere."""
  rng = np.random.default_rng(0)
  chosen, valid = rng.integers(0, 5, (9, 2)), rng.integers(0, 2, 9)
  np.testing.assert_array_equal(routing.expert_counts(jnp.asarray(chosen), 5),
                                np.bincount(chosen.ravel(), minlength=5))
  np.testing.assert_array_equal(
      routing.expert_counts(jnp.asarray(chosen), 5, jnp.asarray(valid, jnp.float32)),
      np.bincount(chosen[valid > 0].ravel(), minlength=5))
