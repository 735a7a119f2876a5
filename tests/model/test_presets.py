"""Presets, never allocated: parameter counts as printed, and traced forward and backward."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from dsv3_jax import config
from tests.model import small


def count(name, part=None):
  """(parameters, those a token activates) of a preset's main model or MTP modules."""
  cfg = config.preset(name)
  _, params, buffers = small.split(small.abstract(cfg))
  total = active = 0
  for tree in (params, buffers):
    for path, x in jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(tree)):
      if (path[0].key == "mtp") != (part == "mtp"):
        continue
      total += x.size
      routed = path[-1].key.endswith(("_EDF", "_EFD"))
      active += x.size * cfg.moe.active // cfg.moe.experts if routed else x.size
  return total, active


def test_v3_671b():
  """Oracle: sums over the released checkpoint's tensor list, router biases included."""
  total, active = count("v3_671b")
  assert total == 671_026_419_200
  assert active == 37_552_297_472
  assert active - 129_280 * 7168 == 36_625_618_432  # without the embedding table
  assert count("v3_671b", "mtp")[0] == 11_610_068_224


def test_moe_16b():
  """Oracle: the report's 15.7B total and 2.4B activated (4.5)."""
  total, active = count("moe_16b")
  embedding = 102_400 * 2048
  assert round(total / 1e9, 1) == 15.7
  assert 2.4e9 <= active - embedding < 2.5e9


@pytest.mark.parametrize("name,billions", [("balance_1b", 1), ("balance_3b", 3)])
def test_balance_beds(name, billions):
  """Oracle: the sizes that arXiv 2408.15664 gives its two models."""
  assert round(count(name)[0] / 1e9) == billions


@pytest.mark.parametrize("name", config.PRESETS)
def test_traced(name):
  """Law: forward and gradient keep their shapes; fp32 loss, gradients like the parameters."""
  cfg = config.preset(name)
  graphdef, params, buffers = small.split(small.abstract(cfg, jnp.bfloat16))
  B, T, V = 2, 512, cfg.vocab_size
  runtime = config.Runtime(compute_dtype="bfloat16", remat="report")
  tokens = jax.ShapeDtypeStruct((B, T + 1), jnp.int32)

  def forward(params, buffers, tokens):
    return nnx.merge(graphdef, params, buffers)(tokens[:, :T], runtime=runtime)

  def gradient(params, buffers, tokens):
    loss = small.objective(graphdef, buffers, {"tokens": tokens}, runtime=runtime)
    return jax.value_and_grad(loss, has_aux=True)(params)

  out = jax.eval_shape(forward, params, buffers, tokens)
  assert out.logits_BTV.shape == (B, T, V) and out.logits_BTV.dtype == jnp.float32
  assert [x.shape for x in out.mtp_logits] == [(B, T, V)] * cfg.mtp_depth
  layers = cfg.moe_layers + cfg.mtp_depth
  assert out.counts_LE.shape == (layers, cfg.moe.experts)
  (total, aux), gradients = jax.eval_shape(gradient, params, buffers, tokens)
  assert total.shape == () and total.dtype == jnp.float32
  assert aux["counts_LE"].shape == (layers, cfg.moe.experts)
  shape = lambda x: (x.shape, x.dtype)
  assert jax.tree.map(shape, gradients) == jax.tree.map(shape, params)
