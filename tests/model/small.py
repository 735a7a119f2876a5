"""Tiny models for the tests: every number small, every weight large enough to matter."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsv3_jax import config
from dsv3_jax.model.loss import loss_fn, target_tokens
from dsv3_jax.model.routing import RouterBias
from dsv3_jax.model.transformer import Transformer
from tests.quick import jit

BASE = config.Model(
    vocab_size=23, dim=12, layers=3, dense_layers=1, dense_ffn_dim=10, init_std=0.3,
    attention=config.Attention(heads=2, q_rank=6, kv_rank=5, nope_dim=4, rope_dim=4, v_dim=3),
    moe=config.MoE(experts=8, active=3, shared=1, ffn_dim=5, groups=4, active_groups=2),
    mtp_depth=1)
WEIGHTS = config.Loss(sequence_balance=0.05, batch_balance=0.03, expert_balance=0.02)
RUNTIME = config.Runtime(attention_block=4, head_chunk=5)
MTP_WEIGHT = 0.3


def abstract(cfg=BASE, dtype=jnp.float32):
  """The model's shapes, without its arrays."""
  return nnx.eval_shape(lambda: Transformer(cfg, rngs=nnx.Rngs(0), dtype=dtype))


def build(cfg=BASE, seed=0, dtype=jnp.float32, bias_mean=0.0):
  """A model filled by numpy, which is quicker than its own initialisation; gains and router biases
  are random too."""
  graphdef, params, buffers = split(abstract(cfg, dtype))
  rng = np.random.default_rng(seed)

  def param(path, x):
    mean, std = (1, 0.3) if "norm" in jax.tree_util.keystr(path) else (0, cfg.init_std)
    return jnp.asarray(mean + std * rng.normal(size=x.shape), x.dtype)

  def bias(x):
    return jnp.asarray(bias_mean + 0.2 * rng.normal(size=x.shape), x.dtype)

  params = jax.tree_util.tree_map_with_path(param, params)
  return nnx.merge(graphdef, params, jax.tree.map(bias, buffers))


def split(model):
  return nnx.split(model, nnx.Param, RouterBias)


def for_oracle(model):
  """(params, biases) in float64, as tests.oracles.deepseek_v3 takes them."""
  _, params, buffers = split(model)
  to64 = functools.partial(jax.tree.map, lambda x: np.asarray(x, np.float64))
  buffers = nnx.to_pure_dict(buffers)
  biases = {}
  if "moe" in buffers:
    biases["moe"] = buffers["moe"]["ffn"]["bias_E"]
  if "mtp" in buffers:
    biases["mtp"] = buffers["mtp"]["block"]["ffn"]["bias_E"]
  return to64(nnx.to_pure_dict(params)), to64(biases)


def tokens(batch=2, length=9, vocab=BASE.vocab_size, seed=0):
  return np.random.default_rng(seed).integers(0, vocab, (batch, length)).astype(np.int32)


def objective(graphdef, buffers, batch, loss=WEIGHTS, runtime=RUNTIME, mtp_weight=MTP_WEIGHT):
  """params -> (total, aux), for jax transformations."""
  batch = {k: jnp.asarray(v) for k, v in batch.items()}

  def total(params):
    return loss_fn(nnx.merge(graphdef, params, buffers), batch, loss=loss, mtp_weight=mtp_weight,
                   runtime=runtime, denominator=target_tokens(batch))

  return total


def loss_and_gradients(model, batch, **kwargs):
  """((total, aux), gradients), compiled."""
  graphdef, params, buffers = split(model)
  run = jit(jax.value_and_grad(objective(graphdef, buffers, batch, **kwargs), has_aux=True))
  return run(params)


def forward(model, tokens_BT, segments_BT=None, runtime=RUNTIME):
  """The model's output, compiled."""
  graphdef, params, buffers = split(model)

  def run(params, buffers, tokens_BT, segments_BT):
    return nnx.merge(graphdef, params, buffers)(tokens_BT, segments_BT, runtime)

  return jit(run)(params, buffers, tokens_BT, segments_BT)
