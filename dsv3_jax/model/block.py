"""One Transformer block: pre-norm attention and feed-forward, each with its residual."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from dsv3_jax import config
from dsv3_jax.model import layers
from dsv3_jax.model.gqa import GQA
from dsv3_jax.model.mla import MLA
from dsv3_jax.model.moe import MoECall, MoELayer, MoEStats
from dsv3_jax.parallel import context as context_lib


class BlockCall(NamedTuple):
  """What a forward pass tells every block."""

  cos: jax.Array  # [B, T, R/2] fp32
  sin: jax.Array
  segments_BT: jax.Array | None
  moe: MoECall
  runtime: config.Runtime
  context: context_lib.Cut | None = None  # of sequences over devices; segments_BT is of whole ones


class Block(nnx.Module):
  """`x + attention(norm(x))`, then `x + FFN(norm(x))` with a dense or an MoE feed-forward."""

  def __init__(self, cfg: config.Model, *, moe: bool, rngs: nnx.Rngs, dtype=jnp.float32):
    self.norm_eps, self.is_moe = cfg.norm_eps, moe
    self.attn_norm_D = layers.ones_param(cfg.dim, dtype)
    kind = MLA if cfg.attention.kind == "mla" else GQA
    self.attn = kind(cfg, rngs=rngs, dtype=dtype)
    self.ffn_norm_D = layers.ones_param(cfg.dim, dtype)
    if moe:
      self.ffn = MoELayer(cfg, rngs=rngs, dtype=dtype)
    else:
      self.ffn = layers.DenseFFN(cfg.dim, cfg.dense_ffn_dim, cfg.init_std, rngs=rngs, dtype=dtype)

  def __call__(self, x_BTD: jax.Array, call: BlockCall) -> tuple[jax.Array, MoEStats | None]:
    """[B, T, D] to [B, T, D]; routing statistics where the block is MoE, else None."""
    h_BTD = layers.rms_norm(x_BTD, self.attn_norm_D[...], self.norm_eps)
    x_BTD = x_BTD + self.attn(h_BTD, call.cos, call.sin, call.segments_BT, call.runtime,
                              call.context)
    x_BTD = checkpoint_name(x_BTD, "attention_residual")
    h_BTD = layers.rms_norm(x_BTD, self.ffn_norm_D[...], self.norm_eps)
    if self.is_moe:
      y_BTD, stats = self.ffn(h_BTD, call.moe)
      return x_BTD + y_BTD, stats
    return x_BTD + self.ffn(h_BTD, call.moe.recipe), None


def stack(make, count: int, rngs: nnx.Rngs):
  """`count` modules of one kind as one module whose arrays lead with a layer axis; None for 0."""
  if not count:
    return None
  return nnx.split_rngs(splits=count)(nnx.vmap(make))(rngs)


def scan(stacked: nnx.Module, step, carry, unroll: int, xs=None):
  """Runs `step(module, carry, x) -> (carry, y)` over a stack's layers; ys come back stacked.

  Args:
    stacked: from `stack`.
    step: traced once; `module` is one layer.
    carry: the first layer's input.
    unroll: layers per iteration; 0 unrolls all.
    xs: optional arrays that lead with the layer axis.
  """
  graphdef, state = nnx.split(stacked)
  count = jax.tree.leaves(state)[0].shape[0]

  def body(carry, scanned):
    layer_state, x = scanned
    return step(nnx.merge(graphdef, layer_state), carry, x)

  return jax.lax.scan(body, carry, (state, xs), unroll=min(unroll or count, count))
