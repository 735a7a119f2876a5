"""Rotary embedding and YaRN: printed check values, transformers, numpy, the law of relativity."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax import config
from dsv3_jax.model import rope
from tests.oracles import deepseek_v3 as oracle
from tests.oracles.tolerance import assert_close

V3 = config.Attention(heads=128, q_rank=1536, kv_rank=512, nope_dim=128, rope_dim=64, v_dim=128,
                      yarn=config.Yarn(factor=40))
PLAIN = dataclasses.replace(V3, yarn=config.Yarn())
ODD = config.Yarn(factor=6, original_length=100, beta_fast=5, beta_slow=0.5, mscale=0.707,
                  mscale_all_dim=0.9)


def test_yarn_frequencies_of_the_release():
  """Oracle: check values computed from the released code's rule (low 10, high 23)."""
  ratio = rope.inverse_frequencies(PLAIN) / rope.inverse_frequencies(V3)
  np.testing.assert_allclose(rope.inverse_frequencies(PLAIN)[16], 0.01, rtol=1e-12)
  np.testing.assert_array_equal(ratio[:11], 1)
  np.testing.assert_allclose(ratio[11], 1.0811, atol=5e-5)
  np.testing.assert_allclose(rope.inverse_frequencies(V3)[16], 0.0055, rtol=1e-12)
  np.testing.assert_allclose(ratio[22], 10, rtol=1e-12)
  np.testing.assert_allclose(ratio[23:], 40, rtol=1e-12)


def test_yarn_scales_of_the_release():
  """Oracle: 0.0721688 -> 0.1352338, and cos and sin unscaled."""
  np.testing.assert_allclose(rope.softmax_scale(PLAIN), 0.0721688, atol=5e-8)
  np.testing.assert_allclose(rope.softmax_scale(V3), 0.1352338, atol=5e-8)
  assert rope.table_scale(V3) == 1 and rope.table_scale(PLAIN) == 1


@pytest.mark.parametrize("yarn", [V3.yarn, ODD, dataclasses.replace(ODD, beta_fast=0.5)])
@pytest.mark.parametrize("dim", [4, 16, 64])
def test_frequencies(yarn, dim):
  """Oracle: numpy transcription of the frequency rule, unequal mscales and equal ends included."""
  cfg = dataclasses.replace(V3, rope_dim=dim, yarn=yarn)
  np.testing.assert_allclose(rope.inverse_frequencies(cfg),
                             oracle.inverse_frequencies(dim, cfg.rope_theta, yarn), rtol=1e-12)
  np.testing.assert_allclose(rope.softmax_scale(cfg), oracle.softmax_scale(cfg), rtol=1e-12)
  expected = (0.1 * yarn.mscale * math.log(yarn.factor) + 1) / (
      0.1 * yarn.mscale_all_dim * math.log(yarn.factor) + 1)
  np.testing.assert_allclose(rope.table_scale(cfg), expected, rtol=1e-12)


@pytest.mark.parametrize("yarn", [V3.yarn, ODD])
def test_yarn_equals_transformers(yarn):
  """Oracle: transformers: ROPE_INIT_FUNCTIONS["yarn"], the scales of its DeepseekV3Attention."""
  torch = pytest.importorskip("torch")
  transformers = pytest.importorskip("transformers")
  from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
  from transformers.models.deepseek_v3 import modeling_deepseek_v3
  cfg = dataclasses.replace(V3, yarn=yarn)
  longest = int(yarn.factor * yarn.original_length)
  scaling = {"rope_type": "yarn", "rope_theta": cfg.rope_theta, "factor": yarn.factor,
             "beta_fast": yarn.beta_fast, "beta_slow": yarn.beta_slow, "mscale": yarn.mscale,
             "mscale_all_dim": yarn.mscale_all_dim,
             "original_max_position_embeddings": yarn.original_length}
  theirs = transformers.DeepseekV3Config(
      qk_rope_head_dim=cfg.rope_dim, qk_nope_head_dim=cfg.nope_dim, rope_theta=cfg.rope_theta,
      max_position_embeddings=longest, rope_scaling=scaling)
  frequencies, factor = ROPE_INIT_FUNCTIONS["yarn"](theirs, device="cpu")
  np.testing.assert_allclose(rope.inverse_frequencies(cfg), frequencies.numpy(), rtol=1e-6)
  np.testing.assert_allclose(rope.table_scale(cfg), factor, rtol=1e-6)
  with torch.device("meta"):  # a whole layer's weights are not needed for its scale
    layer = modeling_deepseek_v3.DeepseekV3Attention(theirs, 0)
  np.testing.assert_allclose(rope.softmax_scale(cfg), layer.scaling, rtol=1e-6)


@pytest.mark.parametrize("heads", [(), (3,)])
def test_rotation(heads):
  """Oracle: numpy rotation of complex numbers made of adjacent elements, before and after the
  reordering that the projections' columns get."""
  cfg = dataclasses.replace(V3, rope_dim=8, yarn=ODD)
  x = np.random.default_rng(0).normal(size=(1, 7, *heads, 8))
  positions = np.array([0, 1, 2, 3, 17, 40, 599])
  cos, sin = rope.rope_table(cfg, jnp.asarray(positions)[None])
  expected = rope.to_halves(oracle.rope(x[0], positions, cfg))
  got = rope.apply_rope(rope.to_halves(jnp.asarray(x, jnp.float32)), cos, sin)
  # A position of 599 times a frequency is known to 4e-5 in fp32.
  assert_close(got[0], expected, factor=10)
  half = rope.apply_rope(rope.to_halves(jnp.asarray(x, jnp.bfloat16)), cos, sin)
  assert half.dtype == jnp.bfloat16
  assert_close(half[0], expected, "bfloat16")


def test_scores_depend_on_distance_alone():
  """Law: <rope(q, m), rope(k, n)> is a function of m - n."""
  cfg = dataclasses.replace(PLAIN, rope_dim=8)
  q, k = np.random.default_rng(0).normal(size=(2, 1, 1, 8)).astype(np.float32)

  def score(m, n):
    turn = lambda x, p: rope.apply_rope(x[None], *rope.rope_table(cfg, jnp.array([[p]])))
    return float((turn(q, m) * turn(k, n)).sum())

  assert abs(score(3, 1) - score(52, 50)) < 1e-5
  assert abs(score(3, 1) - score(3, 2)) > 1e-2


def test_positions_restart_in_each_segment():
  """Oracle: by hand."""
  segments = jnp.array([[0, 0, 0, 1, 1, 2, 2, 2], [5, -1, -1, -1, 0, 0, 1, 1]])
  assert rope.positions_from_segments(segments).tolist() == [
      [0, 1, 2, 0, 1, 0, 1, 2], [0, 0, 1, 2, 0, 1, 0, 1]]
