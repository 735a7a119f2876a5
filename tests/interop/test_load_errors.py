"""Damaged, incomplete and unsupported folders. Oracle: the damage itself, named in the message."""

import json

import numpy as np
import pytest

from dsv3_jax.config import ConfigError
from dsv3_jax.interop import huggingface
from tests.interop import oracle
from tests.interop.oracle import BASE, YARN

SMALL = BASE | dict(num_hidden_layers=2, n_routed_experts=4, n_group=2, topk_group=1,
                    num_experts_per_tok=2)
ROPE = "rope_parameters"


@pytest.fixture(scope="module")
def tensors():
  return oracle.random_tensors(SMALL)


@pytest.mark.parametrize("change, words", [
    (dict(attention_bias=True), "attention_bias=True is not supported"),
    (dict(hidden_act="gelu"), "hidden_act='gelu'"),
    (dict(moe_layer_freq=2), "moe_layer_freq=2"),
    (dict(scoring_func="softmax"), "scoring_func='softmax'"),
    (dict(topk_method="greedy"), "topk_method='greedy'"),
    (dict(attention_dropout=0.1), "attention_dropout=0.1"),
    (dict(num_key_value_heads=2), "num_key_value_heads=2"),
    (dict(partial_rotary_factor=0.5), "partial_rotary_factor=0.5"),
    (dict(architectures=["LlamaForCausalLM"]), "LlamaForCausalLM"),
    (dict(architectures=None, model_type="deepseek_v2"), "deepseek_v2"),
    (dict(hidden_size=None), "missing key hidden_size"),
    (dict(kv_lora_rank=None, v_head_dim=None), "missing keys kv_lora_rank, v_head_dim"),
    (dict(hidden_size="32"), "hidden_size='32' has type str"),
    (dict(norm_topk_prob=1), "norm_topk_prob=1 has type int"),
    (dict(hidden_size=32.5), "model.dim=32.5"),
    (dict(rope_scaling=dict(type="linear", factor=2.0)), "rope_scaling.rope_type='linear'"),
    (dict(rope_parameters=dict(rope_type="llama3")), f"{ROPE}.rope_type='llama3'"),
    (dict(rope_scaling=YARN | dict(truncate=False)), "rope_scaling.truncate=False"),
    (dict(rope_scaling=YARN | dict(factor=0.5)), "rope_scaling.factor=0.5"),
    (dict(rope_scaling=YARN | dict(original_max_position_embeddings=0)),
     "original_max_position_embeddings=0 .* must be positive"),
    (dict(rope_scaling=YARN | dict(mscale_all_dim=-10)), "mscale_all_dim=-10"),
    (dict(rope_scaling=YARN, rope_theta=1.0), "rope_theta=1.0 must exceed 1"),
    (dict(rope_scaling=YARN | dict(factor="40")), "rope_scaling.factor='40'"),
    (dict(rope_scaling="yarn"), "rope_scaling='yarn' must be an object"),
    (dict(num_experts_per_tok=3), "model.moe.active=3"),
    (dict(quantization_config=dict(quant_method="gptq")), "quant_method='gptq'"),
    (dict(quantization_config=dict(quant_method="fp8")), "weight_block_size=None"),
    (dict(quantization_config=dict(quant_method="fp8", weight_block_size=[128, 0])),
     r"weight_block_size=\[128, 0\]"),
])
def test_config(change, words, tensors, tmp_path):
  c = {key: value for key, value in (SMALL | change).items()
       if value is not None or key in ("q_lora_rank", "rope_scaling")}
  folder = oracle.write_folder(tmp_path / "m", c, tensors)
  with pytest.raises(ConfigError, match=words) as raised:
    huggingface.load(folder)
  assert str(folder / "config.json") in str(raised.value)


def test_config_key_without_default(tensors, tmp_path):
  c = {key: value for key, value in SMALL.items() if key not in ("n_group", "topk_group")}
  with pytest.raises(ConfigError, match="missing keys n_group, topk_group"):
    huggingface.load(oracle.write_folder(tmp_path / "m", c, tensors))


@pytest.mark.parametrize("text", ["", "{", "[]", "\xff"])
def test_unreadable_config(text, tensors, tmp_path):
  folder = oracle.write_folder(tmp_path / "m", SMALL, tensors)
  (folder / "config.json").write_bytes(text.encode("latin-1"))
  with pytest.raises(ConfigError, match="config.json"):
    huggingface.load(folder)


def test_no_folder(tmp_path):
  with pytest.raises(ConfigError, match="config.json does not exist"):
    huggingface.load(tmp_path / "nothing")


def test_no_weights(tmp_path):
  (tmp_path / "config.json").write_text(json.dumps(SMALL))
  with pytest.raises(ValueError, match="neither model.safetensors.index.json nor"):
    huggingface.load(tmp_path)


def test_unknown_dtype(tensors, tmp_path):
  folder = oracle.write_folder(tmp_path / "m", SMALL, tensors)
  for dtype in ("float31", "int8"):
    with pytest.raises(ValueError, match=f"dtype='{dtype}' must be float32"):
      huggingface.load(folder, dtype=dtype)


def load_changed(tmp_path, tensors, c=SMALL, **kwargs):
  return huggingface.load(oracle.write_folder(tmp_path / "m", c, tensors, **kwargs))


def test_missing_tensor(tensors, tmp_path):
  gone = "model.layers.1.mlp.experts.2.down_proj.weight"
  with pytest.raises(ValueError, match=rf"missing tensors \(1\): {gone}"):
    load_changed(tmp_path, {k: v for k, v in tensors.items() if k != gone})


def test_unknown_tensor(tensors, tmp_path):
  extra = {"model.layers.1.self_attn.q_proj.weight": np.zeros((80, 32), np.float32)}
  with pytest.raises(ValueError, match=r"unknown tensors \(1\): model.layers.1.self_attn.q_proj"):
    load_changed(tmp_path, tensors | extra)


def test_misshapen_tensor(tensors, tmp_path):
  name = "model.layers.0.self_attn.o_proj.weight"
  wrong = {name: np.ascontiguousarray(tensors[name].T)}
  with pytest.raises(ValueError, match=rf"{name}' has shape \[40, 32\].* implies \[32, 40\]"):
    load_changed(tmp_path, tensors | wrong)


def test_partial_mtp(tmp_path):
  c = SMALL | dict(num_nextn_predict_layers=1)
  tensors = oracle.random_tensors(c)
  for name in ("enorm", "eh_proj"):
    del tensors[f"model.layers.2.{name}.weight"]
  with pytest.raises(ValueError, match="model.layers.2.enorm.weight, model.layers.2.eh_proj"):
    load_changed(tmp_path, tensors, c)


@pytest.mark.parametrize("cut", [1, 200, -4])
def test_truncated_file(cut, tensors, tmp_path):
  folder = oracle.write_folder(tmp_path / "m", SMALL, tensors, shards=2)
  file = folder / "model-00002-of-00002.safetensors"
  file.write_bytes(file.read_bytes()[:cut])
  with pytest.raises(ValueError, match="model-00002-of-00002.safetensors is truncated or damaged"):
    huggingface.load(folder)


def test_missing_shard(tensors, tmp_path):
  folder = oracle.write_folder(tmp_path / "m", SMALL, tensors, shards=2)
  (folder / "model-00001-of-00002.safetensors").unlink()
  with pytest.raises(ValueError, match="model-00001-of-00002.safetensors is missing"):
    huggingface.load(folder)


def test_index_disagrees(tensors, tmp_path):
  folder = oracle.write_folder(tmp_path / "m", SMALL, tensors, shards=2)
  index = folder / "model.safetensors.index.json"
  weight_map = json.loads(index.read_text())["weight_map"]
  other = {"model-00001-of-00002.safetensors": "model-00002-of-00002.safetensors"}
  weight_map["lm_head.weight"] = other.get(weight_map["lm_head.weight"], next(iter(other)))
  index.write_text(json.dumps({"weight_map": weight_map}))
  with pytest.raises(ValueError, match="places 'lm_head.weight' in .* does not hold it"):
    huggingface.load(folder)


@pytest.mark.parametrize("damage, words", [
    ("missing", r"missing tensors \(1\): model.layers.0.mlp.up_proj.weight_scale_inv"),
    ("shape", r"up_proj.weight_scale_inv' has shape \[2, 2\].* implies \[3, 2\]"),
    ("orphan", r"unknown tensors \(1\): lm_head.weight_scale_inv"),
    ("config", "up_proj.weight' is float8, but config.json has no quantization_config"),
])
def test_fp8_scales(damage, words, tensors, tmp_path):
  block = (16, 16)
  c = SMALL | dict(quantization_config=dict(quant_method="fp8", weight_block_size=list(block)))
  quantized = oracle.quantize(tensors, block)
  scale = "model.layers.0.mlp.up_proj.weight_scale_inv"
  if damage == "missing":
    del quantized[scale]
  elif damage == "shape":
    quantized[scale] = quantized[scale][:2]
  elif damage == "orphan":
    quantized["lm_head.weight_scale_inv"] = np.ones((4, 2), np.float32)
  else:
    del c["quantization_config"]
    name = scale.removesuffix("_scale_inv")
    quantized = tensors | {name: quantized[name]}
  with pytest.raises(ValueError, match=words):
    load_changed(tmp_path, quantized, c)
