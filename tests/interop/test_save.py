"""Saving and reading back without torch."""

import json
import os
import stat

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax import config
from dsv3_jax.config import ConfigError
from dsv3_jax.interop import huggingface, names, safetensors_files
from dsv3_jax.model.transformer import Transformer
from tests.interop import oracle

SMALL = dict(vocab_size=61, dim=32, layers=3, dense_layers=1, dense_ffn_dim=48, mtp_depth=1,
             attention=dict(heads=4, q_rank=24, kv_rank=16, nope_dim=12, rope_dim=8, v_dim=10),
             moe=dict(experts=8, active=2, ffn_dim=20, groups=4, active_groups=2))
YARN = dict(factor=40.0, original_length=16, beta_fast=30.0, mscale=0.7, mscale_all_dim=1.2)
VARIANTS = {
    "default": {},
    "no_q_rank": {"attention.q_rank": 0, "mtp_depth": 2, "mtp_input": "raw", "init_std": 0.1},
    "yarn": {"attention.yarn": config.Yarn(**YARN), "norm_eps": 1e-5},
    "yarn_no_mscale": {"attention.yarn": config.Yarn(**YARN | dict(mscale=0.0)),
                       "attention.rope_theta": 500.0},
    "yarn_no_mscale_all_dim": {"attention.yarn": config.Yarn(**YARN | dict(mscale_all_dim=0.0))},
    "no_shared_expert": {"moe.shared": 0, "moe.normalize": False, "moe.scale": 1.5},
    "all_dense": {"dense_layers": 3, "mtp_depth": 0},
    "all_moe": {"dense_layers": 0, "moe.groups": 1, "moe.active_groups": 1, "moe.shared": 2},
}


def make(dtype=jnp.float32, **changes):
  """A model with random gains and biases too, so that no two tensors are alike."""
  cfg = config.replace(config.from_dict(SMALL, config.Model, "model"), **changes)
  shapes = nnx.eval_shape(lambda: Transformer(cfg, rngs=nnx.Rngs(0), dtype=dtype))
  rng = np.random.default_rng(1)
  graphdef, state = nnx.split(shapes)
  state = jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape), x.dtype), state)
  return nnx.merge(graphdef, state)


def assert_same(a, b):
  a, b = nnx.to_pure_dict(nnx.state(a)), nnx.to_pure_dict(nnx.state(b))
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b)):
    assert x.dtype == y.dtype
    np.testing.assert_array_equal(np.asarray(x), np.asarray(y), err_msg=str(path))


@pytest.mark.parametrize("name", VARIANTS)
def test_round_trip(name, tmp_path):
  """Law: load(save(model)) is the model, every bit and every config value."""
  model = make(**VARIANTS[name])
  huggingface.save(model, tmp_path / "m", max_shard_bytes=20_000)
  again = huggingface.load(tmp_path / "m")
  if "yarn_no_mscale" in name:  # the file holds the factor on cos and sin, not mscale itself
    ours, theirs = model.cfg.attention.yarn, again.cfg.attention.yarn
    assert theirs.mscale == pytest.approx(ours.mscale, abs=1e-9)
  else:
    assert again.cfg == model.cfg
  assert_same(model, again)


def test_names_and_shapes(tmp_path):
  """Oracle: the release's tensor list, written out in tests/interop/oracle.py."""
  model = make()
  huggingface.save(model, tmp_path / "m")
  c = json.loads((tmp_path / "m/config.json").read_text())
  stored = safetensors_files.scan(tmp_path / "m")
  assert {name: entry.shape for name, entry in stored.items()} == oracle.shapes(c)
  assert c["architectures"] == ["DeepseekV3ForCausalLM"]
  head = stored["model.layers.3.shared_head.head.weight"].read()
  np.testing.assert_array_equal(head, np.asarray(model.head_DV[...]).T)
  eh_proj = stored["model.layers.3.eh_proj.weight"].read()
  np.testing.assert_array_equal(eh_proj[:, :32], np.asarray(model.mtp.w_embed_DD[...][0]).T)


def test_shards(tmp_path):
  """Law: no shard exceeds its limit unless it holds one tensor; the index lists every tensor."""
  limit = 12_000
  huggingface.save(make(), tmp_path / "m", max_shard_bytes=limit)
  weight_map = json.loads((tmp_path / "m/model.safetensors.index.json").read_text())["weight_map"]
  stored = safetensors_files.scan(tmp_path / "m")
  assert weight_map.keys() == stored.keys()
  sizes = {}
  for entry in stored.values():
    size = int(np.prod(entry.shape)) * entry.dtype.itemsize
    sizes.setdefault(entry.file, []).append(size)
  assert len(sizes) > 3
  assert all(sum(s) <= limit or len(s) == 1 for s in sizes.values())


def test_dtype(tmp_path):
  """Oracle: the cast itself; router biases stay fp32, and bf16 parameters are kept as they are."""
  model = make()
  huggingface.save(model, tmp_path / "m", dtype="bfloat16")
  again = huggingface.load(tmp_path / "m", dtype="bfloat16")
  np.testing.assert_array_equal(again.head_DV[...], model.head_DV[...].astype(jnp.bfloat16))
  np.testing.assert_array_equal(again.moe.ffn.bias_E[...], model.moe.ffn.bias_E[...])
  assert json.loads((tmp_path / "m/config.json").read_text())["dtype"] == "bfloat16"
  huggingface.save(again, tmp_path / "n")
  assert_same(again, huggingface.load(tmp_path / "n", dtype="bfloat16"))


def test_all_or_nothing(tmp_path, monkeypatch):
  """Oracle: the folder listing after a failure in the last shard: nothing of it is left."""
  model, calls = make(), []
  real = safetensors_files.safetensors_numpy.save_file

  def fails_third(*args, **kwargs):
    calls.append(args)
    if len(calls) == 3:
      raise OSError("disk full")
    real(*args, **kwargs)

  monkeypatch.setattr(safetensors_files.safetensors_numpy, "save_file", fails_third)
  with pytest.raises(OSError, match="disk full"):
    huggingface.save(model, tmp_path / "m", max_shard_bytes=20_000)
  assert len(calls) == 3 and not any(tmp_path.iterdir())


def test_taken_path_and_bad_arguments(tmp_path):
  """Oracle: the argument that is named. What stands at the path stays as it was."""
  model = make()
  (tmp_path / "m").mkdir()
  (tmp_path / "m/precious").write_text("x")
  with pytest.raises(ValueError, match="exists already"):
    huggingface.save(model, tmp_path / "m")
  assert os.listdir(tmp_path / "m") == ["precious"]
  with pytest.raises(ValueError, match="tokenizer=.* is not a file"):
    huggingface.save(model, tmp_path / "n", tokenizer=tmp_path / "tokenizer.json")
  with pytest.raises(ValueError, match="dtype='int8'"):
    huggingface.save(model, tmp_path / "n", dtype="int8")
  with pytest.raises(ValueError, match="max_shard_bytes=0"):
    huggingface.save(model, tmp_path / "n", max_shard_bytes=0)
  assert os.listdir(tmp_path) == ["m"]


def test_tokenizer_and_modes(tmp_path):
  """Oracle: the copied bytes; an empty folder may be filled, and others may read it."""
  (tmp_path / "tokenizer.json").write_text('{"version": "1.0"}')
  (tmp_path / "m").mkdir()
  huggingface.save(make(), tmp_path / "m", tokenizer=tmp_path / "tokenizer.json", bos_token_id=3)
  assert (tmp_path / "m/tokenizer.json").read_text() == '{"version": "1.0"}'
  assert json.loads((tmp_path / "m/config.json").read_text())["bos_token_id"] == 3
  umask = os.umask(0)
  os.umask(umask)
  assert stat.S_IMODE((tmp_path / "m").stat().st_mode) == 0o777 & ~umask


@pytest.mark.parametrize("changes, words", [
    ({"moe.gate": "softmax"}, "model.moe.gate='softmax'"),
    ({"moe.group_top": 1}, "model.moe.group_top=1"),
    ({"attention.latent_norm_eps": 1e-5}, "latent_norm_eps=1e-05"),
])
def test_inexpressible(changes, words, tmp_path):
  """Oracle: what DeepseekV3ForCausalLM computes; a model that differs is refused by name."""
  with pytest.raises(ConfigError, match=words):
    huggingface.save(make(**changes), tmp_path / "m")
  assert not any(tmp_path.iterdir())


def test_the_released_model():
  """Oracle: the release holds 91,991 tensors with its FP8 scales, 671,026,419,200 numbers in the
  main model and 11,610,068,224 in the MTP module (facts 1.2 and 6.1)."""
  cfg = config.preset("v3_671b")
  slots = list(names.slots(cfg))
  plain = ("embed_tokens", "lm_head", "mlp.gate.", "eh_proj")
  scales = [s for s in slots if len(s.shape) == 2 and not any(word in s.name for word in plain)]
  assert len(slots) + len(scales) + len(names.duplicates(cfg)) == 91_991
  sizes = {s.name: int(np.prod(s.shape)) for s in slots}
  mtp = sum(size for name, size in sizes.items() if name.startswith("model.layers.61."))
  assert mtp == 11_610_068_224
  assert sum(sizes.values()) - mtp == 671_026_419_200
