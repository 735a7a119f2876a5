"""A model's parameters as decoding reads them, made once.

Training stacks the layers and keeps weights as checkpoints have them. A decode step reads every
weight once and does little else, so whatever would be copied a step is copied here: layers lie
apart, rotary columns are in halves (`model/rope.py`), gate and up lie side by side, and the
up-projection of the latent is in the two parts that absorption multiplies by.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from dsv3_jax import config
from dsv3_jax.config import ConfigError
from dsv3_jax.model import rope


class Attention(NamedTuple):
  """MLA of one layer; Y is Q, or D without a query latent."""

  w_dq_DQ: jax.Array | None
  q_norm_Q: jax.Array | None
  w_q_YHK: jax.Array
  w_dkv_DZ: jax.Array
  kv_norm_C: jax.Array
  w_uk_HNC: jax.Array  # W_UK: keys without position, of each head
  w_uv_HCU: jax.Array  # W_UV: values
  w_o_HUD: jax.Array


class FFN(NamedTuple):
  """SwiGLU feed-forward; the columns of gate come first."""

  w_in_DF: jax.Array  # [D, 2 F]
  w_out_FD: jax.Array


class Experts(NamedTuple):
  """MoE feed-forward; with `slots` (`infer/slots.py`) weights lead with slots in place of experts.
  """

  w_router_DE: jax.Array
  bias_E: jax.Array  # fp32
  w_in_EDF: jax.Array  # [E, D, 2 F]
  w_out_EFD: jax.Array
  shared: FFN | None
  slots: Any = None


class Layer(NamedTuple):
  """One Transformer block."""

  attn_norm_D: jax.Array
  attn: Attention
  ffn_norm_D: jax.Array
  ffn: FFN | Experts


class MTP(NamedTuple):
  """One MTP module (report 2.2)."""

  embed_norm_D: jax.Array
  hidden_norm_D: jax.Array
  w_embed_DD: jax.Array
  w_hidden_DD: jax.Array
  layer: Layer
  out_norm_D: jax.Array


class Parameters(NamedTuple):
  """The whole model."""

  embedding_VD: jax.Array
  layers: tuple[Layer, ...]
  final_norm_D: jax.Array
  head_DV: jax.Array
  mtp: tuple[MTP, ...]


def prepare(params: Any, buffers: Any, cfg: config.Model, dtype: str = "float32") -> Parameters:
  """The parameters of a run or a loaded model for decoding.

  Args:
    params, buffers: of `nnx.split(model, nnx.Param, RouterBias)`, arrays that are not quantized.
    cfg: the model.
    dtype: of the result, "float32" or "bfloat16"; router biases stay fp32.

  Raises:
    ConfigError: the model's attention has no latent.
  """
  if cfg.attention.kind != "mla":
    raise ConfigError(f"model.attention.kind={cfg.attention.kind!r}: decoding is for latent "
                      "attention (mla), whose cache it keeps")
  params, buffers = _pure(params), _pure(buffers)

  def each(stack: str, count: int) -> list[tuple[Any, Any]]:
    """Single layers' (parameters, buffers) of a stack."""
    one = lambda tree, i: jax.tree.map(lambda x: x[i], tree)
    return [(one(params[stack], i), one(buffers.get(stack, {}), i)) for i in range(count)]

  found = Parameters(
      params["embedding_VD"],
      tuple(_layer(p, b, cfg) for p, b in [*each("dense", cfg.dense_layers),
                                           *each("moe", cfg.moe_layers)]),
      params["final_norm_D"], params["head_DV"],
      tuple(MTP(p["embed_norm_D"], p["hidden_norm_D"], p["w_embed_DD"], p["w_hidden_DD"],
                _layer(p["block"], b["block"], cfg), p["out_norm_D"])
            for p, b in each("mtp", cfg.mtp_depth)))
  return jax.tree_util.tree_map_with_path(
      lambda path, x: x if path[-1].name == "bias_E" else x.astype(dtype), found)


def _pure(tree: Any) -> Any:
  return nnx.to_pure_dict(tree) if isinstance(tree, nnx.State) else tree


def _layer(p: dict[str, Any], b: dict[str, Any], cfg: config.Model) -> Layer:
  ffn = p["ffn"]
  if "w_router_DE" in ffn:
    made = Experts(ffn["w_router_DE"], b["ffn"]["bias_E"],
                   jnp.concatenate([ffn["w_gate_EDF"], ffn["w_up_EDF"]], -1), ffn["w_down_EFD"],
                   _ffn(ffn["shared"]) if ffn.get("shared") else None)
  else:
    made = _ffn(ffn)
  return Layer(p["attn_norm_D"], _attention(p["attn"], cfg.attention), p["ffn_norm_D"], made)


def _attention(p: dict[str, Any], cfg: config.Attention) -> Attention:
  w_ukv_CHW, N = p["w_ukv_CHW"], cfg.nope_dim
  return Attention(
      p.get("w_dq_DQ"), p.get("q_norm_Q"), _halves(p["w_uq_QHK" if cfg.q_rank else "w_q_DHK"], N),
      _halves(p["w_dkv_DZ"], cfg.kv_rank), p["kv_norm_C"],
      jnp.transpose(w_ukv_CHW[..., :N], (1, 2, 0)), jnp.transpose(w_ukv_CHW[..., N:], (1, 0, 2)),
      p["w_o_HUD"])


def _halves(w: jax.Array, keep: int) -> jax.Array:
  return jnp.concatenate([w[..., :keep], rope.to_halves(w[..., keep:])], axis=-1)


def _ffn(p: dict[str, Any]) -> FFN:
  return FFN(jnp.concatenate([p["w_gate_DF"], p["w_up_DF"]], -1), p["w_down_FD"])
