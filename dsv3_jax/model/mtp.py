"""Multi-token prediction (report 2.2, eq. 21-25).

Module k predicts the token k + 1 places ahead. It combines the representation of position i at
depth k - 1 with the embedding of token i + k, and runs one full MoE block on the sum:

    h'_i = RMSNorm(Emb(t_{i+k})) w_embed + RMSNorm(h_i^{k-1}) w_hidden
    h^k  = Block(h')                      P_{i+k+1} = OutHead(RMSNorm(h_i^k))

The two weights are the halves of the report's M_k, so the order in which a checkpoint concatenates
them (released: [embedding ; hidden], the reverse of eq. 21) concerns loading alone. Embedding and
head belong to the main model and come in as arguments. Positions stay those of i.
"""

import jax
from flax import nnx

from dsv3_jax import config
from dsv3_jax.model import layers
from dsv3_jax.model.block import Block, BlockCall
from dsv3_jax.model.moe import MoEStats


class MTPModule(nnx.Module):
  """One depth: two norms, the combining projection, a block, and the norm before the head."""

  def __init__(self, cfg: config.Model, *, rngs: nnx.Rngs, dtype=jax.numpy.float32):
    D, std = cfg.dim, cfg.init_std
    self.norm_eps = cfg.norm_eps
    self.embed_norm_D = layers.ones_param(D, dtype)
    self.hidden_norm_D = layers.ones_param(D, dtype)
    self.w_embed_DD = layers.normal_param(rngs, (D, D), std, dtype)
    self.w_hidden_DD = layers.normal_param(rngs, (D, D), std, dtype)
    self.block = Block(cfg, moe=True, rngs=rngs, dtype=dtype)
    self.out_norm_D = layers.ones_param(D, dtype)

  def __call__(self, h_BTD: jax.Array, embedded_BTD: jax.Array, call: BlockCall
               ) -> tuple[jax.Array, MoEStats]:
    """Representation of the next depth.

    Args:
      h_BTD: representation at depth k - 1.
      embedded_BTD: embedding of token i + k at position i.
      call: as for any block; `call.moe.valid_BT` marks the positions whose target exists.

    Returns:
      h^k [B, T, D] before `out_norm_D`, and the block's routing statistics.
    """
    with jax.named_scope("mtp_combine"):
      e_BTD = layers.rms_norm(embedded_BTD, self.embed_norm_D[...], self.norm_eps)
      h_BTD = layers.rms_norm(h_BTD, self.hidden_norm_D[...], self.norm_eps)
      recipe = call.moe.recipe
      h_BTD = (layers.linear(e_BTD, self.w_embed_DD[...], recipe=recipe)
               + layers.linear(h_BTD, self.w_hidden_DD[...], recipe=recipe))
    return self.block(h_BTD, call)

  def readout(self, h_BTD: jax.Array) -> jax.Array:
    """What the shared head multiplies, [B, T, D]."""
    return layers.rms_norm(h_BTD, self.out_norm_D[...], self.norm_eps)
