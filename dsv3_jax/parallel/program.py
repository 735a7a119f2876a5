"""A function as a list of operations that can be done apart, in another order, or not at all."""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import jit
from jax.extend import core

from dsv3_jax.parallel import sharding

_CALLS = {"jit": "jaxpr", "pjit": "jaxpr", "closed_call": "call_jaxpr", "core_call": "call_jaxpr",
          "checkpoint": "jaxpr", "remat": "jaxpr", "remat2": "jaxpr",
          "custom_jvp_call": "call_jaxpr", "custom_vjp_call": "call_jaxpr"}

Atom = Any  # the number of a value, or a core.Literal


class Array(NamedTuple):
  """What must be known to make room for an array: shape, dtype, mesh axes that it varies over."""

  shape: tuple[int, ...]
  dtype: Any
  axes: tuple[str, ...]

  def zeros(self, *lead: int) -> jax.Array:
    return sharding.varying(jnp.zeros((*lead, *self.shape), self.dtype), self.axes)


def array(aval: Any) -> Array:
  """From an array or its type."""
  varies = aval.vma if hasattr(aval, "vma") else getattr(getattr(aval, "mat", None), "varying", ())
  return Array(tuple(aval.shape), aval.dtype, tuple(sorted(varies)))


class Step(NamedTuple):
  """An operation: its equation, the values that it reads and makes, and the scopes it stands in."""

  eqn: core.JaxprEqn
  inputs: tuple[Atom, ...]
  outputs: tuple[int, ...]
  scope: str

  def do(self, values: Mapping[int, Any]) -> list[Any]:
    """The operation's results from the values of its inputs."""
    inputs = [a.val if isinstance(a, core.Literal) else values[a] for a in self.inputs]
    primitive = self.eqn.primitive
    with self.eqn.ctx.manager, jax.named_scope(self.scope):
      found = primitive.bind(*inputs, **primitive.get_bind_params(self.eqn.params))
    return found if primitive.multiple_results else [found]


class Program:
  """A function's operations in a row, calls within it opened, values numbered.

  Attributes:
    steps: the operations.
    constants: values by number: what the function closes over.
    types: of all values.
    inputs, outputs: numbers of arguments and results, as leaves.
    tree: structure of the result.
  """

  def __init__(self, function: Callable, *args):
    closed, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
    self.steps: list[Step] = []
    self.constants: dict[int, Any] = {}
    self.types: dict[int, Array] = {}
    self._numbers = itertools.count()
    self.inputs = [self._new(v) for v in closed.jaxpr.invars]
    constants = [self._new(v) for v in closed.jaxpr.constvars]
    self.constants = dict(zip(constants, closed.consts, strict=True))
    self.outputs = self._open(closed.jaxpr, constants, self.inputs, "")
    self.tree = jax.tree.structure(shapes)

  def _new(self, variable) -> int:
    number = next(self._numbers)
    self.types[number] = array(variable.aval)
    return number

  def _open(self, jaxpr, constants: Sequence[Atom], args: Sequence[Atom], scope: str
            ) -> list[Atom]:
    names = dict(zip(jaxpr.constvars, constants, strict=True))
    names |= dict(zip(jaxpr.invars, args, strict=True))
    read = lambda v: v if isinstance(v, core.Literal) else names[v]
    for eqn in jaxpr.eqns:
      inputs = [read(v) for v in eqn.invars]
      within = "/".join(filter(None, (scope, str(eqn.source_info.name_stack))))
      inner = eqn.params.get(_CALLS.get(eqn.primitive.name))
      if inner is None:
        outputs = [self._new(v) for v in eqn.outvars]
        self.steps.append(Step(eqn, tuple(inputs), tuple(outputs), within))
      else:
        held = []
        for value in getattr(inner, "consts", ()):
          held.append(next(self._numbers))
          self.constants[held[-1]], self.types[held[-1]] = value, array(jax.typeof(value))
        outputs = self._open(getattr(inner, "jaxpr", inner), held, inputs, within)
      names |= dict(zip(eqn.outvars, outputs, strict=True))
    return [read(v) for v in jaxpr.outvars]

  def needed(self, outputs: Iterable[Atom]) -> set[int]:
    """Indices of the steps that `outputs` come from."""
    wanted, found = set(numbers(outputs)), set()
    for i in reversed(range(len(self.steps))):
      if wanted.intersection(self.steps[i].outputs):
        found.add(i)
        wanted.update(numbers(self.steps[i].inputs))
    return found

  def run(self, steps: Iterable[int], values: Mapping[int, Any], outputs: Sequence[Atom]
          ) -> list[Any]:
    """Does the steps, in the order of the program, from `values` by their numbers."""
    values = self.constants | values
    for i in sorted(steps):
      values |= zip(self.steps[i].outputs, self.steps[i].do(values))
    return [a.val if isinstance(a, core.Literal) else values[a] for a in outputs]

  def part(self, steps: Iterable[int], outputs: Sequence[Atom]
           ) -> Callable[[Mapping[int, Any]], list[Any]]:
    """`run` as a function of the values, traced once however often it is called."""
    steps = sorted(steps)
    made = {a for i in steps for a in self.steps[i].outputs} | self.constants.keys()
    read = dict.fromkeys(a for i in steps for a in numbers(self.steps[i].inputs))
    read = [a for a in read | dict.fromkeys(numbers(outputs)) if a not in made]
    traced = jit(lambda *given: self.run(steps, dict(zip(read, given)), outputs))
    return lambda values: traced(*(values[a] for a in read))


def numbers(atoms: Iterable[Atom]) -> list[int]:
  """Those that are values of the program."""
  return [a for a in atoms if not isinstance(a, core.Literal)]


def reads(function: Callable, *args) -> list[bool]:
  """Which leaves of the arguments the function's results come from."""
  program = Program(function, *args)
  found = set(numbers(program.outputs))
  for i in program.needed(program.outputs):
    found.update(numbers(program.steps[i].inputs))
  return [a in found for a in program.inputs]
