"""The backward pass in two parts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.parallel.split import split
from tests.parallel.flops import flops

D, B = 8, 3


def layer(w, x):
  return x + jnp.tanh(x * w["gain_D"] @ w["in_DD"]) @ w["out_DD"].T


@jax.custom_vjp
def unseen(w):
  return w.sum()


unseen.defvjp(lambda w: (w.sum(), None), lambda _, g: (None,))


def stage(weights, fixed, data, x):
  for w in weights["layers"]:
    x = layer(w, x) + jnp.sin(data)
  x += jnp.tanh(jnp.cos(data) @ weights["data_1D"]) @ weights["mix_DD"]  # x is in none of this
  return (x, (x * fixed).sum() + unseen(weights["unseen_D"])), {"max": x.max()}


@pytest.fixture
def arguments():
  draw = np.random.default_rng(0)
  normal = lambda *shape: jnp.asarray(draw.normal(size=shape), jnp.float32)
  one = lambda: {"gain_D": normal(D), "in_DD": normal(D, D) / 3, "out_DD": normal(D, D) / 3}
  weights = {"layers": [one(), one()], "unused_D": normal(D), "unseen_D": normal(D),
             "data_1D": normal(1, D), "mix_DD": normal(D, D)}
  return weights, jnp.float32(2), normal(B, 1), normal(B, D)


@pytest.mark.parametrize("remat", [False, True])
def test_split(arguments, remat):
  """Oracle: jax.vjp of the stage, for values and for FLOPs: each matmul of B is in I or W, once."""
  of = jax.checkpoint(stage) if remat else stage
  weights, fixed, data, x = arguments
  (y, objective), pull, extra = jax.vjp(lambda w, x: of(w, fixed, data, x), weights, x,
                                        has_aux=True)
  dy = jnp.cos(y)
  dw, dx = pull((dy, jnp.ones(())))
  parts = split(of, *arguments)
  ((y_found, objective_found), extra_found), i, w = parts.forward(*arguments)
  light, dx_found, crossing = parts.backward_input(weights, fixed, data, i, w, dy)
  heavy = parts.backward_weights(weights, fixed, data, w, crossing)
  names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(weights)]
  assert [n for n, a, b in zip(names, light, heavy, strict=True)
          if (a is None) == (b is None)] == ["['unseen_D']", "['unused_D']"]  # their 0 is not made
  dw_found = [next((g for g in (a, b) if g is not None), jnp.zeros(D))
              for a, b in zip(light, heavy, strict=True)]
  for a, b in zip(jax.tree.leaves((y_found, objective_found, extra_found, dx_found, dw_found)),
                  jax.tree.leaves((y, objective, extra, dx, dw)), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)

  count = lambda f, *a: flops(jax.make_jaxpr(f)(*a))
  F = count(parts.forward, *arguments)
  I = count(parts.backward_input, weights, fixed, data, i, w, dy)
  W = count(parts.backward_weights, weights, fixed, data, w, crossing)
  assert I + W == count(pull, (dy, jnp.ones(())))
  small, large = 2 * B * D, 2 * B * D * D
  assert F == 5 * large + small
  if not remat:  # nothing of the branch without x is needed for dx
    assert I == 4 * large and W == 6 * large + small


def test_kept(arguments):
  """Law: weights, what is made of them alone, and what is made of data alone are not kept."""
  parts = split(stage, *arguments)
  kept = [a.shape for a in (*parts.keeps_i, *parts.keeps_w, *parts.crossing)]
  assert set(kept) == {(B, D)}
  assert len(parts.keeps_w) == 2 * 2 + 2  # a layer: x * gain, tanh; tanh without x, and its slope
  assert len(parts.keeps_i) == 2 * 2  # x for the gain, and what the slope of tanh takes


def test_norm_gains_at_once(arguments):
  """Law: W has the matrices and nothing else."""
  weights, fixed, data, x = arguments
  parts = split(stage, *arguments)
  shapes = lambda gradients: {g.shape for g in gradients if g is not None}
  _, i, w = parts.forward(*arguments)
  light, _, crossing = parts.backward_input(weights, fixed, data, i, w, x)
  assert shapes(light) == {(D,)}
  assert shapes(parts.backward_weights(weights, fixed, data, w, crossing)) == {(D, D), (1, D)}
