"""The executor on a chain of small layers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.analysis import hlo
from dsv3_jax.parallel.schedules import forward, make
from tests import quick
from tests.parallel import chain, flops


@functools.cache
def expected(stages, microbatches):
  own, shared = chain.weights(stages)
  fixed_S = jnp.linspace(1, 2, stages)

  def total(own, shared):
    objectives, sums = jax.vmap(chain.reference, (None, None, None, 0))(
        own, shared, fixed_S, chain.batch(microbatches))
    return objectives.sum(), sums.sum(0)

  (objective, sums_S), grads = quick.jit(jax.value_and_grad(total, (0, 1), has_aux=True))(
      own, shared)
  return objective, *grads, sums_S


@pytest.mark.parametrize("name, ranks, microbatches, unit", [
    ("gpipe", 4, 5, False), ("1f1b", 4, 5, True), ("1f1b", 2, 3, False), ("zb1p", 4, 7, False),
    ("zb1p", 1, 2, False), ("dualpipe", 2, 6, False), ("dualpipe", 4, 10, False),
    ("dualpipe_v", 1, 3, False), ("dualpipe_v", 2, 5, False), ("dualpipe_v", 4, 9, False)])
def test_gradients(name, ranks, microbatches, unit):
  """Oracle: jax.grad of the chain on one device."""
  plan = make(name, ranks, microbatches)
  own, shared = chain.weights(plan.stages)
  found = chain.gradients(plan, own, shared, jnp.linspace(1, 2, plan.stages),
                          chain.batch(microbatches), unit)
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected(plan.stages, microbatches)),
                  strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())


@pytest.mark.parametrize("name, ranks, microbatches, ticks", [
    ("1f1b", 4, 5, 8), ("dualpipe", 4, 8, 10), ("dualpipe_v", 2, 5, 12)])
def test_forward(name, ranks, microbatches, ticks):
  """Oracle: objective and statistics of the chain on one device; nothing is kept or made for a
  backward pass; no rank waits in the middle: its units, and the ticks to fill and drain."""
  plan = forward(make(name, ranks, microbatches))
  assert len(plan.ticks().rows) == ticks
  plan.ticks().validate()
  table = plan.ticks().tables(["middle"] * (plan.stages - 1) + ["last"])
  assert {o.kind for o in table.opcodes} == {None, "F"}
  assert [table.slots[b] for b in "iwc"] == [0, 0, 0]
  own, shared = chain.weights(plan.stages)
  objective, none, _, sums_S = chain.gradients(
      plan, own, shared, jnp.linspace(1, 2, plan.stages), chain.batch(microbatches))
  assert none == {}
  want = expected(plan.stages, microbatches)
  np.testing.assert_allclose(objective, want[0], rtol=1e-5)
  np.testing.assert_allclose(sums_S, want[-1], rtol=1e-5, atol=1e-5)


@jax.custom_vjp
def watch(x, amax):
  """x; the "gradient" of `amax` [2] are the magnitudes of x and of its gradient."""
  return x


watch.defvjp(lambda x, amax: (x, jnp.abs(x).max()),
             lambda largest, g: (g, jnp.stack([largest, jnp.abs(g).max()])))


@pytest.mark.parametrize("name", ["zb1p", "dualpipe_v"])
def test_maxima(name):
  """Oracle: the largest magnitudes over micro-batches, of each of them on one device."""
  plan = make(name, 2, 5)
  own, shared = chain.weights(plan.stages)
  own["amax_2"], shared["amax_2"] = jnp.zeros((plan.stages, 2)), jnp.zeros(2)
  fixed_S, data = jnp.linspace(1, 2, plan.stages), chain.batch(5)

  def middle(own, shared, fixed, data, x):
    return chain.middle(own, shared, fixed, data, watch(watch(x, own["amax_2"]), shared["amax_2"]))

  found = chain.gradients(plan, own, shared, fixed_S, data, middle=middle,
                          maxima=({name: name == "amax_2" for name in own},
                                  {name: name == "amax_2" for name in shared}))

  def total(own, shared, micro):
    x = chain.enter(shared, micro)
    objective = 0.0
    for s in range(plan.stages):
      stage = chain.last if s == plan.stages - 1 else middle
      result = stage(jax.tree.map(lambda a, s=s: a[s], own), shared, fixed_S[s], micro, x)
      x, objective = result.y, objective + result.objective
    return objective

  grads = quick.jit(jax.vmap(jax.grad(total, (0, 1)), (None, None, 0)))(own, shared, data)
  for k, tree in enumerate(grads):
    for name, each_M in tree.items():
      if name == "amax_2":  # the shared one sees what all of the others see
        expected = grads[0][name].max(0) if k == 0 else grads[0][name].max((0, 1))
      else:
        expected = each_M.sum(0)
      np.testing.assert_allclose(found[1 + k][name], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["zb1p", "dualpipe_v"])
def test_program_does_not_grow(name):
  """Law: the program has the same operations for any number of micro-batches."""
  def lines(microbatches):
    plan = make(name, 4, microbatches)
    own, shared = chain.weights(plan.stages)
    lower = lambda f: lambda *args: jax.jit(f).lower(*args).as_text().count("\n")
    return chain.gradients(plan, own, shared, jnp.ones(plan.stages), chain.batch(microbatches),
                           wrap=lower)

  assert lines(8) == lines(40)


@pytest.mark.parametrize("name, unit", [
    ("gpipe", False), ("zb1p", True), ("dualpipe", False), ("dualpipe_v", False)])
def test_flops(name, unit):
  """Oracle: the matmuls of jax.grad, once for each micro-batch; branches as often as the tables
  ask for them. The parts of a backward pass add up to it."""
  plan = make(name, 2, 4)
  own, shared = chain.weights(plan.stages)
  fixed_S, data = jnp.ones(plan.stages), chain.batch(4)
  traced = chain.gradients(plan, own, shared, fixed_S, data, unit,
                           wrap=lambda f: lambda *args: jax.make_jaxpr(f)(*args))
  types = ["middle"] * (plan.stages - 1) + ["last"]
  table = plan.ticks(unit).tables(types)
  each = [flops.flops(eqn.params["body_jaxpr"]) for eqn in flops.loops(traced)
          if eqn.primitive.name == "while"]
  of = dict(zip((o for o in table.opcodes if o.kind), each, strict=True))
  times = np.bincount(table.columns["op"].ravel(), minlength=len(table.opcodes))
  total = sum(n * of[o] for n, o in zip(times, table.opcodes, strict=True) if o.kind)
  micro = jax.tree.map(lambda a: a[0], data)
  alone = jax.make_jaxpr(jax.grad(lambda *w: chain.reference(*w, fixed_S, micro)[0], (0, 1)))
  assert total == 4 * flops.flops(alone(own, shared))
  for role in {o.backward for o in of if o.kind == "B"} & {o.backward for o in of if o.kind == "W"}:
    assert of["B", None, role] == of["I", None, role] + of["W", None, role]


@pytest.mark.parametrize("name", ["zb1p", "dualpipe_v"])
def test_in_place(name):
  """Law: in the compiled program no tick copies a buffer of slots, nor a sum of gradients, and no
  matmul stands outside of the branches."""
  plan = make(name, 2, 8)
  own, shared = chain.weights(plan.stages)
  compiled = lambda f: lambda *args: hlo.parse(quick.jit(f).lower(*args).compile().as_text())
  program = chain.gradients(plan, own, shared, jnp.ones(plan.stages), chain.batch(8),
                            wrap=compiled)
  slots = plan.ticks().tables().slots
  buffers = {f"f32[{n},{chain.B},{chain.D}]" for n in slots.values()}
  sums = {f"f32[{plan.chunks},{chain.D},{chain.D}]", f"f32[{chain.D},{chain.V}]"}
  copied = {i.result.partition("{")[0] for name, instructions in program.computations.items()
            if name != program.entry for i in instructions if i.opcode == "copy"}
  written = {i.result.partition("{")[0] for instructions in program.computations.values()
             for i in instructions}
  assert buffers | sums <= written  # they are called that
  assert not copied & (buffers | sums)
  tick, = (instructions for instructions in program.computations.values()
           if any(i.opcode.startswith("collective-permute") for i in instructions))
  inside = [i for instruction in tick if instruction.opcode == "fusion"
            for name in instruction.calls for i in program.computations[name]]
  assert "while" in {i.opcode for i in tick}
  assert "dot" not in {i.opcode for i in (*tick, *inside)}


def test_errors():
  """Oracle: messages; a mesh of another size, and a stage that changes what passes through."""
  own, shared = chain.weights(4)
  run = lambda ranks, made: chain.gradients(
      make("gpipe", 4, 2), own, shared, jnp.ones(4), chain.batch(2), ranks=ranks, middle=made,
      wrap=lambda f: functools.partial(jax.eval_shape, f))
  with pytest.raises(ValueError, match="tables are for 4 ranks, and mesh axis 'pipe' has 2"):
    run(2, chain.middle)
  wider = lambda *args: chain.middle(*args)._replace(y=jnp.ones((2, 9)))
  with pytest.raises(ValueError, match=r"makes float32\[2, 9\] of float32\[2, 8\]"):
    run(4, wider)
