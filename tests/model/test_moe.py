"""Dispatch plan, row movements and the expert layer: dropless under any load."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_jax import config
from dsv3_jax.model import moe
from tests.model import small
from tests.oracles import deepseek_v3 as oracle
from tests.oracles.tolerance import assert_close
from tests.quick import jit

# (P tokens, A choices, E experts, rows of a block)
SIZES = [(1, 1, 1, 8), (1, 3, 16, 8), (7, 2, 5, 1), (20, 3, 6, 4), (40, 1, 3, 8)]


@functools.cache
def plan(E, block):
  return jax.jit(functools.partial(moe.plan, experts=E, block=block))


def loads(P, A, E, seed):
  """Expert choices [P, A], distinct in a row; uneven, or all on the same experts."""
  rng = np.random.default_rng(seed)
  pull = rng.choice([0.0, 2.0, 50.0]) * rng.normal(size=E)
  return np.argsort(-(pull + rng.normal(size=(P, E))), axis=1)[:, :A].astype(np.int32)


@pytest.mark.parametrize("P,A,E,block", SIZES)
@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=10, deadline=None)
def test_plan_holds_every_pair(P, A, E, block, seed):
  """Law: each (token, choice) stands in exactly one row, in a used block of its own expert."""
  expert = loads(P, A, E, seed)
  p = jax.tree.map(np.asarray, plan(E, block)(expert))
  assert sorted(p.pair_M[p.pair_M < P * A]) == list(range(P * A))
  np.testing.assert_array_equal(p.pair_M[p.row_PA], np.arange(P * A).reshape(P, A))
  np.testing.assert_array_equal(p.group_m[p.row_PA // block], expert)
  assert len(p.pair_M) == len(p.group_m) * block
  assert p.used == -(-np.bincount(expert.ravel(), minlength=E) // block) @ np.ones(E)
  assert (p.pair_M[p.used * block:] == P * A).all()
  assert (np.diff(p.group_m[:p.used]) >= 0).all() and p.group_m.max() < E


@pytest.mark.parametrize("P,A,E,block", SIZES)
def test_all_tokens_on_one_expert(P, A, E, block):
  """Law: the worst load fits, and the other experts' blocks are not used."""
  expert = np.tile(np.arange(E)[::-1][:A], (P, 1)).astype(np.int32)
  p = plan(E, block)(expert)
  assert int(p.used) == A * -(-P // block)
  assert sorted(np.asarray(p.pair_M)[np.asarray(p.pair_M) < P * A]) == list(range(P * A))


@pytest.mark.parametrize("P,A,E,block", SIZES)
def test_spread_and_collect_are_transposes(P, A, E, block):
  """Law: <spread x, y> = <x, collect y>, each is the other's gradient; oracle: numpy loops."""
  rng = np.random.default_rng(0)
  expert = loads(P, A, E, 1)
  M = len(plan(E, block)(expert).pair_M)
  x, y = rng.normal(size=(P, 4)).astype(np.float32), rng.normal(size=(M, 4)).astype(np.float32)
  gate, dgate = rng.uniform(size=(P, A)).astype(np.float32), rng.normal(size=M).astype(np.float32)

  @jit
  def run(expert, x, y, gate, dgate):
    p = moe.plan(expert, E, block)
    a, spread_back = jax.vjp(lambda x: moe.spread(x, p), x)
    b, collect_back = jax.vjp(lambda y: moe.collect(y, p), y)
    g, gate_back = jax.vjp(lambda g: moe.spread_gates(g, p), gate)
    return p, a, b, spread_back(y)[0], collect_back(x)[0], g, gate_back(dgate)[0]

  p, spread, collect, dx, dy, gates, dgates = jax.tree.map(
      np.asarray, run(expert, x, y, gate, dgate))
  rows, row_gates = np.zeros((M, 4)), np.zeros(M)
  sums, gate_sums = np.zeros((P, 4)), np.zeros((P, A))
  for t in range(P):
    for a in range(A):
      row = p.row_PA[t, a]
      rows[row], row_gates[row], gate_sums[t, a] = x[t], gate[t, a], dgate[row]
      sums[t] += y[row]
  np.testing.assert_array_equal(spread, rows)
  np.testing.assert_array_equal(dy, rows)
  assert_close(collect, sums)
  assert_close(dx, sums)
  np.testing.assert_array_equal(gates, row_gates.astype(np.float32))
  np.testing.assert_array_equal(dgates, gate_sums.astype(np.float32))
  np.testing.assert_allclose((spread * y).sum(dtype=float), (x * collect).sum(dtype=float),
                             rtol=1e-5, atol=1e-5)


def test_collect_sums_in_fp32():
  """Oracle: by hand; 256 + 1 + 1 is 256 when summed in bf16."""
  expert = jnp.array([[0, 1, 2]])
  p = jit(lambda e: moe.plan(e, 3, 8))(expert)
  y = np.zeros((len(p.pair_M), 1), np.float32)
  y[np.asarray(p.row_PA[0]), 0] = 256, 1, 1
  assert float(jit(moe.collect)(jnp.asarray(y, jnp.bfloat16), p)[0, 0]) == 258


def test_both_ways_of_sorting():
  """Oracle: numpy's stable argsort; the second way serves numbers too large for one int32."""
  expert = np.random.default_rng(0).integers(0, 5, 300)
  order = np.argsort(expert, kind="stable")
  for experts in (5, 2**31):
    got = moe._sort(jnp.asarray(expert, jnp.int32), experts)
    assert all(g.dtype == jnp.int32 for g in got)
    np.testing.assert_array_equal(got[0], order)
    np.testing.assert_array_equal(got[1], expert[order])


def test_block_rows():
  """Oracle: about a quarter of the mean share, a power of two, from 8 to 64."""
  assert [moe.block_rows(pairs, 16) for pairs in (1, 64, 1024, 2048, 3000, 10**6)] == [
      8, 8, 16, 32, 32, 64]


# --- the layer ----------------------------------------------------------------------------------

CFG = config.replace(small.BASE, **{"moe.experts": 6, "moe.groups": 1, "moe.active_groups": 1,
                                    "moe.active": 2})
# Biases that send tokens: wherever they want, all to experts 1 and 4, none to 0, 2 and 3.
BIASES = {"free": [0] * 6, "hot": [0, 9, 0, 0, 9, 0], "empty": [-9, 0, -9, -9, 0, 0]}


@functools.cache
def layer_call(gemm):
  model = nnx.eval_shape(lambda: moe.MoELayer(CFG, rngs=nnx.Rngs(0)))
  graphdef, params, buffers = small.split(model)
  rng = np.random.default_rng(0)
  params = jax.tree.map(lambda x: jnp.asarray(0.5 * rng.normal(size=x.shape), x.dtype), params)

  def run(params, bias_E, x_BTD):
    layer = nnx.merge(graphdef, params, jax.tree.map(lambda _: bias_E, buffers))
    return layer(x_BTD, moe.MoECall(gemm=gemm))

  return functools.partial(jit(run), params), nnx.to_pure_dict(params)


@pytest.mark.parametrize("gemm", ["xla", "ragged_dot", "reference"])
@pytest.mark.parametrize("tokens", [1, 30])
def test_no_token_is_dropped(gemm, tokens):
  """Oracle: numpy sum over each token's own experts (eq. 12), under even and extreme loads."""
  run, params = layer_call(gemm)
  x = np.random.default_rng(1).normal(size=(1, tokens, CFG.dim)).astype(np.float32)
  params = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
  for name, bias in BIASES.items():
    y, stats = run(jnp.array(bias, jnp.float32), x)
    expected, r = oracle.moe(x[0].astype(float), params, np.array(bias, float), CFG.moe)
    assert_close(y[0], expected)
    np.testing.assert_array_equal(stats.counts_E, oracle.histogram(r.chosen, CFG.moe))
    assert int(stats.counts_E.sum()) == tokens * CFG.moe.active
    assert name != "hot" or stats.counts_E.tolist() == [0, tokens, 0, 0, tokens, 0]
