"""DeepSeek-V3 in float64 numpy, straight from a Hugging Face config and its named tensors.

Written from the report's equations and the released files' layout, without any of this project's
code: an oracle for names, layouts and for the corrected group mask (-inf, where transformers 4
fills 0 and so may choose a masked expert when biased scores are negative).
"""

import json
import math

import ml_dtypes
import numpy as np
from safetensors import numpy as safetensors_numpy

BASE = dict(
    architectures=["DeepseekV3ForCausalLM"], model_type="deepseek_v3", vocab_size=61,
    hidden_size=32, num_hidden_layers=3, first_k_dense_replace=1, moe_layer_freq=1,
    intermediate_size=48, moe_intermediate_size=20, n_routed_experts=16, n_shared_experts=1,
    num_experts_per_tok=4, n_group=4, topk_group=2, topk_method="noaux_tc",
    scoring_func="sigmoid", norm_topk_prob=True, routed_scaling_factor=2.5, num_attention_heads=4,
    num_key_value_heads=4, q_lora_rank=24, kv_lora_rank=16, qk_nope_head_dim=12,
    qk_rope_head_dim=8, v_head_dim=10, rope_theta=10000.0, rope_scaling=None, rms_norm_eps=1e-6,
    hidden_act="silu", attention_bias=False, attention_dropout=0.0, tie_word_embeddings=False,
    max_position_embeddings=64, initializer_range=0.02, num_nextn_predict_layers=0,
    bos_token_id=None, eos_token_id=None, torch_dtype="float32")

YARN = dict(type="yarn", factor=40, beta_fast=32, beta_slow=1, mscale=1.0, mscale_all_dim=1.0,
            original_max_position_embeddings=16)


def shapes(c):
  """Tensor name -> torch shape of the released layout."""
  D, H = c["hidden_size"], c["num_attention_heads"]
  K, R = c["qk_nope_head_dim"] + c["qk_rope_head_dim"], c["qk_rope_head_dim"]
  C, Q, F = c["kv_lora_rank"], c["q_lora_rank"], c["moe_intermediate_size"]
  out = {"model.embed_tokens.weight": (c["vocab_size"], D), "model.norm.weight": (D,)}
  if not c["tie_word_embeddings"]:
    out["lm_head.weight"] = (c["vocab_size"], D)
  layers = c["num_hidden_layers"]
  for i in range(layers + c["num_nextn_predict_layers"]):
    p = f"model.layers.{i}."
    a = p + "self_attn."
    out[p + "input_layernorm.weight"] = out[p + "post_attention_layernorm.weight"] = (D,)
    if Q:
      out[a + "q_a_proj.weight"], out[a + "q_a_layernorm.weight"] = (Q, D), (Q,)
      out[a + "q_b_proj.weight"] = (H * K, Q)
    else:
      out[a + "q_proj.weight"] = (H * K, D)
    out[a + "kv_a_proj_with_mqa.weight"], out[a + "kv_a_layernorm.weight"] = (C + R, D), (C,)
    out[a + "kv_b_proj.weight"] = (H * (c["qk_nope_head_dim"] + c["v_head_dim"]), C)
    out[a + "o_proj.weight"] = (D, H * c["v_head_dim"])
    if i < c["first_k_dense_replace"]:
      ffns = {p + "mlp.": c["intermediate_size"]}
    else:
      out[p + "mlp.gate.weight"] = (c["n_routed_experts"], D)
      out[p + "mlp.gate.e_score_correction_bias"] = (c["n_routed_experts"],)
      ffns = {f"{p}mlp.experts.{e}.": F for e in range(c["n_routed_experts"])}
      if c["n_shared_experts"]:
        ffns[p + "mlp.shared_experts."] = F * c["n_shared_experts"]
    for name, width in ffns.items():
      out[name + "gate_proj.weight"] = out[name + "up_proj.weight"] = (width, D)
      out[name + "down_proj.weight"] = (D, width)
    if i >= layers:
      out[p + "enorm.weight"] = out[p + "hnorm.weight"] = (D,)
      out[p + "eh_proj.weight"], out[p + "shared_head.norm.weight"] = (D, 2 * D), (D,)
      out[p + "embed_tokens.weight"] = out[p + "shared_head.head.weight"] = (c["vocab_size"], D)
  return out


def random_tensors(c, seed=0, bias=(-0.3, 0.3)):
  """fp32 tensors with logits of order 1, gains away from 1 and biases that change the selection."""
  rng = np.random.default_rng(seed)
  out = {}
  for name, shape in shapes(c).items():
    if name.endswith("e_score_correction_bias"):
      value = rng.uniform(*bias, shape)
    elif len(shape) == 1:
      value = 1 + 0.3 * rng.standard_normal(shape)
    elif name == "model.embed_tokens.weight":
      value = rng.standard_normal(shape)
    else:
      value = 1.3 * rng.standard_normal(shape) / math.sqrt(shape[1])
    out[name] = value.astype(np.float32)
  for name in out:
    if name.endswith("shared_head.head.weight"):
      out[name] = out["lm_head.weight"]
    elif name.endswith(".embed_tokens.weight"):
      out[name] = out["model.embed_tokens.weight"]
  return out


def write_folder(path, c, tensors, shards=1):
  """A folder as published: config.json, safetensors, and an index where there are several."""
  path.mkdir(parents=True, exist_ok=True)
  (path / "config.json").write_text(json.dumps(c))
  if shards == 1:
    safetensors_numpy.save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path
  weight_map = {}
  for shard in range(shards):
    file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
    part = {name: tensors[name] for name in sorted(tensors)[shard::shards]}
    safetensors_numpy.save_file(part, path / file, metadata={"format": "pt"})
    weight_map |= dict.fromkeys(part, file)
  index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())},
           "weight_map": weight_map}
  (path / "model.safetensors.index.json").write_text(json.dumps(index))
  return path


def quantize(tensors, block, keep=()):
  """FP8 codes and scales of the release: every Linear but head, gate and eh_proj."""
  out = {}
  for name, weight in tensors.items():
    plain = any(word in name for word in ("embed_tokens", "head", "gate.", "eh_proj", *keep))
    if weight.ndim != 2 or plain:
      out[name] = weight
      continue
    rows, columns = weight.shape
    codes = np.zeros(weight.shape, ml_dtypes.float8_e4m3fn)
    scale = np.zeros((-(-rows // block[0]), -(-columns // block[1])), np.float32)
    for i in range(scale.shape[0]):
      for j in range(scale.shape[1]):
        cut = np.s_[i * block[0]:(i + 1) * block[0], j * block[1]:(j + 1) * block[1]]
        scale[i, j] = np.abs(weight[cut]).max() / 448
        codes[cut] = (weight[cut] / scale[i, j]).astype(ml_dtypes.float8_e4m3fn)
    out[name], out[name + "_scale_inv"] = codes, scale
  return out


def dequantize(tensors, block):
  """Inverse of `quantize`, element by element: weight[i, j] = code * scale of its block."""
  out = {}
  for name, value in tensors.items():
    if name.endswith("_scale_inv"):
      continue
    if value.dtype == ml_dtypes.float8_e4m3fn:
      i, j = np.indices(value.shape)
      scale = tensors[name + "_scale_inv"][i // block[0], j // block[1]]
      value = value.astype(np.float32) * scale
    out[name] = value
  return out


def _rms(x, gain, eps):
  return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + eps) * gain


def _silu(x):
  return x / (1 + np.exp(-x))


def _rope_settings(c):
  rope = c.get("rope_scaling") or c.get("rope_parameters") or {}
  theta = rope.get("rope_theta", c.get("rope_theta", 10000.0))
  R = c["qk_rope_head_dim"]
  frequency = theta ** (-np.arange(0, R, 2) / R)
  kind = rope.get("rope_type", rope.get("type", "default"))
  scale, table = (c["qk_nope_head_dim"] + R) ** -0.5, 1.0
  if kind == "yarn":
    s, L0 = rope["factor"], rope["original_max_position_embeddings"]

    def corr(turns):
      return R * math.log(L0 / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(corr(rope.get("beta_fast", 32))), 0)
    high = min(math.ceil(corr(rope.get("beta_slow", 1))), R - 1)
    ramp = np.clip((np.arange(R // 2) - low) / max(high - low, 0.001), 0, 1)
    frequency = frequency / s * ramp + frequency * (1 - ramp)
    m = lambda weight: 0.1 * weight * math.log(s) + 1
    both = rope.get("mscale") and rope.get("mscale_all_dim")
    table = m(rope["mscale"]) / m(rope["mscale_all_dim"]) if both else m(1)
    table = rope.get("attention_factor", table)
    scale *= m(rope.get("mscale_all_dim", 0)) ** 2
  return frequency, table, scale


def _turn(x, angle, table, interleave):
  """Rotates [.., T, R]."""
  a, b = (x[..., 0::2], x[..., 1::2]) if interleave else np.split(x, 2, -1)
  cos, sin = np.cos(angle) * table, np.sin(angle) * table
  return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def _attention(c, w, p, x):
  T, H, N = len(x), c["num_attention_heads"], c["qk_nope_head_dim"]
  C, eps = c["kv_lora_rank"], 1e-6  # the latents' norms keep their default eps in every release
  frequency, table, scale = _rope_settings(c)
  angle = np.arange(T)[:, None] * frequency
  interleave = c.get("rope_interleave", True)
  if c["q_lora_rank"]:
    q = _rms(x @ w[p + "q_a_proj.weight"].T, w[p + "q_a_layernorm.weight"], eps)
    q = q @ w[p + "q_b_proj.weight"].T
  else:
    q = x @ w[p + "q_proj.weight"].T
  q = q.reshape(T, H, -1).transpose(1, 0, 2)
  z = x @ w[p + "kv_a_proj_with_mqa.weight"].T
  k_rope = _turn(z[:, C:], angle, table, interleave)
  kv = _rms(z[:, :C], w[p + "kv_a_layernorm.weight"], eps) @ w[p + "kv_b_proj.weight"].T
  kv = kv.reshape(T, H, -1).transpose(1, 0, 2)
  scores = q[..., :N] @ kv[..., :N].transpose(0, 2, 1)
  scores += _turn(q[..., N:], angle, table, interleave) @ k_rope.T
  scores = np.where(np.tri(T, dtype=bool), scores * scale, -np.inf)
  weights = np.exp(scores - scores.max(-1, keepdims=True))
  o = weights / weights.sum(-1, keepdims=True) @ kv[..., N:]
  return o.transpose(1, 0, 2).reshape(T, -1) @ w[p + "o_proj.weight"].T


def _ffn(w, p, x):
  hidden = _silu(x @ w[p + "gate_proj.weight"].T) * (x @ w[p + "up_proj.weight"].T)
  return hidden @ w[p + "down_proj.weight"].T


def select(c, score, bias):
  """Experts of one token: groups by their two best biased scores, then the best within them."""
  E, G = c["n_routed_experts"], c["n_group"]
  biased = score + bias
  groups = biased.reshape(G, E // G)
  best = np.sort(groups, -1)[:, -2:].sum(-1)
  kept = np.argsort(-best, kind="stable")[:c["topk_group"]]
  biased = np.where(np.isin(np.arange(E) // (E // G), kept), biased, -np.inf)
  return np.argsort(-biased, kind="stable")[:c["num_experts_per_tok"]]


def _moe(c, w, p, x):
  score = 1 / (1 + np.exp(-(x @ w[p + "gate.weight"].T)))
  y = _ffn(w, p + "shared_experts.", x) if c["n_shared_experts"] else np.zeros_like(x)
  for t, token in enumerate(x):
    chosen = select(c, score[t], w[p + "gate.e_score_correction_bias"])
    gate = score[t, chosen]
    if c["norm_topk_prob"]:
      gate = gate / gate.sum()
    for e, g in zip(chosen, gate * c["routed_scaling_factor"], strict=True):
      y[t] += g * _ffn(w, f"{p}experts.{e}.", token)
  return y


def _block(c, w, layer, x):
  p, eps = f"model.layers.{layer}.", c["rms_norm_eps"]
  x = x + _attention(c, w, p + "self_attn.", _rms(x, w[p + "input_layernorm.weight"], eps))
  normed = _rms(x, w[p + "post_attention_layernorm.weight"], eps)
  if layer < c["first_k_dense_replace"]:
    return x + _ffn(w, p + "mlp.", normed)
  return x + _moe(c, w, p + "mlp.", normed)


def forward(c, tensors, tokens_BT):
  """Logits [B, T, V] and, with one MTP module, its logits [B, T - 1, V] (report eq. 21-23)."""
  w = {name: value.astype(np.float64) for name, value in tensors.items()}
  embedding, eps = w["model.embed_tokens.weight"], c["rms_norm_eps"]
  head = embedding if c["tie_word_embeddings"] else w["lm_head.weight"]
  logits, mtp = [], []
  for tokens in tokens_BT:
    x = embedding[tokens]
    for layer in range(c["num_hidden_layers"]):
      x = _block(c, w, layer, x)
    x = _rms(x, w["model.norm.weight"], eps)
    logits.append(x @ head.T)
    if c["num_nextn_predict_layers"]:
      p = f"model.layers.{c['num_hidden_layers']}."
      both = np.concatenate([_rms(embedding[tokens[1:]], w[p + "enorm.weight"], eps),
                             _rms(x[:-1], w[p + "hnorm.weight"], eps)], -1)
      h = _block(c, w, c["num_hidden_layers"], both @ w[p + "eh_proj.weight"].T)
      mtp.append(_rms(h, w[p + "shared_head.norm.weight"], eps) @ head.T)
  return np.stack(logits), np.stack(mtp) if mtp else None
