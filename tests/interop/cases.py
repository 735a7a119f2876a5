"""The configurations on which logits are compared: name -> (config, bias range of the routers)."""

import flax.nnx as nnx
import jax
import numpy as np

from tests.interop.oracle import BASE, YARN

TOKENS_BT = np.random.default_rng(1).integers(0, BASE["vocab_size"], (2, 24))
QUICK = {"xla_backend_optimization_level": 0}  # compiling is most of what these tests do
_PLAIN = (-0.3, 0.3)

CASES = {
    "base": (BASE, _PLAIN),
    "no_q_rank_two_shared_one_group": (BASE | dict(
        q_lora_rank=None, n_shared_experts=2, n_group=1, topk_group=1), _PLAIN),
    "yarn": (BASE | dict(rope_scaling=YARN, max_position_embeddings=640), _PLAIN),
    "yarn_rope_parameters": (BASE | dict(
        rope_parameters=dict(rope_type="yarn", rope_theta=500.0, factor=8.0, beta_fast=4.0,
                             beta_slow=1.0, mscale=0.7, mscale_all_dim=1.3,
                             original_max_position_embeddings=16),
        max_position_embeddings=128, n_group=8, topk_group=3, num_experts_per_tok=6,
        q_lora_rank=None), _PLAIN),
    "yarn_no_mscale": (BASE | dict(
        rope_scaling=dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16),
        max_position_embeddings=64, n_shared_experts=2), _PLAIN),
    "yarn_attention_factor": (BASE | dict(
        rope_scaling=dict(YARN, attention_factor=0.8), max_position_embeddings=640), _PLAIN),
    "all_moe_unnormalised": (BASE | dict(
        first_k_dense_replace=0, n_group=2, topk_group=1, norm_topk_prob=False,
        routed_scaling_factor=1.0, num_hidden_layers=2), _PLAIN),
    "negative_bias": (BASE | dict(n_group=4, topk_group=2, q_lora_rank=None), (-3.0, -1.0)),
    "half_split_rope": (BASE | dict(rope_interleave=False, n_group=8, topk_group=4), _PLAIN),
    "other_eps": (BASE | dict(rms_norm_eps=3e-2), _PLAIN),
    "tied_dense": (BASE | dict(tie_word_embeddings=True, first_k_dense_replace=3), _PLAIN),
}


def run(model):
  """`model(TOKENS_BT)`, compiled quickly."""
  graphdef, state = nnx.split(model)
  forward = jax.jit(lambda state: nnx.merge(graphdef, state)(TOKENS_BT), compiler_options=QUICK)
  return forward(state)


def relative(found, expected):
  """Largest difference over the largest element, in float64."""
  found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
  return np.abs(found - expected).max() / np.abs(expected).max()
