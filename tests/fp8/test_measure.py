"""Operands taken out of a model, and what recipes do to them."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from dsv3_jax import config
from dsv3_jax.fp8 import measure
from dsv3_jax.model import loss as loss_lib
from dsv3_jax.train import numerics, state
from tests import quick
from tests.train import fakes


@pytest.fixture(scope="module")
def small():
  """(config, graph definition, params, buffers, batch)."""
  cfg = fakes.small_config(**{"model.layers": 2, "model.dense_layers": 1})
  build = lambda: state.build_model(cfg.model, 1)
  graphdef = state.split(nnx.eval_shape(build))[0]
  rng = np.random.default_rng(0)
  batch = {"tokens": jnp.asarray(rng.integers(0, fakes.VOCABULARY, (3, 17)), jnp.int32)}
  return cfg, graphdef, *quick.jit(lambda: state.split(build())[1:])(), batch


@pytest.fixture(scope="module")
def found(small):
  """The model's operators."""
  cfg, graphdef, params, buffers, batch = small
  taps = quick.jit(numerics.make_capture(graphdef, cfg))(params, buffers, batch,
                                                         jnp.float32(cfg.loss.mtp_weight))
  return numerics.operators(params, taps, cfg.model)


_layer = quick.jit(measure.layer, static_argnames=("name", "recipe"))


def test_operands_give_the_gradient(small, found):
  """Oracle: jax.grad of the model without probes; x^T dy is each weight's gradient."""
  cfg, graphdef, params, buffers, batch = small

  def loss(params):
    return loss_lib.loss_fn(nnx.merge(graphdef, params, buffers), batch, loss=cfg.loss,
                            mtp_weight=cfg.loss.mtp_weight, runtime=cfg.runtime,
                            denominator=48.0)[0]

  grads = quick.jit(jax.grad(loss))(params)
  seen = set()
  for name, op in found.items():
    layer, *path = name.split(".")
    stack, index = {"0": ("dense", 0), "1": ("moe", 0), "mtp0": ("mtp", 0)}[layer]
    if stack == "mtp" and len(path) > 1:
      path = ["block", *path]
    expected = grads[stack]
    for part in path:
      expected = expected[part]
    expected = np.asarray(expected[index]).reshape(op.w.shape)
    x, dy = np.asarray(op.x_MK, np.float64), np.asarray(op.dy_MN, np.float64)
    if op.rows is None:
      dw = x.T @ dy
    else:
      block = len(x) // len(op.rows.group_m)
      group = np.repeat(np.asarray(op.rows.group_m), block)
      group[int(op.rows.used) * block:] = -1
      dw = np.stack([x[group == e].T @ dy[group == e] for e in range(len(op.w))])
      assert (np.abs(x[group >= 0]).sum() > 0) and not dy[group < 0].any()
    np.testing.assert_allclose(dw, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    seen.add(name)
  assert {"0.attn.w_o_HUD", "0.ffn.w_gate_DF", "1.ffn.w_down_EFD", "1.ffn.shared.w_up_DF",
          "mtp0.w_embed_DD", "mtp0.attn.w_ukv_CHW"} <= seen
  assert len(seen) == 5 + 3 + 2 * (5 + 3 + 3) + 2


def _operands(M=130, K=200, N=96, seed=0):
  rng = np.random.default_rng(seed)
  x = rng.normal(size=(M, K)) * 10.0**rng.uniform(-4, 0, (M, K))
  w, dy = 0.02 * rng.normal(size=(K, N)), 1e-4 * rng.normal(size=(M, N))
  x[3] = 0
  return [z.astype(np.float32) for z in (x, w, dy)]


def _hold(z, tile):
  """E4M3 in tiles with ml_dtypes: (values, how many nonzero ones vanished)."""
  out = np.zeros_like(z)
  for i in range(0, z.shape[0], tile[0]):
    for j in range(0, z.shape[1], tile[1]):
      block = z[i:i + tile[0], j:j + tile[1]]
      scale = np.maximum(np.abs(block).max(), 1e-30).astype(np.float32) / np.float32(448)
      held = (block / scale).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * scale
      out[i:i + tile[0], j:j + tile[1]] = held
  return out, np.sum((out == 0) & (z != 0)) / np.sum(z != 0)


def test_one_layer_under_v3():
  """Oracle: quantization by ml_dtypes and products in float64."""
  x, w, dy = _operands()
  found = _layer(x, w, dy, name="w_up_DF", recipe=numerics.recipe("v3"))
  (x_q, x_under), (w_q, _), (dy_q, dy_under) = _hold(x, (1, 128)), _hold(w, (128, 128)), _hold(
      dy, (1, 128))
  x_t, dy_t = _hold(x_q, (128, 1))[0], _hold(dy, (128, 1))[0]
  pairs = {"fprop": ((x_q, w_q), (x, w)), "dgrad": ((dy_q, w_q.T), (dy, w.T)),
           "wgrad": ((x_t.T, dy_t), (x.T, dy))}
  for gemm, (held, exact) in pairs.items():
    got, true = (np.matmul(*(np.float64(z) for z in pair)) for pair in (held, exact))
    expected = np.linalg.norm(got - true) / np.linalg.norm(true)
    assert float(found["error"][gemm]) == pytest.approx(expected, rel=1e-3), gemm
  assert float(found["underflow"]["x"]) == pytest.approx(x_under, rel=1e-6) and x_under > 0
  assert float(found["underflow"]["dy"]) == pytest.approx(dy_under, rel=1e-6)
  assert not any(float(v) for v in found["saturation"].values())


def test_recipes_that_change_nothing_or_little():
  """Law: fp32 errs nowhere, bf16 by its half unit, and neither loses a value."""
  ops = _operands()
  for name, low, high in (("fp32", 0, 0), ("bf16", 1e-4, 4e-3)):
    found = _layer(*ops, name="w_up_DF", recipe=numerics.recipe(name))
    for gemm in measure.GEMMS:
      assert low <= float(found["error"][gemm]) <= high
    assert not any(float(v) for v in (*found["underflow"].values(), *found["saturation"].values()))


def test_saturation_under_an_old_amax():
  """Oracle: numpy's count of the values beyond the amax that delayed scaling assumed."""
  x, w, dy = _operands()
  recipe = numerics.recipe("per_tensor_delayed")
  amax = jnp.asarray([np.abs(x).max() / 4, 0], jnp.float32)
  found = _layer(x, w, dy, None, amax, name="w_up_DF", recipe=recipe)
  beyond = np.abs(x) > np.abs(x).max() / 4 * (1 + 2.0**-10)
  assert float(found["saturation"]["x"]) == pytest.approx(beyond.sum() / (x != 0).sum(), rel=1e-6)
  assert beyond.any() and not float(found["saturation"]["dy"])


def test_projection_after_attention_keeps_more_bits():
  """Law: Wgrad reads E5M6 there, so x is rounded to E4M3 once and not twice."""
  ops, recipe = _operands(seed=3), numerics.recipe("v3")
  ordinary = _layer(*ops, name="w_up_DF", recipe=recipe)["error"]
  output = _layer(*ops, name="w_o_HUD", recipe=recipe)["error"]
  assert float(output["wgrad"]) < 0.95 * float(ordinary["wgrad"])
  assert float(output["dgrad"]) == float(ordinary["dgrad"])


def test_routed_experts_are_their_groups(found):
  """Law: errors of a grouped layer are those of its experts' own rows, layer by layer."""
  op = found["1.ffn.w_up_EDF"]
  recipe = numerics.recipe("v3")
  whole = _layer(*op[1:], name=op.parameter, recipe=recipe)["error"]
  block = op.x_MK.shape[0] // len(op.rows.group_m)
  error, size = 0.0, 0.0
  for i in range(int(op.rows.used)):
    x = op.x_MK[i * block:(i + 1) * block]
    dy = op.dy_MN[i * block:(i + 1) * block]
    w = op.w[op.rows.group_m[i]]
    # A dense layer of the same formats; a block's tiles of rows end where the block does.
    y = np.float64(x) @ np.float64(w)
    one = _layer(x, w, dy, name="w_up_DF", recipe=numerics.recipe(
        "v3", config.Runtime(recipe="v3", fp8=config.FP8(fprop_x="e4m3 1x128 pow2"))))["error"]
    error += float(one["fprop"])**2 * (y**2).sum()
    size += (y**2).sum()
  assert float(whole["fprop"]) == pytest.approx(np.sqrt(error / size), rel=1e-3)


def test_histogram_of_amaxes():
  """Oracle: numpy, tile by tile; a tile of zeros is no tile."""
  x, _, _ = _operands()
  counts, largest = measure.amaxes(x, "x")
  tiles = [np.abs(x[m, j:j + 128]).max() for m in range(len(x)) for j in (0, 128)]
  exponents = np.floor(np.log2([t for t in tiles if t > 0]))
  expected = [(exponents == e).sum() for e in measure.EXPONENTS]
  np.testing.assert_array_equal(counts, expected)
  assert float(largest) == np.abs(x).max() and sum(expected) == 258
  assert measure.median_exponent(np.asarray(counts)) == np.sort(exponents)[128]


def test_table(found):
  """Oracle: the parts it is made of; every number is finite and JSON's."""
  few = {k: found[k] for k in ("0.attn.w_o_HUD", "1.ffn.w_down_EFD")}
  table = numerics.measure(few, ("v3",))
  assert [row["name"] for row in table["operators"]] == list(few)
  stats = _layer(*few["0.attn.w_o_HUD"][1:], name="w_o_HUD",
                        recipe=numerics.recipe("v3"))
  row = table["operators"][0]
  assert row["recipes"]["v3"]["error"] == {k: float(v) for k, v in stats["error"].items()}
  line = numerics.record(few, "v3", config.Runtime())
  assert line["error"]["fprop"][0] == row["recipes"]["v3"]["error"]["fprop"]
  assert line["amax"]["dy"][1] == table["operators"][1]["amax"]["dy"]["largest"] > 0
  assert all(np.isfinite(v).all() for part in ("error", "underflow", "saturation")
             for v in line[part].values())
