"""The executor: one SPMD program that runs any pipeline schedule (report 3.2.1).

All ranks of the mesh axis `pipe` run the same program, a scan over ticks. At a tick a rank looks up
in its column of the tables (`schedules/tables.py`) what to do and does that op: a forward, a part
of a backward, or a forward of one micro-batch and the backward of another, in one straight line and
in an order that hides the all-to-alls of one behind the matmuls of the other (`interleave.py`).
Then all ranks pass on what they made by the same permutes.

    read     one slot of each buffer: x, g, i, w, c
    do       the opcode's branch: what it makes goes into its slots and sums, in place
    send     y and dx by the channels FR, FL, BR, BL; write what came

A branch is a loop of no or one turn, and not one of a conditional's: XLA copies whatever goes in
and out of a conditional, and all branches of one must return the same arrays, zeros where they make
none. A loop works on its state where it lies. So nothing is copied, what an op does not make costs
nothing, and a gradient is added where it belongs by the op that made it. What a branch reads goes
through a barrier in the loop, or the compiler would move the work in front of the loop, where every
rank would do all of it at every tick.

Legal within a branch are collectives over axes other than `pipe` whose groups are the ranks of one
pipe rank, for these do the same op; but no ppermute, which waits for all devices of the mesh.

Stages may be unlike: a `type` tells those apart that compute with other layers, and tables made
with types have branches of their own for each. What they keep for the backward pass is put into one
pool of arrays: as many of each shape as the type that keeps most of that shape.

The parts of a stage are functions of arrays:

    enter(shared, data) -> x                              input of the first stage
    stage(own, shared, fixed, data, x) -> Result          one for each type

`own` are the parameters of the stage, `shared` those that several stages use (embedding, head):
each rank has them, and their gradients are to be summed over the ranks. `fixed` is a part of the
stage that has no gradient, `data` the micro-batch.
"""

from collections.abc import Callable, Hashable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dsv3_jax.parallel import interleave, program, sharding
from dsv3_jax.parallel.branch import Pool, State, at, join, put, where
from dsv3_jax.parallel.program import Array
from dsv3_jax.parallel.schedules.tables import Opcode, Role, Tables
from dsv3_jax.parallel.split import split, whole


class Result(NamedTuple):
  """What a stage's forward gives.

  Attributes:
    y: the next stage's input, of the shape and dtype of x; None of the last stage.
    objective: fp32 scalar, this stage's part of what is minimised; a cross-entropy on the last, a
      balance loss on any. Each has the seed 1, so that the means of the batch are to be in it.
    stats: pytree of fp32 arrays, of one form for all types, to be summed over micro-batches.
    early: gradients of some of shared's entries (by key) that the forward has made already, such
      as a head's, which are then not worth keeping. The stage stops the gradient there.
  """

  y: jax.Array | None
  objective: jax.Array
  stats: Any = ()
  early: Mapping[str, Any] = {}


class Sums(NamedTuple):
  """Sums over this rank's micro-batches, or maxima; nothing is summed over devices.

  Attributes:
    objective: fp32.
    stats: leaves [C, ...].
    own: gradients, fp32, leaves [C, ...] as own's; None of a schedule without backward passes.
    shared: gradients, fp32; None likewise.
  """

  objective: jax.Array
  stats: Any
  own: Any = None
  shared: Any = None


def run(tables: Tables, enter: Callable, stages: Mapping[Hashable, Callable], own: Any,
        shared: Mapping[str, Any], fixed: Any, data: Any, *, axis: str = "pipe",
        axes: tuple[str, ...] = ("pipe",), maxima: Any = (False, False)) -> Sums:
  """Runs a schedule, or the forward passes of one. To be called inside shard_map.

  Args:
    tables: of the schedule's ticks, with the stages' types.
    enter, stages: see the module docstring; stages by type.
    own: this rank's parameters, leaves [C, ...] for the chunks that a rank holds; floating.
    shared: parameters that every rank has, floating.
    fixed: leaves [C, ...].
    data: the batch, leaves [M, ...], which every rank has.
    axis: the mesh axis of the pipeline.
    axes: all mesh axes, over which the gradients differ until they are summed.
    maxima: trees of bool, (own, shared) or prefixes of these: where True, the "gradients" of a leaf
      are magnitudes (FP8's amaxes come out so), at least 0, and the largest counts, not the sum.

  Raises:
    ValueError: the axis' size is not the number of the tables' ranks; a stage changes the shape or
      dtype of what passes through.
  """
  ranks, chunks = tables.columns["op"].shape[1], _chunks(tables)
  if lax.axis_size(axis) != ranks:
    raise ValueError(f"the tables are for {ranks} ranks, and mesh axis {axis!r} has "
                     f"{lax.axis_size(axis)}; make the schedule with the axis' size")
  own, shared, fixed, data = sharding.varying((own, shared, fixed, data), axes)
  own_C, fixed_C = ([jax.tree.map(lambda a, c=c: a[c], tree) for c in range(chunks)]
                    for tree in (own, fixed))
  weights, some = (own_C[0], shared), at(data, 0)
  enter_here = lambda shared, micro: sharding.varying(enter(shared, micro), axes)
  entered = jax.eval_shape(enter_here, shared, some)
  passing, fp32 = Array(entered.shape, entered.dtype, axes), Array((), jnp.float32, axes)
  x = passing.zeros()
  entering = program.reads(enter_here, shared, some)[:len(jax.tree.leaves(shared))]
  trains = any(opcode.backward for opcode in tables.opcodes)
  stats, parts = None, {}
  for kind in dict.fromkeys(role.type for opcode in tables.opcodes for role in opcode[1:] if role):
    stage = _as_split(stages[kind], axes)
    (y, _), (stats, _) = jax.eval_shape(stage, weights, fixed_C[0], some, x)
    if y is not None and (y.shape, y.dtype) != (x.shape, x.dtype):
      raise ValueError(f"stage {kind!r} makes {y.dtype}{list(y.shape)} of {x.dtype}"
                       f"{list(x.shape)}; what passes from stage to stage must stay alike")
    parts[kind] = split(stage, weights, fixed_C[0], some, x) if trains else whole(stage)
  pools = {name: Pool({kind: getattr(s, field) for kind, s in parts.items()})
           for name, field in (("i", "keeps_i"), ("w", "keeps_w"), ("c", "crossing"))}
  own_maxima, shared_maxima = (jax.tree.leaves(jax.tree.broadcast(prefix, tree))
                               for prefix, tree in zip(maxima, weights, strict=True))

  def keep(state: State, found: State, name: str, role: Role, row, values) -> None:
    for k, value in zip(pools[name].places(role.type), values, strict=True):
      found[name, k] = put(state[name, k], row[f"{name}_write"], value)

  def add(state: State, found: State, name: str, values, maxima, chunk: int | None = None) -> None:
    """Values to their sums, to the chunk's entry where sums have one for each; None adds nothing"""
    for k, (value, maximum) in enumerate(zip(values, maxima, strict=True)):
      if value is None:
        continue
      total = found.get((name, k), state[name, k])
      if chunk is not None and chunks > 1:
        found[name, k] = put(total, chunk, join(maximum, total[chunk], value))
      else:  # of one chunk the slice is the whole, and XLA would copy what it reshapes
        found[name, k] = join(maximum, total, value if chunk is None else value[None])

  def forward(state: State, role: Role, given: dict[str, Any]) -> State:
    row, shared = given["row"], given["shared"]
    micro = at(given["data"], row["forward_microbatch"])
    x = enter_here(shared, micro) if role.first else given["read"]["x",]
    own, fixed = given["forward"]
    ((y, objective), (stats, early)), i, w = parts[role.type].forward(
        (own, shared), fixed, micro, x)
    found = {("objective",): state["objective",] + objective}
    keep(state, found, "i", role, row, i)
    keep(state, found, "w", role, row, w)
    stats = jax.tree.leaves(stats)
    add(state, found, "stats", stats, [False] * len(stats), role.chunk)
    if trains:
      none = {key: jax.tree.map(lambda _: None, tree) for key, tree in shared.items()}
      early = jax.tree.leaves(none | early, is_leaf=lambda g: g is None)
      add(state, found, "shared", early, shared_maxima)
    if role.local:
      found["x",] = put(state["x",], row["x_write"], y)
    elif y is not None:
      found["y",] = y
    return found

  def backward(state: State, kind: str, role: Role, given: dict[str, Any]) -> State:
    row, shared, part = given["row"], given["shared"], parts[role.type]
    micro = at(given["data"], row["backward_microbatch"])
    own, fixed = given["backward"]
    known = (own, shared), fixed, micro
    i, w, c = ([given["read"].get((p, k)) for k in pools[p].places(role.type)] for p in "iwc")
    found, gradients = {}, []
    if kind != "W":
      light, dx, c = part.backward_input(*known, i, w, given["read"]["g",])
      gradients.append(light)
      if kind == "I":
        keep(state, found, "c", role, row, c)
      if role.first:
        entered = jax.tree.leaves(jax.vjp(lambda s: enter_here(s, micro), shared)[1](dx)[0])
        entered = [g if used else None for g, used in zip(entered, entering, strict=True)]
        add(state, found, "shared", entered, shared_maxima)
      elif role.local:
        found["g",] = put(state["g",], row["g_write"], dx)
      else:
        found["dx",] = dx
    if kind != "I":
      gradients.append(part.backward_weights(*known, w, c))
    gradients = [next((g for g in gs if g is not None), None) for gs in zip(*gradients)]
    add(state, found, "own", gradients[:len(own_maxima)], own_maxima, role.chunk)
    add(state, found, "shared", gradients[len(own_maxima):], shared_maxima)
    return found

  def branch(number: int, opcode: Opcode) -> Callable:
    @jax.named_scope(f"branch_{number}/{opcode.kind}")  # a profile's, and analysis/overlap.py's
    def body(state: State, given: dict[str, Any]) -> State:
      found = {}
      if opcode.forward is not None:
        found |= forward(state, opcode.forward, given)
      if opcode.backward is not None:
        found |= backward(state | found, opcode.kind, opcode.backward, given)
      return sharding.varying(found, axes)

    return interleave.interleaved(body) if opcode.kind == "FB" else body

  def seen(opcode: Opcode, row, read: State) -> dict[str, Any]:
    """What a branch reads, and what is read of the buffers that it writes."""
    given = {"row": row, "data": data, "shared": shared}
    used = {"F": ("xiw", ""), "FB": ("xiw", "giw"), "B": ("", "giw"), "I": ("", "giwc"),
            "W": ("", "wc")}[opcode.kind]
    names = set()
    for part, buffers in zip(("forward", "backward"), used, strict=True):
      if (role := getattr(opcode, part)) is not None:
        given[part] = own_C[role.chunk], fixed_C[role.chunk]
        names |= {(b, k) for b in buffers if b in pools for k in pools[b].places(role.type)}
        names |= {(b,) for b in buffers if b not in pools}
    return given | {"read": {name: a for name, a in read.items() if name in names}}

  right = [(r, r + 1) for r in range(ranks - 1)]
  left = [(b, a) for a, b in right]

  def tick(state: State, row) -> tuple[State, None]:
    for channel in tables.channels:  # what the tick before made
      made, name = (("y",), ("x",)) if channel[0] == "F" else (("dx",), ("g",))
      value = lax.ppermute(state[made], axis, right if channel[1] == "R" else left)
      state = state | {name: put(state[name], row[channel], value)}
    read = {name: at(a, row[f"{name[0]}_read"]) for name, a in state.items() if name[0] in slots}
    for number, opcode in enumerate(tables.opcodes):
      if opcode.kind is not None:
        given = seen(opcode, row, read)
        state = where(row["op"] == number, branch(number, opcode), state, given, given["read"])
    return state, None

  slots = {name: count for name, count in tables.slots.items() if count}
  sums = {"own": own, "shared": shared} if trains else {}
  sums["stats"] = jax.tree.map(lambda a: fp32.zeros(chunks, *a.shape), stats)
  state: State = {(p, k): a.zeros(slots[p]) for p in "iwc" if p in slots
                  for k, a in enumerate(pools[p].arrays)}
  state |= {(name, k): fp32.zeros(*a.shape) for name, tree in sums.items()
            for k, a in enumerate(jax.tree.leaves(tree))}
  state |= {(name,): passing.zeros(slots[name]) for name in "xg" if name in slots}
  state |= {("y",): passing.zeros(), ("dx",): passing.zeros(), ("objective",): fp32.zeros()}
  columns = tables.columns | {c: np.roll(tables.columns[c], 1, 0) for c in tables.channels}
  rank = lax.axis_index(axis)
  rows = {name: sharding.varying(jnp.asarray(column)[:, rank], axes)
          for name, column in columns.items()}
  state = lax.scan(tick, state, rows)[0]

  def total(name: str) -> Any:
    leaves, tree = jax.tree.flatten(sums[name])
    return jax.tree.unflatten(tree, [state[name, k] for k in range(len(leaves))])

  return Sums(state["objective",], **{name: total(name) for name in sums})


def _chunks(tables: Tables) -> int:
  return 1 + max(role.chunk for opcode in tables.opcodes for role in opcode[1:] if role)


def _as_split(stage: Callable, axes: tuple[str, ...]) -> Callable:
  """A stage in the form that `split` takes, its results varying over `axes`."""

  def function(weights, fixed, data, x):
    result = stage(*weights, fixed, data, x)
    result = sharding.varying(result, axes)
    return (result.y, result.objective), (result.stats, result.early)

  return function
