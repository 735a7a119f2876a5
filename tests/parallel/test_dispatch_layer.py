"""The MoE layer with its experts cut over devices, in the compute dtype and under FP8 recipes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from dsv3_jax import config
from dsv3_jax.fp8 import quantize, recipe, weights
from dsv3_jax.fp8.qtensor import QTensor
from dsv3_jax.model import moe, remat
from dsv3_jax.parallel import payload
from dsv3_jax.parallel.dispatch import Settings
from pallas_kernels import vma
from tests.model import small
from tests.oracles.tolerance import assert_close
from tests.parallel.test_dispatch import AXES, CUT, mesh_of
from tests.quick import jit

CFG = config.replace(small.BASE, **{"moe.experts": 16, "moe.active": 3, "moe.groups": 4,
                                    "moe.active_groups": 2, "dim": 140})
SHAPE = (8, 2, CFG.dim)  # a sequence a device
RNG = np.random.default_rng(0)
X, DY = (RNG.normal(size=SHAPE).astype(np.float32) for _ in range(2))
BLOCK = 4
GRAPHDEF, PARAMS, BUFFERS = small.split(
    nnx.eval_shape(lambda: moe.MoELayer(CFG, rngs=nnx.Rngs(0))))
PARAMS = jax.tree.map(lambda x: jnp.asarray(0.2 * RNG.normal(size=x.shape), x.dtype), PARAMS)
PARAMS = nnx.to_pure_dict(PARAMS)  # as the training step has them
BUFFERS = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), BUFFERS)
SPECS = jax.tree_util.tree_map_with_path(
    lambda path, _: CUT if "_E" in jax.tree_util.keystr(path).rpartition("w_")[2] else
    PartitionSpec(), PARAMS)


def both(params, x, dy, call, axes=()):
  """y, statistics, dx and the parameters' gradients, those of whole parameters summed."""
  params = jax.tree.map(lambda p: vma.match(p, x), params)
  prepared = weights.prepare(params, call.recipe)  # once, as a training step does

  def forward(params, x):
    params = params if call.recipe is None else weights.with_masters(prepared, params)
    return nnx.merge(GRAPHDEF, params, BUFFERS)(x, call)

  y, pull, stats = jax.vjp(forward, params, x, has_aux=True)
  dparams, dx = pull(dy)
  if axes:
    dparams = jax.tree.map(lambda g, spec: g if spec == CUT else jax.lax.psum(g, axes), dparams,
                           SPECS)
    stats = jax.lax.psum(jax.tree.map(lambda s: vma.match(s, x), stats), axes)
  return y, dx, dparams, stats


@functools.cache
def local(**changes):
  r = resolve(**changes)
  return jit(lambda *a: both(*a, moe.MoECall(recipe=r)))


@functools.cache
def apart(shape, settings, **changes):
  call = moe.MoECall(axes=AXES, recipe=resolve(**changes), expert=settings)
  return jit(jax.shard_map(
      functools.partial(both, call=call, axes=AXES), mesh=mesh_of(shape), check_vma=True,
      in_specs=(SPECS, CUT, CUT), out_specs=(CUT, CUT, SPECS, PartitionSpec())))


def resolve(**changes):
  return recipe.resolve(config.replace(config.Runtime(), **changes)) if changes else None


def test_layer_equals_one_device():
  """Law: output, gradients of every parameter and statistics are those of one device."""
  assert {str(s) for s in jax.tree.leaves(SPECS, is_leaf=lambda s: isinstance(s, PartitionSpec))
          } == {str(CUT), str(PartitionSpec())}
  y, dx, dparams, stats = local()(PARAMS, X, DY)
  found = apart((2, 4), Settings(block=BLOCK))(PARAMS, X, DY)
  np.testing.assert_array_equal(found[3].counts_E, stats.counts_E)
  assert not found[3].dropped
  for a, b in zip(jax.tree.leaves(found[:3]), jax.tree.leaves((y, dx, dparams)), strict=True):
    assert np.any(b)
    assert_close(a, b, factor=0.1)


def metric(a, b):
  """DeepGEMM's."""
  a, b = np.asarray(a, float), np.asarray(b, float)
  return 1 - 2 * (a * b).sum() / ((a * a).sum() + (b * b).sum())


@pytest.mark.parametrize("settings,exact", [
    (Settings(form="flat", block=8), ("w_router", "w_gate_E", "w_up_E", "w_down_E")),
    (Settings(block=8), ("w_router",)), (Settings(block=8, factor=0.5), ("w_router",))])
def test_recipe(settings, exact):
  """Law: a row quantized before it travels is the row that one device quantizes.

  So are tiles along the tokens where rows arrive in the order of tokens, as the flat form has them.
  Other weight gradients sum over other tiles: within FP8's error.
  """
  *expected, _ = local(recipe="v3")(PARAMS, X, DY)
  *found, stats = apart((2, 4), settings, recipe="v3")(PARAMS, X, DY)
  assert not stats.dropped
  paths = jax.tree_util.tree_leaves_with_path(expected)
  for (path, b), a in zip(paths, jax.tree.leaves(found), strict=True):
    name = jax.tree_util.keystr(path)
    assert np.any(b), name
    if not name.startswith("[2]") or any(e in name and "shared" not in name for e in exact):
      assert_close(a, b, factor=0.1)
    else:
      assert metric(a, b) < 2e-3, name


def test_dropped_pairs_reach_the_statistics():
  """Law: what is routed is served or dropped; oracle: buffers by hand."""
  settings = Settings(form="flat", factor=0.1, overflow="drop")
  *_, stats = apart((2, 4), settings)(PARAMS, X, DY)
  routed = int(stats.counts_E.sum())
  assert routed == 16 * CFG.moe.active
  # One slot for each pair of devices, one pair of a row and an expert in each device's rows.
  assert routed - 8 <= stats.dropped < routed


def test_formats_are_given_once():
  """Oracle: the message."""
  codec = payload.Codec(quantize.quantize, QTensor.dequantize)
  settings = Settings(wire=payload.Wire(activations=codec))
  with pytest.raises(ValueError, match="dispatch_x"):
    jax.eval_shape(apart((2, 4), settings, recipe="v3"), PARAMS, X, DY)


@pytest.mark.parametrize("changes", [
    {"recipe": "per_tensor_current"}, {"recipe": "per_tensor_delayed"},
    {"recipe": "block_gradients"}, {"recipe": "bf16"}])
def test_every_recipe_passes_the_check(changes):
  """Law: traces under check_vma=True, in both kinds of buffers."""
  for factor in (0.0, 0.5):
    y, dx, _, _ = jax.eval_shape(apart((2, 4), Settings(factor=factor), **changes), PARAMS, X, DY)
    assert y.shape == dx.shape == SHAPE


def messages(jaxpr):
  """All-to-alls of a traced program, but those of further rounds."""
  found = 0
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == "while":
      continue
    found += eqn.primitive.name == "all_to_all"
    for value in eqn.params.values():
      for inner in value if isinstance(value, (tuple, list)) else (value,):
        inner = getattr(inner, "jaxpr", inner)
        found += messages(inner) if hasattr(inner, "eqns") else 0
  return found


@pytest.mark.parametrize("changes", [{}, {"recipe": "v3"}])
@pytest.mark.parametrize("factor", [0.0, 0.5])
def test_the_reports_remat_sends_nothing_twice(changes, factor):
  """Oracle: by hand; two hops, each with a plan, and a message each way, forward and backward."""
  call = moe.MoECall(axes=AXES, recipe=resolve(**changes), expert=Settings(factor=factor))

  def run(params, x, dy):
    def step(layer, x, _):
      return x + layer(x, call)[0], None  # as in a block

    def forward(params, x):
      layer = nnx.merge(GRAPHDEF, params, BUFFERS)
      return remat.wrap_step(step, "report")(layer, x, None)[0]

    params = jax.tree.map(lambda p: vma.match(p, x), params)
    return jax.vjp(forward, params, x)[1](dy)[1]

  mapped = jax.shard_map(run, mesh=mesh_of((2, 4)), in_specs=(SPECS, CUT, CUT), out_specs=CUT)
  found = messages(jax.make_jaxpr(mapped)(PARAMS, X, DY).jaxpr)
  assert found == 2 * (1 + 2 + 2 + 1)  # plan; forward; backward; gradients of routing weights
