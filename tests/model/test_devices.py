"""One device against eight: `shard_map` over `data` with its varying-axes check on."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from dsv3_jax import config
from dsv3_jax.model.loss import loss_fn
from pallas_kernels import vma
from tests.model import small
from tests.oracles.tolerance import assert_close
from tests.quick import jit

CFG = config.replace(small.BASE, mtp_depth=2)
DEVICES = 8
TOKENS = small.tokens(batch=DEVICES, length=9)
# Documents of uneven length: shards have unequal numbers of targets and of MTP positions.
SEGMENTS = np.sort(np.random.default_rng(0).integers(0, 3, TOKENS.shape)).astype(np.int32)
BATCH = {"tokens": TOKENS, "segments": SEGMENTS}
TARGETS = int((SEGMENTS[:, 1:] == SEGMENTS[:, :-1]).sum())


def gradients(graphdef, runtime, share, axes, params, buffers, batch):
  """(total, aux), gradients of the whole batch, from each device's own."""
  if axes:
    params, buffers = jax.tree.map(
        lambda x: jax.lax.pcast(x, axes, to="varying"), (params, buffers))

  def total(params):
    model = nnx.merge(graphdef, params, buffers)
    return loss_fn(model, batch, loss=small.WEIGHTS, mtp_weight=0.3, runtime=runtime,
                   denominator=TARGETS, share=share, axes=axes)

  result = jax.value_and_grad(total, has_aux=True)(params)
  if not axes:
    return result
  # Everything sums; what does not vary (a count that no data touches) would fail the check.
  return jax.lax.psum(jax.tree.map(lambda x: vma.match(x, batch["tokens"]), result), axes)


def sharded(graphdef, runtime):
  mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(jax.sharding.AxisType.Auto,),
                       devices=jax.devices()[:DEVICES])
  rep, cut = PartitionSpec(), PartitionSpec("data")
  local = functools.partial(gradients, graphdef, runtime, 1 / DEVICES, ("data",))
  return jax.shard_map(local, mesh=mesh, in_specs=(rep, rep, cut), out_specs=rep, check_vma=True)


@pytest.fixture(scope="module")
def parts():
  if len(jax.devices()) < DEVICES:
    pytest.skip(f"needs {DEVICES} devices")
  return small.split(small.build(CFG, seed=2))


def test_eight_devices_equal_one(parts):
  """Law: statistics exactly, loss and gradients to rounding, wherever the sequences lie."""
  graphdef, params, buffers = parts
  one = jit(functools.partial(gradients, graphdef, small.RUNTIME, 1.0, ()))(params, buffers, BATCH)
  eight = jit(sharded(graphdef, small.RUNTIME))(params, buffers, BATCH)
  (total, aux), (total8, aux8) = one[0], eight[0]
  for key in ("counts_LE", "tokens", "mtp_tokens", "correct"):
    np.testing.assert_array_equal(aux[key], aux8[key], key)
  assert int(aux["tokens"]) == TARGETS
  assert_close(total8, total, factor=0.1)
  for key in aux:
    assert_close(aux8[key], aux[key], factor=0.1)
  paths = jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(one[1]))
  for (path, a), b in zip(paths, jax.tree.leaves(eight[1]), strict=True):
    assert np.any(a), path
    assert_close(b, a)


@pytest.mark.parametrize("changes", [
    {"remat": "report", "compute_dtype": "bfloat16"}, {"remat": "layer", "attention_block": 1},
    {"attention": "reference", "gemm": "reference", "layer_unroll": 0}, {"gemm": "ragged_dot"}])
def test_every_implementation_passes_the_check(parts, changes):
  """Law: traces under check_vma=True; a loop carry or custom gradient of wrong type would raise."""
  graphdef, params, buffers = parts
  runtime = config.replace(small.RUNTIME, **changes)
  _, grads = jax.eval_shape(sharded(graphdef, runtime), params, buffers, BATCH)
  assert jax.tree.map(jnp.shape, grads) == jax.tree.map(jnp.shape, params)
