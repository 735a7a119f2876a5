"""Routed experts under a recipe."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax import config, ops
from dsv3_jax.fp8 import accumulate, grouped, weights
from dsv3_jax.fp8 import recipe as recipe_lib
from dsv3_jax.model import layers, moe, routing
from tests.fp8.test_linear import draw, metric, resolve, values
from tests.quick import jit

P, D, F, E, A, BLOCK = 192, 150, 130, 5, 2, 16
RNG = np.random.default_rng(0)
# Expert 4 gets nothing, expert 0 every token: both ends of what routing can do.
EXPERTS = np.stack([np.zeros(P, int), RNG.integers(1, 4, P)], 1).astype(np.int32)
GATES = RNG.uniform(0.1, 1, (P, A)).astype(np.float32)
X, DY = draw(P, D), draw(P, D, seed=2) * 1e-5
WS = [draw(E * a, b, seed=i, spread=0).reshape(E, a, b) * 0.1
      for i, (a, b) in enumerate(((D, F), (D, F), (F, D)), 3)]


def run(f):
  """Output and gradients of `f(x, gates, *ws, plan)`: y, dx, dgate, dw_gate, dw_up, dw_down."""
  def both(x, gates, ws, dy):
    plan = moe.plan(jnp.asarray(EXPERTS), E, BLOCK)
    y, pull = jax.vjp(lambda x, gates, ws: f(x, gates, *ws, plan), x, gates, ws)
    dx, dgate, dws = pull(dy)
    return y, dx, dgate, *dws

  return jit(both)(X, GATES, WS, DY)


def under(recipe):
  return run(lambda *args: grouped.experts(*args, recipe))


def expected(r):
  """The same in float64 on the oracle's operands, expert by expert.

  Quantization along channels does not depend on the order of rows; Wgrad's along tokens does, so
  its tiles are those of the rows of each expert in the order of tokens, from their own first row.
  """
  q = lambda z, operand, floor: values(np.asarray(z, np.float32), operand, floor)
  short = lambda o: dataclasses.replace(o, tile=(BLOCK, 1))
  tokens = lambda z, o, floor: q(np.pad(z, ((0, -len(z) % BLOCK), (0, 0))), short(o), floor)
  sigmoid = lambda z: 1 / (1 + np.exp(-z))
  x, dy = q(X, r.dispatch_x, r.floor), q(DY, r.dispatch_dy, r.gradient_floor)
  y, dx, dgates = np.zeros((P, D)), np.zeros((P, D)), np.zeros((P, A))
  dws = [np.zeros((E, *w.shape[1:])) for w in WS]
  for e in range(E):
    rows, choice = np.nonzero(EXPERTS == e)
    if not len(rows):
      continue
    wg, wu, wd = (q(w[e], r.fprop_w, r.floor) for w in WS)
    gate = GATES[rows, choice].astype(np.float64)[:, None]
    g, u = x[rows] @ wg, x[rows] @ wu
    y[rows] += q(g * sigmoid(g) * u * gate, r.fprop_x, r.floor) @ wd
    g, u = q(g, r.swiglu_cache, r.floor), q(u, r.swiglu_cache, r.floor)
    h, dh = g * sigmoid(g) * u, dy[rows] @ wd.T
    dgates[rows, choice] = (dh * h).sum(1)
    dg = dh * gate * u * sigmoid(g) * (1 + g * (1 - sigmoid(g)))
    du = dh * gate * g * sigmoid(g)
    for i, (w, d) in enumerate(((wg, dg), (wu, du))):
      dx[rows] += q(d, r.dgrad_dy, r.gradient_floor) @ w.T
      dws[i][e] = tokens(x[rows], r.wgrad_x, r.floor).T @ tokens(d, r.wgrad_dy, r.gradient_floor)
    dws[2][e] = tokens(h * gate, r.wgrad_x, r.floor).T @ tokens(dy[rows], r.wgrad_dy,
                                                                r.gradient_floor)
  return y, dx, dgates, *dws


def test_the_layer_against_float64_on_its_operands():
  """Oracle: float64, expert by expert: quantized before the spread, gates before the last matmul,
  SwiGLU inputs from their FP8 copies, tiles along tokens that never mix experts."""
  for name, got, want in zip(("y", "dx", "gates", "w_gate", "w_up", "w_down"),
                             under(resolve("v3")), expected(resolve("v3")), strict=True):
    # fp32 against float64 moves a few codes by one; a tile over two experts would show as 1e-4.
    assert metric(got, want) < 1e-5, name


def test_the_layer_against_the_unquantized():
  """Oracle: the model's own path in fp32; and the report's claims: finer tiles are better than one
  scale a tensor where tokens differ, E4M3 better than E5M2 then."""
  def plain(x, gates, wg, wu, wd, plan):
    x_MD, gate_M = moe.spread(x, plan), moe.spread_gates(gates, plan)
    matmul = lambda x, w: ops.grouped_gemm(x, w, plan.group_m, plan.used)
    h_MF = layers.swiglu(matmul(x_MD, wg), matmul(x_MD, wu)) * gate_M[:, None]
    return moe.collect(matmul(h_MF, wd), plan)

  want = run(plain)
  error = {name: [metric(a, b) for a, b in zip(under(resolve(name)), want, strict=True)]
           for name in ("v3", "per_tensor_current", "hybrid_e5m2")}
  assert max(error["v3"]) < 5e-3  # up to four quantized matmuls in a row
  assert max(error["v3"]) < 0.5 * max(error["per_tensor_current"])
  assert sum(error["v3"][1:]) < sum(error["hybrid_e5m2"][1:]) < 5e-2  # y has no gradient in it


def test_unquantized_operands_change_nothing():
  """Law: with every operand in the compute dtype the layer's own derivatives are autodiff's."""
  r = recipe_lib.Recipe(**{
      f.name: recipe_lib.Operand() if f.type is recipe_lib.Operand or f.type == "Operand" else
      getattr(resolve("v3"), f.name) for f in dataclasses.fields(recipe_lib.Recipe)})

  def layer(recipe):
    def f(x, gates, wg, wu, wd, plan):
      params = {"w_gate_EDF": wg, "w_up_EDF": wu, "w_down_EFD": wd}
      shell = type("Layer", (), {k: {...: v} for k, v in params.items()})()
      shell.cfg = config.MoE(experts=E, active=A, ffn_dim=F, groups=1, active_groups=1)
      routed = routing.Routing(jnp.asarray(EXPERTS), gates, None)
      return moe.MoELayer.experts(shell, x, routed, "auto", recipe)
    return run(f)

  for a, b in zip(layer(r), layer(None), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6 * np.abs(b).max())


def test_prepared_experts_give_the_same():
  """Law: weights quantized beforehand, and their masters get the gradient."""
  r = resolve("v3")
  names = ("w_gate_EDF", "w_up_EDF", "w_down_EFD")

  def prepared(x, gates, wg, wu, wd, plan):
    masters = dict(zip(names, (wg, wu, wd), strict=True))
    ws = weights.with_masters(jax.lax.stop_gradient(weights.prepare(masters, r)), masters)
    assert ws["w_gate_EDF"].fprop.shape == (E, D, F)
    return grouped.experts(x, gates, *(ws[n] for n in names), plan, r)

  for a, b in zip(run(prepared), under(r), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-12)


def test_what_the_experts_keep():
  """Oracle: the sizes: a byte an element for x (once a token) and the SwiGLU inputs."""
  r = resolve("v3")
  blocks = P * A // BLOCK + E

  def pullback(x, gates, ws):
    plan = moe.plan(jnp.asarray(EXPERTS), E, BLOCK)
    return jax.vjp(lambda x, gates: grouped.experts(x, gates, *ws, plan, r), x, gates)[1]

  ws = jax.eval_shape(lambda ws: [weights.quantized(weights.bare(w, 1, 1), r) for w in ws], WS)
  shapes = jax.eval_shape(pullback, jax.ShapeDtypeStruct((P, D), jnp.bfloat16), GATES, ws)
  rows = sorted((x.dtype.name, x.shape) for x in jax.tree.leaves(shapes)
                if x.shape and x.shape[0] in (P, blocks * BLOCK) and x.ndim == 2)
  M = blocks * BLOCK
  assert rows == sorted([("uint8", (P, D)), ("uint8", (P, 2)),  # codes, UE8M0 scales
                         ("uint8", (M, F)), ("float32", (M, 2)), ("uint8", (M, F)),
                         ("float32", (M, 2)), ("float32", (P, A)), ("int32", (P, A))])


def test_bits_in_grouped_matmuls():
  """Oracle: fp32 sums, from which sums of 36 bits do not differ and sums of 10 bits clearly do."""
  expert_PA = jnp.asarray(EXPERTS[:24])
  plan = moe.plan(expert_PA, E, BLOCK)
  r = resolve("v3")

  def both(bits):
    recipe = dataclasses.replace(r, bits=bits)
    x = grouped.spread(weights.hold(X[:24, :64], r.fprop_x, r.floor), plan)
    dy = grouped.spread(weights.hold(DY[:24, :40], r.dgrad_dy, r.gradient_floor), plan)
    w = weights.hold(WS[0][:, :64, :40], r.fprop_w, r.floor)
    return (grouped.gemm(x, w, plan, recipe, "auto"),
            grouped.wgrad(x, dy, plan, E, recipe, "auto"))

  exact, wide, narrow = (jit(both, static_argnums=0)(bits) for bits in (0, 36, 10))
  for a, b, c in zip(exact, wide, narrow, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6 * np.abs(a).max())
    assert 1e-6 < metric(a, c) < 1e-2


@pytest.mark.parametrize("interval, period", [(0, 0), (64, 64), (100, 128)])
def test_promotion_over_the_blocks_of_an_expert(interval, period):
  """Oracle: `accumulate.matmul` of each expert's rows alone: one register through its blocks."""
  block, rng = 32, np.random.default_rng(interval)
  expert_PA = rng.integers(0, 3, (150, 1)).astype(np.int32) * 2  # experts 0, 2, 4
  plan = moe.plan(jnp.asarray(expert_PA), E, block)
  r = dataclasses.replace(resolve("v3"), bits=14, interval=interval)
  x, dy = rng.normal(size=(150, 24)), rng.normal(size=(150, 20))
  tile = lambda o: dataclasses.replace(o, tile=(block, 1))

  def run(x, dy):
    x, dy = grouped.spread(x, plan), grouped.spread(dy, plan)
    held = weights.hold(x, tile(r.wgrad_x), 1e-4), weights.hold(dy, tile(r.wgrad_dy), 1e-30)
    return grouped.wgrad(*held, plan, E, r, "auto"), *(weights.value(h) for h in held)

  dw, x_rows, dy_rows = (np.asarray(z) for z in jit(run)(x.astype(np.float32),
                                                         dy.astype(np.float32)))
  group_M = np.repeat(np.asarray(plan.group_m), block)
  group_M[int(plan.used) * block:] = -1
  for e in range(E):
    rows = np.flatnonzero(group_M == e)
    if not len(rows):
      assert not dw[e].any()
      continue
    want = accumulate.matmul(x_rows[rows].T, dy_rows[rows], bits=14, interval=period)
    np.testing.assert_array_equal(dw[e], want)
    assert len(rows) > block or period == 0  # several blocks, or the test shows nothing
