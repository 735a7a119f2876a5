"""Loading Hugging Face folders, against float64 numpy on the same files (no torch needed)."""

import tracemalloc
import warnings
import zlib

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from dsv3_jax.interop import huggingface
from tests.interop import oracle
from tests.interop.cases import CASES, TOKENS_BT, relative, run
from tests.interop.oracle import BASE

FP32 = 2e-5  # issue 2's bound on logits, relative to the largest

MTP = BASE | dict(num_nextn_predict_layers=1, num_hidden_layers=2)


@pytest.mark.parametrize("name", CASES)
def test_logits(name, case):
  """Oracle: the report's equations in float64 numpy, group mask -inf."""
  found = case(name)
  expected = oracle.forward(found.config, found.tensors, TOKENS_BT)[0]
  assert relative(found.logits, expected) < FP32


def test_a_zero_group_mask_would_choose_other_experts():
  """Oracle: the two masks themselves; were they to agree, negative_bias would test nothing."""
  c, bias = CASES["negative_bias"]
  tensors = oracle.random_tensors(c, zlib.crc32(b"negative_bias"), bias)
  rng = np.random.default_rng(0)
  b = tensors["model.layers.1.mlp.gate.e_score_correction_bias"]
  G, e = c["n_group"], c["n_routed_experts"] // c["n_group"]
  for _ in range(20):
    score = 1 / (1 + np.exp(-rng.standard_normal(c["n_routed_experts"])))
    chosen = oracle.select(c, score, b)
    assert len(set(chosen // e)) <= c["topk_group"]
    kept = np.argsort(-np.sort((score + b).reshape(G, e), -1)[:, -2:].sum(-1))[:c["topk_group"]]
    zeroed = np.where(np.isin(np.arange(G * e) // e, kept), score + b, 0.0)
    assert set(np.argsort(-zeroed)[:c["num_experts_per_tok"]]) != set(chosen)


def test_mtp_logits(tmp_path):
  """Oracle: eq. 21-23 in float64 numpy with [embedding ; hidden], as the release concatenates."""
  tensors = oracle.random_tensors(MTP, 3)
  out = run(huggingface.load(oracle.write_folder(tmp_path / "m", MTP, tensors, 2)))
  logits, mtp = oracle.forward(MTP, tensors, TOKENS_BT)
  assert relative(out.logits_BTV, logits) < FP32
  assert relative(out.mtp_logits[0][:, :-1], mtp) < FP32


@pytest.mark.parametrize("block", [(16, 16), (12, 7)])
def test_fp8_blocks(block, tmp_path):
  """Oracle: weight[i, j] = code * scale of its block, element by element; ragged edges."""
  c = MTP | dict(quantization_config=dict(quant_method="fp8", fmt="e4m3",
                                          activation_scheme="dynamic",
                                          weight_block_size=list(block)))
  quantized = oracle.quantize(oracle.random_tensors(c, 4), block)
  model = huggingface.load(oracle.write_folder(tmp_path / "m", c, quantized, shards=3))
  plain = oracle.dequantize(quantized, block)
  logits, mtp = oracle.forward(c, plain, TOKENS_BT)
  out = run(model)
  assert relative(out.logits_BTV, logits) < FP32
  assert relative(out.mtp_logits[0][:, :-1], mtp) < FP32
  expected = plain["model.layers.1.mlp.experts.5.up_proj.weight"].T
  np.testing.assert_array_equal(model.moe.ffn.w_up_EDF[...][0, 5], expected)


@pytest.mark.parametrize("stored", [ml_dtypes.bfloat16, np.float16])
def test_half_precision_files(stored, tmp_path):
  """Oracle: numpy's cast of the same tensors, exact; router biases stay fp32 whatever is asked."""
  tensors = oracle.random_tensors(BASE, 5)
  half = {name: t if "bias" in name else t.astype(stored) for name, t in tensors.items()}
  folder = oracle.write_folder(tmp_path / "m", BASE, half)
  wide, narrow = huggingface.load(folder), huggingface.load(folder, dtype="bfloat16")
  bias = tensors["model.layers.2.mlp.gate.e_score_correction_bias"]
  for model, dtype in ((wide, jnp.float32), (narrow, jnp.bfloat16)):
    assert model.head_DV[...].dtype == dtype
    np.testing.assert_array_equal(model.moe.ffn.bias_E[...][1], bias)
    assert model.moe.ffn.bias_E[...].dtype == jnp.float32
  head = half["lm_head.weight"].T
  np.testing.assert_array_equal(wide.head_DV[...], head.astype(np.float32))
  np.testing.assert_array_equal(narrow.head_DV[...], head.astype(ml_dtypes.bfloat16))


def test_no_shared_expert(tmp_path):
  """Oracle: float64 numpy without the shared term, for both spellings of none."""
  for none in (0, None):
    c = BASE | dict(n_shared_experts=none, num_hidden_layers=2)
    tensors = oracle.random_tensors(c, 6)
    out = run(huggingface.load(oracle.write_folder(tmp_path / str(none), c, tensors)))
    assert relative(out.logits_BTV, oracle.forward(c, tensors, TOKENS_BT)[0]) < FP32


def test_mtp_announced_but_left_out(tmp_path):
  """Oracle: the same files loaded with the announcement removed."""
  tensors = oracle.random_tensors(BASE, 7)
  folder = oracle.write_folder(tmp_path / "m", BASE | dict(num_nextn_predict_layers=1), tensors)
  with pytest.warns(UserWarning, match="num_nextn_predict_layers=1.*no tensor of layer 3"):
    model = huggingface.load(folder)
  plain = huggingface.load(oracle.write_folder(tmp_path / "p", BASE, tensors))
  assert model.cfg == plain.cfg and model.mtp is None


def test_mtp_not_announced_is_counted(tmp_path):
  """Oracle: the depth that wrote the files."""
  c = dict(MTP)
  folder = oracle.write_folder(tmp_path / "m", c, oracle.random_tensors(c, 8))
  c.pop("num_nextn_predict_layers")
  oracle.write_folder(tmp_path / "m", c, oracle.random_tensors(MTP, 8))
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    assert huggingface.load(folder).cfg.mtp_depth == 1


def test_stale_duplicate_head_is_told(tmp_path):
  """Oracle: the tensor that was changed; the main model's own is the one used."""
  tensors = oracle.random_tensors(MTP, 9)
  stale = "model.layers.2.shared_head.head.weight"
  folder = oracle.write_folder(tmp_path / "m", MTP, tensors | {stale: tensors[stale] + 1})
  with pytest.warns(UserWarning, match=f"{stale}.*differs from 'lm_head.weight'"):
    model = huggingface.load(folder)
  np.testing.assert_array_equal(model.head_DV[...], tensors["lm_head.weight"].T)


def test_host_memory(tmp_path):
  """Oracle: tracemalloc. Loading holds the model and about one tensor more, not a whole shard."""
  c = BASE | dict(vocab_size=500, hidden_size=128, num_hidden_layers=5, n_routed_experts=32,
                  moe_intermediate_size=64)
  tensors = oracle.random_tensors(c, 10)
  folder = oracle.write_folder(tmp_path / "m", c, tensors)
  size = sum(t.nbytes for t in tensors.values())
  largest = max(t.nbytes for t in tensors.values())
  del tensors
  huggingface.load(folder)  # traces once: that memory is not the files'
  tracemalloc.start()
  huggingface.load(folder)
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert size < 2 * peak, "the arrays are not seen by tracemalloc: this test would prove nothing"
  assert peak < size + 2 * largest + 2**21, (peak, size, largest)
