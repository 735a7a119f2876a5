"""FP8 folders: written in the released layout, kept as they are, saved again bit for bit."""

import functools
import json

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from jax.extend.core import jaxprs_in_params
from safetensors import safe_open

from dsv3_jax import config
from dsv3_jax.config import ConfigError
from dsv3_jax.interop import huggingface, safetensors_files
from dsv3_jax.interop.names import slots
from dsv3_jax.train import evaluate, sample
from dsv3_jax.train import state as state_lib
from tests.interop import oracle
from tests.interop.cases import QUICK, TOKENS_BT, relative
from tests.interop.oracle import BASE

RELEASED = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
            "weight_block_size": [128, 128]}  # facts 1.11
SMALL = BASE | dict(num_hidden_layers=2, n_routed_experts=4, n_group=2, topk_group=1,
                    num_experts_per_tok=2, num_nextn_predict_layers=1)
# Wider than a block of 128 in some places, and never a multiple of it.
WIDE = SMALL | dict(hidden_size=160, moe_intermediate_size=130, intermediate_size=300,
                    q_lora_rank=None)


def released(c, block, seed=0, scale=None):
  """The tensors of an FP8 folder as published: other tensors bf16, biases and scales fp32."""
  tensors = oracle.quantize(oracle.random_tensors(c, seed), block)
  for name, value in tensors.items():
    if name.endswith("_scale_inv"):
      tensors[name] = value if scale is None else scale(value)
    elif value.dtype == np.float32 and "bias" not in name:
      tensors[name] = value.astype(ml_dtypes.bfloat16)
  return tensors


def quantized_config(c, block, **more):
  return c | dict(quantization_config=RELEASED | dict(weight_block_size=list(block)) | more)


def contents(folder):
  """Tensor name -> (dtype, shape, bytes)."""
  found = {}
  for file in sorted(folder.glob("*.safetensors")):
    with safe_open(file, framework="numpy") as f:
      assert f.metadata() == {"format": "pt"}
  for name, stored in safetensors_files.scan(folder).items():
    found[name] = stored.dtype.name, stored.shape, stored.read().tobytes()
  return found


def expected(tensors):
  return {name: (t.dtype.name, t.shape, t.tobytes()) for name, t in tensors.items()}


@pytest.mark.parametrize("c, block", [(WIDE, None), (SMALL, (16, 16)), (SMALL, (12, 7))])
def test_released_layout(c, block, tmp_path):
  """Oracle: numpy's block formula and ml_dtypes' rounding on the same weights, every bit."""
  tensors = oracle.random_tensors(c, 1)
  model = huggingface.load(oracle.write_folder(tmp_path / "m", c, tensors))
  huggingface.save(model, tmp_path / "fp8", quantization="fp8", block=block,
                   max_shard_bytes=100_000)
  block = block or (128, 128)
  found, wanted = contents(tmp_path / "fp8"), expected(released(c, block, 1))
  assert found.keys() == wanted.keys()
  assert [name for name in wanted if found[name] != wanted[name]] == []
  values = json.loads((tmp_path / "fp8" / "config.json").read_text())
  assert values["quantization_config"] == quantized_config(c, block)["quantization_config"]
  assert values["torch_dtype"] == "bfloat16"
  dtypes = {name.split(".", 3)[-1]: dtype for name, (dtype, _, _) in found.items()}
  assert dtypes["self_attn.kv_b_proj.weight"] == "float8_e4m3fn"
  assert dtypes["eh_proj.weight"] == dtypes["mlp.gate.weight"] == "bfloat16"  # facts 6.1


def test_the_release_has_as_many_scales():
  """Oracle: facts 6.1: 91,991 tensors; by hand: 58 MoE layers and one for prediction have
  3 (256 + 1) + 5 linear layers each, and 3 dense ones have 3 + 5."""
  count = sum(slot.quantized for slot in slots(config.preset("v3_671b")))
  assert count == 59 * (3 * 257 + 5) + 3 * (3 + 5)
  everything = list(slots(config.preset("v3_671b")))
  assert len(everything) + count + 2 == 91_991  # two duplicates of the prediction module


@pytest.mark.parametrize("name, c, block, scale", [
    ("square", SMALL, (16, 16), None),
    ("ragged", SMALL | dict(q_lora_rank=None), (12, 7), None),
    ("released", WIDE, (128, 128), None),
    ("powers of two", SMALL, (16, 16), lambda s: np.exp2(np.ceil(np.log2(s)))),
    ("no shared expert", SMALL | dict(n_shared_experts=0), (16, 16), None),
])
def test_load_and_save_change_no_bit(name, c, block, scale, tmp_path):
  """Law: the files of save(load(folder, quantized="keep")) hold the bytes of the folder's."""
  tensors = released(c, block, 2, scale)
  c = quantized_config(c, block, **({"scale_fmt": "ue8m0"} if scale else {}))
  folder = oracle.write_folder(tmp_path / "m", c, tensors, shards=3)
  model = huggingface.load(folder, quantized="keep")
  huggingface.save(model, tmp_path / "again")
  wanted = contents(folder)
  found = {n: t for n, t in contents(tmp_path / "again").items() if t[2] or n in wanted}
  assert found == wanted
  values = json.loads((tmp_path / "again" / "config.json").read_text())
  assert values["quantization_config"] == c["quantization_config"]
  assert model.moe.ffn.w_up_EDF[...].fprop.pow2 == (scale is not None)


def test_kept_weights_take_one_byte(tmp_path):
  """Oracle: the folder's own size; a model in fp32 takes almost four times as much."""
  tensors = released(WIDE, (128, 128), 3)
  folder = oracle.write_folder(tmp_path / "m", quantized_config(WIDE, (128, 128)), tensors)
  size = lambda model: sum(x.nbytes for x in jax.tree.leaves(nnx.state(model)))
  stored = sum(t.nbytes for name, t in tensors.items()
               if not ("layers.2.embed" in name or "shared_head.head" in name))
  assert size(huggingface.load(folder, quantized="keep")) == stored
  assert size(huggingface.load(folder)) > 3.2 * stored


def test_keep_of_a_plain_folder_is_a_plain_load(tmp_path):
  """Law: nothing is FP8, so parameters are those of the files, in their dtypes."""
  half = {n: t if "bias" in n else t.astype(ml_dtypes.bfloat16)
          for n, t in oracle.random_tensors(SMALL, 4).items()}
  folder = oracle.write_folder(tmp_path / "m", SMALL, half)
  kept = huggingface.load(folder, quantized="keep")
  assert kept.head_DV[...].dtype == kept.moe.ffn.w_up_EDF[...].dtype == ml_dtypes.bfloat16
  assert kept.moe.ffn.bias_E[...].dtype == np.float32
  huggingface.save(kept, tmp_path / "again")
  assert contents(tmp_path / "again") == contents(folder)


def test_dequantized_again(tmp_path):
  """Law: keep and save without quantization gives what loading dequantized gives, bit for bit."""
  folder = oracle.write_folder(tmp_path / "m", quantized_config(SMALL, (12, 7)),
                               released(SMALL, (12, 7), 5))
  huggingface.save(huggingface.load(folder, quantized="keep"), tmp_path / "a", "float32",
                   quantization="none")
  huggingface.save(huggingface.load(folder), tmp_path / "b")
  assert contents(tmp_path / "a") == contents(tmp_path / "b")
  assert "quantization_config" not in json.loads((tmp_path / "a" / "config.json").read_text())


SCALE = "model.layers.0.mlp.up_proj.weight_scale_inv"


@pytest.mark.parametrize("change, words", [
    (lambda t, c: t.pop(SCALE), rf"missing tensors \(1\): {SCALE}"),
    (lambda t, c: t.update({SCALE: t[SCALE][:2]}), rf"{SCALE}' has shape \[2, 2\].*\[3, 2\]"),
    (lambda t, c: t.update({SCALE: t[SCALE].astype(ml_dtypes.bfloat16)}),
     rf"{SCALE}' is bfloat16; scales must be float32; load .* quantized=\"dequantize\""),
    (lambda t, c: (t.update({SCALE[:-10]: np.ones((48, 32), np.float32)}), t.pop(SCALE)),
     "up_proj.weight' is float32, but others are float8; load"),
    (lambda t, c: t.update({
        "lm_head.weight": np.zeros((61, 32), ml_dtypes.float8_e4m3fn),
        "lm_head.weight_scale_inv": np.ones((4, 2), np.float32)}),
     "'lm_head.weight' is float8, which it is not in the released layout; load"),
    (lambda t, c: c.update(rope_interleave=False), "rope_interleave=false .*; load the folder"),
    (lambda t, c: c["quantization_config"].update(scale_fmt="ue8m0"),
     "config.json: quantization_config: a scale is not a power of two, as scale_fmt='ue8m0'"),
    (lambda t, c: c["quantization_config"].update(weight_block_size=[16]),
     r"weight_block_size=\[16\] must be two positive integers"),
    (lambda t, c: c["quantization_config"].update(weight_block_size=[16, 32]),
     r"_scale_inv' has shape \[2, 3\]; config.json implies \[2, 2\]"),
    (lambda t, c: c["quantization_config"].update(fmt="e5m2"), "fmt='e5m2' is not supported"),
])
def test_what_cannot_be_kept_is_named(change, words, tmp_path):
  """Oracle: the damage itself, named in the message, with the way out where there is one."""
  tensors, c = released(SMALL, (16, 16), 6), quantized_config(SMALL, (16, 16))
  change(tensors, c)
  with pytest.raises((ConfigError, ValueError), match=words):
    huggingface.load(oracle.write_folder(tmp_path / "m", c, tensors), quantized="keep")


def test_bad_arguments(tmp_path):
  """Oracle: the argument and what it may be; nothing is written."""
  folder = oracle.write_folder(tmp_path / "m", quantized_config(SMALL, (16, 16)),
                               released(SMALL, (16, 16), 7))
  with pytest.raises(ValueError, match="quantized='kept' must be \"dequantize\" or \"keep\""):
    huggingface.load(folder, quantized="kept")
  plain, kept = huggingface.load(folder), huggingface.load(folder, quantized="keep")
  for model, arguments, words in [
      (plain, dict(quantization="fp9"), "quantization='fp9' must be \"fp8\" or \"none\""),
      (plain, dict(quantization="fp8", block=(0, 128)), r"block=\(0, 128\) must be two positive"),
      (plain, dict(quantization="fp8", block=128), "block=128 must be two positive"),
      (plain, dict(block=(128, 128)), "goes with quantization=\"fp8\""),
      (kept, dict(block=(128, 128)), r"in blocks of \(16, 16\) already; load them with"),
  ]:
    with pytest.raises(ValueError, match=words):
      huggingface.save(model, tmp_path / "out", **arguments)
  assert not (tmp_path / "out").exists()


# --- computing from kept weights ------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
  """(c, block) -> the folder's dequantized tensors and both of its models, kept and dequantized."""

  @functools.cache
  def build(key):
    c, block = {"square": (SMALL, (16, 16)), "ragged": (SMALL | dict(q_lora_rank=None), (12, 7)),
                "released": (WIDE, (128, 128))}[key]
    tensors = released(c, block, 8)
    folder = oracle.write_folder(tmp_path_factory.mktemp(key) / "m", quantized_config(c, block),
                                 tensors)
    plain = {n: t.astype(np.float32) for n, t in oracle.dequantize(tensors, block).items()}
    return c, plain, huggingface.load(folder, quantized="keep"), huggingface.load(folder)

  return build


@functools.cache  # models hash by identity
def outputs(model, **runtime):
  graphdef, state = nnx.split(model)
  call = lambda state: nnx.merge(graphdef, state)(TOKENS_BT, runtime=config.Runtime(**runtime))
  return jax.jit(call, compiler_options=QUICK)(state)


@pytest.mark.parametrize("key", ["square", "ragged", "released"])
def test_logits_of_kept_weights(key, pair):
  """Oracle: the report's equations in float64 on code * scale. Weights rounded to bf16 on the way
  would miss by 1e-3."""
  c, tensors, kept, _ = pair(key)
  logits, mtp = oracle.forward(c, tensors, TOKENS_BT)
  out = outputs(kept)
  assert relative(out.logits_BTV, logits) < 2e-5
  assert relative(out.mtp_logits[0][:, :-1], mtp) < 2e-5


def test_kept_weights_under_the_recipe(pair):
  """Law: under `v3` kept weights give what the dequantized ones, quantized again, give; and the
  recipe is in force, activations being quantized too."""
  _, _, kept, plain = pair("released")
  a, b = (outputs(model, recipe="v3").logits_BTV for model in (kept, plain))
  assert relative(a, b) < 1e-5
  assert relative(a, outputs(kept).logits_BTV) > 1e-3


def shapes_in(jaxpr, dtype):
  """Shapes of everything that a jaxpr makes in a dtype, its inner ones included."""
  found = set()
  for eqn in jaxpr.eqns:
    found |= {v.aval.shape for v in eqn.outvars if getattr(v.aval, "dtype", None) == dtype}
    for inner in jaxprs_in_params(eqn.params):
      found |= shapes_in(inner, dtype)
  return found


def test_no_weight_is_ever_bfloat16(pair):
  """Law: with bf16 activations no array of a weight's shape is bf16; dequantized ones are."""
  _, _, kept, plain = pair("released")
  w = kept.dense.ffn.w_up_DF[...].fprop.shape[1:], kept.moe.ffn.w_up_EDF[...].fprop.shape[1:]
  made = []
  for model in (kept, plain):
    graphdef, state = nnx.split(model)
    jaxpr = jax.make_jaxpr(lambda s, g=graphdef: nnx.merge(g, s)(
        TOKENS_BT, runtime=config.Runtime(compute_dtype="bfloat16")).logits_BTV)(state)
    made.append(shapes_in(jaxpr.jaxpr, jax.numpy.bfloat16))
  assert not made[0] & set(w) and set(w) <= made[1]


def test_evaluation_and_sampling(pair, monkeypatch):
  """Oracle: cross-entropy and greedy continuation from the float64 logits of code * scale."""
  monkeypatch.setattr(jax, "jit", functools.partial(jax.jit, compiler_options=QUICK))
  c, tensors, kept, _ = pair("square")
  cfg = config.replace(config.Config(), **{"model": kept.cfg, "data.sequence_length": 23})
  graphdef, params, buffers = state_lib.split(kept)

  sums = evaluate.make_evaluate(graphdef, cfg)(params, buffers,
                                               {"tokens": TOKENS_BT.astype(np.int32)})
  logits_BTV = oracle.forward(c, tensors, TOKENS_BT[:, :-1])[0]
  chosen_BT = np.take_along_axis(logits_BTV, TOKENS_BT[:, 1:, None], -1)[..., 0]
  loss = (np.log(np.exp(logits_BTV).sum(-1)) - chosen_BT).sum()
  assert float(sums["loss_sum"]) == pytest.approx(loss, rel=1e-5)

  prompt = [1, 2, 3]
  sampler = sample.make_sampler(graphdef, cfg.runtime)
  found, = sample.generate(sampler, params, buffers, [prompt], steps=5)
  text = list(prompt)
  for _ in range(5):
    text.append(int(oracle.forward(c, tensors, np.array([text]))[0][0, -1].argmax()))
  assert found == text[3:]
