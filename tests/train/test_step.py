"""One optimizer step: its invariances on a toy model, and on the real one."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsv3_jax import config
from dsv3_jax.model.routing import RouterBias
from dsv3_jax.parallel import mesh as mesh_lib
from dsv3_jax.train import optim, state, step
from tests.train import fakes

CFG = fakes.small_config()
HYPER = state.Hyper(jnp.float32(1e-2), jnp.float32(1e-3), jnp.float32(0.3))


class Ffn(nnx.Module):

  def __init__(self):
    self.bias_E = RouterBias(jnp.zeros((2, 4)))


class Layer(nnx.Module):

  def __init__(self):
    self.ffn = Ffn()


class Toy(nnx.Module):
  """Logits from one embedding; experts are chosen by token number."""

  def __init__(self):
    self.embedding_VD = nnx.Param(0.1 * jax.random.normal(jax.random.key(0), (64, 8)))
    self.head_DV = nnx.Param(0.1 * jax.random.normal(jax.random.key(1), (8, 64)))
    self.moe = Layer()


def toy_loss(model, batch, *, loss, mtp_weight, runtime, denominator, share, axes):
  del loss, runtime, axes
  tokens_BS = batch["tokens"]
  weight_BT = batch["mask"][:, 1:].astype(jnp.float32) if "mask" in batch else jnp.ones_like(
      tokens_BS[:, 1:], jnp.float32)
  logits_BTV = model.embedding_VD[...][tokens_BS[:, :-1]] @ model.head_DV[...]
  nll_BT = -jnp.take_along_axis(jax.nn.log_softmax(logits_BTV), tokens_BS[:, 1:, None], -1)[..., 0]
  counts_E = jnp.zeros(4).at[tokens_BS[:, :-1] % 4].add(1.0)
  total = (1 + mtp_weight) * (nll_BT * weight_BT).sum() / denominator
  total += share * jnp.square(logits_BTV).mean()
  return total, {"loss_sum": (nll_BT * weight_BT).sum(), "mtp_loss_sum": jnp.zeros(1),
                 "tokens": weight_BT.sum(), "mtp_tokens": jnp.ones(1),
                 "correct": jnp.zeros(()), "balance": share * jnp.square(logits_BTV).mean(),
                 "batch_balance": share, "expert_balance": jnp.zeros(()),
                 "dropped": jnp.zeros(()), "counts_LE": jnp.stack([counts_E, 2 * counts_E])}


def _tokens(shape=(1, 8, 17), seed=0) -> np.ndarray:
  return np.random.default_rng(seed).integers(0, 64, shape).astype(np.int32)


def _one_step(batch, hyper=HYPER, mesh=None, build=Toy, loss_fn=toy_loss, steps=1):
  optimizer = optim.make_optimizer(CFG.optim)
  graphdef, _, init = state.initializer(build, optimizer, mesh)
  train_step = step.make_train_step(graphdef, CFG, optimizer, mesh, loss_fn)
  current = init()
  for _ in range(steps):
    current, metrics = train_step(current, {k: jnp.asarray(v) for k, v in batch.items()}, hyper)
  return jax.device_get((current, metrics))


def _assert_same(a, b, tolerance=1e-5) -> None:
  chex.assert_trees_all_close(a, b, rtol=tolerance, atol=tolerance)


def _cuts(batch, hyper):
  """The same batch as one micro-batch, as four, as four of six, and over devices."""
  split = {k: v.reshape(4, 2, 17) for k, v in batch.items()}
  padded = step.pad_micro_batches(split, 6)
  some = dataclasses.replace(hyper, micro_batches=jnp.int32(4))
  mesh = mesh_lib.make_mesh(config.Mesh(data=2))
  wide = mesh_lib.make_mesh(config.Mesh(data=8))
  return {"four": (split, hyper, None), "four of six": (padded, some, None),
          "8 devices": (batch, hyper, wide), "2 devices, four": (split, hyper, mesh),
          "2 devices, four of six": (padded, some, mesh)}


@pytest.mark.parametrize("masked", [False, True])
def test_the_cut_of_a_batch_does_not_matter(masked):
  """Law: micro-batches, padding among them and data shards give one step of the whole batch."""
  batch = {"tokens": _tokens()}
  if masked:
    batch["mask"] = np.random.default_rng(1).integers(0, 2, (1, 8, 17)).astype(np.int8)
  reference = _one_step(batch)
  assert reference[1]["loss"] > 3 and reference[1]["grad_norm"] > 0
  for name, (cut, hyper, mesh) in _cuts(batch, HYPER).items():
    got = _one_step(cut, hyper, mesh)
    counts, expected = got[1].pop("counts_LE"), reference[1]["counts_LE"]
    if "of six" not in name:  # a toy counts padding's tokens, the model does not (next test)
      np.testing.assert_array_equal(counts, expected, err_msg=name)
      _assert_same(got[0], reference[0])
    else:
      _assert_same(got[0].params, reference[0].params)
    _assert_same(got[1]["loss"], reference[1]["loss"])
    _assert_same(got[1]["grad_norm"], reference[1]["grad_norm"])


def test_gradient_and_bias_against_numpy():
  """Oracle: plain jax.grad of the loss over the whole batch; the sign rule in numpy."""
  batch = {"tokens": _tokens()}
  optimizer = optim.make_optimizer(dataclasses.replace(CFG.optim, clip_norm=0.0))
  graphdef, _, init = state.initializer(Toy, optimizer)
  before = init()

  def total(params):
    model = nnx.merge(graphdef, params, before.buffers)
    return toy_loss(model, {"tokens": batch["tokens"][0]}, loss=None, mtp_weight=0.3, runtime=None,
                    denominator=8 * 16, share=1.0, axes=())[0]

  expected = jax.grad(total)(before.params)
  got, aux = step.gradients(graphdef, CFG, before.params, before.buffers, batch, HYPER,
                            loss_fn=toy_loss)
  _assert_same(got, expected, 1e-6)
  counts = np.bincount(batch["tokens"][0, :, :-1].ravel() % 4, minlength=4)
  np.testing.assert_array_equal(aux["counts_LE"], np.stack([counts, 2 * counts]))
  bias = step.update_biases(before.buffers, aux["counts_LE"], 0.01)["moe"]["ffn"]["bias_E"]
  np.testing.assert_allclose(bias[1], 0.01 * np.sign(counts.mean() - counts), rtol=1e-6)


@pytest.mark.parametrize("poison", ["nan", "inf"])
def test_a_bad_step_changes_nothing_but_counters(poison):
  """Oracle: the state before the step, bit for bit."""

  def poisoned(model, batch, **kwargs):
    total, aux = toy_loss(model, batch, **kwargs)
    bad = (batch["tokens"] == 63).any() & (batch["tokens"] == 62).any()
    # nan: in the loss itself; inf: in the gradient alone, where the loss stays finite
    extra = jnp.where(bad, jnp.nan if poison == "nan" else 0.0, 0.0)
    spike = jnp.where(bad, jnp.inf, 1.0) if poison == "inf" else 1.0
    return total * spike + extra, aux | {"loss_sum": aux["loss_sum"] + extra}

  optimizer = optim.make_optimizer(CFG.optim)
  graphdef, _, init = state.initializer(Toy, optimizer)
  train_step = step.make_train_step(graphdef, CFG, optimizer, loss_fn=poisoned)
  fine = {"tokens": jnp.asarray(_tokens() % 60)}
  bad = {"tokens": fine["tokens"].at[0, 0, :2].set(jnp.array([62, 63]))}
  first, _ = train_step(init(), fine, HYPER)
  kept = jax.device_get(first)
  second, metrics = train_step(first, bad, HYPER)
  third, metrics_3 = train_step(second, bad, HYPER)
  for name in ("params", "buffers", "opt_state"):
    chex.assert_trees_all_equal(getattr(kept, name), getattr(third, name))
  assert bool(metrics["bad"]) and int(metrics_3["bad_steps"]) == 2
  fourth, metrics_4 = train_step(third, fine, HYPER)
  assert not bool(metrics_4["bad"]) and int(metrics_4["bad_steps"]) == 0
  assert int(fourth.skipped) == 2 and int(fourth.step) == 4
  changed = np.abs(np.asarray(fourth.params["head_DV"]) - kept.params["head_DV"]).max()
  assert changed > 1e-4  # it goes on learning


def test_a_model_without_experts_learns():
  """Law: the same batch again costs less; the routing statistics are of no layer."""
  cfg = config.replace(CFG.model, dense_layers=CFG.model.layers, mtp_depth=0)
  build = lambda: state.build_model(cfg, 0)
  batch = {"tokens": _tokens((1, 4, 17))}
  first, third = (_one_step(batch, build=build, loss_fn=step.loss_lib.loss_fn, steps=n)
                  for n in (1, 3))
  assert third[1]["loss"] < first[1]["loss"] - 0.01 and not third[1]["bad"]
  assert third[1]["max_vio_L"].shape == (0,) and third[1]["mtp_loss"].shape == (0,)
  assert third[0].buffers == {}


def test_the_real_model_on_devices():
  """Law: the model on 4 devices, and in padded micro-batches, equals one device; counts exactly."""
  build = lambda: state.build_model(CFG.model, 0)
  batch = {"tokens": _tokens((1, 4, 17)), "mask": np.ones((1, 4, 17), np.int8),
           "segments": np.zeros((1, 4, 17), np.int32)}
  loss_fn = step.loss_lib.loss_fn
  reference = _one_step(batch, build=build, loss_fn=loss_fn, steps=2)
  mesh = mesh_lib.make_mesh(config.Mesh(data=4))
  padded = step.pad_micro_batches({k: v.reshape(2, 2, 17) for k, v in batch.items()}, 3)
  some = dataclasses.replace(HYPER, micro_batches=jnp.int32(2))
  for got in (_one_step(batch, mesh=mesh, build=build, loss_fn=loss_fn, steps=2),
              _one_step(padded, some, build=build, loss_fn=loss_fn, steps=2)):
    np.testing.assert_array_equal(got[1]["counts_LE"], reference[1]["counts_LE"])
    for name in ("loss", "mtp_loss", "balance", "grad_norm", "accuracy"):
      np.testing.assert_allclose(got[1][name], reference[1][name], rtol=2e-5, err_msg=name)
    _assert_same(got[0].params, reference[0].params, 1e-4)
    _assert_same(got[0].buffers, reference[0].buffers, 0)
