"""Between a host's memory and global arrays, where each process holds some of the devices only."""

import bisect
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

Key = tuple[tuple[int, int], ...]  # start and stop of a part along each axis of its array


def key(index: tuple[slice, ...], shape: tuple[int, ...]) -> Key:
  """A part's place in an array, hashable."""
  return tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True))


def _make(shape: tuple[int, ...], where: jax.sharding.Sharding, part: Callable) -> jax.Array:
  with jax.transfer_guard("allow"):  # as explicit as device_put, for which guards make way
    return jax.make_array_from_callback(shape, where, part)


def put(tree: Any, where: jax.sharding.Sharding) -> Any:
  """Arrays of values that every process has whole; each gives its own devices their parts."""
  if where.is_fully_addressable:
    return jax.device_put(tree, where)

  def one(x):
    x = np.asarray(x)
    return _make(x.shape, where, lambda index: x[index])

  return jax.tree.map(one, tree)


def rows(where: jax.sharding.Sharding, shape: Sequence[int], axis: int) -> tuple[int, ...]:
  """Indices along `axis` of which this process's devices hold something, in order."""
  held = where.addressable_devices_indices_map(tuple(shape)).values()
  return tuple(sorted({i for index in held for i in range(*index[axis].indices(shape[axis]))}))


def put_rows(tree: Any, where: jax.sharding.Sharding, held: Sequence[int], total: int, axis: int
             ) -> Any:
  """Arrays of which each process has some rows.

  Args:
    tree: numpy arrays with the rows `held` along `axis`.
    where: their sharding.
    held: of `rows`.
    total: rows of all processes together.
    axis: of the rows.
  """
  if len(held) == total and where.is_fully_addressable:
    return jax.device_put(tree, where)

  def one(x):
    shape = (*x.shape[:axis], total, *x.shape[axis + 1:])

    def part(index):
      start, stop, _ = index[axis].indices(total)
      first = bisect.bisect_left(held, start)
      return x[(*index[:axis], slice(first, first + stop - start), *index[axis + 1:])]

    return _make(shape, where, part)

  return jax.tree.map(one, tree)


def whole(tree: Any, mesh: jax.sharding.Mesh | None) -> Any:
  """Arrays of a mesh as whole arrays on this process's first device.

  Where processes share the mesh, all of them must call it, and every device holds the whole for a
  moment.
  """
  if mesh is None or not mesh.is_multi_process:
    return jax.device_put(tree, jax.local_devices()[0])
  replicated = jax.jit(_same, out_shardings=NamedSharding(mesh, PartitionSpec()))(tree)
  return jax.tree.map(lambda x: x.addressable_data(0), replicated)


def _same(tree: Any) -> Any:
  return tree


def parts(x: Any) -> Any:
  """This process's part of an array, numpy: the whole where it has all, else {key: part}."""
  if isinstance(x, jax.Array) and not x.is_fully_addressable:
    return {key(s.index, x.shape): np.asarray(s.data) for s in x.addressable_shards}
  return np.asarray(x)


def join(tree: Any, like: Any) -> Any:
  """The reverse of `parts`: arrays with the shapes and shardings of `like`."""
  def one(x, held):
    if isinstance(held, dict):
      return _make(x.shape, x.sharding, lambda index: held[key(index, x.shape)])
    return jax.device_put(held, x.sharding)

  return jax.tree.map(one, like, tree)
