"""Blockwise attention against a loop over queries, and the laws of causality and isolation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax import ops
from tests.oracles import operations as oracle
from tests.oracles.tolerance import assert_close
from tests.quick import jit

B, H, K, U, SCALE = 2, 2, 6, 4, 0.7
T = 13


def inputs(length=T, dtype="float32", seed=0):
  """q, k, v and a cotangent of the output; K and U differ."""
  rng = np.random.default_rng(seed)
  return [jnp.asarray(2 * rng.normal(size=(B, length, H, w)), dtype) for w in (K, K, U, U)]


def packed(length=T):
  """Segments of uneven length, padding at the end of one row."""
  rows = [np.repeat([0, 1, 2], [1, length // 2, length]), np.repeat([0, -1], [length - 2, 2])]
  return np.array([r[:length] for r in rows], np.int32)


@functools.cache
def compiled(impl, block):
  """(q, k, v, segments, do) -> (o, dq, dk, dv)."""
  def run(q, k, v, segments, do):
    o, back = jax.vjp(lambda *a: ops.attention(
        *a, scale=SCALE, segments_BT=segments, impl=impl, block=block), q, k, v)
    return o, *back(do)

  return jit(run)


def assert_matches_oracle(got, args, segments, dtype="float32", factor=1.0):
  q, k, v, do = (np.asarray(a.astype(jnp.float32), np.float64) for a in args)
  assert all(a.dtype == jnp.dtype(dtype) for a in got)
  assert_close(got[0], oracle.attention(q, k, v, SCALE, segments), dtype, factor)
  # Joined: of few keys, dq and dk are small differences of numbers as large as dv.
  gradients = oracle.attention_gradients(q, k, v, SCALE, segments, do)
  assert [a.shape for a in got[1:]] == [b.shape for b in gradients]
  join = functools.partial(np.concatenate, axis=None)
  assert_close(join(got[1:]), join(gradients), dtype, factor)


# Block 5 does not divide 13; 16 exceeds it; 1 and 2 take the looped path, 7 the unrolled one.
@pytest.mark.parametrize("impl,block", [
    ("xla", 5), ("xla", 1), ("xla", 2), ("xla", 7), ("xla", 13), ("xla", 16), ("auto", 4),
    ("reference", 0)])
@pytest.mark.parametrize("isolated", [False, True])
def test_forward_and_gradients(impl, block, isolated):
  """Oracle: a numpy loop over queries, float64, its gradients by hand."""
  args = inputs()
  segments = packed() if isolated else None
  got = compiled(impl, block)(*args[:3], segments, args[3])
  assert_matches_oracle(got, args, segments)


@pytest.mark.parametrize("length", [1, 2, 9])
def test_other_lengths(length):
  """Oracle: a numpy loop over queries, float64."""
  args = inputs(length)
  assert_matches_oracle(compiled("xla", 4)(*args[:3], None, args[3]), args, None)


@pytest.mark.parametrize("isolated", [False, True])
def test_bfloat16(isolated):
  """Oracle: a numpy loop over the rounded inputs, float64."""
  args = inputs(dtype="bfloat16")
  segments = packed() if isolated else None
  got = compiled("xla", 5)(*args[:3], segments, args[3])
  assert_matches_oracle(got, args, segments, "bfloat16")


def test_large_scores():
  """Oracle: a numpy loop over queries; exp of these scores overflows without the maximum."""
  q, k, v, do = inputs(seed=3)
  args = [6 * q, 6 * k, v, do]
  got = compiled("xla", 5)(*args[:3], None, do)
  assert_matches_oracle(got, args, None, factor=10)  # fp32 knows a score of 250 to 2e-5


@pytest.mark.parametrize("t,block", [(4, 5), (5, 5), (11, 5), (5, 2)])
def test_the_future_changes_nothing(t, block):
  """Law: outputs up to t are bit-exact, and gradients of them bit-zero, whatever comes after t."""
  q, k, v, do = inputs()
  other = inputs(seed=9)
  run = compiled("xla", block)
  do = do.at[:, t + 1:].set(0)
  before = run(q, k, v, None, do)
  q2, k2, v2 = (a.at[:, t + 1:].set(b[:, t + 1:]) for a, b in zip((q, k, v), other))
  after = run(q2, k2, v2, None, do)
  np.testing.assert_array_equal(before[0][:, :t + 1], after[0][:, :t + 1])
  assert not np.array_equal(before[0][:, t + 1:], after[0][:, t + 1:])
  for a, b in zip(before[1:], after[1:]):
    np.testing.assert_array_equal(a[:, :t + 1], b[:, :t + 1])
    assert not np.any(a[:, t + 1:])


@pytest.mark.parametrize("block", [5, 2])
def test_a_neighbouring_segment_changes_nothing(block):
  """Law: output and gradients of one segment are bit-exact whatever its neighbours hold."""
  args, other = inputs(), inputs(seed=9)
  segments = np.repeat([[0, 1, 2]], [4, 5, 4], axis=1).repeat(B, 0).astype(np.int32)
  inside = (segments == 1)[..., None, None]
  mixed = [jnp.where(inside, a, b) for a, b in zip(args, other)]
  run = compiled("xla", block)
  for a, b in zip(run(*args[:3], segments, args[3]), run(*mixed[:3], segments, mixed[3])):
    np.testing.assert_array_equal(a[:, 4:9], b[:, 4:9])
    assert not np.array_equal(a, b)


def _bytes(impl, length):
  """Temporary memory of one forward and backward pass."""
  shape = jax.ShapeDtypeStruct((1, length, 2, 16), jnp.float32)

  def run(q, k, v):
    return ops.attention(q, k, v, scale=1.0, impl=impl, block=128).sum()

  compiled = jit(jax.grad(run, argnums=(0, 1, 2))).lower(shape, shape, shape).compile()
  return compiled.memory_analysis().temp_size_in_bytes


def test_memory_is_linear():
  """Law: four times the length takes four times the memory; the definition takes sixteen times."""
  short, long = _bytes("xla", 1024), _bytes("xla", 4096)
  assert long <= 4.2 * short
  assert long <= _bytes("reference", 4096) / 10
  assert _bytes("reference", 4096) > 8 * _bytes("reference", 1024)  # the measure sees squares


def test_cudnn_declines_on_a_cpu():
  """Law: an implementation that cannot take a call says NotImplementedError."""
  q, k, v, _ = inputs()
  with pytest.raises(NotImplementedError, match="CUDA"):
    ops.attention(q, k, v, scale=SCALE, impl="cudnn")
