"""Every tensor of a DeepseekV3ForCausalLM folder and where it lives in our parameter tree.

Names and shapes are the release's (facts 6.1): torch Linear weights are [out, in], one tensor per
layer and expert, MTP modules are layers `num_hidden_layers` onwards. Ours are [in, out] with heads
split out, and layers of one kind are stacked. One `Slot` says both sides of one tensor; `read` and
`write` are each other's inverse.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np

from dsv3_jax import config

Path = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Part:
  """The element `index` (of the leading axes) of the parameter at `path`."""

  path: Path
  index: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Slot:
  """One checkpoint tensor. `parts` hold it together, cut along its last axis ([in] of a Linear)."""

  name: str
  shape: tuple[int, ...]
  parts: tuple[Part, ...]
  transpose: bool = False  # [out, in] there, [in, out] here
  rotated: int = 0  # trailing numbers of our last axis that RoPE turns
  float32: bool = False  # stored in fp32 whatever the dtype of the rest
  quantized: bool = False  # in FP8, where the folder is

  def read(self, array: np.ndarray, targets: list[np.ndarray], *, half_split: bool) -> None:
    """Copies the checkpoint's `array` into `targets`, one view a part.

    `half_split`: the checkpoint rotates elements i and i + R/2 together (`rope_interleave:
    false`); they are brought to the adjacent pairs of our layout.
    """
    for piece, target in zip(np.split(array, len(self.parts), axis=-1), targets, strict=True):
      if self.transpose:
        piece = piece.T
      target[...] = piece.reshape(target.shape)
      if half_split and self.rotated:
        turned = target[..., -self.rotated:]
        turned[...] = np.stack(np.split(turned, 2, axis=-1), axis=-1).reshape(turned.shape)

  def write(self, sources: list[np.ndarray]) -> np.ndarray:
    """The checkpoint's array from our parts, contiguous."""
    pieces = sources
    if self.transpose:
      width = self.shape[-1] // len(self.parts)
      pieces = [source.reshape(width, -1).T for source in sources]
    joined = pieces[0] if len(pieces) == 1 else np.concatenate(pieces, axis=-1)
    return np.ascontiguousarray(joined).reshape(self.shape)


def _attention(cfg: config.Model, name: str, path: Path, index: tuple[int, ...]) -> Iterator[Slot]:
  a, D = cfg.attention, cfg.dim
  H, Q, C, R, K = a.heads, a.q_rank, a.kv_rank, a.rope_dim, a.qk_dim
  W = a.nope_dim + a.v_dim

  def linear(key: str, out: int, width: int, leaf: str, rotated: int = 0) -> Slot:
    return Slot(f"{name}{key}.weight", (out, width), (Part((*path, leaf), index),),
                transpose=True, rotated=rotated, quantized=True)

  def gain(key: str, size: int, leaf: str) -> Slot:
    return Slot(f"{name}{key}.weight", (size,), (Part((*path, leaf), index),))

  if Q:
    yield linear("q_a_proj", Q, D, "w_dq_DQ")
    yield gain("q_a_layernorm", Q, "q_norm_Q")
    yield linear("q_b_proj", H * K, Q, "w_uq_QHK", R)
  else:
    yield linear("q_proj", H * K, D, "w_q_DHK", R)
  yield linear("kv_a_proj_with_mqa", C + R, D, "w_dkv_DZ", R)
  yield gain("kv_a_layernorm", C, "kv_norm_C")
  yield linear("kv_b_proj", H * W, C, "w_ukv_CHW")
  yield linear("o_proj", D, H * a.v_dim, "w_o_HUD")


def _ffn(cfg: config.Model, name: str, path: Path, index: tuple[int, ...], width: int,
         axes: tuple[str, str] = ("DF", "FD")) -> Iterator[Slot]:
  """gate, up and down of one SwiGLU; `axes` are the suffixes of our parameters."""
  for key, leaf in (("gate_proj", f"w_gate_{axes[0]}"), ("up_proj", f"w_up_{axes[0]}")):
    yield Slot(f"{name}{key}.weight", (width, cfg.dim), (Part((*path, leaf), index),),
               transpose=True, quantized=True)
  yield Slot(f"{name}down_proj.weight", (cfg.dim, width),
             (Part((*path, f"w_down_{axes[1]}"), index),), transpose=True, quantized=True)


def _block(cfg: config.Model, name: str, path: Path, layer: int, dense: bool) -> Iterator[Slot]:
  """One Transformer layer; `layer` counts within our stack at `path`."""
  D, moe, index = cfg.dim, cfg.moe, (layer,)
  yield Slot(f"{name}input_layernorm.weight", (D,), (Part((*path, "attn_norm_D"), index),))
  yield from _attention(cfg, f"{name}self_attn.", (*path, "attn"), index)
  yield Slot(f"{name}post_attention_layernorm.weight", (D,), (Part((*path, "ffn_norm_D"), index),))
  ffn = (*path, "ffn")
  if dense:
    yield from _ffn(cfg, f"{name}mlp.", ffn, index, cfg.dense_ffn_dim)
    return
  yield Slot(f"{name}mlp.gate.weight", (moe.experts, D), (Part((*ffn, "w_router_DE"), index),),
             transpose=True)
  yield Slot(f"{name}mlp.gate.e_score_correction_bias", (moe.experts,),
             (Part((*ffn, "bias_E"), index),), float32=True)
  for expert in range(moe.experts):
    yield from _ffn(cfg, f"{name}mlp.experts.{expert}.", ffn, (layer, expert), moe.ffn_dim,
                    ("EDF", "EFD"))
  if moe.shared:
    yield from _ffn(cfg, f"{name}mlp.shared_experts.", (*ffn, "shared"), index,
                    moe.shared * moe.ffn_dim)


def slots(cfg: config.Model) -> Iterator[Slot]:
  """All tensors of the model, in the release's order; `lm_head.weight` last of the main model."""
  V, D = cfg.vocab_size, cfg.dim
  yield Slot("model.embed_tokens.weight", (V, D), (Part(("embedding_VD",)),))
  for layer in range(cfg.layers):
    dense = layer < cfg.dense_layers
    kind, number = ("dense", layer) if dense else ("moe", layer - cfg.dense_layers)
    yield from _block(cfg, f"model.layers.{layer}.", (kind,), number, dense)
  yield Slot("model.norm.weight", (D,), (Part(("final_norm_D",)),))
  yield Slot("lm_head.weight", (V, D), (Part(("head_DV",)),), transpose=True)
  for depth in range(cfg.mtp_depth):
    name, index = f"model.layers.{cfg.layers + depth}.", (depth,)
    yield Slot(f"{name}enorm.weight", (D,), (Part(("mtp", "embed_norm_D"), index),))
    yield Slot(f"{name}hnorm.weight", (D,), (Part(("mtp", "hidden_norm_D"), index),))
    yield Slot(f"{name}eh_proj.weight", (D, 2 * D),
               (Part(("mtp", "w_embed_DD"), index), Part(("mtp", "w_hidden_DD"), index)),
               transpose=True)
    yield from _block(cfg, name, ("mtp", "block"), depth, dense=False)
    yield Slot(f"{name}shared_head.norm.weight", (D,), (Part(("mtp", "out_norm_D"), index),))


def duplicates(cfg: config.Model) -> dict[str, str]:
  """Tensors that the release stores again with each MTP module -> the main model's tensor."""
  pairs = {}
  for depth in range(cfg.mtp_depth):
    name = f"model.layers.{cfg.layers + depth}."
    pairs[f"{name}embed_tokens.weight"] = "model.embed_tokens.weight"
    pairs[f"{name}shared_head.head.weight"] = "lm_head.weight"
  return pairs


def empty_tensors(cfg: config.Model) -> dict[str, tuple[int, ...]]:
  """Zero-sized weights that transformers keeps where there is no shared expert."""
  if cfg.moe.shared:
    return {}
  layers = range(cfg.dense_layers, cfg.layers + cfg.mtp_depth)
  return {slot.name: slot.shape for layer in layers
          for slot in _ffn(cfg, f"model.layers.{layer}.mlp.shared_experts.", (), (), 0)}
