"""AdamW with selectable moment dtypes."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

from dsv3_jax import config
from dsv3_jax.train import optim


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


def test_a_changed_learning_rate_does_not_retrace():
  """Oracle: a counter in the traced function."""
  ours = optim.make_optimizer(config.Optim())
  params, traces = _tree(0), []

  @jax.jit
  def update(grads, state, lr):
    traces.append(1)
    return ours.update(grads, state, params, grad_norm=1.0, lr=lr)[0]

  state = ours.init(params)
  a = update(params, state, jnp.float32(1e-3))
  b = update(params, state, jnp.float32(2e-3))
  assert len(traces) == 1
  np.testing.assert_allclose(2 * a["embedding_VD"], b["embedding_VD"], rtol=1e-6)
