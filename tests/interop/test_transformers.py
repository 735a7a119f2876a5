"""Against transformers' DeepseekV3 in torch: logits, MTP, gradients, and folders both ways."""

import json
import warnings

import flax.nnx as nnx
import jax
import numpy as np
import pytest

from dsv3_jax import config
from dsv3_jax.interop import huggingface
from dsv3_jax.model.loss import loss_fn
from tests.interop import oracle
from tests.interop.cases import CASES, QUICK, TOKENS_BT, relative, run
from tests.interop.oracle import BASE, YARN

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.0")

LOGITS, GRADIENTS = 2e-5, 1e-4  # issue 2, relative to the largest element, fp32
RICH = BASE | dict(rope_scaling=YARN, max_position_embeddings=640, n_shared_experts=2,
                   num_nextn_predict_layers=1)


@pytest.fixture(scope="session")
def from_pretrained():
  """path -> eval-mode torch model, after checking that no key was missing or misshapen."""

  def load(path):
    model, info = transformers.DeepseekV3ForCausalLM.from_pretrained(
        path, output_loading_info=True, dtype=torch.float32)
    assert not info["missing_keys"] and not info["mismatched_keys"], info
    return model.eval()

  return load


def torch_logits(model, tokens_BT=TOKENS_BT):
  with torch.no_grad():
    return model(torch.tensor(tokens_BT)).logits.numpy()


@pytest.mark.parametrize("name", CASES)
def test_logits(name, case, from_pretrained):
  """Oracle: transformers on the same folder. (negative_bias needs a version that masks groups with
  -inf; those that fill 0 are wrong there, and test_load.py has the corrected numpy oracle.)"""
  found = case(name)
  expected = torch_logits(from_pretrained(found.folder))
  if relative(expected, oracle.forward(found.config, found.tensors, TOKENS_BT)[0]) > LOGITS:
    assert name == "negative_bias"
    pytest.skip("this version of transformers masks groups with 0")
  assert relative(found.logits, expected) < LOGITS


def test_folder_that_transformers_wrote(tmp_path, from_pretrained):
  """Oracle: transformers before it saved. Its config.json spells rope_parameters."""
  c = RICH | dict(num_nextn_predict_layers=0, q_lora_rank=None)
  torch_model = from_pretrained(
      oracle.write_folder(tmp_path / "m", c, oracle.random_tensors(c, 20)))
  torch_model.save_pretrained(tmp_path / "again", max_shard_size="50KB")
  written = json.loads((tmp_path / "again/config.json").read_text())
  assert "rope_parameters" in written and "rope_scaling" not in written
  with warnings.catch_warnings(record=True):
    warnings.simplefilter("always")  # transformers announces an MTP layer that is not there
    model = huggingface.load(tmp_path / "again")
  assert relative(run(model).logits_BTV, torch_logits(torch_model)) < LOGITS


def test_save_to_transformers_and_back(tmp_path, from_pretrained):
  """Law: save -> transformers -> save_pretrained -> load gives every bit of the main model back."""
  c = RICH | dict(num_nextn_predict_layers=0)
  model = huggingface.load(oracle.write_folder(tmp_path / "m", c, oracle.random_tensors(c, 21)))
  huggingface.save(model, tmp_path / "ours", max_shard_bytes=30_000)
  torch_model = from_pretrained(tmp_path / "ours")
  expected = torch_logits(torch_model)
  assert relative(run(model).logits_BTV, expected) < LOGITS
  torch_model.save_pretrained(tmp_path / "theirs")
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    again = huggingface.load(tmp_path / "theirs")
  assert again.cfg == model.cfg
  a, b = nnx.to_pure_dict(nnx.state(model)), nnx.to_pure_dict(nnx.state(again))
  for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
    np.testing.assert_array_equal(np.asarray(x), np.asarray(y), err_msg=str(path))


@pytest.mark.parametrize("changes", [
    dict(rope_scaling=YARN | dict(mscale=0.0), max_position_embeddings=640),
    dict(n_shared_experts=0, num_hidden_layers=2), dict(first_k_dense_replace=3),
    dict(first_k_dense_replace=0, q_lora_rank=None, n_group=1, topk_group=1, num_hidden_layers=2),
])
def test_saved_variants(changes, tmp_path, from_pretrained):
  """Oracle: transformers' logits on a folder of ours, for what the others do not cover."""
  c = BASE | changes
  model = huggingface.load(oracle.write_folder(tmp_path / "m", c, oracle.random_tensors(c, 22)))
  huggingface.save(model, tmp_path / "ours")
  assert relative(run(model).logits_BTV,
                  torch_logits(from_pretrained(tmp_path / "ours"))) < LOGITS


def test_bfloat16_folder(tmp_path):
  """Oracle: transformers' own tensors after it loaded a bf16 folder of ours, bit for bit."""
  model = huggingface.load(oracle.write_folder(tmp_path / "m", BASE, oracle.random_tensors(BASE)))
  huggingface.save(model, tmp_path / "ours", dtype="bfloat16")
  torch_model = transformers.DeepseekV3ForCausalLM.from_pretrained(tmp_path / "ours", dtype="auto")
  state = torch_model.state_dict()
  assert state["lm_head.weight"].dtype == torch.bfloat16
  ours = model.head_DV[...].astype("bfloat16").astype("float32")
  np.testing.assert_array_equal(ours, state["lm_head.weight"].float().numpy().T)
  bias = state["model.layers.1.mlp.gate.e_score_correction_bias"]
  np.testing.assert_array_equal(model.moe.ffn.bias_E[...][0], bias.float().numpy())


def test_fp8_folder(tmp_path):
  """Oracle: transformers' own reading of an FP8 folder of ours: weights bit for bit, and logits."""
  pytest.importorskip("accelerate")  # transformers asks for it before it reads FP8
  c = BASE | dict(q_lora_rank=32, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=16,
                  v_head_dim=16, moe_intermediate_size=16)  # it takes whole blocks only
  model = huggingface.load(oracle.write_folder(tmp_path / "m", c, oracle.random_tensors(c, 24)))
  huggingface.save(model, tmp_path / "fp8", quantization="fp8", block=(16, 16))
  torch_model = transformers.DeepseekV3ForCausalLM.from_pretrained(
      tmp_path / "fp8", dtype=torch.float32, quantization_config=transformers.FineGrainedFP8Config(
          dequantize=True, weight_block_size=(16, 16))).float().eval()
  ours = huggingface.load(tmp_path / "fp8")
  state = torch_model.state_dict()
  np.testing.assert_array_equal(ours.dense.ffn.w_up_DF[...][0].T,
                                state["model.layers.0.mlp.up_proj.weight"].numpy())
  experts = state["model.layers.2.mlp.experts.down_proj"].numpy()
  np.testing.assert_array_equal(ours.moe.ffn.w_down_EFD[...][1], experts.transpose(0, 2, 1))
  assert relative(run(ours).logits_BTV, torch_logits(torch_model)) < LOGITS


def test_mtp(tmp_path, from_pretrained):
  """Oracle: transformers' multi-token prediction layer, fed with its main model's last state."""
  layers = pytest.importorskip("transformers.modeling_layers")
  if not hasattr(layers, "MtpLayer"):
    pytest.skip("this version of transformers has no MtpLayer")
  deepseek = transformers.models.deepseek_v3.modeling_deepseek_v3
  tensors = oracle.random_tensors(RICH, 23)
  folder = oracle.write_folder(tmp_path / "m", RICH, tensors)
  main = from_pretrained(folder)
  # The block's weights come through transformers' own loader, as the only layer of a second model.
  last = f"model.layers.{RICH['num_hidden_layers']}."
  alone = {name.replace(last, "model.layers.0."): t for name, t in tensors.items()
           if last in name or not name.startswith("model.layers.")}
  own = ("enorm", "hnorm", "eh_proj", "shared_head", "embed_tokens.weight")
  c = RICH | dict(num_hidden_layers=1, first_k_dense_replace=0, num_nextn_predict_layers=0)
  block_model = from_pretrained(oracle.write_folder(
      tmp_path / "block", c, {k: v for k, v in alone.items()
                              if not k.removeprefix("model.layers.0.").startswith(own)}))
  mtp = layers.MtpLayer(main.config, lambda *_: block_model.model.layers[0],
                        deepseek.DeepseekV3RMSNorm, 0).eval()
  with torch.no_grad():
    for module, name in ((mtp.enorm, "enorm"), (mtp.hnorm, "hnorm"), (mtp.eh_proj, "eh_proj"),
                         (mtp.post_norm, "shared_head.norm")):
      module.weight.copy_(torch.tensor(tensors[f"{last}{name}.weight"]))
    tokens = torch.tensor(TOKENS_BT)
    hidden = main.model(tokens).last_hidden_state[:, :-1]
    embedded = main.model.embed_tokens(tokens[:, 1:])
    positions = torch.arange(hidden.shape[1])[None]
    T = hidden.shape[1]
    mask = torch.triu(torch.full((T, T), -torch.inf), 1)[None, None]
    out = mtp(embedded, hidden, main.model.rotary_emb(hidden, positions), mask, positions, None)
    expected = main.lm_head(out).numpy()
  found = run(huggingface.load(folder)).mtp_logits[0][:, :-1]
  assert relative(found, expected) < LOGITS


@pytest.mark.parametrize("name", ["yarn", "no_q_rank_two_shared_one_group"])
def test_gradients(name, case, tmp_path, from_pretrained):
  """Oracle: torch autograd of the mean next-token cross-entropy, parameter by parameter.

  The torch gradients are put in place of the weights, saved by transformers and read back by
  `load`: the map between the two layouts is linear, so that gives them in ours.
  """
  folder = case(name).folder
  torch_model = from_pretrained(folder)
  tokens = torch.tensor(TOKENS_BT)
  logits = torch_model(tokens[:, :-1]).logits
  torch_loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
  torch_loss.backward()
  with torch.no_grad():
    for parameter in torch_model.parameters():
      parameter.copy_(parameter.grad)
  torch_model.save_pretrained(tmp_path / "gradients")
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    expected = nnx.state(huggingface.load(tmp_path / "gradients"), nnx.Param)

  graphdef, params, rest = nnx.split(huggingface.load(folder), nnx.Param, ...)
  batch = {"tokens": TOKENS_BT.astype(np.int32)}
  no_balance = config.Loss(sequence_balance=0.0)

  def main_loss(params):
    return loss_fn(nnx.merge(graphdef, params, rest), batch, loss=no_balance, mtp_weight=0.0,
                   runtime=config.Runtime(), denominator=float(TOKENS_BT[:, 1:].size))[0]

  value, gradients = jax.jit(jax.value_and_grad(main_loss), compiler_options=QUICK)(params)
  assert abs(float(value) - torch_loss.item()) < 1e-5 * torch_loss.item()
  leaves = jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(gradients))
  for (path, ours), theirs in zip(leaves, jax.tree.leaves(nnx.to_pure_dict(expected)),
                                  strict=True):
    assert np.abs(theirs).max() > 0, path
    assert relative(ours, theirs) < GRADIENTS, path
