"""The model cut into stages: which layers where, and what the parts of a stage cost."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsv3_jax import config
from dsv3_jax.model import loss as loss_lib
from dsv3_jax.model import stages
from dsv3_jax.model.stages import Kind
from dsv3_jax.parallel.schedules import make
from dsv3_jax.parallel.split import split
from dsv3_jax.train import state
from tests.model import small
from tests.parallel.flops import flops


def test_cut():
  """Oracle: by hand; an MTP module counts as a layer of the last stage."""
  cfg = config.replace(small.BASE, layers=7, dense_layers=3)  # and one MTP module
  assert stages.cut(cfg, 4) == (
      Kind(2, 0, False), Kind(1, 1, False), Kind(0, 2, False), Kind(0, 1, True))
  assert stages.cut(cfg, 3, (4, 0, 3)) == (
      Kind(3, 1, False), Kind(0, 0, False), Kind(0, 3, True))
  deep = config.replace(cfg, mtp_depth=4)  # 11 over 4 stages: the last has nothing but MTP
  assert [k.dense + k.moe for k in stages.cut(deep, 4)] == [3, 3, 1, 0]
  for layers in ((3, 3), (4, 4, -1), (2, 2, 2)):
    with pytest.raises(ValueError, match="add up to the model's 7 layers"):
      stages.cut(cfg, 3, layers)


@pytest.mark.parametrize("name, ranks", [("1f1b", 3), ("dualpipe", 2), ("dualpipe_v", 2)])
def test_take_put(name, ranks):
  """Law: layers put back are the layers taken, once for each rank that holds them; every stage has
  its own layers in its slots."""
  cfg = config.replace(small.BASE, layers=5, dense_layers=2)
  plan = make(name, ranks, 8)
  kinds = stages.cut(cfg, plan.stages)
  where = stages.slots(kinds, plan.routes)
  stacks = {"dense": {"a": jnp.arange(2.0), "b": jnp.ones((2, 3))}, "moe": jnp.arange(3.0) + 10}
  taken = stages.take(stacks, where)
  copies = len(plan.routes)
  jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, copies * b),
               stages.put(taken, where), stacks)
  flat = [*stacks["dense"]["a"].tolist(), *stacks["moe"].tolist()]
  for route in plan.routes:
    found = []
    for kind, (rank, chunk) in zip(kinds, route, strict=True):
      found += [float(taken["dense"][n]["a"][rank, chunk]) for n in range(kind.dense)]
      found += [float(taken["moe"][n][rank, chunk]) for n in range(kind.moe)]
    assert found == flat


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
  kinds = stages.cut(cfg, 4)
  assert kinds[-1] == Kind(0, 0, True)  # MTP and losses alone
  plan = make("1f1b", 4, 4)
  where = stages.slots(kinds, plan.routes)
  total = np.zeros(3)

  def measure(params, buffers):
    parts = stages.Stages(cfg, small.WEIGHTS, runtime, slots=1, mtp_buffers=buffers["mtp"], **given)
    shared = stages.shared(params)
    x_BTD = parts.enter(shared, data)
    for stage, kind in enumerate(kinds):
      own, fixed = (jax.tree.map(lambda a, s=stage: a[s, 0], stages.take(tree, where))
                    for tree in (params, buffers))
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
