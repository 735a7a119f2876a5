"""A computation's operations in an order in which matmuls hide its all-to-alls.

XLA issues an all-to-all, goes on with what can do without its result, and waits for that as late
as it can. But what it does when is its own guess, and leaves some all-to-alls nothing to hide
behind: where the forward pass of one micro-batch and the backward pass of another stand in one
straight line, half of one comes before all exchanges of both. So what travels behind what is
decided here, by playing it through on a device that does one matmul at a time while one all-to-all
travels:

    an operation is done as soon as its inputs are there; of several matmuls the one from which
    the way to the end is longest; a matmul takes 1, an all-to-all TRAVEL, anything else nothing

Gradients of weights, which nothing waits for, so fill what would be gaps. XLA is told by
dependencies: the matmuls that were done while an all-to-all travelled wait for its operand, and
who reads its result waits for them (`lax.optimization_barrier`, which XLA drops once the order
stands). All else stays XLA's choice, and a plain scheduler of its keeps to it (`compiler.py`).
"""

import functools
import heapq
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import jax
from jax import lax

from dsv3_jax.parallel.program import Program, Step, numbers

TRAVEL = 2  # matmuls: one to spare where XLA does the other in another way, or elsewhere
_EXCHANGES = frozenset({"all_to_all", "ragged_all_to_all"})
_MATMULS = frozenset({"conv_general_dilated", "ragged_dot", "ragged_dot_general", "pallas_call",
                      "ffi_call"})


def interleaved(function: Callable, in_order: bool = False, travel: int = TRAVEL) -> Callable:
  """The same function of arrays; loops and conditionals in it count as one operation each.

  Args:
    function: of arrays.
    in_order: of several matmuls the one that was written first is done, whatever comes after it.
      Two chains that are alike stay out of step then: one computes while the other travels.
    travel: how many matmuls an all-to-all takes.
  """

  @functools.wraps(function)
  def call(*args):
    program = Program(function, *args)
    steps = {i: program.steps[i] for i in sorted(program.needed(program.outputs))}
    values = program.constants | dict(zip(program.inputs, jax.tree.leaves(args), strict=True))
    _run(steps, values, in_order, travel)
    return jax.tree.unflatten(program.tree, program.run((), values, program.outputs))

  return call


def _run(steps: Mapping[int, Step], values: dict[int, Any], in_order: bool, travel: int) -> None:
  """Does the steps, as planned, with the values."""
  maker = {a: i for i, step in steps.items() for a in step.outputs}
  made_of = {i: [a for a in numbers(step.inputs) if a in maker] for i, step in steps.items()}
  order, behind = plan({i: _kind(step) for i, step in steps.items()},
                       {i: {maker[a] for a in read} for i, read in made_of.items()}, in_order,
                       travel)
  wait_for: dict[int, list[int]] = {}
  for exchange, matmuls in behind.items():
    for matmul in matmuls:
      wait_for.setdefault(matmul, []).append(exchange)
  operands, results = {}, {}
  for i, arrives in order:
    step = steps[i]
    if arrives:
      first = step.outputs[0]
      values[first] = _after(values[first], [results[m] for m in behind[i]])
      continue
    given = {}
    if i in behind:  # one array for the exchange and for those who wait; XLA might make it twice
      first = step.inputs[0]
      operands[i] = lax.optimization_barrier(values[first])
      given = {first: operands[i]}
    if i in wait_for:  # all inputs; XLA might make one matmul of two that read the same
      others = [operands[e] for e in wait_for[i]]
      given = {a: _after(values[a], others) for a in made_of[i]}
    made = step.do(values | given)
    if i in wait_for:  # one array for all readers; XLA might make it again in fp32 for some
      results[i] = lax.optimization_barrier(made[0])
      made = [results[i], *made[1:]]
    values.update(zip(step.outputs, made, strict=True))


def _after(value: jax.Array, others: Sequence[jax.Array]) -> jax.Array:
  """`value`, to be read once the others are there."""
  return lax.optimization_barrier((value, *others))[0] if others else value


def _kind(step: Step) -> str:
  if step.eqn.primitive.name in _EXCHANGES:
    return "exchange"
  return "matmul" if _multiplies(step.eqn) else ""


def _multiplies(eqn: Any) -> bool:
  """Whether it is a matmul, and not a product with a vector or number, which XLA does otherwise."""
  if eqn.primitive.name == "dot_general":
    contracted, batch = eqn.params["dimension_numbers"]
    size = lambda k, dims: math.prod(eqn.invars[k].aval.shape[d] for d in dims)
    deep = size(0, contracted[0])
    return min(deep, *(eqn.invars[k].aval.size // (deep * size(k, batch[k])) for k in (0, 1))) > 1
  if eqn.primitive.name in _MATMULS:
    return True
  inner = [j for v in eqn.params.values() for j in (v if isinstance(v, (tuple, list)) else (v,))]
  return any(_multiplies(e) for j in inner for e in getattr(getattr(j, "jaxpr", j), "eqns", ()))


def plan(kinds: Mapping[Hashable, str], reads: Mapping[Hashable, set[Hashable]],
         in_order: bool = False, travel: int = TRAVEL
         ) -> tuple[list[tuple[Hashable, bool]], dict[Hashable, list[Hashable]]]:
  """Plays the operations through.

  Args:
    kinds: operation -> "exchange", "matmul" or "", in an order in which they could be done.
    reads: operation -> those that it reads.
    in_order, travel: see `interleaved`.

  Returns:
    Operations in the order of their beginnings, each with False, and exchanges a second time with
    True where their results arrive; exchange -> matmuls that it travels behind.
  """
  readers: dict[Hashable, list[Hashable]] = {node: [] for node in kinds}
  for node, made in reads.items():
    for other in made:
      readers[other].append(node)
  cost = {"exchange": travel, "matmul": 1, "": 0}
  way: dict[Hashable, int] = {}
  for node in reversed(kinds):
    way[node] = cost[kinds[node]] + max((way[r] for r in readers[node]), default=0)
  urgency = {node: (k if in_order else -way[node], k) for k, node in enumerate(kinds)}
  missing = {node: len(made) for node, made in reads.items()}
  order, behind, flying, matmuls = [], {}, [], []
  ready = [node for node in reversed(kinds) if not missing[node]]
  now = free = 0

  def finish(node):
    for reader in readers[node]:
      missing[reader] -= 1
      if not missing[reader]:
        ready.append(reader)

  def begin():
    """All that can begin at once but matmuls."""
    nonlocal free
    exchanges = []
    while ready:
      node = ready.pop()
      if kinds[node]:
        heapq.heappush(matmuls if kinds[node] == "matmul" else exchanges, (urgency[node], node))
      else:
        order.append((node, False))
        finish(node)
    for _, node in sorted(exchanges):
      start = max(free, now)
      free = start + travel
      flying.append((start, free, node))
      behind[node] = []
      order.append((node, False))

  begin()
  while matmuls or flying:
    done = []
    if matmuls:
      node = heapq.heappop(matmuls)[1]
      order.append((node, False))
      for start, _, exchange in flying:
        if start <= now:
          behind[exchange].append(node)
      done.append(node)
      now += 1
    else:
      now = max(now, flying[0][1])
    while flying and flying[0][1] <= now:
      exchange = flying.pop(0)[2]
      order.append((exchange, True))
      done.append(exchange)
    for node in done:
      finish(node)
    begin()
  assert len(order) == len(kinds) + len(behind), "operations that wait for each other"
  return order, behind
