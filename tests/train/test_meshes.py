"""Training steps on meshes of devices: the numbers are those of one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax import config
from dsv3_jax.parallel import mesh as mesh_lib
from dsv3_jax.parallel import sharding
from dsv3_jax.train import optim, state, step
from tests import quick
from tests.model import small

MODEL = config.replace(small.BASE, layers=2)  # a dense layer, an MoE layer, MTP
ONE_LAYER = {"model__layers": 1, "model__dense_layers": 0, "model__mtp_depth": 0}
CFG = config.replace(
    config.Config(model=MODEL, loss=small.WEIGHTS),
    **{"runtime.attention": "reference", "runtime.gemm": "reference", "runtime.head_chunk": 16,
       "data.sequence_length": 8, "data.batch_size": 32, "data.microbatch": 8})
M, B = 4, 8
STEPS = 50
HYPER = state.Hyper(jnp.float32(3e-4), jnp.float32(1e-3), jnp.float32(0.3))


def batches(steps):
  draw = np.random.default_rng(0)
  for _ in range(steps):
    start = draw.integers(23, size=(M, B, 1))
    yield {"tokens": ((start + np.arange(9) * draw.integers(1, 4, size=(M, B, 1))) % 23
                      ).astype(np.int32)}


@functools.cache
def made(**changes):
  """Mesh, first state and compiled step, once for runs of any length."""
  cfg = config.replace(CFG, **{key.replace("__", "."): value for key, value in changes.items()})
  one = cfg.runtime.mesh.devices == 1 and cfg.runtime.schedule == "none"
  mesh = None if one else mesh_lib.make_mesh(cfg.runtime.mesh)
  optimizer = optim.make_optimizer(cfg.optim)
  graphdef, _, init = state.initializer(
      lambda: state.build_model(cfg.model, 0), optimizer, mesh, cfg.runtime)
  train_step = step.make_train_step(graphdef, cfg, optimizer, mesh)
  batch, first = placed(next(batches(1)), mesh), init()
  compiled = train_step.lower(first, batch, HYPER).compile(compiler_options=quick.options())
  return mesh, jax.device_get(first), jax.tree.map(lambda x: x.sharding, first), compiled


def placed(batch, mesh):
  return batch if mesh is None else jax.device_put(batch, sharding.batch_sharding(mesh))


@functools.cache
def run(steps=STEPS, **changes):
  """Losses [steps], counts [steps, L, E], gradient norms, dropped pairs and the last state."""
  mesh, first, shardings, compiled = made(**changes)
  now, found = jax.device_put(first, shardings), []  # a step donates its state
  for batch in batches(steps):
    now, metrics = compiled(now, placed(batch, mesh), HYPER)
    found.append(jax.device_get(metrics))
  stack = lambda key: np.stack([m[key] for m in found])
  return stack("loss"), stack("counts_LE"), stack("grad_norm"), stack("dropped"), now


@pytest.mark.parametrize("mesh", [
    dict(data=2, node=2, gpu=2), dict(pipe=2, node=2, gpu=2)], ids=str)
def test_fifty_steps(mesh):
  """Oracle: the run on one device: losses to 1e-4, routing counts exactly."""
  loss, counts, norm, _, _ = run()
  got_loss, got_counts, got_norm, _, _ = run(runtime__mesh=config.Mesh(**mesh))
  assert loss[-5:].mean() < 0.97 * loss[:5].mean()
  np.testing.assert_allclose(got_loss, loss, rtol=1e-4)
  np.testing.assert_allclose(got_norm, norm, rtol=1e-3)
  np.testing.assert_array_equal(got_counts, counts)


def test_zero_1_is_bit_identical():
  """Law (ZeRO-1): where the numbers lie changes none of them; every device holds a part."""
  mesh = config.Mesh(data=2, node=2, gpu=2)
  loss, _, norm, _, whole = run(3, runtime__mesh=mesh)
  got_loss, _, got_norm, _, cut = run(3, runtime__mesh=mesh, runtime__zero=1)
  np.testing.assert_array_equal(got_loss, loss)
  np.testing.assert_array_equal(got_norm, norm)
  jax.tree.map(np.testing.assert_array_equal, cut, whole)
  held = lambda tree: sum(x.addressable_shards[0].data.size for x in jax.tree.leaves(tree))
  assert state.bytes_per_device(cut)["whole"] == state.bytes_per_device(whole)["whole"]
  for tree in ("params", "opt_state"):
    assert held(getattr(cut, tree)) < 0.35 * held(getattr(whole, tree))


@pytest.mark.parametrize("recipe", ["v3", "per_tensor_delayed"])
def test_recipes_in_a_pipeline(recipe):
  """Oracle: the same recipe on one device; a few codes may round differently."""
  changes = ONE_LAYER | {"runtime__recipe": recipe, "runtime__pipeline__schedule": "1f1b"}
  loss, counts, norm, _, one = run(3, **changes | {"runtime__pipeline__schedule": "none"})
  got_loss, got_counts, got_norm, _, piped = run(3, runtime__mesh=config.Mesh(pipe=2), **changes)
  np.testing.assert_allclose(got_loss, loss, rtol=1e-3)
  np.testing.assert_allclose(got_norm, norm, rtol=1e-2)
  assert np.abs(got_counts - counts).sum() < 0.02 * counts.sum()
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0.1, atol=1e-6),
               piped.amax, one.amax)
  assert (one.amax is None) == (recipe == "v3")


def test_overflow():
  """Oracle: one device. Buffers for half of the mean share overflow: further rounds lose nothing;
  drop loses pairs and says how many."""
  loss, counts, *_ = run(2, **ONE_LAYER)
  small_buffers = ONE_LAYER | {"runtime__mesh": config.Mesh(node=2, gpu=2),
                             "runtime__dispatch__factor": 0.5}
  got_loss, got_counts, _, dropped, _ = run(2, **small_buffers)
  assert not dropped.any()
  np.testing.assert_allclose(got_loss, loss, rtol=1e-5)
  np.testing.assert_array_equal(got_counts, counts)
  _, got_counts, _, dropped, _ = run(2, **small_buffers, runtime__dispatch__overflow="drop")
  assert (dropped > 0.1 * counts.sum((1, 2))).all()
  np.testing.assert_array_equal(got_counts[0, 0], counts[0, 0])  # of what the router chose
