"""State of a program that is worked on in place by one of several branches."""

import collections
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core

from dsv3_jax.parallel.program import Array

State = dict[tuple, jax.Array]  # (what,) or (what, number) -> array


class Pool:
  """Arrays that make room for one of several lists of arrays at a time: as many of each type as the
  list that has most of that type."""

  def __init__(self, lists: Mapping[Hashable, Sequence[Array]]):
    most = collections.Counter()
    for arrays in lists.values():
      most |= collections.Counter(arrays)
    self.arrays = list(most.elements())
    self._places: dict[Hashable, list[int]] = {}
    for key, arrays in lists.items():
      free = {a: iter([k for k, b in enumerate(self.arrays) if a == b]) for a in set(arrays)}
      self._places[key] = [next(free[a]) for a in arrays]

  def places(self, key: Hashable) -> list[int]:
    """Where in `arrays` each array of a list has its place."""
    return self._places[key]


def at(tree: Any, index: Any) -> Any:
  """Entry `index` of all leaves' first axis."""
  return jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, index, 0, keepdims=False), tree)


def put(array: jax.Array, index: Any, value: jax.Array) -> jax.Array:
  """`array` with `value` for its entry `index`."""
  return lax.dynamic_update_index_in_dim(array, value.astype(array.dtype), index, 0)


def join(maximum: bool, total: jax.Array, value: jax.Array) -> jax.Array:
  """A total with one value more: the sum, or the maximum."""
  return (jnp.maximum if maximum else jnp.add)(total, value.astype(total.dtype))


def where(wanted: jax.Array, branch: Callable[[State, Any], State], state: State, given: Any,
          first: Any = ()) -> State:
  """`state`, where wanted with the entries that branch(state, given) returns in place of its own.

  A loop of no or one turn. It works on its state where that lies, while a conditional of XLA's
  copies what goes in and out. The barrier makes all that the branch reads differ from turn to turn,
  as far as the compiler knows; it would do the work in front of the loop otherwise, wanted or not.

  Args:
    branch: reads only those entries of `state` that it returns.
    given: what else it reads.
    first: those leaves of `given` that are to be made before the branch, read by it or not: it
      writes over what they are made of.
  """
  traced, shapes = jax.make_jaxpr(branch, return_shape=True)(state, given)
  tree = jax.tree.structure(shapes)
  used = {v for eqn in traced.jaxpr.eqns for v in eqn.invars if not isinstance(v, core.Literal)}
  given = jax.tree.leaves(given)
  first = {id(a) for a in jax.tree.leaves(first)}
  read = [v in used or id(a) in first
          for v, a in zip(traced.jaxpr.invars[len(state):], given, strict=True)]

  def turn(carry):
    left, part = carry
    left, seen = lax.optimization_barrier((left, [a for a, r in zip(given, read) if r]))
    seen = iter(seen)
    args = [next(seen) if r else a for a, r in zip(given, read)]
    made = core.jaxpr_as_fun(traced)(*jax.tree.leaves(state | part), *args)
    return left - 1, jax.tree.unflatten(tree, made)

  part = {name: state[name] for name in shapes}
  times = wanted.astype(jnp.int32)
  return state | lax.while_loop(lambda carry: carry[0] > 0, turn, (times, part))[1]
