"""`config.json` of a DeepseekV3ForCausalLM folder <-> `dsv3_jax.config.Model`.

Both spellings of the rotary settings are read and written: `rope_theta` with `rope_scaling`
(the release, transformers 4) and `rope_parameters` (transformers 5). Where the two libraries and
the release differ, transformers' `DeepseekV3ForCausalLM` is followed, because logits are compared
with it. A key that changes the computation in a way that this project does not build is refused
by name; keys that do not touch the logits (dropout aside) are ignored.
"""

import json
import math
import pathlib
from typing import Any

from dsv3_jax import config
from dsv3_jax.config import ConfigError
from dsv3_jax.model import rope as rope_lib

ARCHITECTURE = "DeepseekV3ForCausalLM"
MODEL_TYPE = "deepseek_v3"

# The one value of each key that leaves the computation as it is built here.
_ONLY = {
    "attention_bias": (False,),
    "attention_dropout": (0,),
    "hidden_act": ("silu",),
    "index_topk": (None,),
    "mlp_bias": (False,),
    "moe_layer_freq": (1,),
    "mtp_hidden_states_first": (False,),
    "partial_rotary_factor": (1,),
    "scoring_func": ("sigmoid",),
    "sliding_window": (None,),
    "topk_method": ("noaux_tc",),
    "use_sliding_window": (False,),
}
_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
             "num_attention_heads", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim",
             "v_head_dim")
_REQUIRED_MOE = ("moe_intermediate_size", "num_experts_per_tok", "routed_scaling_factor",
                 "first_k_dense_replace")
_PRESENT_MOE = ("n_shared_experts", "n_group", "topk_group")  # null has a meaning: none
_LATENT_EPS = 1e-6  # not a key of config.json: rms_norm_eps leaves the latents' norms alone
_ROPE_DEFAULT_THETA = 10_000.0
# Keys of the rotary section that change nothing, or that are read below.
_ROPE_KEYS = ("type", "rope_type", "rope_theta", "factor", "original_max_position_embeddings",
              "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor")


def read_json(file: pathlib.Path) -> dict[str, Any]:
  """A JSON object from `file`; ConfigError naming the file where it is missing or malformed."""
  try:
    values = json.loads(file.read_text(encoding="utf-8"))
  except FileNotFoundError:
    raise ConfigError(f"{file} does not exist; expected a Hugging Face model folder with "
                      "config.json and *.safetensors") from None
  except (OSError, ValueError) as error:
    raise ConfigError(f"{file} cannot be read as JSON: {error}") from error
  if not isinstance(values, dict):
    raise ConfigError(f"{file} holds a {type(values).__name__}; a JSON object is expected")
  return values


def _number(values: dict[str, Any], key: str, default: Any = None, *, section: str = "") -> Any:
  """`values[key]` checked to be a number; `default` where the key is missing or null."""
  value = values.get(key)
  if value is None:
    return default
  if isinstance(value, bool) or not isinstance(value, (int, float)):
    raise ConfigError(f"{section}{key}={value!r} has type {type(value).__name__}; a number is "
                      "expected")
  return value


def _flag(values: dict[str, Any], key: str, default: bool) -> bool:
  value = values.get(key)
  if value is None:
    return default
  if not isinstance(value, bool):
    raise ConfigError(f"{key}={value!r} has type {type(value).__name__}; true or false is "
                      "expected")
  return value


def check_supported(values: dict[str, Any]) -> None:
  names = values.get("architectures") or []
  if ARCHITECTURE not in names and (names or values.get("model_type") != MODEL_TYPE):
    raise ConfigError(f"architectures={names!r}, model_type={values.get('model_type')!r}: only "
                      f"{ARCHITECTURE} ({MODEL_TYPE}) folders can be loaded")
  for key, allowed in _ONLY.items():
    value = values.get(key)
    if value is not None and value not in allowed:
      raise ConfigError(f"{key}={value!r} is not supported; only {allowed[0]!r} is built here")
  heads, kv_heads = values.get("num_attention_heads"), values.get("num_key_value_heads")
  if kv_heads is not None and kv_heads != heads:
    raise ConfigError(f"num_key_value_heads={kv_heads!r} is not supported; latent attention has "
                      f"as many key heads as query heads ({heads!r})")
  missing = [key for key in _REQUIRED if values.get(key) is None]
  if values.get("n_routed_experts") is not None:
    missing += [key for key in _REQUIRED_MOE if values.get(key) is None]
    missing += [key for key in _PRESENT_MOE if key not in values]
  if missing:
    raise ConfigError(f"missing key{'s' * (len(missing) > 1)} {', '.join(missing)}")


def _rope(values: dict[str, Any]) -> tuple[float, config.Yarn]:
  """Rotary base and YaRN settings from either spelling."""
  section = "rope_scaling" if values.get("rope_scaling") else "rope_parameters"
  rope = values.get(section) or {}
  if not isinstance(rope, dict):
    raise ConfigError(f"{section}={rope!r} must be an object")
  top_theta = _number(values, "rope_theta", _ROPE_DEFAULT_THETA)
  theta = float(_number(rope, "rope_theta", top_theta, section=f"{section}."))
  longest = _number(values, "max_position_embeddings", 4096)
  kind = rope.get("rope_type", rope.get("type", "default"))
  if kind not in ("default", "yarn"):
    raise ConfigError(f"{section}.rope_type={kind!r} is not supported; only default and yarn are "
                      "built here")
  for key, value in rope.items():
    harmless = value is None or (key, value) in (("truncate", True), ("partial_rotary_factor", 1))
    if key not in _ROPE_KEYS and not harmless:
      raise ConfigError(f"{section}.{key}={value!r} is not supported; known keys: "
                        f"{', '.join(_ROPE_KEYS)}")
  if kind == "default":
    return theta, config.Yarn(factor=1.0, original_length=longest)

  def get(key, default):
    return _number(rope, key, default, section=f"{section}.")

  original = get("original_max_position_embeddings", longest)
  if original <= 0:
    raise ConfigError(f"{section}.original_max_position_embeddings={original} (by default "
                      "max_position_embeddings) must be positive")
  factor = float(get("factor", longest / original))
  if factor < 1:
    raise ConfigError(f"{section}.factor={factor} must be at least 1")
  mscale, all_dim = get("mscale", 0), get("mscale_all_dim", 0)
  table = get("attention_factor", None)
  if table is None and not (mscale and all_dim):
    table = rope_lib.mscale(factor, 1.0)  # transformers' rule where either is missing or 0
  if table is not None and factor > 1:
    # The factor on cos and sin is m(mscale) / m(mscale_all_dim): solve it for mscale.
    mscale = (table * rope_lib.mscale(factor, all_dim) - 1.0) / (0.1 * math.log(factor))
    mscale = round(mscale, 12)
  return theta, config.Yarn(
      factor=factor, original_length=original, beta_fast=float(get("beta_fast", 32.0)),
      beta_slow=float(get("beta_slow", 1.0)), mscale=float(mscale),
      mscale_all_dim=float(all_dim))


def mtp_depth(values: dict[str, Any]) -> int | None:
  """Multi-token prediction layers that the config announces; None where it says nothing."""
  return _number(values, "num_nextn_predict_layers", _number(values, "num_mtp_layers"))


def from_hf(values: dict[str, Any], *, mtp: int = 0) -> config.Model:
  """The model that a Hugging Face config describes.

  Args:
    values: the parsed `config.json`.
    mtp: multi-token prediction layers found among the tensors (the config may announce layers
      whose tensors were left out).

  Raises:
    ConfigError: a missing key, a wrong type, or a value that this project does not build; the
      message names the key as `config.json` spells it.
  """
  check_supported(values)
  theta, yarn = _rope(values)
  layers = _number(values, "num_hidden_layers")
  eps = float(_number(values, "rms_norm_eps", 1e-6))
  dense, moe = layers, config.MoE()
  if values.get("n_routed_experts") is not None:
    dense = min(_number(values, "first_k_dense_replace"), layers)
    experts = _number(values, "n_routed_experts")
    groups = _number(values, "n_group", 1)
    moe = dict(
        experts=experts, active=_number(values, "num_experts_per_tok"),
        shared=_number(values, "n_shared_experts", 0),
        ffn_dim=_number(values, "moe_intermediate_size"), groups=groups,
        active_groups=_number(values, "topk_group", groups), group_top=2, gate="sigmoid",
        normalize=_flag(values, "norm_topk_prob", True),
        scale=float(_number(values, "routed_scaling_factor")))
  return config.from_dict(dict(
      vocab_size=_number(values, "vocab_size"), dim=_number(values, "hidden_size"), layers=layers,
      dense_layers=dense, dense_ffn_dim=_number(values, "intermediate_size"),
      attention=dict(
          heads=_number(values, "num_attention_heads"), q_rank=_number(values, "q_lora_rank", 0),
          kv_rank=_number(values, "kv_lora_rank"), nope_dim=_number(values, "qk_nope_head_dim"),
          rope_dim=_number(values, "qk_rope_head_dim"), v_dim=_number(values, "v_head_dim"),
          rope_theta=theta, yarn=yarn, latent_norm_eps=_LATENT_EPS),
      moe=moe, mtp_depth=mtp, mtp_input=values.get("mtp_input", "normed"), norm_eps=eps,
      init_std=float(_number(values, "initializer_range", 0.02))), config.Model, "model")


def to_hf(cfg: config.Model, *, dtype: str, bos_token_id: int | None = None,
          eos_token_id: int | None = None) -> dict[str, Any]:
  """The `config.json` of `cfg`, in the release's spelling and in transformers 5's.

  Raises:
    ConfigError: `cfg` computes something that DeepseekV3ForCausalLM cannot express.
  """
  attn, moe = cfg.attention, cfg.moe
  yarn = attn.yarn
  if attn.kind != "mla":
    raise ConfigError(f"model.attention.kind={attn.kind!r} cannot be written: {ARCHITECTURE} has "
                      "latent attention only")
  if moe.gate != "sigmoid":
    raise ConfigError(f"model.moe.gate={moe.gate!r} cannot be written: {ARCHITECTURE} has sigmoid "
                      "gates only")
  if moe.active_groups < moe.groups and moe.group_top != 2:
    raise ConfigError(f"model.moe.group_top={moe.group_top} cannot be written: {ARCHITECTURE} "
                      "scores a group by its 2 largest affinities")
  if attn.latent_norm_eps != _LATENT_EPS:
    raise ConfigError(f"model.attention.latent_norm_eps={attn.latent_norm_eps} cannot be written: "
                      f"{ARCHITECTURE} fixes it to {_LATENT_EPS}")
  scaling = None
  if yarn.factor > 1:
    scaling = {
        "type": "yarn", "rope_type": "yarn", "factor": yarn.factor,
        "original_max_position_embeddings": yarn.original_length, "beta_fast": yarn.beta_fast,
        "beta_slow": yarn.beta_slow, "mscale": yarn.mscale, "mscale_all_dim": yarn.mscale_all_dim,
    }
    if not (yarn.mscale and yarn.mscale_all_dim):  # transformers would replace the ratio
      scaling["attention_factor"] = rope_lib.table_scale(attn)
  parameters = {k: v for k, v in (scaling or {"rope_type": "default"}).items() if k != "type"}
  return {
      "architectures": [ARCHITECTURE],
      "model_type": MODEL_TYPE,
      "vocab_size": cfg.vocab_size,
      "hidden_size": cfg.dim,
      "num_hidden_layers": cfg.layers,
      "first_k_dense_replace": cfg.dense_layers,
      "intermediate_size": cfg.dense_ffn_dim,
      "hidden_act": "silu",
      "rms_norm_eps": cfg.norm_eps,
      "initializer_range": cfg.init_std,
      "tie_word_embeddings": False,
      "num_attention_heads": attn.heads,
      "num_key_value_heads": attn.heads,
      "q_lora_rank": attn.q_rank or None,
      "kv_lora_rank": attn.kv_rank,
      "qk_nope_head_dim": attn.nope_dim,
      "qk_rope_head_dim": attn.rope_dim,
      "v_head_dim": attn.v_dim,
      "attention_bias": False,
      "attention_dropout": 0.0,
      "rope_interleave": True,
      "rope_theta": attn.rope_theta,
      "rope_scaling": scaling,
      "rope_parameters": parameters | {"rope_theta": attn.rope_theta},
      "max_position_embeddings": round(yarn.factor * yarn.original_length),
      "moe_layer_freq": 1,
      "moe_intermediate_size": moe.ffn_dim,
      "n_routed_experts": moe.experts,
      "n_shared_experts": moe.shared,
      "num_experts_per_tok": moe.active,
      "n_group": moe.groups,
      "topk_group": moe.active_groups,
      "topk_method": "noaux_tc",
      "scoring_func": "sigmoid",
      "norm_topk_prob": moe.normalize,
      "routed_scaling_factor": moe.scale,
      "num_nextn_predict_layers": cfg.mtp_depth,
      "mtp_input": cfg.mtp_input,  # ours; ignored by other readers
      "bos_token_id": bos_token_id,
      "eos_token_id": eos_token_id,
      "use_cache": True,
      "dtype": dtype,
      "torch_dtype": dtype,
  }
