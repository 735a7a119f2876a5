"""A stage's backward pass in two: for the input, which others wait for, and for the weights.

Schedules with little bubble run the two at different times (Zero Bubble paper; report 3.2.1), and
taking `jax.vjp` twice, once for each, would repeat the chain of gradients through the stage. Here
the pass is traced once and its operations are shared out:

    forward           F   (weights, x) -> y, and what the backward needs: keeps_i and keeps_w
    backward_input    I   (keeps_i, keeps_w, dy) -> dx, the cheap gradients, and `crossing`
    backward_weights  W   (keeps_w, crossing) -> the gradients that cost a matmul

so that F + I + W are the operations of F and B, each once. An operation is in I if dx needs it. Of
the rest, a matmul (or loop, or kernel: `HEAVY`) is in W, with all that depends on it, and with the
transposes and casts that prepare its operands; gradients of norm gains stay in I, for what they are
made of is larger than they are. `crossing` is what I made and W reads. So memory falls as soon as
possible: keeps_i lives from F to I, keeps_w from F to W, crossing from I to W.

What F keeps is what `jax.vjp` asks for, hence what a `jax.checkpoint` policy in the stage leaves of
it, less what is at hand later too: weights, values made of weights alone (casts, transposes, slices
of a stack) and of the micro-batch's data alone (masks, rotary tables), which are made again.

The layers of a stage must be unrolled: a scan is one operation, and a scan over layers would be in
I whole. Loops within a layer are as a rule for dx or for dw and never both.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from dsv3_jax.parallel import sharding
from dsv3_jax.parallel.program import Array, Atom, Program, array, numbers

HEAVY = frozenset({"dot_general", "conv_general_dilated", "ragged_dot", "ragged_dot_general",
                   "pallas_call", "ffi_call", "scan", "while", "cond"})
_LAYOUT = frozenset({"transpose", "reshape", "broadcast_in_dim", "convert_element_type", "squeeze",
                     "expand_dims", "slice", "pad", "concatenate"})
_SPREAD = frozenset({"broadcast_in_dim", "convert_element_type", "pvary", "pcast"})


class Split(NamedTuple):
  """See the module docstring; keeps and crossing are lists of arrays.

  Attributes:
    forward: (weights, fixed, data, x) -> (result of the stage, keeps_i, keeps_w).
    backward_input: (weights, fixed, data, keeps_i, keeps_w, dy) -> (gradients, dx, crossing),
      gradients a list of the weights' leaves, None where they are W's or 0.
    backward_weights: (weights, fixed, data, keeps_w, crossing) -> gradients, None where I's or 0.
    keeps_i, keeps_w, crossing: their types.
  """

  forward: Callable
  backward_input: Callable
  backward_weights: Callable
  keeps_i: tuple[Array, ...]
  keeps_w: tuple[Array, ...]
  crossing: tuple[Array, ...]


def split(stage: Callable, weights: Any, fixed: Any, data: Any, x: jax.Array) -> Split:
  """Traces a stage and shares out its backward pass.

  Inside shard_map, to be called there: the arguments' varying axes count.

  Args:
    stage: (weights, fixed, data, x) -> ((y, objective), extra); `objective`, an fp32 scalar, is
      this stage's part of what is minimised, y an array or None (last stage), extra has no
      gradient.
    weights: arrays to differentiate by.
    fixed: arrays that stay the same and are not differentiated.
    data: the micro-batch's arrays.
    x: the stage's input.
  """
  pull_tree = []

  def forward(weights, fixed, data, x):
    out, pull, extra = jax.vjp(lambda w, x: stage(w, fixed, data, x), weights, x, has_aux=True)
    kept, tree = jax.tree.flatten(pull)
    pull_tree[:] = [tree]
    return (out, extra), kept

  args = (weights, fixed, data, x)
  first = Program(forward, *args)
  results, kept_tree = first.tree.children()
  kept = first.outputs[results.num_leaves:]
  counts = [len(jax.tree.leaves(a)) for a in args]
  given = _given(first, counts)
  stash = list(dict.fromkeys(  # each once
      a for a in numbers(kept) if "x" in given[a] or given[a] == {"weights", "data"}))
  again = [a for a in numbers(kept) if a not in stash]
  again_steps = first.needed(again)

  def backward(weights, fixed, data, stashed, dy):
    inputs = jax.tree.leaves((weights, fixed, data))
    values = dict(zip(first.inputs, inputs))  # but for x
    values |= zip(again, first.run(again_steps, values, again), strict=True)
    values |= zip(stash, stashed, strict=True)
    leaves = [a.val if isinstance(a, core.Literal) else values[a] for a in kept]
    pull = jax.tree.unflatten(pull_tree[0], leaves)
    one = sharding.varying(jnp.ones((), objective.dtype), array(jax.typeof(objective)).axes)
    dw, dx = pull((dy, one))
    return jax.tree.leaves(dw), dx

  out_types = [first.types[a] if not isinstance(a, core.Literal) else array(a.aval)
               for a in first.outputs[:results.num_leaves]]
  (y, objective), _ = jax.tree.unflatten(results, [t.zeros() for t in out_types])
  second = Program(backward, weights, fixed, data, [first.types[a].zeros() for a in stash], y)
  number, y_leaves = counts[0], jax.tree.leaves(y)
  second_given = _given(second, [*counts[:3], len(stash) + len(y_leaves)])
  gradients, dx = second.outputs[:number], second.outputs[number:]
  at_once, late = _partition(second, gradients, dx)
  made_late = {a for i in late for a in second.steps[i].outputs}
  zero = _zeros(second)
  wanted = [k for k, a in enumerate(gradients) if not zero(a)]
  heavy = [k for k in wanted if gradients[k] in made_late]
  light = [k for k in wanted if k not in heavy]
  read_late = {a for i in late for a in numbers(second.steps[i].inputs)}
  start = sum(counts[:3])
  stash_inputs = second.inputs[start:start + len(stash)]
  dy_inputs = second.inputs[start + len(stash):]
  # What comes of weights and data alone is made where it is read, on both sides.
  free = {i for i in at_once if "x" not in second_given[second.steps[i].outputs[0]]}
  late_steps = late | free & second.needed(a for i in late for a in second.steps[i].inputs)
  made = [a for i in sorted(at_once - free) for a in second.steps[i].outputs]
  crossing = [a for a in (*dy_inputs, *made) if a in read_late]
  in_w = [a in read_late for a in stash_inputs]

  def base(weights, fixed, data, keeps_w):
    values = dict(zip(second.inputs, jax.tree.leaves((weights, fixed, data))))
    return values | dict(zip((a for a, w in zip(stash_inputs, in_w) if w), keeps_w, strict=True))

  # Each is called in several branches, and is traced once for all of them.
  outputs = first.outputs[:results.num_leaves] + stash
  forward_part = first.part(first.needed(outputs), outputs)
  input_part = second.part(at_once, [gradients[k] for k in light] + dx + crossing)
  weights_part = second.part(late_steps, [gradients[k] for k in heavy])

  def run_forward(weights, fixed, data, x):
    found = forward_part(dict(zip(first.inputs, jax.tree.leaves((weights, fixed, data, x)),
                                  strict=True)))
    stashed = found[results.num_leaves:]
    return (jax.tree.unflatten(results, found[:results.num_leaves]),
            [a for a, w in zip(stashed, in_w) if not w], [a for a, w in zip(stashed, in_w) if w])

  def aligned(places, values):
    found = dict(zip(places, values))
    return [found.get(k) for k in range(number)]

  def backward_input(weights, fixed, data, keeps_i, keeps_w, dy):
    values = base(weights, fixed, data, keeps_w)
    values |= zip((a for a, w in zip(stash_inputs, in_w) if not w), keeps_i, strict=True)
    values |= zip(dy_inputs, [dy])  # a last stage has no y
    out = input_part(values)
    n = len(light)
    return aligned(light, out[:n]), out[n], out[n + 1:]

  def backward_weights(weights, fixed, data, keeps_w, crossed):
    values = base(weights, fixed, data, keeps_w) | dict(zip(crossing, crossed, strict=True))
    return aligned(heavy, weights_part(values))

  return Split(run_forward, backward_input, backward_weights,
               tuple(first.types[a] for a, w in zip(stash, in_w) if not w),
               tuple(first.types[a] for a, w in zip(stash, in_w) if w),
               tuple(second.types[a] for a in crossing))


def whole(stage: Callable) -> Split:
  """A stage of which the forward alone is wanted, and nothing kept."""
  return Split(lambda *args: (stage(*args), [], []), None, None, (), (), ())


def _given(program: Program, counts: Sequence[int]) -> dict[int, set[str]]:
  """Which of weights, data and x each value comes from. `counts`: leaves of
  the program's weights, fixed, data, and all that comes of x."""
  given = {a: set() for a in program.constants}
  places = itertools.chain(*([name] * n for name, n in zip(
      ("weights", "weights", "data", "x"), counts, strict=True)))
  given |= {a: {name} for a, name in zip(program.inputs, places, strict=True)}
  for step in program.steps:
    found = set().union(*(given[a] for a in numbers(step.inputs)))
    given |= dict.fromkeys(step.outputs, found)
  return given


def _zeros(program: Program) -> Callable[[Atom], bool]:
  """Whether a value is 0 as written: the gradient of what is not used."""
  found: set[int] = set()
  zero = lambda a: not np.any(a.val) if isinstance(a, core.Literal) else a in found
  for step in program.steps:
    if step.eqn.primitive.name in _SPREAD and all(map(zero, step.inputs)):
      found.update(step.outputs)
  return zero


def _partition(program: Program, gradients: Sequence[Atom], dx: Sequence[Atom]
               ) -> tuple[set[int], set[int]]:
  """The steps of I and those of W."""
  live, needed = program.needed([*gradients, *dx]), program.needed(dx)
  late: set[int] = set()
  made_late: set[int] = set()
  for i in sorted(live - needed):
    step = program.steps[i]
    if step.eqn.primitive.name in HEAVY or made_late.intersection(numbers(step.inputs)):
      late.add(i)
      made_late.update(step.outputs)
  readers: dict[int, set[int]] = {}
  for i in live:
    for a in numbers(program.steps[i].inputs):
      readers.setdefault(a, set()).add(i)
  results = set(numbers(gradients))
  for i in sorted(live - needed - late, reverse=True):  # what only prepares operands of W
    step = program.steps[i]
    reading = set().union(*(readers.get(a, set()) for a in step.outputs))
    if (step.eqn.primitive.name in _LAYOUT and reading <= late
        and not results.intersection(step.outputs)):
      late.add(i)
  return live - late, late
