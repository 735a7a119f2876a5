"""The executor: one SPMD program that runs any pipeline schedule (report 3.2.1).

All ranks of the mesh axis `pipe` run the same program, a scan over ticks. At a tick a rank looks up
in its column of the tables (`schedules/tables.py`) what to do and does that branch of a switch: a
forward, a part of a backward, or a forward of one micro-batch and the backward of another, in one
straight line, so that the compiler can hide the all-to-alls of one behind the matmuls of the
other. Then all ranks pass on what they made by the same permutes.

    read     one slot of each buffer: x, g, i, w, c
    switch   the opcode's branch: slots in, new values out
    add      gradients and statistics to their sums
    write    each value into its slot, what nobody wants into the last slot
    send     y and dx by the channels FR, FL, BR, BL; write what came

Buffers and sums stay outside of the switch, since XLA copies what goes in and out of a conditional:
the branches see one slot. A branch returns values of one form whatever it does, zeros where it
makes none.

Legal within a branch are collectives over axes other than `pipe` whose groups are the ranks of one
pipe rank, for these take the same branch; but no ppermute, which waits for all devices of the mesh.
Never vmap this: a switch over a batch runs all branches.

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

import collections
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from dsv3_jax.parallel import sharding
from dsv3_jax.parallel.schedules.tables import Opcode, Tables
from dsv3_jax.parallel.split import Array, Split, split


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
    own: gradients, fp32, leaves [C, ...] as own's.
    shared: gradients, fp32.
    stats: leaves [C, ...].
  """

  objective: jax.Array
  own: Any
  shared: Any
  stats: Any


class _Out(NamedTuple):
  """What a branch returns."""

  y: jax.Array
  dx: jax.Array
  i: list[jax.Array]
  w: list[jax.Array]
  c: list[jax.Array]
  own: list[jax.Array]
  shared: Any
  objective: jax.Array
  stats: Any


class _Pool:
  """Arrays that make room for one of several lists of arrays at a time."""

  def __init__(self, lists: Mapping[Hashable, Sequence[Array]]):
    most = collections.Counter()
    for arrays in lists.values():
      most |= collections.Counter(arrays)
    self.arrays = list(most.elements())
    self._places = {}
    for key, arrays in lists.items():
      free = {a: iter([k for k, b in enumerate(self.arrays) if a == b]) for a in set(arrays)}
      self._places[key] = [next(free[a]) for a in arrays]

  def zeros(self, *lead: int) -> list[jax.Array]:
    return [a.zeros(*lead) for a in self.arrays]

  def put(self, key: Hashable, values: Sequence[jax.Array]) -> list[jax.Array]:
    pool = self.zeros()
    for place, value in zip(self._places[key], values, strict=True):
      pool[place] = lax.convert_element_type(value, self.arrays[place].dtype)
    return pool

  def get(self, key: Hashable, pool: Sequence[jax.Array]) -> list[jax.Array]:
    return [pool[place] for place in self._places[key]]


def _at(tree: Any, index: Any) -> Any:
  return jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, index, 0, keepdims=False), tree)


def _set(tree: Any, index: Any, values: Any) -> Any:
  return jax.tree.map(lambda a, v: lax.dynamic_update_index_in_dim(a, v, index, 0), tree, values)


def _add(tree: Any, index: Any, values: Any, maxima: Any) -> Any:
  def leaf(maximum, a, v):
    return a.at[index].max(v) if maximum else a.at[index].add(v)

  return jax.tree.map(leaf, jax.tree.broadcast(maxima, tree), tree, values)


def _join(maximum: bool, total: jax.Array, value: jax.Array) -> jax.Array:
  return jnp.maximum(total, value) if maximum else total + value


def run(tables: Tables, enter: Callable, stages: Mapping[Hashable, Callable], own: Any,
        shared: Mapping[str, Any], fixed: Any, data: Any, *, axis: str = "pipe",
        axes: tuple[str, ...] = ("pipe",), maxima: Any = (False, False)) -> Sums:
  """Runs a schedule. To be called inside shard_map.

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
  weights_C = [(jax.tree.map(lambda a, c=c: a[c], own), shared) for c in range(chunks)]
  fixed_C = [jax.tree.map(lambda a, c=c: a[c], fixed) for c in range(chunks)]
  some = _at(data, 0)
  x = sharding.varying(enter(shared, some), axes)
  stats, splits = None, {}
  for kind in dict.fromkeys(role.type for opcode in tables.opcodes for role in opcode[1:] if role):
    stage = _as_split(stages[kind], axes)
    (y, _), (stats, _) = jax.eval_shape(stage, weights_C[0], fixed_C[0], some, x)
    if y is not None and (y.shape, y.dtype) != (x.shape, x.dtype):
      raise ValueError(f"stage {kind!r} makes {y.dtype}{list(y.shape)} of {x.dtype}"
                       f"{list(x.shape)}; what passes from stage to stage must stay alike")
    splits[kind] = split(stage, weights_C[0], fixed_C[0], some, x)
  pools = {name: _Pool({kind: getattr(s, field) for kind, s in splits.items()})
           for name, field in (("i", "keeps_i"), ("w", "keeps_w"), ("c", "crossing"))}

  def fp32(tree, *lead):
    return jax.tree.map(lambda a: Array((*lead, *a.shape), jnp.float32, axes).zeros(), tree)

  x_type = Array(x.shape, x.dtype, axes)
  own_leaves = jax.tree.leaves(weights_C[0][0])
  own_maxima, shared_maxima = jax.tree.broadcast(tuple(maxima), weights_C[0])
  own_maxima = jax.tree.leaves(own_maxima)

  def nothing() -> _Out:
    return _Out(x_type.zeros(), x_type.zeros(), *(pools[p].zeros() for p in "iwc"),
                fp32(own_leaves), fp32(shared), fp32(jnp.zeros(())), fp32(stats))

  def branch(opcode: Opcode) -> Callable:
    @jax.named_scope(opcode.kind or "idle")  # a profile's ticks, and what analysis/overlap.py asks
    def body(read, row):
      out = nothing()
      if opcode.forward is not None:
        out = _forward(out, opcode.forward, read["x"], row["forward_microbatch"])
      if opcode.backward is not None:
        out = _backward(out, opcode.kind, opcode.backward, read, row["backward_microbatch"])
      return sharding.varying(out._replace(i=(), w=(), c=()), axes)._replace(
          i=out.i, w=out.w, c=out.c)

    return body

  def _forward(out, role, x, microbatch):
    micro = _at(data, microbatch)
    x = sharding.varying(enter(shared, micro), axes) if role.first else x
    ((y, objective), (found, early)), i, w = splits[role.type].forward(
        weights_C[role.chunk], fixed_C[role.chunk], micro, x)
    early = {key: jax.tree.map(lambda a: a.astype(jnp.float32), g) for key, g in early.items()}
    return out._replace(y=out.y if y is None else y, i=pools["i"].put(role.type, i),
                        w=pools["w"].put(role.type, w), objective=objective, stats=found,
                        shared=out.shared | early)

  def _backward(out, kind, role, read, microbatch):
    parts: Split = splits[role.type]
    micro = _at(data, microbatch)
    given = weights_C[role.chunk], fixed_C[role.chunk], micro
    i, w, c = (pools[p].get(role.type, read[p]) for p in "iwc")
    found = []
    if kind != "W":
      light, dx, c = parts.backward_input(*given, i, w, read["g"])
      found.append(light)
      out = out._replace(dx=dx)
      if role.first:
        pull = jax.vjp(lambda s: sharding.varying(enter(s, micro), axes), shared)[1]
        out = out._replace(shared=jax.tree.map(_join, shared_maxima, out.shared, pull(dx)[0]))
      if kind == "I":
        out = out._replace(c=pools["c"].put(role.type, c))
    if kind != "I":
      found.append(parts.backward_weights(*given, w, c))
    gradients = [next((g for g in gs if g is not None), None) for gs in zip(*found)]
    n = len(own_leaves)
    own = [a if g is None else g.astype(jnp.float32) for a, g in zip(out.own, gradients)]
    leaves, tree = jax.tree.flatten(out.shared)
    leaves = [a if g is None else _join(m, a, g) for m, a, g in zip(
        jax.tree.leaves(shared_maxima), leaves, gradients[n:], strict=True)]
    return out._replace(own=own, shared=jax.tree.unflatten(tree, leaves))

  branches = [branch(opcode) for opcode in tables.opcodes]
  chunk_of = lambda part: jnp.array([0 if (role := getattr(o, part)) is None else role.chunk
                                     for o in tables.opcodes])
  forward_chunk, backward_chunk = chunk_of("forward"), chunk_of("backward")
  right = [(r, r + 1) for r in range(ranks - 1)]
  left = [(b, a) for a, b in right]

  def tick(carry, row):
    buffers, sums = carry
    read = {name: _at(buffer, row[f"{name}_read"]) for name, buffer in buffers.items()}
    out = lax.switch(row["op"], branches, read, row)
    made = {"x": out.y, "g": out.dx, "i": out.i, "w": out.w, "c": out.c}
    buffers = {n: _set(buffer, row[f"{n}_write"], made[n]) for n, buffer in buffers.items()}
    for channel in tables.channels:
      value = lax.ppermute(out.y if channel[0] == "F" else out.dx, axis,
                           right if channel[1] == "R" else left)
      name = "x" if channel[0] == "F" else "g"
      buffers[name] = _set(buffers[name], row[channel], value)
    sums = Sums(sums.objective + out.objective,
                _add(sums.own, backward_chunk[row["op"]], out.own, own_maxima),
                jax.tree.map(_join, shared_maxima, sums.shared, out.shared),
                _add(sums.stats, forward_chunk[row["op"]], out.stats, False))
    return (buffers, sums), None

  slots = tables.slots
  buffers = {"x": x_type.zeros(slots["x"]), "g": x_type.zeros(slots["g"]),
             **{p: pools[p].zeros(slots[p]) for p in "iwc"}}
  sums = Sums(fp32(jnp.zeros(())), fp32(own_leaves, chunks), fp32(shared), fp32(stats, chunks))
  rank = lax.axis_index(axis)
  rows = {name: sharding.varying(jnp.asarray(column)[:, rank], axes)
          for name, column in tables.columns.items()}
  sums = lax.scan(tick, (buffers, sums), rows)[0][1]
  return sums._replace(own=jax.tree.unflatten(jax.tree.structure(weights_C[0][0]), sums.own))


def _chunks(tables: Tables) -> int:
  return 1 + max(role.chunk for opcode in tables.opcodes for role in opcode[1:] if role)


def _as_split(stage: Callable, axes: tuple[str, ...]) -> Callable:
  """A stage in the form that `split` takes, its results varying over `axes`."""

  def function(weights, fixed, data, x):
    result = stage(*weights, fixed, data, x)
    result = sharding.varying(result, axes)
    return (result.y, result.objective), (result.stats, result.early)

  return function
