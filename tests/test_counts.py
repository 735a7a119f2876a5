"""Closed forms of parameters and FLOPs."""

import math

import jax
import pytest
from flax import nnx

from dsv3_jax import config, counts
from dsv3_jax.model.transformer import Transformer


def test_the_released_model():
  """Oracle: the released checkpoint's counts, and the report's 37B activated and 250 GFLOP."""
  cfg = config.preset("v3_671b")
  assert counts.parameters(cfg) == {"main": 671_026_419_200, "mtp": 11_610_068_224}
  assert counts.activated_parameters(cfg)["main"] == 37_552_297_472
  main_only = config.replace(config.Config(model=cfg), **{"model.mtp_depth": 0}).model
  assert counts.flops_per_token(main_only, 4096) / 1e9 == pytest.approx(250, rel=3e-3)


@pytest.mark.parametrize("name", list(config.PRESETS))
def test_equals_the_tree(name):
  """Oracle: the model's own variables, shaped but never allocated."""
  cfg = config.preset(name)
  model = nnx.eval_shape(lambda: Transformer(cfg, rngs=nnx.Rngs(0)))
  size = lambda tree: sum(math.prod(x.shape) for x in jax.tree.leaves(nnx.state(tree)))
  found = counts.parameters(cfg)
  assert sum(found.values()) == size(model)
  assert found["mtp"] == (size(model.mtp) if cfg.mtp_depth else 0)


def test_flops_are_six_a_weight_and_attended_keys():
  """Oracle: V2's dense arithmetic written out for one dense layer."""
  attention = config.Attention(heads=2, q_rank=0, kv_rank=8, nope_dim=4, rope_dim=2, v_dim=4)
  cfg = config.Model(vocab_size=32, dim=16, layers=1, dense_layers=1, dense_ffn_dim=24,
                     attention=attention, mtp_depth=0)
  weights = 16 * 12 + 16 * 10 + 8 * 16 + 8 * 16 + 3 * 16 * 24 + 16 * 32
  assert counts.flops_per_token(cfg, 9) == 6 * (weights + 2 * (6 + 4) * 5)
  assert counts.flops_per_token(cfg, 9, causal=False) == 6 * (weights + 2 * (6 + 4) * 9)
