"""The chunked cross-entropy of a linear head against a loop over tokens."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.model import layers
from dsv3_jax.model.cross_entropy import linear_cross_entropy
from tests.oracles import operations as oracle
from tests.oracles.tolerance import assert_close
from tests.quick import jit

P, D, V = 13, 6, 11


@functools.cache
def compiled(chunk):
  """(h, w, target, weight) -> ((loss, correct), (dh, dw)), and the undifferentiated pair."""
  def run(h, w, target, weight):
    loss = functools.partial(linear_cross_entropy, target_P=target, weight_P=weight, chunk=chunk)
    pair = lambda h, w: loss(h, w)
    grad = jax.value_and_grad(lambda h, w: pair(h, w), argnums=(0, 1), has_aux=True)(h, w)
    return *grad, pair(h, w)

  return jit(run)


def inputs(dtype="float32", size=1.0):
  rng = np.random.default_rng(0)
  h, w = (jnp.asarray(size * rng.normal(size=s), dtype) for s in ((P, D), (D, V)))
  weight = rng.uniform(0.5, 2, P)
  weight[[0, 5, 12]] = 0
  return h, w, rng.integers(0, V, P).astype(np.int32), weight.astype(np.float32)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("chunk", [1, 5, 13, 64])  # 5 does not divide 13
def test_loss_and_gradients(chunk, dtype):
  """Oracle: a numpy loop over tokens, float64, softmax minus one-hot."""
  h, w, target, weight = inputs(dtype)
  (loss, correct), (dh, dw), plain = compiled(chunk)(h, w, target, weight)
  h64, w64 = (np.asarray(a.astype(jnp.float32), np.float64) for a in (h, w))
  expected = oracle.cross_entropy(h64, w64, target, weight.astype(float))
  assert loss.dtype == jnp.float32 and dh.dtype == dw.dtype == jnp.dtype(dtype)
  assert_close(loss, expected[0])
  assert_close(correct, expected[1])
  assert_close(dh, expected[2], dtype)
  assert_close(dw, expected[3], dtype)
  assert_close(plain[0], expected[0])
  assert not np.any(dh[np.array([0, 5, 12])])


def test_targets_of_weight_zero_do_not_matter():
  """Law: bit-exact whatever the label and the representation of a token that does not count."""
  h, w, target, weight = inputs()
  first = compiled(5)(h, w, target, weight)
  again = compiled(5)(h.at[5].set(3.0), w, np.where(weight == 0, 0, target).astype(np.int32),
                      weight)
  jax.tree.map(np.testing.assert_array_equal, first, again)


def test_large_logits():
  """Oracle: a numpy loop over tokens; logits of several hundred overflow a bare exp."""
  h, w, target, weight = inputs(size=15.0)
  (loss, _), grads, _ = compiled(5)(h, w, target, weight)
  expected = oracle.cross_entropy(*(np.asarray(a, np.float64) for a in (h, w)), target, weight)
  assert_close(loss, expected[0])
  for a, b in zip(grads, expected[2:]):
    assert_close(a, b)


def test_gradient_scales_with_the_cotangent():
  """Law: d(c * loss) = c * d loss; the gradient is formed before the cotangent is known."""
  h, w, target, weight = inputs()

  @jit
  def scaled(c):
    return jax.grad(lambda h, w: c * linear_cross_entropy(h, w, target, weight, 5)[0],
                    argnums=(0, 1))(h, w)

  for a, b in zip(scaled(2.5), compiled(5)(h, w, target, weight)[1]):
    assert_close(a, 2.5 * np.asarray(b, np.float64))


def test_logits_never_exist_at_once():
  """Law: temporary memory stays far below one [P, V] array."""
  p, v = 2048, 1024
  spec = jax.ShapeDtypeStruct
  run = jit(jax.grad(lambda h, w, t, m: linear_cross_entropy(h, w, t, m, 64)[0], argnums=(0, 1)))
  compiled = run.lower(spec((p, 8), jnp.float32), spec((8, v), jnp.float32),
                       spec((p,), jnp.int32), spec((p,), jnp.float32)).compile()
  assert compiled.memory_analysis().temp_size_in_bytes < p * v * 4 / 4


@pytest.mark.parametrize("chunk", [3, 8])
def test_vocabulary_apart(chunk):
  """Law: cut over devices by words, embedding, loss, correct predictions and gradients stay."""
  rng = np.random.default_rng(2)
  W, P, D, V = 4, 8, 5, 12
  h_PD = rng.normal(size=(W * P, D)).astype(np.float32)
  w_DV = rng.normal(size=(D, V)).astype(np.float32)
  target_P = rng.integers(V, size=W * P).astype(np.int32)
  weight_P = rng.random(W * P).astype(np.float32)
  mesh = jax.make_mesh((2, 2), ("node", "gpu"), axis_types=(jax.sharding.AxisType.Auto,) * 2,
                       devices=jax.devices()[:4])
  cut = jax.sharding.PartitionSpec(("node", "gpu"))
  words = jax.sharding.PartitionSpec(None, ("node", "gpu"))

  def total(h_PD, w_DV, target_P, weight_P, axes=()):
    h_PD = h_PD + layers.embed(w_DV.T, target_P, "float32", axes)
    loss, correct = linear_cross_entropy(h_PD, w_DV, target_P, weight_P, chunk, axes)
    return 0.3 * loss, correct

  gradients = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)
  want = gradients(h_PD, w_DV, target_P, weight_P)

  def local(*args):
    (loss, correct), grads = gradients(*args, axes=("node", "gpu"))
    return jax.lax.psum((loss, correct), ("node", "gpu")), grads

  got = jit(jax.shard_map(local, mesh=mesh, in_specs=(cut, words, cut, cut),
                          out_specs=(jax.sharding.PartitionSpec(), (cut, words))))(
                              h_PD, w_DV, target_P, weight_P)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, want)
