"""Matmuls that all-to-alls travel behind: the plan, and that results stay what they are."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from dsv3_jax.analysis import hlo, overlap
from dsv3_jax.parallel import compiler, interleave
from dsv3_jax.parallel.program import Program
from pallas_kernels.aot import toolchain, topology
from tests import quick


def graph(text):
  """ "a3 b1a3": operation b1 reads a3. x: exchange, m: matmul, else neither; two characters each"""
  kinds, reads = {}, {}
  for word in text.split():
    node, *inputs = [word[k:k + 2] for k in range(0, len(word), 2)]
    kinds[node] = {"x": "exchange", "m": "matmul"}.get(node[0], "")
    reads[node] = set(inputs)
  return kinds, reads


@pytest.mark.parametrize("text, behind", [
    # Alone, an exchange waits; what follows it cannot hide it, what is apart can.
    ("m1 x1m1 m2x1", {"x1": ""}),
    ("m1 x1m1 m2x1 m3", {"x1": "m3"}),
    # Two chains, the longer one first: each computes while the other's exchange travels.
    ("m1 x1m1 m2x1 m3 m4m3 x2m4 m5x2 m6m5", {"x1": "m5 m6", "x2": "m1"}),
    # What nothing waits for (m5, m6) is kept until there is a gap.
    ("m1 m5 m6 x1m1 m2x1 m3m2", {"x1": "m5 m6"}),
    # Order: m2 (4 to the end), m1 (3), then m3. One exchange travels at a time.
    ("m1 x1m1 x2m1 m2 m3m2 m4m3 m5m4 e1x1x2", {"x1": "m3 m4", "x2": "m5"})])
def test_plan(text, behind):
  """Oracle: by hand."""
  kinds, reads = graph(text)
  order, found = interleave.plan(kinds, reads)
  assert {x: " ".join(ms) for x, ms in found.items()} == behind
  check(kinds, reads, order, found)


def test_two_alike():
  """Oracle: by hand: micro-batches a and b of two layers, each a matmul, an exchange, a matmul and
  an exchange. In the order in which they were written, each computes while the other travels, but
  for the last exchange; the longest way first would do both first matmuls before any exchange."""
  layer = "m{0}{1} x{0}m{0} m{2}x{0} x{1}m{2}"
  text = " ".join(layer.replace("m{0}{1}", "m{0}" if first else "m{0}x{3}").format(*names)
                  for first, names in ((1, "ab1"), (1, "cd2"), (0, "ef3b"), (0, "gh4d")))
  kinds, reads = graph(text)
  _, found = interleave.plan(kinds, reads, in_order=True, travel=1)
  assert {x for x, matmuls in found.items() if not matmuls} == {"xh"}
  assert found["xa"] == ["mc"] and found["xc"] == ["m1"] and found["xb"] == ["m2"]
  _, guessed = interleave.plan(kinds, reads, travel=1)
  assert sum(not matmuls for matmuls in guessed.values()) >= 1


def check(kinds, reads, order, behind):
  """Everything once, after what it reads; matmuls between the two ends of what they hide."""
  place = {event: k for k, event in enumerate(order)}
  assert len(place) == len(order) == len(kinds) + len(behind)
  ends = lambda node: place[node, node in behind]
  assert all(ends(other) < place[node, False] for node in kinds for other in reads[node])
  assert all(place[x, False] < place[m, False] < place[x, True]
             for x, matmuls in behind.items() for m in matmuls)


def test_plan_of_anything():
  """Law, on random graphs: inputs come first, and nothing idles while a matmul could be done."""
  draw = np.random.default_rng(0)
  for _ in range(50):
    kinds, reads = {}, {}
    for node in range(40):
      kinds[node] = draw.choice(["exchange", "matmul", "matmul", ""])
      reads[node] = {int(r) for r in draw.integers(0, node, 2)} if node > 3 else set()
    order, behind = interleave.plan(kinds, reads)
    check(kinds, reads, order, behind)
    assert all(len(matmuls) <= interleave.TRAVEL for matmuls in behind.values())


@pytest.mark.parametrize("spec, shapes, expected", [
    ("mk,kn->mn", [(2, 3), (3, 4)], "matmul"), ("bmk,bkn->bmn", [(5, 2, 3), (5, 3, 4)], "matmul"),
    ("bte,bt->be", [(2, 3, 4), (2, 3)], ""), ("k,kn->n", [(3,), (3, 4)], ""),
    ("m,n->mn", [(3,), (4,)], "")])
def test_matmuls(spec, shapes, expected):
  """Oracle: named by hand; products with a vector, and of two, are no work to hide behind."""
  program = Program(functools.partial(jnp.einsum, spec), *map(jnp.zeros, shapes))
  assert [interleave._kind(s) for s in program.steps if "dot" in s.eqn.primitive.name] == [expected]


def test_results_stay():
  """Law: the function itself, with exchanges, calls, a loop, and results that are arguments."""
  mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Auto,))

  def function(tree, z):
    x, w = tree["x"], tree["w"]
    exchange = lambda a: jax.lax.all_to_all(a, "d", 0, 0, tiled=True)
    y = jnp.tanh(exchange(x @ w)) @ w
    y = exchange(jax.jit(jnp.sin)(y)) @ w
    z = jax.lax.fori_loop(0, 3, lambda _, z: z @ w, z)
    return {"y": y, "z": [z @ w, jnp.float32(2)]}, x

  draw = np.random.default_rng(1)
  normal = lambda *shape: jnp.asarray(draw.normal(size=shape) / 3, jnp.float32)
  args = {"x": normal(16, 8), "w": normal(8, 8)}, normal(16, 8)
  cut, rep = PartitionSpec("d"), PartitionSpec()

  def run(function):
    return jax.shard_map(function, mesh=mesh, in_specs=({"x": cut, "w": rep}, cut),
                         out_specs=({"y": cut, "z": [cut, rep]}, cut))

  hidden = run(interleave.interleaved(function))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
               quick.jit(hidden)(*args), quick.jit(run(function))(*args))
  assert "optimization_barrier" in str(jax.make_jaxpr(hidden)(*args))


def test_compiler_options_are_known():
  """Law: this jax knows each option that a training step sets on GPUs."""
  for planned in (False, True):
    jax.jit(lambda x: x, compiler_options=compiler.options(planned)).lower(0.0).compile()
  with pytest.raises(Exception, match="No such compile option"):
    jax.jit(lambda x: x, compiler_options={"xla_gpu_nothing": 1}).lower(0.0).compile()


def test_compiled_for_gpus():
  """Law: in the order of the compiler all all-to-alls travel behind matmuls, which they do not
  where it has to guess. Skipped without the compiler for GPUs (`make overlap`)."""
  try:
    devices = topology.h100s()
  except toolchain.MissingError as error:
    pytest.skip(str(error))
  mesh = jax.sharding.Mesh(np.array(devices), ("d",), axis_types=(AxisType.Auto,))
  cut, rep, n = PartitionSpec("d"), PartitionSpec(), 1024

  def chain(x, w):
    for _ in range(3):
      x = jax.lax.all_to_all(jnp.tanh(x @ w), "d", 0, 0, tiled=True)
      x = jnp.tanh(jnp.tanh(x @ w) @ w)
    return x

  def pair(x, y, w):
    return chain(x, w), chain(y, w)

  def exposed(function):
    shapes = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, spec))
              for shape, spec in (((8 * n, n), cut), ((8 * n, n), cut), ((n, n), rep))]
    mapped = jax.shard_map(function, mesh=mesh, in_specs=(cut, cut, rep), out_specs=cut)
    lowered = compiler.jit(mapped, mesh, True).trace(*shapes).lower(
        lowering_platforms=("cuda",))
    order, = overlap.orders(hlo.parse(lowered.compile(topology.OPTIONS).as_text()))
    assert len(order.exchanges) == 6, str(order)
    return len(order.exposed)

  assert exposed(interleave.interleaved(pair)) == 0
  assert exposed(pair)
