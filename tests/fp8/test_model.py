"""A whole model and its training step under recipes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend.core import jaxprs_in_params

from benchmarks.fp8 import SAVED_TARGET, saved_bytes
from dsv3_jax import config
from dsv3_jax.fp8 import delayed, weights
from dsv3_jax.fp8 import recipe as recipe_lib
from dsv3_jax.model import rope
from dsv3_jax.model.block import Block, BlockCall
from dsv3_jax.model.loss import loss_fn, target_tokens
from dsv3_jax.model.moe import MoECall
from dsv3_jax.train import checkpoint, optim, state, step
from tests.fp8.test_linear import metric, resolve
from tests.model import small
from tests.quick import jit

MODEL = config.Model(
    vocab_size=64, dim=160, layers=2, dense_layers=1, dense_ffn_dim=192, init_std=0.05,
    attention=config.Attention(heads=2, q_rank=64, kv_rank=48, nope_dim=32, rope_dim=16, v_dim=32),
    moe=config.MoE(experts=4, active=2, shared=1, ffn_dim=96, groups=1, active_groups=1),
    mtp_depth=1)
CFG = config.Config(model=MODEL, runtime=config.Runtime(recipe="v3"),
                    data=config.Data(sequence_length=64, batch_size=8))
ONE_LAYER = config.replace(CFG, **{"model.layers": 1, "model.dense_layers": 0,
                                   "model.mtp_depth": 0})
TOKENS = np.random.default_rng(0).integers(0, 64, (8, 65)).astype(np.int32)
HYPER = state.Hyper(np.float32(1e-3), np.float32(1e-3), np.float32(0.3))


@functools.cache
def graph(model=MODEL):
  return nnx.split(small.abstract(model), nnx.Param, step.routing.RouterBias)[0]


@functools.cache
def arrays(model=MODEL):
  _, params, buffers = nnx.split(small.build(model), nnx.Param, step.routing.RouterBias)
  return nnx.to_pure_dict(params), nnx.to_pure_dict(buffers)


def gradients(cfg, micros=1, mesh=None, amax=None):
  """Gradients and statistics of one batch as the training step computes them."""
  params, buffers = arrays(cfg.model)
  batch = {"tokens": TOKENS.reshape(micros, 8 // micros, 65)}
  run = jit(lambda params, buffers, batch, amax: step.gradients(
      graph(cfg.model), cfg, params, buffers, batch, HYPER, mesh, amax=amax))
  return run(params, buffers, batch, amax)


@pytest.fixture(scope="module")
def one_layer():
  return gradients(ONE_LAYER)


def flat(tree):
  return {jax.tree_util.keystr(k): np.asarray(v)
          for k, v in jax.tree_util.tree_flatten_with_path(tree)[0]}


def test_gradients_through_an_moe_block_against_bf16():
  """Oracle: the same block under the recipe bf16, tensor by tensor, DeepGEMM's metric."""
  block = Block(MODEL, moe=True, rngs=nnx.Rngs(0))
  graphdef, params, buffers = nnx.split(block, nnx.Param, step.routing.RouterBias)
  x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 64, MODEL.dim)), jnp.float32)
  dy = jnp.asarray(np.random.default_rng(2).normal(size=x.shape), jnp.float32) * 1e-4
  cos, sin = rope.rope_table(MODEL.attention, jnp.broadcast_to(jnp.arange(64), (2, 64)))

  def run(name):
    runtime = config.Runtime(recipe=name)
    call = BlockCall(cos, sin, None, MoECall(recipe=recipe_lib.resolve(runtime)), runtime)
    f = lambda params, x: nnx.merge(graphdef, params, buffers)(x, call)[0]
    return flat(jit(lambda params, x, dy: jax.vjp(f, params, x)[1](dy))(params, x, dy))

  bf16, found = run("bf16"), run("v3")
  assert len(bf16) == 17
  for name, want in bf16.items():
    assert 0 < metric(found[name], want) < 2e-2, {n: metric(found[n], bf16[n]) for n in bf16}


def test_fp32_is_todays_path():
  """Law: recipe fp32 in fp32 traces to the very program of no recipe at all: equal bit for bit, and
  at no cost. v3 does not."""
  params, buffers = arrays()

  def program(name):
    runtime = config.Runtime(recipe=name)
    def total(params):
      batch = {"tokens": jnp.asarray(TOKENS)}
      return loss_fn(nnx.merge(graph(), params, buffers), batch, loss=config.Loss(), mtp_weight=0.3,
                     runtime=runtime, denominator=target_tokens(batch))[0]
    return str(jax.make_jaxpr(jax.grad(total))(params))

  today = program("none")
  assert "f8_e4m3fn" not in today
  assert program("fp32") == today
  assert "f8_e4m3fn" in program("v3")


@pytest.mark.parametrize("remat", ["report", "layer"])
def test_remat_changes_nothing(remat, one_layer):
  """Law: what is recomputed equals what was kept. (jax.checkpoint would turn E4M3 codes of 256 and
  more into infinities if residuals were not bytes.)"""
  cfg = config.replace(ONE_LAYER, **{"runtime.remat": remat})
  found, want = flat(gradients(cfg)), flat(one_layer)
  for name in want:
    np.testing.assert_allclose(found[name], want[name], rtol=1e-4,
                               atol=1e-5 * np.abs(want[name]).max(initial=0), err_msg=name)


def test_micro_batches_share_weights_quantized_once():
  """Law: no operation inside the loop over micro-batches makes FP8 of a weight's shape, and none
  reads a master."""
  cfg = config.replace(CFG, **{"data.microbatch": 4})
  params, buffers = arrays()
  jaxpr = jax.make_jaxpr(lambda params: step.gradients(
      graph(), cfg, params, buffers, {"tokens": jnp.asarray(TOKENS).reshape(2, 4, 65)}, HYPER))(
          params).jaxpr
  found = jax.eval_shape(lambda params: weights.prepare(params, resolve("v3")), params)
  shapes = {w.fprop.shape[-2:] for w in jax.tree.leaves(
      found, is_leaf=lambda x: isinstance(x, weights.Weight)) if isinstance(w, weights.Weight)}
  shapes -= {(MODEL.dim, 64), (64, MODEL.dim)}  # also shapes of activations here

  def made(jaxpr, inside):
    count = {True: 0, False: 0}
    for eqn in jaxpr.eqns:
      for v in eqn.outvars:
        fp8 = getattr(v.aval, "dtype", None) == jnp.float8_e4m3fn
        if eqn.primitive.name == "bitcast_convert_type" and fp8 and v.aval.shape[-2:] in shapes:
          count[inside] += 1
      for inner in jaxprs_in_params(eqn.params):
        below = made(inner, inside or eqn.primitive.name == "while")
        count = {k: count[k] + below[k] for k in count}
    return count

  count = made(jaxpr, False)
  assert count[True] == 0 and count[False] >= 20, count


def test_eight_devices_compute_as_one(one_layer):
  """Oracle: one device. Tiles along tokens end at a device's edge, so Wgrad may differ by what
  another tiling makes; the forward pass may not."""
  cfg = config.replace(ONE_LAYER, **{"runtime.mesh.data": 8})
  mesh = step.mesh_lib.make_mesh(cfg.runtime.mesh)
  (grads, aux), (want, aux_want) = gradients(cfg, mesh=mesh), one_layer
  np.testing.assert_allclose(aux["loss_sum"], aux_want["loss_sum"], rtol=1e-5)
  for name, w in flat(want).items():
    assert metric(flat(grads)[name], w) < 2e-3, name


def test_delayed_amaxes_come_out_of_the_step_and_go_into_the_history():
  """Oracle: the amax of the operands themselves, largest over micro-batches; the history's law."""
  recipe = resolve("per_tensor_delayed", history=3)
  cfg = config.replace(CFG, **{"runtime.recipe": "per_tensor_delayed", "data.microbatch": 4})
  params, _ = arrays()
  history = delayed.init(params, recipe)
  assert set(history) == {"dense", "moe", "mtp"} and "head_DV" not in history
  assert history["moe"]["ffn"]["w_gate_EDF"].shape == (1, 2, 3)
  _, aux = gradients(cfg, micros=2, amax=delayed.assumed(history))
  for x in jax.tree.leaves(aux["amax"]):
    assert x.shape[-1] == 2 and (np.asarray(x) > 0).all()
  once = delayed.record(history, aux["amax"])
  twice = delayed.record(once, jax.tree.map(lambda x: x / 2, aux["amax"]))
  for seen, assumed in zip(jax.tree.leaves(aux["amax"]), jax.tree.leaves(delayed.assumed(twice)),
                           strict=True):
    np.testing.assert_array_equal(seen, assumed)
  bad = delayed.record(once, jax.tree.map(lambda x: x * np.nan, aux["amax"]))
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(bad))
  assert delayed.init(params, resolve("v3")) is None


def test_a_checkpoint_of_one_recipe_loads_in_another(tmp_path):
  """Law: the parameter tree does not know the recipe; a history starts anew where there is none."""
  params, buffers = arrays()
  optimizer = optim.make_optimizer(CFG.optim)

  def made(name):
    return state.make_state(params, buffers, optimizer, config.Runtime(recipe=name))

  def abstract(s):
    where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), s)

  names = ("none", "v3", "per_tensor_delayed")
  for name in names:
    saved = made(name)
    if saved.amax is not None:
      saved = dataclasses.replace(saved, amax=jax.tree.map(lambda x: x + 2, saved.amax))
    saver = checkpoint.Checkpoints(str(tmp_path / name))
    saver.save(saved, {"step": 1, "val_loss": None})
    saver.wait()
    for other in names:
      like = made(other)
      restored = saver.restore(abstract(like)).state
      assert jax.tree.structure(restored) == jax.tree.structure(like)
      for a, b in zip(jax.tree.leaves(restored.params), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(a, b)
      if other == "per_tensor_delayed":
        want = 2 if name == other else 0
        assert all((np.asarray(x) == want).all() for x in jax.tree.leaves(restored.amax))
    saver.close()


@pytest.mark.parametrize("model", [config.Model(), config.replace(
    config.preset("v3_671b"), vocab_size=1024)], ids=["tiny", "671B"])
def test_saved_bytes_of_an_moe_layer(model):
  """Oracle: the number of bytes that jax.vjp keeps, against bf16's with the same remat policy."""
  found = [saved_bytes(model, config.Runtime(recipe=name, compute_dtype="bfloat16", remat="report",
                                             attention="xla"), tokens=512)
           for name in ("v3", "none")]
  assert found[0] <= SAVED_TARGET * found[1]


def test_forward_values_against_qwix():
  """Oracle: qwix's sub-channel quantization of both operands and its own dot_general."""
  qarray = pytest.importorskip("qwix._src.core.qarray")
  dot_general = pytest.importorskip("qwix._src.core.dot_general")
  from dsv3_jax.fp8 import linear
  rng = np.random.default_rng(3)
  x = rng.normal(size=(64, 256)).astype(np.float32) * np.exp(rng.normal(size=(64, 1)))
  w = rng.normal(size=(256, 128)).astype(np.float32)
  x = x.astype(np.float32)
  y = jit(lambda x, w: linear.linear(x, (w,), resolve("v3"))[0])(x, w)
  fp8 = dict(qtype=jnp.float8_e4m3fn)
  x_q = qarray.quantize(jnp.asarray(x), qarray.HowToQuantize(
      **fp8, channelwise_axes=(0,), tiled_axes={1: 128}))
  w_q = qarray.quantize(jnp.asarray(w), qarray.HowToQuantize(**fp8, tiled_axes={0: 128, 1: 128}))
  for ours, theirs in ((weights.hold(x, resolve("v3").fprop_x, 1e-4), x_q),
                       (weights.hold(w, resolve("v3").fprop_w, 1e-4), w_q)):
    # They multiply by a rounded reciprocal, so scales may differ in the last bit and a code by one.
    assert metric(ours.dequantize(), qarray.dequantize(theirs)) < 1e-6
  want = dot_general.dot_general(x_q, w_q, (((1,), (0,)), ((), ())))
  assert metric(y, want) < 1e-6
  assert metric(y, x @ w) > 1e-5
