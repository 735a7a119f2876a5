"""Grouped-query attention, the baseline of latent attention."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsv3_jax import config, counts
from dsv3_jax.config import ConfigError
from dsv3_jax.model import rope
from dsv3_jax.model.gqa import GQA
from tests.model import small
from tests.oracles.tolerance import assert_close
from tests.quick import jit

T = 11


def model(kv_heads, nope_dim=0, **more):
  return config.replace(small.BASE, **{
      "attention.kind": "gqa", "attention.heads": 4, "attention.kv_heads": kv_heads,
      "attention.nope_dim": nope_dim, "attention.rope_dim": 6, "attention.v_dim": 6, **more})


def run(cfg, arrays, x_BTD, segments=None):
  attn = nnx.eval_shape(lambda: GQA(cfg, rngs=nnx.Rngs(0)))
  graphdef, state = nnx.split(attn)
  state = {name: jnp.asarray(w) for name, w in arrays.items()}

  @jit
  def call(state, x_BTD):
    module = nnx.merge(graphdef, nnx.State({k: nnx.Param(v) for k, v in state.items()}))
    where = jnp.broadcast_to(jnp.arange(x_BTD.shape[1]), x_BTD.shape[:2])
    return module(x_BTD, *rope.rope_table(cfg.attention, where), segments, small.RUNTIME)

  return call(state, x_BTD)


def weights(cfg, seed=0):
  a, D, rng = cfg.attention, cfg.dim, np.random.default_rng(seed)
  shapes = {"w_q_DHK": (D, a.heads, a.qk_dim), "w_k_DJK": (D, a.kv_heads or a.heads, a.qk_dim),
            "w_v_DJU": (D, a.kv_heads or a.heads, a.v_dim), "w_o_HUD": (a.heads, a.v_dim, D)}
  return {k: rng.normal(size=s).astype(np.float32) * 0.3 for k, s in shapes.items()}


@pytest.mark.parametrize("kv_heads", [0, 2, 1])
def test_against_llama(kv_heads):
  """Oracle: transformers' LlamaAttention, multi-head, grouped and multi-query."""
  torch = pytest.importorskip("torch")
  from transformers import LlamaConfig
  from transformers.models.llama import modeling_llama as llama

  cfg = model(kv_heads)
  a, arrays = cfg.attention, weights(cfg)
  theirs = LlamaConfig(hidden_size=cfg.dim, num_attention_heads=a.heads, head_dim=a.qk_dim,
                       num_key_value_heads=a.kv_heads or a.heads, attention_bias=False,
                       attn_implementation="eager")
  layer = llama.LlamaAttention(theirs, 0)

  def flat(w, halves):  # they rotate halves, our weights are for pairs
    w = np.asarray(rope.to_halves(jnp.asarray(w))) if halves else w
    return torch.tensor(w.reshape(cfg.dim, -1).T.copy())

  with torch.no_grad():
    layer.q_proj.weight.copy_(flat(arrays["w_q_DHK"], True))
    layer.k_proj.weight.copy_(flat(arrays["w_k_DJK"], True))
    layer.v_proj.weight.copy_(flat(arrays["w_v_DJU"], False))
    layer.o_proj.weight.copy_(torch.tensor(arrays["w_o_HUD"].reshape(-1, cfg.dim).T.copy()))
    x = np.random.default_rng(1).normal(size=(2, T, cfg.dim)).astype(np.float32)
    where = torch.arange(T)[None]
    turns = llama.LlamaRotaryEmbedding(theirs)(torch.tensor(x), where)
    mask = torch.full((T, T), float("-inf")).triu(1)[None, None]
    expected = layer(torch.tensor(x), turns, mask)[0].numpy()
  assert_close(run(cfg, arrays, x), expected, "float32")


def test_groups_share_their_keys():
  """Law: grouped queries are multi-head attention whose keys and values are repeated."""
  grouped, full = model(2, nope_dim=4), model(4, nope_dim=4)
  arrays = weights(grouped)
  repeated = arrays | {k: np.repeat(arrays[k], 2, axis=1) for k in ("w_k_DJK", "w_v_DJU")}
  x = np.random.default_rng(2).normal(size=(2, T, grouped.dim)).astype(np.float32)
  segments = jnp.asarray(np.repeat([[0, 1]], 2, 0).repeat([5, 6], axis=1), jnp.int32)
  assert_close(run(grouped, arrays, x, segments), run(full, repeated, x, segments), "float32")


@pytest.mark.parametrize("recipe", ["none", "v3"])
def test_whole_model_learns(recipe):
  """Law: every attention weight of a whole model, MTP included, has a gradient."""
  cfg = model(2, nope_dim=4)
  runtime = config.replace(small.RUNTIME, recipe=recipe)
  batch = {"tokens": small.tokens()}
  (loss, _), gradients = small.loss_and_gradients(small.build(cfg), batch, runtime=runtime)
  assert np.isfinite(loss)
  for path, g in jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(gradients)):
    assert np.abs(g).max() > 0, jax.tree_util.keystr(path)


@pytest.mark.parametrize("kv_heads", [0, 1])
def test_parameters(kv_heads):
  """Law: the closed form counts what the model holds."""
  cfg = model(kv_heads, nope_dim=4)
  _, params, buffers = small.split(small.abstract(cfg))
  held = sum(x.size for x in jax.tree.leaves((params, buffers)))
  assert sum(counts.parameters(cfg).values()) == held


def test_what_is_cached():
  """Oracle: V2's table 1: 2 H d a layer, 2 d for one head, C + R for the latent."""
  a = config.Attention(kind="gqa", heads=16, nope_dim=64, rope_dim=64, v_dim=128)
  assert a.cached == 2 * 16 * 128
  assert config.replace(a, kv_heads=1).cached == 2 * 128
  assert config.preset("v3_671b").attention.cached == 576


@pytest.mark.parametrize("changes, words", [
    ({"kind": "mha"}, "one of mla, gqa"), ({"kv_heads": 2}, "kind='gqa'"),
    ({"nope_dim": 0}, "kind='gqa'"), ({"kind": "gqa", "kv_heads": 3}, "must divide")])
def test_errors(changes, words):
  """Law: what cannot be is said, with its key."""
  with pytest.raises(ConfigError, match=words):
    config.Attention(**changes)
