"""The model cut into stages: which layers where, and what the parts of a stage cost."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from dsv3_jax import config
from dsv3_jax.model import cut, stages
from dsv3_jax.model import loss as loss_lib
from dsv3_jax.model.cut import Kind
from dsv3_jax.parallel import mesh as mesh_lib
from dsv3_jax.parallel import placement, sharding
from dsv3_jax.parallel.schedules import make
from dsv3_jax.parallel.split import split
from dsv3_jax.train import state
from tests.model import small
from tests.parallel.flops import flops


def test_cut():
  """Oracle: by hand; an MTP module counts as a layer of the last stage."""
  cfg = config.replace(small.BASE, layers=7, dense_layers=3)  # and one MTP module
  assert cut.cut(cfg, 4) == (
      Kind(2, 0, False), Kind(1, 1, False), Kind(0, 2, False), Kind(0, 1, True))
  assert cut.cut(cfg, 3, (4, 0, 3)) == (
      Kind(3, 1, False), Kind(0, 0, False), Kind(0, 3, True))
  deep = config.replace(cfg, mtp_depth=4)  # 11 over 4 stages: the last has nothing but MTP
  assert [k.dense + k.moe for k in cut.cut(deep, 4)] == [3, 3, 1, 0]
  for layers in ((3, 3), (4, 4, -1), (2, 2, 2)):
    with pytest.raises(ValueError, match="add up to the model's 7 layers"):
      cut.cut(cfg, 3, layers)


@pytest.mark.parametrize("name, ranks, zero", [
    ("1f1b", 3, False), ("dualpipe", 2, True), ("dualpipe_v", 2, True), ("dualpipe_v", 2, False)])
def test_take_put(name, ranks, zero):
  """Law: layers put back are the layers taken, once for each rank that holds them and each device
  that adds to the sum; every stage has its own layers in its slots."""
  cfg = config.replace(small.BASE, layers=5, dense_layers=2)
  plan = make(name, ranks, 8)
  kinds = cut.cut(cfg, plan.stages)
  where = stages.slots(kinds, plan.routes)
  mesh = mesh_lib.make_mesh(config.Mesh(pipe=ranks, data=2))
  values = lambda *shape: jnp.arange(np.prod(shape), dtype=jnp.float32).reshape(shape)
  stacks = {"dense": {"w_DF": values(2, 12, 3), "gain_D": values(2, 5)}, "moe": values(3, 4)}
  homes = placement.places(stacks, mesh, zero=zero)
  assert (homes["dense"]["w_DF"].spec == P(None, ("data", "pipe"), None)) == (zero and ranks == 2)
  axes = ("pipe", "data")

  def local(stacks):
    taken = stages.take(sharding.varying(stacks, axes), homes, where)
    return jax.tree.map(lambda a: a[None], taken), stages.put(taken, homes, where, axes)

  specs = placement.specs(homes)
  taken, back = jax.jit(jax.shard_map(  # not checked: what was gathered is alike over `data`
      local, mesh=mesh, in_specs=(specs,), out_specs=(P("pipe"), specs), check_vma=False))(stacks)
  copies = len(plan.routes) * 2
  jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, copies * b), back, stacks)
  for route in plan.routes:
    found = {"dense": [], "moe": []}
    for kind, (rank, chunk) in zip(kinds, route, strict=True):
      for stack, layers in found.items():
        layers += [jax.tree.map(lambda a, r=rank, c=chunk: a[r, c], taken[stack][n])
                   for n in range(getattr(kind, stack))]
    jax.tree.map(np.testing.assert_array_equal, stacks,
                 {stack: jax.tree.map(lambda *a: jnp.stack(a), *layers)
                  for stack, layers in found.items()})


@pytest.mark.parametrize("remat", ["none", "layer"])
def test_flops(remat):
  """Law: the matmuls of all stages' F, I and W are those of the sequential gradient; none is run
  again but where a remat policy says so, and the weights' are all in W. Nothing of a head's size is
  kept for the backward."""
  cfg = small.BASE  # a dense layer, two MoE layers, MTP
  runtime = config.replace(small.RUNTIME, remat=remat, attention="reference", gemm="reference",
                           layer_unroll=0)
  graphdef, params, buffers = state.split(small.build(cfg))
  data = {"tokens": jnp.zeros((2, 9), jnp.int32)}
  given = dict(mtp_weight=0.3, denominator=16.0, share=1.0)

  def sequential(params):
    model = nnx.merge(graphdef, params, buffers)
    return loss_lib.loss_fn(model, data, loss=small.WEIGHTS, runtime=runtime, **given)

  expected = flops(jax.make_jaxpr(jax.grad(sequential, has_aux=True))(params))
  kinds = cut.cut(cfg, 4)
  assert kinds[-1] == Kind(0, 0, True)  # MTP and losses alone
  plan = make("1f1b", 4, 4)
  where = stages.slots(kinds, plan.routes)
  total = np.zeros(3)

  def measure(params, buffers):
    mtp = {"buffers": buffers["mtp"], "prepared": None}
    parts = stages.Stages(cfg, small.WEIGHTS, runtime, slots=1, mtp=mtp, **given)
    shared = stages.shared(params)
    x_BTD = parts.enter(shared, data)
    for stage, kind in enumerate(kinds):
      def layers(tree, stage=stage):
        return {stack: tuple(jax.tree.map(lambda rows, n=n: rows[max(n, 0)], tree.get(stack, {}))
                             for n in numbers[:, stage, 0]) for stack, numbers in where.items()}

      own = {"params": layers(params), "amax": {}}
      fixed = {"buffers": layers(buffers), "prepared": None}
      function = parts.functions(kinds)[kind]

      def of(weights, fixed, data, x, function=function):
        result = function(*weights, fixed, data, x)
        return (result.y, result.objective), (result.stats, result.early)

      always = (own, shared), fixed, data
      one = split(of, *always, x_BTD)
      i, w, c = ([a.zeros() for a in b] for b in (one.keeps_i, one.keeps_w, one.crossing))
      assert (cfg.dim, cfg.vocab_size) not in {a.shape for a in (*i, *w, *c)}
      total[:] += (count(one.forward, *always, x_BTD),
                   count(one.backward_input, *always, i, w, x_BTD),
                   count(one.backward_weights, *always, w, c))

  count = lambda f, *a: flops(jax.make_jaxpr(f)(*a))
  jax.eval_shape(measure, params, buffers)  # traced as a whole, so that nothing runs
  assert total.sum() == expected
  assert 0.6 < total[2] / total[0] < 1  # attention has no weights, and F makes the head's gradient
