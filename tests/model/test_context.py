"""Latent attention in FP8 over devices that share the sequences."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, PartitionSpec

from dsv3_jax import config
from dsv3_jax.fp8 import weights
from dsv3_jax.fp8.recipe import resolve
from dsv3_jax.model import mla, rope
from dsv3_jax.parallel import context
from tests.model import small
from tests.oracles.tolerance import assert_close
from tests.quick import jit

DEVICES, T = 4, 16
RUNTIME = config.replace(small.RUNTIME, recipe="v3")


def test_recipe():
  """Oracle: one device. Tiles of tokens are others, so gradients agree as FP8 rounds."""
  graphdef, params = nnx.split(mla.MLA(small.BASE, rngs=nnx.Rngs(0)))
  params = nnx.to_pure_dict(params)
  recipe, a = resolve(RUNTIME), small.BASE.attention
  rng = np.random.default_rng(0)
  x_BTD, dy_BTD = jnp.asarray(rng.normal(size=(2, 1, T, small.BASE.dim)), jnp.float32)

  def run(params, x_BTD, dy_BTD):
    axes = ("context",) if x_BTD.shape[1] < T else ()
    cut, positions_BT = context.cut(T, axes), jnp.arange(T, dtype=jnp.int32)[None]
    cos, sin = rope.rope_table(a, positions_BT if cut is None else cut.own(positions_BT))
    prepared = weights.prepare(params, recipe)

    def forward(params, x_BTD):
      m = nnx.merge(graphdef, weights.with_masters(prepared, params))
      return m(x_BTD, cos, sin, None, RUNTIME, cut)

    y_BTD, pull = jax.vjp(forward, params, x_BTD)
    return y_BTD, *pull(dy_BTD)

  def spread(params, x_BTD, dy_BTD):
    params = jax.tree.map(lambda p: jax.lax.pcast(p, ("context",), to="varying"), params)
    y_BTD, dparams, dx_BTD = run(params, x_BTD, dy_BTD)
    return y_BTD, jax.lax.psum(dparams, "context"), dx_BTD

  mesh = jax.make_mesh((DEVICES,), ("context",), axis_types=(AxisType.Auto,),
                       devices=jax.devices()[:DEVICES])
  whole, cut = PartitionSpec(), PartitionSpec(None, "context")
  several = jax.shard_map(spread, mesh=mesh, in_specs=(whole, cut, cut),
                          out_specs=(cut, whole, cut))
  y_BTD, dparams, dx_BTD = jit(run)(params, x_BTD, dy_BTD)
  order = [0, 1, 14, 15, 2, 3, 12, 13, 4, 5, 10, 11, 6, 7, 8, 9]
  got_y, got_dparams, got_dx = jit(several)(params, x_BTD[:, order], dy_BTD[:, order])
  assert_close(got_y, y_BTD[:, order])
  far = lambda a, b: float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))
  assert far(got_dx, dx_BTD[:, order]) < 0.03
  for name, gradient in dparams.items():
    assert far(got_dparams[name], gradient) < 0.06, name
