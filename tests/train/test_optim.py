"""AdamW with selectable moment dtypes."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

from dsv3_jax import config
from dsv3_jax.fp8 import moments
from dsv3_jax.train import checkpoint, optim, state


def _tree(seed: int) -> dict:
  rng = np.random.default_rng(seed)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  return {"moe": {"w_gate_EDF": draw(2, 3, 4, 5), "attn_norm_D": draw(2, 4)},
          "embedding_VD": draw(6, 4), "final_norm_D": draw(4)}


@pytest.mark.parametrize("mu_dtype, clip, decay_vectors", [
    ("float32", 1.0, False), ("float32", 0.0, True), ("bfloat16", 0.5, False)])
def test_equals_optax(mu_dtype, clip, decay_vectors):
  """Oracle: optax's adamw behind its clip_by_global_norm, which has mu_dtype but no nu_dtype."""
  cfg = config.Optim(mu_dtype=mu_dtype, clip_norm=clip, decay_vectors=decay_vectors)
  mask = None if decay_vectors else {"moe": {"w_gate_EDF": True, "attn_norm_D": False},
                                     "embedding_VD": True, "final_norm_D": False}
  parts = [optax.clip_by_global_norm(clip)] if clip else []
  theirs = optax.chain(*parts, optax.adamw(3e-3, cfg.beta1, cfg.beta2, cfg.eps, mu_dtype=mu_dtype,
                                           weight_decay=cfg.weight_decay, mask=mask))
  ours = optim.make_optimizer(cfg)
  a = b = _tree(0)
  state_a, state_b = ours.init(a), theirs.init(b)
  for i in range(1, 6):
    grads = jax.tree.map(lambda g, i=i: g * i, _tree(i))
    up, state_a = ours.update(grads, state_a, a, grad_norm=optax.tree.norm(grads),
                              lr=jnp.float32(3e-3))
    a = optax.apply_updates(a, up)
    up, state_b = theirs.update(grads, state_b, b)
    b = optax.apply_updates(b, up)
  # optax multiplies the bfloat16 moment by beta1 in bfloat16, ours in float32.
  tolerance = 1e-5 if mu_dtype == "float32" else 1e-4
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    np.testing.assert_allclose(x, y, rtol=0, atol=tolerance)
  mu = next(s for s in state_a if isinstance(s, optim.AdamState)).mu
  assert {x.dtype for x in jax.tree.leaves(mu)} == {jnp.dtype(mu_dtype)}


def test_bfloat16_moments_bit_for_bit():
  """Oracle: numpy and ml_dtypes, fp32 arithmetic, storage rounded to nearest even."""
  b1, b2, eps = np.float32(0.9), np.float32(0.95), np.float32(1e-8)
  bf16, f32 = ml_dtypes.bfloat16, np.float32
  ours = optim.scale_by_adam(0.9, 0.95, 1e-8, jnp.bfloat16, jnp.bfloat16)
  state = ours.init({"w_D": jnp.zeros(1000)})
  mu = nu = np.zeros(1000, bf16)
  rng = np.random.default_rng(0)
  for step in range(1, 5):
    grad = rng.normal(size=1000).astype(f32)
    # Not under jit: contraction into fused multiply-adds would differ from numpy in the last bit.
    with jax.disable_jit():
      update, state = ours.update({"w_D": jnp.asarray(grad)}, state)
    m = b1 * mu.astype(f32) + f32(1 - 0.9) * grad
    v = b2 * nu.astype(f32) + f32(1 - 0.95) * (grad * grad)
    expected = (m / f32(1 - 0.9**step)) / (np.sqrt(v / f32(1 - 0.95**step)) + eps)
    mu, nu = m.astype(bf16), v.astype(bf16)
    np.testing.assert_array_equal(np.asarray(state.mu["w_D"]).view(np.uint16), mu.view(np.uint16))
    np.testing.assert_array_equal(np.asarray(state.nu["w_D"]).view(np.uint16), nu.view(np.uint16))
    np.testing.assert_allclose(update["w_D"], expected, rtol=1e-5)


def _moments(seed=0):
  """A first and a second moment whose rows span many magnitudes."""
  rng = np.random.default_rng(seed)
  size = 10.0**rng.uniform(-9, 0, (6, 1)) * 10.0**rng.uniform(-3, 0, (6, 300))
  grad = (size * rng.normal(size=(6, 300))).astype(np.float32)
  grad[:, 7] = 1e-8 * np.abs(grad[:, :128]).max(1)  # below the smallest code
  return {"mu": grad, "nu": np.square(grad)}


@pytest.mark.parametrize("moment, root", [("mu", False), ("nu", True)])
def test_float8_moments(moment, root):
  """Oracle: numpy; each value is one of its two E4M3 neighbours in its block."""
  x = _moments()[moment]
  q = moments.store(jnp.asarray(x), jax.random.key(0), root)
  held = np.sqrt(x) if root else x
  found, error = np.asarray(q.dequantize()), []
  for row, start in np.ndindex(6, 3):
    block = held[row, start * 128:(start + 1) * 128]
    scale = np.float32(np.abs(block).max() / np.float32(448))
    assert np.asarray(q.scales)[row, start] == scale
    codes = np.sort(np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32))
    grid = np.unique(codes[np.isfinite(codes)]) * scale
    got = found[row, start * 128:start * 128 + block.size]
    above = np.clip(np.searchsorted(grid, block), 1, len(grid) - 1)
    allowed = np.stack([grid[above - 1], grid[above]])
    assert (np.isclose(got, allowed, rtol=1e-6, atol=0).any(0) | (got == 0)).all()
    error.append(np.abs(got - block) / np.maximum(np.abs(block), 2.0**-6 * scale))
  assert np.concatenate(error).max() < 2.0**-3
  if root:  # nothing that was not zero divides by zero
    assert ((np.asarray(moments.load(q, root)) > 0) == (x > 0)).all()
  many = jax.vmap(lambda key: moments.store(jnp.asarray(x), key).dequantize())(
      jax.random.split(jax.random.key(1), 400))
  rms = np.sqrt(np.mean(np.square(x)))
  np.testing.assert_allclose(np.mean(many, 0), x, rtol=0.02, atol=1e-3 * rms)


def test_float8_moments_follow_their_averages():
  """Oracle: float32 moments; rounded to nearest, the second would stay where it began."""
  grads = {"w_DF": jnp.asarray(np.random.default_rng(0).normal(size=(64, 256)), jnp.float32)}
  ours = optim.scale_by_adam(0.9, 0.95, 1e-8, "float8", "float8")
  state = ours.init(grads)
  step = jax.jit(lambda state, scale_F: ours.update(
      jax.tree.map(lambda g: scale_F * g, grads), state)[1])
  even_F = np.arange(256) % 2 == 0
  for _ in range(60):
    state = step(state, np.ones(256, np.float32))
  for _ in range(60):  # every other column's root moves by under 2 % a step; scales stay
    state = step(state, np.where(even_F, np.float32(0.7), np.float32(1)))
  share = np.where(even_F, 0.49 + 0.51 * 0.95**60, 1 - 0.95**120)
  ratio = np.asarray(moments.load(state.nu["w_DF"], root=True)) / np.square(grads["w_DF"]) / share
  ratio = np.where(np.abs(grads["w_DF"]) > 0.05, ratio, np.nan)
  for columns in (even_F, ~even_F):
    assert abs(np.nanmean(ratio[:, columns]) - 1) < 0.05
  assert state.nu["w_DF"].nbytes < 1.05 * ratio.size


def test_a_bad_step_leaves_float8_moments():
  """Oracle: the bytes before it."""
  ours = optim.scale_by_adam(0.9, 0.95, 1e-8, "float8", "float8")
  params = {"w_DF": jnp.asarray(np.random.default_rng(0).normal(size=(512, 128)), jnp.float32)}
  step = jax.jit(lambda grads, state, good: ours.update(grads, state, good=good)[1])
  before = step(params, ours.init(params), True)
  after = step(jax.tree.map(lambda p: p * np.nan, params), before, False)
  for x, y in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
    assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def test_float8_moments_resume(tmp_path):
  """Oracle: four uninterrupted steps, bit for bit, after two, a checkpoint and two more."""
  optimizer = optim.make_optimizer(config.Optim(mu_dtype="float8", nu_dtype="float8"))

  @jax.jit
  def step(now, grads):
    updates, opt_state = optimizer.update(grads, now.opt_state, now.params, lr=1e-2,
                                          grad_norm=optax.tree.norm(grads))
    params = jax.tree.map(jnp.add, now.params, updates)
    return dataclasses.replace(now, params=params, opt_state=opt_state, step=now.step + 1)

  now = state.make_state(_tree(0), {"moe": {"bias_E": jnp.zeros((2, 3))}}, optimizer)
  for i in range(4):
    now = step(now, _tree(i + 1))
    if i == 1:
      store = checkpoint.Checkpoints(str(tmp_path))
      store.save(now, {"step": 2, "val_loss": None, "iterator": None})
      store.wait()
  where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), now)
  again = checkpoint.Checkpoints(str(tmp_path)).restore(abstract).state
  for i in (2, 3):
    again = step(again, _tree(i + 1))
  for x, y in zip(jax.tree.leaves(now), jax.tree.leaves(again), strict=True):
    assert np.asarray(x).tobytes() == np.asarray(y).tobytes()
  kinds = {x.dtype.name for x in jax.tree.leaves(now.opt_state[1])}
  assert kinds == {"float8_e4m3fn", "float32", "int32"}
  assert {x.dtype.name for x in jax.tree.leaves(now.params)} == {"float32"}


def test_a_changed_learning_rate_does_not_retrace():
  """Oracle: a counter in the traced function."""
  ours = optim.make_optimizer(config.Optim())
  params, traces = _tree(0), []

  @jax.jit
  def update(grads, state, lr):
    traces.append(1)
    return ours.update(grads, state, params, grad_norm=1.0, lr=lr)[0]

  start = ours.init(params)
  a = update(params, start, jnp.float32(1e-3))
  b = update(params, start, jnp.float32(2e-3))
  assert len(traces) == 1
  np.testing.assert_allclose(2 * a["embedding_VD"], b["embedding_VD"], rtol=1e-6)
