"""A model's parameters as decoding reads them, made once.

Training stacks the layers and keeps weights as checkpoints have them. A decode step reads every
weight once and does little else, so whatever would be copied a step is copied here: layers lie
apart, rotary columns are in halves (`model/rope.py`), gate and up lie side by side, and the
up-projection of the latent is in the two parts that absorption multiplies by.

FP8 weights stay FP8: a byte each, and a scale a block of 128x128 (`infer/matmul.py` multiplies by
them). A column cannot leave its block, so rotary columns lie as they were, the up-projection of the
latent is whole, and where gate's last block is cut short it is filled with zeros before up begins.
Each is held once, in the form in which it is multiplied: Hopper's kernels want the summed axis
contiguous, [outputs, inputs]; what XLA is to dequantize is kept as bytes, because it makes copies
of a float8 array to read its bytes.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from dsv3_jax import config, ops
from dsv3_jax.config import ConfigError
from dsv3_jax.fp8 import recipe as recipe_lib
from dsv3_jax.fp8 import weights
from dsv3_jax.fp8.qtensor import QTensor
from dsv3_jax.fp8.weights import Weight
from dsv3_jax.model import rope

Matrix = jax.Array | Weight


class Attention(NamedTuple):
  """MLA of one layer; Y is Q, or D without a query latent."""

  w_dq_DQ: Matrix | None
  q_norm_Q: jax.Array | None
  w_q_YHK: Matrix
  w_dkv_DZ: Matrix
  kv_norm_C: jax.Array
  w_uk_HNC: jax.Array | None  # W_UK: keys without position, of each head
  w_uv_HCU: jax.Array | None  # W_UV: values
  w_o_HUD: Matrix
  w_ukv_CHW: Weight | None = None  # in place of these two in FP8; held as [H W, C]


class FFN(NamedTuple):
  """SwiGLU feed-forward; the columns of gate come first."""

  w_in_DF: Matrix  # [D, 2 F]
  w_out_FD: Matrix


class Experts(NamedTuple):
  """MoE feed-forward; with `slots` (`infer/slots.py`) weights lead with slots in place of experts.
  """

  w_router_DE: jax.Array
  bias_E: jax.Array  # fp32
  w_in_EDF: Matrix  # [E, D, 2 F]
  w_out_EFD: Matrix
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


def prepare(params: Any, buffers: Any, cfg: config.Model, dtype: str = "float32",
            impl: str = "auto") -> Parameters:
  """The parameters of a run or a loaded model for decoding.

  Args:
    params, buffers: of `nnx.split(model, nnx.Param, RouterBias)`; matrices may be FP8 without
      masters, as `interop.huggingface.load(..., quantized="keep")` or `quantized` gives them.
    cfg: the model.
    dtype: of what is not FP8, "float32" or "bfloat16"; router biases stay fp32.
    impl: runtime.fp8_impl, by which FP8 weights will be multiplied.

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
  turned = ops.fp8_multiplies_transposed(impl)

  def finish(path: Any, x: Matrix) -> Matrix:
    if isinstance(x, Weight):
      up = path[-1].name == "w_ukv_CHW"
      form = "dgrad" if turned or up else "fprop"
      held = x.fprop.mT if turned or up else x.fprop
      bare = dataclasses.replace(x, fprop=None, dgrad=None)
      return dataclasses.replace(bare, **{form: held if turned and not up else held.raw()})
    return x if path[-1].name == "bias_E" else x.astype(dtype)

  return jax.tree_util.tree_map_with_path(finish, found, is_leaf=_is_weight)


def quantized(params: Any) -> dict[str, Any]:
  """Parameters with their linear layers in FP8 as released: blocks of 128x128, fp32 scales.

  What `interop.huggingface.save(..., quantization="fp8")` writes, bit for bit. Matrices that are
  FP8 already stay as they are.

  Args:
    params: of `nnx.split(model, nnx.Param, RouterBias)`.
  """
  recipe = recipe_lib.resolve(config.Runtime(recipe="v3"))

  def make(path: Any, x: Any) -> Any:
    name = path[-1].key
    axes = None if name in ("w_embed_DD", "w_hidden_DD") else weights.axes(name)  # MTP's stay
    if isinstance(x, Weight) or axes is None:
      return x
    w = weights.quantized(weights.bare(x, *axes), recipe, transposed=False)
    return dataclasses.replace(w, master=None, dgrad=None)

  return jax.tree_util.tree_map_with_path(make, _pure(params), is_leaf=_is_weight)


def _is_weight(x: Any) -> bool:
  return isinstance(x, Weight)


def _pure(tree: Any) -> Any:
  return nnx.to_pure_dict(tree) if isinstance(tree, nnx.State) else tree


def _layer(p: dict[str, Any], b: dict[str, Any], cfg: config.Model) -> Layer:
  ffn = p["ffn"]
  if "w_router_DE" in ffn:
    made = Experts(ffn["w_router_DE"], b["ffn"]["bias_E"],
                   beside(ffn["w_gate_EDF"], ffn["w_up_EDF"]), ffn["w_down_EFD"],
                   _ffn(ffn["shared"]) if ffn.get("shared") else None)
  else:
    made = _ffn(ffn)
  return Layer(p["attn_norm_D"], _attention(p["attn"], cfg.attention), p["ffn_norm_D"], made)


def _attention(p: dict[str, Any], cfg: config.Attention) -> Attention:
  w_ukv_CHW, N = p["w_ukv_CHW"], cfg.nope_dim
  made = Attention(p.get("w_dq_DQ"), p.get("q_norm_Q"), p["w_uq_QHK" if cfg.q_rank else "w_q_DHK"],
                   p["w_dkv_DZ"], p["kv_norm_C"], None, None, p["w_o_HUD"])
  if isinstance(w_ukv_CHW, Weight):
    return made._replace(w_ukv_CHW=w_ukv_CHW)
  return made._replace(
      w_q_YHK=_halves(made.w_q_YHK, N), w_dkv_DZ=_halves(made.w_dkv_DZ, cfg.kv_rank),
      w_uk_HNC=jnp.transpose(w_ukv_CHW[..., :N], (1, 2, 0)),
      w_uv_HCU=jnp.transpose(w_ukv_CHW[..., N:], (1, 0, 2)))


def _halves(w: jax.Array, keep: int) -> jax.Array:
  return jnp.concatenate([w[..., :keep], rope.to_halves(w[..., keep:])], axis=-1)


def _ffn(p: dict[str, Any]) -> FFN:
  return FFN(beside(p["w_gate_DF"], p["w_up_DF"]), p["w_down_FD"])


def beside(gate: Matrix, up: Matrix) -> Matrix:
  """The columns of both; in FP8 with as many zeros between them as gate's last block lacks."""
  if not isinstance(gate, Weight):
    return jnp.concatenate([gate, up], -1)
  a, b = gate.fprop, up.fprop
  lacks = -a.last % a.tile[1]
  fill = jnp.zeros((*a.codes.shape[:-1], lacks), a.codes.dtype)
  both = QTensor(jnp.concatenate([a.codes, fill, b.codes], -1),
                 jnp.concatenate([a.scales, b.scales], -1), a.format, a.tile,
                 a.last + lacks + b.last).validate()
  return dataclasses.replace(gate, fprop=both, outputs=(both.last,))
